"""What a Trainer makes of losses that are no mean over examples: with penalties, or coupled examples."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from curvtrain import CurvatureSchedule, Trainer, TrainerConfig, losses
from curvtrain.curvature import KFAC, Lanczos
from curvtrain.optim import kfac
from tests.meshes import on
from tests.trainer import tiny


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    on(1, monkeypatch)


# -- penalties ---------------------------------------------------------------------------------------------------------


class Penalised(tiny.Classifier):
    def regulariser(self, params):
        return 0.05 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


def squares(params):
    return 0.05 * sum(float(np.sum(np.asarray(p, np.float64) ** 2)) for p in jax.tree.leaves(params))


def fitted(kind, accumulate=1, steps=2, optimizer=None, **options):
    config = TrainerConfig(steps=steps, batch_size=16, accumulate=accumulate, progress=False, log_every=1)
    trainer = kind(config, train_data=tiny.examples(16), optimizer=optimizer or optax.sgd(0.1), **options)
    start = jax.tree.map(np.array, trainer.state.params)
    return trainer, start, trainer.fit()


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_penalty_is_in_the_step_and_in_the_reported_loss(accumulate):
    """A step is that of the loss with the penalty, added once; "loss" is with it, "penalty" is it alone."""
    trainer, start, result = fitted(Penalised, accumulate, steps=1)
    plain, same, without = fitted(tiny.Classifier, accumulate, steps=1)
    jax.tree.map(np.testing.assert_array_equal, start, same)
    moved = jax.tree.map(lambda a, p: a - 0.1 * 0.1 * p, plain.state.params, start)  # d/dp 0.05 p^2 = 0.1 p
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), trainer.state.params, moved)
    assert result.metrics["train/penalty"] == pytest.approx(squares(start), rel=1e-5)
    assert result.metrics["train/loss"] == pytest.approx(without.metrics["train/loss"] + squares(start), rel=1e-5)
    assert "train/penalty" not in without.metrics


def test_the_evaluated_loss_is_that_of_the_objective():
    """Over a ragged last batch, too."""
    trainer, _, _ = fitted(Penalised)
    data = tiny.examples(21, seed=4)
    scores = trainer.evaluate(data)
    want = trainer.objective.evaluation().with_microbatch(None).loss(trainer.state.params, data)
    assert scores["loss"] == pytest.approx(float(want), rel=1e-5)
    assert scores["penalty"] == pytest.approx(squares(trainer.state.params), rel=1e-5)


def test_trainable_parameters_alone_are_penalised():
    trainer, _, result = fitted(Penalised, trainable=nnx.PathContains("outer"), steps=1)
    assert trainer.state.params.keys() == {"outer"}
    start = Penalised(
        TrainerConfig(steps=1, batch_size=16, progress=False), train_data=tiny.examples(16), optimizer=optax.sgd(0.1)
    ).state.params["outer"]
    assert result.metrics["train/penalty"] == pytest.approx(squares(start), rel=1e-5)


class Heavy(tiny.Classifier):
    def regulariser(self, params):
        return 5.0 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


def test_the_quadratic_model_of_kfac_has_the_penalty():
    """Its value, gradient and Hessian: where they are most of the loss, what it predicts comes true for any step."""
    trainer, _, result = fitted(Heavy, steps=1, optimizer=kfac(damping=1.0, reject=True), curvature=KFAC("exact"))
    assert trainer.state.opt_state.rejected == 0
    assert float(trainer.state.opt_state.reduction_ratio) == pytest.approx(1.0, abs=0.05)
    assert trainer.evaluate(tiny.examples(16))["penalty"] < 0.5 * result.metrics["train/penalty"]


def test_what_is_no_penalty_is_refused_before_anything_compiles():
    class Wrong(tiny.Classifier):
        def regulariser(self, params):
            return params["inner"]["bias"]

    with pytest.raises(TypeError, match=r"regulariser\(params\) should return a scalar.*not float32 of shape \(8,\)"):
        fitted(Wrong)


# -- coupled examples --------------------------------------------------------------------------------------------------


def contrast(outputs, batch):
    left, right = outputs
    return -jnp.diag(jax.nn.log_softmax(left @ right.T))


class Pairs(Trainer):
    loss = losses.PerExample(contrast)

    def build_model(self, rngs):
        return nnx.Linear(3, 4, rngs=rngs)

    def predict(self, model, batch):
        return model(batch["left"]), model(batch["right"])


def pairs(n=16):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(n, 3)).astype(np.float32) for name in ("left", "right")}


def coupled(curvature=None, schedule=None, optimizer=None, **options):
    config = TrainerConfig(steps=1, batch_size=8, progress=False, **options)
    optimizer = optimizer or optax.sgd(0.1)
    return Pairs(config, train_data=pairs(), optimizer=optimizer, curvature=curvature, schedule=schedule)


def test_pieces_of_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"TrainerConfig\(accumulate=2\) takes a batch in pieces, but .*contrast.*"):
        coupled(accumulate=2)
    with pytest.raises(ValueError, match=r"CurvatureSchedule\(batch_size=16\) takes a batch in pieces, but .*contrast"):
        coupled(curvature=Lanczos(k=1), schedule=CurvatureSchedule(batch_size=16))


def test_padding_is_refused():
    trainer = coupled(eval_batch_size=4)
    assert np.isfinite(trainer.evaluate(pairs(12))["loss"])
    with pytest.raises(ValueError, match=r"evaluate\(data\) has 10 examples, so that the last .* of 4 .*contrast"):
        trainer.evaluate(pairs(10))
    with pytest.raises(ValueError, match=r"eval_data has 10 examples"):
        Pairs(trainer.config, train_data=pairs(), eval_data=pairs(10), optimizer=optax.sgd(0.1))


def test_padding_of_a_dataset_is_refused_when_it_comes():
    grain = pytest.importorskip("grain")
    data = pairs(10)
    dataset = grain.MapDataset.source([{k: v[i] for k, v in data.items()} for i in range(10)]).batch(5)
    with pytest.raises(ValueError, match=r"the last batch was padded to 4 examples, but .*contrast"):
        coupled(eval_batch_size=4).evaluate(dataset)


def test_whole_batches_are_trained():
    trainer = coupled(optimizer=optax.sgd(0.1))
    model, data = trainer.model, pairs()
    assert np.isfinite(trainer.fit().metrics["train/loss"])
    assert model(data["left"]).shape == (16, 4)
