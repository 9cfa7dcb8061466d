"""Batched factorisations of several stacks of matrices, one stack after another.

On CPUs, one matrix at a time. jaxlib's batched LAPACK kernels (0.10.2) wait for their parts on the thread pool that
they run on themselves: as many of them at once as the pool has threads wait for each other for ever. And every part
calls a LAPACK with threads of its own, which then compete: on 2 busy cores a K-FAC step with the inverses of six
factors of up to 257 x 257 took 750 ms in batches and 10 to 90 ms in turn (5 ms with OPENBLAS_NUM_THREADS=1). So each
stack depends on the result of the one before (on an accelerator, where kernels of one stream run in turn anyway, that
costs nothing), and within a stack a CPU goes matrix by matrix.

Inverses go further on a CPU: LAPACK sees only small blocks, for which it starts no threads, and the rest are matrix
products, which XLA runs on its own: for 257 x 257 two thirds of the time of LAPACK's Cholesky factor and inverse, for
1001 x 1001 a sixth (2 busy cores), and nothing of what LAPACK's waiting threads take from everything else.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain.curvature import trees

PyTree = Any

_SMALL = 32  # twice that is well below the size from which OpenBLAS factorises in several threads, 128 in float32
_BLOCKS = 16  # at most, on the diagonal of a matrix


def in_turn(
    function: Callable[[str, jax.Array], PyTree], arrays: Mapping[str, jax.Array], after: PyTree = ()
) -> dict[str, Any]:
    """{name: function(name, array)}, each array only once the result before is there; the first, once `after` is."""
    found, before = {}, after
    for name, array in arrays.items():
        before = found[name] = function(name, array + _zero_of(before))
    return found


def _zero_of(results: PyTree) -> jax.Array:
    """Zero, whatever the results, in a way that compilers do not see through."""
    entries = [leaf.ravel()[0].astype(jnp.float32) for leaf in jax.tree.leaves(results)]
    return jnp.minimum(jnp.abs(jnp.nan_to_num(sum(entries, jnp.float32(0)))), 0.0)


Kept = tuple[jax.Array, PyTree] | None  # (which matrices are due (L,), the results that stand for the others)


def inverse(X: jax.Array, shift: jax.Array, kept: Kept = None) -> jax.Array:
    """(X + shift I)^-1 of a stack (L, d, d) of positive semi-definite matrices, shift (L,), by Cholesky.

    Reads the lower triangles. A matrix that is not positive definite gives NaN; whether an inverse is finite shows on
    its diagonal. Matrices that are not due cost nothing on a CPU; elsewhere a stack does of which none is due.
    """

    def damped(X, shift):
        return X + shift[..., None, None] * jnp.eye(X.shape[-1], dtype=X.dtype)

    def batched(X, shift):
        L = jnp.linalg.cholesky(damped(X, shift), symmetrize_input=False)
        eye = jnp.broadcast_to(jnp.eye(X.shape[-1], dtype=X.dtype), L.shape)
        half = jax.scipy.linalg.solve_triangular(L, eye, lower=True)
        return jnp.swapaxes(half, -1, -2) @ half

    return _each(lambda X, shift: _inverse(damped(X, shift)), batched, (X, shift), kept)


def eigh(X: jax.Array, kept: Kept = None) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues (L, d), ascending, and eigenvectors (L, d, d) as columns, of a stack of symmetric matrices."""
    function = lambda X: tuple(jnp.linalg.eigh(X, symmetrize_input=False))
    return _each(function, function, (0.5 * (X + jnp.swapaxes(X, -1, -2)),), kept)


def _each(one: Callable[..., Any], batched: Callable[..., Any], stacks: tuple[jax.Array, ...], kept: Kept) -> Any:
    """batched(*stacks); on a CPU `one` of every matrix of them."""

    def single(arguments):
        stacks, kept = arguments
        return one(*stacks) if kept is None else jax.lax.cond(kept[0], lambda: one(*stacks), lambda: kept[1])

    def each(stacks, kept):
        if len(stacks[0]) == 1:
            return jax.tree.map(lambda a: a[None], single(jax.tree.map(lambda a: a[0], (stacks, kept))))
        return jax.lax.map(single, (stacks, kept))

    def together(stacks, kept):
        if kept is None:
            return batched(*stacks)
        due, old = kept
        pick = lambda a, b: jnp.where(due.reshape(-1, *(1,) * (a.ndim - 1)), a, b)
        return jax.lax.cond(jnp.any(due), lambda: jax.tree.map(pick, batched(*stacks), old), lambda: old)

    with trees.exact():
        return jax.lax.platform_dependent(stacks, kept, cpu=each, default=together)


def _inverse(X: jax.Array) -> jax.Array:
    """The inverse of a positive definite matrix, of which the lower triangle is read, panel by panel.

    The sweep operator (Goodnight 1979, section 3) with blocks for pivots: after the sweep of a panel k of columns,

        X_kk -> -X_kk^-1,    X_ik -> X_ik X_kk^-1,    X_ij -> X_ij - X_ik X_kk^-1 X_kj,

    and after that of all panels X has become -X^-1. It stays symmetric throughout. One loop, so the program's size does
    not depend on the matrix's.
    """
    d = len(X)
    block = min(d, max(_SMALL, -(-d // (_BLOCKS * _SMALL)) * _SMALL))
    rest = -d % block
    X = jnp.tril(X)
    X = jnp.pad(X + jnp.tril(X, -1).T, (0, rest)) + jnp.diag(jnp.arange(d + rest) >= d).astype(X.dtype)

    def sweep(k, X):
        at = k * block
        C = jax.lax.dynamic_slice(X, (0, at), (d + rest, block))
        H = _half_inverse(jax.lax.dynamic_slice(C, (at, 0), (block, block)))  # X_kk^-1 = H^T H
        W = C @ H.T
        panel = jax.lax.dynamic_update_slice(W @ H, -(H.T @ H), (at, 0))
        X = jax.lax.dynamic_update_slice(X - W @ W.T, panel, (0, at))
        return jax.lax.dynamic_update_slice(X, panel.T, (at, 0))

    return -jax.lax.fori_loop(0, (d + rest) // block, sweep, X)[:d, :d]


def _half_inverse(X: jax.Array) -> jax.Array:
    """L^-1 of a small matrix L L^T.

    The factor of [[X, I], [I, infinity]] is [[L, 0], [L^-T, infinity]]: for small blocks faster than a triangular
    solve, for which LAPACK starts threads whatever the size.
    """
    eye = jnp.eye(len(X), dtype=X.dtype)
    bordered = jnp.block([[X, eye], [eye, 0.1 * jnp.finfo(X.dtype).max * eye]])
    return jnp.linalg.cholesky(bordered, symmetrize_input=False)[len(X) :, : len(X)].T
