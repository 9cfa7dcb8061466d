"""FOSI against the paper's algorithm in dense numpy, against its own base optimizer, and as a citizen of optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fosi_reference import (
    MOMENTA,
    SPECTRUM,
    N,
    Replay,
    adam,
    drive,
    eigenpairs,
    extreme_eigenpairs,
    flat,
    gd,
    heavy_ball,
    loss,
    quadratic,
    tree,
)
from jax.sharding import NamedSharding, PartitionSpec

from curvtrain import Objective, optim
from curvtrain.curvature import Lanczos

OBJECTIVE = Objective.from_loss(loss)
W, REFRESH = 20, 70  # of the replays: the first refresh, from nothing, and the second, from the first one's vectors


def orthonormal(k, seed=0):
    """k random orthonormal rows of length N."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(N, k)))[0].T


def normal(seed):
    return np.random.default_rng(seed).normal(size=N)


def step(tx, pairs, grads, *, state=None, params=None, **extra):
    """(update as a flat vector, state) of one step from flat float64 gradients."""
    params = tree(np.ones(N)) if params is None else params
    state = tx.init(params) if state is None else state
    updates, state = tx.update(tree(grads), state, params, curvature=pairs, **extra)
    return flat(updates), state


@functools.cache
def curvatures(seed, **options):
    """(before the first refresh, a cold refresh, a warm one) of a `Lanczos` on the quadratic."""
    Q, x0 = quadratic(seed)
    estimator = Lanczos(**options)
    refresh = jax.jit(estimator.refresh)
    empty = estimator.init(OBJECTIVE, tree(x0))
    key = jax.random.key(seed)
    Q, params = jnp.asarray(Q, jnp.float32), tree(x0)
    cold = refresh(empty, OBJECTIVE, params, Q, jax.random.fold_in(key, 0))
    return empty, cold, refresh(cold, OBJECTIVE, params, Q, jax.random.fold_in(key, 1))


# ------------------------------------------------------------------------------------------------------- the paper

# base: optax, numpy, and the tolerance of the replay. Measured over three problems and all momenta, worst
# |x_float32 - x_float64| / |x_float64| of 150 iterates: GD 3.6e-7, heavy ball 2.2e-6, Adam 3.5e-6.
BASES = {
    "gd": (lambda: optax.sgd(1.9), lambda: gd(1.9), 2e-6),
    "heavy_ball": (lambda: optax.sgd(1.0, momentum=0.9), lambda: heavy_ball(1.0), 1e-5),
    "adam": (lambda: optax.adam(0.02), lambda: adam(0.02), 2e-5),
}


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("base", BASES)
def test_iterates_are_those_of_the_paper(base, momentum):
    in_optax, in_numpy, tolerance = BASES[base]
    Q, x0 = quadratic(0)
    empty, cold, warm = curvatures(0, k=10)
    assert cold.products > warm.products  # the second refresh did start from the first
    exact = extreme_eigenpairs(Q, 10)

    ours, state = drive(
        optim.fosi(in_optax(), momentum=momentum, damping=0.0),
        x0,
        Q,
        lambda i: empty if i < W else cold if i < REFRESH else warm,
        steps=150,
    )
    paper = Replay(in_numpy(), momentum).run(lambda x: Q @ x, x0, 150, lambda i: None if i < W else exact)

    error = np.linalg.norm(ours - paper, axis=1) / np.linalg.norm(paper, axis=1)
    assert error.max() < tolerance
    assert state.count == 150
    # not for want of a difference: the iterates of the other momenta are far from these
    for other in set(MOMENTA) - {momentum}:
        far = Replay(in_numpy(), other).run(lambda x: Q @ x, x0, 60, lambda i: None if i < W else exact)
        assert np.linalg.norm(far - paper[:60], axis=1).max() > 100 * tolerance * np.linalg.norm(paper[59])


@pytest.mark.parametrize("momentum", MOMENTA)
def test_velocity_is_carried_into_a_new_span(momentum):
    """Eigenvectors that turn at every fifth step: only what velocity is in parameter space can follow the paper."""
    Q, x0 = quadratic(1)
    spectra = [(np.array([2.0, 1.0, 0.5]), orthonormal(3, seed)) for seed in range(4)]
    pairs = [eigenpairs(values, V) for values, V in spectra]
    tx = optim.fosi(optax.sgd(0.5, momentum=0.9), 0.3, momentum=momentum, damping=0.0)
    ours, _ = drive(tx, x0, Q, lambda i: pairs[i // 5], steps=20)
    replay = Replay(heavy_ball(0.5), momentum, alpha=0.3)
    paper = replay.run(lambda x: Q @ x, x0, 20, lambda i: spectra[i // 5])
    np.testing.assert_allclose(ours, paper, rtol=0, atol=2e-5)  # measured 1.2e-6 on iterates of size 4
    if momentum != "none":  # a velocity that starts afresh with every span is far from it
        afresh, x = [], x0
        base = heavy_ball(0.5)
        for i in range(4):
            part = Replay(base, momentum, alpha=0.3).run(lambda x: Q @ x, x, 5, lambda _, i=i: spectra[i])
            afresh.append(part)
            x = part[-1]
        assert np.abs(np.concatenate(afresh) - paper).max() > 1e-3


def test_velocity_passes_through_a_refresh_unchanged():
    V1, V2 = orthonormal(3, 1), orthonormal(3, 2)
    values, g = np.array([3.0, 2.0, 1.0]), normal(0)
    tx = optim.fosi(optax.sgd(0.1), 0.5, momentum="heavy_ball", decay=0.9)
    _, state = step(tx, eigenpairs(values, V1), g)
    vel = V1.T @ (V1 @ g)
    np.testing.assert_allclose(flat(state.velocity), vel, atol=1e-6)
    update, state = step(tx, eigenpairs(values, V2), np.zeros(N), state=state)
    np.testing.assert_allclose(flat(state.velocity), 0.9 * vel, atol=1e-6)  # of V1's span, which V2 does not hold
    np.testing.assert_allclose(update, -0.5 * V2.T @ (V2 @ (0.9 * vel) / values), atol=1e-6)


# ------------------------------------------------------------------------------------------------- fewer iterations


CAP = 16_000  # steps of a run that does not get there


@functools.partial(jax.jit, static_argnums=0, static_argnames=("cap",))
def iterations(make, lr, curvature, Q, x0, *, cap=CAP, target=1e-6):
    """Steps of `make(lr)` until the loss is `target` times its first value; `cap` if that never happens."""
    tx = optax.with_extra_args_support(make(lr))
    first = loss(x0, Q)

    def advance(carry):
        params, state, t = carry
        updates, state = tx.update(jax.grad(loss)(params, Q), state, params, curvature=curvature)
        return jax.tree.map(jnp.add, params, updates), state, t + 1

    def running(carry):
        value = loss(carry[0], Q)
        return (value > target * first) & (value < 1e3 * first) & (carry[2] < cap)

    params, _, t = jax.lax.while_loop(running, advance, (x0, tx.init(x0), 0))
    return jnp.where(loss(params, Q) <= target * first, t, cap)


# Base, FOSI around it, and the rates that the base may choose from: 6, 6 and 10 runs. GD and heavy ball diverge at
# the last one. The momentum decay is 0.9 everywhere.
GD = (lambda lr: optax.sgd(lr), "none", np.array([1.0, 1.5, 1.8, 1.9, 1.95, 2.05]))
HEAVY_BALL = (lambda lr: optax.sgd(lr, momentum=0.9), "heavy_ball", np.array([1.0, 2.0, 3.0, 3.3, 3.6, 3.9]))
ADAM = (lambda lr: optax.adam(lr), "ema", 2.0 ** np.arange(-6, 4))


@functools.cache
def tuned(which):
    """(best rate of the base alone, its iterations) over the grid."""
    base, _, rates = {"gd": GD, "heavy_ball": HEAVY_BALL, "adam": ADAM}[which]
    Q, x0 = quadratic(0)
    run = lambda lr: iterations(base, lr, None, jnp.asarray(Q, jnp.float32), tree(x0))
    counts = np.asarray(jax.vmap(run)(jnp.asarray(rates, jnp.float32)))
    best = int(np.argmin(counts))
    assert 0 < best < len(rates) - 1, "the grid should hold the best rate, not end at it"
    assert counts[best] < CAP
    return float(rates[best]), int(counts[best])


def fosi_iterations(which, rate, curvature, **options):
    base, momentum, _ = {"gd": GD, "heavy_ball": HEAVY_BALL, "adam": ADAM}[which]
    Q, x0 = quadratic(0)
    make = lambda lr: optim.fosi(base(lr), momentum=momentum, **options)
    return int(iterations(make, jnp.float32(rate), curvature, jnp.asarray(Q, jnp.float32), tree(x0)))


def test_adam_needs_a_half_of_its_iterations_at_its_best_rate():
    """k = 10 and nothing else: without the large eigenvalues in its second moments, Adam moves faster in the rest."""
    rate, alone = tuned("adam")
    _, curvature, _ = curvatures(0, k=10)
    assert 2 * fosi_iterations("adam", rate, curvature) <= alone  # measured: rate 0.5, 757 alone, 95 with FOSI


@pytest.mark.parametrize("which", ["gd", "heavy_ball"])
def test_linear_bases_gain_from_the_smallest_pairs_at_their_best_rate(which):
    """At one rate, GD and heavy ball wait for the smallest curvature; k = l = 10 takes both ends off their hands."""
    rate, alone = tuned(which)
    _, curvature, _ = curvatures(0, k=10, l=10, m=N)
    assert curvature.converged.all()
    # measured: GD, rate 1.95, 10,900 alone, 1,799 with FOSI; heavy ball, rate 3.6, 577 and 112
    assert 2 * fosi_iterations(which, rate, curvature, l=10) <= alone


@pytest.mark.parametrize("which", ["gd", "heavy_ball"])
def test_linear_bases_gain_from_the_largest_pairs_by_the_scaled_rate(which):
    """k = 10 with the paper's scaling: the base runs at s times its best rate, at which it diverges alone."""
    rate, alone = tuned(which)
    _, curvature, _ = curvatures(0, k=10)
    s = float(curvature.values[0] / curvature.values[-1])
    Q, x0 = quadratic(0)
    base = {"gd": GD, "heavy_ball": HEAVY_BALL}[which][0]
    assert iterations(base, jnp.float32(s * rate), None, jnp.asarray(Q, jnp.float32), tree(x0)) == CAP
    # measured: s = 10; GD 10,900 alone, 1,089 with FOSI; heavy ball 577 and 103
    assert 2 * fosi_iterations(which, rate, curvature, learning_rate_clip=100.0) <= alone


@pytest.mark.parametrize("which", ["gd", "heavy_ball"])
def test_linear_bases_gain_nothing_else_from_the_largest_pairs(which):
    """A limit of the method, held here so that nobody claims otherwise: at one rate, a linear base's iterates outside
    of the span are the same with FOSI and without, and that is where the slow directions are."""
    rate, alone = tuned(which)
    _, curvature, _ = curvatures(0, k=10)
    assert abs(fosi_iterations(which, rate, curvature) - alone) <= 0.01 * alone  # measured: the same number


# ---------------------------------------------------------------------------------------------- which pairs are used


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
@pytest.mark.parametrize(
    "base", [optax.sgd(0.1, momentum=0.9), optax.adamw(1e-2, weight_decay=0.1)], ids=["heavy ball", "adamw"]
)
def test_base_alone_before_the_first_refresh(base, dtype):
    """Bit for bit, whatever the dtype and options."""
    with jax.enable_x64(dtype == jnp.float64):
        cast = lambda x: jax.tree.map(lambda a: a.astype(dtype) / 3, tree(x))
        params = cast(normal(0))
        tx = optim.fosi(base, learning_rate_clip=3.0)
        curvature = Lanczos(k=3).init(None, params)
        state, base_state = tx.init(params), base.init(params)
        for seed in range(3):
            grads = cast(normal(seed))
            ours, state = tx.update(grads, state, params, curvature=curvature)
            theirs, base_state = base.update(grads, base_state, params)
            assert all(u.dtype == dtype for u in jax.tree.leaves(ours))
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        jax.tree.map(np.testing.assert_array_equal, state.base, base_state)


def test_unconverged_pairs_are_left_to_the_base():
    V, values, g = orthonormal(4), np.array([4.0, 3.0, 2.0, 1.0]), normal(1)
    tx = optim.fosi(optax.sgd(0.1), 0.5, momentum="none", damping=0.0)
    some, _ = step(tx, eigenpairs(values, V, [True, False, True, False]), g)
    fewer, _ = step(tx, eigenpairs(values[[0, 2]], V[[0, 2]]), g)
    np.testing.assert_allclose(some, fewer, atol=1e-6)
    np.testing.assert_allclose(V[[1, 3]] @ some, -0.1 * V[[1, 3]] @ g, atol=1e-6)
    np.testing.assert_allclose(V[[0, 2]] @ some, -0.5 * V[[0, 2]] @ g / values[[0, 2]], atol=1e-6)


def test_a_pair_of_zero_curvature_is_left_to_the_base():
    V, g = orthonormal(3), normal(2)
    for values in ([2.0, 1.0, 0.0], [2.0, 1.0, 1e-8]):
        for damping in (0.0, 1e-3):
            tx = optim.fosi(optax.sgd(0.1), 1.0, momentum="none", damping=damping, learning_rate_clip=5.0)
            update, _ = step(tx, eigenpairs(values, V), g)
            np.testing.assert_allclose(V[:2] @ update, -(V[:2] @ g) / [2.0, 1.0], atol=1e-6)
            np.testing.assert_allclose(V[2] @ update, -2 * 0.1 * V[2] @ g, atol=1e-6)  # s = 2/1: zero does not count
    update, _ = step(optim.fosi(optax.sgd(0.1), damping=0.0), eigenpairs(np.zeros(3), V), g)
    np.testing.assert_array_equal(update, flat(tree(np.float32(-0.1) * g.astype(np.float32))))


def test_negative_curvature_is_descended():
    """From a saddle's slope, a step along the direction of negative curvature goes down by 1 / |lambda|."""
    V = orthonormal(2)
    H = 2.0 * np.outer(V[0], V[0]) - 4.0 * np.outer(V[1], V[1])
    x = normal(3)
    tx = optim.fosi(optax.sgd(0.1), 1.0, momentum="none")
    update, _ = step(tx, eigenpairs([2.0, -4.0], V), H @ x)
    np.testing.assert_allclose(V @ update, [-V[0] @ x, V[1] @ x], atol=1e-6)  # to the saddle, and away from it
    value = lambda x: 0.5 * x @ H @ x
    assert value(x + update) < value(x) - 0.5 * abs(V[1] @ H @ x) * abs(V[1] @ x)


def test_damping_bounds_the_inverse_by_the_largest_magnitude():
    V, values, g = orthonormal(4), np.array([1.0, 0.5, 1e-3, -10.0]), normal(4)
    for delta in (0.0, 0.01, 0.2, 2.0):
        tx = optim.fosi(optax.sgd(0.0), 1.0, momentum="none", damping=delta)
        update, _ = step(tx, eigenpairs(values, V), g)
        d = 1 / np.maximum(np.abs(values), delta * 10.0)
        np.testing.assert_allclose(V @ update, -d * (V @ g), rtol=1e-5, atol=1e-5)  # the step's size is 200
    # the largest is that of the used pairs
    tx = optim.fosi(optax.sgd(0.0), 1.0, momentum="none", damping=0.2)
    update, _ = step(tx, eigenpairs(values, V, [True, True, True, False]), g)
    np.testing.assert_allclose(V[:3] @ update, -(V[:3] @ g) / [1.0, 0.5, 0.2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "converged", "l", "clip", "s"),
    [
        ([8.0, 4.0, 2.0], [1, 1, 1], 0, 1.0, 1.0),
        ([8.0, 4.0, 2.0], [1, 1, 1], 0, 3.0, 3.0),
        ([8.0, 4.0, 2.0], [1, 1, 1], 0, 9.0, 4.0),  # lambda_max / lambda_k
        ([8.0, 4.0, 0.1], [1, 1, 1], 1, 9.0, 2.0),  # a smallest pair is not lambda_k
        ([8.0, 0.1, 0.2], [1, 1, 1], 2, 9.0, 1.0),
        ([8.0, 0.1, 0.2], [1, 1, 1], 3, 9.0, 1.0),  # no largest pairs at all
        ([8.0, 4.0, 2.0], [1, 1, 0], 0, 9.0, 2.0),  # 2 is left to the base, and smaller than lambda_k
        ([8.0, 4.0, 2.0], [1, 0, 1], 0, 9.0, 2.0),  # 4 is left to the base, whose rate may grow by 8 / 4, not 8 / 2
        ([8.0, 4.0, 2.0], [0, 1, 1], 0, 9.0, 1.0),  # 8 is left to the base, whose rate is tuned for it
        ([8.0, 4.0, 2.0], [0, 0, 0], 0, 9.0, 1.0),
        ([-8.0, 4.0, 2.0], [1, 1, 1], 0, 9.0, 4.0),  # select="magnitude"
    ],
)
def test_multiplier_of_the_base(values, converged, l, clip, s):
    V, g = orthonormal(3), normal(5)
    pairs = eigenpairs(values, V, np.array(converged, bool))
    update, _ = step(optim.fosi(optax.sgd(0.1), 0.0, momentum="none", learning_rate_clip=clip, l=l), pairs, g)
    used = V[np.array(converged, bool)]
    np.testing.assert_allclose(update, -s * 0.1 * (g - used.T @ (used @ g)), atol=1e-6)


def test_scaled_base_is_stable_when_the_largest_pair_has_not_converged():
    """GD at 1.9 / lambda_max: three times that rate on the pair that FOSI leaves to it would diverge."""
    Q, x0 = quadratic(0)
    values, V = extreme_eigenpairs(Q, 10)
    pairs = eigenpairs(values, V, np.arange(10) > 0)
    iterates, _ = drive(optim.fosi(optax.sgd(1.9), momentum="none", learning_rate_clip=3.0), x0, Q, lambda i: pairs, 50)
    assert np.linalg.norm(iterates[-1]) < np.linalg.norm(x0)


# ---------------------------------------------------------------------------------------------------------- options


def test_alpha_is_a_number_a_schedule_or_a_hyperparameter():
    V, values, g = orthonormal(2), np.array([2.0, 1.0]), normal(6)
    pairs = eigenpairs(values, V)
    newton = lambda update: (V @ update) / (-(V @ g) / values)
    tx = optim.fosi(optax.sgd(0.1), optax.piecewise_constant_schedule(1.0, {2: 0.1}), momentum="none")
    state = None
    for rate in (1.0, 1.0, 0.1):
        update, state = step(tx, pairs, g, state=state)
        np.testing.assert_allclose(newton(update), rate, rtol=1e-5)

    tx = optax.inject_hyperparams(optim.fosi)(optax.sgd(0.1), alpha=0.7, momentum="none")
    update, state = step(tx, pairs, g)
    np.testing.assert_allclose(newton(update), 0.7, rtol=1e-5)
    state.hyperparams["alpha"] = jnp.float32(0.2)
    np.testing.assert_allclose(newton(step(tx, pairs, g, state=state)[0]), 0.2, rtol=1e-5)


def test_every_number_may_be_traced():
    """With a smallest pair, whose number `l` sets no shapes."""
    pairs, g = eigenpairs([8.0, 4.0, 0.1], orthonormal(3)), normal(6)
    options = dict(alpha=0.7, decay=0.8, damping=0.01, learning_rate_clip=3.0, l=1)

    @jax.jit
    def traced(options):
        tx = optim.fosi(optax.sgd(0.1), **options)
        params = tree(np.ones(N))
        return tx.update(tree(g), tx.init(params), params, curvature=pairs)[0]

    expected, _ = step(optim.fosi(optax.sgd(0.1), **options), pairs, g)
    np.testing.assert_allclose(flat(traced(options)), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"fosi\(damping\) should be at least 0"):
        optim.fosi(optax.sgd(0.1), damping=jnp.float32(-1.0))


def test_parameters_of_size_zero():
    V = orthonormal(3)
    vectors = tree(V) | {"none": jnp.zeros((3, 0, 2))}
    pairs, params = eigenpairs([4.0, 2.0, 1.0], vectors), tree(np.ones(N)) | {"none": jnp.zeros((0, 2))}
    tx = optim.fosi(optax.adam(0.1))
    updates, _ = tx.update(params, tx.init(params), params, curvature=pairs)
    assert updates["none"].shape == (0, 2)
    expected, _ = step(tx, eigenpairs([4.0, 2.0, 1.0], V), np.ones(N))
    np.testing.assert_allclose(flat({name: updates[name] for name in "ab"}), expected, atol=1e-6)


def test_many_small_leaves_share_their_products():
    """Five products with V for each of two large leaves, and five for all small ones together."""
    sizes = {"large": (3, 80, 80), "other": (3, 80, 80)}

    def products(small):
        shapes = sizes | {f"{i}": (3, 8, 8) for i in range(small)}
        pairs = eigenpairs([4.0, 2.0, 1.0], {name: jnp.ones(shape) for name, shape in shapes.items()})
        params = jax.tree.map(lambda v: v[0], pairs.vectors)
        tx = optim.fosi(optax.sgd(0.1))
        update = jax.jit(lambda g, s, p, c: tx.update(g, s, p, curvature=c))
        return update.lower(params, tx.init(params), params, pairs).as_text().count("dot_general")

    assert products(50) == products(5) == 5 * 3


def test_momentum_may_be_a_function():
    V, values, g = orthonormal(2), np.array([2.0, 1.0]), normal(7)
    pairs = eigenpairs(values, V)
    named, same = (
        optim.fosi(optax.sgd(0.1), momentum=m, decay=0.7) for m in ("heavy_ball", lambda g1, vel: g1 + 0.7 * vel)
    )
    states = None, None
    for _ in range(3):
        (a, first), (b, second) = step(named, pairs, g, state=states[0]), step(same, pairs, g, state=states[1])
        np.testing.assert_array_equal(a, b)
        states = first, second


@pytest.mark.parametrize("accumulator", [jnp.float32, jnp.bfloat16])
def test_bfloat16_parameters_keep_their_dtype(accumulator):
    V, values, g = orthonormal(3), np.array([4.0, 2.0, 1.0]), normal(8)
    low = lambda t: jax.tree.map(lambda a: a.astype(jnp.bfloat16), t)
    g = flat(low(tree(g)))  # representable, so that the reference is given the same gradients
    params = low(tree(np.ones(N)))
    tx = optim.fosi(optax.sgd(0.1, momentum=0.9), 0.5, accumulator_dtype=accumulator)
    reference = optim.fosi(optax.sgd(0.1, momentum=0.9), 0.5)
    state, exact_state = tx.init(params), None
    with jax.numpy_dtype_promotion("strict"):
        for _ in range(3):
            updates, state = tx.update(low(tree(g)), state, params, curvature=eigenpairs(values, V))
            assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
            assert {v.dtype for v in jax.tree.leaves(state.velocity)} == {jnp.dtype(accumulator)}
    for _ in range(3):
        exact, exact_state = step(reference, eigenpairs(values, V), g, state=exact_state)
    # bfloat16 rounds by 2^-9; measured error, relative to the largest update: 3.5e-3 with either accumulator
    assert np.abs(flat(updates) - exact).max() < 1e-2 * np.abs(exact).max()


def test_weight_decay_of_the_base_acts_outside_of_the_span():
    V, values = orthonormal(3), np.array([4.0, 2.0, 1.0])
    x = normal(9)
    tx = optim.fosi(optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1)), learning_rate_clip=1.0)
    update, _ = step(tx, eigenpairs(values, V), np.zeros(N), params=tree(x))
    np.testing.assert_allclose(update, -0.05 * (x - V.T @ (V @ x)), atol=1e-6)


# ----------------------------------------------------------------------------------- the base sees the parameter tree

SGD, ADAM_BASE = optax.sgd(0.1), optax.adam(0.05)


def only_a(x):
    return {"a": x["a"], "b": jnp.zeros_like(x["b"])}


@pytest.mark.parametrize(
    ("base", "by_leaf"),
    [
        (
            optax.partition({"x": SGD, "y": ADAM_BASE}, {"a": "x", "b": "y"}),
            {"a": lambda g: -0.1 * g, "b": lambda g: adam(0.05)(g)},
        ),
        (
            optax.masked(optax.scale(-0.3), {"a": True, "b": False}),
            {"a": lambda g: -0.3 * g, "b": lambda g: g},  # optax passes what it masks
        ),
        (
            optax.adamw(0.05, weight_decay=0.5, mask={"a": True, "b": False}),
            {"a": lambda g: adam(0.05)(g) - 0.05 * 0.5, "b": lambda g: adam(0.05)(g)},  # parameters are ones
        ),
        (
            optax.chain(optax.scale_by_trust_ratio(), optax.scale(-1.0)),
            {name: lambda g: -g * np.sqrt(g.size) / np.linalg.norm(g) for name in "ab"},
        ),
    ],
    ids=["partition", "masked", "adamw(mask)", "per-leaf norms"],
)
def test_rules_by_leaf(base, by_leaf):
    V, values, g = orthonormal(3), np.array([4.0, 2.0, 1.0]), normal(10)
    update, _ = step(optim.fosi(base, 0.5, momentum="none"), eigenpairs(values, V), g)
    g2 = tree(g - V.T @ (V @ g))
    u = np.concatenate([by_leaf[name](np.asarray(g2[name], np.float64)).ravel() for name in "ab"])
    expected = u - V.T @ (V @ u) - 0.5 * V.T @ (V @ g / values)
    np.testing.assert_allclose(update, expected, atol=2e-5)  # measured 1e-6 at most; adam of a small g2 is the worst


# ------------------------------------------------------------------------------------------------- a citizen of optax


@pytest.fixture
def pairs():
    return eigenpairs([4.0, 2.0, 1.0], orthonormal(3))


def test_chains_with_clipping(pairs):
    g = 10 * normal(11)
    inner = optim.fosi(optax.adam(0.1))
    chained, _ = step(optax.chain(optax.clip_by_global_norm(1.0), inner), pairs, g)
    clipped, _ = step(inner, pairs, g / np.linalg.norm(g))
    np.testing.assert_allclose(chained, clipped, atol=1e-5)
    after, _ = step(optax.chain(inner, optax.clip(1e-3)), pairs, g)
    np.testing.assert_allclose(after, np.clip(step(inner, pairs, g)[0], -1e-3, 1e-3), atol=1e-9)


def test_extra_arguments_reach_the_base_and_unknown_ones_are_ignored(pairs):
    g = normal(12)
    plain, _ = step(optim.fosi(optax.sgd(0.1)), pairs, g)
    ignored, _ = step(optim.fosi(optax.sgd(0.1)), pairs, g, objective=OBJECTIVE, batch=None, key=None, surprise=1)
    np.testing.assert_array_equal(plain, ignored)

    V = np.asarray(flat_rows(pairs))
    g2 = g - V.T @ (V @ g)
    update, _ = step(optim.fosi(optax.polyak_sgd(max_learning_rate=1e9), 0.0), pairs, g, value=3.0)
    np.testing.assert_allclose(update, -3.0 / (g2 @ g2) * g2, rtol=1e-4, atol=1e-6)
    with pytest.raises(TypeError, match="value"):
        step(optim.fosi(optax.polyak_sgd()), pairs, g)


def test_a_line_search_as_base_is_not_given_the_curvature(pairs):
    """optax's line searches raise on an extra argument that `value_fn` does not take."""
    Q, x0 = quadratic(0)
    params, Q = tree(x0), jnp.asarray(Q, jnp.float32)
    value_fn = lambda p: loss(p, Q)
    value, grad = jax.value_and_grad(value_fn)(params)
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=8)
    tx = optim.fosi(optax.chain(optax.sgd(1.0), search))
    arguments = dict(curvature=pairs, value=value, grad=grad, value_fn=value_fn)
    updates, _ = tx.update(grad, tx.init(params), params, **arguments)
    assert value_fn(jax.tree.map(jnp.add, params, updates)) < value


def flat_rows(pairs):
    return np.concatenate([np.asarray(v, np.float64).reshape(v.shape[0], -1) for v in pairs.vectors.values()], axis=1)


def test_traced_once_and_the_same_in_jit(pairs):
    tx, traces = optim.fosi(optax.adam(0.1), optax.constant_schedule(0.1), learning_rate_clip=3.0), 0
    params = tree(np.ones(N))
    empty = Lanczos(k=3).init(None, params)

    @jax.jit
    def update(grads, state, params, curvature):
        nonlocal traces
        traces += 1
        return tx.update(grads, state, params, curvature=curvature)

    state, eager = tx.init(params), tx.init(params)
    for i, curvature in enumerate([empty, pairs, pairs, pairs]):
        g = tree(normal(i))
        inside, state = update(g, state, params, curvature)
        outside, eager = tx.update(g, eager, params, curvature=curvature)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), inside, outside)
    assert traces == 1


def test_state_is_like_the_parameters_and_abstract_in_eval_shape(pairs):
    tx, params = optim.fosi(optax.adam(0.1)), tree(np.ones(N))
    state, abstract = tx.init(params), jax.eval_shape(tx.init, params)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    jax.tree.map(lambda a, s: np.testing.assert_equal((a.shape, a.dtype), (s.shape, s.dtype)), state, abstract)
    _, after = step(tx, pairs, normal(0), state=state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    jax.tree.map(lambda a, s: np.testing.assert_equal((a.shape, a.dtype), (s.shape, s.dtype)), after, abstract)

    # what optax takes for parameter-like is what has the parameters' structure: moments and velocity
    marked = optax.tree_utils.tree_map_params(
        tx, lambda leaf: "parameter", state, transform_non_params=lambda _: "other"
    )
    like = {"a": "parameter", "b": "parameter"}
    assert marked.velocity == like and marked.count == "other"
    assert (marked.base[0].mu, marked.base[0].nu, marked.base[0].count) == (like, like, "other")


def test_inside_multi_steps(pairs):
    inner = optim.fosi(optax.adam(0.1))
    tx, params = optax.MultiSteps(inner, every_k_schedule=2), tree(np.ones(N))
    first, state = tx.update(tree(normal(1)), tx.init(params), params, curvature=pairs)
    np.testing.assert_array_equal(flat(first), 0)
    second, state = tx.update(tree(normal(2)), state, params, curvature=pairs)
    expected, inner_state = step(inner, pairs, (normal(1) + normal(2)) / 2)
    np.testing.assert_allclose(flat(second), expected, atol=1e-6)
    assert state.inner_opt_state.count == inner_state.count == 1
    # and the other way round: a base that accumulates
    base = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2)
    update, _ = step(optim.fosi(base, 0.5, momentum="none"), pairs, normal(1))
    V = flat_rows(pairs)
    np.testing.assert_allclose(update, -0.5 * V.T @ (V @ normal(1) / [4.0, 2.0, 1.0]), atol=1e-6)


def test_inside_apply_if_finite(pairs):
    inner = optim.fosi(optax.adam(0.1))
    tx = optax.apply_if_finite(inner, max_consecutive_errors=3)
    _, state = step(tx, pairs, normal(1))
    bad, skipped = step(tx, pairs, np.full(N, np.nan), state=state)
    np.testing.assert_array_equal(bad, 0)
    jax.tree.map(np.testing.assert_array_equal, skipped.inner_state, state.inner_state)
    assert skipped.total_notfinite == 1
    after, _ = step(tx, pairs, normal(2), state=skipped)
    expected, _ = step(inner, pairs, normal(2), state=state.inner_state)
    np.testing.assert_allclose(after, expected, atol=1e-7)  # compiled inside a cond, and not


def test_sharded_parameters_stay_where_they_are():
    """Parameters and eigenvectors over 8 devices: the step only adds up scalars."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    put = lambda t, *spec: jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec))), t)
    x, g, rows = (np.random.default_rng(i).normal(size=s) for i, s in enumerate([(64, 4), (64, 4), (3, 64, 4)]))
    rows = np.linalg.qr(rows.reshape(3, -1).T)[0].T.reshape(rows.shape)
    params, grads, vectors = ({"w": jnp.asarray(a, jnp.float32)} for a in (x, g, rows))
    tx = optim.fosi(optax.adam(0.1), learning_rate_clip=2.0)
    update = jax.jit(lambda g, s, p, c: tx.update(g, s, p, curvature=c))
    single, _ = update(grads, tx.init(params), params, eigenpairs([4.0, 2.0, 1.0], vectors))

    params, grads, vectors = put(params, "data"), put(grads, "data"), put(vectors, None, "data")
    arguments = grads, tx.init(params), params, eigenpairs([4.0, 2.0, 1.0], vectors)
    compiled = update.lower(*arguments).compile()
    assert "all-gather" not in compiled.as_text() and "all-reduce" in compiled.as_text()
    spread, state = compiled(*arguments)
    assert spread["w"].sharding.spec == state.velocity["w"].sharding.spec == PartitionSpec("data")
    np.testing.assert_allclose(spread["w"], single["w"], atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ errors


def test_a_missing_or_wrong_curvature_says_what_to_do():
    tx, params = optim.fosi(optax.sgd(0.1)), tree(np.ones(N))
    state = tx.init(params)
    with pytest.raises(TypeError, match=r"there is none\. Pass curvature=Eigenpairs .*self_contained\(fosi"):
        tx.update(params, state, params)
    with pytest.raises(TypeError, match=r"curvature=\) should be Eigenpairs, not ArrayImpl.*curvature\.Lanczos\(k\)"):
        tx.update(params, state, params, curvature=jnp.ones(3))


def test_missing_parameters(pairs):
    tx, params = optim.fosi(optax.sgd(0.1)), tree(np.ones(N))
    with pytest.raises(ValueError, match=r"update\(grads, state, params\)"):
        tx.update(params, tx.init(params), curvature=pairs)


def test_curvature_of_another_model(pairs):
    tx, params = optim.fosi(optax.sgd(0.1)), tree(np.ones(N))
    masked = optax.masked(tx, {"a": True, "b": False})
    with pytest.raises(ValueError, match=r"fosi is given a but not b, which Eigenpairs mixes with it"):
        masked.update(params, masked.init(params), params, curvature=pairs)
    wider = {"a": jnp.ones((5, 17)), "b": jnp.ones(20)}
    with pytest.raises(ValueError, match=r"\(5, 17\).*\(5, 16\).*another model"):
        tx.update(wider, tx.init(wider), wider, curvature=pairs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(momentum="heavyball"), ValueError, r"fosi\(momentum\).*Did you mean 'heavy_ball'\?"),
        (dict(decay=1.0), ValueError, r"fosi\(decay\) should be at least 0.0 and below 1.0, not 1.0"),
        (dict(decay=-0.1), ValueError, r"fosi\(decay\)"),
        (dict(decay="0.9"), TypeError, r"fosi\(decay\) should be a number"),
        (dict(alpha=-1.0), ValueError, r"fosi\(alpha\)"),
        (dict(alpha="0.1"), TypeError, r"fosi\(alpha\) should be a number"),
        (dict(damping=-1e-3), ValueError, r"fosi\(damping\)"),
        (dict(learning_rate_clip=0.5), ValueError, r"fosi\(learning_rate_clip\) should be at least 1.0"),
        (dict(l=-1), ValueError, r"fosi\(l\)"),
        (dict(l=1.0), TypeError, r"fosi\(l\) should be an integer"),
    ],
)
def test_options_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        optim.fosi(optax.sgd(0.1), **options)


@pytest.mark.parametrize("base", [optax.adam, 1e-3, None])
def test_base_is_not_a_transformation(base):
    with pytest.raises(TypeError, match=r"fosi\(base\) should be an optax transformation, not (function|float|None)"):
        optim.fosi(base)


# --------------------------------------------------------------------------------------------- the reference, checked


def test_the_reference_by_itself():
    """FOSI with the whole spectrum is Newton's method, and without any of it its base, numpy's base being optax's."""
    Q, x0 = quadratic(2)
    exact = extreme_eigenpairs(Q, N)
    newton = Replay(gd(1.0), "none", alpha=1.0).run(lambda x: Q @ x, x0, 1, lambda _: exact)
    assert np.abs(newton).max() < 1e-9
    np.testing.assert_allclose(exact[0], SPECTRUM, rtol=1e-3)  # Q is rounded to float32
    for in_optax, in_numpy, tolerance in BASES.values():
        base = optax.with_extra_args_support(in_optax())
        theirs, _ = drive(base, x0, Q, lambda _: None, 30)
        ours = Replay(in_numpy(), "none").run(lambda x: Q @ x, x0, 30, lambda _: None)
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=tolerance * np.linalg.norm(x0))
