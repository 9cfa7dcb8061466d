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
_STEP = 8  # sizes of small matrices are multiples of it


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


def inverses(
    X: Mapping[str, jax.Array], shifts: Mapping[str, jax.Array], kept: Mapping[str, Kept] | None = None
) -> dict[str, jax.Array]:
    """(X + shift I)^-1 of arrays (L, d, d) of positive semi-definite matrices, shifts (L,), in turn.

    Reads the lower triangles. A matrix that is not positive definite gives NaN; whether an inverse is finite shows on
    its diagonal. Matrices that are not due cost nothing on a CPU; elsewhere an array does of which none is due.

    On a CPU, sizes with equally many panels are inverted by one program: those of layers with and without a bias.
    """
    kept = kept or {}
    if not X:
        return {}
    damped = {size: _damped(X[size], shifts[size]) for size in X}

    def by_panels(damped, kept):
        groups: dict[tuple[int, int], list[str]] = {}
        for size, A in damped.items():
            groups.setdefault(_panels(A.shape[-1]), []).append(size)
        results, before = {}, ()
        for (count, block), sizes in groups.items():
            wide = lambda A, count=count, block=block: jax.vmap(lambda A: _padded(A, count * block))(A)
            A = jnp.concatenate([wide(damped[size]) for size in sizes]) + _zero_of(before)
            due = jnp.concatenate([_due(kept.get(size), len(damped[size])) for size in sizes])
            always = all(kept.get(size) is None for size in sizes)
            sweep = lambda A, block=block: _swept(A, block)
            one = lambda v, sweep=sweep: jax.lax.cond(v[1], sweep, lambda A: A, v[0])
            before = whole = jax.lax.map(sweep, A) if always else jax.lax.map(one, (A, due))
            start = 0
            for size in sizes:
                d, stop = damped[size].shape[-1], start + len(damped[size])
                results[size], start = _keep(kept.get(size), whole[start:stop, :d, :d]), stop
        return {size: results[size] for size in damped}

    def by_size(damped, kept):
        return in_turn(lambda size, A: _together(_by_cholesky, (A,), kept.get(size)), damped)

    with trees.exact():
        return jax.lax.platform_dependent(damped, dict(kept), cpu=by_panels, default=by_size)


def inverse(X: jax.Array, shift: jax.Array) -> jax.Array:
    """The same for one array."""
    return inverses({"": X}, {"": shift})[""]


def _damped(X: jax.Array, shift: jax.Array) -> jax.Array:
    return X + shift[..., None, None] * jnp.eye(X.shape[-1], dtype=X.dtype)


def _by_cholesky(A: jax.Array) -> jax.Array:
    """L^-T L^-1 for A = L L^T, of one matrix or several."""
    L = jnp.linalg.cholesky(A, symmetrize_input=False)
    eye = jnp.broadcast_to(jnp.eye(A.shape[-1], dtype=A.dtype), L.shape)
    half = jax.scipy.linalg.solve_triangular(L, eye, lower=True)
    return jnp.swapaxes(half, -1, -2) @ half


def eigh(X: jax.Array, kept: Kept = None) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues (L, d), ascending, and eigenvectors (L, d, d) as columns, of an array of symmetric matrices."""
    return _each(_eigh, (0.5 * (X + jnp.swapaxes(X, -1, -2)),), kept)


def _eigh(X: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(X, symmetrize_input=False)
    return values, vectors


def _each(function: Callable[..., Any], arrays: tuple[jax.Array, ...], kept: Kept) -> Any:
    """function(*arrays); on a CPU of every matrix of them."""

    def single(arguments):
        arrays, kept = arguments
        return function(*arrays) if kept is None else jax.lax.cond(kept[0], lambda: function(*arrays), lambda: kept[1])

    def each(arrays, kept):
        if len(arrays[0]) == 1:
            return jax.tree.map(lambda a: a[None], single(jax.tree.map(lambda a: a[0], (arrays, kept))))
        return jax.lax.map(single, (arrays, kept))

    with trees.exact():
        together = lambda arrays, kept: _together(function, arrays, kept)
        return jax.lax.platform_dependent(arrays, kept, cpu=each, default=together)


def _together(function: Callable[..., Any], arrays: tuple[jax.Array, ...], kept: Kept) -> Any:
    """function of all matrices in a batch, if any of them is due."""
    if kept is None:
        return function(*arrays)
    return jax.lax.cond(jnp.any(kept[0]), lambda: _keep(kept, function(*arrays)), lambda: kept[1])


def _keep(kept: Kept, new: PyTree) -> PyTree:
    """The new results of those that were due."""
    if kept is None:
        return new
    pick = lambda a, b: jnp.where(kept[0].reshape(-1, *(1,) * (a.ndim - 1)), a, b)
    return jax.tree.map(pick, new, kept[1])


def _due(kept: Kept, count: int) -> jax.Array:
    return jnp.ones(count, bool) if kept is None else kept[0]


# -- panel by panel ----------------------------------------------------------------------------------------------------


def _panels(d: int) -> tuple[int, int]:
    """(number of panels, columns of each) of a matrix of size d."""
    if d <= _SMALL:
        return 1, -(-d // _STEP) * _STEP
    block = -(-d // (_BLOCKS * _SMALL)) * _SMALL
    return -(-d // block), block


def _padded(X: jax.Array, d: int) -> jax.Array:
    """The symmetric matrix whose lower triangle X has, with ones on the diagonal up to size d."""
    rest = d - len(X)
    lower = jnp.tril(X)
    ones = jnp.diag(jnp.arange(d) >= len(X)).astype(X.dtype)
    return jnp.pad(lower + jnp.tril(X, -1).T, (0, rest)) + ones


def _swept(X: jax.Array, block: int) -> jax.Array:
    """The inverse of a positive definite matrix, panel by panel.

    The sweep operator (Goodnight 1979, section 3) with blocks for pivots: after the sweep of a panel k of columns,

        X_kk -> -X_kk^-1,    X_ik -> X_ik X_kk^-1,    X_ij -> X_ij - X_ik X_kk^-1 X_kj,

    and after that of all panels X has become -X^-1. It stays symmetric throughout. One loop, so the program's size does
    not depend on the matrix's.
    """
    d = len(X)

    def sweep(k, X):
        at = k * block
        C = jax.lax.dynamic_slice(X, (0, at), (d, block))
        H = _half_inverse(jax.lax.dynamic_slice(C, (at, 0), (block, block)))  # X_kk^-1 = H^T H
        W = C @ H.T
        panel = jax.lax.dynamic_update_slice(W @ H, -(H.T @ H), (at, 0))
        X = jax.lax.dynamic_update_slice(X - W @ W.T, panel, (0, at))
        return jax.lax.dynamic_update_slice(X, panel.T, (at, 0))

    return -jax.lax.fori_loop(0, d // block, sweep, X)


def _half_inverse(X: jax.Array) -> jax.Array:
    """L^-1 of a small matrix L L^T.

    The factor of [[X, I], [I, infinity]] is [[L, 0], [L^-T, infinity]]: for small blocks faster than a triangular
    solve, for which LAPACK starts threads whatever the size.
    """
    eye = jnp.eye(len(X), dtype=X.dtype)
    bordered = jnp.block([[X, eye], [eye, 0.1 * jnp.finfo(X.dtype).max * eye]])
    return jnp.linalg.cholesky(bordered, symmetrize_input=False)[len(X) :, : len(X)].T
