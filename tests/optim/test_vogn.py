"""VOGN and noisy K-FAC against their formulas in float64, and against a posterior that is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bayes import FEATURES, OUTPUTS, PRIOR, N, batch, closed_form, drawn, problem, trained
from flax import nnx
from jax.flatten_util import ravel_pytree
from numpy_mlp import begin, gradient, noise_of, replay_draws

from curvtrain import CurvatureSchedule, Objective, losses, optim
from curvtrain.curvature import KFAC, Diagonal, DiagonalFisher, FullBlock

RATE, SIZE, STEPS, SAMPLES = 0.05, 30.0, 20, 2
KEY = jax.random.key(0)


def curvature_at(step):
    """Some positive diagonal, like the parameters."""
    rng = np.random.default_rng(step)
    return {name: rng.uniform(0.1, 2.0, a.shape) for name, a in begin().items()}


def reference(prior=1.0, damping=0.0, tau=lambda t: 1.0, first=None, momentum=0.0, raw=False, beta=0.0, decay=0.0):
    """The recursion of PyTorch-SSO's VIOptimizer, with beta the share of the old gradient and its average debiased."""
    m = begin()
    buffer, average = ({k: np.zeros_like(a) for k, a in m.items()} for _ in range(2))
    C = None
    for t in range(STEPS):
        l2, std = tau(t) * prior / SIZE, np.sqrt(tau(t) / SIZE)
        g = {k: np.zeros_like(a) for k, a in m.items()}
        for draw in range(SAMPLES):
            e = noise_of(t, draw)
            if C is None:
                root = dict.fromkeys(m, 0.0 if first is None else (first + damping + l2) ** (-0.5))
            else:
                root = {k: (C[k] + damping + l2) ** -0.5 for k in m}
            at = gradient({k: m[k] + std * root[k] * e[k] for k in m}, t)
            g = {k: g[k] + at[k] / SAMPLES for k in m}
        C = curvature_at(t)
        for k in m:
            x = g[k] + l2 * m[k]
            if raw:
                x = buffer[k] = momentum * buffer[k] + x
            average[k] = beta * average[k] + (1 - beta) * x
            x = average[k] / (1 - beta ** (t + 1))
            x = x / (C[k] + damping + l2) + decay * m[k]
            if not raw:
                x = buffer[k] = momentum * buffer[k] + x
            m[k] = m[k] - RATE * x
    return m


WARM = lambda t: 0.1 + 0.09 * jnp.minimum(t, 10)  # optax's schedules are float32
OPTIONS = {
    "defaults": (dict(), dict()),
    "prior, damping": (
        dict(prior_precision=5.0, damping=0.1, init_precision=2.0),
        dict(prior=5.0, damping=0.1, first=2.0),
    ),
    "warm-up": (dict(kl_weight=WARM, momentum=0.9), dict(tau=lambda t: 0.1 + 0.09 * min(t, 10), momentum=0.9)),
    "raw": (
        dict(momentum=0.8, momentum_type="raw", gradient_decay=0.9, weight_decay=0.1),
        dict(momentum=0.8, raw=True, beta=0.9, decay=0.1),
    ),
}


@pytest.mark.parametrize(("options", "same"), OPTIONS.values(), ids=OPTIONS)
def test_replays_the_formulas(options, same):
    tx, right = optim.vogn(RATE, SIZE, **options), reference(**same)
    assert replay_draws(tx, right, STEPS, SAMPLES, curvature_at) < 1e-9


ESTIMATORS = {
    "diagonal": DiagonalFisher("exact", ema=0.0),
    "Kronecker": KFAC("exact", ema=0.0, inverse="eigh"),
    "full": FullBlock("exact", ema=0.0),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_learns_the_posterior_of_a_linear_regression(name):
    """Its mean; its covariance, where the posterior can hold it: Kronecker factors and blocks can, for G = I."""
    mean, precision = closed_form()
    tx = optim.vogn(lambda t: 4 / (16 + t), N, PRIOR)
    params, state, C = trained(tx, 2000, 8, ESTIMATORS[name])
    theta = drawn(state, params, C, 20_000)
    covariance = np.diag(1 / np.diag(precision)) if name == "diagonal" else np.linalg.inv(precision)
    scale = np.sqrt(np.diag(covariance))
    assert np.all(np.abs(params["kernel"] - mean) < 0.03 * scale[:, None])
    flat = (theta - mean).transpose(0, 2, 1).reshape(len(theta), -1)  # output by output
    found = flat.T @ flat / len(flat)
    wanted = np.kron(np.eye(OUTPUTS), covariance)
    size = np.tile(scale, OUTPUTS)
    np.testing.assert_allclose(found / np.outer(size, size), wanted / np.outer(size, size), atol=0.04)


@pytest.mark.parametrize("inverse", ["eigh", "ekfac"])
def test_the_covariance_of_a_kronecker_sample_is_the_inverse(inverse):
    """Exactly, by its root as a matrix, and not with the factors on the wrong sides."""
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    objective, params = Objective.from_model(model, lambda m, b: m(b["x"]), losses.SoftmaxCrossEntropy())
    rng = np.random.default_rng(0)
    data = {"x": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32), "label": jnp.asarray(rng.integers(0, 4, 8))}
    estimator = KFAC("exact", inverse=inverse)
    C = estimator.init(objective, params)
    for _ in range(2):
        C = estimator.update(C, objective, params, data, KEY)
        C = estimator.refresh(C, objective, params, data, KEY)
    state = optim.vogn(0.1, 50.0, 5.0).init(params)
    state = jax.tree.map(lambda a: a + 1 if a.dtype == jnp.int32 else a, state)  # one update later
    root = lambda e: ravel_pytree(C.power(e, 0.1, -0.5))[0]
    flat, unravel = ravel_pytree(params)
    L = np.asarray(jax.vmap(lambda e: root(unravel(e)), out_axes=1)(jnp.eye(flat.size)), np.float64)
    P = np.asarray(C.as_matrix(), np.float64) + 0.1 * np.eye(flat.size)
    np.testing.assert_allclose(L @ L.T @ P, np.eye(flat.size), atol=2e-4)
    draws = jax.vmap(lambda k: ravel_pytree(optim.sample_params(state, params, k, C))[0] - flat)
    n = np.asarray(draws(jax.random.split(KEY, 40_000)), np.float64)
    whitened = np.linalg.cholesky(50.0 * P).T @ n.T  # of covariance 1, whatever is sampled
    np.testing.assert_allclose(whitened @ whitened.T / len(n.T[0]), np.eye(flat.size), atol=0.04)


def later_reference(prior=1.0, b1=0.9, damping=0.0, T=1.0, share=RATE, first=1.0):
    """The recursion of the authors' later program."""
    m = begin()
    g_m = {k: np.zeros_like(a) for k, a in m.items()}
    logs = {k: np.full_like(a, np.log(first)) for k, a in m.items()}
    for t in range(STEPS):
        sigma = {k: np.exp(x) for k, x in logs.items()}
        at = [noise_of(t, draw) for draw in range(SAMPLES)]
        g = [gradient({k: m[k] + sigma[k] * e[k] / np.sqrt(SIZE) for k in m}, t) for e in at]
        for k in m:
            g_m[k] = b1 * g_m[k] + (1 - b1) * (sum(x[k] for x in g) / SAMPLES + prior / SIZE * m[k])
            f = (prior / SIZE + damping + curvature_at(t)[k]) * sigma[k] ** 2 - T
            m[k] = m[k] - RATE * sigma[k] ** 2 * g_m[k]
            logs[k] = logs[k] - 0.5 * np.log1p(share * f)
    return m


LATER = {
    "defaults": (dict(), dict()),
    "all": (
        dict(prior_precision=3.0, b1=0.5, damping=0.2, temperature=0.5, curvature_rate=0.3, init_sigma=0.4),
        dict(prior=3.0, b1=0.5, damping=0.2, T=0.5, share=0.3, first=0.4),
    ),
}


@pytest.mark.parametrize(("options", "same"), LATER.values(), ids=LATER)
def test_replays_the_later_formulas(options, same):
    tx, right = optim.log_vogn(RATE, SIZE, **options), later_reference(**same)
    assert replay_draws(tx, right, STEPS, SAMPLES, curvature_at) < 1e-9


def test_the_later_form_learns_the_posterior_of_a_linear_regression():
    mean, precision = closed_form()
    tx = optim.log_vogn(lambda t: 4 / (16 + t), N, PRIOR)
    params, state, _ = trained(tx, 2000, 8, ESTIMATORS["diagonal"])
    sigma = (1 / np.sqrt(np.diag(precision)))[:, None] * np.ones((1, OUTPUTS))
    assert np.all(np.abs(params["kernel"] - mean) < 0.05 * sigma)
    np.testing.assert_allclose(drawn(state, params, count=20_000).std(0), sigma, rtol=0.02)


def test_the_first_step_has_no_noise_or_that_of_its_precision():
    objective, params = problem()
    C = DiagonalFisher("exact").init(objective, params)
    for precision, deviation in ((None, 0.0), (3.0, 1 / np.sqrt(N * (3.0 + PRIOR / N)))):
        state = optim.vogn(0.1, N, PRIOR, init_precision=precision).init(params)
        theta = drawn(state, params, C, 4000) - np.asarray(params["kernel"])
        np.testing.assert_allclose(theta.std(0), np.full((FEATURES, OUTPUTS), deviation), rtol=0.05)


def test_in_a_chain_of_parts():
    """A part of the parameters has a posterior; it draws with a curvature of more than these."""
    _, params = problem()
    params = {"first": params["kernel"], "second": params["kernel"]}
    tx = optim.route([("first", optim.vogn(0.1, N)), ("second", optax.sgd(0.1))])
    C = Diagonal(jax.tree.map(jnp.ones_like, params))
    state = tx.init(params)
    _, state = tx.update(params, state, params, curvature=C)
    theta = optim.sample_params(state, params, KEY, C)
    assert np.all(theta["first"] != params["first"])
    np.testing.assert_array_equal(theta["second"], params["second"])


def test_draws_with_the_curvature_that_it_carries():
    """`self_contained` has its own, so nobody passes one to draw."""
    objective, params = problem()
    estimator = DiagonalFisher("exact", ema=0.0)
    tx = optim.self_contained(optim.vogn(0.1, N, PRIOR), estimator, CurvatureSchedule(), objective)
    _, state = tx.update(params, tx.init(params), params, batch=batch(), key=KEY)
    inner, C = state.answer()
    assert np.any(C.values["kernel"] > 0)
    theta = optim.sample_params(state, params, KEY)["kernel"]
    np.testing.assert_array_equal(theta, optim.sample_params(inner, params, KEY, C)["kernel"])
    assert np.all(theta != params["kernel"])


def test_a_curvature_without_roots_is_refused_before_anybody_draws():
    objective, params = problem()
    C = KFAC().init(objective, params)
    tx = optim.vogn(0.1, N)
    state = tx.init(params)
    for use in (lambda: tx.update(params, state, params, curvature=C), lambda: tx.sample(state, params, KEY, C)):
        with pytest.raises(TypeError, match=r"vogn draws with the root .*KFAC\(inverse='eigh'\)"):
            use()
