"""Optimizers for parts of the parameters: routes by name, masks and labels; estimators see no more than these parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from curvtrain import CurvatureSchedule, Objective, losses, optim
from curvtrain.curvature import KFAC, PSGD, DiagonalFisher, FullBlock, Lanczos
from curvtrain.curvature.request import requests
from curvtrain.objective import by_path, path_name

KEY = jax.random.key(0)
RNG = np.random.default_rng(1)
BATCH = {"x": jnp.asarray(RNG.normal(size=(16, 3)), jnp.float32), "label": jnp.asarray(RNG.integers(0, 4, 16))}


class Net(nnx.Module):
    def __init__(self, rngs):
        self.body, self.head = nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.body(x)))


@functools.cache
def problem():
    return Objective.from_model(Net(nnx.Rngs(0)), lambda m, b: m(b["x"]), losses.SoftmaxCrossEntropy())


def names(tree):
    return sorted(map(path_name, by_path(tree)))


def run(tx, params, count=2):
    """(parameters after so many steps, the last gradient, the last state)."""
    objective, _ = problem()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        value, grads, _, _ = objective.value_and_grad(params, BATCH, KEY)
        updates, state = tx.update(grads, state, params, batch=BATCH, key=KEY, value=value, grad=grads)
        return optax.apply_updates(params, updates), grads, state

    grads = None
    for _ in range(count):
        params, grads, state = step(params, state)
    return params, grads, state


def test_each_parameter_moves_as_its_route_says():
    _, params = problem()
    tx = optim.route([("bias", optax.sgd(0.5)), ("head", None), (".*", optax.sgd(0.1))])
    moved, grads, _ = run(tx, params, 1)
    for path, start in by_path(params).items():
        rate = 0.5 if path[-1] == "bias" else 0.0 if path[0] == "head" else 0.1
        np.testing.assert_allclose(by_path(moved)[path], start - rate * by_path(grads)[path], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("tx", "estimator"),
    [
        (optim.kfac(0.3, 0.5, 0.1), KFAC("exact")),
        (optim.kfac(initial_damping=0.5), FullBlock("exact")),
        (optim.natural_gradient(0.3, 0.1), DiagonalFisher("exact")),
        (optim.psgd(1e-2), PSGD()),
        (optim.fosi(optax.sgd(0.3)), Lanczos(k=2)),
    ],
    ids=["kfac", "kfac, adaptive", "natural_gradient", "psgd", "fosi"],
)
def test_an_estimator_sees_what_is_routed_to_its_optimizer_and_nothing_else(tx, estimator):
    """Its steps are those on an objective with the other parameters frozen."""
    objective, params = problem()
    schedule = CurvatureSchedule(refresh_every=1)
    routed = optim.self_contained(optim.route([("head", tx), (".*", None)]), estimator, schedule, objective)
    moved, _, state = run(routed, params)
    assert names(state.curvature.like()) == ["head/bias", "head/kernel"]

    part, own = objective.select(params, [path for path in by_path(params) if path[0] == "head"])
    alone = optim.self_contained(tx, estimator, schedule, part)
    inner = alone.init(own)
    for _ in range(2):
        value, grads, _, _ = part.value_and_grad(own, BATCH, KEY)
        updates, inner = alone.update(grads, inner, own, batch=BATCH, key=KEY, value=value, grad=grads)
        own = optax.apply_updates(own, updates)
    for path, leaf in by_path(own).items():
        np.testing.assert_allclose(by_path(moved)[path], leaf, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(moved["body"]["kernel"], params["body"]["kernel"])


def test_a_mask_of_optax_says_what_is_measured():
    objective, params = problem()
    kernels = lambda params: jax.tree.map(lambda p: p.ndim == 2, params)
    masked = optax.masked(optim.natural_gradient(0.3, 0.1), kernels)
    tx = optim.self_contained(masked, DiagonalFisher("exact"), CurvatureSchedule(), objective)
    moved, _, state = run(tx, params, 1)
    assert names(state.curvature.values) == ["body/kernel", "head/kernel"]
    whole, _, _ = run(
        optim.self_contained(optim.natural_gradient(0.3, 0.1), DiagonalFisher("exact"), CurvatureSchedule(), objective),
        params,
        1,
    )
    np.testing.assert_allclose(moved["head"]["kernel"], whole["head"]["kernel"], rtol=1e-5, atol=1e-7)


def test_in_a_loop_of_ones_own_a_curvature_is_restricted_to_its_groups():
    """A diagonal to any parameters; one that mixes parameters only to whole groups of them."""
    objective, params = problem()
    _, grads, _, _ = objective.value_and_grad(params, BATCH, KEY)
    kernels = lambda params: jax.tree.map(lambda p: p.ndim == 2, params)
    heads = lambda params: {"body": jax.tree.map(lambda _: False, params["body"]), "head": True}

    def updates(estimator, mask):
        curvature = estimator.update(estimator.init(objective, params), objective, params, BATCH, KEY)
        curvature = estimator.refresh(curvature, objective, params, BATCH, KEY, damping=0.1)
        masked = optax.masked(optim.scale_by_curvature(0.1), mask)
        found, _ = masked.update(grads, masked.init(params), params, curvature=curvature)
        return found, curvature.solve(grads, 0.1)

    found, whole = updates(DiagonalFisher("exact"), kernels)
    np.testing.assert_allclose(found["body"]["kernel"], whole["body"]["kernel"], rtol=1e-5)
    np.testing.assert_array_equal(found["body"]["bias"], grads["body"]["bias"])
    found, whole = updates(FullBlock("exact"), heads)
    np.testing.assert_allclose(found["head"]["kernel"], whole["head"]["kernel"], rtol=1e-5)
    with pytest.raises(ValueError, match=r"given body/kernel but not body/bias, which Blocks mixes.*Objective\.select"):
        updates(FullBlock("exact"), kernels)


def test_requests_are_found_in_every_wrapper():
    _, params = problem()
    tx = optax.chain(optax.clip(1.0), optim.route([("head", optim.kfac(0.1, 0.9, 0.2)), (".*", optax.adam(0.1))]))
    for wrapped in (tx, optax.apply_if_finite(tx, 3), optax.MultiSteps(tx, 2)):
        (found,) = requests(wrapped.init(params))
        assert (found.optimizer, found.damping) == ("kfac", np.float32(0.2))
        assert sorted(map(path_name, found.paths)) == ["head/bias", "head/kernel"]
    objective, _ = problem()
    inside = optim.self_contained(tx, KFAC(), CurvatureSchedule(), objective)
    assert requests(inside.init(params)) == []  # answered already


@pytest.mark.parametrize(
    ("routes", "error", "message"),
    [
        ([], TypeError, r"optim\.route\(routes\) should be a list of \(pattern, transformation\) pairs, not \[\]"),
        ("head", TypeError, r"should be a list of \(pattern, transformation\) pairs, not 'head'"),
        ([("head",)], TypeError, r"routes\[0\]\) should be a \(pattern, transformation\) pair"),
        ([("(", optax.sgd(0.1))], ValueError, r"'\(' is not a regular expression"),
        ([(".*", optax.adam)], TypeError, r"optim\.route\('\.\*'\) should be an optax transformation, not function"),
        ([("head", optax.sgd(0.1))], ValueError, r"no pattern matches body/bias, body/kernel\. End the list with"),
        ([(".*", None), ("head", optax.sgd(0.1))], ValueError, r"no parameter reaches 'head' \(route 1\)"),
        ([("haed", optax.sgd(0.1)), (".*", None)], ValueError, r"no parameter reaches 'haed'.*such as \['body/bias'"),
    ],
)
def test_bad_routes(routes, error, message):
    _, params = problem()
    with pytest.raises(error, match=message):
        optim.route(routes).init(params)
