"""A curvature as a link of a chain: the same numbers as its `solve` and `power`, and the damping that it announces."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from curvtrain import CurvatureSchedule, Objective, optim
from curvtrain.curvature import Diagonal, DiagonalFisher, Eigenpairs
from curvtrain.curvature.request import requested_damping, requests
from curvtrain.trainer import Call
from tests.trainer import tiny

PARAMS = {"a": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.1, -0.2])}
GRADS = jax.tree.map(lambda p: p + 1, PARAMS)
OBJECTIVE = Objective.from_loss(lambda params, batch: 0.5 * jnp.sum(params["a"] ** 2))
CURVATURE = Diagonal({"a": jnp.array([[4.0, 0.0], [1.0, 9.0]]), "b": jnp.array([2.0, 0.5])})
PAIRS = Eigenpairs(
    values=jnp.array([4.0]),
    vectors={"a": jnp.array([[[0.6, 0.0], [0.0, 0.8]]]), "b": jnp.zeros((1, 2))},
    residuals=jnp.zeros(1),
    converged=jnp.ones(1, bool),
    refreshes=jnp.int32(1),
    products=jnp.int32(1),
    failures=jnp.int32(0),
)


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


def once(tx, curvature=CURVATURE, **extra):
    return tx.update(GRADS, tx.init(PARAMS), PARAMS, curvature=curvature, **extra)[0]


@pytest.mark.parametrize("curvature", [CURVATURE, PAIRS], ids=["diagonal", "eigenpairs"])
@pytest.mark.parametrize("exponent", [-1, -1.0, -0.5, 0.5])
def test_is_the_power_of_the_dense_matrix(curvature, exponent):
    values, Q = np.linalg.eigh(np.asarray(curvature.as_matrix(), np.float64) + 0.1 * np.eye(6))
    expected = Q @ (values**exponent * (Q.T @ flat(GRADS)))
    ours = once(optim.scale_by_curvature(0.1, exponent), curvature)
    np.testing.assert_allclose(flat(ours), expected, rtol=1e-5, atol=1e-6)
    if exponent == -1:
        tiny.assert_trees_equal(ours, curvature.solve(GRADS, jnp.float32(0.1)))


def test_exponent_minus_one_is_solve_for_negative_curvature_too():
    """Other powers count a negative eigenvalue as zero; this one is Newton's."""
    saddle = dataclasses.replace(PAIRS, values=-PAIRS.values)
    tiny.assert_trees_equal(once(optim.scale_by_curvature(0.1), saddle), saddle.solve(GRADS, jnp.float32(0.1)))


def test_in_a_chain():
    """Natural gradient with momentum, weight decay and a rate; a chain passes by what nobody asks for."""
    chain = optax.chain(
        optim.scale_by_curvature(0.1), optax.trace(0.9), optax.add_decayed_weights(0.01), optax.scale(-0.5)
    )
    state, velocity = chain.init(PARAMS), 0.0
    for _ in range(3):
        updates, state = chain.update(GRADS, state, PARAMS, curvature=CURVATURE, value=1.0, anything=None)
        velocity = 0.9 * velocity + flat(GRADS) / (flat(CURVATURE.values) + 0.1)
        np.testing.assert_allclose(flat(updates), -0.5 * (velocity + 0.01 * flat(PARAMS)), rtol=1e-5)


def test_updates_keep_their_dtype():
    low = jax.tree.map(lambda g: g.astype(jnp.bfloat16), GRADS)
    tx = optim.scale_by_curvature(0.1)
    updates, _ = tx.update(low, tx.init(PARAMS), PARAMS, curvature=CURVATURE)
    assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))


def test_schedule_of_the_damping_is_announced_a_step_ahead():
    """The state holds what the next update will use: a refresh comes before it."""
    schedule = lambda count: 0.5 * 0.1**count
    tx = optim.scale_by_curvature(schedule)
    state, update = tx.init(PARAMS), jax.jit(functools.partial(tx.update, curvature=CURVATURE))
    for count in range(4):
        np.testing.assert_allclose(requested_damping(requests(optax.chain(optax.identity(), tx).init(PARAMS))), 0.5)
        np.testing.assert_allclose(requested_damping(requests((state, ()))), schedule(count), rtol=1e-6)
        updates, state = update(GRADS, state)
        expected = flat(GRADS) / (flat(CURVATURE.values) + schedule(count))
        np.testing.assert_allclose(flat(updates), expected, rtol=1e-5)
    assert state.count == 4


@pytest.mark.parametrize("damping", [0.3, lambda count: 1.0 / (1 + count)], ids=["number", "schedule"])
def test_damping_reaches_refresh_through_the_trainer(damping):
    seen = []
    note = Call(lambda run: seen.append(float(run.state.curvature.damping)))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optim.scale_by_curvature(damping), optax.sgd(0.1))
    schedule = CurvatureSchedule(refresh_every=2)
    tiny.trainer(optimizer=tx, curvature=tiny.Counting(), schedule=schedule, hooks=[note], steps=5).fit()
    at = (lambda count: damping) if damping == 0.3 else damping
    np.testing.assert_allclose(seen, [at(0), at(0), at(2), at(2), at(4)], rtol=1e-6)


def test_damping_reaches_refresh_through_self_contained():
    tx = optim.self_contained(
        optax.chain(optim.scale_by_curvature(lambda count: 1.0 / (1 + count)), optax.sgd(0.1)),
        tiny.Counting(),
        CurvatureSchedule(refresh_every=2),
        OBJECTIVE,
        batch={"x": jnp.zeros((4, 1))},
    )
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for count in range(5):
        _, state = update(GRADS, state, PARAMS)
        np.testing.assert_allclose(state.curvature.damping, 1.0 / (1 + count // 2 * 2), rtol=1e-6)


def test_learns_with_a_diagonal_fisher():
    tx = optax.chain(optim.scale_by_curvature(1e-2, -0.5), optax.sgd(0.3))
    trainer = tiny.trainer(optimizer=tx, curvature=DiagonalFisher("empirical"), steps=20, log_every=1)
    values = tiny.losses_of(trainer.fit())
    assert values[-4:].mean() < 0.6 * values[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(damping=-1.0), ValueError, r"scale_by_curvature\(damping\) should be at least 0.0, not -1.0"),
        (dict(damping="small"), TypeError, r"scale_by_curvature\(damping\) should be a number, not 'small'"),
        (dict(exponent="half"), TypeError, r"scale_by_curvature\(exponent\) should be a number, not 'half'"),
        (dict(exponent=True), TypeError, r"scale_by_curvature\(exponent\) should be a number, not True"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        optim.scale_by_curvature(**options)


def test_bad_curvatures():
    tx = optim.scale_by_curvature(0.1)
    with pytest.raises(TypeError, match=r"scale_by_curvature.update\(\) needs a curvature among its extra arguments"):
        once(tx, None)
    with pytest.raises(TypeError, match=r"scale_by_curvature.update\(curvature=\) should be Curvature, not DiagonalF"):
        once(tx, DiagonalFisher())
    counts = tiny.Counting().init(None, PARAMS)
    with pytest.raises(TypeError, match=r"Counts has no power -0.5 of \(C \+ damping I\): only -1, which is `solve`"):
        once(optim.scale_by_curvature(0.1, -0.5), counts)


def test_the_hint_is_the_field_of_the_state_not_an_injected_option():
    make = optax.inject_hyperparams(lambda damping: optim.scale_by_curvature(damping))
    state = make(damping=0.25).init(PARAMS)
    assert "damping" in state.hyperparams
    np.testing.assert_allclose(requested_damping(requests(state)), 0.25)
