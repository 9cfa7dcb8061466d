"""Steps that are not finite: skipped as a whole, counted, logged, and not for ever."""

import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import Classifier, Counting, Noisy, assert_trees_close, assert_trees_equal, examples, losses_of, trainer

from curvtrain import CurvatureSchedule, losses
from curvtrain.trainer import Diverged, read_jsonl

pytestmark = pytest.mark.usefixtures("quick_compile")
BATCH = 16


def batches(bad=(), count=8):
    """Grain batches, of which some hold a number that is not finite."""
    rows = examples(BATCH * count)
    cut = [{name: array[i * BATCH : (i + 1) * BATCH].copy() for name, array in rows.items()} for i in range(count)]
    for i in bad:
        cut[i]["x"][3, 2] = np.nan if i % 2 else np.inf
    return cut


def run_on(cut, **options):
    options = dict(nonfinite="skip", log_every=1, steps=len(cut)) | options
    return trainer(train_data=grain.MapDataset.source(cut).repeat(), **options)


@pytest.mark.parametrize("log_every", [1, 3])
def test_a_skipped_step_leaves_all_but_the_count_as_it_was(log_every, caplog):
    """The run is that over the good batches alone: parameters, moments, averages, statistics, curvature."""
    # without dropout, whose mask is a function of the step
    model = lambda rngs: nnx.view(Noisy(rngs), deterministic=True)
    options = dict(model=model, optimizer=optax.sgd(0.1, momentum=0.9), ema=0.9, curvature=Counting())
    good = [batch for i, batch in enumerate(batches()) if i not in (2, 5, 6)]
    skipping = run_on(batches(bad=(2, 5, 6)), log_every=log_every, **options)
    right = run_on(good, nonfinite="stop", **options)
    result, expected = skipping.fit(), right.fit()
    assert (result.step, expected.step) == (8, 5) and int(skipping.state.step) == 8
    ours, theirs = (dataclasses.replace(run.state, step=0, key=0) for run in (skipping, right))
    assert_trees_close(jax.device_get(ours), jax.device_get(theirs), rtol=1e-5, atol=1e-6)
    assert int(ours.curvature.updates) == 5
    assert result.metrics["train/skipped"] == 3
    found = losses_of(result)
    if log_every == 1:
        np.testing.assert_allclose(found, losses_of(expected), rtol=1e-5)
        assert "Skipped step 3:" in caplog.text and "Skipped step 6:" in caplog.text
    else:
        means = [losses_of(expected)[[0, 1]].mean(), losses_of(expected)[[2, 3]].mean(), losses_of(expected)[4]]
        np.testing.assert_allclose(found, means, rtol=1e-5)
        assert "Skipped step 3:" in caplog.text and "Skipped step 6:" in caplog.text and "step 7:" in caplog.text


def test_more_in_succession_than_allowed_end_the_run():
    cut = batches(bad=(1, 3, 4, 5))
    assert run_on(cut, max_nonfinite=3).fit().step == 8
    run = run_on(cut, max_nonfinite=2, log_every=100)
    message = r"not finite in steps 4 to 6, more in succession than TrainerConfig\(max_nonfinite=2\)"
    with pytest.raises(Diverged, match=message) as error:
        run.fit()
    assert "nonfinite='skip'" not in str(error.value)
    with pytest.raises(Diverged, match=message):
        run.fit()
    with pytest.raises(Diverged, match=r"in steps 2 to 2, more in succession"):
        run_on(cut, max_nonfinite=0).fit()


class Root(losses.Loss):
    """Finite everywhere, with an infinite gradient where an output is 0."""

    def values(self, outputs, batch):
        return jnp.sqrt(jnp.abs(outputs[..., 0] * batch["scale"]))


def test_a_gradient_or_a_step_that_is_not_finite_is_skipped_too():
    cut = [{"x": np.ones((BATCH, 6), np.float32), "scale": np.full(BATCH, i != 1, np.float32)} for i in range(3)]

    class Rooted(Classifier):
        loss = Root()

    options = dict(nonfinite="skip", log_every=1, steps=3, kind=Rooted)
    result = trainer(train_data=grain.MapDataset.source(cut).repeat(), **options).fit()
    assert result.metrics["train/skipped"] == 1 and np.isfinite(losses_of(result)).all()
    overflow = optax.GradientTransformation(
        lambda params: jnp.int32(0),
        lambda updates, state, params=None: (jax.tree.map(lambda u: u * jnp.float32(1e38) * 1e38, updates), state + 1),
    )
    run = run_on(batches(), optimizer=overflow, max_nonfinite=8)
    before = jax.device_get(run.state.params)
    assert run.fit().metrics["train/skipped"] == 8 and int(run.state.opt_state) == 0
    assert_trees_equal(jax.device_get(run.state.params), before)


def test_a_loss_without_a_logged_number_of_its_own_is_left_out(tmp_path):
    """All steps of an interval were skipped: there is no mean of them; the count is logged."""
    run_on(batches(bad=(2, 3)), log_every=2, workdir=tmp_path).fit()
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(row["step"], "train/loss" in row, row["train/skipped"]) for row in rows] == [
        (2, True, 0),
        (4, False, 2),
        (6, True, 2),
        (8, True, 2),
    ]


def test_a_resumed_run_counts_on(tmp_path):
    cut = batches(bad=(2, 3, 4, 5))
    options = dict(workdir=tmp_path, max_nonfinite=3, save_every=1)
    assert run_on(cut, steps=5, **options).fit().metrics["train/skipped"] == 3
    with pytest.raises(Diverged, match=r"in steps 3 to 6, more in succession"):
        run_on(cut, steps=8, **options).fit()
    result = run_on(cut, steps=8, **options | dict(max_nonfinite=4)).fit()
    assert result.step == 8 and result.metrics["train/skipped"] == 4


def test_apply_if_finite_and_schedules_work_with_it():
    tx = optax.apply_if_finite(optax.sgd(optax.linear_schedule(0.1, 0.0, 10)), 3)
    run = run_on(batches(bad=(2,)), optimizer=tx, curvature=Counting(), schedule=CurvatureSchedule(update_every=2))
    assert run.fit().step == 8
    assert int(optax.tree.get(run.state.opt_state, "count")) == 7


def test_the_options_are_checked():
    with pytest.raises(ValueError, match=r"TrainerConfig\(nonfinite\) .* not 'skp'. Did you mean 'skip'\?"):
        trainer(nonfinite="skp")
    with pytest.raises(ValueError, match=r"TrainerConfig\(max_nonfinite\) should be at least 0, not -1"):
        trainer(max_nonfinite=-1)
