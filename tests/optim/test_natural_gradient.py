"""Natural gradient against its stages in numpy, in float64, one leaf at a time, and as a citizen of optax."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from curvtrain import CurvatureSchedule, Objective, optim
from curvtrain.curvature import Curvature, Diagonal, DiagonalFisher, FullBlock
from curvtrain.curvature.request import requested_damping, requests
from tests.trainer import tiny

SHAPES = {"bias": (4,), "kernel": (3, 4), "small": (2, 3)}  # in the order of the flat vector
N, STEPS = 22, 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense(Curvature):
    """Any symmetric matrix."""

    matrix: jax.Array

    def matvec(self, vector):
        return self._apply(lambda v: self.matrix @ v, vector)

    def solve(self, vector, damping):
        return self._apply(lambda v: jnp.linalg.solve(self.matrix + damping * jnp.eye(N), v), vector)

    def as_matrix(self):
        return self.matrix

    def _apply(self, function, vector):
        v, unravel = ravel_pytree(vector)
        return unravel(function(v))


def split(x):
    """A flat vector as float64 leaves."""
    ends = np.cumsum([np.prod(shape) for shape in SHAPES.values()])[:-1]
    return {
        k: part.reshape(SHAPES[k]) for k, part in zip(SHAPES, np.split(np.asarray(x, np.float64), ends), strict=True)
    }


def tree(x):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), split(x))


def flat(leaves):
    return np.concatenate([np.ravel(np.asarray(leaves[k], np.float64)) for k in SHAPES])


def problem():
    """(Hessian and target of a quadratic, the first iterate, the curvature of every step)."""
    rng = np.random.default_rng(0)
    root = lambda: rng.normal(size=(N, N)) / np.sqrt(N)
    H, A, B = (R @ R.T + 0.1 * np.eye(N) for R in (root(), root(), root()))
    w = split(rng.normal(size=N))
    w["small"] *= 2e-3  # a norm below 1e-2, until it has moved
    return H, rng.normal(size=N), flat(w), [A + t / 4 * B for t in range(STEPS)]


H, TARGET, START, MATRICES = problem()
PARAMS, GRADS = tree(START), tree(H @ (START - TARGET))
CURVATURE = Dense(jnp.asarray(MATRICES[0], jnp.float32))
MASK = {"bias": False, "kernel": True, "small": True}

# -- the stages --------------------------------------------------------------------------------------------------------


def replay(
    learning_rate,
    damping=1e-3,
    momentum=0.0,
    momentum_type="preconditioned",
    momentum_correction=False,
    gradient_decay=0.0,
    gradient_decay_type="raw",
    l2=0.0,
    weight_decay=0.0,
    lars=False,
    lars_type="preconditioned",
    rescale=None,
    mask=None,
):
    """The iterates of every step."""
    at = lambda option, t: float(option(t)) if callable(option) else option
    mask = mask(split(START)) if callable(mask) else mask
    norm = lambda a: np.sqrt((a * a).sum())
    w, past, buffer, seen = START, [], np.zeros(N), []
    for t in range(STEPS):
        g = H @ (w - TARGET)
        for kind in ("raw", "preconditioned"):
            if kind == "raw":
                g = g + l2 * w
            else:
                g = np.linalg.inv(MATRICES[t] + (at(damping, t) + l2) * np.eye(N)) @ g
                decayed = flat({k: np.full(s, mask is None or mask[k]) for k, s in SHAPES.items()})
                g = g + weight_decay * decayed * w
            if momentum_type == kind:
                m = at(momentum, t)
                if momentum_correction:
                    m = m / at(learning_rate, 0) * at(learning_rate, t)
                buffer = m * buffer + g
                g = buffer
            if gradient_decay_type == kind:  # the weighted mean of all gradients so far
                past.append(g)
                weights = gradient_decay ** np.arange(t, -1.0, -1.0)
                g = weights @ np.array(past) / weights.sum()
            if lars and lars_type == kind:
                of, gs = split(w), split(g)
                g = flat({k: gs[k] * (norm(of[k]) / (norm(gs[k]) + 1e-9) if norm(of[k]) > 1e-2 else 1) for k in SHAPES})
        w = w - at(learning_rate, t) * g
        if rescale is not None:
            leaves = split(w)
            for k in ("kernel", "small"):
                target = np.sqrt(2 * SHAPES[k][-1]) if rescale == "fan_out" else rescale
                leaves[k] = leaves[k] * target / norm(leaves[k])
            w = flat(leaves)
        seen.append(w)
    return np.array(seen)


def run(options):
    """The iterates of every step, and the last state."""
    tx = optim.natural_gradient(**options)

    @jax.jit
    def step(params, state, curvature):
        grads = tree_gradient(params)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    params, seen = PARAMS, []
    state = tx.init(params)
    for matrix in MATRICES:
        params, state = step(params, state, Dense(jnp.asarray(matrix, jnp.float32)))
        seen.append(flat(params))
    return np.array(seen), state


def tree_gradient(params):
    x, unravel = ravel_pytree(params)
    return unravel(jnp.asarray(H, jnp.float32) @ (x - jnp.asarray(TARGET, jnp.float32)))


RATE = lambda t: 0.2 * 0.8**t
RUNS = {
    "plain": dict(damping=0.1),
    "all raw": dict(
        damping=0.1, l2=0.05, momentum=0.9, momentum_type="raw", gradient_decay=0.5, lars=True, lars_type="raw"
    ),
    "all preconditioned": dict(
        damping=0.1,
        weight_decay=0.1,
        mask=MASK,
        momentum=0.9,
        gradient_decay=0.5,
        gradient_decay_type="preconditioned",
        lars=True,
    ),
    "momentum raw, average preconditioned": dict(
        l2=0.1, momentum=0.5, momentum_type="raw", gradient_decay=0.7, gradient_decay_type="preconditioned"
    ),
    "momentum preconditioned, average raw": dict(l2=0.1, momentum=0.5, gradient_decay=0.7, lars=True, lars_type="raw"),
    "scheduled": dict(
        learning_rate=RATE, damping=lambda t: 0.5 * 0.7**t, momentum=lambda t: 1 - 1 / (2.0 + t), weight_decay=0.05
    ),
    "momentum correction": dict(learning_rate=RATE, damping=0.1, momentum=0.9, momentum_correction=True),
    "scheduled momentum, corrected": dict(
        learning_rate=RATE,
        damping=0.1,
        momentum=lambda t: 1 - 1 / (2.0 + t),
        momentum_type="raw",
        momentum_correction=True,
    ),
    "fan_out": dict(damping=0.1, rescale="fan_out", lars=True, momentum=0.9),
    "a norm": dict(damping=0.1, rescale=3.0, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda a: a.ndim < 2, p)),
}


@pytest.mark.parametrize("name", RUNS)
def test_iterates_are_those_of_the_stages(name):
    options = dict(learning_rate=0.1) | RUNS[name]
    expected = replay(**options)
    ours, state = run(options)
    size = np.linalg.norm(expected, axis=1).max()
    assert np.linalg.norm(ours - expected, axis=1).max() < 2e-5 * size
    assert state.count == STEPS
    # not for want of a difference: without any one of the options, the iterates are far from these
    for left_out in RUNS[name]:
        rest = {k: v for k, v in options.items() if k != left_out} | dict(learning_rate=options["learning_rate"])
        rest["learning_rate"] = 0.1 if left_out == "learning_rate" else rest["learning_rate"]
        assert np.linalg.norm(replay(**rest) - expected, axis=1).max() > 1e-3 * size, left_out


def test_a_diagonal_in_closed_form():
    """Two steps by hand."""
    tx = optim.natural_gradient(0.5, 0.25, momentum=0.5, l2=0.25)
    params, grads = {"x": jnp.array([2.0, -4.0])}, {"x": jnp.array([1.0, 3.0])}
    curvature = Diagonal({"x": jnp.array([0.5, 1.5])})
    first, state = tx.update(grads, tx.init(params), params, curvature=curvature)
    np.testing.assert_allclose(first["x"], [-0.75, -0.5])  # g + l2 w = (1.5, 2), over C + damping + l2 = (1, 2)
    second, _ = tx.update(grads, state, params, curvature=curvature)
    np.testing.assert_allclose(second["x"], [-1.125, -0.75])  # half of the first once more


def test_momentum_and_average_cost_nothing_when_they_are_not_used():
    state = optim.natural_gradient(0.1).init(PARAMS)
    assert len(jax.tree.leaves(state)) == 3
    state = optim.natural_gradient(0.1, momentum=lambda t: 0.9, gradient_decay=0.9).init(PARAMS)
    assert len(jax.tree.leaves(state)) == 3 + 2 * len(SHAPES)


# -- norms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rescale", "norms"), [("fan_out", (8**0.5, 6**0.5)), (2, (2, 2)), (0.5, (0.5, 0.5))])
def test_rescaled_norms(rescale, norms):
    tx = optim.natural_gradient(0.1, rescale=rescale)
    plain = optim.natural_gradient(0.1)
    moved, free = (
        optax.apply_updates(PARAMS, t.update(GRADS, t.init(PARAMS), PARAMS, curvature=CURVATURE)[0])
        for t in (tx, plain)
    )
    for key, norm in zip(("kernel", "small"), norms, strict=True):
        np.testing.assert_allclose(np.linalg.norm(moved[key]), norm, rtol=1e-6)
        np.testing.assert_allclose(moved[key] / norm, free[key] / np.linalg.norm(free[key]), atol=1e-6)
    np.testing.assert_array_equal(moved["bias"], free["bias"])


def test_zeros_are_neither_rescaled_nor_divided_by():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    tx = optim.natural_gradient(0.1, rescale="fan_out", lars=True)
    updates, _ = tx.update(zeros, tx.init(zeros), zeros, curvature=CURVATURE)
    np.testing.assert_array_equal(flat(updates), 0)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS, curvature=CURVATURE)  # LARS of a gradient that is zero
    np.testing.assert_array_equal(updates["bias"], 0)
    assert np.all(np.isfinite(flat(updates)))


def test_lars_moves_leaves_by_their_norms():
    tx = optim.natural_gradient(0.1, lars=True)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, curvature=CURVATURE)
    norm = lambda leaf: float(jnp.linalg.norm(leaf))
    for key in ("bias", "kernel"):
        np.testing.assert_allclose(norm(updates[key]), 0.1 * norm(PARAMS[key]), rtol=1e-5)
    assert norm(updates["small"]) > norm(PARAMS["small"])  # below 1e-2, it is free to grow


# -- as a citizen of optax ---------------------------------------------------------------------------------------------


def test_updates_keep_their_dtype_and_the_state_its_own():
    low = functools.partial(jax.tree.map, lambda a: a.astype(jnp.bfloat16))
    tx = optim.natural_gradient(0.1, momentum=0.9, gradient_decay=0.5, weight_decay=0.1, rescale=1.0)
    updates, state = tx.update(low(GRADS), tx.init(low(PARAMS)), low(PARAMS), curvature=CURVATURE)
    assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))
    assert all(b.dtype == jnp.float32 for b in jax.tree.leaves((state.velocity, state.average)))


def test_inside_multi_steps():
    inner = optim.natural_gradient(0.1, momentum=0.5)
    tx = optax.MultiSteps(inner, every_k_schedule=2)
    state = tx.init(PARAMS)
    for factor in (0.5, 1.5):
        grads = jax.tree.map(lambda g, factor=factor: factor * g, GRADS)
        updates, state = tx.update(grads, state, PARAMS, curvature=CURVATURE)
    alone, _ = inner.update(GRADS, inner.init(PARAMS), PARAMS, curvature=CURVATURE)
    np.testing.assert_allclose(flat(updates), flat(alone), atol=1e-5)
    assert state.inner_opt_state.count == 1


def test_by_injected_hyperparameters():
    """The rate of step 0 is remembered in the state, as the transformation is made anew in every step."""
    make = functools.partial(optim.natural_gradient, damping=0.1, momentum_correction=True)
    static = ("momentum_correction", "gradient_decay", "l2", "weight_decay", "rescale", "damping")
    tx = optax.inject_hyperparams(make, static_args=static)(learning_rate=RATE, momentum=0.9)
    plain = make(RATE, momentum=0.9)
    ours, theirs = tx.init(PARAMS), plain.init(PARAMS)
    for _ in range(3):
        injected, ours = tx.update(GRADS, ours, PARAMS, curvature=CURVATURE)
        updates, theirs = plain.update(GRADS, theirs, PARAMS, curvature=CURVATURE)
        np.testing.assert_allclose(flat(injected), flat(updates), rtol=1e-5, atol=1e-6)


# -- with an estimator -------------------------------------------------------------------------------------------------


def test_damping_and_l2_are_announced_a_step_ahead():
    schedule = lambda count: 0.5 * 0.1**count
    tx = optim.natural_gradient(0.1, schedule, l2=0.25)
    state = tx.init(PARAMS)
    for count in range(3):
        hint = requested_damping(requests((optax.EmptyState(), state)))
        assert hint is not None and hint.dtype == jnp.float32
        np.testing.assert_allclose(hint, schedule(count) + 0.25, rtol=1e-6)
        _, state = tx.update(GRADS, state, PARAMS, curvature=CURVATURE)


def test_damping_reaches_refresh_through_self_contained():
    tx = optim.self_contained(
        optim.natural_gradient(0.1, lambda count: 1.0 / (1 + count), l2=0.5),
        tiny.Counting(),
        CurvatureSchedule(refresh_every=2),
        Objective.from_loss(lambda params, batch: 0.5 * jnp.sum(params["kernel"] ** 2)),
        batch={"x": jnp.zeros((4, 1))},
    )
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for count in range(5):
        _, state = update(GRADS, state, PARAMS)
        np.testing.assert_allclose(state.curvature.damping, 1.0 / (1 + count // 2 * 2) + 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        (FullBlock("exact"), dict(learning_rate=0.3, damping=0.1, momentum=0.5, l2=1e-3, momentum_type="raw")),
        (
            DiagonalFisher("empirical"),
            dict(
                learning_rate=RATE, damping=0.1, momentum=0.9, momentum_correction=True, lars=True, gradient_decay=0.5
            ),
        ),
    ],
    ids=["full block", "diagonal"],
)
def test_learns_in_a_trainer(estimator, options):
    schedule = CurvatureSchedule(update_every=1, refresh_every=2)
    tx = optim.natural_gradient(**options)
    trainer = tiny.trainer(
        optimizer=tx, curvature=estimator, schedule=schedule, steps=20, log_every=1, mesh={"fsdp": 8}, sharding="fsdp"
    )
    values = tiny.losses_of(trainer.fit())
    assert values[-4:].mean() < 0.6 * values[0]


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(learning_rate="adaptive"), TypeError, r"natural_gradient\(learning_rate\) should be a number, not 'ada"),
        (dict(learning_rate=-0.1), ValueError, r"natural_gradient\(learning_rate\) should be at least 0.0, not -0.1"),
        (dict(damping=-1.0), ValueError, r"natural_gradient\(damping\) should be at least 0.0, not -1.0"),
        (dict(momentum=1.0), ValueError, r"natural_gradient\(momentum\) should be at least 0.0 and below 1.0, not 1.0"),
        (dict(momentum=None), TypeError, r"natural_gradient\(momentum\) should be a number, not None"),
        (dict(momentum_type="Raw"), ValueError, r"natural_gradient\(momentum_type\).*Did you mean 'raw'\?"),
        (dict(gradient_decay=1.0), ValueError, r"natural_gradient\(gradient_decay\) .* below 1.0, not 1.0"),
        (dict(gradient_decay_type=None), ValueError, r"natural_gradient\(gradient_decay_type\) .* not None"),
        (dict(l2=-1.0), ValueError, r"natural_gradient\(l2\)"),
        (dict(weight_decay="0.1"), TypeError, r"natural_gradient\(weight_decay\) should be a number"),
        (dict(lars_type="preconditoned"), ValueError, r"natural_gradient\(lars_type\).*Did you mean 'preconditioned'"),
        (dict(rescale="fan_in"), ValueError, r"natural_gradient\(rescale\) should be one of 'fan_out', not 'fan_in'"),
        (dict(rescale=0.0), ValueError, r"natural_gradient\(rescale\) should be above 0.0, not 0.0"),
        (dict(rescale=True), TypeError, r"natural_gradient\(rescale\) should be a number, not True"),
        (dict(mask=MASK), ValueError, r"natural_gradient\(mask\) says what weight_decay is for"),
        (dict(mask="kernel", weight_decay=0.1), TypeError, r"natural_gradient\(mask\) .* booleans .*, not 'kernel'"),
        (
            dict(learning_rate=optax.linear_schedule(0.0, 0.1, 10), momentum=0.9, momentum_correction=True),
            ValueError,
            r"natural_gradient\(momentum_correction\) divides by the learning rate at step 0, which is 0.0",
        ),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        optim.natural_gradient(**dict(learning_rate=0.1) | options)


def test_what_an_update_needs():
    tx = optim.natural_gradient(0.1)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="natural_gradient needs the parameters"):
        tx.update(GRADS, state, curvature=CURVATURE)
    with pytest.raises(TypeError, match=r"natural_gradient.update\(\) needs a curvature.*curvature.KFAC\(\), or anoth"):
        tx.update(GRADS, state, PARAMS)
    with pytest.raises(TypeError, match=r"natural_gradient.update\(curvature=\) should be Curvature, not DiagonalFish"):
        tx.update(GRADS, state, PARAMS, curvature=DiagonalFisher())


@pytest.mark.parametrize("mask", [{"kernel": True}, lambda params: {"kernel": True}], ids=["tree", "function"])
def test_a_mask_of_other_parameters(mask):
    with pytest.raises(
        ValueError, match=r"natural_gradient\(mask\) should be like the parameters, .*'small'.*, not Py"
    ):
        optim.natural_gradient(0.1, weight_decay=0.1, mask=mask).init(PARAMS)
