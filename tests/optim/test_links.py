"""Links for chains: norms, spheres, cautious decay, a look ahead."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy_mlp import begin, replay

from curvtrain import optim


def params_of():
    return jax.tree.map(jnp.float32, begin())


def test_every_update_gets_the_norm():
    updates = {"a": jnp.arange(6.0).reshape(2, 3), "zero": jnp.zeros(4)}
    found, _ = optim.scale_by_norm(0.5).update(updates, optax.EmptyState())
    np.testing.assert_allclose(np.linalg.norm(found["a"]), 0.5, rtol=1e-6)
    assert not np.any(found["zero"])


def on_spheres(theta, gradient, steps):
    radius = {k: np.linalg.norm(a) for k, a in theta.items()}
    for t in range(steps):
        g = gradient(theta, t)
        for k in theta:
            moved = theta[k] - 0.05 * radius[k] * g[k] / np.linalg.norm(g[k])
            theta[k] = moved * radius[k] / np.linalg.norm(moved)
    return theta


def test_parameters_stay_on_their_spheres():
    assert replay(optim.hyperball(0.05), on_spheres) <= 1e-10


def test_what_begins_at_zero_moves_by_the_rate():
    params = {"w": jnp.ones(3), "b": jnp.zeros(4)}
    tx = optim.hyperball(lambda count: 0.1 / (1 + count))
    updates, state = tx.update({"w": jnp.zeros(3), "b": jnp.ones(4)}, tx.init(params), params)
    np.testing.assert_allclose(np.linalg.norm(updates["b"]), 0.1, rtol=1e-6)
    assert not np.any(updates["w"]) and state.count == 1


def cautious(theta, gradient, steps):
    for t in range(steps):
        g = gradient(theta, t)
        for k in theta:
            theta[k] = theta[k] - 0.1 * (g[k] + 0.3 * theta[k] * (g[k] * theta[k] >= 0))
    return theta


def test_decay_does_not_work_against_the_update():
    assert replay(optax.chain(optim.add_cautious_decay(0.3), optax.sgd(0.1)), cautious) <= 1e-10
    link = optim.add_cautious_decay(0.3, mask=lambda params: {k: a.ndim == 2 for k, a in params.items()})
    params = params_of()
    found, _ = link.update(params, link.init(params), params)
    assert np.array_equal(found["a"], params["a"]) and not np.array_equal(found["A"], params["A"])


def test_the_look_ahead_of_momentum():
    """Against the recursion in theta and m, with the gradient at theta + beta m."""
    beta, gamma, rate = 2.0, 0.8, 0.1

    def ahead(theta, gradient, steps):
        m = {k: np.zeros_like(a) for k, a in theta.items()}
        for t in range(steps):
            g = gradient({k: theta[k] + beta * m[k] for k in theta}, t)
            for k in theta:
                new = theta[k] + beta * m[k] - rate * g[k]
                m[k] = gamma * m[k] + (1 - gamma) * (new - theta[k])
                theta[k] = new
        return {k: theta[k] + beta * m[k] for k in theta}

    tx = optim.ema_nesterov(optax.sgd(rate), beta, gamma)
    assert replay(tx, ahead) <= 1e-10

    params = params_of()
    state, phi, theta = tx.init(params), params, params
    m = jax.tree.map(jnp.zeros_like, params)
    for _ in range(3):
        g = jax.tree.map(jnp.cos, phi)
        new = jax.tree.map(lambda p, g: p - rate * g, phi, g)
        m = jax.tree.map(lambda m, n, o: gamma * m + (1 - gamma) * (n - o), m, new, theta)
        theta = new
        updates, state = tx.update(g, state, phi)
        phi = optax.apply_updates(phi, updates)
    found = optim.ema_nesterov_params(state, phi)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, theta)


def test_mistakes_are_reported():
    with pytest.raises(ValueError, match=r"hyperball needs the parameters"):
        optim.hyperball(0.1).update({"w": jnp.ones(2)}, optim.hyperball(0.1).init({"w": jnp.ones(2)}))
    with pytest.raises(ValueError, match=r"hyperball\(learning_rate\) should be at least 0.0, not -1"):
        optim.hyperball(-1)
    with pytest.raises(TypeError, match=r"ema_nesterov\(tx\) should be an optax transformation, not float"):
        optim.ema_nesterov(0.1)
    with pytest.raises(ValueError, match=r"ema_nesterov\(gamma\) should be at least 0.0 and below 1.0, not 1.0"):
        optim.ema_nesterov(optax.sgd(0.1), gamma=1.0)
    with pytest.raises(ValueError, match=r"should hold one state of ema_nesterov, not 0"):
        optim.ema_nesterov_params(optax.sgd(0.1).init({}), {})
    with pytest.raises(ValueError, match=r"scale_by_norm\(norm\) should be above 0.0, not 0"):
        optim.scale_by_norm(0)
