"""Any curvature as a link of an optax chain: g -> (C + damping I)^exponent g."""

import math
import numbers
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain.curvature import trees
from curvtrain.curvature.base import Curvature
from curvtrain.curvature.request import Request
from curvtrain.optim.base import require_curvature, transformation, vectors_for

PyTree = Any

INVERSE = Fraction(-1)


class ScaleByCurvatureState(NamedTuple):
    """State of `scale_by_curvature`.

    Attributes:
      count: int32 (), updates so far.
      request: what is asked of the curvature, with the damping of the next update.
    """

    count: jax.Array
    request: Request

    @property
    def damping(self) -> jax.Array:
        """(), what the next update will use."""
        assert self.request.damping is not None
        return self.request.damping


def scale_by_curvature(
    damping: optax.ScalarOrSchedule = 1e-3, exponent: float | Fraction = INVERSE
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by (C + damping I)^exponent, for the `curvature` among the extra arguments.

    Like optax's `scale_by_*`, it changes neither sign nor rate: chain it with `optax.scale_by_learning_rate`.

    Args:
      damping: a non-negative number or an optax schedule.
      exponent: -1 for a Newton or natural-gradient step, which every curvature has; -0.5 for one like Adam's, and
        others, for those with an eigenbasis (`Diagonal`, `Eigenpairs`, `KFAC(inverse="eigh")`). A fraction stays as it
        is under `optax.inject_hyperparams`, which makes arrays of floats, and of an array nobody knows that it is -1.
    """
    check_damping("scale_by_curvature(damping)", damping)
    _checks.number_in("scale_by_curvature(exponent)", exponent, -math.inf)
    power = exponent if isinstance(exponent, jax.Array) else float(exponent)

    def init(params):
        first = value_at(damping, jnp.int32(0), params)
        request = Request.of("scale_by_curvature", Curvature, params, first, constant=is_constant(damping))
        return ScaleByCurvatureState(jnp.int32(0), request)

    def update(updates, state, params=None, *, curvature=None, **extra):
        kind = "curvature.KFAC(), or another estimator"
        C = require_curvature("scale_by_curvature", curvature, Curvature, kind)
        to, back = vectors_for("scale_by_curvature", C, updates)
        asked = damping_now(damping, state.count, state.damping)
        scaled = back(C.power(to(updates), asked, power))
        scaled = trees.cast(scaled, updates)
        request = state.request.with_damping(value_at(damping, state.count + 1, state.damping))
        return scaled, ScaleByCurvatureState(state.count + 1, request)

    return transformation(init, update)


def check_damping(argument: str, damping: Any) -> None:
    """Raises TypeError or ValueError unless `damping` is a schedule or a number of at least 0."""
    if not callable(damping):
        _checks.number_in(argument, damping, 0.0)


def is_constant(option: Any) -> bool:
    """Says whether an option is a plain number, which changes with the program alone."""
    return isinstance(option, numbers.Real)


def damping_now(option: optax.ScalarOrSchedule, count: jax.Array, asked: jax.Array, l2: Any = 0.0) -> jax.Array:
    """The damping of an update, lambda + l2 by the option; `asked` is what the state says of it.

    They differ where a run was resumed with another option. Where they do not, but for rounding, the value is `asked`
    to the last bit, as the curvature may hold inverses for just that.
    """
    now = (value_at(option, count, asked) + l2).astype(asked.dtype)
    return jnp.where(jnp.abs(now - asked) <= 1e-6 * jnp.abs(now), asked, now)


def value_at(schedule: optax.ScalarOrSchedule, count: jax.Array, like: PyTree) -> jax.Array:
    """A number or schedule at a step, in the dtype that `width` chooses for a tree, such as the parameters."""
    return jnp.asarray(schedule(count) if callable(schedule) else schedule, trees.width(like))
