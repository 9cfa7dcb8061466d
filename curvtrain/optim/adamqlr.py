"""AdamQLR: the direction of any optimizer, Adam's by default, with learning rate and damping of a quadratic model.

Clarke, Su, Hernandez-Lobato (2024), arXiv 2310.14963, section 3 and algorithm 1.

| symbol | shape | meaning |
|---|---|---|
| theta, g | params | parameters; gradient of L |
| d | params | the direction of the inner optimizer; theta moves along -d |
| B | | the GGN, or the Hessian, of the batch |
| q | () | d^T B d |
| lambda | () | damping |
| alpha | () | rate, g^T d / (q + lambda d^T d): the minimum of the damped model along -d |
| M | () | 1/2 alpha^2 q - alpha g^T d: the change of L that the model predicts |
| rho | () | (L(theta - alpha d) - L(theta)) / M: the reduction ratio, on the same batch and with the same key |

What the paper leaves unguarded is guarded here: with momentum, d may not lead downhill, and alpha is then negative; and
where q vanishes, alpha grows without bound. `faithful=True` is the paper's.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain._extra import accepting
from curvtrain.curvature import trees
from curvtrain.curvature.products import ggn_gram, hvp
from curvtrain.objective import Objective
from curvtrain.optim.base import require_objective, require_params, require_transformation, transformation

PyTree = Any

CURVATURES = ("ggn", "hessian")
_GOOD, _POOR = 0.75, 0.25  # reduction ratios that lower and raise the damping
_REMEMBERED = 16  # rates, whose median bounds the next one


class AdamQlrState(NamedTuple):
    """State of `adamqlr`.

    Attributes:
      count: int32 (), updates so far.
      inner: the inner optimizer's.
      damping: lambda of the next update.
      learning_rate: alpha of the last update, 0 if it was not made.
      reduction_ratio: rho of the last update; NaN before the first.
      rates: the last `_REMEMBERED` rates of updates that were made, NaN before; the newest is anywhere.
      rejected: int32 (), updates that were not made so far.
    """

    count: jax.Array
    inner: Any
    damping: jax.Array
    learning_rate: jax.Array
    reduction_ratio: jax.Array
    rates: jax.Array
    rejected: jax.Array


def adamqlr(
    base: optax.GradientTransformation | None = None,
    *,
    initial_damping: float = 1e-3,
    damping_decay: float = 0.5,
    damping_growth: float = 2.0,
    min_damping: float = 1e-8,
    max_damping: float = 1e8,
    curvature: str = "ggn",
    max_learning_rate: float | None = None,
    max_growth: float = 10.0,
    amplification: float = 1.0,
    weight_decay: float = 0.0,
    reject: bool = True,
    faithful: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Steps along another optimizer's direction whose length, and whose damping, a quadratic model chooses.

    The paper's settings: untuned 1e-3, 0.5, 2 and max_learning_rate None or 0.1; tuned 1, 0.95, 1.0526, None or 0.03.

    Args:
      base: gives the direction, uphill as optax's `scale_by_*` do; None: `optax.scale_by_adam()`. `optax.identity()` is
        SGD with these rates.
      initial_damping: lambda of the first update. It adds lambda d^T d to the model's curvature, and Adam's d^T d is at
        first the number of parameters.
      damping_decay, damping_growth: by which lambda is multiplied where rho > 3/4 and where rho < 1/4, or not finite.
      min_damping, max_damping: bounds of lambda.
      curvature: "ggn", or "hessian", of which a negative q counts by its size.
      max_learning_rate: bound of alpha, or None.
      max_growth: alpha is at most this times the median of the last 16 rates: where q vanishes nothing else bounds it.
      amplification: by which alpha is multiplied after it was bounded.
      weight_decay: kappa; theta decays by alpha kappa theta.
      reject: whether an update after which the batch's loss is larger, or not finite, is left out and lambda raised.
      faithful: the paper's: alpha may be negative and is bounded by max_learning_rate alone, M has lambda in it, the
        decay is kappa theta, and nothing is rejected.

    Returns:
      A transformation whose `update` needs the parameters, `objective=` and `batch=` (and `key=`, and `value=` to save
      a forward pass). It costs a forward-mode product, or a Hessian-vector product, and a forward pass. No rate is to
      be chained after it.
    """
    base = optax.scale_by_adam() if base is None else base
    step = _AdamQlr(
        base,
        initial_damping,
        damping_decay,
        damping_growth,
        min_damping,
        max_damping,
        curvature,
        max_learning_rate,
        max_growth,
        amplification,
        weight_decay,
        reject,
        faithful,
    )
    return transformation(step.init, step.update)


@dataclasses.dataclass(frozen=True)
class _AdamQlr:
    """The options of `adamqlr`, checked, and its two functions."""

    base: Any
    initial_damping: float
    damping_decay: float
    damping_growth: float
    min_damping: float
    max_damping: float
    curvature: str
    max_learning_rate: float | None
    max_growth: float
    amplification: float
    weight_decay: float
    reject: bool
    faithful: bool

    def __post_init__(self):
        require_transformation("adamqlr(base)", self.base)
        for name in ("initial_damping", "min_damping", "weight_decay"):
            _checks.number_in(f"adamqlr({name})", getattr(self, name), 0.0)
        _checks.number_in("adamqlr(max_damping)", self.max_damping, self.min_damping)
        _checks.number_in("adamqlr(damping_decay)", self.damping_decay, 0.0, 1.0, open_low=True)
        _checks.number_in("adamqlr(damping_growth)", self.damping_growth, 1.0)
        _checks.number_in("adamqlr(max_growth)", self.max_growth, 1.0, open_low=True)
        _checks.number_in("adamqlr(amplification)", self.amplification, 0.0, open_low=True)
        _checks.one_of("adamqlr(curvature)", self.curvature, CURVATURES)
        if self.max_learning_rate is not None:
            _checks.number_in("adamqlr(max_learning_rate)", self.max_learning_rate, 0.0, open_low=True)

    def init(self, params: PyTree) -> AdamQlrState:
        """The state before the first update."""
        dtype = trees.width(params)
        number = lambda value: jnp.asarray(value, dtype)
        return AdamQlrState(
            count=jnp.int32(0),
            inner=self.base.init(params),
            damping=number(self.initial_damping),
            learning_rate=number(0),
            reduction_ratio=number(jnp.nan),
            rates=jnp.full(_REMEMBERED, jnp.nan, dtype),
            rejected=jnp.int32(0),
        )

    def update(self, updates, state, params=None, *, objective: Any = None, batch=None, key=None, **extra):
        """One step; see `adamqlr`."""
        require_params("adamqlr", params)
        require_objective("adamqlr looks at the loss and its curvature", objective, batch)
        if self.curvature == "ggn":
            objective.require_outputs("adamqlr(curvature='ggn')", "adamqlr(curvature='hessian')")
        base = accepting(self.base)
        known = {"objective": objective, "batch": batch, "key": key, **extra}
        d, inner = base.update(updates, state.inner, params, **known)
        d, g, theta = trees.wide(d), trees.wide(updates), trees.wide(params)
        q, slope, size = self._curvature_along(d, objective, params, batch, key), trees.dot(g, d), trees.dot(d, d)
        alpha, c = self._rate(q, slope, size, state)

        moved = jax.tree.map(lambda p, u: p - alpha * u, theta, d)
        at = lambda tree: objective.loss(objective.like_parameters(trees.cast(tree, params)), batch, key)
        value = extra.get("value")
        before = at(theta) if value is None else jnp.asarray(value, alpha.dtype)
        after = at(moved).astype(alpha.dtype)
        predicted = 0.5 * alpha**2 * (c if self.faithful else q) - alpha * slope
        rho = (after - before) / predicted
        made = jnp.bool_(True) if self.faithful else (alpha > 0) & ((after <= before) | (not self.reject))

        decay = self.weight_decay if self.faithful else alpha * self.weight_decay
        out = jax.tree.map(lambda u, p: jnp.where(made, -alpha * u - decay * p, 0.0), d, theta)
        fine = made & (rho > _GOOD)
        worse = ~made | ~(rho >= _POOR)  # NaN raises
        factor = jnp.where(fine, self.damping_decay, jnp.where(worse, self.damping_growth, 1.0))
        damping = jnp.clip(state.damping * factor, self.min_damping, self.max_damping).astype(state.damping.dtype)
        place = (state.count - state.rejected) % _REMEMBERED
        return trees.cast(out, updates), AdamQlrState(
            count=state.count + 1,
            inner=inner,
            damping=damping,
            learning_rate=jnp.where(made, alpha, 0.0),
            reduction_ratio=rho,
            rates=jnp.where(made, state.rates.at[place].set(alpha), state.rates),
            rejected=state.rejected + jnp.where(made, 0, 1),
        )

    def _curvature_along(self, d: PyTree, objective: Objective, params: PyTree, batch: Any, key: Any) -> jax.Array:
        """q."""
        own = objective.like_parameters
        if self.curvature == "ggn":
            return ggn_gram(objective, own(params), (own(d),), batch, key)[0, 0]
        return trees.dot(own(d), hvp(objective, own(params), own(d), batch, key))

    def _rate(
        self, q: jax.Array, slope: jax.Array, size: jax.Array, state: AdamQlrState
    ) -> tuple[jax.Array, jax.Array]:
        """(alpha, q + lambda d^T d)."""
        c = (q if self.faithful else jnp.abs(q)) + state.damping * size
        alpha = jnp.where(c != 0, slope / jnp.where(c != 0, c, 1.0), 0.0)
        limit = jnp.asarray(jnp.inf if self.max_learning_rate is None else self.max_learning_rate, alpha.dtype)
        if not self.faithful:
            usual = self.max_growth * jnp.nanmedian(state.rates)
            limit = jnp.minimum(limit, jnp.where(jnp.isnan(usual), jnp.inf, usual))
            alpha = jnp.where(slope > 0, alpha, 0.0)
        return self.amplification * jnp.clip(alpha, -limit, limit), c
