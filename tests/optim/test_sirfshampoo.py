"""sirfshampoo, if_shampoo and singd: replays of a reference in NumPy, what they ask for, what they refuse."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numpy_mlp import EXAMPLES, batch_at
from numpy_mlp import begin as mlp_begin
from numpy_mlp import gradient as mlp_gradient

from curvtrain import CurvatureSchedule, Objective, losses, optim
from curvtrain.curvature import InverseFree, InverseFreeKFAC, Warmed

sys.path.append(str(Path(__file__).parents[1] / "curvature"))
from inverse_free_reference import Tensor, momentum_step

KEY = jax.random.key(0)

# -- from gradients ----------------------------------------------------------------------------------------------------


def begin():
    """A perceptron, and the kernel of a convolution on images of two channels: four axes, one of length 1."""
    return mlp_begin() | {"K": np.random.default_rng(1).normal(size=(2, 1, 2, 3)) / 2}


def gradient(theta, step):
    """Of the perceptron's loss and of the mean of 1/2 |tanh(x * K) - y|^2 over images."""
    rng = np.random.default_rng(2000 + step)
    images, y = rng.normal(size=(EXAMPLES, 3, 2, 2)), rng.normal(size=(EXAMPLES, 2, 2, 3))
    patches = np.stack([images[:, i : i + 2] for i in (0, 1)], 1)  # (examples, i, height, width, channels)
    out = np.tanh(np.einsum("bihwc,hco->biwo", patches, theta["K"][:, 0]))
    error = (out - y) * (1 - out**2) / EXAMPLES
    conv = np.einsum("bihwc,biwo->hco", patches, error)[:, None]
    return mlp_gradient({name: theta[name] for name in "AaBb"}, step) | {"K": conv}


def distance(params, right):
    return max(np.abs(np.asarray(params[n]) - right[n]).max() / np.abs(right[n]).max() for n in right)


def replay(tx, estimator, make, due, rate, alpha, kappa=0.0, steps=20):
    """The largest relative distance of a parameter from the reference's after so many steps in float64.

    `make(name, sides)` gives the reference of a tensor, and `due(step)` says whether factors move.
    """
    right, buf = begin(), {}
    tensors = {name: make(name, [d for d in x.shape if d != 1]) for name, x in right.items()}
    for t in range(steps):
        for name, g in gradient(right, t).items():
            squeezed = np.squeeze(g)
            if due(t):
                tensors[name].of_gradient(squeezed, EXAMPLES)
            momentum_step(right, name, tensors[name].apply(squeezed).reshape(g.shape), buf, rate, alpha, kappa)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, begin())
        c, state = estimator.init(None, params), tx.init(params)

        @functools.partial(jax.jit, static_argnums=4)
        def step(params, state, c, grads, update):
            c = estimator.update(c, None, params, None, KEY, grads=grads) if update else c
            updates, state = tx.update(grads, state, params, curvature=c)
            return optax.apply_updates(params, updates), state, c

        for t in range(steps):
            grads = jax.tree.map(jnp.asarray, gradient({n: np.asarray(x) for n, x in params.items()}, t))
            params, state, c = step(params, state, c, grads, due(t))
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves((params, c.factors, c.momenta)))
        assert int(c.failures) == int(c.skipped) == 0
    return distance(params, right)


def every(period):
    return lambda step: step % period == 0


@pytest.mark.parametrize("period", [1, 10])
@pytest.mark.parametrize("structure", ["dense", "diagonal"])
def test_sirfshampoo_replays_the_reference(structure, period):
    tx = optim.sirfshampoo(0.05, 0.3, 0.8, 0.6, 0.01, 0.1)
    estimator = InverseFree(structure, rate=0.3, momentum=0.6, damping=0.01, batch_size=EXAMPLES)
    make = lambda name, sides: Tensor(sides, structure, 0.3, 0.6, 0.01)
    assert replay(tx, estimator, make, every(period), 0.05, 0.8, 0.1) < 1e-6


def test_sirfshampoo_replays_the_reference_with_its_defaults():
    estimator = InverseFree(batch_size=EXAMPLES)
    assert replay(optim.sirfshampoo(0.01), estimator, lambda name, sides: Tensor(sides), every(1), 0.01, 0.9) < 1e-6


def test_if_shampoo_replays_the_reference():
    """With the prototype's rates by name, and its period, log4(t + 1) and ten at most."""
    due, t = set(), 0
    while t < 20:
        due.add(t)
        t += min(max(int(np.floor(np.log(t + 1) / np.log(4) + 1e-9)), 1), 10)
    tx = optim.if_shampoo(0.02, 0.9, weight_decay=0.01)
    rates = (("^[ab]$", 0.25),)
    estimator = InverseFree(rate=0.05, momentum=0.5, damping=1e-4, rates=rates, batch_size=EXAMPLES)
    make = lambda name, sides: Tensor(sides, "dense", 0.05 * (0.25 if name in "ab" else 1.0), 0.5, 1e-4)
    schedule = CurvatureSchedule(update_every=Warmed(10))
    assert {t for t in range(20) if schedule.updates(t)} == due
    assert replay(tx, estimator, make, schedule.updates, 0.02, 0.9, 0.01) < 1e-6


@pytest.mark.parametrize("structure", ["block2diagonal", "hierarchical1_1", "lower_toeplitz", "upper_toeplitz"])
def test_structures_replay_the_reference(structure):
    tx = optim.sirfshampoo(0.02, 0.3, 0.8, 0.6, 0.01)
    estimator = InverseFree(structure, rate=0.3, momentum=0.6, damping=0.01, batch_size=EXAMPLES)
    make = lambda name, sides: Tensor(sides, structure, 0.3, 0.6, 0.01)
    assert replay(tx, estimator, make, every(1), 0.02, 0.8) < 1e-6


def test_structures_by_name_and_side():
    given = [("K", ("dense", "diagonal", "upper_toeplitz")), ("[ab]", "diagonal"), ("A", "block3diagonal")]
    own = {"K": ["dense", "diagonal", "upper_toeplitz"], "a": "diagonal", "b": "diagonal", "A": "block3diagonal"}
    estimator = InverseFree(given, rate=0.3, batch_size=EXAMPLES)
    make = lambda name, sides: Tensor(sides, own.get(name, "dense"), 0.3)
    assert replay(optim.sirfshampoo(0.02, 0.3), estimator, make, every(2), 0.02, 0.9) < 1e-6


# -- from layers -------------------------------------------------------------------------------------------------------


class Perceptron(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.tanh(self.first(x)))


class Convolution(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 3, kernel_size=(2,), padding="VALID", rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.conv(x))


def perceptron_statistics(theta, step):
    """{layer: (A, G, gradient)}, rows of matrices being inputs, the bias last."""
    x, y = batch_at(step)
    h = np.tanh(x @ theta["first"][:-1] + theta["first"][-1])
    e = h @ theta["second"][:-1] + theta["second"][-1] - y
    d = (e @ theta["second"][:-1].T) * (1 - h**2)
    with_one = lambda a: np.concatenate([a, np.ones((len(a), 1))], 1)
    of = lambda a, s: (a.T @ a / len(a), s.T @ s / EXAMPLES, a.T @ s / EXAMPLES)
    return {"first": of(with_one(x), d), "second": of(with_one(h), e)}


def convolution_batch(step):
    rng = np.random.default_rng(3000 + step)
    return rng.normal(size=(EXAMPLES, 4, 2)), rng.normal(size=(EXAMPLES, 3, 3))


def convolution_statistics(theta, step):
    """Expand: every one of the three positions is a row."""
    x, y = convolution_batch(step)
    patches = np.stack([x[:, i : i + 2].reshape(EXAMPLES, 4) for i in range(3)], 1)
    rows = np.concatenate([patches, np.ones((EXAMPLES, 3, 1))], 2).reshape(-1, 5)
    out = np.tanh(rows @ theta["conv"]).reshape(EXAMPLES, 3, 3)
    s = ((out - y) * (1 - out**2)).reshape(-1, 3)
    return {"conv": (rows.T @ rows / len(rows), s.T @ s / EXAMPLES, rows.T @ s / EXAMPLES)}


def as_matrix(layer):
    kernel, bias = (np.asarray(layer[name], np.float64) for name in ("kernel", "bias"))
    return np.concatenate([kernel.reshape(-1, kernel.shape[-1]), bias[None]])


MODELS = {
    "mlp": (Perceptron, perceptron_statistics, batch_at),
    "conv": (Convolution, convolution_statistics, convolution_batch),
}
SINGD = {
    "singd": (dict(), dict(limit="entry")),
    "ikfac": (dict(kfac_like=True), dict(kfac_like=True, limit="entry")),
    "singd, as in the paper": (dict(normalize_lr_cov=False, lr_cov=0.02), dict(limit="none", beta=0.02)),
}


@pytest.mark.parametrize("period", [1, 10])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", SINGD)
def test_singd_replays_the_reference(name, model, period):
    assert replay_layers(name, model, period) < 1e-6


@pytest.mark.parametrize("structure", ["diagonal", "block2diagonal", "hierarchical1_1", "upper_toeplitz"])
def test_singd_replays_the_reference_with_structures(structure):
    assert replay_layers("singd", "mlp", 2, structure) < 1e-6


def replay_layers(name, model, period, structure="dense"):
    """The largest relative distance of a parameter from the reference's after 20 steps in float64."""
    make, statistics, batch_of = MODELS[model]
    options, own = SINGD[name]
    options = dict(lr_cov=0.2, damping=0.01, alpha1=0.6, weight_decay=0.1) | options
    own = {"beta": 0.2, "alpha": 0.6, "lam": 0.01} | own
    tx = optim.singd(0.02, 0.8, **options)
    renamed = {"normalize_lr_cov": "normalized", "lr_cov": "rate", "alpha1": "momentum"}
    wished = {renamed.get(n, n): value for n, value in options.items() if n != "weight_decay"}
    with jax.enable_x64(True):
        predict = lambda m, batch: m(batch["x"])
        objective, params = Objective.from_model(make(nnx.Rngs(0)), predict, losses.SquaredError("y"))
        params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
        right, buf = {layer: as_matrix(leaves) for layer, leaves in params.items()}, {}
        tensors = {n: Tensor(x.shape, structure, **own) for n, x in right.items()}
        estimator = InverseFreeKFAC(structure=structure, **wished)
        c, state = estimator.init(objective, params), tx.init(params)

        @functools.partial(jax.jit, static_argnums=4)
        def step(params, state, c, batch, update):
            grads = objective.value_and_grad(params, batch, KEY)[1]
            c = estimator.update(c, objective, params, batch, KEY, grads=grads) if update else c
            updates, state = tx.update(grads, state, params, curvature=c)
            return optax.apply_updates(params, updates), state, c

        for t in range(20):
            for layer, (A, G, M) in statistics(right, t).items():
                if t % period == 0:
                    tensors[layer].of_factors(A, G)
                momentum_step(right, layer, tensors[layer].apply(M), buf, 0.02, 0.8, 0.1)
            x, y = batch_of(t)
            params, state, c = step(params, state, c, {"x": jnp.asarray(x), "y": jnp.asarray(y)}, t % period == 0)
        assert int(c.failures) == int(c.skipped) == 0
    return distance({n: as_matrix(leaves) for n, leaves in params.items()}, right)


# -- with an estimator -------------------------------------------------------------------------------------------------


BATCH = {
    "x": np.random.default_rng(2).normal(size=(16, 3)).astype(np.float32),
    "y": np.random.default_rng(3).normal(size=(16, 2)).astype(np.float32),
}


@functools.cache
def problem():
    return Objective.from_model(Perceptron(nnx.Rngs(0)), lambda m, b: m(b["x"]), losses.SquaredError("y"))


def lives(tx, estimator, steps=60, schedule=None):
    """(state, losses) of a plain loop."""
    objective, params = problem()
    tx = optim.self_contained(tx, estimator, schedule or CurvatureSchedule(), objective)

    @jax.jit
    def step(params, state):
        value, grads, _, _ = objective.value_and_grad(params, BATCH, KEY)
        updates, state = tx.update(grads, state, params, batch=BATCH, key=KEY, grad=grads)
        return optax.apply_updates(params, updates), state, value

    state, told = tx.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state)
        told.append(float(value))
    return state, told


@pytest.mark.parametrize(
    ("make", "estimator", "rule"),
    [
        (lambda: optim.sirfshampoo(0.05), InverseFree(), (0.01, 0.5, 1e-3, False, "norm")),
        (lambda: optim.if_shampoo(0.02), InverseFree(), (0.05, 0.5, 1e-4, False, "norm")),
        (lambda: optim.singd(0.02), InverseFreeKFAC(), (0.01, 0.5, 1e-3, False, "entry")),
        (
            lambda: optim.singd(0.02, kfac_like=True, normalize_lr_cov=False, alpha1=0.2),
            InverseFreeKFAC(),
            (0.01, 0.2, 1e-3, True, "none"),
        ),
    ],
)
def test_an_open_estimator_is_what_the_optimizer_wants(make, estimator, rule):
    state, told = lives(make(), estimator)
    c = state.curvature
    assert (c.rule.rate, c.rule.momentum, c.rule.damping, c.rule.kfac_like, c.rule.limit) == rule
    assert int(c.updates) == 60 and int(c.failures) == int(c.skipped) == 0
    assert told[-1] < 0.7 * told[0]


def test_factors_move_as_the_schedule_says():
    schedule = CurvatureSchedule(update_every=Warmed(10))
    state, _ = lives(optim.if_shampoo(0.02), InverseFree(), schedule=schedule)
    assert int(state.curvature.updates) == sum(schedule.updates(t) for t in range(60)) < 60


def test_what_does_not_fit_is_refused_before_anything_compiles():
    objective, params = problem()
    gradients, layers = (estimator.init(objective, params) for estimator in (InverseFree(), InverseFreeKFAC()))

    def refused(tx, curvature, kind, message):
        grads, state = jax.tree.map(jnp.ones_like, params), tx.init(params)
        with pytest.raises(kind, match=message):
            tx.update(grads, state, params, curvature=curvature)

    refused(optim.sirfshampoo(), layers, TypeError, r"takes the factors of curvature.InverseFree\(\), and these are")
    refused(optim.singd(), gradients, TypeError, r"singd takes the factors of curvature.InverseFreeKFAC\(\)")
    refused(optim.singd(), None, TypeError, r"singd.update\(\) needs a curvature .*curvature.InverseFreeKFAC\(\)")
    refused(optim.if_shampoo(), gradients, ValueError, r"Give curvature.InverseFree\(rate=0.05\), or .* lr_cov=0.01")
    refused(
        optim.singd(alpha1=0.9), layers, ValueError, r"alpha1=0.9\) is the momentum of the factors, and these have 0.5"
    )
    refused(
        optim.singd(normalize_lr_cov=False), layers, ValueError, r"Give curvature.InverseFreeKFAC\(normalized=False"
    )
    two = optim.route([("first", optim.sirfshampoo()), ("second", optim.if_shampoo())])
    tx = optim.self_contained(two, InverseFree(), CurvatureSchedule(), objective)
    with pytest.raises(ValueError, match=r"want rate=0.01 and rate=0.05 of it"):
        tx.init(params)


def test_a_wrong_number_that_is_traced_gives_nan():
    objective, params = problem()
    c, grads = InverseFree().init(objective, params), jax.tree.map(jnp.ones_like, params)
    for beta2, is_right in ((0.01, True), (0.02, False)):
        tx = optax.inject_hyperparams(optim.sirfshampoo)(learning_rate=0.1, beta2=beta2)
        updates, _ = jax.jit(lambda g, s, p, tx=tx: tx.update(g, s, p, curvature=c))(grads, tx.init(params), params)
        assert all(np.all(np.isfinite(u)) == is_right for u in jax.tree.leaves(updates))


def test_routed_masked_and_decayed():
    """Only what is routed to it has factors; a mask says what decays, in front of the momentum."""
    tx = optim.route([("second", optax.sgd(0.05)), (".*", optim.singd(0.02))])
    state, told = lives(tx, InverseFreeKFAC())
    assert [tensor.name for tensor in state.curvature.tensors] == ["first"] and told[-1] < 0.7 * told[0]
    chosen = {"first": True, "second": {"kernel": True, "bias": False}}
    others = jax.tree.map(lambda x: not x, chosen)
    tx = optax.chain(optax.masked(optim.sirfshampoo(0.05), chosen), optax.masked(optax.sgd(0.05), others))
    state, told = lives(tx, InverseFree())
    names = [tensor.name for tensor in state.curvature.tensors]
    assert names == ["first/bias", "first/kernel", "second/kernel"] and told[-1] < 0.7 * told[0]
    objective, params = problem()
    c, zeros = InverseFree().init(objective, params), jax.tree.map(jnp.zeros_like, params)
    ones = jax.tree.map(jnp.ones_like, params)
    tx = optim.sirfshampoo(0.1, alpha1=0.5, kappa=0.2, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    state = tx.init(params)
    for right in (-0.1 * 0.2, -0.1 * 0.2 * 1.5):
        updates, state = tx.update(zeros, state, ones, curvature=c)
        np.testing.assert_allclose(updates["first"]["kernel"], right, rtol=1e-6)
        np.testing.assert_array_equal(updates["first"]["bias"], 0)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(zeros, state, curvature=c)
