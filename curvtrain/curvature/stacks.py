"""Batched factorisations of several stacks of matrices, one stack after another.

On CPUs, one matrix at a time. jaxlib's batched LAPACK kernels (0.10.2) wait for their parts on the thread pool that
they run on themselves: as many of them at once as the pool has threads wait for each other for ever. And every part
calls a LAPACK with threads of its own, which then compete: on 2 busy cores a K-FAC step with the inverses of six
factors of up to 257 x 257 took 750 ms in batches and 10 to 90 ms in turn (5 ms with OPENBLAS_NUM_THREADS=1). So each
stack depends on the result of the one before (on an accelerator, where kernels of one stream run in turn anyway, that
costs nothing), and within a stack a CPU goes matrix by matrix.

Inverses go further on a CPU: LAPACK sees only small blocks, for which it starts no threads, and the rest are matrix
products, which XLA runs on its own. Cholesky factors of 256 x 256 and their inverses take half of LAPACK's time then,
and nothing of what its waiting threads take from everything else.
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
    """The inverse of a positive definite matrix, block by block: L^-T L^-1 for X = L L^T."""
    block = max(_SMALL, -(-len(X) // (_BLOCKS * _SMALL)) * _SMALL)  # so that the size of the program is bounded
    return _gram(_half_inverse(X, block), block)


def _half_inverse(X: jax.Array, block: int) -> jax.Array:
    """L^-1."""
    d = len(X)
    if d <= block:
        # The factor of [[X, I], [I, infinity]] is [[L, 0], [L^-T, infinity]]: for small blocks faster than a triangular
        # solve, for which LAPACK starts threads whatever the size.
        eye = jnp.eye(d, dtype=X.dtype)
        bordered = jnp.block([[X, eye], [eye, 0.1 * jnp.finfo(X.dtype).max * eye]])
        return jnp.linalg.cholesky(bordered, symmetrize_input=False)[d:, :d].T
    k = _split(d, block)
    P = _half_inverse(X[:k, :k], block)
    W = X[k:, :k] @ P.T  # [[L_1, 0], [W, L_2]] [[L_1, 0], [W, L_2]]^T = X
    S = _half_inverse(X[k:, k:] - W @ W.T, block)
    return jnp.block([[P, jnp.zeros((k, d - k), X.dtype)], [-S @ (W @ P), S]])


def _gram(H: jax.Array, block: int) -> jax.Array:
    """H^T H of a lower triangular matrix, without the products with its zeros."""
    d = len(H)
    if d <= 4 * block:
        return H.T @ H
    k = _split(d, block)
    P, M, S = H[:k, :k], H[k:, :k], H[k:, k:]
    off = S.T @ M
    return jnp.block([[_gram(P, block) + M.T @ M, off.T], [off, _gram(S, block)]])


def _split(d: int, block: int) -> int:
    """The largest power of two of blocks that is below d."""
    k = block
    while 2 * k < d:
        k *= 2
    return k
