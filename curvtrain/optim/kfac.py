"""K-FAC's step: a preconditioned gradient whose rate, momentum and damping come of an exact quadratic model.

Martens and Grosse (2015), arXiv 1503.05671, sections 6 and 7; over any curvature, though it was made for `KFAC`.

| symbol | shape | meaning |
|---|---|---|
| theta, g | params | parameters; gradient of L, the loss plus l2/2 |theta|^2 |
| C | | the curvature, U = (C + (lambda + l2) I)^-1 g |
| d, v | params | the two directions, d = -U and v = the last update |
| w | (2,) | learning rate and momentum, where adaptive the minimum of the quadratic model; delta = w_0 d + w_1 v |
| q | () | the change of L that the model predicts, see `quadratic_model.py` |
| rho | () | (L(theta + delta) - L(theta)) / q: the reduction ratio |
| lambda | () | damping, in a trust-region sense: smaller after rho > 3/4, larger after rho < 1/4 |
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain.curvature import trees
from curvtrain.curvature.base import Curvature
from curvtrain.curvature.request import Request
from curvtrain.optim.base import require_curvature, require_objective, require_params, transformation, vectors_for
from curvtrain.optim.quadratic_model import QuadraticModel, quadratic_model
from curvtrain.optim.scale_by_curvature import check_damping, damping_now, is_constant, value_at

PyTree = Any

ADAPTIVE = "adaptive"
_GOOD, _POOR = 0.75, 0.25  # reduction ratios that lower and raise the damping


class KfacState(NamedTuple):
    """State of `kfac`.

    Attributes:
      count: int32 (), updates so far.
      velocity: like the parameters, float32 or float64 (see `curvtrain/_dtypes.py`): the last update that was not
        rejected.
      request: what is asked of the curvature, with lambda + l2 of the next update.
      learning_rate, momentum: (), w of the last update.
      reduction_ratio: (), rho of the last update where it was looked at; NaN before.
      rejected: int32 (), updates that were rejected so far.
    """

    count: jax.Array
    velocity: PyTree
    request: Request
    learning_rate: jax.Array
    momentum: jax.Array
    reduction_ratio: jax.Array
    rejected: jax.Array

    @property
    def damping(self) -> jax.Array:
        """(), lambda + l2: what the next update will ask of the curvature."""
        assert self.request.damping is not None
        return self.request.damping


def kfac(
    learning_rate: optax.ScalarOrSchedule | str = ADAPTIVE,
    momentum: optax.ScalarOrSchedule | str = ADAPTIVE,
    damping: optax.ScalarOrSchedule | str = ADAPTIVE,
    *,
    initial_damping: float = 1.0,
    l2: float = 0.0,
    norm_constraint: float | None = None,
    damping_every: int = 5,
    damping_decay: float = 0.9,
    min_damping: float = 1e-8,
    max_damping: float = 1e8,
    reject: bool | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditioned steps with adaptive or scheduled learning rate, momentum and damping.

    Update and refresh the curvature at least as often as its estimate is worth; with adaptive damping and
    `KFAC(inverse="cholesky")`, refresh every `damping_every` steps, so that the cached inverses are those which are
    asked for (another damping is right too, at the cost of a factorisation in every step; "eigh" has no such cost).

    Args:
      learning_rate, momentum: "adaptive" (the minimum of the quadratic model on this batch), a number, or a schedule.
      damping: lambda: "adaptive" (Levenberg-Marquardt by the reduction ratio), a number, or a schedule.
      initial_damping: of "adaptive".
      l2: coefficient of l2/2 |theta|^2, which is added to the loss, and l2 I to the curvature.
      norm_constraint: c: U is scaled by min(1, sqrt(c / (rate^2 U^T g))); not with an adaptive learning rate.
      damping_every: steps between two adaptations of the damping.
      damping_decay: omega: lambda is multiplied or divided by omega^damping_every.
      min_damping, max_damping: bounds of the adaptive lambda.
      reject: whether an update after which the loss of the batch is not finite, or larger, is not made: parameters and
        velocity stay, and an adaptive lambda grows. It costs a forward pass per step. None: if the damping is adaptive.

    Returns:
      A transformation whose `update` needs the parameters and `curvature=`; where anything is adaptive or may be
      rejected, also `objective=` and `batch=` (and `key=`, and `value=` to save a forward pass). It ends in parameters:
      no learning rate is to be chained after it.
    """
    step = _Kfac(
        learning_rate,
        momentum,
        damping,
        initial_damping,
        l2,
        norm_constraint,
        damping_every,
        damping_decay,
        min_damping,
        max_damping,
        isinstance(damping, str) if reject is None else reject,
    )
    return transformation(step.init, step.update)


@dataclasses.dataclass(frozen=True)
class _Kfac:
    """The options of `kfac`, checked, and its two functions."""

    learning_rate: optax.ScalarOrSchedule | str
    momentum: optax.ScalarOrSchedule | str
    damping: optax.ScalarOrSchedule | str
    initial_damping: float
    l2: float
    norm_constraint: float | None
    damping_every: int
    damping_decay: float
    min_damping: float
    max_damping: float
    reject: bool

    def __post_init__(self):
        for name in ("learning_rate", "momentum", "damping"):
            value = getattr(self, name)
            if isinstance(value, str):
                _checks.one_of(f"kfac({name})", value, (ADAPTIVE,))
            else:
                check_damping(f"kfac({name})", value)
        _checks.number_in("kfac(initial_damping)", self.initial_damping, 0.0)
        _checks.number_in("kfac(l2)", self.l2, 0.0)
        _checks.positive_int("kfac(damping_every)", self.damping_every)
        _checks.number_in("kfac(damping_decay)", self.damping_decay, 0.0, 1.0, open_low=True)
        _checks.number_in("kfac(min_damping)", self.min_damping, 0.0)
        _checks.number_in("kfac(max_damping)", self.max_damping, self.min_damping)
        if self.norm_constraint is not None:
            _checks.number_in("kfac(norm_constraint)", self.norm_constraint, 0.0)
            if isinstance(self.learning_rate, str):
                raise ValueError(
                    "kfac(norm_constraint) bounds a given learning rate; an adaptive one is bounded by its quadratic "
                    "model. Give a learning_rate, or no norm_constraint."
                )

    def init(self, params: PyTree) -> KfacState:
        """The state before the first update."""
        dtype = trees.width(params)
        first = self.initial_damping if isinstance(self.damping, str) else self.damping
        first = value_at(first, jnp.int32(0), params) + self.l2
        known = not isinstance(self.damping_every, jax.Array)
        period = self.damping_every if isinstance(self.damping, str) and known else None
        return KfacState(
            count=jnp.int32(0),
            velocity=trees.zeros(params),
            request=Request.of(
                "kfac", Curvature, params, first.astype(dtype), period, constant=is_constant(self.damping)
            ),
            learning_rate=jnp.zeros((), dtype),
            momentum=jnp.zeros((), dtype),
            reduction_ratio=jnp.full((), jnp.nan, dtype),
            rejected=jnp.int32(0),
        )

    def update(
        self, updates, state, params=None, *, curvature=None, objective: Any = None, batch=None, key=None, **extra
    ):
        """One step; see `kfac`."""
        require_params("kfac", params)
        C = require_curvature("kfac", curvature, Curvature, "curvature.KFAC()")
        has_model = any(isinstance(option, str) for option in (self.learning_rate, self.momentum, self.damping))
        if has_model or self.reject:
            why = "kfac: an adaptive learning rate, momentum or damping, and rejection, look at the loss"
            without = " Without them, give numbers or schedules for all three, and reject=False."
            require_objective(why, objective, batch, without)
            objective.require_outputs("kfac with adaptive coefficients", "numbers or schedules for all three")
        state = self._with_damping_now(state)
        theta, dtype = trees.wide(params), state.damping.dtype
        g = jax.tree.map(lambda g, p: g.astype(dtype) + self.l2 * p, updates, theta)
        rate = None if isinstance(self.learning_rate, str) else value_at(self.learning_rate, state.count, params)
        decay = None if isinstance(self.momentum, str) else value_at(self.momentum, state.count, params)
        directions = d, v = self._direction(C, g, state, rate), state.velocity
        if has_model:
            model: QuadraticModel = quadratic_model(objective, params, directions, g, batch, key)
            w = model.minimum(state.damping, rate, decay)
            predicted = model.change(w, self.l2)
        else:
            assert rate is not None and decay is not None
            w, predicted = jnp.stack([rate, decay]), jnp.full((), jnp.nan, dtype)
        delta = jax.tree.map(lambda d, v: w[0] * d + w[1] * v, d, v)

        def reduction(_):
            """(rho, whether L fell, which is not true of NaN)."""
            value = extra.get("value")
            before = objective.loss(objective.like_parameters(params), batch, key) if value is None else value
            moved = trees.add(theta, delta)
            after = objective.loss(objective.like_parameters(trees.cast(moved, params)), batch, key)
            before, after = before + self._penalty(theta), after + self._penalty(moved)
            return ((after - before) / predicted).astype(dtype), after <= before

        due = (state.count + 1) % self.damping_every == 0
        unseen = lambda _: (state.reduction_ratio, jnp.bool_(True))
        if self.reject:
            rho, fell = reduction(None)
        elif isinstance(self.damping, str):
            rho, fell = jax.lax.cond(due, reduction, unseen, None)
        else:
            rho, fell = unseen(None)
        keep = fell | (not self.reject)
        out = jax.tree.map(lambda x, u: jnp.where(keep, x, 0.0).astype(u.dtype), delta, updates)
        return out, KfacState(
            count=state.count + 1,
            velocity=jax.tree.map(lambda new, old: jnp.where(keep, new, old).astype(old.dtype), delta, v),
            request=state.request.with_damping((self._next_damping(state, rho, due, keep) + self.l2).astype(dtype)),
            learning_rate=w[0].astype(dtype),
            momentum=w[1].astype(dtype),
            reduction_ratio=rho,
            rejected=state.rejected + jnp.where(keep, 0, 1).astype(jnp.int32),
        )

    def _direction(self, C: Curvature, g: PyTree, state: KfacState, rate: jax.Array | None) -> PyTree:
        """d = -U, scaled down to the norm constraint."""
        to, back = vectors_for("kfac", C, g)
        U, scale = back(C.solve(to(g), state.damping)), -jnp.ones((), state.damping.dtype)
        if rate is not None and self.norm_constraint is not None:
            size = rate**2 * trees.dot(U, g)
            scale = -jnp.where(size > self.norm_constraint, jnp.sqrt(self.norm_constraint / size), 1.0)
        return trees.scale(scale, U)

    def _with_damping_now(self, state: KfacState) -> KfacState:
        """The state with the damping that the options say, unless it is adaptive: a resumed run may have others."""
        if isinstance(self.damping, str):
            return state
        now = damping_now(self.damping, state.count, state.damping, self.l2)
        return state._replace(request=state.request.with_damping(now))

    def _penalty(self, theta: PyTree) -> jax.Array:
        return 0.5 * self.l2 * trees.dot(theta, theta)

    def _next_damping(self, state: KfacState, rho: jax.Array, due: jax.Array, keep: jax.Array) -> jax.Array:
        """lambda of the next update."""
        if not isinstance(self.damping, str):
            return value_at(self.damping, state.count + 1, state.damping)
        lam, factor = state.damping - self.l2, self.damping_decay**self.damping_every
        raised, lowered = lam / factor, lam * factor
        adapted = jnp.where(rho > _GOOD, lowered, jnp.where(rho >= _POOR, lam, raised))  # NaN raises
        lam = jnp.where(due, adapted, lam)
        return jnp.clip(jnp.where(keep, lam, raised), self.min_damping, self.max_damping)
