"""PSGD's step: momentum, multiplied by a fitted preconditioner, clipped.

Li, arXiv 1512.04202 and 2402.11858; over a `FittedPreconditioner`. How P is fitted is the business of `curvature.PSGD`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain.curvature import trees
from curvtrain.curvature.psgd import FittedPreconditioner
from curvtrain.curvature.request import Request
from curvtrain.optim.base import require_curvature, transformation, vectors_for

PyTree = Any

AUTO = "auto"
_RMS = 1.1  # a whitened update has an RMS of 1
STYLES = ("unit", "adam")


class ScaleByPsgdState(NamedTuple):
    """State of `scale_by_psgd`.

    Attributes:
      count: int32 (), updates so far.
      mu: moving average of gradients, like the parameters; empty without momentum.
      request: what is asked of whoever maintains the preconditioner.
    """

    count: jax.Array
    mu: PyTree
    request: Request


def psgd(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    *,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mask: Any = None,
    clip_rms: float | str | None = AUTO,
    clip_global_norm: float | None = None,
    style: str = "unit",
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum, multiplied by P; decoupled weight decay; a learning rate.

    With `curvature.PSGD(fit="gradient")` the update has an RMS of 1, so learning rates are those of Adam, or lower, and
    are to be annealed. With "hessian" and "ggn" it is a Newton step, of natural rates of 0.01 to 1.

    Args:
      learning_rate: a number or an optax schedule.
      b1: decay of the moving average of gradients, bias-corrected; 0 keeps none.
      nesterov: whether the average looks one step ahead.
      weight_decay: coefficient of the parameters that are added to the update, before the learning rate.
      mask: tree of bools, or a function that makes one of the parameters: which of them decay.
      clip_rms: every parameter's update is scaled down to this RMS; "auto": 1.1 if gradients are whitened, otherwise
        None, for no such limit.
      clip_global_norm: the whole update is scaled down to this norm, before the decay.
      style: "unit" leaves the update as it is; "adam" scales it by sqrt((1 - b1) / (1 + b1)), the RMS of an average of
        independent gradients: for `PSGD(momentum=b1)`, which whitens the average itself, that allows Adam's rates.
      mu_dtype: of the moving average; None for float32.

    Returns:
      A transformation whose `update` needs `curvature=`, a `FittedPreconditioner`.
    """
    if not (callable(learning_rate) or isinstance(learning_rate, jax.Array)):
        _checks.number_in("psgd(learning_rate)", learning_rate, 0.0)
    _checks.number_in("psgd(weight_decay)", weight_decay, 0.0)
    links: list[optax.GradientTransformation] = [
        scale_by_psgd(
            b1,
            nesterov=nesterov,
            clip_rms=clip_rms,
            clip_global_norm=clip_global_norm,
            style=style,
            mu_dtype=mu_dtype,
        )
    ]
    if weight_decay:
        links.append(optax.add_decayed_weights(weight_decay, mask))
    return optax.chain(*links, optax.scale_by_learning_rate(learning_rate))


def scale_by_psgd(
    b1: float = 0.9,
    *,
    nesterov: bool = False,
    clip_rms: float | str | None = AUTO,
    clip_global_norm: float | None = None,
    style: str = "unit",
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """`psgd` without its learning rate, sign and weight decay: a link of a chain. Arguments as there."""
    _checks.number_in("psgd(b1)", b1, 0.0, 1.0, open_high=True)
    if isinstance(clip_rms, str):
        _checks.one_of("psgd(clip_rms)", clip_rms, (AUTO,))
    elif clip_rms is not None:
        _checks.number_in("psgd(clip_rms)", clip_rms, 0.0, open_low=True)
    if clip_global_norm is not None:
        _checks.number_in("psgd(clip_global_norm)", clip_global_norm, 0.0, open_low=True)
    _checks.one_of("psgd(style)", style, STYLES)
    if nesterov and not b1:
        raise ValueError("psgd(nesterov=True) looks ahead along a moving average, and b1=0 keeps none.")

    def init(params):
        mu = momentum_like(params, mu_dtype) if b1 else {}
        return ScaleByPsgdState(jnp.int32(0), mu, Request.of("psgd", FittedPreconditioner, params))

    def update(updates, state, params=None, *, curvature=None, **extra):
        P = require_curvature("psgd", curvature, FittedPreconditioner, "curvature.PSGD()")
        averaged, mu = moving_average(updates, state.mu, state.count, b1, nesterov)
        to, back = vectors_for("psgd", P, updates)
        out = back(P.apply(to(averaged)))
        if style == "adam":
            out = trees.scale(math.sqrt((1 - b1) / (1 + b1)), out)
        limit = clip_rms
        if isinstance(limit, str):
            limit = _RMS * (math.sqrt((1 - b1) / (1 + b1)) if style == "adam" else 1.0) if P.whitens else None
        if limit is not None:
            out = clip_each(out, limit)
        if clip_global_norm is not None:
            out = clip_all(out, clip_global_norm)
        out = jax.tree.map(lambda u, g: u.astype(g.dtype), out, updates)
        return out, ScaleByPsgdState(state.count + 1, mu, state.request)

    return transformation(init, update)


def momentum_like(params: PyTree, dtype: Any) -> PyTree:
    """Zeros like the parameters, float32 unless another dtype is given."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, dtype or jnp.float32), params)


def moving_average(grads: PyTree, mu: PyTree, count: jax.Array, b1: float, nesterov: bool) -> tuple[PyTree, PyTree]:
    """(the bias-corrected average in float32, the average as it is kept)."""
    grads = trees.float32(grads)
    if not b1:
        return grads, mu
    whole = lambda t: -jnp.expm1(t * math.log(b1))  # 1 - b1^t, to all digits
    t = count + 1
    new = jax.tree.map(lambda m, g: b1 * m.astype(jnp.float32) + (1 - b1) * g, mu, grads)
    if nesterov:
        ahead, now = b1 / whole(t + 1), (1 - b1) / whole(t)
        averaged = jax.tree.map(lambda m, g: ahead * m + now * g, new, grads)
    else:
        averaged = trees.scale(1 / whole(t), new)
    return averaged, jax.tree.map(lambda n, m: n.astype(m.dtype), new, mu)


def clip_each(updates: PyTree, rms: float) -> PyTree:
    """Every leaf scaled down to an RMS."""
    scale = lambda u: u / jnp.maximum(1.0, jnp.sqrt(jnp.mean(jnp.square(u))) / rms) if u.size else u
    return jax.tree.map(scale, updates)


def clip_all(updates: PyTree, norm: float) -> PyTree:
    """All leaves scaled down to a norm."""
    return trees.scale(1.0 / jnp.maximum(1.0, trees.norm(updates) / norm), updates)
