"""A Krylov basis of a symmetric linear map on pytrees, by Lanczos iteration with full re-orthogonalisation.

Everything here is done to every leaf of a vector, so its caller packs vectors into few (`packing.py`).

Symbols, after Golub and Van Loan (2013), "Matrix computations", section 10.3:

| symbol | shape | meaning |
|---|---|---|
| A | | the symmetric map, known through `matvec` |
| Q | (m, *shape) | orthonormal basis vectors q_0 ... q_{s-1}, then zeros; kept in a few blocks of rows |
| T | (m, m) | Q A Q^T, the projected map; tridiagonal except where the iteration was restarted |
| s | () | vectors in the basis = products with A that were spent |
| theta, Y | (m,), (m, m) | eigenpairs of T: Ritz values, and Ritz vectors Y^T Q |
| beta | () | norm of the part of A q_{s-1} that is orthogonal to the basis |
| leak | (m,) | the same norm for every column: non-zero for the last one, and where a restart dropped that part |

All arrays have the dtype of the start vector. What textbook Lanczos gets wrong in floating point, and what is done:

* *Orthogonality.* Each product is orthogonalised twice: by the three-term recurrence, which removes all but rounding,
  and by classical Gram-Schmidt against the whole basis; once more if that removed a noticeable part.
* *Breakdown* (A has fewer distinct eigenvalues than m, or is zero): beta is rounding noise, so the iteration restarts
  with a random vector orthogonal to the basis. T is kept as a full symmetric matrix, so restarts need no special case.
* *Repeated eigenvalues.* A Krylov sequence contains one vector of each eigenspace and so sees one copy. When the wanted
  pairs have converged, the iteration restarts once at random and stops only if no new wanted value turns up.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain.curvature import trees

PyTree = Any

_BREAKDOWN = 84  # beta below this multiple of the rounding of |T| is noise of a product: 1e-5 |T| in float32
_REMOVED = 1e-3  # a Gram-Schmidt pass that removes this share of a vector or more is followed by another
CHECK_EVERY = 5  # products between two looks at the residuals
VERIFY = 6  # products that a random restart gets to turn up an eigenvalue that was missed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Krylov:
    """A Krylov basis and the map's projection onto it; see the module's table of symbols."""

    Q: tuple[PyTree, ...]  # blocks of consecutive rows
    T: jax.Array
    leak: jax.Array
    s: jax.Array

    def combine(self, Y: jax.Array) -> PyTree:
        """Y^T Q for coordinates Y (m, w) in the basis: w vectors, every leaf (w, *param.shape)."""
        return _combine(Y, self.Q)


Select = Callable[[jax.Array, jax.Array], jax.Array]  # (theta ascending, alive) -> indices of the wanted pairs


def ritz(krylov: Krylov, select: Select) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the wanted Ritz pairs: values (w,), coordinates Y (m, w) in the basis, norms of A u - theta u (w,).

    The residual costs nothing: A u - theta u is the part of A Q^T y that is orthogonal to the basis. Its norm is at
    most sum_j |y_j| leak_j, with equality when only the last column leaks.
    """
    m = krylov.T.shape[0]
    alive = jnp.arange(m) < krylov.s
    # Dead rows get a value outside the spectrum, but near it in scale, on the diagonal: they cannot mix with live ones.
    bound = jnp.max(jnp.sum(jnp.abs(krylov.T), axis=1))  # |theta| <= |T|_inf
    outside = -2.0 * jnp.where(bound > 0, bound, 1.0)
    theta, Y = jnp.linalg.eigh(krylov.T + jnp.diag(jnp.where(alive, 0.0, outside)), symmetrize_input=True)
    # eigh sorts ascending, so the m - s dead values come first
    wanted = select(theta, jnp.arange(m) >= m - krylov.s)
    Y = jnp.where(alive[:, None], Y[:, wanted], 0.0)
    return theta[wanted], Y, jnp.abs(Y).T @ krylov.leak


def iterate(
    matvec: Callable[[PyTree], PyTree],
    start: PyTree,
    key: jax.Array,
    *,
    blocks: tuple[int, ...],
    limit: jax.Array | int,
    minimum: int,
    select: Select,
    stop: float,
    draw: Callable[[jax.Array, jax.Array], PyTree] | None = None,
) -> Krylov:
    """Builds a Krylov basis until the wanted pairs have converged or `limit` products are spent.

    Args:
      matvec: v -> A v, symmetric.
      start: the first direction, like the parameters, not zero.
      key: draws the vectors of restarts.
      blocks: rows of the blocks in which the basis is kept, adding up to m (static). Rows that are still zero are not
        read, block by block; every block costs a call per leaf.
      limit: products to spend at most, <= m (may be traced: a warm start gets fewer in the same program).
      minimum: products after which convergence is first looked at (static).
      select: which Ritz values are wanted.
      stop: a pair counts as converged when its residual is at most stop * |theta|.
      draw: (key, number) -> a random vector like `start`; `trees.random` unless given. Numbers count from 1.

    Returns:
      The basis and the projected map.
    """

    draw = draw or (lambda key, number: trees.random(key, start, number))
    dtype = trees.width(start)
    eps = float(jnp.finfo(dtype).eps)

    def body(carry: _Carry) -> _Carry:
        k, q, i = carry.krylov, carry.q, carry.krylov.s
        Q = tuple(_with_row(block, i - first, q) for first, block in _offsets(k.Q))
        w = matvec(q)  # q → A q
        w, column, beta = _orthogonalise(w, q, carry.previous, carry.beta, Q, i)
        T = k.T.at[:, i].set(column).at[i, :].set(column)
        k = Krylov(Q, T, k.leak.at[i].set(beta), i + 1)

        def look(_):
            theta, _, residual = ritz(k, select)
            tolerance = stop * jnp.abs(theta) + 10 * eps * jnp.max(jnp.abs(theta))
            converged = jnp.all(residual <= tolerance)
            return theta, converged, jnp.all(jnp.abs(theta - carry.seen) <= tolerance)

        # the first look orders a restart; one that comes too late for it has nothing to decide
        due = (k.s >= carry.look_at) & (k.s + jnp.where(carry.verifying, 1, VERIFY) <= limit)
        missed = lambda _: (carry.seen, jnp.bool_(False), jnp.bool_(False))
        theta, converged, unchanged = jax.lax.cond(due, look, missed, None)
        done = converged & carry.verifying & unchanged
        verify = converged & ~done
        restart = verify | (beta <= _BREAKDOWN * eps * jnp.max(jnp.abs(k.T)))

        def fresh(_):
            z, _, length = _orthogonal(draw(key, i + 1), Q, len(Q) - 1)
            return trees.scale(1.0 / length, z)

        following = jax.lax.cond(restart, fresh, lambda _: trees.scale(1.0 / beta, w), None)
        return _Carry(
            # the part outside the basis becomes the next basis vector, unless a restart drops it or this is the last
            krylov=Krylov(Q, k.T, k.leak.at[i].set(jnp.where(restart | done | (k.s >= limit), beta, 0.0)), k.s),
            q=following,
            previous=q,
            beta=jnp.where(restart, 0.0, beta),
            look_at=jnp.where(due, k.s + jnp.where(verify, VERIFY, CHECK_EVERY), carry.look_at),
            verifying=carry.verifying | verify,
            seen=theta,
            done=done,
        )

    rows = sum(blocks)
    wanted = jax.eval_shape(select, jnp.zeros(rows, dtype), jnp.ones(rows, bool)).shape
    T, leak = jnp.zeros((rows, rows), dtype), jnp.zeros(rows, dtype)
    empty = Krylov(tuple(trees.zeros(start, size) for size in blocks), T, leak, jnp.int32(0))
    carry = _Carry(
        krylov=empty,
        q=trees.scale(1.0 / trees.norm(start), start),
        previous=trees.zeros(start),
        beta=jnp.zeros((), dtype),
        look_at=jnp.int32(minimum),
        verifying=jnp.bool_(False),
        seen=jnp.zeros(wanted, dtype),
        done=jnp.bool_(False),
    )
    return jax.lax.while_loop(lambda c: (c.krylov.s < limit) & ~c.done, body, carry).krylov


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Carry:
    """The state of the iteration after s products."""

    krylov: Krylov
    q: PyTree  # the vector that the next product takes, and the future row s of Q
    previous: PyTree  # row s - 1
    beta: jax.Array  # <q, A previous>: zero after a restart
    look_at: jax.Array  # s at which the residuals are looked at next
    verifying: jax.Array  # whether the wanted pairs have converged once and a random restart has followed
    seen: jax.Array  # the wanted Ritz values at the last look
    done: jax.Array


def _orthogonalise(w, q, previous, beta, Q, i):
    """Returns (w, column of T, |w|): A q_i less its components on q_0 ... q_i, these components, its new length."""
    alpha = trees.dot(q, w)
    w = jax.tree.map(lambda w, q, p: w - alpha * q - beta * p, w, q, previous)  # three-term recurrence
    index = jnp.arange(sum(map(_rows, Q)))
    column = jnp.where(index == i, alpha, 0.0) + jnp.where(index == i - 1, beta, 0.0)
    w, c, length = _orthogonal(w, Q, _live(Q, i))
    return w, column + c, length


def _orthogonal(w, Q, live):
    """Returns (w less its components on the rows of the blocks up to `live`, these components (m,), its new length).

    It takes one pass of classical Gram-Schmidt, and a second one if the first removed a noticeable part.
    """
    rows = sum(map(_rows, Q))

    def against(blocks):
        def run(w):
            c = jnp.concatenate([trees.coefficients(block, w) for block in blocks])
            return trees.subtract(w, _combine(c, blocks)), jnp.pad(c, (0, rows - c.size))

        return run

    branches = [against(Q[: j + 1]) for j in range(len(Q))]

    def one_pass(carry):
        w, c, _, first, _ = carry
        w, removed = jax.lax.switch(live, branches, w)
        length = trees.norm(w)
        again = first & (jnp.linalg.norm(removed) > _REMOVED * length)
        return w, c + removed, length, jnp.bool_(False), again

    # A loop, so that both passes are one piece of the program. It also keeps XLA from fusing the write of the newest
    # row into every reader of the basis, for which it would copy the basis whole in each iteration.
    dtype = trees.width(w)
    start = w, jnp.zeros(rows, dtype), jnp.zeros((), dtype), jnp.bool_(True), jnp.bool_(True)
    w, c, length, _, _ = jax.lax.while_loop(lambda carry: carry[-1], one_pass, start)
    return w, c, length


def _combine(c, Q):
    """Q^T c: a vector for coordinates c (m,), a basis of w vectors for (m, w)."""
    parts = [trees.combine(c[first : first + _rows(block)], block) for first, block in _offsets(Q)]
    return functools.reduce(trees.add, parts)


def _rows(block: PyTree) -> int:
    return jax.tree.leaves(block)[0].shape[0]


def _offsets(Q: tuple[PyTree, ...]) -> list[tuple[int, PyTree]]:
    """The blocks of a basis with the index of their first row."""
    ends = itertools.accumulate(map(_rows, Q))
    return [(end - _rows(block), block) for end, block in zip(ends, Q, strict=True)]


def _live(Q: tuple[PyTree, ...], i: jax.Array) -> jax.Array:
    """The index of the block that holds row i."""
    return sum(((i >= first).astype(jnp.int32) for first, _ in _offsets(Q)[1:]), jnp.int32(0))


def _with_row(block: PyTree, index: jax.Array, vector: PyTree) -> PyTree:
    """The block with row `index` replaced; unchanged if it has no such row. In place."""
    inside = (index >= 0) & (index < _rows(block))
    index = jnp.clip(index, 0, _rows(block) - 1)
    kept = jax.tree.map(lambda old, new: jnp.where(inside, new, old), trees.row(block, index), vector)
    return trees.with_row(block, index, kept)
