"""What the statistics of layers cost a Trainer's step: no forward pass, and a backward pass only where they need one.

Counted in FLOPs of compiled programs, of a model of which all products are known.

| pass | FLOPs |
|---|---|
| forward | 2 N sum of d_i d_o |
| backward | the same for the weights, and again for the inputs of all layers but the first |
| factors | 2 N sum of ((d_i + 1)^2 + d_o^2), every pass that statistics are taken from |
"""

import functools
import itertools

import numpy as np
import optax
import pytest
from flax import nnx

from curvtrain import Trainer, TrainerConfig, losses
from curvtrain.curvature import KFAC, DiagonalFisher, KroneckerDiagonal
from tests.meshes import on

N, SIZES = 256, (64, 256, 256, 10)
PAIRS = list(itertools.pairwise(SIZES))
FORWARD = 2 * N * sum(i * o for i, o in PAIRS)
INPUTS = 2 * N * sum(i * o for i, o in PAIRS[1:])  # a backward pass without weight gradients
FACTORS = 2 * N * sum((i + 1) ** 2 + o**2 for i, o in PAIRS)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    on(1, monkeypatch)


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in PAIRS])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.tanh(layer(x))
        return self.layers[-1](x)


class Bare(Trainer):
    """Without accuracy, whose argmax once made XLA compute the outputs twice."""

    loss = losses.SoftmaxCrossEntropy("t")

    def build_model(self, rngs):
        return MLP(rngs)

    def predict(self, model, batch):
        return model(batch["x"])

    def metrics(self, outputs, batch):
        return {"loss": self.loss.values(outputs, batch)}


class Accurate(Bare):
    def metrics(self, outputs, batch):
        return self.loss.metrics(outputs, batch)


@functools.cache
def flops(estimator, kind=Bare, accumulate=1, entry=None):
    """FLOPs of a step that absorbs its batch (loop bodies once); `estimator` is (class, options), None for none."""
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(N, SIZES[0])).astype(np.float32), "t": rng.integers(0, 10, N).astype(np.int32)}
    data |= {"mask": {"mask": np.arange(N) % 3 > 0}, "weights": {"weights": np.ones(N, np.float32)}}.get(entry, {})
    if estimator is not None:
        cls, options = estimator
        absorbing = type(cls.__name__, (cls,), {"factorises": False})  # a refresh is another program
        estimator = absorbing(*options)
    trainer = kind(
        TrainerConfig(steps=1, batch_size=N, progress=False, accumulate=accumulate),
        train_data=data,
        optimizer=optax.adam(1e-3),
        curvature=estimator,
    )
    (program,) = trainer.dry_run().programs
    return program.flops


@pytest.mark.parametrize("kind", [Bare, Accurate])
def test_the_empirical_fisher_takes_no_pass_of_its_own(kind):
    assert flops(None, kind) <= 1.06 * (2 * FORWARD + INPUTS)
    more = flops((KFAC, ("empirical",)), kind) - flops(None, kind)
    assert FACTORS <= more <= 1.06 * FACTORS, more / FACTORS


@pytest.mark.parametrize("kind", [Bare, Accurate])
def test_a_sampled_fisher_takes_one_backward_pass_without_weights(kind):
    more = flops((KFAC, ("sampled",)), kind) - flops(None, kind)
    assert FACTORS + INPUTS <= more <= 1.06 * (FACTORS + INPUTS), more / (FACTORS + INPUTS)


@pytest.mark.parametrize("entry", ["mask", "weights"])
def test_weights_take_no_pass_either(entry):
    more = flops((KFAC, ("empirical",)), entry=entry) - flops(None, entry=entry)
    assert FACTORS <= more <= 1.06 * FACTORS, more / FACTORS


@pytest.mark.parametrize(("fisher", "passes"), [("empirical", 0), ("sampled", INPUTS)])
def test_pieces_are_walked_once(fisher, passes):
    """Four pieces: one loop, whose body has a quarter of the products, and those of one walk."""
    more = 4 * (flops((KFAC, (fisher,)), accumulate=4) - flops(None, accumulate=4))
    assert FACTORS + passes <= more <= 1.1 * (FACTORS + passes), more / (FACTORS + passes)


@pytest.mark.parametrize("estimator", [DiagonalFisher, KroneckerDiagonal], ids=lambda e: e.__name__)
def test_other_estimators_take_none(estimator):
    """The diagonal's statistic is one product of squares for each layer; that of its factors none."""
    products = 2 * N * sum((i + 1) * o for i, o in PAIRS) if estimator is DiagonalFisher else 0
    more = flops((estimator, ("empirical",))) - flops(None)
    assert products <= more <= products + 0.04 * FORWARD, more / FORWARD
