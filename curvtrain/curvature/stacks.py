"""Batched factorisations of several stacks of matrices, one stack after another.

On CPUs, one matrix at a time. jaxlib's batched LAPACK kernels (0.10.2) wait for their parts on the thread pool that
they run on themselves: as many of them at once as the pool has threads wait for each other for ever. And every part
calls a LAPACK with threads of its own, which then compete: on 2 busy cores a K-FAC step with the inverses of six
factors of up to 257 x 257 took 750 ms in batches and 10 to 90 ms in turn (5 ms with OPENBLAS_NUM_THREADS=1). So each
stack depends on the result of the one before (on an accelerator, where kernels of one stream run in turn anyway, that
costs nothing), and within a stack a CPU goes matrix by matrix.
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

    def function(damped):
        L = jnp.linalg.cholesky(damped, symmetrize_input=False)
        eye = jnp.broadcast_to(jnp.eye(X.shape[-1], dtype=X.dtype), L.shape)
        half = jax.scipy.linalg.solve_triangular(L, eye, lower=True)
        return jnp.swapaxes(half, -1, -2) @ half

    return _each(function, _symmetric(X) + shift[:, None, None] * jnp.eye(X.shape[-1], dtype=X.dtype))


def eigh(X: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues (L, d), ascending, and eigenvectors (L, d, d) as columns, of a stack of symmetric matrices."""
    return _each(lambda X: tuple(jnp.linalg.eigh(X, symmetrize_input=False)), _symmetric(X))


def _each(function: Callable[[jax.Array], Any], X: jax.Array) -> Any:
    """function(X), batched; on a CPU matrix by matrix."""
    with trees.exact():
        if len(X) == 1:
            return jax.tree.map(lambda a: a[None], function(X[0]))
        return jax.lax.platform_dependent(X, cpu=lambda X: jax.lax.map(function, X), default=function)


def _symmetric(X: jax.Array) -> jax.Array:
    return 0.5 * (X + jnp.swapaxes(X, -1, -2))
