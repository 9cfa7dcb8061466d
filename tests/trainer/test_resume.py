"""A run goes on where it was: in a new process, on another mesh, after an error, a signal, or its end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import run_small
from jax.sharding import PartitionSpec as P

from curvtrain.trainer import Call, Diverged, EarlyStopping, Preempted, read_jsonl
from curvtrain.trainer.run import termination

SCRIPT = Path(__file__).with_name("run_small.py")
pytestmark = pytest.mark.usefixtures("quick_compile")


def plain(**options):
    """The small run without curvature, which compiles quickly."""
    return run_small.make(**{"estimator": None, "optimizer": optax.adam(1e-2), **options})


def on_disk(folder):
    return sorted(int(path.name) for path in Path(folder).iterdir() if path.name.isdigit())


def same(ours, theirs):
    ours, theirs = run_small.leaves(ours), run_small.leaves(theirs)
    return sorted(ours) == sorted(theirs) and all(ours[n].tobytes() == theirs[n].tobytes() for n in theirs)


def rows(folder):
    """{(step, name): value} of what was logged; asserts that nothing was logged twice."""
    found = [((row["step"], n), v) for row in read_jsonl(folder / "metrics.jsonl") for n, v in row.items()]
    found = [(key, value) for key, value in found if key[1] not in ("step", "steps_per_second")]
    assert len(found) == len(dict(found))
    return dict(found)


def raising(step, error=ZeroDivisionError):
    """A hook that fails at a step."""

    def fail(run):
        if run.step == step:
            raise error

    return Call(fail)


# -- in a new process --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """`start(folder, **options)`: the small run with everything in it, on eight devices, in a process of its own."""
    environment = {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def start(folder, **options):
        options = {"workdir": str(folder / "run"), "out": str(folder / "end.npz"), **options}
        command = [sys.executable, str(SCRIPT), json.dumps(options)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    return start


@pytest.mark.slow
def test_a_new_process_goes_on_bit_by_bit(tmp_path, processes):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, steps in ((whole, 14), (parts, 7), (parts, 14)):
        done = processes(folder, steps=steps)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # no noise
    assert done.stdout.split()[:3] == ["ready", "step", "8"]
    with np.load(parts / "end.npz") as ours, np.load(whole / "end.npz") as theirs:
        assert {name.split("/")[0] for name in theirs} >= {"params", "opt_state", "curvature", "model_state", "ema"}
        assert [name for name in theirs if ours[name].tobytes() != theirs[name].tobytes()] == []
        assert np.any(theirs["curvature/converged"])  # FOSI had eigenpairs to use
        assert json.loads(str(theirs["positions"]))["curvature"]["next_index"] == 4
        assert list(ours["steps"]) == list(range(1, 15))
    ours, theirs = rows(parts / "run"), rows(whole / "run")
    assert {k: v for k, v in ours.items() if k in theirs} == theirs
    assert {step for step, name in set(ours) - set(theirs)} == {7}  # the evaluation at what then was the end


@pytest.mark.slow
def test_a_new_process_goes_on_bit_by_bit_with_kfac(tmp_path, processes):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, steps in ((whole, 10), (parts, 5), (parts, 10)):  # step 5 comes before a refresh that is due at 6
        done = processes(folder, steps=steps, estimator="kfac")
        assert done.returncode == 0 and done.stderr == "", done.stderr
    with np.load(parts / "end.npz") as ours, np.load(whole / "end.npz") as theirs:
        assert [name for name in theirs if ours[name].tobytes() != theirs[name].tobytes()] == []
        assert theirs["curvature/refreshes"] == 4 and theirs["curvature/updates"] == 10


@pytest.mark.slow
def test_a_new_process_goes_on_bit_by_bit_with_psgd(tmp_path, processes):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, steps in ((whole, 10), (parts, 5), (parts, 10)):  # step 5 comes between two fits
        done = processes(folder, steps=steps, estimator="psgd")
        assert done.returncode == 0 and done.stderr == "", done.stderr
    with np.load(parts / "end.npz") as ours, np.load(whole / "end.npz") as theirs:
        assert [name for name in theirs if ours[name].tobytes() != theirs[name].tobytes()] == []
        assert theirs["curvature/fits"] == 4 and theirs["curvature/calls"] == 10


@pytest.mark.slow
def test_a_program_that_exits_in_a_hook_has_its_last_checkpoint(tmp_path, processes):
    done = processes(tmp_path, steps=20, fail=[9, "exit"])
    assert done.returncode == 3 and done.stderr == ""
    assert on_disk(tmp_path / "run") == [4, 8] and not list((tmp_path / "run").glob("*tmp*"))
    again = processes(tmp_path, steps=10)
    assert again.returncode == 0 and again.stdout.split() == ["ready", "step", "9", "step", "10"]


# -- after an error ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ZeroDivisionError, OSError, SystemExit, KeyboardInterrupt])
def test_an_error_in_a_hook_loses_no_checkpoint(tmp_path, error):
    trainer = plain(workdir=tmp_path, hooks=[raising(5, error)], save_every=2)
    with pytest.raises(error):
        trainer.fit()
    assert on_disk(tmp_path) == [2, 4] and not list(tmp_path.glob("*tmp*"))
    result = plain(workdir=tmp_path, steps=6).fit()
    assert [row["step"] for row in result.history if "train/loss" in row] == [5, 6]


def test_without_a_workdir_fit_goes_on_from_where_an_error_stopped_it():
    whole, parts = plain(steps=8), plain(steps=8, hooks=[raising(5)])
    whole.fit()
    with pytest.raises(ZeroDivisionError):
        parts.fit()
    assert int(parts.state.step) == 5
    parts.fit()
    assert same(parts.state, whole.state)


# -- after the end -----------------------------------------------------------------------------------------------------


def test_a_finished_run_is_only_evaluated(tmp_path):
    first = plain(workdir=tmp_path, steps=4)
    result = first.fit()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    called = []
    second = plain(workdir=tmp_path, steps=4, hooks=[Call(lambda run: called.append(run.step))])
    again = second.fit()
    assert same(second.state, first.state) and not called and on_disk(tmp_path) == [4]
    assert again.step == 4 and [row["step"] for row in again.history] == [4]
    assert again.metrics["eval/loss"] == result.metrics["eval/loss"] == again.history[0]["eval/loss"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert plain(workdir=tmp_path, steps=2).fit().step == 4  # fewer steps than were done


def test_more_steps_go_on_on_another_mesh(tmp_path):
    wide = type("Small", (run_small.Small,), {"width": 128})
    first = run_small.make(cls=wide, workdir=tmp_path, steps=4, mesh={"data": 8})
    first.fit()
    mesh = {"mesh": {"data": 2, "fsdp": 4}, "sharding": "fsdp"}
    again = run_small.make(cls=wide, workdir=tmp_path, steps=4, **mesh)
    again.fit()
    assert same(again.state, first.state)
    kernel, vectors = again.state.params["fc1"]["kernel"], again.state.curvature.vectors["fc1"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp") and vectors.sharding.spec == P(None, None, "fsdp")
    more = run_small.make(cls=wide, workdir=tmp_path, steps=7, **mesh)
    assert more.fit().step == 7
    whole = run_small.make(cls=wide, steps=7, mesh={"data": 8})
    whole.fit()
    for name, value in run_small.leaves(whole.state.params).items():
        np.testing.assert_allclose(run_small.leaves(more.state.params)[name], value, rtol=1e-3, atol=1e-4)


# -- what is remembered ------------------------------------------------------------------------------------------------


def constant(**options):
    """A run that never improves."""
    return plain(optimizer=optax.sgd(0.0), ema=None, eval_every=2, save_every=1, steps=30, **options)


class NoNorm(run_small.Small):
    def build_model(self, rngs):
        return run_small.nnx.Linear(8, 4, rngs=rngs)


def test_early_stopping_remembers_over_a_restart(tmp_path):
    stopping = lambda: EarlyStopping("eval/loss", patience=3)
    whole = constant(cls=NoNorm, workdir=tmp_path / "whole", hooks=[stopping()]).fit()
    assert whole.step == 8 and "has not improved" in whole.stopped
    for step in (3, 6):
        with pytest.raises(ZeroDivisionError):
            constant(cls=NoNorm, workdir=tmp_path / "parts", hooks=[stopping(), raising(step)]).fit()
    more = [Call(lambda run: None), stopping()]  # another hook in front does not take its memory
    parts = constant(cls=NoNorm, workdir=tmp_path / "parts", hooks=more).fit()
    assert parts.step == 8 and parts.stopped == whole.stopped
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")  # and the last step is evaluated once


# -- SIGTERM -----------------------------------------------------------------------------------------------------------


class Watched(grain.sources.RandomAccessDataSource):
    """Evaluation data of 50 batches; asking for the fourth sends SIGTERM to this process."""

    def __init__(self, terminate):
        self.asked, self.terminate = 0, terminate

    def __len__(self):
        return 50

    def __getitem__(self, index):
        self.asked += 1
        if index == 3 and self.terminate:
            os.kill(os.getpid(), signal.SIGTERM)
        return run_small.data(run_small.BATCH, seed=int(index))


def evaluated_on(source, **options):
    # one thread, so that no batch is read ahead
    data = grain.MapDataset.source(source).to_iter_dataset(grain.ReadOptions(num_threads=0))
    trainer = plain(**options)
    trainer._eval_data = data
    return trainer


def test_sigterm_breaks_off_an_evaluation_and_the_next_run_makes_up_for_it(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    source = Watched(terminate=True)
    options = dict(workdir=tmp_path, steps=6, eval_every=3)
    with pytest.raises(Preempted) as stopped:
        evaluated_on(source, hooks=[EarlyStopping("eval/loss", patience=5)], **options).fit()
    assert stopped.value.code == 0 and 4 <= source.asked < 8
    assert signal.getsignal(signal.SIGTERM) is before
    assert on_disk(tmp_path) == [3]
    assert (3, "eval/loss") not in rows(tmp_path)
    with pytest.raises(Preempted):  # again, while it is made up for
        evaluated_on(Watched(terminate=True), **options).fit()
    assert on_disk(tmp_path) == [3]
    source = Watched(terminate=False)
    result = evaluated_on(source, hooks=[EarlyStopping("eval/loss", patience=5)], **options).fit()
    assert source.asked == 100
    assert [row["step"] for row in result.history if "eval/loss" in row] == [3, 6]
    assert {step for step, name in rows(tmp_path) if name == "train/loss"} == set(range(1, 7))


def test_sigterm_in_the_last_step_leaves_a_finished_run_to_be_evaluated(tmp_path):
    with pytest.raises(Preempted):
        evaluated_on(Watched(terminate=True), workdir=tmp_path, steps=2).fit()
    assert on_disk(tmp_path) == [2]
    result = evaluated_on(Watched(terminate=False), workdir=tmp_path, steps=2).fit()
    assert result.step == 2 and (2, "eval/loss") in rows(tmp_path)


def test_sigterm_while_the_last_checkpoint_is_written_does_not_cut_it_short(tmp_path, monkeypatch):
    from curvtrain.trainer.disk.checkpoint import Checkpoints

    leave = Checkpoints.__exit__

    def terminated(self, *exception):
        os.kill(os.getpid(), signal.SIGTERM)
        return leave(self, *exception)

    monkeypatch.setattr(Checkpoints, "__exit__", terminated)
    with pytest.raises(Preempted):
        plain(workdir=tmp_path, steps=2).fit()
    assert on_disk(tmp_path) == [2]


def test_the_handler_is_put_back(monkeypatch):
    own = lambda *_: None
    before = signal.signal(signal.SIGTERM, own)
    try:
        seen = []
        plain(steps=1, hooks=[Call(lambda run: seen.append(signal.getsignal(signal.SIGTERM)))]).fit()
        assert signal.getsignal(signal.SIGTERM) is own and seen[0] is not own
        with pytest.raises(ZeroDivisionError):
            plain(steps=2, hooks=[raising(1)]).fit()
        assert signal.getsignal(signal.SIGTERM) is own
        install = lambda number, handler: installed.append(handler)  # returns None: the one before is not Python's
        installed = []
        monkeypatch.setattr(termination.signal, "signal", install)
        plain(steps=1).fit()
        assert installed[-1] is signal.SIG_DFL
    finally:
        monkeypatch.undo()
        signal.signal(signal.SIGTERM, before)


def test_a_fit_in_another_thread_leaves_sigterm_to_the_program(tmp_path):
    received, results, begun = [], [], threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    try:
        slow = Call(lambda run: (begun.set(), time.sleep(0.05)))
        trainer = plain(workdir=tmp_path, steps=6, hooks=[slow])
        thread = threading.Thread(target=lambda: results.append(trainer.fit()))
        thread.start()
        assert begun.wait(120)
        os.kill(os.getpid(), signal.SIGTERM)
        thread.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [1] and results[0].step == 6 and on_disk(tmp_path)[-1] == 6


# -- never a checkpoint that is not finite -----------------------------------------------------------------------------


def assert_finite_checkpoints(folder, steps):
    assert on_disk(folder) == steps
    for step in steps:
        found = jax.tree.leaves(run_small.nnx.state(plain().load_model(folder, step), run_small.nnx.Param))
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in found)


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    rate = lambda count: jnp.where(count == 5, jnp.nan, 0.1)  # the loss of step 6 is finite, the parameters are not
    with pytest.raises(Diverged, match=r"parameters are not finite after step 6\. The newest checkpoint is step 3\."):
        plain(optimizer=optax.sgd(rate), workdir=tmp_path, save_every=3, steps=9).fit()
    assert_finite_checkpoints(tmp_path, [3])
    with pytest.raises(Diverged, match=r"not finite after step 6\. There is no checkpoint"):
        plain(optimizer=optax.sgd(rate), steps=6).fit()


def test_a_loss_that_is_not_finite_is_seen_before_a_save(tmp_path):
    data = run_small.data()
    number = data["x"][:, 0].argmax()
    data["x"][number] = np.nan
    guarded = optax.apply_if_finite(optax.sgd(0.1), max_consecutive_errors=100)  # parameters stay finite
    trainer = plain(optimizer=guarded, train_data=data, workdir=tmp_path, save_every=1, steps=13, log_every=100)
    with pytest.raises(Diverged, match=r"The training loss is nan at step (\d+) \(seen in steps 1 to \1\)") as error:
        trainer.fit()
    bad = int(str(error.value).split("at step ")[1].split()[0])
    assert on_disk(tmp_path) == ([] if bad == 1 else [step for step in (bad - 2, bad - 1) if step > 0])
