"""The Kronecker family: P of a tensor is a product of one small factor for each of its sides.

Li (2018), arXiv 1809.10232, in the newer geometries of `geometry.py`. Symbols as in `base.py` and `layout.py`, and:

| symbol | shape | meaning |
|---|---|---|
| X_i | | X with a factor applied along side i |
| contract_i(X) | (B, b, b) or (n,) | sum over all other axes of X[.. a ..] X[.. b ..], its blocks, or its diagonal |
| y | like h | P h |

    PRO, QUAD, QEQ   T1 = contract_i(y)       T2 = contract_i(v),        whitening (N / n_i) I
    QEP              T1 = contract_i(y_i)     T2 = contract_i(v_i),      whitening (N / n_i) Q_i Q_i^T
    EQ               T1 = contract_i(Q h)     T2 = contract_i(Q^-T v),   whitening Q_i^-T Q_i^-1 prod_j |Q_j^-1|_F^2
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from curvtrain import _checks
from curvtrain.curvature import stacks
from curvtrain.curvature.mesh import spread_spec
from curvtrain.curvature.psgd.base import ORDERS, Preconditioner, Structure, accept, choose, initial_scale
from curvtrain.curvature.psgd.geometry import GEOMETRIES, step_dense, step_diagonal, triangular_inverse
from curvtrain.curvature.psgd.layout import Bucket, Member, Side, any_order, block_for, consecutive

PyTree = Any
Factors = list[Any]  # for each side (L, B, b, b), (L, n), or None

BEYOND = ("diagonal", "none")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Kron(Preconditioner):
    """One factor for every side of every parameter: dense, block-dense, diagonal, or none.

    Attributes:
      geometry: "PRO" (Q0.5EQ1.5), "QUAD", "EQ" (triangular solves), "QEQ" or "QEP"; see `geometry.py`.
      block_size: dense factors larger than this are block-diagonal, in blocks of about this size; None for whole ones.
      max_size: sides longer than this get no dense factor.
      max_skew: nor do sides whose factor would have more than this many numbers per parameter of the tensor.
      merge: whether tensors of more than two axes are seen as matrices, split where the two sides are most alike.
      min_ndim: tensors of fewer axes get diagonal factors.
      beyond: "diagonal" or "none": what a side gets that gets no dense factor. A tensor keeps one factor at least.
      dtype: "float32" or "bfloat16" (PRO, QUAD and QEQ, at rates of 0.1 and more): how factors are stored.
      order: how a step is normalised: "bounded" by a running bound of the curvature; as in the original code without
        memory, "2nd" by the present bound, or "1st" by the size of the direction.
    """

    geometry: str = "PRO"
    _: dataclasses.KW_ONLY
    block_size: int | None = 64
    max_size: int = 8192
    max_skew: float = 2.0
    merge: bool = True
    min_ndim: int = 2
    beyond: str = "diagonal"
    dtype: str = "float32"
    order: str = "bounded"

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        _checks.one_of(f"{name}(geometry)", self.geometry, GEOMETRIES)
        if self.block_size is not None:
            _checks.positive_int(f"{name}(block_size)", self.block_size, minimum=2)
        _checks.positive_int(f"{name}(max_size)", self.max_size, minimum=0)
        _checks.number_in(f"{name}(max_skew)", self.max_skew, 0.0)
        _checks.positive_int(f"{name}(min_ndim)", self.min_ndim)
        _checks.one_of(f"{name}(beyond)", self.beyond, BEYOND)
        _checks.one_of(f"{name}(dtype)", self.dtype, DTYPES)
        _checks.one_of(f"{name}(order)", self.order, ORDERS)
        if self.dtype != "float32" and self.geometry in ("EQ", "QEP"):
            raise ValueError(
                f"{name}(dtype={self.dtype!r}) rounds the steps of geometry={self.geometry!r} away. Use "
                f"dtype='float32', or geometry='PRO'."
            )

    # -- layout --------------------------------------------------------------------------------------------------------

    def sides(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[Side, ...]]:
        """(the order of the axes, the sides) of one tensor."""
        squeezed = tuple(n for n in shape if n != 1) or (1,)
        sizes = consecutive(squeezed) if self.merge else squeezed
        kinds = ["dense" if self._dense(n, sizes) else self.beyond for n in sizes]
        if "dense" not in kinds and "diagonal" not in kinds:
            kinds[min(range(len(sizes)), key=sizes.__getitem__)] = "diagonal"
        made = [
            Side(n, kind, block_for(n, self.block_size) if kind == "dense" else 1)
            for n, kind in zip(sizes, kinds, strict=True)
        ]
        return tuple(range(len(shape))), tuple(made)

    def _dense(self, n: int, sizes: tuple[int, ...]) -> bool:
        numbers = n * block_for(n, self.block_size)
        return len(sizes) >= self.min_ndim and 1 < n <= self.max_size and numbers <= self.max_skew * math.prod(sizes)

    def buckets(self, structure: Structure) -> tuple[Bucket, ...]:
        """Tensors by their sides, in the order of the parameters."""
        found: dict[tuple[Side, ...], list[Member]] = {}
        for leaf, (shape, stack) in enumerate(zip(structure.shapes, structure.stacks, strict=True)):
            if math.prod(shape):
                order, sides = self.sides(shape[stack:])
                found.setdefault(sides, []).append(Member(leaf, math.prod(shape[:stack]), order))
        return tuple(Bucket(sides, tuple(members)) for sides, members in found.items())

    def blocks(self, structure):
        rows = []
        for bucket in self.buckets(structure):
            state = jax.eval_shape(lambda bucket=bucket: self._start(bucket))
            total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
            names = [structure.paths[member.leaf] for member in bucket.members]
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            rows.append((shown, f"{self.geometry} {bucket.name}", total))
        return rows

    # -- state ---------------------------------------------------------------------------------------------------------

    def init(self, structure):
        return {bucket.name: self._start(bucket) for bucket in self.buckets(structure)}

    def _start(self, bucket: Bucket) -> dict[str, Any]:
        dtype, count = DTYPES[self.dtype], bucket.count
        each = (self.initial_scale or 1.0) ** (1.0 / _factors(bucket))  # of P
        Q, P, L = {}, {}, {}
        for i, side in enumerate(bucket.sides):
            if side.kind == "dense":
                eye = jnp.zeros((count, side.count, side.block, side.block)) + jnp.eye(side.block)
                Q[str(i)], P[str(i)] = (math.sqrt(each) * eye).astype(dtype), (each * eye).astype(dtype)
                L[str(i)] = jnp.zeros((count, side.count))
            elif side.kind == "diagonal":
                Q[str(i)], L[str(i)] = jnp.full((count, side.size), math.sqrt(each), dtype), jnp.zeros(count)
        return {"Q": Q, "P": P, "L": L, "seen": jnp.zeros(count, bool)}

    def fit(self, structure, state, v, h, key, rate):
        new, failures = {}, jnp.int32(0)
        hs = structure.treedef.flatten_up_to(h)
        vs = None if v is None else structure.treedef.flatten_up_to(v)
        with jax.default_matmul_precision(self.precision):
            for index, bucket in enumerate(self.buckets(structure)):
                H = bucket.read(structure, hs)
                V = None if vs is None else bucket.read(structure, vs)
                noise = jax.random.fold_in(key, index)
                new[bucket.name], bad = self._fit(bucket, state[bucket.name], V, H, noise, rate)
                failures += bad
        return new, failures

    def _fit(self, bucket: Bucket, state, V, H, key, rate):
        Q, P, old_L = (_listed(bucket, state[name]) for name in ("Q", "P", "L"))
        if self.initial_scale is None:
            axes = (0, *range(2, H.ndim))
            first = jnp.any(H != 0, axis=axes) & ~state["seen"]

            def start(Q, P):
                each = initial_scale(V, H, axes, len(H) * bucket.entries) ** (1.0 / _factors(bucket))
                return [_start_where(first, jnp.sqrt(each), q) for q in Q], [_start_where(first, each, p) for p in P]

            Q, P = jax.lax.cond(jnp.any(first), start, lambda Q, P: (Q, P), Q, P)
        noisy = _masked(bucket, self.noisy(key, H))  # no noise where there is nothing
        T = self._conditions(bucket, Q, P, V, noisy)
        L: Factors = [None] * len(Q)
        for i, (side, q, pair) in enumerate(zip(bucket.sides, Q, T, strict=True)):
            if q is not None and pair is not None:
                step = step_dense if side.kind == "dense" else step_diagonal
                T1, T2 = pair
                Q[i], L[i] = step(self.geometry, q, T1, T2, rate, old_L[i], self.lipschitz_decay, order=self.order)
        Q = _balance(bucket, Q)
        P = [
            _square(q) if q is not None and side.kind == "dense" else None
            for side, q in zip(bucket.sides, Q, strict=True)
        ]
        filed = lambda factors: {str(i): a for i, a in enumerate(factors) if a is not None}
        new = {"Q": filed(Q), "P": filed(P), "L": filed(L), "seen": jnp.ones_like(state["seen"])}
        new = jax.tree.map(lambda a, old: a.astype(old.dtype), new, state)
        accepted, failed = accept(H, new, lead=1)
        return choose(accepted, new, state), jnp.sum(failed, dtype=jnp.int32)

    def _conditions(self, bucket: Bucket, Q: Factors, P: Factors, V, H) -> list[tuple[jax.Array, jax.Array] | None]:
        """(T1, T2) for every side that has a factor."""
        sides = bucket.sides
        if self.geometry == "EQ":
            return _conditions_with_inverses(bucket, Q, V, H)
        y = _apply_all(sides, [_stored(p, q) for p, q in zip(P, Q, strict=True)], H)
        found = []
        for i, (side, q) in enumerate(zip(sides, Q, strict=True)):
            if q is None:
                found.append(None)
                continue
            turned = self.geometry == "QEP"
            turn = lambda X, s=side, i=i, q=q, turned=turned: _apply(s, i, q, X) if turned else X
            if V is None:
                T2 = bucket.entries / side.size * _whole(side, _gram(side, q) if turned else _unit(side, q))
            else:
                T2 = _contract(side, i, turn(V))
            found.append((_contract(side, i, turn(y)), T2))
        return found

    # -- what it does --------------------------------------------------------------------------------------------------

    def apply(self, structure, state, vector):
        return self._map(structure, state, vector, lambda side, q, p: p if side.kind == "dense" else jnp.square(q))

    def invert(self, structure, state, vector):
        def inverse(side, q, p):
            if side.kind != "dense":
                return 1.0 / jnp.square(q)
            flat = p.reshape(-1, side.block, side.block)
            return stacks.inverse(flat, jnp.zeros(len(flat))).reshape(p.shape)

        return self._map(structure, state, vector, inverse)

    def _map(self, structure, state, vector, factor) -> PyTree:
        leaves = [a[None] for a in structure.treedef.flatten_up_to(vector)]
        out: list[Any] = [jnp.zeros((1, *shape)) for shape in structure.shapes]
        with jax.default_matmul_precision(self.precision):
            for bucket in self.buckets(structure):
                Q, P = (_listed(bucket, state[bucket.name][name]) for name in ("Q", "P"))
                used = [
                    None if q is None else factor(side, q, p) for side, q, p in zip(bucket.sides, Q, P, strict=True)
                ]
                bucket.write(structure, _apply_all(bucket.sides, used, bucket.read(structure, leaves)), out)
        return structure.treedef.unflatten([a[0] for a in out])

    def partition_specs(self, structure, state, param_specs, mesh):
        is_spec = lambda s: isinstance(s, PartitionSpec)
        specs = jax.tree.leaves(param_specs, is_leaf=is_spec)
        out = {}
        for bucket in self.buckets(structure):
            axes = [side_axes(bucket, structure, specs, i) for i in range(len(bucket.sides))]
            out[bucket.name] = jax.tree.map(lambda _: PartitionSpec(), state[bucket.name])
            for i, (side, axis) in enumerate(zip(bucket.sides, axes, strict=True)):
                for name in ("Q", "P", "L"):
                    if (leaf := state[bucket.name][name].get(str(i))) is not None:
                        out[bucket.name][name][str(i)] = factor_spec(side, leaf, axis, mesh)
        return out


@dataclasses.dataclass(frozen=True)
class Affine(Kron):
    """Every parameter as a matrix (m, n) with a left and a right factor, as in the original `affine`.

    More than two axes are shared among the two sides, in any order, so that the factors are the smallest; a vector is
    one row. A side is dense unless it is longer than `max_size`, or than `max_skew` times the other.
    """

    geometry: str = "EQ"
    _: dataclasses.KW_ONLY
    block_size: int | None = None
    max_size: int = 4096
    max_skew: float = 128.0

    def sides(self, shape):
        kept = tuple(axis for axis, n in enumerate(shape) if n != 1)
        ones = tuple(axis for axis, n in enumerate(shape) if n == 1)
        order, sizes = any_order(tuple(shape[axis] for axis in kept) or (1,))
        order = tuple(kept[axis] for axis in order) if kept else ()
        others = sizes[::-1] if len(sizes) == 2 else (1,)
        dense = [1 < n <= self.max_size and n <= self.max_skew * o for n, o in zip(sizes, others, strict=True)]
        made = [
            Side(n, "dense", block_for(n, self.block_size)) if d else Side(n, "diagonal")
            for n, d in zip(sizes, dense, strict=True)
        ]
        return (*order, *ones), tuple(made)


def _listed(bucket: Bucket, filed: dict[str, jax.Array]) -> Factors:
    """One entry for every side, float32, None where there is nothing."""
    factors = [filed.get(str(i)) for i in range(len(bucket.sides))]
    return [None if a is None else a.astype(jnp.float32) for a in factors]


def _conditions_with_inverses(bucket: Bucket, Q: Factors, V, H) -> list[tuple[jax.Array, jax.Array] | None]:
    """(T1, T2) of EQ."""
    sides, found = bucket.sides, []
    inverses = [None if q is None else _inverse_of(side, q) for side, q in zip(sides, Q, strict=True)]
    A = _apply_all(sides, Q, H)
    B = None if V is None else _apply_all(sides, [_transposed(x) for x in inverses], V)
    norms = [_square_norm(side, x) for side, x in zip(sides, inverses, strict=True)]
    for i, (side, x) in enumerate(zip(sides, inverses, strict=True)):
        if x is None:
            found.append(None)
            continue
        if B is None:
            others = math.prod((norms[j] for j in range(len(sides)) if j != i), start=jnp.ones(bucket.count))
            T2 = _along(others, x.ndim) * _whole(side, _outer(side, x))
        else:
            T2 = _contract(side, i, B)
        found.append((_contract(side, i, A), T2))
    return found


# -- along one side of a stack of tensors (k, L, *sides) ---------------------------------------------------------------


def _apply(side: Side, i: int, factor: jax.Array | None, X: jax.Array) -> jax.Array:
    if factor is None:
        return X
    if side.kind != "dense":
        return X * factor.reshape(1, factor.shape[0], *(n if j == i else 1 for j, n in enumerate(X.shape[2:])))
    return _over_probes(lambda X: _multiply(factor, _split(side, i, X)).reshape(X.shape), X)


def _multiply(factor: jax.Array, X: jax.Array) -> jax.Array:
    """The blocks (L, B, b, b) along b of X (L, before, B, b, after): matrix products without copies for a first side,
    with copies whose innermost axis stays for a last one."""
    L, before, B, b, after = X.shape
    if before == 1:
        return factor @ X.reshape(L, B, b, after)
    if after == 1:
        return jnp.swapaxes(jnp.swapaxes(X.reshape(L, before, B, b), 1, 2) @ jnp.swapaxes(factor, -1, -2), 1, 2)
    return jnp.einsum("lBab,lpBbq->lpBaq", factor, X)


def _split(side: Side, i: int, X: jax.Array) -> jax.Array:
    """(L, before, B, b, after)."""
    before, after = math.prod(X.shape[1 : 1 + i]), math.prod(X.shape[2 + i :])
    return X.reshape(X.shape[0], before, side.count, side.block, after)


def _over_probes(function, X: jax.Array) -> jax.Array:
    return function(X[0])[None] if len(X) == 1 else jax.vmap(function)(X)


def _apply_all(sides: tuple[Side, ...], factors: Factors, X: jax.Array) -> jax.Array:
    for i, (side, factor) in enumerate(zip(sides, factors, strict=True)):
        X = _apply(side, i, factor, X)
    return X


def _contract(side: Side, i: int, X: jax.Array) -> jax.Array:
    """contract_i(X), the mean over probes: (L, B, b, b) or (L, n)."""
    k = X.shape[0]
    if side.kind != "dense":
        return jnp.sum(jnp.square(X), axis=(0, *(2 + j for j in range(X.ndim - 2) if j != i))) / k
    return jnp.mean(_over_probes(lambda X: _gramian(_split(side, i, X)), X), axis=0)


def _gramian(X: jax.Array) -> jax.Array:
    """(L, B, b, b) of X (L, before, B, b, after)."""
    L, before, B, b, after = X.shape
    if before == 1:
        X = X.reshape(L, B, b, after)
        return X @ jnp.swapaxes(X, -1, -2)
    if after == 1:
        X = jnp.swapaxes(X.reshape(L, before, B, b), 1, 2)
        return jnp.swapaxes(X, -1, -2) @ X
    return jnp.einsum("lpBaq,lpBcq->lBac", X, X)


def _stored(p: jax.Array | None, q: jax.Array | None) -> jax.Array | None:
    """What of P acts on a side."""
    return p if p is not None else (None if q is None else jnp.square(q))


def _square(q: jax.Array) -> jax.Array:
    """Q^T Q."""
    return jnp.swapaxes(q, -1, -2) @ q


def _gram(side: Side, q: jax.Array) -> jax.Array:
    """Q Q^T, or its diagonal."""
    return q @ jnp.swapaxes(q, -1, -2) if side.kind == "dense" else jnp.square(q)


def _unit(side: Side, q: jax.Array) -> jax.Array:
    """I, or its diagonal."""
    return jnp.broadcast_to(jnp.eye(side.block), q.shape) if side.kind == "dense" else jnp.ones_like(q)


def _whole(side: Side, X: jax.Array) -> jax.Array:
    """X (.., B, b, b) with zeros in the rows and columns of padding."""
    mask = side.mask() if side.kind == "dense" else None
    return X if mask is None else X * mask[:, :, None] * mask[:, None, :]


def _inverse_of(side: Side, q: jax.Array) -> jax.Array:
    """Q^-1 of a triangular factor."""
    if side.kind != "dense":
        return 1.0 / q
    return triangular_inverse(q.reshape(-1, side.block, side.block)).reshape(q.shape)


def _transposed(x: jax.Array | None) -> jax.Array | None:
    return jnp.swapaxes(x, -1, -2) if x is not None and x.ndim == 4 else x


def _outer(side: Side, inverse: jax.Array) -> jax.Array:
    """Q^-T Q^-1, or its diagonal."""
    return _square(inverse) if side.kind == "dense" else jnp.square(inverse)


def _square_norm(side: Side, x: jax.Array | None) -> jax.Array:
    """|Q^-1|_F^2 (L,), of a side without factor its length."""
    if x is None:
        return jnp.float32(side.size)
    mask = side.mask() if side.kind == "dense" else None
    x = x if mask is None else x * mask[:, :, None]
    return jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))


def _masked(bucket: Bucket, X: jax.Array) -> jax.Array:
    for i, side in enumerate(bucket.sides):
        if (mask := side.mask()) is not None:
            X = X * mask.reshape(*(-1 if j == 2 + i else 1 for j in range(X.ndim)))
    return X


def _start_where(first: jax.Array, scale: jax.Array, factor: jax.Array | None) -> jax.Array | None:
    """The factor, or scale times I where it is the first time."""
    if factor is None:
        return None
    unit = jnp.eye(factor.shape[-1]) if factor.ndim == 4 else jnp.float32(1)
    return jnp.where(_along(first, factor.ndim), _along(scale, factor.ndim) * unit, factor)


def _balance(bucket: Bucket, Q: Factors) -> Factors:
    """Factors of equal size, which leaves P as it is: each scaled to the geometric mean of the largest entries."""
    if _factors(bucket) < 2:
        return Q
    largest = []
    for side, q in zip(bucket.sides, Q, strict=True):
        if q is not None:
            inside = _whole(side, q)
            largest.append(jnp.maximum(jnp.max(jnp.abs(inside), axis=tuple(range(1, q.ndim))), 1e-30))
    logs = jnp.log(jnp.stack(largest))
    factor = iter(jnp.exp(jnp.mean(logs, axis=0) - logs))
    return [None if q is None else q * _along(next(factor), q.ndim) for q in Q]


def _factors(bucket: Bucket) -> int:
    return sum(side.kind != "none" for side in bucket.sides)


def _along(x: jax.Array, ndim: int) -> jax.Array:
    """x (L,) as an array of `ndim` axes that runs along the first of them."""
    return x.reshape(-1, *(1,) * (ndim - 1))


# -- sharding ----------------------------------------------------------------------------------------------------------


def side_axes(bucket: Bucket, structure: Structure, specs: list[PartitionSpec], i: int) -> Any:
    """The mesh axes that split side i in all of a bucket's parameters alike; None if they differ, or nothing does."""
    found = set()
    for member in bucket.members:
        stack, shape, spec = structure.stacks[member.leaf], structure.shapes[member.leaf], specs[member.leaf]
        names = [*spec, *[None] * (len(shape) - len(spec))]
        axes = [stack + axis for axis in member.order if shape[stack + axis] != 1]
        sizes, start = [side.size for side in bucket.sides], 0
        for side, size in enumerate(sizes):  # the axes of the leaf that make up this side: the first of them is split
            stop, product = start, 1
            while stop < len(axes) and product < size:
                product *= shape[axes[stop]]
                stop += 1
            if side == i:
                found.add(names[axes[start]] if start < stop else None)
            start = stop
    return found.pop() if len(found) == 1 else None


def factor_spec(side: Side, leaf: Any, axis: Any, mesh: jax.sharding.Mesh) -> PartitionSpec:
    """Where a factor (L, B, b, b), (L, n), or its bounds, lives.

    Along with its side where the blocks (or the entries) are aligned with the shards; otherwise its stack is spread
    over the whole mesh, or, if that does not divide, over the largest part of the mesh that does.
    """
    size = lambda names: math.prod(mesh.shape[name] for name in names)
    names = () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)
    if names and leaf.ndim > 1 and leaf.shape[1] % size(names) == 0 and (side.kind != "dense" or side.count > 1):
        return PartitionSpec(None, axis)
    return spread_spec(mesh.shape, leaf.shape)
