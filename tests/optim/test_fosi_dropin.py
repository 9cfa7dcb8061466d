"""The drop-ins: what a user of the original package writes does the same here, with only the import changed."""

import inspect
import runpy
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fosi_reference import (
    DenseEigenpairs,
    Replay,
    adam,
    extreme_eigenpairs,
    flat,
    gd,
    heavy_ball,
    loss,
    quadratic,
    tree,
)

from curvtrain import optim

# most tests: the estimator's own are elsewhere, and compiling it takes seconds
dense = pytest.mark.usefixtures("dense_eigenpairs")
NAMES = ("fosi_adam", "fosi_momentum", "fosi_nesterov", "fosi_sgd")
BASE = optax.sgd(0.1)


def loss_fn(params, batch):
    """½ sum b x²: the Hessian is diag(b)."""
    return 0.5 * jnp.sum(batch * params["x"] ** 2)


PARAMS = {"x": jnp.array([1.0, -2.0, 3.0, 0.5])}
BATCH = jnp.array([1.0, 4.0, 9.0, 2.0])


@pytest.fixture
def dense_eigenpairs(monkeypatch):
    monkeypatch.setattr("curvtrain.optim.fosi_dropin.Lanczos", DenseEigenpairs)


# --------------------------------------------------------------------------------------------------------- signatures

# the original's, in order
START = [("base_optimizer", inspect.Parameter.empty), ("loss_fn", inspect.Parameter.empty)]
START += [("batch", inspect.Parameter.empty)]
DECAY = [("decay", 0.9)]
MIDDLE = [("accumulator_dtype", None), ("num_iters_to_approx_eigs", 100), ("approx_k", 5), ("approx_l", 0)]
MIDDLE += [("warmup_w", None), ("alpha", 0.1)]
CLIP = [("learning_rate_clip", 3.0)]
END = [("b_call_ese_internally", True), ("b_parallel", False)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fosi_adam", START + DECAY + MIDDLE + END),
        ("fosi_momentum", START + DECAY + MIDDLE + CLIP + END),
        ("fosi_nesterov", START + DECAY + MIDDLE + CLIP + END),
        ("fosi_sgd", START + MIDDLE + CLIP + END),
    ],
)
def test_signature_is_the_original_one(name, expected):
    parameters = inspect.signature(getattr(optim, name)).parameters.values()
    assert [(p.name, p.default) for p in parameters] == expected
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("name", NAMES)
def test_result_is_an_optax_transformation_with_a_third_function(name):
    tx = getattr(optim, name)(BASE, loss_fn, BATCH, approx_k=1)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    init, update = tx  # a pair, as optax's combinators take it
    assert (init, update) == (tx.init, tx.update) and len(tx) == 2
    assert list(inspect.signature(tx.update_ese).parameters) == ["params", "state", "batch"]
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS))


# ------------------------------------------------------------------------------------------------------- the algorithm


@dense
@pytest.mark.parametrize(
    ("name", "optax_base", "numpy_base", "momentum", "clip", "tolerance"),
    [
        # tolerance: measured errors |x_float32 - x_float64| / |x_float64| are 2.4e-7, 1.1e-6, 1.3e-6 and 3.6e-6
        ("fosi_sgd", optax.sgd(0.6), lambda: gd(0.6), "none", 3.0, 1e-6),
        ("fosi_momentum", optax.sgd(0.5, momentum=0.9), lambda: heavy_ball(0.5), "heavy_ball", 3.0, 5e-6),
        ("fosi_nesterov", optax.sgd(0.5, momentum=0.9), lambda: heavy_ball(0.5), "nesterov", 3.0, 5e-6),
        ("fosi_adam", optax.adam(0.02), lambda: adam(0.02), "ema", 1.0, 2e-5),
    ],
)
def test_iterates_are_those_of_the_paper(name, optax_base, numpy_base, momentum, clip, tolerance):
    """Internal refreshes at W = 8 (counted from 1) and every 30 steps, the defaults of alpha, decay and clip."""
    Q, x0 = quadratic(3)
    tx = getattr(optim, name)(optax_base, loss, jnp.asarray(Q, jnp.float32), num_iters_to_approx_eigs=30, warmup_w=8)
    params, state = tree(x0), tx.init(tree(x0))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params, jnp.asarray(Q, jnp.float32)), state, params)
        return optax.apply_updates(params, updates), state

    exact = extreme_eigenpairs(Q, 5)
    spectrum = lambda i: exact if i + 1 >= 8 else None
    paper = Replay(numpy_base(), momentum, clip=clip).run(lambda x: Q @ x, x0, 100, spectrum)
    worst = 0.0
    for expected in paper:
        params, state = step(params, state)
        worst = max(worst, np.linalg.norm(flat(params) - expected) / np.linalg.norm(expected))
    assert worst < tolerance
    assert state.curvature.refreshes == 4
    unscaled = Replay(numpy_base(), momentum, clip=1.0).run(lambda x: Q @ x, x0, 100, spectrum)
    if clip > 1:  # s = 10^(4/9) = 2.8 is what the tolerance would not forgive
        assert np.linalg.norm(unscaled[-1] - paper[-1]) > 1e-2 * np.linalg.norm(paper[-1])


@dense
def test_smallest_pairs_do_not_scale_the_rate():
    """s is lambda_max over the smallest of the k largest: with l > 0, the smallest of all would make it the clip."""
    tx = optim.fosi_sgd(optax.sgd(0.01), loss_fn, BATCH, None, 1, 2, 1, alpha=0.0, learning_rate_clip=8.0)
    grads = jax.grad(loss_fn)(PARAMS, BATCH)
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(state.curvature.values, [9.0, 4.0, 1.0], rtol=1e-5)
    np.testing.assert_allclose(updates["x"], [0, 0, 0, -9 / 4 * 0.01 * grads["x"][3]], atol=1e-6)


@dense
def test_inverse_is_not_damped():
    """The original takes 1 / |lambda| as it is, however far below the largest."""
    batch = jnp.array([1e5, 1.0, 1e-2, 0.0])
    tx = optim.fosi_sgd(optax.sgd(0.0), loss_fn, batch, None, 1, 3, alpha=1.0)
    updates, _ = tx.update(jax.grad(loss_fn)(PARAMS, batch), tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["x"][1], -PARAMS["x"][1], rtol=1e-2)  # lambda is known to 1e5 x 1e-7
    np.testing.assert_allclose(updates["x"][0], -PARAMS["x"][0], rtol=1e-5)


# -------------------------------------------------------------------------------------------------- when it refreshes


def steps_that_refresh(tx, steps):
    """The steps, counted from 1, after which the number of refreshes has grown."""
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    counts = [0]
    for _ in range(steps):
        _, state = update(PARAMS, state, PARAMS)
        counts.append(int(state.curvature.refreshes))
    return [step for step in range(1, steps + 1) if counts[step] > counts[step - 1]]


@dense
@pytest.mark.parametrize(
    ("period", "warmup", "at"),
    [(3, None, [3, 6, 9]), (4, 1, [1, 5, 9]), (5, 2, [2, 7]), (3, 7, [7, 10]), (4, 0, [4, 8]), (4, -1, [3, 7])],
)
def test_first_refresh_at_w_then_every_t(period, warmup, at):
    tx = optim.fosi_sgd(BASE, loss_fn, BATCH, num_iters_to_approx_eigs=period, approx_k=1, warmup_w=warmup)
    assert steps_that_refresh(tx, 10) == at


@dense
@pytest.mark.parametrize("name", NAMES)
def test_every_name_keeps_the_schedule_and_none_refreshes_when_told_not_to(name):
    build = lambda **more: getattr(optim, name)(
        BASE, loss_fn, BATCH, num_iters_to_approx_eigs=3, approx_k=1, warmup_w=2, **more
    )
    assert steps_that_refresh(build(), 6) == [2, 5]
    assert steps_that_refresh(build(b_call_ese_internally=False), 6) == []


# ---------------------------------------------------------------------------------------------------------- update_ese


def test_update_ese_honours_a_fresh_batch_and_compiles_once():
    """The original's ignores the batch silently, unless b_parallel. And it is called between jitted steps: without a
    jit of its own, every refresh would be compiled anew."""
    traces = 0

    def counted(params, batch):
        nonlocal traces
        traces += 1
        return loss_fn(params, batch)

    tx = optim.fosi_adam(BASE, counted, BATCH, approx_k=2, b_call_ese_internally=False)
    fixed = tx.update_ese(PARAMS, tx.init(PARAMS))
    np.testing.assert_allclose(fixed.curvature.values, [9.0, 4.0], rtol=1e-5)
    before = traces
    fresh = tx.update_ese(PARAMS, fixed, 2 * BATCH + 1)
    np.testing.assert_allclose(fresh.curvature.values, [19.0, 9.0], rtol=1e-5)
    np.testing.assert_allclose(tx.update_ese(PARAMS, fresh, batch=BATCH).curvature.values, [9.0, 4.0], rtol=1e-5)
    assert traces == before > 0
    assert fresh.count == 0 and fresh.curvature.refreshes == 2
    # and the next update takes the Newton step: alpha (1 - decay) / 9 for an average that starts
    updates, state = tx.update(PARAMS, fixed, PARAMS)
    np.testing.assert_allclose(updates["x"][2], -0.1 * 0.1 / 9.0 * PARAMS["x"][2], rtol=1e-4)
    assert state.curvature.refreshes == 1 and state.count == 1


@dense
def test_update_ese_beside_internal_refreshes():
    tx = optim.fosi_adam(BASE, loss_fn, BATCH, num_iters_to_approx_eigs=2, approx_k=1)
    state = tx.update_ese(PARAMS, tx.init(PARAMS), 2 * BATCH)
    update, seen = jax.jit(tx.update), []
    for _ in range(3):
        _, state = update(PARAMS, state, PARAMS)
        seen.append(float(state.curvature.values[0]))
    np.testing.assert_allclose(seen, [18.0, 9.0, 9.0], rtol=1e-5)  # until the schedule's refresh on the fixed batch


def test_parallel_averages_over_the_pmap_axis():
    """Eight replicas, each with its examples: all of them hold the eigenpairs of the mean loss over all examples."""
    assert hasattr(jax, "pmap"), "jax.pmap is gone: drop b_parallel's pmap axis, and this test with it"

    def squares(w, batch):
        x, y = batch
        return jnp.mean(0.5 * (x @ w - y) ** 2)

    n = jax.device_count()
    assert n == 8
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 3, 5)).astype(np.float32)
    batch = x, x @ np.arange(5, dtype=np.float32)
    one = jax.tree.map(lambda a: a[0], batch)
    tx = optim.fosi_sgd(optax.sgd(0.05), squares, one, approx_k=2, b_call_ese_internally=False, b_parallel=True)
    replicate = lambda t: jax.tree.map(lambda a: jnp.stack([a] * n), t)
    w = jnp.zeros(5)
    params, state = replicate(w), replicate(tx.init(w))
    state = jax.pmap(tx.update_ese, axis_name="batch")(params, state, batch)

    rows = x.reshape(-1, 5).astype(np.float64)
    values, V = extreme_eigenpairs(rows.T @ rows / len(rows), 2)
    for i in range(n):
        np.testing.assert_allclose(state.curvature.values[i], values, rtol=1e-5)
    inner = np.abs(np.einsum("dkn,kn->dk", state.curvature.vectors, V))
    np.testing.assert_allclose(inner, 1.0, atol=1e-5)
    assert np.abs(np.linalg.eigvalsh(x[0].T @ x[0] / 3)[-1] - values[0]) > 0.1  # a replica's own are others

    def step(params, state, batch):
        value, grads = jax.value_and_grad(squares)(params, batch)
        value, grads = jax.lax.pmean((value, grads), "batch")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    step, values = jax.pmap(step, axis_name="batch"), []
    for _ in range(20):
        params, state, value = step(params, state, batch)
        values.append(float(value[0]))
    assert values[-1] < 0.5 * values[0]
    np.testing.assert_array_equal(params, replicate(params[0]))


def test_parallel_needs_external_refreshes():
    with pytest.raises(ValueError, match=r"fosi_sgd\(b_parallel=True\) needs b_call_ese_internally=False"):
        optim.fosi_sgd(BASE, loss_fn, BATCH, b_parallel=True)


# ----------------------------------------------------------------------------------------------------------- neighbours


@dense
@pytest.mark.parametrize("internally", [True, False])
def test_in_a_chain_it_keeps_to_its_own_loss_and_batch(internally):
    """Extra arguments for other members, a `curvature=` among them, are neither an error nor what it estimates on."""
    tx = optim.fosi_sgd(BASE, loss_fn, BATCH, None, 2, 1, b_call_ese_internally=internally)
    chain = optax.chain(optax.clip_by_global_norm(1e9), tx, optax.scale(0.5))
    alone, state = tx.init(PARAMS), chain.init(PARAMS)
    for _ in range(3):
        expected, alone = tx.update(PARAMS, alone, PARAMS)
        updates, state = chain.update(
            PARAMS, state, PARAMS, curvature=None, objective=None, batch={"image": 0}, key=None, value=1.0
        )
        np.testing.assert_allclose(updates["x"], 0.5 * expected["x"], atol=1e-7)
    assert state[1].curvature.refreshes == alone.curvature.refreshes == int(internally)


@pytest.mark.parametrize("name", NAMES)
def test_float64_stays_off(name):
    """The original's constructor switches it on for the whole program."""
    tx = getattr(optim, name)(BASE, loss_fn, BATCH, approx_k=1)
    tx.init(PARAMS)
    assert not jax.config.jax_enable_x64 and jnp.ones(3).dtype == jnp.float32


@dense
def test_base_sees_the_parameter_tree():
    """The original hands it one flat vector: masks and partitions fail there."""
    params = {"x": PARAMS["x"], "bias": jnp.ones(2)}
    base = optax.partition({"move": optax.sgd(1.0), "stay": optax.set_to_zero()}, {"x": "move", "bias": "stay"})
    tx = optim.fosi_momentum(base, lambda p, b: loss_fn(p, b) + jnp.sum(p["bias"] ** 2), BATCH)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["x"], -params["x"])
    np.testing.assert_array_equal(updates["bias"], 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(num_iters_to_approx_eigs=0), ValueError, r"fosi_adam\(num_iters_to_approx_eigs\) should be at least 1"),
        (dict(num_iters_to_approx_eigs=2.5), TypeError, r"fosi_adam\(num_iters_to_approx_eigs\)"),
        (dict(approx_k=-1), ValueError, r"Lanczos\(k\)"),
        (dict(decay=1.5), ValueError, r"fosi\(decay\)"),
        (dict(alpha=-0.1), ValueError, r"fosi\(alpha\)"),
    ],
)
def test_options_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        optim.fosi_adam(BASE, loss_fn, BATCH, **options)


# ----------------------------------------------------------------------------------------------------- a README program

PROGRAM = """
    from curvtrain.optim import fosi_adam  # the line that changed
    import jax
    import jax.numpy as jnp
    import optax
    from jax.example_libraries import stax

    key = jax.random.PRNGKey(42)
    n_dim, target = 100, 0.5

    # the model: one linear layer that starts at zero
    zeros = jax.nn.initializers.zeros
    init_fn, apply_fn = stax.serial(stax.Dense(1, zeros, zeros))


    def loss_fn(params, batch):
        x, y = batch
        return jnp.mean(optax.l2_loss(apply_fn(params, x).squeeze(), y))


    def batches(key, size=16):
        while True:
            key, sub = jax.random.split(key)
            x = jax.random.normal(sub, (size, n_dim))
            yield x, jnp.sum(target * x, axis=-1)


    data_gen = batches(key)
    _, params = init_fn(key, (16, n_dim))

    optimizer = fosi_adam(optax.adam(1e-3), loss_fn, next(data_gen))
    opt_state = optimizer.init(params)


    @jax.jit
    def step(params, batch, opt_state):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss


    for i in range(5000):
        params, opt_state, loss = step(params, next(data_gen), opt_state)

    assert jnp.allclose(params[0][0], target), "the parameters that generated the data should be found"
"""


def test_a_program_written_for_the_original_runs_with_its_import_changed(tmp_path):
    """Linear regression in 100 dimensions, 5,000 jitted steps on fresh batches of 16, parameters in a stax list of
    tuples. The tolerance is the program's own: measured, the largest error of a weight is 6e-7."""
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))
    after = runpy.run_path(str(path), run_name="__main__")
    state = after["opt_state"]
    assert state.count == 5000 and state.curvature.refreshes == 50
    assert state.curvature.converged.all()
    assert not jax.config.jax_enable_x64 and state.curvature.values.dtype == jnp.float32
