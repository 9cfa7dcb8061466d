"""PSGD's step: momentum, multiplied by a fitted preconditioner, clipped.

Li, arXiv 1512.04202 and 2402.11858; over a `FittedPreconditioner`. How P is fitted is the business of `curvature.PSGD`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain.curvature import trees
from curvtrain.curvature.psgd import FittedPreconditioner
from curvtrain.curvature.request import Request
from curvtrain.optim.averages import seen
from curvtrain.optim.base import chained, require_curvature, transformation, vectors_for

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
      mu_dtype: of the moving average; None for float64 where a parameter is, otherwise float32.

    Returns:
      A transformation whose `update` needs `curvature=`, a `FittedPreconditioner`.
    """
    link = scale_by_psgd(
        b1,
        nesterov=nesterov,
        clip_rms=clip_rms,
        clip_global_norm=clip_global_norm,
        style=style,
        mu_dtype=mu_dtype,
    )
    return chained("psgd", link, learning_rate, weight_decay, mask)


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
    if _checks.is_off(b1):
        if nesterov:
            raise ValueError("psgd(nesterov=True) looks ahead along a moving average, and b1=0 keeps none.")
        if style == "adam":
            raise ValueError("psgd(style='adam') scales by the RMS of a moving average, and b1=0 keeps none.")
        if mu_dtype is not None:
            raise ValueError("psgd(mu_dtype) is that of a moving average, and b1=0 keeps none.")

    def init(params):
        mu = {} if _checks.is_off(b1) else momentum_like(params, mu_dtype)
        return ScaleByPsgdState(jnp.int32(0), mu, Request.of("psgd", FittedPreconditioner, params))

    def update(updates, state, params=None, *, curvature=None, **extra):
        P = require_curvature("psgd", curvature, FittedPreconditioner, "curvature.PSGD()")
        averaged, factor, mu = moving_average(updates, state.mu, state.count, b1, nesterov)
        to, back = vectors_for("psgd", P, updates)
        out = back(P.apply(to(averaged)))
        rms = jnp.sqrt(jnp.asarray((1 - b1) / (1 + b1), trees.width(updates))) if style == "adam" else 1.0
        limit = clip_rms
        if isinstance(limit, str):
            limit = _RMS * rms if P.whitens else None
        out = scale_each(out, factor * rms, limit)
        if clip_global_norm is not None:
            out = clip_all(out, clip_global_norm)
        out = jax.tree.map(lambda u, g: u.astype(g.dtype), out, updates)
        return out, ScaleByPsgdState(state.count + 1, mu, state.request)

    return transformation(init, update)


def momentum_like(params: PyTree, dtype: Any) -> PyTree:
    """Zeros like the parameters, float64 where one of them is, otherwise float32, unless another dtype is given."""
    dtype = dtype or trees.width(params)
    return jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)


def moving_average(
    grads: PyTree, mu: PyTree, count: jax.Array, b1: float | jax.Array, nesterov: bool
) -> tuple[PyTree, jax.Array | float, PyTree]:
    """(a vector, the factor that makes the bias-corrected average of it, the average as it is kept)."""
    grads = trees.wide(grads)
    dtype = trees.width(grads)
    if _checks.is_off(b1):
        return grads, 1.0, mu
    whole = lambda t: seen(b1, t, dtype)
    t = (count + 1).astype(dtype)
    new = jax.tree.map(lambda m, g: (b1 * m.astype(dtype) + (1 - b1) * g).astype(dtype), mu, grads)
    averaged, factor = new, 1 / whole(t)
    if nesterov:
        ahead, now, factor = b1 / whole(t + 1), (1 - b1) / whole(t), 1.0
        averaged = jax.tree.map(lambda m, g: (ahead * m + now * g).astype(dtype), new, grads)
    return averaged, factor, jax.tree.map(lambda n, m: n.astype(m.dtype), new, mu)


def scale_each(updates: PyTree, factor: jax.Array | float, rms: jax.Array | float | None = None) -> PyTree:
    """The updates times a factor, and then every leaf scaled down to an RMS, if there is one."""

    def scaled(u):
        if rms is None or not u.size:
            return u * factor
        size = factor * jnp.sqrt(jnp.mean(jnp.square(u)))
        return u * (factor / jnp.maximum(1.0, size / rms))

    return jax.tree.map(scaled, updates)


def clip_all(updates: PyTree, norm: float) -> PyTree:
    """All leaves scaled down to a norm."""
    return trees.scale(1.0 / jnp.maximum(1.0, trees.norm(updates) / norm), updates)
