"""What a step with PSGD costs, in FLOPs of the compiled program: one gradient, the fit where there is one, the product."""

import functools
from unittest import mock

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import curvtrain
from curvtrain import losses, optim
from curvtrain.curvature import PSGD, Elementwise, Kron
from curvtrain.trainer import sharding
from curvtrain.trainer.plan import Plan, Task
from curvtrain.trainer.step import Kind

PLAIN, UPDATE = Kind(), Kind(update=True)


class MLP(nnx.Module):
    def __init__(self, rngs):
        sizes = (64, 256, 256, 10)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in zip(sizes[:-1], sizes[1:], strict=True)])

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
    with mock.patch.object(sharding, "make_mesh", lambda axes: one):
        return Plan(config, task, data, optimizer, estimator, curvtrain.CurvatureSchedule())


def flops_of(compiled):
    cost = compiled.cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


@functools.cache
def step_flops(family, kind, pieces=1, **options):
    built = plan(optax.adam(1e-3), None, pieces) if family is None else plan(optim.psgd(1e-3), PSGD(family, **options), pieces)
    return flops_of(built.step_program(kind))


@functools.cache
def fit_flops(family):
    """Of a fit to a gradient that is given, by itself."""
    built = plan(optim.psgd(1e-3), PSGD(family))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (built.state.curvature, built.state.params))

    def fit(curvature, params, grads, key):
        return built.estimator.update(curvature, built.objective, params, None, key, grads=grads)

    with jax.set_mesh(built.mesh):
        return flops_of(jax.jit(fit).lower(*shapes, shapes[1], jax.random.key(0)).compile())


@pytest.mark.parametrize("pieces", [1, 4])
def test_diagonal_whitening_costs_little_more_than_adam(pieces):
    adam = step_flops(None, PLAIN, pieces)
    if pieces == 1:
        assert step_flops(Elementwise(), UPDATE, pieces) <= 1.06 * adam
    else:  # of one piece, as the body of a loop is counted once: the rest is the same
        extra = step_flops(Elementwise(), UPDATE, 1) - step_flops(None, PLAIN, 1)
        assert step_flops(Elementwise(), UPDATE, pieces) - adam <= 1.05 * extra


@pytest.mark.parametrize("pieces", [1, 4])
def test_a_step_is_its_gradient_its_fit_and_its_product(pieces):
    parts = step_flops(Kron(), PLAIN, pieces) + fit_flops(Kron())
    assert abs(step_flops(Kron(), UPDATE, pieces) - parts) <= 0.03 * parts


@pytest.mark.parametrize("fit", ["gradient", "hessian"])
def test_a_step_that_does_not_fit_pays_nothing_for_it(fit):
    """By its probability a step fits in a branch: outside of it there is what a step without a fit has."""
    program = plan(optim.psgd(1e-3), PSGD(Kron(), fit, update_probability=0.1)).step_program(UPDATE).as_text()
    plain = plan(optim.psgd(1e-3), PSGD(Kron(), fit)).step_program(PLAIN).as_text()
    outside, inside = products(program)
    assert outside == products(plain)[0] and inside > 0


def products(text):
    """(matrix products of the entry computation and what it fuses, those inside of its conditionals)."""
    computations, name = {}, None
    for line in text.splitlines():
        if line and not line[0].isspace() and "{" in line:
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            computations[name] = []
            entry = name if line.startswith("ENTRY") else locals().get("entry")
        elif name:
            computations[name].append(line)

    def count(name, into_branches):
        total = 0
        for line in computations.get(name, ()):
            total += " dot(" in line
            called = [w.strip("%,){}") for key in ("calls=", "to_apply=", "body=") for w in line.split(key)[1:]]
            branches = line.split("branch_computations={")[1:] + [
                part for key in ("true_computation=", "false_computation=") for part in line.split(key)[1:]
            ]
            total += sum(count(part.split(",")[0].split("}")[0].split()[0].strip("%,"), into_branches) for part in called)
            for part in branches if into_branches else ():
                total += sum(count(b.strip().strip("%"), True) for b in part.split("}")[0].split(","))
        return total

    outside = count(entry, False)
    return outside, count(entry, True) - outside
