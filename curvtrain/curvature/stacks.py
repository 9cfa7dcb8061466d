"""Batched factorisations of several stacks of matrices, one stack after another.

jaxlib's batched LAPACK kernels (0.10.2, CPU) wait for their parts on the thread pool that they run on themselves: as
many of them at once as the pool has threads wait for each other for ever. So each stack depends on the result of the
one before. On an accelerator, where kernels of one stream run in turn anyway, that costs nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain.curvature import trees

PyTree = Any


def in_turn(
    function: Callable[[str, jax.Array], PyTree], stacks: Mapping[str, jax.Array], after: PyTree = ()
) -> dict[str, Any]:
    """{name: function(name, stack)}, each stack only once the one before is done; the first, once `after` is."""
    found, before = {}, after
    for name, stack in stacks.items():
        before = found[name] = function(name, stack + _zero_of(before))
    return found


def _zero_of(results: PyTree) -> jax.Array:
    """Zero, whatever the results, in a way that compilers do not see through."""
    entries = [leaf.ravel()[0].astype(jnp.float32) for leaf in jax.tree.leaves(results)]
    return jnp.minimum(jnp.abs(jnp.nan_to_num(sum(entries, jnp.float32(0)))), 0.0)


def inverse(X: jax.Array, shift: jax.Array) -> jax.Array:
    """(X + shift I)^-1 of a stack (L, d, d) of positive semi-definite matrices, shift (L,), by Cholesky."""
    eye = jnp.eye(X.shape[-1], dtype=X.dtype)
    with trees.exact():
        L = jnp.linalg.cholesky(_symmetric(X) + shift[:, None, None] * eye)
        half = jax.scipy.linalg.solve_triangular(L, jnp.broadcast_to(eye, X.shape), lower=True)
        return jnp.swapaxes(half, -1, -2) @ half


def eigh(X: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues (L, d), ascending, and eigenvectors (L, d, d) as columns, of a stack of symmetric matrices."""
    with trees.exact():
        values, Q = jnp.linalg.eigh(_symmetric(X), symmetrize_input=False)
    return values, Q


def _symmetric(X: jax.Array) -> jax.Array:
    return 0.5 * (X + jnp.swapaxes(X, -1, -2))
