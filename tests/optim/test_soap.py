"""soap, shampoo and kl_shampoo: replays of a reference in NumPy, what they ask of an estimator, what they refuse."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy_mlp import gradient as mlp_gradient

from curvtrain import CurvatureSchedule, Objective, optim
from curvtrain.curvature import GradientFactors, GradientKronecker, Lanczos
from curvtrain.optim import self_contained

sys.path.append(str(Path(__file__).parents[1] / "curvature"))
from gradient_kronecker_reference import Block, Vector, run

KEY = jax.random.key(0)


def begin():
    """A 3-3-2 perceptron, and the kernel of a convolution: of no matrix a basis is arbitrary in more than a sign."""
    rng = np.random.default_rng(0)
    shapes = {"A": (3, 3), "a": (3,), "B": (3, 2), "b": (2,), "K": (2, 2, 1, 3)}
    return {name: rng.normal(size=shape) / np.sqrt(3) for name, shape in shapes.items()}


def gradient(theta, step):
    """Of the perceptron's loss and of the mean of 1/2 |tanh(x * K) - y|^2 over patches of images."""
    rng = np.random.default_rng(2000 + step)
    images, y = rng.normal(size=(16, 3, 3)), rng.normal(size=(16, 2, 2, 3))
    patches = np.stack([images[:, i : i + 2, j : j + 2].reshape(16, 4) for i in (0, 1) for j in (0, 1)], 1)
    out = np.tanh(patches @ theta["K"].reshape(4, 3))
    error = (out - y.reshape(16, 4, 3)) * (1 - out**2) / 16
    conv = np.einsum("bpi,bpo->io", patches, error).reshape(2, 2, 1, 3)
    return mlp_gradient({name: theta[name] for name in "AaBb"}, step) | {"K": conv}


def replay(tx, estimator, reference, every, steps=20):
    """The largest relative distance of a parameter from the reference's after so many steps in float64."""
    right = reference({name: x.copy() for name, x in begin().items()}, gradient, steps, every)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, begin())
        c, state = estimator.init(None, params), tx.init(params)

        @functools.partial(jax.jit, static_argnums=4)
        def step(params, state, c, grads, refresh):
            c = estimator.update(c, None, params, None, KEY, grads=grads)
            c = estimator.refresh(c, None, params, None, KEY) if refresh else c
            updates, state = tx.update(grads, state, params, curvature=c)
            return optax.apply_updates(params, updates), state, c

        for t in range(steps):
            grads = jax.tree.map(jnp.asarray, gradient({n: np.asarray(x) for n, x in params.items()}, t))
            params, state, c = step(params, state, c, grads, t % every == 0)
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves((params, c.factors)))
    return max(np.abs(np.asarray(params[n]) - right[n]).max() / np.abs(right[n]).max() for n in right)


# name -> (optimizer, estimator, the reference's fit, eigenvalues, basis, options of the steps, sides that have factors)
REPLAYS = {
    "soap": (
        optim.soap(0.02),
        GradientKronecker(),
        ("ema", "corrected", 0.95, "qr"),
        dict(rate=0.02, b1=0.95, b2=0.95, weight_decay=0.01),
    ),
    "kl-soap": (
        optim.soap(0.02, 0.9, 0.9, weight_decay=0.0),
        GradientKronecker("kl", "corrected", 0.9, basis="eigh"),
        ("kl", "corrected", 0.9, "eigh"),
        dict(rate=0.02, b1=0.9, b2=0.9),
    ),
    "shampoo": (
        optim.shampoo(0.02, 0.9, 0.95),
        GradientKronecker(eigenvalues="product"),
        ("ema", "product", 0.95, "qr"),
        dict(rate=0.02, b1=0.9, b2=0.95, damping=1e-3),
    ),
    "shampoo, grafted": (
        optim.shampoo(0.02, 0.9, 0.95, exponent=-0.25, graft="adam"),
        GradientKronecker(eigenvalues="product", basis="eigh"),
        ("ema", "product", 0.95, "eigh"),
        dict(rate=0.02, b1=0.9, b2=0.95, p=0.25, graft="adam", damping=1e-3),
    ),
    "kl_shampoo": (
        optim.kl_shampoo(0.02),
        GradientKronecker("kl", decay=0.98),
        ("kl", "product", 0.98, "qr"),
        dict(rate=0.02, b1=0.9, b2=0.98, weight_decay=0.01),
    ),
}


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("name", REPLAYS)
def test_replays_the_reference(name, every):
    tx, estimator, (fit, eigenvalues, decay, basis), options = REPLAYS[name]

    def make(_, shape):
        if len(shape) == 1:
            return Vector(shape, decay), shape
        sides = (int(np.prod(shape[:-1])), shape[-1])
        return Block(sides, fit, eigenvalues, decay, basis), sides

    reference = functools.partial(run, make=make, eps=1e-8, **options)
    assert replay(tx, estimator, reference, every) < 1e-6


@pytest.mark.parametrize(
    ("name", "options"),
    [("soap", dict(one_sided=True)), ("kl_shampoo", dict(max_size=2)), ("shampoo", dict(max_size=3))],
)
def test_replays_the_reference_with_one_factor(name, options):
    tx, estimator, (fit, eigenvalues, decay, basis), steps = REPLAYS[name]
    estimator = dataclasses.replace(estimator, **options)

    def make(_, shape):
        if len(shape) == 1:
            return Vector(shape, decay), shape
        m, n = int(np.prod(shape[:-1])), shape[-1]
        most = options.get("max_size", 9)
        left, right = m <= most, n <= most
        if "one_sided" in options:
            left, right = m <= n, n < m
        if not (left or right):
            return Vector(shape, decay), shape
        return Block((m, n), fit, eigenvalues, decay, basis, left, right), (m, n)

    assert replay(tx, estimator, functools.partial(run, make=make, eps=1e-8, **steps), 3) < 1e-6


# -- with an estimator -------------------------------------------------------------------------------------------------


PARAMS = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32), "v": jnp.ones(3)}
BATCH = {"x": jnp.asarray(np.random.default_rng(2).normal(size=(8, 4)), jnp.float32)}


def objective():
    loss = lambda params, batch: jnp.mean((jnp.tanh(batch["x"] @ params["w"]) * params["v"] - 0.5) ** 2)
    return Objective.from_loss(loss)


def lives(tx, steps=30):
    """(state, losses) of a plain loop."""
    here = objective()

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(here.loss)(params, BATCH)
        updates, state = tx.update(grads, state, params, objective=here, batch=BATCH)
        return optax.apply_updates(params, updates), state, value

    params, state, told = PARAMS, tx.init(PARAMS), []
    for _ in range(steps):
        params, state, value = step(params, state)
        told.append(float(value))
    return state, told


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: optim.soap(0.02, b2=0.9), ("ema", "corrected", 0.9)),
        (lambda: optim.shampoo(0.02), ("ema", "product", 0.95)),
        (lambda: optim.kl_shampoo(0.02), ("kl", "product", 0.98)),
    ],
)
def test_an_open_estimator_is_what_the_optimizer_wants(make, kind):
    fit = None if kind[0] == "ema" else kind[0]
    for estimator in (GradientKronecker(), GradientKronecker(fit)):
        tx = self_contained(make(), estimator, CurvatureSchedule(refresh_every=10))
        state, told = lives(tx)
        c = state.curvature
        assert (c.fit, c.eigenvalues, c.decay) == kind
        assert int(c.refreshes) == 3 and int(c.updates) == 30 and int(c.failures) == 0
        assert told[1] < told[0] and told[-1] < 0.5 * told[0]


def test_what_does_not_fit_is_refused_before_anything_compiles():
    c = GradientKronecker().init(None, PARAMS)

    def refused(tx, curvature, kind, message):
        grads, state = jax.tree.map(jnp.ones_like, PARAMS), tx.init(PARAMS)
        with pytest.raises(kind, match=message):
            tx.update(grads, state, PARAMS, curvature=curvature)

    decay = r"soap\(b2=0.9\) .* this curvature has 0.95. Give GradientKronecker\(decay=0.9\)"
    refused(optim.soap(b2=0.9), c, ValueError, decay)
    refused(optim.kl_shampoo(), c, TypeError, r"takes the curvature of .*fit='kl', eigenvalues='product'")
    product = GradientKronecker(eigenvalues="product").init(None, PARAMS)
    refused(optim.soap(), product, TypeError, r"soap takes .*eigenvalues='corrected'.*, and this one is .*'product'")
    refused(optim.soap(), None, TypeError, r"soap.update\(\) needs a curvature")
    two = optim.route([("w", optim.soap(b2=0.9)), ("v", optim.soap(b2=0.95))])
    tx = self_contained(two, GradientKronecker(), CurvatureSchedule(), objective())
    with pytest.raises(ValueError, match=r"want decay=0.9 and decay=0.95 of it"):
        tx.init(PARAMS)
    tx = self_contained(optim.soap(), Lanczos(), CurvatureSchedule(), objective())
    with pytest.raises(TypeError, match=r"soap takes GradientFactors, those of curvature.GradientKronecker\(\)"):
        tx.init(PARAMS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.soap(-1.0), r"soap\(learning_rate\) should be at least 0.0, not -1.0"),
        (lambda: optim.soap(b1=1.0), r"soap\(b1\) should be at least 0.0 and below 1.0, not 1.0"),
        (lambda: optim.kl_shampoo(b2=-0.1), r"kl_shampoo\(b2\) should be at least 0.0"),
        (lambda: optim.shampoo(eps=0.0), r"shampoo\(eps\) should be above 0.0"),
        (lambda: optim.shampoo(exponent=0.5), r"shampoo\(exponent\) should be at least -1.0 and below 0.0"),
        (lambda: optim.shampoo(graft="adm"), r"shampoo\(graft\) should be one of .* Did you mean 'adam'"),
        (lambda: optim.soap(b1=0.0, nesterov=True), r"soap\(nesterov\) is about the momentum, and b1=0 keeps none"),
        (lambda: optim.soap(weight_decay=0.0, mask=lambda p: p), r"soap\(mask\) says which parameters decay"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_wrong_decay_that_is_traced_gives_nan():
    c = GradientKronecker().init(None, PARAMS)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    for b2, is_right in ((0.95, True), (0.9, False)):
        tx = optax.inject_hyperparams(optim.soap)(learning_rate=0.1, b2=b2)
        updates, _ = jax.jit(lambda g, s, p, tx=tx: tx.update(g, s, p, curvature=c))(grads, tx.init(PARAMS), PARAMS)
        assert all(np.all(np.isfinite(u)) == is_right for u in jax.tree.leaves(updates))


def test_before_the_first_gradient_the_momentum_goes_as_it_is():
    """A schedule may begin later: roots of a covariance that is zero would be 1e8."""
    grads = {"w": jnp.full((4, 3), 0.5), "v": jnp.full(3, -2.0)}
    for link, options in ((optim.scale_by_soap(), {}), (optim.scale_by_shampoo(), {"eigenvalues": "product"})):
        c = GradientKronecker(**options).init(None, PARAMS)
        updates, _ = link.update(grads, link.init(PARAMS), PARAMS, curvature=c)
        jax.tree.map(lambda u, g: np.testing.assert_allclose(u, g, rtol=1e-6), updates, grads)


def test_routed_and_masked():
    """Only what is routed to it has factors; links of a chain go on with its direction."""
    tx = optim.route([("v", optax.adam(0.02)), (".*", optim.soap(0.02))])
    state, told = lives(self_contained(tx, GradientKronecker(), CurvatureSchedule(refresh_every=10), objective()))
    assert state.curvature.views.names == ("w",) and told[-1] < 0.5 * told[0]
    link = optax.chain(optim.scale_by_soap(), optim.orthogonalize("exact"), optax.scale_by_learning_rate(0.05))
    tx = optax.masked(link, {"w": True, "v": False})
    tx = optax.chain(tx, optax.masked(optax.sgd(0.1), {"w": False, "v": True}))
    state, told = lives(self_contained(tx, GradientKronecker(), CurvatureSchedule(refresh_every=10), objective()))
    assert isinstance(state.curvature, GradientFactors) and told[-1] < 0.5 * told[0]
