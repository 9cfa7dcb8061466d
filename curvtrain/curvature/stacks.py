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

_PANEL = 32  # columns; twice that is well below the size from which OpenBLAS starts threads, 128 in float32
_BLOCKS = 16  # panels of a matrix at most
_TOGETHER = 128  # matrices up to this size are inverted by one program


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

    On a CPU, all small sizes are inverted by one program, and those of layers with and without a bias.
    """
    kept = kept or {}
    if not X:
        return {}

    def by_panels(X, shifts, kept):
        results, before = {}, ()
        for (D, block), sizes in _groups({size: A.shape[-1] for size, A in X.items()}).items():
            room = lambda A, D=D: jnp.pad(A, ((0, 0), *2 * ((0, D - A.shape[-1]),)))
            d = jnp.concatenate([jnp.full(len(X[size]), X[size].shape[-1], jnp.int32) for size in sizes])
            due = jnp.concatenate([_due(kept.get(size), len(X[size])) for size in sizes])
            A = jnp.concatenate([room(X[size]) for size in sizes])
            A = _symmetric(A, d, jnp.concatenate([shifts[size] for size in sizes])) + _zero_of(before)
            panels = jnp.where(due, -(-d // block), jnp.int32(0))
            before = whole = jax.lax.map(lambda v, block=block: _swept(v[0], v[1], block), (A, panels))
            start = 0
            for size in sizes:
                d, stop = X[size].shape[-1], start + len(X[size])
                results[size], start = _keep(kept.get(size), whole[start:stop, :d, :d]), stop
        return {size: results[size] for size in X}

    def by_size(X, shifts, kept):
        damped = {size: A + shifts[size][:, None, None] * jnp.eye(A.shape[-1], dtype=A.dtype) for size, A in X.items()}
        return in_turn(lambda size, A: _together(_by_cholesky, (A,), kept.get(size)), damped)

    with trees.exact():
        return jax.lax.platform_dependent(dict(X), dict(shifts), dict(kept), cpu=by_panels, default=by_size)


def inverse(X: jax.Array, shift: jax.Array) -> jax.Array:
    """The same for one array."""
    return inverses({"": X}, {"": shift})[""]


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


def qr(X: jax.Array) -> jax.Array:
    """The orthogonal factors Q (L, d, d) of matrices (L, d, d)."""
    return _each(lambda X: jnp.linalg.qr(X)[0], (X,), None)


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


def _groups(sizes: Mapping[str, int]) -> dict[tuple[int, int], list[str]]:
    """{(D, columns of a panel): names of sizes d <= D that are inverted together, in arrays (D, D)}.

    XLA compiles a loop for every D (0.3 to 0.5 s of a CPU); small matrices cost little more with room around them, as
    only their own panels are swept.
    """
    groups: dict[tuple[int, int], list[str]] = {}
    most = max((d for d in sizes.values() if d <= _TOGETHER), default=0)
    for size, d in sizes.items():
        block = -(-d // (_BLOCKS * _PANEL)) * _PANEL
        groups.setdefault((-(-max(d, most if d <= most else 0) // block) * block, block), []).append(size)
    return groups


def _symmetric(X: jax.Array, d: jax.Array, shift: jax.Array) -> jax.Array:
    """Symmetric matrices (L, D, D) whose lower triangles X has, plus shifts; with ones on the diagonal from d on."""
    eye, beyond = jnp.eye(X.shape[-1], dtype=X.dtype), jnp.arange(X.shape[-1]) >= d[:, None]
    diagonal = shift[:, None] + beyond.astype(X.dtype)
    return jnp.tril(X) + jnp.swapaxes(jnp.tril(X, -1), -1, -2) + diagonal[:, None] * eye


def _swept(X: jax.Array, panels: jax.Array | int, block: int) -> jax.Array:
    """The inverse of a positive definite matrix, panel by panel; of its part in the first so many panels.

    The sweep operator (Goodnight 1979, section 3) with blocks for pivots: after the sweep of a panel k of columns,

        X_kk -> -X_kk^-1,    X_ik -> X_ik X_kk^-1,    X_ij -> X_ij - X_ik X_kk^-1 X_kj,

    and after that of all panels X has become -X^-1. It stays symmetric throughout. One loop, so the program's size does
    not depend on the matrix's.
    """
    d = len(X)

    def sweep(k, X):
        at, zero = k * block, jnp.zeros_like(k)  # of one dtype, whatever the x64 flag
        C = jax.lax.dynamic_slice(X, (zero, at), (d, block))
        H = _half_inverse(jax.lax.dynamic_slice(C, (at, zero), (block, block)))  # X_kk^-1 = H^T H
        W = C @ H.T
        panel = jax.lax.dynamic_update_slice(W @ H, -(H.T @ H), (at, zero))
        X = jax.lax.dynamic_update_slice(X - W @ W.T, panel, (zero, at))
        return jax.lax.dynamic_update_slice(X, panel.T, (at, zero))

    return -jax.lax.fori_loop(0, panels, sweep, X)


def _half_inverse(X: jax.Array) -> jax.Array:
    """L^-1 of a small matrix L L^T.

    The factor of [[X, I], [I, infinity]] is [[L, 0], [L^-T, infinity]]: for small blocks faster than a triangular
    solve, for which LAPACK starts threads whatever the size.
    """
    eye = jnp.eye(len(X), dtype=X.dtype)
    bordered = jnp.block([[X, eye], [eye, 0.1 * jnp.finfo(X.dtype).max * eye]])
    return jnp.linalg.cholesky(bordered, symmetrize_input=False)[len(X) :, : len(X)].T
