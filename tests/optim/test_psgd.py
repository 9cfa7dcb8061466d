"""The optimizer over a fitted preconditioner."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from curvtrain import CurvatureSchedule, Objective, optim
from curvtrain.curvature import PSGD, Affine, Dense, Diagonal, Kron, Lanczos, LowRank, XMat

KEY = jax.random.key(0)


def square_sum(params, batch):
    return sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))


OBJECTIVE = Objective.from_loss(square_sum)
BATCH = {"nothing": np.zeros((1,), np.float32)}


def evaluations(tx, estimator, params, steps):
    """The loss at each evaluation."""
    curvature, state, found = estimator.init(OBJECTIVE, params), tx.init(params), []

    @jax.jit
    def step(params, state, curvature, key):
        value, grads, _, _ = OBJECTIVE.value_and_grad(params, BATCH)
        curvature = estimator.update(curvature, OBJECTIVE, params, BATCH, key)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, curvature, value

    for i in range(steps):
        params, state, curvature, value = step(params, state, curvature, jax.random.fold_in(KEY, i))
        found.append(float(value))
    return found


@pytest.mark.parametrize("b1", [0.0, 0.9])
@pytest.mark.parametrize("family", [Kron(), Affine(), LowRank(2), XMat(), Dense(), Diagonal()])
def test_a_sum_of_squares_is_solved_at_the_second_evaluation(family, b1):
    values = evaluations(optim.psgd(1.0, b1), PSGD(family, "hessian"), {"x": jnp.array([1.0, 2.0, 3.0])}, 2)
    np.testing.assert_allclose(values[0], 14.0)
    assert values[1] < 1e-12


def state_with(P, params):
    """A curvature whose P is a multiple of I."""
    return PSGD(Kron(initial_scale=P)).init(OBJECTIVE, params)


PARAMS = {"a": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "b": jnp.array([1.0])}


def outputs(tx, gradients, P=1.0):
    state, found = tx.init(PARAMS), []
    for g in gradients:
        u, state = tx.update(g, state, PARAMS, curvature=state_with(P, PARAMS))
        found.append(u)
    return found


def test_momentum_is_debiased():
    rng = np.random.default_rng(0)
    gradients = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS) for _ in range(4)]
    plain = outputs(optim.psgd(0.1, 0.8, clip_rms=None), gradients, P=2.0)
    ahead = outputs(optim.psgd(0.1, 0.8, nesterov=True, clip_rms=None), gradients, P=2.0)
    mu = 0.0
    for t, g in enumerate(gradients, start=1):
        mu = 0.8 * mu + 0.2 * np.asarray(g["a"])
        np.testing.assert_allclose(plain[t - 1]["a"], -0.2 * mu / (1 - 0.8**t), rtol=1e-5)
        looked = 0.8 * mu / (1 - 0.8 ** (t + 1)) + 0.2 * np.asarray(g["a"]) / (1 - 0.8**t)
        np.testing.assert_allclose(ahead[t - 1]["a"], -0.2 * looked, rtol=1e-5)


def test_without_momentum_none_is_kept():
    state = optim.psgd(0.1, 0.0).init(PARAMS)
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 0


def test_updates_are_clipped_to_an_rms_where_gradients_are_whitened():
    (u,) = outputs(optim.psgd(1.0, 0.0), [PARAMS], P=100.0)
    for leaf in jax.tree.leaves(u):
        np.testing.assert_allclose(np.sqrt(np.mean(np.square(leaf))), 1.1, rtol=1e-5)
    (u,) = outputs(optim.psgd(1.0, 0.9, style="adam"), [PARAMS], P=100.0)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(u["a"]))), 1.1 * np.sqrt(0.1 / 1.9), rtol=1e-5)
    (u,) = outputs(optim.psgd(1.0, 0.0, clip_rms=None), [PARAMS], P=100.0)
    np.testing.assert_allclose(u["a"], -100 * PARAMS["a"], rtol=1e-5)
    curvature = PSGD(Kron(initial_scale=100.0), "hessian").init(OBJECTIVE, PARAMS)
    tx = optim.psgd(1.0, 0.0)
    u, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, curvature=curvature)
    np.testing.assert_allclose(u["a"], -100 * PARAMS["a"], rtol=1e-5)


def test_the_whole_update_is_clipped_to_a_norm_before_the_decay():
    (u,) = outputs(optim.psgd(1.0, 0.0, clip_global_norm=0.5, weight_decay=0.1), [PARAMS], P=100.0)
    rest = jax.tree.map(lambda u, p: -u - 0.1 * p, u, PARAMS)
    np.testing.assert_allclose(optax.tree.norm(rest), 0.5, rtol=1e-5)


def test_decay_is_decoupled_and_masked():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    (u,) = outputs(optim.psgd(0.5, weight_decay=0.1, mask={"a": True, "b": False}), [zero])
    np.testing.assert_allclose(u["a"], -0.05 * PARAMS["a"], rtol=1e-6)
    np.testing.assert_array_equal(u["b"], 0)


def test_the_rate_may_be_a_schedule_or_injected():
    scheduled = outputs(optim.psgd(lambda count: 0.1 * (count + 1), 0.0, clip_rms=None), [PARAMS, PARAMS])
    np.testing.assert_allclose(scheduled[1]["a"], 2 * scheduled[0]["a"], rtol=1e-6)
    tx = optax.inject_hyperparams(lambda learning_rate: optim.psgd(learning_rate, 0.0))(learning_rate=0.1)
    u, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, curvature=state_with(1.0, PARAMS))
    assert np.any(np.asarray(u["a"]))


def test_self_contained_fits_before_or_after_it_applies():
    params = {"x": jnp.array([1.0, 2.0, 3.0])}
    for first, expected in ((True, 0.0), (False, 14.0)):
        schedule = CurvatureSchedule(update_first=first)
        tx = optim.self_contained(optim.psgd(1.0, 0.0), PSGD(Kron(), "hessian"), schedule, OBJECTIVE)
        grads = OBJECTIVE.value_and_grad(params, BATCH)[1]
        updates, state = tx.update(grads, tx.init(params), params, batch=BATCH)
        # P is H^-1 = 1/2, or still I: a step of -2x, to the other side
        np.testing.assert_allclose(square_sum(optax.apply_updates(params, updates), None), expected, atol=1e-10)
        assert int(state.curvature.fits) == 1


@pytest.mark.parametrize("seed", range(5))
def test_rosenbrock_in_100_dimensions(seed):
    """50 pairs (x, y), from 0: 100 (y - x^2)^2 + (1 - x)^2, below 1e-4 within 1,300 iterations."""

    def rosenbrock(params, batch):
        x, y = params["x"], params["y"]
        return jnp.sum(100 * (y - x**2) ** 2 + (1 - x) ** 2)

    objective, params = Objective.from_loss(rosenbrock), {"x": jnp.zeros(50), "y": jnp.zeros(50)}
    estimator, tx = PSGD(Dense(), "hessian"), optim.psgd(1.0, 0.9)

    def step(carry, key):
        params, state, curvature = carry
        value, grads, _, _ = objective.value_and_grad(params, BATCH)
        curvature = estimator.update(curvature, objective, params, BATCH, key)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return (optax.apply_updates(params, updates), state, curvature), value

    start = (params, tx.init(params), estimator.init(objective, params))
    keys = jax.random.split(jax.random.key(seed), 1300)
    values = jax.jit(lambda start, keys: jax.lax.scan(step, start, keys)[1])(start, keys)
    assert values[0] == 50 and values[-1] < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(learning_rate=-1.0), r"psgd\(learning_rate\) should be at least 0.0, not -1.0"),
        (dict(b1=1.0), r"psgd\(b1\) should be at least 0.0 and below 1.0"),
        (dict(weight_decay=-0.1), r"psgd\(weight_decay\)"),
        (dict(clip_rms=0.0), r"psgd\(clip_rms\) should be above 0.0"),
        (dict(clip_rms="automatic"), r"psgd\(clip_rms\) should be one of 'auto'"),
        (dict(clip_global_norm=0.0), r"psgd\(clip_global_norm\)"),
        (dict(style="adamw"), r"psgd\(style\) should be one of 'unit', 'adam', not 'adamw'. Did you mean 'adam'"),
        (dict(b1=0.0, nesterov=True), r"psgd\(nesterov=True\) looks ahead along a moving average"),
        (dict(b1=0.0, style="adam"), r"psgd\(style='adam'\) scales by the RMS of a moving average"),
        (dict(b1=0.0, mu_dtype="bfloat16"), r"psgd\(mu_dtype\) is that of a moving average"),
        (dict(mask=lambda params: params), r"psgd\(mask\) says which parameters decay"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        optim.psgd(**options)


@pytest.mark.parametrize("options", [{}, dict(weight_decay=0.1, clip_global_norm=1.0, style="adam", nesterov=True)])
def test_hyperparameters_are_injected(options):
    """optax makes arrays of all numbers, which are traced."""
    c = state_with(1.0, PARAMS)
    found = []
    for tx in (optax.inject_hyperparams(optim.psgd)(learning_rate=1e-2, **options), optim.psgd(1e-2, **options)):
        state, update = jax.jit(tx.init)(PARAMS), jax.jit(tx.update)
        for _ in range(2):
            updates, state = update(PARAMS, state, PARAMS, curvature=c)
        found.append(updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *found)


def test_parameters_without_entries_stay_empty():
    params = PARAMS | {"none": jnp.zeros((0, 4))}
    tx, c = optim.psgd(1e-2), state_with(1.0, params)
    updates, _ = tx.update(params, tx.init(params), params, curvature=c)
    assert updates["none"].shape == (0, 4) and np.all(np.isfinite(updates["a"]))


def test_a_missing_or_other_curvature_is_named():
    tx = optim.psgd(0.1)
    with pytest.raises(TypeError, match=r"psgd.update\(\) needs a curvature"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    pairs = Lanczos(k=1).init(OBJECTIVE, PARAMS)
    with pytest.raises(TypeError, match=r"psgd.update\(curvature=\) should be FittedPreconditioner, not Eigenpairs"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, curvature=pairs)
