"""K-FAC's step: a preconditioned gradient whose rate, momentum and damping come of an exact quadratic model.

Martens and Grosse (2015), arXiv 1503.05671, sections 6 and 7; over any curvature, though it was made for `KFAC`.

| symbol | shape | meaning |
|---|---|---|
| theta, g | params | parameters; gradient of L, the loss plus l2/2 |theta|^2 |
| C | | the curvature, U = (C + (lambda + l2) I)^-1 g |
| d, v | params | the two directions, d = -U and v = the last update |
| B | | the exact GGN of the batch |
| M, b | (2, 2), (2,) | M_ij = V_i^T B V_j + (lambda + l2) V_i^T V_j and b_i = V_i^T g for V = (d, v) |
| w | (2,) | learning rate and momentum: w = -M^-1 b where both are adaptive; delta = w_0 d + w_1 v |
| q | () | (w^T M' w)/2 + b^T w, M' without lambda: the model's change of L |
| rho | () | (L(theta + delta) - L(theta)) / q: the reduction ratio |
| lambda | () | damping, in a trust-region sense: smaller after rho > 3/4, larger after rho < 1/4 |
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain.curvature import trees
from curvtrain.curvature.base import Curvature
from curvtrain.curvature.products import ggn_gram
from curvtrain.objective import Objective
from curvtrain.curvature.request import Request
from curvtrain.optim.base import require_curvature, require_params, vectors_for
from curvtrain.optim.scale_by_curvature import check_damping, value_at

PyTree = Any

ADAPTIVE = "adaptive"
_GOOD, _POOR = 0.75, 0.25  # reduction ratios that lower and raise the damping
_SINGULAR = 1e-6  # of det M / (M_00 M_11): below it, d and v are one direction to float32


class KfacState(NamedTuple):
    """State of `kfac`.

    Attributes:
      count: int32 (), updates so far.
      velocity: float32 like the parameters: the last update that was not rejected.
      request: what is asked of the curvature, with lambda + l2 of the next update.
      learning_rate, momentum: float32 (), w of the last update.
      reduction_ratio: float32 (), rho of the last update where it was looked at; NaN before.
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
        """float32 (), lambda + l2: what the next update will ask of the curvature."""
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
    for name, value in (("learning_rate", learning_rate), ("momentum", momentum), ("damping", damping)):
        if isinstance(value, str):
            _checks.one_of(f"kfac({name})", value, (ADAPTIVE,))
        else:
            check_damping(f"kfac({name})", value)
    _checks.number_in("kfac(initial_damping)", initial_damping, 0.0)
    _checks.number_in("kfac(l2)", l2, 0.0)
    _checks.positive_int("kfac(damping_every)", damping_every)
    _checks.number_in("kfac(damping_decay)", damping_decay, 0.0, 1.0, open_low=True)
    _checks.number_in("kfac(min_damping)", min_damping, 0.0)
    _checks.number_in("kfac(max_damping)", max_damping, min_damping)
    if norm_constraint is not None:
        _checks.number_in("kfac(norm_constraint)", norm_constraint, 0.0)
        if isinstance(learning_rate, str):
            raise ValueError(
                "kfac(norm_constraint) bounds a given learning rate; an adaptive one is bounded by its quadratic "
                "model. Give a learning_rate, or no norm_constraint."
            )
    adaptive_damping = isinstance(damping, str)
    model = any(isinstance(option, str) for option in (learning_rate, momentum, damping))
    rejects = adaptive_damping if reject is None else reject
    factor = damping_decay**damping_every
    period = damping_every if adaptive_damping and isinstance(damping_every, int) else None

    def init(params):
        first = initial_damping if isinstance(damping, str) else value_at(damping, jnp.int32(0))
        return KfacState(
            count=jnp.int32(0),
            velocity=trees.zeros(params),
            request=Request.of("kfac", Curvature, params, jnp.float32(first) + l2, period),
            learning_rate=jnp.float32(0),
            momentum=jnp.float32(0),
            reduction_ratio=jnp.float32(jnp.nan),
            rejected=jnp.int32(0),
        )

    def update(
        updates, state, params=None, *, curvature=None, objective: Any = None, batch=None, key=None, value=None, **extra
    ):
        require_params("kfac", params)
        C = require_curvature("kfac", curvature, Curvature, "curvature.KFAC()")
        if model or rejects:
            _require_objective(objective, batch)
        theta = trees.float32(params)
        g = jax.tree.map(lambda g, p: g.astype(jnp.float32) + l2 * p, updates, theta)
        total, lam = state.damping, state.damping - l2
        own = lambda vector: vector if objective is None else objective.like_parameters(vector)
        to, back = vectors_for("kfac", C, updates)
        U = back(C.solve(to(g), total))
        d, v = trees.scale(-1.0, U), state.velocity

        rate = None if isinstance(learning_rate, str) else value_at(learning_rate, state.count)
        decay = None if isinstance(momentum, str) else value_at(momentum, state.count)
        if rate is not None and norm_constraint is not None:
            size = rate**2 * trees.dot(U, g)
            d = trees.scale(jnp.where(size > norm_constraint, jnp.sqrt(norm_constraint / size), 1.0), d)
        if model:
            gram = ggn_gram(objective, own(params), (own(d), own(v)), batch, key)
            dots = jnp.stack([jnp.stack([trees.dot(a, b) for b in (d, v)]) for a in (d, v)])
            b = jnp.stack([trees.dot(d, g), trees.dot(v, g)])
            w = _minimise(gram + total * dots, b, rate, decay)
            q = 0.5 * w @ (gram + l2 * dots) @ w + b @ w
        else:
            assert rate is not None and decay is not None
            w, q = jnp.stack([rate, decay]), jnp.float32(jnp.nan)
        delta = jax.tree.map(lambda d, v: w[0] * d + w[1] * v, d, v)

        def ratio(_):
            """(rho, whether L fell)."""
            penalty = lambda p: 0.5 * l2 * trees.dot(p, p)
            old = (objective.loss(params, batch, key) if value is None else value) + penalty(theta)
            moved = trees.add(theta, delta)
            new = objective.loss(own(_like(moved, params)), batch, key) + penalty(moved)
            return (new - old) / q, new <= old  # not true of NaN

        due = (state.count + 1) % damping_every == 0
        if rejects:
            rho, fell = ratio(None)
        elif adaptive_damping:
            rho, fell = jax.lax.cond(due, ratio, lambda _: (state.reduction_ratio, jnp.bool_(True)), None)
        else:
            rho, fell = state.reduction_ratio, jnp.bool_(True)
        keep = fell | (not rejects)
        if adaptive_damping:
            raised, lowered = lam / factor, lam * factor
            adapted = jnp.where(rho > _GOOD, lowered, jnp.where(rho >= _POOR, lam, raised))  # NaN raises
            lam = jnp.where(due, adapted, lam)
            lam = jnp.clip(jnp.where(keep, lam, raised), min_damping, max_damping)
        else:
            lam = value_at(damping, state.count + 1)
        velocity = jax.tree.map(lambda new, old: jnp.where(keep, new, old), delta, state.velocity)
        out = jax.tree.map(lambda x, u: jnp.where(keep, x, 0.0).astype(u.dtype), delta, updates)
        return out, KfacState(
            count=state.count + 1,
            velocity=velocity,
            request=state.request.with_damping(lam + l2),
            learning_rate=w[0],
            momentum=w[1],
            reduction_ratio=rho,
            rejected=state.rejected + jnp.where(keep, 0, 1),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _minimise(M: jax.Array, b: jax.Array, rate: jax.Array | None, decay: jax.Array | None) -> jax.Array:
    """The w that minimises the model, with the given ones held fixed."""
    safe = lambda x: jnp.where(x > 0, x, 1.0)
    if rate is not None and decay is not None:
        return jnp.stack([rate, decay])
    if rate is not None:
        return jnp.stack([rate, jnp.where(M[1, 1] > 0, -(b[1] + M[1, 0] * rate) / safe(M[1, 1]), 0.0)])
    if decay is not None:
        return jnp.stack([jnp.where(M[0, 0] > 0, -(b[0] + M[0, 1] * decay) / safe(M[0, 0]), 0.0), decay])
    alone = jnp.stack([jnp.where(M[0, 0] > 0, -b[0] / safe(M[0, 0]), 0.0), jnp.float32(0)])
    det = M[0, 0] * M[1, 1] - M[0, 1] * M[1, 0]
    regular = det > _SINGULAR * M[0, 0] * M[1, 1]
    both = -jnp.stack([M[1, 1] * b[0] - M[0, 1] * b[1], M[0, 0] * b[1] - M[1, 0] * b[0]]) / safe(det)
    return jnp.where(regular, both, alone)


def _like(tree: PyTree, params: PyTree) -> PyTree:
    return jax.tree.map(lambda a, p: a.astype(p.dtype), tree, params)


def _require_objective(objective: Any, batch: Any) -> None:
    if not isinstance(objective, Objective) or batch is None:
        missing = "batch" if isinstance(objective, Objective) else "objective"
        raise TypeError(
            f"kfac: an adaptive learning rate, momentum or damping, and rejection, look at the loss, so update() needs "
            f"{missing}=. A Trainer passes it; in a loop of your own call update(..., objective=objective, "
            f"batch=batch). Without them, give numbers or schedules for all three, and reject=False."
        )
    objective.require_outputs("kfac with adaptive coefficients", "numbers or schedules for all three")
