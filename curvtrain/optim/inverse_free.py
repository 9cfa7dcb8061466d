"""What SIRF-Shampoo, IF-Shampoo and SINGD share: the gradient multiplied by P, then momentum, as in their paper.

| symbol | meaning |
|---|---|
| P | (x)_n K_n K_n^T, `curvature.InverseFreeFactors` |
| alpha1, kappa, lr | momentum, decay, learning rate |

    buf <- alpha1 buf + (P g + kappa theta),    theta <- theta - lr buf

Lin et al. (2024), arXiv 2402.03496 and 2312.05705. How K moves is the business of the estimator; the optimizer asks for
its numbers, where they are left open there, and checks them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain.curvature import trees
from curvtrain.curvature.inverse_free import InverseFreeFactors
from curvtrain.curvature.request import Request
from curvtrain.optim.base import chained, require_curvature, require_params, transformation, vectors_for
from curvtrain.optim.psgd import momentum_like

PyTree = Any

ESTIMATORS = {"gradient": "curvature.InverseFree()", "kfac": "curvature.InverseFreeKFAC()"}


class InverseFreeState(NamedTuple):
    """State of `sirfshampoo`, `if_shampoo` and `singd`, in front of the learning rate.

    Attributes:
      mu: buf, like the parameters; empty without momentum.
      request: what is asked of whoever maintains the factors.
    """

    mu: PyTree
    request: Request


def by_inverse_free(
    optimizer: str,
    statistics: str,
    learning_rate: optax.ScalarOrSchedule,
    rule: Mapping[str, tuple[str, Any]],
    momentum: tuple[str, float],
    decay: tuple[str, float],
    mask: Any,
    mu_dtype: Any,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a name.

    Args:
      optimizer: its name, for messages.
      statistics: "gradient" or "kfac", of which its factors are.
      learning_rate: a number or an optax schedule.
      rule: for each option of the estimator (and field of its rule) the optimizer's own name for it, and its value.
      momentum, decay: (the optimizer's name for it, value).
      mask: tree of bools, or a function that makes one of the parameters: which of them decay; None for all.
      mu_dtype: of the momentum; None for float64 where a parameter is, otherwise float32.
    """
    (alpha_name, alpha), (kappa_name, kappa) = momentum, decay
    _check_rule(optimizer, rule)
    _checks.number_in(f"{optimizer}({alpha_name})", alpha, 0.0, 1.0, open_high=True)
    _checks.number_in(f"{optimizer}({kappa_name})", kappa, 0.0)
    if _checks.is_off(kappa) and mask is not None:
        raise ValueError(
            f"{optimizer}(mask) says which parameters decay, and {kappa_name}=0 lets none. Leave one of them out."
        )
    if _checks.is_off(alpha) and mu_dtype is not None:
        raise ValueError(f"{optimizer}(mu_dtype) is that of the momentum, and {alpha_name}=0 keeps none. Leave it out.")
    wishes = {name: value for name, (_, value) in rule.items() if not isinstance(value, jax.Array)}
    decayed = optax.add_decayed_weights(kappa, mask)

    def init(params):
        mu = {} if _checks.is_off(alpha) else momentum_like(params, mu_dtype)
        return InverseFreeState(mu, Request.of(optimizer, InverseFreeFactors, params, wishes=wishes))

    def update(updates, state, params=None, *, curvature=None, **extra):
        P = require_curvature(optimizer, curvature, InverseFreeFactors, ESTIMATORS[statistics])
        right = _check_agreed(optimizer, P, statistics, rule)
        to, back = vectors_for(optimizer, P, updates)
        out = trees.scale(right, back(P.apply(to(updates))))
        if not _checks.is_off(kappa):
            require_params(optimizer, params)
            wide: Any = trees.wide(params)
            out = decayed.update(out, decayed.init(wide), wide)[0]
        mu = state.mu
        if not _checks.is_off(alpha):
            out = jax.tree.map(lambda m, u: alpha * m.astype(u.dtype) + u, mu, out)
            mu = trees.cast(out, mu)
        return trees.cast(out, updates), InverseFreeState(mu, state.request)

    return chained(optimizer, transformation(init, update), learning_rate, 0.0, None)


def _check_rule(optimizer: str, rule: Mapping[str, tuple[str, Any]]) -> None:
    """Raises TypeError or ValueError unless the numbers are those of a rule."""
    for field, (name, value) in rule.items():
        argument = f"{optimizer}({name})"
        if field in ("kfac_like", "normalized"):
            if not isinstance(value, bool):
                raise TypeError(f"{argument} should be True or False, not {value!r}.")
        elif field == "momentum":
            _checks.number_in(argument, value, 0.0, 1.0, open_high=True)
        elif field == "rate":
            _checks.number_in(argument, value, 0.0, 1.0, open_low=True, open_high=True)
        else:
            _checks.number_in(argument, value, 0.0, open_low=True)


def _check_agreed(
    optimizer: str, P: InverseFreeFactors, statistics: str, rule: Mapping[str, tuple[str, Any]]
) -> jax.Array | float:
    """1 if the factors are the optimizer's; else raises TypeError or ValueError, or NaN where a number is traced."""
    if P.statistics != statistics:
        raise TypeError(
            f"optim.{optimizer} takes the factors of {ESTIMATORS[statistics]}, and these are those of "
            f"{ESTIMATORS[P.statistics]}."
        )
    right: jax.Array | float = 1.0
    dtype = jnp.dtype(P.view.width)
    for field, (name, value) in rule.items():
        have = P.rule.normalized if field == "normalized" else getattr(P.rule, field)
        if isinstance(value, jax.Array):
            right = right * jnp.where(jnp.abs(value - have) <= 1e-6 * abs(have), 1.0, jnp.nan).astype(dtype)
        elif value != have:
            estimator = ESTIMATORS[statistics].removesuffix("()")
            raise ValueError(
                f"optim.{optimizer}({name}={value}) is the {field} of the factors, and these have {have}. Give "
                f"{estimator}({field}={value}), or the optimizer {name}={have}."
            )
    return right
