"""`optax.inject_hyperparams` around every optimizer, with plain keyword arguments: it makes arrays of all numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from curvtrain import Objective, losses, optim
from curvtrain.curvature import (
    PSGD,
    DiagonalFisher,
    GradientKronecker,
    InverseFree,
    InverseFreeKFAC,
    KroneckerDiagonal,
    Lanczos,
)
from curvtrain.curvature.posterior import posteriors

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
BATCH = {"x": jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32), "label": jnp.asarray(RNG.integers(0, 4, 8))}

# name -> (factory, its keyword arguments, an estimator of what it takes)
CASES = {
    "fosi": (optim.fosi, dict(base=optax.sgd(0.1), alpha=0.2), Lanczos(k=2)),
    "fosi, clipped": (optim.fosi, dict(base=optax.sgd(0.1), alpha=0.2, l=1, learning_rate_clip=3.0), Lanczos(k=2, l=1)),
    "kfac": (optim.kfac, dict(learning_rate=0.1, momentum=0.9, damping=0.1), DiagonalFisher("exact")),
    "kfac, adaptive": (optim.kfac, dict(initial_damping=0.5, l2=1e-3), DiagonalFisher("exact")),
    "natural_gradient": (optim.natural_gradient, dict(learning_rate=0.1), DiagonalFisher("exact")),
    "natural_gradient, all": (
        optim.natural_gradient,
        dict(
            learning_rate=0.1, damping=0.2, momentum=0.9, gradient_decay=0.5, weight_decay=0.1, momentum_correction=True
        ),
        DiagonalFisher("exact"),
    ),
    "psgd": (optim.psgd, dict(learning_rate=1e-2), PSGD()),
    "psgd, all": (optim.psgd, dict(learning_rate=1e-2, b1=0.5, weight_decay=0.1, clip_global_norm=1.0), PSGD()),
    "adafisher": (optim.adafisher, dict(learning_rate=1e-2), KroneckerDiagonal("empirical")),
    "adafisherw, root": (
        optim.adafisherw,
        dict(learning_rate=1e-2, weight_decay=0.1, b1=0.5, damping=0.2, exponent=0.5, trust_cap=0.3),
        KroneckerDiagonal("empirical"),
    ),
    "adafisher, faithful": (
        optim.adafisher,
        dict(learning_rate=1e-3, faithful=True, weight_decay=0.1, damping=2e-3),
        KroneckerDiagonal(faithful=True),
    ),
    "soap": (optim.soap, dict(learning_rate=1e-2), GradientKronecker()),
    "shampoo": (
        optim.shampoo,
        dict(learning_rate=1e-2, b1=0.5, b2=0.9, exponent=-0.25, damping=0.01, graft="adam"),
        GradientKronecker("ema", "product", 0.9),
    ),
    "sirfshampoo": (optim.sirfshampoo, dict(learning_rate=1e-2, beta2=0.1, kappa=0.1), InverseFree(rate=0.1)),
    "if_shampoo": (optim.if_shampoo, dict(learning_rate=1e-2, momentum=0.5), InverseFree(rate=0.05, damping=1e-4)),
    "singd": (optim.singd, dict(learning_rate=1e-2, damping=0.1), InverseFreeKFAC(damping=0.1)),
    "kl_shampoo": (optim.kl_shampoo, dict(learning_rate=1e-2, b2=0.9, eps=1e-6), GradientKronecker("kl", decay=0.9)),
    "ivon": (optim.ivon, dict(learning_rate=0.1, ess=50.0), DiagonalFisher()),
    "ivon, all": (
        optim.ivon,
        dict(learning_rate=0.1, ess=50.0, hess_init=0.5, b1=0.8, b2=0.9, weight_decay=0.01, clip_radius=1.0),
        DiagonalFisher(),
    ),
    "vogn": (
        optim.vogn,
        dict(learning_rate=0.1, data_size=50.0, prior_precision=2.0, damping=0.1, kl_weight=0.5, init_precision=3.0),
        DiagonalFisher("exact"),
    ),
    "log_vogn": (
        optim.log_vogn,
        dict(learning_rate=0.1, data_size=50.0, prior_precision=2.0, damping=0.1, temperature=0.5, init_sigma=0.5),
        DiagonalFisher("exact"),
    ),
    "scale_by_curvature": (optim.scale_by_curvature, dict(damping=0.1), DiagonalFisher("exact")),
    "scale_by_curvature, root": (optim.scale_by_curvature, dict(damping=0.1, exponent=-0.5), DiagonalFisher("exact")),
}


@functools.cache
def problem():
    model = nnx.Sequential(nnx.Linear(3, 5, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(5, 4, rngs=nnx.Rngs(1)))
    return Objective.from_model(model, lambda m, b: m(b["x"]), losses.SoftmaxCrossEntropy())


def steps(tx, estimator, count=3):
    """The parameters after so many jitted steps."""
    objective, params = problem()
    tx = optax.with_extra_args_support(tx)
    curvature, state = estimator.init(objective, params), tx.init(params)

    @jax.jit
    def step(params, state, curvature):
        value, grads, _, _ = objective.value_and_grad(params, BATCH, KEY)
        draws = {}
        if posteriors(state):
            look = lambda theta, key: objective.value_and_grad(theta, BATCH, key)[:2]
            value, grads, draws["draws"] = optim.at_draws(look, state, params, KEY, curvature=curvature)
        curvature = estimator.update(curvature, objective, params, BATCH, KEY, grads=grads)
        curvature = estimator.refresh(curvature, objective, params, BATCH, KEY)
        extra = dict(curvature=curvature, objective=objective, batch=BATCH, key=KEY, value=value, grad=grads, **draws)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, curvature

    for _ in range(count):
        params, state, curvature = step(params, state, curvature)
    return params, state


@pytest.mark.parametrize("name", CASES)
def test_injected_options_do_what_plain_ones_do(name):
    make, options, estimator = CASES[name]
    plain, _ = steps(make(**options), estimator)
    injected, state = steps(optax.inject_hyperparams(make)(**options), estimator)
    assert {option for option, value in options.items() if isinstance(value, float)} <= state.hyperparams.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), injected, plain)


def test_numbers_of_numpy_and_jax_are_numbers():
    optim.kfac(np.float32(0.1), jnp.float32(0.9), np.float64(0.1), damping_every=np.int32(3))
    optim.natural_gradient(jnp.float32(0.1), np.float32(0.2), momentum=np.float16(0.5))
    with pytest.raises(ValueError, match=r"kfac\(damping\) should be at least 0.0, not -1.0"):
        optim.kfac(0.1, 0.9, jnp.float32(-1.0))
    with pytest.raises(TypeError, match=r"kfac\(damping_every\) should be an integer"):
        optim.kfac(damping_every=np.float32(3))
    with pytest.raises(TypeError, match=r"natural_gradient\(damping\) should be a number"):
        optim.natural_gradient(0.1, np.array([0.1, 0.2]))
