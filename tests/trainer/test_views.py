"""What a Trainer shows before, between and after calls of `fit`: the run that there is, never another one."""

import logging
import shutil

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import CLASSES, FEATURES, Noisy, assert_trees_equal, examples, losses_of, trainer

from curvtrain.trainer import Call, CheckpointError, Diverged, EarlyStopping, Mismatch
from curvtrain.trainer.disk.workdir import LOCK

pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    # orbax leaves coroutines behind whose read of a damaged file failed: that they are collected is no concern here
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
TEST = examples(20, seed=1)


def noisy(folder, **options):
    return trainer(**(dict(model=Noisy, workdir=folder, optimizer=optax.adam(1e-2), ema=0.5, steps=4) | options))


def variables(model):
    return nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != LOCK}


# -- a workdir that holds a checkpoint ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run = noisy(folder, save_every=2)
    run.fit()
    return run, folder


def test_a_new_trainer_looks_at_the_newest_checkpoint(finished):
    first, folder = finished
    before = files(folder)
    scores, model = noisy(folder).evaluate(TEST), noisy(folder).model
    assert scores == first.evaluate(TEST) and scores != noisy(None).evaluate(TEST)
    assert_trees_equal(variables(model), variables(first.model))
    assert_trees_equal(variables(noisy(folder).ema_model), variables(first.ema_model))
    again = noisy(folder)
    assert int(again.state.step) == 4
    assert_trees_equal(jax.device_get(again.state.opt_state), jax.device_get(first.state.opt_state))
    assert files(folder) == before  # another job may be at work in it


def test_what_was_looked_at_does_not_change_the_run(finished, tmp_path):
    _, folder = finished
    ends = []
    for look in (False, True):
        shutil.copytree(folder, tmp_path / str(look))
        run = noisy(tmp_path / str(look), steps=7, log_every=1)
        assert not look or int(run.state.step) == 4
        ends.append((losses_of(run.fit()).tolist(), jax.device_get(run.state.params)))
    assert ends[0][0] == ends[1][0] and len(ends[0][0]) == 3
    assert_trees_equal(ends[0][1], ends[1][1])


def test_another_run_s_checkpoint_is_refused(finished):
    _, folder = finished
    with pytest.raises(Mismatch, match=r"seed: 0 in the checkpoint, 1 now"):
        noisy(folder, seed=1).evaluate(TEST)
    with pytest.raises(Mismatch, match=r"ema/inner/kernel"):
        _ = noisy(folder, ema=None).state


def test_a_damaged_checkpoint_is_passed_over_loudly(finished, tmp_path):
    _, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "4" / "state" / "manifest.ocdbt").unlink()
    with pytest.warns(RuntimeWarning, match=r"Checkpoint 4 in .* is damaged; this is the state of checkpoint 2"):
        assert int(noisy(tmp_path / "run").state.step) == 2
    (tmp_path / "run" / "2" / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match="None of the checkpoints"):
        noisy(tmp_path / "run").evaluate(TEST)


# -- what is kept of a running Trainer ---------------------------------------------------------------------------------


def test_what_a_hook_keeps_stays_as_it_was():
    """The states of all steps, the objective, and single arrays; the next step donates the rest."""
    states, kernels, objectives = [], [], []

    def keep(view):
        states.append(view.state)
        kernels.append((view.state.params["inner"]["kernel"], np.array(view.state.params["inner"]["kernel"])))
        objectives.append((run.objective, float(run.objective.loss(run.state.params, TEST))))

    run = trainer(model=Noisy, steps=4, optimizer=optax.adam(0.1), ema=0.5, hooks=[Call(keep)])
    plain = trainer(model=Noisy, steps=4, optimizer=optax.adam(0.1), ema=0.5, log_every=1)
    run.fit()
    plain.fit()
    assert [int(state.step) for state in states] == [1, 2, 3, 4]
    assert_trees_equal(jax.device_get(states[-1].params), jax.device_get(plain.state.params))
    for kernel, then in kernels:
        np.testing.assert_array_equal(kernel, then)
    for (objective, then), state in zip(objectives, states, strict=True):
        assert float(objective.loss(state.params, TEST)) == then
        assert jax.random.key_data(state.key).tolist() == jax.random.key_data(run.state.key).tolist()


def test_only_what_is_kept_is_copied():
    run = trainer(steps=3)
    kept = run.state.params["inner"]["kernel"]
    others = {name: leaf.unsafe_buffer_pointer() for name, leaf in shards(run._run.current).items()}
    donated = run._run.to_donate()
    after = {name: leaf.unsafe_buffer_pointer() for name, leaf in shards(donated).items()}
    assert {name for name in others if others[name] != after[name]} == {"params/inner/kernel"}
    np.testing.assert_array_equal(donated.params["inner"]["kernel"], kept)
    assert donated.params["inner"]["kernel"].sharding == kept.sharding


def shards(state):
    named = jax.tree_util.tree_leaves_with_path((("params", state.params), ("opt_state", state.opt_state)))
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/").replace("0/1/", "params/")
    return {name(path): leaf.addressable_data(0) for path, leaf in named if not isinstance(leaf, str)}


def test_a_state_that_an_interrupted_step_took_is_a_clear_error():
    run = trainer(steps=2)
    run.fit()
    run._run.current.step.delete()
    for look in (lambda: run.state, lambda: run.model, run.fit, lambda: run.evaluate(TEST)):
        with pytest.raises(RuntimeError, match=r"interrupted in the middle of a step.*new Trainer"):
            look()


# -- a run that has ended ----------------------------------------------------------------------------------------------


def stopping(folder=None, steps=30, hooks=(), **options):
    """A run that never improves by as much as is asked of it."""
    hooks = [EarlyStopping(patience=2, min_delta=9.0), *hooks]
    return trainer(steps=steps, eval_every=2, save_every=2, eval_data=TEST, hooks=hooks, workdir=folder, **options)


def test_a_run_that_a_hook_ended_stays_ended(tmp_path, caplog):
    called = []
    for folder in (None, tmp_path / "run"):
        run = stopping(folder)
        first = run.fit()
        params = jax.device_get(run.state.params)
        again = run if folder is None else stopping(folder, hooks=[Call(lambda view: called.append(view.step))])
        caplog.clear()
        second = again.fit()
        assert (first.step, second.step) == (6, 6) and second.stopped == first.stopped and not called
        assert second.metrics["eval/loss"] == first.metrics["eval/loss"]
        assert_trees_equal(jax.device_get(again.state.params), params)
        assert "The run was ended at step 6 (eval/loss has not improved on" in caplog.text
        assert "With more steps than TrainerConfig(steps=30) it goes on" in caplog.text


def test_more_steps_let_it_go_on(tmp_path):
    stopping(tmp_path).fit()
    more = stopping(tmp_path, steps=40).fit()
    assert more.step == 8 and more.stopped  # the hook remembers: one more evaluation without improvement
    assert stopping(tmp_path, steps=40).fit().step == 8


def test_a_hook_may_end_a_call_and_not_the_run(tmp_path):
    pause = lambda at: Call(lambda view: view.stop("time is up", resume=True) if view.step == at else None)
    options = dict(steps=6, workdir=tmp_path)
    assert trainer(hooks=[pause(2)], **options).fit().stopped == "time is up"
    result = trainer(hooks=[pause(4)], **options).fit()
    assert (result.step, result.stopped) == (4, "time is up")
    assert trainer(**options).fit().step == 6


def poisoned():
    data = examples()
    data["x"][:] = np.inf
    return data


def test_a_run_that_diverged_raises_again_though_its_parameters_are_finite(tmp_path, caplog):
    guarded = optax.apply_if_finite(optax.sgd(0.1), max_consecutive_errors=100)
    run = trainer(train_data=poisoned(), optimizer=guarded, steps=4)
    messages = []
    for _ in range(2):
        with pytest.raises(Diverged, match=r"loss is nan at step 1 .*build a new one.*nonfinite='skip'") as error:
            run.fit()
        messages.append(str(error.value))
    assert messages[0] == messages[1] and int(run.state.step) == 4
    caplog.set_level(logging.WARNING)
    rate = lambda count: np.where(False, 0, 1) * jax.numpy.where(count == 3, jax.numpy.nan, 0.1)
    saved = trainer(optimizer=optax.sgd(rate), steps=6, save_every=2, workdir=tmp_path)
    for _ in range(2):  # goes on from checkpoint 2, and diverges again
        with pytest.raises(Diverged, match=r"newest checkpoint is step 2\. The next fit\(\) goes on from there"):
            saved.fit()


# -- a model that is trained on ----------------------------------------------------------------------------------------


class Frozen(nnx.Module):
    """A BatchNorm that is never trained, beside one that is, and dropout inside of attention."""

    def __init__(self, rngs):
        self.still = nnx.BatchNorm(FEATURES, use_running_average=True, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(FEATURES, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)
        self.out = nnx.Linear(FEATURES, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(self.norm(self.still(x))))


@pytest.mark.parametrize("source", ["load_model", "model"])
def test_a_model_from_a_trainer_is_trained_as_the_original_was(finished, source):
    first, folder = finished
    loaded = noisy(None).load_model(folder) if source == "load_model" else first.model
    assert loaded.drop.deterministic and loaded.norm.use_running_average  # for inference

    def again(rngs):
        fresh = Noisy(rngs)
        nnx.update(fresh, nnx.state(loaded, (nnx.Param, nnx.BatchStat)))
        return fresh

    run, right = (trainer(model=of, steps=3, log_every=1) for of in (lambda rngs: loaded, again))
    assert losses_of(run.fit()).tolist() == losses_of(right.fit()).tolist()
    assert_trees_equal(jax.device_get(run.state.model_state), jax.device_get(right.state.model_state))
    assert np.abs(run.state.model_state["norm"]["mean"] - loaded.norm.mean[...]).max() > 1e-4
    assert loaded.drop.deterministic and run.model.drop.deterministic


def test_a_part_of_it_is_trained_and_what_was_off_stays_off():
    loaded = trainer(model=Frozen, steps=1).model

    class Whole(nnx.Module):
        def __init__(self, rngs):
            self.backbone, self.head = loaded, nnx.Linear(CLASSES, CLASSES, rngs=rngs)

        def __call__(self, x):
            return self.head(self.backbone(x))

    run = trainer(model=Whole, steps=2)
    first = jax.device_get(run.state.model_state)["backbone"]
    run.fit()
    last = jax.device_get(run.state.model_state)["backbone"]
    np.testing.assert_array_equal(first["still"]["mean"], last["still"]["mean"])
    assert np.abs(first["norm"]["mean"] - last["norm"]["mean"]).max() > 1e-4
    x, objective = examples(16), run.objective
    losses = {float(objective.loss(run.state.params, x, jax.random.key(i))) for i in range(4)}
    assert len(losses) == 4  # dropout is on
