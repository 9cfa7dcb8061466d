"""What SOAP, Shampoo and KL-Shampoo share: momentum, multiplied by a root of the gradient's covariance.

    M <- b1 M + (1 - b1) g,    u = ((C + damping tr C / n)^p + eps I)^-1 M / (1 - b1^t)

over `GradientFactors`. The momentum is that of the parameters: it is taken into the eigenbasis when it is used, so that
nothing is to be done to it when the basis changes. Averages in C are debiased already, or need no correction ("kl").
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain.curvature import trees
from curvtrain.curvature.gradient_kronecker import GradientFactors
from curvtrain.curvature.request import Request
from curvtrain.optim.averages import seen
from curvtrain.optim.base import require_curvature, transformation, vectors_for
from curvtrain.optim.psgd import momentum_like, moving_average

PyTree = Any

GRAFTS = ("none", "sgd", "adam")


class ScaleByWhiteningState(NamedTuple):
    """State of `scale_by_soap`, `scale_by_shampoo` and `scale_by_kl_shampoo`.

    Attributes:
      count: int32 (), updates so far.
      mu: M, like the parameters; empty without momentum.
      nu: with graft="adam", moving average of squared gradients, like the parameters; else empty.
      request: what is asked of whoever maintains the curvature.
    """

    count: jax.Array
    mu: PyTree
    nu: PyTree
    request: Request


def scale_by_whitening(
    optimizer: str,
    b1: float,
    b2: float,
    eps: float,
    *,
    fit: str | None,
    eigenvalues: str,
    p: float = 0.5,
    damping: float = 0.0,
    nesterov: bool = False,
    graft: str = "none",
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The link of the three optimizers.

    Args:
      optimizer: its name, for messages.
      b1: decay of the momentum, bias-corrected; 0 keeps none.
      b2: the decay of the curvature's averages: the optimizer asks for it, and checks it.
      eps: what is added to the roots.
      fit, eigenvalues: of the curvature; fit=None takes either.
      p: the exponent of the root.
      damping: the share of the mean of a matrix's eigenvalues that is added to each.
      nesterov: whether the momentum looks one step ahead.
      graft: whose size each parameter's update gets: its own, that of the momentum ("sgd"), or of Adam's update.
      mu_dtype: of the momentum; None for float64 where a parameter is, otherwise float32.
    """
    _checks.number_in(f"{optimizer}(b1)", b1, 0.0, 1.0, open_high=True)
    _checks.number_in(f"{optimizer}(b2)", b2, 0.0, 1.0, open_high=True)
    _checks.number_in(f"{optimizer}(eps)", eps, 0.0, open_low=True)
    _checks.one_of(f"{optimizer}(graft)", graft, GRAFTS)
    if _checks.is_off(b1) and (nesterov or mu_dtype is not None):
        option = "nesterov" if nesterov else "mu_dtype"
        raise ValueError(f"{optimizer}({option}) is about the momentum, and b1=0 keeps none. Leave it out.")
    is_half = not isinstance(p, jax.Array) and p == 0.5
    wishes: dict[str, Any] = {"eigenvalues": eigenvalues} | ({} if fit is None else {"fit": fit})
    if not isinstance(b2, jax.Array):  # else it is checked when it is used
        wishes["decay"] = float(b2)

    def init(params):
        mu = {} if _checks.is_off(b1) else momentum_like(params, mu_dtype)
        nu = trees.zeros(params) if graft == "adam" else {}
        return ScaleByWhiteningState(
            jnp.int32(0), mu, nu, Request.of(optimizer, GradientFactors, params, wishes=wishes)
        )

    def update(updates, state, params=None, *, curvature=None, **extra):
        C = require_curvature(optimizer, curvature, GradientFactors, _estimator(fit, eigenvalues))
        _check_kind(optimizer, C, fit, eigenvalues)
        right = _check_decay(optimizer, C, b2)
        averaged, factor, mu = moving_average(updates, state.mu, state.count, b1, nesterov)
        to, back = vectors_for(optimizer, C, updates)
        root = lambda Gamma: 1.0 / ((jnp.sqrt(Gamma) if is_half else Gamma**p) + eps)
        # before the first gradient C = 0, of which a root is no size of anything: the momentum goes as it is
        whitened = back(C.map(to(averaged), lambda Gamma: jnp.where(C.begun, root(Gamma), 1.0), damping))
        out, nu = trees.scale(factor * right, whitened), state.nu
        if graft != "none":
            size, nu = _size(graft, updates, trees.scale(factor, averaged), nu, state.count, b2, eps)
            out = jax.tree.map(_of_size, out, size)
        return trees.cast(out, updates), ScaleByWhiteningState(state.count + 1, mu, nu, state.request)

    return transformation(init, update)


def _size(
    graft: str, grads: PyTree, averaged: PyTree, nu: PyTree, count: jax.Array, b2: Any, eps: Any
) -> tuple[PyTree, PyTree]:
    """(the updates whose sizes are taken, Adam's moving average)."""
    if graft == "sgd":
        return averaged, nu
    dtype = trees.width(grads)
    nu = jax.tree.map(lambda n, g: (b2 * n + (1 - b2) * jnp.square(g)).astype(dtype), nu, trees.wide(grads))
    whole = seen(b2, count + 1, dtype)
    return jax.tree.map(lambda m, n: m / (jnp.sqrt(n / whole) + eps), averaged, nu), nu


def _of_size(u: jax.Array, v: jax.Array) -> jax.Array:
    """u, as long as v; zero if u is."""
    length = jnp.linalg.norm(u.ravel())
    return jnp.where(length > 0, jnp.linalg.norm(v.ravel()) / jnp.where(length > 0, length, 1), 0) * u


def _estimator(fit: str | None, eigenvalues: str) -> str:
    options = [] if fit is None else [f"fit={fit!r}"]
    return f"curvature.GradientKronecker({', '.join([*options, f'eigenvalues={eigenvalues!r}'])})"


def _check_kind(optimizer: str, C: GradientFactors, fit: str | None, eigenvalues: str) -> None:
    """Raises TypeError unless the curvature is of the optimizer's kind."""
    if C.eigenvalues != eigenvalues or (fit is not None and C.fit != fit):
        raise TypeError(
            f"optim.{optimizer} takes the curvature of {_estimator(fit, eigenvalues)}, and this one is that of "
            f"GradientKronecker(fit={C.fit!r}, eigenvalues={C.eigenvalues!r})."
        )


def _check_decay(optimizer: str, C: GradientFactors, b2: Any) -> jax.Array | float:
    """1 if the curvature's averages have the decay b2; else raises ValueError, or NaN for a b2 that is an array."""
    if isinstance(b2, jax.Array):
        return jnp.where(jnp.abs(b2 - C.decay) < 1e-6, 1.0, jnp.nan).astype(C.weight.dtype)
    if abs(float(b2) - C.decay) > 1e-9:
        raise ValueError(
            f"optim.{optimizer}(b2={b2}) is the decay of the curvature's averages, and this curvature has "
            f"{C.decay}. Give GradientKronecker(decay={b2}), or the optimizer b2={C.decay}."
        )
    return 1.0
