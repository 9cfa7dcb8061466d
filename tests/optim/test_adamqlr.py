"""AdamQLR against its paper's formulas in float64, and where the paper's go wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numpy_mlp import batch_at, begin, gauss_newton, gradient, loss

from curvtrain import Objective, losses, optim

STEPS = 20


class Mlp(nnx.Module):
    """The perceptron of `numpy_mlp`."""

    def __init__(self):
        theta = jax.tree.map(jnp.asarray, begin())  # float64 under the flag
        self.A, self.a, self.B, self.b = (nnx.Param(theta[name]) for name in ("A", "a", "B", "b"))

    def __call__(self, x):
        return jnp.tanh(x @ self.A + self.a) @ self.B + self.b


def model():
    return Objective.from_model(Mlp(), lambda m, b: m(b["x"]), losses.SquaredError())


OBJECTIVE, PARAMS = model()


def batch(step):
    x, y = batch_at(step)
    return {"x": jnp.asarray(x), "target": jnp.asarray(y)}


def run(tx, steps=STEPS, data=batch):
    objective, params = model()

    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(objective.loss)(params, batch)
        updates, state = tx.update(grads, state, params, objective=objective, batch=batch, value=value)
        return optax.apply_updates(params, updates), state

    state, seen = tx.init(params), []
    for t in range(steps):
        params, state = step(params, state, data(t))
        seen.append(tuple(map(float, (state.learning_rate, state.reduction_ratio, state.damping))))
    return params, state, np.array(seen)


def reference(lam, dec, inc, clip, kappa):
    """Algorithm 1, in float64: (parameters, rates, ratios, dampings)."""
    theta, seen = begin(), []
    m = {k: np.zeros_like(a) for k, a in theta.items()}
    v = {k: np.zeros_like(a) for k, a in theta.items()}
    dot = lambda a, b: sum(np.sum(a[k] * b[k]) for k in a)
    for t in range(STEPS):
        g = gradient(theta, t)
        m = {k: 0.9 * m[k] + 0.1 * g[k] for k in g}
        v = {k: 0.999 * v[k] + 0.001 * g[k] ** 2 for k in g}
        d = {k: m[k] / (1 - 0.9 ** (t + 1)) / (np.sqrt(v[k] / (1 - 0.999 ** (t + 1))) + 1e-8) for k in g}
        c = gauss_newton(theta, d, t) + lam * dot(d, d)
        alpha = float(np.clip(dot(g, d) / c, -clip, clip))
        model = 0.5 * alpha**2 * c - alpha * dot(g, d)
        rho = (loss({k: theta[k] - alpha * d[k] for k in d}, t) - loss(theta, t)) / model
        theta = {k: theta[k] - alpha * d[k] - kappa * theta[k] for k in d}
        lam = max(lam * (dec if rho > 0.75 else inc if rho < 0.25 else 1.0), 1e-8)
        seen.append((alpha, rho, lam))
    return theta, np.array(seen)


@pytest.mark.parametrize("settings", [(1e-3, 0.5, 2.0, 0.1, 0.0), (1.0, 0.95, 1.0526, np.inf, 1e-3)])
def test_replays_the_paper(settings):
    lam, dec, inc, clip, kappa = settings
    tx = optim.adamqlr(
        initial_damping=lam,
        damping_decay=dec,
        damping_growth=inc,
        max_learning_rate=None if clip == np.inf else clip,
        weight_decay=kappa,
        faithful=True,
    )
    with jax.enable_x64(True):
        params, _, seen = run(tx)
    theta, right = reference(*settings)
    np.testing.assert_allclose(seen, right, rtol=1e-7)
    for name in theta:
        np.testing.assert_allclose(params[name], theta[name], rtol=1e-8)


def test_a_direction_that_leads_uphill_is_not_taken():
    """Where the paper's rate is negative."""
    uphill = optax.scale(-1.0)
    _, state, seen = run(optim.adamqlr(uphill, initial_damping=1e-2, faithful=True), steps=1)
    assert seen[0, 0] < 0
    params, state, seen = run(optim.adamqlr(uphill, initial_damping=1e-2), steps=1)
    assert seen[0, 0] == 0 and state.rejected == 1 and seen[0, 2] > 1e-2
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)


def test_a_rate_is_bounded_by_those_before_it():
    """Where the outputs do not depend on the direction, q is 0, and nothing else bounds alpha."""
    tx = optim.adamqlr(optax.identity(), initial_damping=0.0, min_damping=0.0, reject=False)
    _, state, seen = run(tx, steps=4)
    usual = np.median(seen[:, 0])
    flat = {"x": jnp.zeros((16, 3)), "target": jnp.full((16, 2), 1e-3)}
    grads = jax.tree.map(lambda p: jnp.full_like(p, 1e-20), PARAMS)
    _, after = tx.update(grads, state, PARAMS, objective=OBJECTIVE, batch=flat)
    assert 0 <= after.learning_rate <= 10 * usual * (1 + 1e-5)


def test_an_update_that_raises_the_loss_is_left_out():
    raised = optim.adamqlr(amplification=1e3)
    params, state, seen = run(raised, steps=2)
    assert state.rejected >= 1 and seen[-1, 2] > 1e-3
    assert float(OBJECTIVE.loss(params, batch(1))) < 10


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_it_goes_downhill(curvature):
    fixed = lambda _: batch(0)
    params, _, _ = run(optim.adamqlr(curvature=curvature), steps=30, data=fixed)
    assert OBJECTIVE.loss(params, batch(0)) < 0.2 * OBJECTIVE.loss(PARAMS, batch(0))


def test_mistakes_are_reported():
    tx = optim.adamqlr()
    with pytest.raises(TypeError, match=r"adamqlr looks at the loss .* needs objective=\. A Trainer passes it"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    scalar = Objective.from_loss(lambda p, b: jnp.sum(p["A"] ** 2))
    with pytest.raises(TypeError, match=r"adamqlr\(curvature='ggn'\) needs the model's outputs.*curvature='hessian'"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, objective=scalar, batch=batch(0))
    with pytest.raises(ValueError, match=r"adamqlr\(curvature\) should be one of 'ggn', 'hessian', not 'fisher'"):
        optim.adamqlr(curvature="fisher")
    with pytest.raises(ValueError, match=r"adamqlr\(damping_growth\) should be at least 1.0, not 0.5"):
        optim.adamqlr(damping_growth=0.5)
    with pytest.raises(TypeError, match=r"adamqlr\(base\) should be an optax transformation, not float"):
        optim.adamqlr(0.1)
