"""An optimizer with its curvature inside: the schedule to the step, and every way in which data reaches it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from fosi_reference import DenseEigenpairs

from curvtrain import CurvatureSchedule, Objective, losses, optim
from curvtrain.curvature import Curvature, CurvatureEstimator, Lanczos


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Log(Curvature):
    """What a `Logger` saw: how often it was called, and with what the last time."""

    updates: jax.Array
    refreshes: jax.Array
    updates_before_refresh: jax.Array
    params: dict
    batch: jax.Array
    key: jax.Array

    def matvec(self, vector):
        return vector

    def solve(self, vector, damping):
        return vector

    def as_matrix(self):
        return jnp.eye(2)


@dataclasses.dataclass(frozen=True)
class Logger(CurvatureEstimator[Log]):
    def init(self, objective, params):
        zero = jnp.int32(0)
        return Log(zero, zero, zero, params, jnp.zeros(3), jax.random.key_data(jax.random.key(0)))

    def update(self, curvature, objective, params, batch, key, *, grads=None):
        return dataclasses.replace(curvature, updates=curvature.updates + 1)

    def refresh(self, curvature, objective, params, batch, key, damping=None):
        return dataclasses.replace(
            curvature,
            refreshes=curvature.refreshes + 1,
            updates_before_refresh=curvature.updates,
            params=params,
            batch=batch,
            key=jax.random.key_data(key),
        )

    def partition_specs(self, curvature, param_specs, mesh):
        return jax.tree.map(lambda _: jax.sharding.PartitionSpec(), curvature)


def loss_fn(params, batch):
    """½ sum b x²: the Hessian is diag(b)."""
    return 0.5 * jnp.sum(batch * params["x"] ** 2)


OBJECTIVE = Objective.from_loss(loss_fn)
PARAMS = {"x": jnp.array([1.0, -2.0, 3.0])}
BATCH = jnp.array([1.0, 4.0, 9.0])
ANNEALED = lambda step: jnp.where(step < 4, 1, 5)


# ------------------------------------------------------------------------------------------------------ the schedule


@pytest.mark.parametrize(
    "schedule",
    [
        CurvatureSchedule(update_every=1, refresh_every=3),
        CurvatureSchedule(update_every=2, refresh_every=5, start=3),
        CurvatureSchedule(update_every=4, refresh_every=1, start=1),
        CurvatureSchedule(update_every=ANNEALED, refresh_every=lambda step: 2 + step // 6, start=2),
        CurvatureSchedule(update_every=1, refresh_every=100, start=100),
    ],
    ids=["every 3", "start 3", "update less often", "annealed", "never"],
)
def test_schedule_is_kept_to_the_step(schedule):
    """As the host's `CurvatureSchedule.updates` and `.refreshes` say; an update comes before a refresh of its step."""
    tx = optim.self_contained(optax.sgd(0.1), Logger(), schedule, OBJECTIVE)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    updates = refreshes = 0
    for count in range(14):
        updates += schedule.updates(count)
        refreshes += schedule.refreshes(count)
        _, state = update(PARAMS, state, PARAMS, batch=BATCH)
        assert (state.curvature.updates, state.curvature.refreshes) == (updates, refreshes), f"step {count}"
        if schedule.refreshes(count):
            assert state.curvature.updates_before_refresh == updates
        assert state.count == count + 1


def test_lanczos_refreshes_on_schedule_and_fosi_uses_them_in_the_same_step():
    schedule = CurvatureSchedule(refresh_every=4, start=2)
    inner = optim.fosi(optax.sgd(0.01), 1.0, momentum="none")
    tx = optim.self_contained(inner, Lanczos(k=1), schedule, OBJECTIVE, batch=BATCH)
    params, state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
    seen = []
    for count in range(8):
        grads = jax.grad(loss_fn)(params, BATCH)
        updates, state = update(grads, state, params)
        seen.append(int(state.curvature.refreshes))
        # the third coordinate has the largest curvature: a full Newton step from the first refresh on
        step = -1.0 / 9.0 if count >= 2 else -0.01
        np.testing.assert_allclose(updates["x"][2], step * grads["x"][2], rtol=1e-4, atol=1e-6)
        params = optax.apply_updates(params, updates)
    assert seen == [0, 0, 1, 1, 1, 1, 2, 2]


def test_a_refresh_sees_the_parameters_before_they_move_the_batch_and_the_key_of_its_step():
    tx = optim.self_contained(optax.sgd(0.1), Logger(), CurvatureSchedule(refresh_every=2), OBJECTIVE, seed=7)
    params, state, keys = PARAMS, tx.init(PARAMS), set()
    for count in range(6):
        updates, state = tx.update(params, state, params, batch=BATCH + count)
        log = state.curvature
        if count % 2 == 0:
            np.testing.assert_array_equal(log.params["x"], params["x"])
            np.testing.assert_array_equal(log.batch, BATCH + count)
            expected = jax.random.fold_in(jax.random.key(7), count)
            np.testing.assert_array_equal(log.key, jax.random.key_data(expected))
            keys.add(tuple(log.key.tolist()))
        params = optax.apply_updates(params, updates)
    assert len(keys) == 3
    _, state = tx.update(params, state, params, batch=BATCH, key=jax.random.key(99))
    np.testing.assert_array_equal(state.curvature.key, jax.random.key_data(jax.random.key(99)))


# ------------------------------------------------------------------------------------------------ objective and batch


@pytest.mark.parametrize("objective_at", ["construction", "update"])
@pytest.mark.parametrize("batch_at", ["construction", "update"])
def test_objective_and_batch_at_construction_or_per_update(objective_at, batch_at):
    built = dict(objective=OBJECTIVE) if objective_at == "construction" else {}
    built |= dict(batch=BATCH) if batch_at == "construction" else {}
    given = dict(objective=OBJECTIVE) if objective_at == "update" else {}
    given |= dict(batch=BATCH) if batch_at == "update" else {}
    tx = optim.self_contained(optim.fosi(optax.sgd(0.1)), DenseEigenpairs(k=2), CurvatureSchedule(), **built)
    _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS, **given)
    np.testing.assert_allclose(state.curvature.values, [9.0, 4.0], rtol=1e-5)


def test_what_an_update_is_given_comes_before_what_was_built_in():
    other = Objective.from_loss(lambda params, batch: 2 * loss_fn(params, batch))
    inner, estimator = optim.fosi(optax.sgd(0.1)), DenseEigenpairs(k=1)
    tx = optim.self_contained(inner, estimator, CurvatureSchedule(), OBJECTIVE, batch=BATCH)
    state = tx.init(PARAMS)
    for given, largest in [({}, 9), (dict(batch=BATCH + 1), 10), (dict(objective=other), 18)]:
        _, after = tx.update(PARAMS, state, PARAMS, **given)
        np.testing.assert_allclose(after.curvature.values, [largest], rtol=1e-5)


def test_extra_arguments_are_passed_on_with_the_curvature_inside():
    """The wrapped optimizer sees its own curvature, whatever `curvature=` the rest of a chain is given."""
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = optim.self_contained(spy, Logger(), CurvatureSchedule(), OBJECTIVE, batch=BATCH)
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=3.0, curvature=None, anything="goes")
    assert set(seen) == {"curvature", "objective", "batch", "key", "value", "anything"}
    assert isinstance(seen["curvature"], Log) and seen["curvature"].refreshes == 1
    assert seen["value"] == 3.0 and seen["objective"] is OBJECTIVE and seen["batch"] is BATCH

    chain = optax.chain(optax.clip_by_global_norm(1.0), optim.self_contained(optax.sgd(0.1), Logger(), _every_step()))
    chain.update(PARAMS, chain.init(PARAMS), PARAMS, objective=OBJECTIVE, batch=BATCH, curvature=None, value=1.0)


def _every_step():
    return CurvatureSchedule(update_every=1, refresh_every=1)


# --------------------------------------------------------------------------------------------------- where it is used


def test_plain_loop_is_estimator_and_optimizer_by_hand():
    schedule, estimator = CurvatureSchedule(refresh_every=3, start=1), DenseEigenpairs(k=2)
    inner = optim.fosi(optax.adam(0.1))
    tx = optim.self_contained(inner, estimator, schedule, OBJECTIVE, seed=5)
    params, state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
    by_hand, inner_state, curvature = PARAMS, inner.init(PARAMS), estimator.init(OBJECTIVE, PARAMS)
    inner_update, refresh = jax.jit(inner.update), jax.jit(estimator.refresh)
    for count in range(8):
        batch = BATCH + count
        updates, state = update(jax.grad(loss_fn)(params, batch), state, params, batch=batch)
        params = optax.apply_updates(params, updates)
        if schedule.refreshes(count):
            key = jax.random.fold_in(jax.random.key(5), count)
            curvature = refresh(curvature, OBJECTIVE, by_hand, batch, key)
        grads = jax.grad(loss_fn)(by_hand, batch)
        updates, inner_state = inner_update(grads, inner_state, by_hand, curvature=curvature)
        by_hand = optax.apply_updates(by_hand, updates)
        # compiled in one program and in two: rounding is all that may differ (measured: nothing)
        np.testing.assert_allclose(params["x"], by_hand["x"], atol=1e-6)
    assert state.curvature.refreshes == curvature.refreshes == 3


def test_in_an_nnx_optimizer():
    """`nnx.Optimizer` under `nnx.jit` moves the model as the plain optax loop moves its parameters."""
    x = jax.random.normal(jax.random.key(0), (16, 3))
    batch = {"x": x, "target": x @ jnp.array([[1.0, 0.0], [0.5, 1.0], [0.0, -1.0]])}
    predict = lambda model, batch: model(batch["x"])
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    objective, params = Objective.from_model(model, predict, losses.SquaredError())
    make = lambda: optim.self_contained(
        optim.fosi(optax.adam(0.03), 0.3), DenseEigenpairs(k=2), CurvatureSchedule(refresh_every=4), objective
    )

    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, batch):
        squares = lambda model: 0.5 * jnp.sum((predict(model, batch) - batch["target"]) ** 2) / 16
        value, grads = nnx.value_and_grad(squares)(model)
        optimizer.update(model, grads, batch=batch)
        return value

    tx = make()
    state, update = tx.init(params), jax.jit(tx.update)
    start = objective.loss(params, batch)
    for count in range(9):
        value = train_step(model, optimizer, batch)
        here, grads, _, _ = objective.value_and_grad(params, batch)
        np.testing.assert_allclose(value, here, rtol=1e-4)
        updates, state = update(grads, state, params, batch=batch)
        params = optax.apply_updates(params, updates)
        assert optimizer.opt_state.curvature.refreshes[...] == state.curvature.refreshes == count // 4 + 1
    np.testing.assert_allclose(model.kernel[...], params["kernel"], atol=1e-5)
    assert value < 0.6 * start


def test_inside_apply_if_finite_and_multi_steps():
    inner = optim.self_contained(optax.sgd(0.1), Logger(), _every_step(), OBJECTIVE, batch=BATCH)
    tx = optax.apply_if_finite(inner, max_consecutive_errors=2)
    bad, state = tx.update({"x": PARAMS["x"] * jnp.nan}, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(bad["x"], 0)
    assert state.inner_state.count == 0 and state.inner_state.curvature.refreshes == 0
    tx = optax.MultiSteps(inner, every_k_schedule=2)
    state = tx.init(PARAMS)
    for expected in (0, 1, 1, 2):
        _, state = tx.update(PARAMS, state, PARAMS)
        assert state.inner_opt_state.curvature.refreshes == expected


def test_traced_once_and_abstract_in_eval_shape():
    tx, traces = optim.self_contained(optim.fosi(optax.adam(0.1)), DenseEigenpairs(k=2), CurvatureSchedule(1, 2)), 0

    @jax.jit
    def update(grads, state, params, batch):
        nonlocal traces
        traces += 1
        return tx.update(grads, state, params, objective=OBJECTIVE, batch=batch)

    state, abstract = tx.init(PARAMS), jax.eval_shape(tx.init, PARAMS)
    for count in range(4):
        _, state = update(PARAMS, state, PARAMS, BATCH + count)
    assert traces == 1
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    jax.tree.map(lambda a, s: np.testing.assert_equal((a.shape, a.dtype), (s.shape, s.dtype)), state, abstract)


# ------------------------------------------------------------------------------------------------------------ errors


def test_missing_objective_or_batch_or_parameters():
    tx = optim.self_contained(optim.fosi(optax.sgd(0.1)), Lanczos(k=1), CurvatureSchedule())
    state = tx.init(PARAMS)
    with pytest.raises(TypeError, match="needs objective=, as it was given none when it was built"):
        tx.update(PARAMS, state, PARAMS, batch=BATCH)
    with pytest.raises(TypeError, match="needs batch="):
        tx.update(PARAMS, state, PARAMS, objective=OBJECTIVE)
    with pytest.raises(ValueError, match=r"self_contained needs the parameters"):
        tx.update(PARAMS, state, objective=OBJECTIVE, batch=BATCH)
    ggn = optim.self_contained(optim.fosi(optax.sgd(0.1)), Lanczos(k=1, product="ggn"), CurvatureSchedule(), OBJECTIVE)
    with pytest.raises(TypeError, match="needs the model's outputs"):
        ggn.init(PARAMS)


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, optax.adam, r"self_contained\(tx\) should be an optax transformation, not function"),
        (1, Lanczos, r"self_contained\(estimator\) should be of type CurvatureEstimator, not ABCMeta"),
        (2, 100, r"self_contained\(schedule\) should be of type CurvatureSchedule, not int"),
        (3, loss_fn, r"self_contained\(objective\) should be of type Objective, not function"),
    ],
)
def test_arguments_of_another_kind(position, wrong, message):
    arguments = [optim.fosi(optax.sgd(0.1)), Lanczos(k=1), CurvatureSchedule(), OBJECTIVE]
    arguments[position] = wrong
    with pytest.raises(TypeError, match=message):
        optim.self_contained(*arguments)
