"""Checkpoints on disk: round trips, retention, damage, foreign checkpoints, a full disk, and models read back."""

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import run_small
from jax.sharding import NamedSharding, PartitionSpec

from curvtrain import CurvatureSchedule, TrainerConfig, curvature, optim
from curvtrain.trainer import CheckpointError, Mismatch
from curvtrain.trainer.disk.checkpoint import Checkpoints
from curvtrain.trainer.disk.workdir import LOCK
from curvtrain.trainer.mesh.sharding import make_mesh

RUN = {"trainer": "Test", "train_data": {"seed": 0}}
pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    # orbax leaves coroutines behind whose read of a damaged file failed: that they are collected is no concern here
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def config(folder, **options):
    return TrainerConfig(**{"steps": 10, "batch_size": 8, "workdir": folder, "keep_latest": 3, **options})


def state(value=0.0, sharding=None):
    made = {
        "w": jnp.full((8, 4), value, jnp.float32),
        "half": jnp.full(3, value, jnp.bfloat16),
        "count": jnp.int32(value),
        "key": jax.random.key(int(value)),
        "none": None,
    }
    return made if sharding is None else jax.device_put(made, sharding)


def abstract(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def write(folder, steps, scores=None, **options):
    """Checkpoints whose state holds their step; one process's worth."""
    with Checkpoints(config(folder, **options)) as checkpoints:
        for step in steps:
            ranked = None if (scores or {}).get(step) is None else {"loss": scores[step]}
            assert checkpoints.save(step, state(step), {"run": RUN}, ranked)


def read(folder, expected=RUN, target=None):
    with Checkpoints(config(folder)) as checkpoints:
        found, _ = checkpoints.restore(abstract(state()) if target is None else target, expected)
    step = int(found["count"])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(raw(a), raw(b)), found, state(step))
    return step


def raw(a):
    return jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a


def on_disk(folder):
    return sorted(int(path.name) for path in Path(folder).iterdir() if path.name.isdigit())


def snapshot(folder):
    """Every file below a folder but the lock's, with its content and the time of its last change."""
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != LOCK)
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# -- round trips -------------------------------------------------------------------------------------------------------


def test_state_comes_back_bit_by_bit_on_another_mesh(tmp_path):
    first, second = make_mesh({"data": 8}), make_mesh({"data": 2, "fsdp": 4})
    values = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    tree = state(3, NamedSharding(first, PartitionSpec()))
    tree["w"] = jax.device_put(values, NamedSharding(first, PartitionSpec("data")))
    with Checkpoints(config(tmp_path)) as checkpoints:
        checkpoints.save(3, tree, {"run": RUN, "own": [1]}, None)
    replicated = NamedSharding(second, PartitionSpec())
    target = abstract({**jax.device_put(tree, replicated)})
    target["w"] = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(second, PartitionSpec(None, "fsdp")))
    with Checkpoints(config(tmp_path)) as checkpoints:
        back, meta = checkpoints.restore(target, RUN)
    assert np.array_equal(back["w"], values) and back["w"].sharding.spec == PartitionSpec(None, "fsdp")
    assert back["half"].dtype == jnp.bfloat16 and int(back["count"]) == 3 and back["none"] is None
    assert jnp.array_equal(jax.random.key_data(back["key"]), jax.random.key_data(tree["key"]))
    assert meta["own"] == [1]


def test_orbax_itself_reads_it(tmp_path):
    write(tmp_path, [1, 2])
    with ocp.CheckpointManager(tmp_path) as manager:
        assert sorted(manager.all_steps()) == [1, 2]
        found = manager.restore(2)
    assert found["meta"]["run"] == RUN and np.all(found["state"]["w"] == 2)


def test_what_orbax_itself_wrote_is_read(tmp_path):
    """As this package did, too, before it wrote without orbax's manager."""
    handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(tmp_path, item_handlers=handlers) as manager:
        meta = ocp.args.JsonSave({"run": RUN, "scores": {}})
        manager.save(2, args=ocp.args.Composite(state=ocp.args.StandardSave(state(2)), meta=meta))
    assert read(tmp_path) == 2


def test_a_step_that_cannot_be_begun(tmp_path, monkeypatch, caplog):
    with Checkpoints(config(tmp_path)) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError("no room")))
            assert not checkpoints.save(1, state(1), {"run": RUN}, None)
        assert "Saving step 1 failed: OSError: no room" in caplog.text and checkpoints.steps == []
        assert checkpoints.save(2, state(2), {"run": RUN}, None)
    assert read(tmp_path) == 2


def test_a_kill_while_old_ones_are_removed_leaves_no_half_of_one(tmp_path, monkeypatch):
    write(tmp_path, [1, 2, 3])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        write(tmp_path, [4])
    assert on_disk(tmp_path) == [2, 3, 4] and (tmp_path / ".removed-1").is_dir()
    assert read(tmp_path) == 4 and not (tmp_path / ".removed-1").exists()


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
    bump = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)
    tree = {"w": jnp.zeros(100_000), "count": jnp.int32(0)}
    with Checkpoints(config(tmp_path)) as checkpoints:
        for step in range(1, 4):
            tree = bump(tree)
            checkpoints.save(step, tree, {"run": RUN}, None)
    with Checkpoints(config(tmp_path)) as checkpoints:
        back, _ = checkpoints.restore(abstract(tree), RUN)
    assert np.all(np.asarray(back["w"]) == 3) and int(back["count"]) == 3


def test_the_metadata_may_change_while_it_is_written(tmp_path, monkeypatch):
    """A hook hands out the list that it goes on appending to."""
    write_json = ocp.JsonCheckpointHandler._save_fn

    async def late(*args):
        time.sleep(0.2)
        return await write_json(*args)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", late)
    with Checkpoints(config(tmp_path)) as checkpoints:
        steps = [1]
        checkpoints.save(1, state(1), {"run": RUN, "steps": steps}, None)
        steps.append(2)
    with Checkpoints(config(tmp_path)) as checkpoints:
        assert checkpoints.restore(abstract(state()), RUN)[1]["steps"] == [1]


def test_a_step_that_is_there_is_left_as_it_is(tmp_path):
    with Checkpoints(config(tmp_path)) as checkpoints:
        assert checkpoints.save(1, state(1), {"run": RUN}, None)
        assert checkpoints.save(1, state(5), {"run": RUN}, None)
    assert read(tmp_path) == 1


def test_what_is_not_json_is_told_at_once(tmp_path):
    with Checkpoints(config(tmp_path)) as checkpoints, pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(1, state(1), {"run": RUN, "hooks": {1, 2}}, None)


# -- retention ---------------------------------------------------------------------------------------------------------

SCORES = {1: 0.3, 2: 0.1, 3: 0.9, 4: 0.2, 5: 0.5, 6: 0.4}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (dict(keep_latest=2, keep_best=1), [2, 5, 6]),
        (dict(keep_latest=2, keep_best=1, best_mode="max"), [3, 5, 6]),
        (dict(keep_latest=1, keep_best=3), [1, 2, 4, 6]),
        (dict(keep_latest=2, keep_best=0), [5, 6]),
        (dict(keep_latest=9, keep_best=0), [1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, options, kept):
    write(tmp_path / "one", range(1, 7), SCORES, **options)
    assert on_disk(tmp_path / "one") == kept
    for step in range(1, 7):  # every save by a process of its own
        write(tmp_path / "many", [step], SCORES, **options)
    assert on_disk(tmp_path / "many") == kept


def test_checkpoints_without_a_score_do_not_push_out_the_best(tmp_path):
    write(tmp_path, range(1, 7), {2: 0.1, 3: 0.3, 4: float("nan")}, keep_latest=1, keep_best=2)
    assert on_disk(tmp_path) == [2, 3, 6]


def test_of_equal_scores_the_newer_counts(tmp_path):
    write(tmp_path, range(1, 5), {1: 0.1, 2: 0.1, 3: 0.2}, keep_latest=1, keep_best=1)
    assert on_disk(tmp_path) == [2, 4]


def test_an_unknown_best_metric_warns(tmp_path):
    with pytest.warns(RuntimeWarning, match=r"best_metric='acuracy'.* is none of the evaluated \['loss'\]"):
        write(tmp_path, [1], {1: 0.5}, best_metric="acuracy")


# -- damage ------------------------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncate_arrays(step):
    found = [path for path in step.glob("state/**/d/*") if path.is_file()]
    assert found
    for path in found:
        truncate(path)


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


DAMAGE = {
    "no manifest": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "no array metadata": lambda step: (step / "state" / "_METADATA").unlink(),
    "truncated array metadata": lambda step: truncate(step / "state" / "_METADATA"),
    "truncated arrays": truncate_arrays,
    "no state": lambda step: shutil.rmtree(step / "state"),
    "no metadata": lambda step: shutil.rmtree(step / "meta"),
    "truncated metadata": lambda step: truncate(step / "meta" / "metadata"),
    "other metadata": lambda step: (step / "meta" / "metadata").write_text("[1, 2]"),
    "empty metadata": lambda step: (step / "meta" / "metadata").write_text("{}"),
    "empty folder": empty,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_falls_back_loudly_and_the_step_can_be_saved_again(tmp_path, damage):
    write(tmp_path, [1, 2, 3])
    DAMAGE[damage](tmp_path / "3")
    with pytest.warns(RuntimeWarning, match=r"Checkpoint 3 in .* is damaged; going on from checkpoint 2\."):
        assert read(tmp_path) == 2
    assert on_disk(tmp_path) == [1, 2]
    write(tmp_path, [3])
    assert read(tmp_path) == 3


@pytest.mark.parametrize("harm", [Path.unlink, truncate], ids=["deleted", "truncated"])
def test_whichever_file_is_harmed_the_state_is_whole_or_the_older_one(tmp_path, harm):
    write(tmp_path / "whole", [2, 3])
    files = [path for path in (tmp_path / "whole" / "3").rglob("*") if path.is_file()]
    found = set()
    for i, file in enumerate(files):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(i))
        harm(folder / file.relative_to(tmp_path / "whole"))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", RuntimeWarning)
            step = read(folder)  # compares every leaf with what was saved
        assert (step == 2) == any("Checkpoint 3" in str(w.message) for w in warned)
        found.add(step)
    assert found == {2, 3}  # some files are copies or labels that reading does without


def test_the_newest_that_can_be_read_is_found(tmp_path):
    write(tmp_path, [1, 2, 3])
    DAMAGE["truncated arrays"](tmp_path / "3")
    DAMAGE["no state"](tmp_path / "2")
    with pytest.warns(RuntimeWarning) as warned:
        assert read(tmp_path) == 1
    assert [str(w.message).split(" in ")[0] for w in warned] == ["Checkpoint 3", "Checkpoint 2"]


def test_all_damaged_is_an_error_and_deletes_nothing(tmp_path):
    write(tmp_path, [1, 2])
    DAMAGE["truncated arrays"](tmp_path / "1")
    DAMAGE["empty metadata"](tmp_path / "2")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)None of the checkpoints in .*2: .*1: "):
        read(tmp_path)
    assert snapshot(tmp_path) == before


def test_what_a_kill_left_unfinished_is_ignored(tmp_path):
    write(tmp_path, [1])
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    assert read(tmp_path) == 1
    write(tmp_path, [2])
    assert read(tmp_path) == 2 and on_disk(tmp_path) == [1, 2]
    assert not list(tmp_path.glob("*tmp*"))


# -- another run -------------------------------------------------------------------------------------------------------


def test_another_description_names_every_difference(tmp_path):
    write(tmp_path, [1])
    other = {"trainer": "Other", "train_data": {"seed": 1}}
    with pytest.raises(
        Mismatch, match=r"(?s)train_data\.seed: 0 in the checkpoint, 1 now.*trainer: 'Test' in .*'Other'"
    ):
        read(tmp_path, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(w=jnp.zeros((8, 5))), r"w: float32\[8, 4\] in the checkpoint, float32\[8, 5\] now"),
        (dict(w=jnp.zeros((8, 4), jnp.bfloat16)), r"w: float32\[8, 4\] in the checkpoint, bfloat16\[8, 4\] now"),
        (dict(more=jnp.zeros(2)), r"more: absent in the checkpoint, float32\[2\] now"),
        (dict(half=None), r"half: bfloat16\[3\] in the checkpoint, absent now"),
    ],
)
def test_another_state_names_the_leaf(tmp_path, change, message):
    write(tmp_path, [1])
    with pytest.raises(Mismatch, match=message):
        read(tmp_path, target=abstract({**state(), **change}))


def test_a_mismatch_never_falls_back_and_deletes_nothing(tmp_path):
    write(tmp_path, [1, 2, 3])
    for newest in (3, 2):  # that tells whose the checkpoints are
        before = snapshot(tmp_path)
        with pytest.raises(Mismatch, match=f"Checkpoint {newest}"):
            read(tmp_path, {**RUN, "trainer": "Other"})
        assert snapshot(tmp_path) == before
        shutil.rmtree(tmp_path / "3" / "meta", ignore_errors=True)


class Other(run_small.Small):
    pass


class Wide(run_small.Small):
    width = 24


class Half(run_small.Small):
    dtype = jnp.bfloat16


CHANGES = {
    "width": (dict(cls=type("Small", (run_small.Small,), {"width": 24})), r"params/fc1/kernel: float32\[8, 16\] in"),
    "dtype": (
        dict(cls=type("Small", (run_small.Small,), {"dtype": jnp.bfloat16})),
        r"kernel: float32.*, bfloat16.* now",
    ),
    "class": (dict(cls=Other), "trainer: 'Small' in the checkpoint, 'Other' now"),
    "seed": (dict(seed=1), "seed: 0 in the checkpoint, 1 now"),
    "batch size": (dict(batch_size=32), r"train_data\.batch_size: 16 in the checkpoint, 32 now"),
    "examples": (dict(train_data=run_small.data(208)), r"train_data\.examples: 200 in the checkpoint, 208 now"),
    "values": (dict(train_data=run_small.data(seed=5)), r"train_data\.checksum: "),
    "k": (dict(estimator=curvature.Lanczos(k=3, m=6)), r"curvature/values: float32\[2\] in .*float32\[3\] now"),
    "estimator": (
        dict(estimator=None, schedule=None, optimizer=optax.adam(1e-2)),
        "curvature: 'Lanczos' in the checkpoint, None now",
    ),
    "optimizer": (dict(optimizer=optim.fosi(optax.sgd(1e-2))), r"opt_state/.*/mu/.*: float32.* in .*, absent now"),
    "average": (dict(ema=None), r"ema/fc1/kernel: float32\[8, 16\] in the checkpoint, absent now"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps, with curvature: its trainer, result and workdir."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    trainer = run_small.make(workdir=folder, steps=4)
    return trainer, trainer.fit(), folder


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_run_is_refused_and_nothing_is_touched(finished, change):
    *_, folder = finished
    arguments, message = CHANGES[change]
    if "batch_size" in arguments:
        arguments = {**arguments, "schedule": CurvatureSchedule(batch_size=64)}
    before = snapshot(folder)
    with pytest.raises(Mismatch, match=message):
        run_small.make(workdir=folder, steps=8, **arguments).fit()
    assert snapshot(folder) == before


def test_schedule_alpha_and_learning_rate_may_change(finished, tmp_path):
    *_, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    trainer = run_small.make(
        workdir=tmp_path / "run",
        steps=6,
        optimizer=optim.fosi(optax.adam(5e-3), alpha=0.05),
        estimator=curvature.Lanczos(k=2, m=6),
        schedule=CurvatureSchedule(refresh_every=5, start=0),
    )
    assert trainer.fit().step == 6 and on_disk(tmp_path / "run")[-1] == 6


# -- a disk that cannot be written -------------------------------------------------------------------------------------


def test_an_unwritable_workdir_is_told_before_anything_is_compiled(tmp_path):
    (tmp_path / "file").write_text("in the way")
    trainer = run_small.make(workdir=tmp_path / "file" / "run")
    with pytest.raises(ValueError, match=r"workdir='.*file/run'\) cannot be written"):
        trainer.fit()
    programs = trainer._plan.programs
    assert not any(programs.is_compiled(kind) for kind in programs.kinds)


FULL_DISK = """
import json, pathlib, resource, sys, time
import optax
import run_small
from curvtrain.trainer import Call

room, size, steps, folder = json.loads(sys.argv[1])  # at steps room[0] to room[1], no file can be larger than size
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

def limit(run):
    while run.step == room[0] and any(pathlib.Path(folder).glob("*.orbax-checkpoint-tmp*")):
        time.sleep(0.01)  # the save before is not to be hit
    full = room[0] <= run.step <= room[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size if full else unlimited, unlimited))

trainer = run_small.make(
    hooks=[Call(limit)], workdir=folder, steps=steps, save_every=2, keep_latest=2, keep_best=0,
    estimator=None, optimizer=optax.adam(1e-2),
)
result = trainer.fit()
print("done", result.step)
"""


def on_a_full_disk(folder, room, size, steps):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-c", FULL_DISK, json.dumps([room, size, steps, str(folder)])]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("size", [300, 3000])  # nothing fits; small files do
def test_training_goes_on_when_the_disk_is_full_and_saves_when_there_is_room(tmp_path, size):
    done = on_a_full_disk(tmp_path, room=[3, 7], size=size, steps=10)
    assert (done.returncode, done.stdout.split()) == (0, ["done", "10"]), done.stderr
    for step in (4, 6):
        assert f"Saving step {step} failed" in done.stderr and "Training goes on" in done.stderr
    assert ("What was logged at step" in done.stderr) == (size == 300)
    assert on_disk(tmp_path) == [8, 10] and not list(tmp_path.glob("*tmp*"))
    trainer = run_small.make(workdir=tmp_path, steps=10, estimator=None, optimizer=optax.adam(1e-2))
    assert trainer.fit().step == 10


def test_a_last_save_that_fails_is_an_error_and_older_ones_are_intact(tmp_path):
    done = on_a_full_disk(tmp_path, room=[5, 10], size=3000, steps=10)
    assert done.returncode != 0 and "done" not in done.stdout
    assert "CheckpointError: The last checkpoint was not written. Saving step 10 failed" in done.stderr
    assert on_disk(tmp_path) == [2, 4]
    trainer = run_small.make(workdir=tmp_path, steps=5, estimator=None, optimizer=optax.adam(1e-2), keep_best=0)
    assert trainer.fit().history[0]["step"] == 5
    assert on_disk(tmp_path) == [4, 5] and not list(tmp_path.glob("*tmp*"))


def test_a_failed_save_does_not_hide_what_went_wrong_after_it(tmp_path, caplog, monkeypatch):
    with Checkpoints(config(tmp_path)) as checkpoints:
        checkpoints.save(1, state(1), {"run": RUN}, None)

    def refuse(*_, **__):
        raise OSError("no room")

    def fail():
        with Checkpoints(config(tmp_path)) as checkpoints:
            monkeypatch.setattr(ocp.StandardCheckpointHandler, "async_save", refuse)
            checkpoints.save(2, state(2), {"run": RUN}, None)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "Saving step 2 failed: OSError: no room" in caplog.text
    assert read(tmp_path) == 1


# -- models read back --------------------------------------------------------------------------------------------------


def test_load_model_predicts_like_the_trainer(finished):
    trainer, _, folder = finished
    x = run_small.data(50, seed=1)["x"]
    averaged = np.asarray(trainer.ema_model(x))
    assert not np.array_equal(averaged, trainer.model(x))
    fresh = run_small.make(steps=4)
    assert np.array_equal(fresh.load_model(folder)(x), averaged)
    assert np.array_equal(fresh.load_model(str(folder), step=4)(x), averaged)
    assert np.array_equal(trainer.load_model()(x), averaged)
    plain = run_small.make(steps=4, ema=None, estimator=None, optimizer=optax.sgd(0.1))  # of any optimizer
    assert np.array_equal(plain.load_model(folder)(x), trainer.model(x))


def test_load_model_names_what_is_not_there(finished, tmp_path):
    *_, folder = finished
    trainer = run_small.make(steps=4)
    with pytest.raises(FileNotFoundError, match=r"nowhere.*no such folder"):
        trainer.load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"step=3.*the checkpoints there are \[4\]"):
        trainer.load_model(folder, step=3)
    with pytest.raises(FileNotFoundError, match=r"the checkpoints there are \[\]"):
        trainer.load_model(tmp_path)
    with pytest.raises(ValueError, match=r"TrainerConfig\(workdir\) is None"):
        trainer.load_model()
    with pytest.raises(Mismatch, match=r"fc1/kernel: float32\[8, 16\] in the checkpoint, float32\[8, 24\] now"):
        run_small.make(cls=Wide).load_model(folder)
    with pytest.raises(Mismatch, match=r"fc1/kernel: float32\[8, 16\] in the checkpoint, bfloat16\[8, 16\] now"):
        run_small.make(cls=Half, ema=None).load_model(folder)


@pytest.mark.parametrize("damage", ["truncated arrays", "no state", "no manifest", "empty folder"])
def test_load_model_of_a_damaged_checkpoint(finished, tmp_path, damage):
    *_, folder = finished
    shutil.copytree(folder / "4", tmp_path / "4")
    shutil.copytree(folder / "4", tmp_path / "6")
    DAMAGE[damage](tmp_path / "6")
    trainer = run_small.make(steps=4)
    with pytest.raises(CheckpointError, match=r"Checkpoint 6 in .* is damaged.*\[4\]"):
        trainer.load_model(tmp_path)
    assert trainer.load_model(tmp_path, step=4) is not None
    assert on_disk(tmp_path) == [4, 6]
