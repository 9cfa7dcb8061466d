"""The second derivatives of an objective's regulariser, in the statistics of layers.

Blocks that are kept as they are, a diagonal `D2` or dense blocks `F`, get the diagonal of its Hessian, as if it were a
part of every example's curvature. Kronecker factors have no place for a sum: they leave it out.
"""

import jax
import jax.numpy as jnp

from curvtrain._keys import Purpose, fold
from curvtrain.curvature import trees
from curvtrain.curvature.capture.layers import Layer
from curvtrain.objective import Objective

Arrays = dict[str, jax.Array]


def penalty_diagonal(objective: Objective, params, key: jax.Array | None):
    """r * (H r) for random signs r and the Hessian H of the regulariser, like the parameters.

    It is the diagonal of H where H is diagonal, as that of a sum over parameters is, and has it as its mean elsewhere
    (Bekas et al. 2007).
    """
    params = trees.wide(params)
    leaves, treedef = jax.tree.flatten(params)
    key = jax.random.key(0) if key is None else fold(key, Purpose.PENALTY)
    keys = jax.random.split(key, len(leaves))
    r = treedef.unflatten([jax.random.rademacher(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)])
    Hr = jax.jvp(jax.grad(objective.penalty), (params,), (r,))[1]
    return jax.tree.map(jnp.multiply, r, Hr)


def with_penalty(layer: Layer, sums: Arrays, d: jax.Array) -> Arrays:
    """A layer's statistics (*scan axes, g, ...) with d (K, d_i, d_o) on the diagonals that they have."""
    added = {}
    if "D2" in sums:
        added["D2"] = sums["D2"] + d.reshape(sums["D2"].shape)
    if "F" in sums:
        F = sums["F"]
        rows = jnp.swapaxes(d, 1, 2) if F.ndim == len(layer.scan_axes) + 4 else d  # by unit, or all of M
        added["F"] = F + rows.reshape(*F.shape[:-1], 1) * jnp.eye(F.shape[-1], dtype=F.dtype)
    return sums | added
