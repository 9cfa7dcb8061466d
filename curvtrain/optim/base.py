"""What every curvature-consuming optimizer shares: extra arguments, and a wrapper that carries its own curvature."""

import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from curvtrain.curvature.base import Curvature, CurvatureEstimator, damping_hint
from curvtrain.curvature.schedule import CurvatureSchedule
from curvtrain.objective import Objective

PyTree = Any
C = TypeVar("C", bound=Curvature)


def require_curvature(optimizer: str, curvature: Any, kind: type[C], estimator: str) -> C:
    """The curvature among an update's extra arguments. Raises TypeError if it is missing or of another kind."""
    advice = (
        f"Pass curvature={kind.__name__} to update(), give the Trainer curvature={estimator}, or wrap the optimizer in "
        f"optim.self_contained({optimizer}, {estimator}, schedule, objective)."
    )
    if curvature is None:
        raise TypeError(
            f"{optimizer}.update() needs a curvature among its extra arguments, and there is none. {advice}"
        )
    if not isinstance(curvature, kind):
        raise TypeError(
            f"{optimizer}.update(curvature=) should be {kind.__name__}, not {type(curvature).__name__}. {advice}"
        )
    return curvature


def require_transformation(argument: str, tx: Any) -> None:
    """Raises TypeError unless `tx` has `init` and `update`, as optax's transformations and `optax.MultiSteps` have."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"{argument} should be an optax transformation, not {type(tx).__name__}.")


def require_params(optimizer: str, params: Any) -> None:
    """Raises ValueError if `update` was called without the parameters."""
    if params is None:
        raise ValueError(f"{optimizer} needs the parameters: call update(grads, state, params).")


class SelfContainedState(NamedTuple):
    """The optimizer's state with the curvature inside.

    Attributes:
      count: int32 (), updates so far.
      inner: the wrapped optimizer's state.
      curvature: what the estimator maintains.
      key: the random key that estimators are given, folded with `count`.
    """

    count: jax.Array
    inner: optax.OptState
    curvature: Any
    key: jax.Array


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
    decides on the host, does not pay for that.

    Args:
      tx: an optimizer that takes `curvature=`.
      estimator: what maintains the curvature.
      schedule: when. Its `batch_size` is not used: the caller chooses the batch. A period that is a function of the
        step is traced.
      objective: the objective, unless every update is given `objective=` (an estimator that reads the objective in
        `init` needs it here).
      batch: a fixed batch for the curvature, unless every update is given `batch=`.
      seed: of the estimator's random keys.

    Returns:
      A transformation whose `update` takes `objective=`, `batch=`, `key=` and passes all extra arguments on, except
      for a `curvature=`: `tx` sees its own.
    """
    require_transformation("self_contained(tx)", tx)
    _require("estimator", estimator, CurvatureEstimator)
    _require("schedule", schedule, CurvatureSchedule)
    if objective is not None:
        _require("objective", objective, Objective)
    tx = optax.with_extra_args_support(tx)
    default_objective, default_batch = objective, batch

    def init(params):
        curvature = estimator.init(default_objective, params)
        return SelfContainedState(jnp.int32(0), tx.init(params), curvature, jax.random.key(seed))

    def update(updates, state, params=None, *, objective=None, batch=None, key=None, **extra):
        require_params("self_contained", params)
        objective = default_objective if objective is None else objective
        batch = default_batch if batch is None else batch
        if objective is None or batch is None:
            missing = "objective" if objective is None else "batch"
            raise TypeError(f"self_contained(...).update() needs {missing}=, as it was given none when it was built.")
        step_key = jax.random.fold_in(state.key, state.count) if key is None else key

        here: Objective = objective

        def advance(curvature, inner):
            refresh = functools.partial(estimator.refresh, damping=damping_hint(inner))
            for does, period, method in (
                (estimator.absorbs, schedule.update_every, estimator.update),
                (estimator.factorises, schedule.refresh_every, refresh),
            ):
                run = lambda c, method=method: method(c, here, params, batch, step_key)
                if does:
                    curvature = jax.lax.cond(_due(period, schedule, state.count), run, lambda c: c, curvature)
            return curvature

        curvature = advance(state.curvature, state.inner) if schedule.update_first else state.curvature
        extra |= dict(curvature=curvature, objective=objective, batch=batch, key=step_key)
        updates, inner = tx.update(updates, state.inner, params, **extra)
        if not schedule.update_first:
            curvature = advance(curvature, inner)
        return updates, SelfContainedState(state.count + 1, inner, curvature, state.key)

    return optax.GradientTransformationExtraArgs(init, update)


def _require(argument: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"self_contained({argument}) should be of type {kind.__name__}, not {type(value).__name__}.")


def _due(period, schedule: CurvatureSchedule, count: jax.Array) -> jax.Array:
    every = period(count) if callable(period) else period
    return (count >= schedule.start) & ((count - schedule.start) % every == 0)
