"""An optimizer that carries its own curvature, for a plain optax loop or `nnx.Optimizer`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvtrain._extra import accepting
from curvtrain.curvature.base import CurvatureEstimator
from curvtrain.curvature.request import (
    Answered,
    as_wished,
    check_requests,
    part_of,
    requested_damping,
    requested_part,
    requests,
)
from curvtrain.curvature.schedule import CurvatureSchedule
from curvtrain.objective import Objective, by_path, nested
from curvtrain.optim.base import require_params, require_transformation, transformation

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelfContainedState(Answered):
    """The optimizer's state with the curvature inside.

    Attributes:
      count: int32 (), updates so far.
      inner: the wrapped optimizer's state.
      curvature: what the estimator maintains.
      key: the random key that estimators are given, folded with `count`.
      next_update, next_refresh: int32 (), the counts at which the schedule has the next ones.
    """

    count: jax.Array
    inner: optax.OptState
    curvature: Any
    key: jax.Array
    next_update: jax.Array
    next_refresh: jax.Array

    def answer(self):
        return self.inner, self.curvature


def self_contained(
    tx: optax.GradientTransformation,
    estimator: CurvatureEstimator,
    schedule: CurvatureSchedule,
    objective: Objective | None = None,
    *,
    batch: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """`tx` with its curvature inside its own state, for a plain optax loop or `nnx.Optimizer`.

    The schedule is decided inside `update` with `lax.cond`, so that it works in any jitted step; a `Trainer`, which
    decides on the host, does not pay for that. Where `tx` passes only some parameters on to an optimizer that consumes
    the curvature (`optax.masked`, `optax.multi_transform`), only these are measured.

    Args:
      tx: an optimizer that takes `curvature=`.
      estimator: what maintains the curvature.
      schedule: when. A period that is a function of the step is traced.
      objective: the objective, unless every update is given `objective=` (an estimator that reads the objective in
        `init` needs it here).
      batch: a fixed batch for the curvature, unless every update is given `batch=`.
      seed: of the estimator's random keys.

    Returns:
      A transformation whose `update` takes `objective=`, `batch=`, `key=` and passes all extra arguments on, except
      for a `curvature=`: `tx` sees its own. Where it is given `grad=`, the gradient for that key, estimators that need
      just the gradient do not compute it again.

    Raises:
      TypeError, ValueError: an argument of the wrong type; a schedule with a `batch_size`, which needs a Trainer; in
        `init`, an estimator whose curvature `tx` does not take.
    """
    require_transformation("self_contained(tx)", tx)
    _require("estimator", estimator, CurvatureEstimator)
    _require("schedule", schedule, CurvatureSchedule)
    if objective is not None:
        _require("objective", objective, Objective)
    if schedule.batch_size is not None:
        raise ValueError(
            f"self_contained(schedule): batch_size={schedule.batch_size} is for a Trainer, which draws batches for "
            f"refreshes. Leave it out, and give update() or self_contained a batch= of the size that you want."
        )
    tx = accepting(tx)
    default_objective, default_batch = objective, batch

    def init(params):
        inner = tx.init(params)
        found = requests(inner)
        here, part = _part(found, default_objective, params)
        curvature = as_wished(estimator, found).init(here, part)
        check_requests(found, curvature, "self_contained(estimator)")
        first = lambda: jnp.int32(schedule.start)  # two arrays, which may both be donated
        return SelfContainedState(jnp.int32(0), inner, curvature, jax.random.key(seed), first(), first())

    def update(updates, state, params=None, *, objective=None, batch=None, key=None, **extra):
        require_params("self_contained", params)
        objective = default_objective if objective is None else objective
        batch = default_batch if batch is None else batch
        if objective is None or batch is None:
            missing = "objective" if objective is None else "batch"
            raise TypeError(f"self_contained(...).update() needs {missing}=, as it was given none when it was built.")
        grads = None if key is None else extra.get("grad")
        step_key = jax.random.fold_in(state.key, state.count) if key is None else key
        found = requests(state.inner)
        here, part = _part(found, objective, params)
        due = _Due(schedule.settled(found), state)
        own = None if grads is None else part_of(grads, part)
        advance = functools.partial(_advance, as_wished(estimator, found), due, (here, part, batch, step_key), own)
        curvature = advance(state.curvature, state.inner) if schedule.update_first else state.curvature
        extra |= dict(curvature=curvature, objective=here, batch=batch, key=step_key)
        updates, inner = tx.update(updates, state.inner, params, **extra)
        if not schedule.update_first:
            curvature = advance(curvature, inner)
        return updates, SelfContainedState(
            state.count + 1, inner, curvature, state.key, due.next_update, due.next_refresh
        )

    return transformation(init, update)


class _Due:
    """What a schedule has for the update after `state.count`, and when it has the next."""

    def __init__(self, schedule: CurvatureSchedule, state: SelfContainedState):
        self.update, self.next_update = _next(schedule.update_every, state.next_update, state.count)
        self.refresh, self.next_refresh = _next(schedule.refresh_every, state.next_refresh, state.count)


def _advance(
    estimator: CurvatureEstimator, due: _Due, where: tuple[Any, ...], grads: PyTree, curvature: Any, inner: PyTree
) -> Any:
    """The curvature after an update and a refresh, of which each is made if it is due.

    `where` is (objective, its parameters, batch, key); `inner` is the optimizer's state, which says the damping.
    """
    if estimator.absorbs:
        absorb = lambda c: estimator.update(c, *where, grads=grads)
        curvature = jax.lax.cond(due.update, absorb, lambda c: c, curvature)
    if estimator.factorises:
        damping = requested_damping(requests(inner))
        refresh = lambda c: estimator.refresh(c, *where, damping=damping)
        curvature = jax.lax.cond(due.refresh, refresh, lambda c: c, curvature)
    return curvature


def _next(period: Any, planned: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(whether it is time, when it is next)."""
    due = count >= planned
    every = period(count) if callable(period) else period
    return due, jnp.where(due, count + jnp.asarray(every, jnp.int32), planned).astype(jnp.int32)


def _part(found, objective: Objective | None, params: PyTree) -> tuple[Any, PyTree]:
    """(the objective, its parameters) for the estimator: those that requests name, in the objective's containers."""
    if objective is None:
        return None, params
    if objective.has_outputs:  # of a module: nested dicts, where `nnx.Optimizer` has a State
        params = nested(by_path(params))
    return requested_part(found, objective, params)


def _require(argument: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"self_contained({argument}) should be of type {kind.__name__}, not {type(value).__name__}.")
