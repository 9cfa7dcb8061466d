"""What a step with PSGD costs, in FLOPs of the compiled program: one gradient, the fit if there is one, the product."""

import functools
import itertools
from unittest import mock

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import curvtrain
from curvtrain import losses, optim
from curvtrain.curvature import PSGD, Elementwise, Kron
from curvtrain.trainer.mesh import sharding
from curvtrain.trainer.run.layout import Task
from curvtrain.trainer.run.plan import Plan
from curvtrain.trainer.run.step import Kind

PLAIN, UPDATE = Kind(), Kind(update=True)


class MLP(nnx.Module):
    def __init__(self, rngs):
        sizes = (64, 256, 256, 10)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.tanh(layer(x))
        return self.layers[-1](x)


class MLPTrainer(curvtrain.Trainer):
    loss = losses.SoftmaxCrossEntropy()

    def build_model(self, rngs):
        return MLP(rngs)

    def predict(self, model, batch):
        return model(batch["image"])


def plan(optimizer, estimator=None, pieces=1):
    """On one device, with accuracy among the metrics."""
    trainer = MLPTrainer.__new__(MLPTrainer)
    task = Task("MLP", trainer.build_model, trainer.predict, MLPTrainer.loss, trainer.metrics)
    config = curvtrain.TrainerConfig(steps=1, batch_size=256, accumulate=pieces, progress=False, mesh={"data": 1})
    one = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,))
    data = {"image": np.zeros((256, 64), np.float32), "label": np.zeros(256, np.int32)}
    with mock.patch.object(sharding, "make_mesh", return_value=one):
        return Plan(config, task, data, optimizer, estimator, curvtrain.CurvatureSchedule())


def flops_of(compiled):
    cost = compiled.cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


@functools.cache
def step_flops(family, kind, pieces=1):
    optimizer, estimator = (optax.adam, None) if family is None else (optim.psgd, PSGD(family))
    return flops_of(plan(optimizer(1e-3), estimator, pieces).programs.step(kind))


@functools.cache
def fit_flops(family):
    """Of a fit to a gradient that is given, by itself."""
    built = plan(optim.psgd(1e-3), PSGD(family))
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (built.layout.state.curvature, built.layout.state.params)
    )

    def fit(curvature, params, grads, key):
        return built.layout.estimator.update(curvature, built.layout.objective, params, None, key, grads=grads)

    with jax.set_mesh(built.mesh):
        return flops_of(jax.jit(fit).lower(*shapes, shapes[1], jax.random.key(0)).compile())


@pytest.mark.parametrize("pieces", [1, 4])
def test_diagonal_whitening_costs_little_more_than_adam(pieces):
    adam = step_flops(None, PLAIN, pieces)
    if pieces == 1:
        assert step_flops(Elementwise(), UPDATE, pieces) <= 1.06 * adam
    else:  # of one piece, as the body of a loop is counted once: the rest is the same, but that the sum of the pieces'
        # gradients is divided, which XLA does again in each of the passes over it that the fit and the step make
        size = sum(p.size for p in jax.tree.leaves(nnx.state(MLP(nnx.Rngs(0)))))
        extra = step_flops(Elementwise(), UPDATE, 1) - step_flops(None, PLAIN, 1) + 5 * size
        assert step_flops(Elementwise(), UPDATE, pieces) - adam <= 1.05 * extra


@pytest.mark.parametrize("pieces", [1, 4])
def test_a_step_is_its_gradient_its_fit_and_its_product(pieces):
    parts = step_flops(Kron(), PLAIN, pieces) + fit_flops(Kron())
    assert abs(step_flops(Kron(), UPDATE, pieces) - parts) <= 0.03 * parts


@pytest.mark.parametrize("fit", ["gradient", "hessian"])
def test_a_call_that_does_not_fit_pays_nothing_for_it(fit):
    """The gradient, products, probes and noise are in the branch of the fit."""
    built = plan(optim.psgd(1e-3), PSGD(Kron(), fit, update_probability=0.1))
    with jax.set_mesh(built.mesh):
        traced = jax.make_jaxpr(
            lambda c, p, batch, key: built.layout.estimator.update(c, built.layout.objective, p, batch, key)
        )(built.layout.state.curvature, built.layout.state.params, built.programs.batch, jax.random.key(0))
    dear = ("dot_general", "random_bits", "exp", "tanh")
    outside, inside = (sum(found.count(name) for name in dear) for found in primitives(traced))
    assert outside == 0 and inside > 10


def primitives(traced):
    """(names of the primitives that always run, of those in branches)."""
    found = [], []

    def walk(jaxpr, branch):
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            found[branch].append(name)
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
                if hasattr(value, "eqns"):
                    walk(value, branch or name == "cond")

    walk(traced, False)
    return found
