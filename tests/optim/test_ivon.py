"""IVON against its paper's formulas in float64, and against a posterior that is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bayes import PRIOR, N, closed_form, drawn, trained
from flax import nnx
from numpy_mlp import begin, gradient, noise_of, replay_draws

from curvtrain import optim

RATE, ESS, STEPS = 0.05, 40.0, 20


def reference(samples, b1=0.9, b2=0.99999, h0=1.0, delta=1e-4, gradsq=False, clip=np.inf, rescale=True, debias=True):
    """m after STEPS steps of algorithm 1 of arXiv 2402.17641."""
    m = begin()
    g_m = {k: np.zeros_like(a) for k, a in m.items()}
    h = {k: np.full_like(a, h0) for k, a in m.items()}
    for step in range(STEPS):
        g_bar, h_hat = ({k: np.zeros_like(a) for k, a in m.items()} for _ in range(2))
        for draw in range(samples):
            n = {k: e / np.sqrt(ESS * (h[k] + delta)) for k, e in noise_of(step, draw).items()}
            g = gradient({k: m[k] + n[k] for k in m}, step)
            for k in m:
                g_bar[k] += g[k] / samples
                h_hat[k] += ESS * (g[k] ** 2 if gradsq else n[k] * g[k] * (h[k] + delta)) / samples
        for k in m:
            g_m[k] = b1 * g_m[k] + (1 - b1) * g_bar[k]
            f = h[k] - h_hat[k]
            h[k] = b2 * h[k] + (1 - b2) * h_hat[k] + 0.5 * (1 - b2) ** 2 * f**2 / (h[k] + delta)
            u = (g_m[k] / (1 - b1 ** (step + 1) if debias else 1) + delta * m[k]) / (h[k] + delta)
            m[k] = m[k] - RATE * (h0 + delta if rescale else 1) * np.clip(u, -clip, clip)
    return m


OPTIONS = {
    "defaults": (1, dict(), dict()),
    "two draws": (2, dict(b1=0.8, b2=0.9, weight_decay=0.1), dict(b1=0.8, b2=0.9, delta=0.1)),
    "gradsq": (2, dict(hess_approx="gradsq", b2=0.9, hess_init=0.3), dict(gradsq=True, b2=0.9, h0=0.3)),
    "clipped": (1, dict(clip_radius=0.05, b2=0.9), dict(clip=0.05, b2=0.9)),
    "plain rate": (1, dict(rescale_lr=False, debias=False, hess_init=2.0), dict(rescale=False, debias=False, h0=2.0)),
}


@pytest.mark.parametrize(("samples", "options", "same"), OPTIONS.values(), ids=OPTIONS)
def test_replays_the_formulas(samples, options, same):
    tx, right = optim.ivon(RATE, ESS, **options), reference(samples, **same)
    assert replay_draws(tx, right, STEPS, samples) < 1e-9


@pytest.mark.parametrize("estimate", [-1e6, -1.0, 0.0, 1e6])
def test_the_variance_stays_positive(estimate):
    """Whatever the estimate of the Hessian, h + delta loses half of itself at most."""
    tx, params = optim.ivon(0.1, 10.0, b2=0.5), {"a": jnp.ones(3)}
    state = tx.init(params)
    _, grads, draws = optim.at_draws(lambda p, _: (0.0, jax.tree.map(lambda a: estimate * a, p)), state, params, KEY)
    _, after = tx.update(grads, state, params, draws=draws)
    assert np.all(after[0].hess["a"] + 1e-4 >= 0.4999 * (1.0 + 1e-4))


KEY = jax.random.key(0)


def test_learns_the_posterior_of_a_linear_regression():
    """The best normal distribution with a diagonal covariance: its precision is the diagonal of the true one."""
    mean, precision = closed_form()
    rate = optax.exponential_decay(0.1, 400, 0.1, transition_begin=400)
    tx = optim.ivon(rate, N, weight_decay=PRIOR / N, b2=0.995, rescale_lr=False)
    params, state, _ = trained(tx, 2000, 8)
    theta = drawn(state, params)
    sigma = 1 / np.sqrt(np.diag(precision))[:, None]
    assert np.all(np.abs(params["kernel"] - mean) < 0.03 * sigma)
    h = np.asarray(state[0].hess["kernel"], np.float64)
    np.testing.assert_allclose(N * h + PRIOR, np.diag(precision)[:, None] * np.ones((1, 2)), rtol=0.05)
    np.testing.assert_allclose(theta.std(0), sigma * np.ones((1, 2)), rtol=0.06)
    np.testing.assert_allclose(theta.mean(0), mean, atol=4 * sigma.max() / np.sqrt(len(theta)))


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx()),
        lambda tx: optax.inject_hyperparams(optim.ivon)(learning_rate=0.1, ess=50.0),
        lambda tx: optax.MultiSteps(tx(), 2),
        lambda tx: optax.masked(tx(), {"a": True, "b": True}),
        lambda tx: optim.route([("a|b", tx())]),
    ],
    ids=["chain", "inject_hyperparams", "MultiSteps", "masked", "route"],
)
def test_draws_are_the_same_whatever_it_is_wrapped_in(wrapped):
    make, params = lambda: optim.ivon(0.1, 50.0), {"a": jnp.ones(3), "b": jnp.zeros((2, 2))}
    plain, tx = make(), wrapped(make)
    state = tx.init(params)
    theta = plain.sample(plain.init(params), params, KEY)
    jax.tree.map(np.testing.assert_array_equal, optim.sample_params(state, params, KEY), theta)
    look = lambda p, _: (jnp.float32(0), p)
    _, grads, draws = jax.jit(lambda s, p: optim.at_draws(look, s, p, KEY, samples=2))(state, params)
    _, after = tx.update(grads, state, params, draws=draws)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_parts_of_the_parameters_have_posteriors_of_their_own():
    """The others stay where they are, and two posteriors draw different numbers."""
    params = {"a": jnp.zeros(3), "b": jnp.zeros(3), "c": jnp.ones(3, jnp.bfloat16)}
    tx = optim.route([("a", optim.ivon(0.1, 4.0)), ("b", optim.ivon(0.1, 4.0)), ("c", optax.sgd(0.1))])
    theta = optim.sample_params(tx.init(params), params, KEY)
    np.testing.assert_array_equal(theta["c"], params["c"])
    assert theta["c"].dtype == jnp.bfloat16 and np.all(theta["a"] != 0) and np.all(theta["a"] != theta["b"])


@pytest.mark.parametrize("width", [None, jnp.bfloat16])
def test_parameters_of_a_module_and_of_few_digits(width):
    """They come as an `nnx.State`; its draws and updates are such, in the parameters' dtype."""
    params = nnx.state(nnx.Linear(3, 2, param_dtype=width or jnp.float32, rngs=nnx.Rngs(0)), nnx.Param)
    tx = optim.ivon(0.1, 50.0)
    state = tx.init(params)
    theta = tx.sample(state, params, KEY)
    assert jax.tree.structure(theta) == jax.tree.structure(params)
    value, grads, draws = optim.at_draws(lambda p, _: (jnp.float32(0), p), state, params, KEY, samples=2)
    updates, _ = tx.update(grads, state, params, draws=draws)
    for new, old in zip(jax.tree.leaves((theta, grads, updates)), 3 * jax.tree.leaves(params), strict=True):
        assert new.dtype == old.dtype and new.shape == old.shape
    assert all(n.dtype == jnp.float32 for n in jax.tree.leaves(draws)) and value == 0
