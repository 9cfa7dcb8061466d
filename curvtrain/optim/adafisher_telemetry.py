"""Whether AdaFisher's curvature does anything: its share of what gradients are divided by, and what that changes."""

from typing import Any

import jax
import jax.numpy as jnp

from curvtrain.curvature import DiagonalFactors, ReleasedFactors, trees
from curvtrain.optim.adafisher import ScaleByAdaFisherState, damping_of, direction
from curvtrain.optim.averages import divided
from curvtrain.optim.base import vectors_for

PyTree = Any


def adafisher_telemetry(opt_state: PyTree, curvature: DiagonalFactors | ReleasedFactors) -> dict[str, jax.Array]:
    """Returns scalars that say how far `adafisher` is from gradient descent with momentum.

        def report(run):
            print(optim.adafisher_telemetry(run.state.opt_state, run.state.curvature))

    It sorts as many numbers as there are parameters: call it now and then, from a hook or a loop of your own.

    Args:
      opt_state: of `adafisher`, `adafisherw` or `scale_by_adafisher`, in whatever they are wrapped.
      curvature: the one that the optimizer was given.

    Returns:
      "share_min", "share_median", "share_max": of F / (F + lambda) over the parameters with a curvature; below 1/2 the
      damping rules. "cosine": of the angle between the update and the momentum; above 0.999 the optimizer is gradient
      descent. It is 0 before the first update.

    Raises:
      ValueError: no such state, or several; or one without momentum.
    """
    is_end = lambda node: isinstance(node, ScaleByAdaFisherState)
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_end) if is_end(node)]
    if len(found) != 1 or not jax.tree.leaves(found[0].mu):
        what = f"{len(found)} of these" if len(found) != 1 else "one without momentum (b1=0)"
        raise ValueError(f"adafisher_telemetry(opt_state) should hold one state of optim.adafisher, not {what}.")
    (state,) = found
    to, back = vectors_for("adafisher_telemetry", curvature, state.mu)
    m = trees.wide(state.mu)
    u = back(direction(curvature, to(m), state.damping, state.floor, state.exponent))
    shares = jnp.concatenate([a.ravel() for a in jax.tree.leaves(back(_shares(curvature, to(m), state)))])
    known = shares >= 0
    return {
        "share_min": jnp.min(jnp.where(known, shares, 1.0)),
        "share_median": jnp.nanmedian(jnp.where(known, shares, jnp.nan)),
        "share_max": jnp.max(shares),
        "cosine": divided(trees.dot(u, m), trees.norm(u) * trees.norm(m)),
    }


def _shares(C: DiagonalFactors | ReleasedFactors, like: PyTree, state: ScaleByAdaFisherState) -> PyTree:
    """F / (F + lambda) like the parameters, -1 where there are no factors."""

    def share(F: jax.Array | None, v: jax.Array) -> jax.Array:
        if F is None:
            return jnp.full_like(v, -1.0)
        rest = state.damping if isinstance(C, ReleasedFactors) else damping_of(F, state.damping, state.floor)
        return divided(F, F + rest)

    return C.map(like, share)
