"""Bayesian linear regression, whose posterior is known in closed form, and the loop of an optimizer that samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from curvtrain import Objective, losses, optim

N, FEATURES, OUTPUTS, PRIOR = 60, 3, 2, 4.0
KEY = jax.random.key(3)


def data():
    """Inputs whose columns differ in size and are correlated, and targets of unit noise; both float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, FEATURES)) @ np.array([[1.0, 0.4, 0.0], [0.0, 0.6, 0.3], [0.0, 0.0, 1.5]])
    return x, x @ rng.normal(size=(FEATURES, OUTPUTS)) + rng.normal(size=(N, OUTPUTS))


def closed_form():
    """(the mean (FEATURES, OUTPUTS), the precision (FEATURES, FEATURES) of each output's column)."""
    x, y = data()
    precision = x.T @ x + PRIOR * np.eye(FEATURES)
    return np.linalg.solve(precision, x.T @ y), precision


@functools.cache
def problem():
    """The mean of 1/2 |f(x) - y|^2 for a linear model without a bias."""
    model = nnx.Linear(FEATURES, OUTPUTS, use_bias=False, rngs=nnx.Rngs(0))
    return Objective.from_model(model, lambda m, b: m(b["x"]), losses.SquaredError())


def batch():
    x, y = data()
    return {"x": jnp.asarray(x, jnp.float32), "target": jnp.asarray(y, jnp.float32)}


def trained(tx, steps, samples, estimator=None):
    """(parameters, optimizer state, curvature) after so many steps on all of the data."""
    objective, params = problem()
    everything = batch()
    curvature = None if estimator is None else estimator.init(objective, params)

    def step(carry, key):
        params, state, curvature = carry

        def look(theta, key):
            value, grads, _, _ = objective.value_and_grad(theta, everything, key)
            return value, grads

        _, grads, draws = optim.at_draws(look, state, params, key, samples=samples, curvature=curvature)
        if estimator is not None:
            curvature = estimator.update(curvature, objective, params, everything, key)
            curvature = estimator.refresh(curvature, objective, params, everything, key)
        updates, state = tx.update(grads, state, params, curvature=curvature, draws=draws)
        return (optax.apply_updates(params, updates), state, curvature), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jax.random.split(KEY, steps))[0])
    return run((params, tx.init(params), curvature))


def drawn(state, params, curvature=None, count=4000):
    """Draws of the kernel, (count, FEATURES, OUTPUTS), float64."""
    of = lambda key: optim.sample_params(state, params, key, curvature)["kernel"]
    return np.asarray(jax.jit(jax.vmap(of))(jax.random.split(jax.random.key(9), count)), np.float64)
