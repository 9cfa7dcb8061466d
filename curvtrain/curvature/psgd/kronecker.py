"""The Kronecker family: P of a tensor is a product of one small factor for each of its sides.

Li (2018), arXiv 1809.10232, in the newer geometries of `geometry.py`. Which side gets which factor is what its members
differ in (`kron.py`); a step of the fit is in `kron_fit.py`.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from curvtrain import _checks
from curvtrain.curvature import stacks
from curvtrain.curvature.psgd.base import MatrixPreconditioner, Structure, check_order
from curvtrain.curvature.psgd.geometry import GEOMETRIES
from curvtrain.curvature.psgd.kron_fit import KronFit
from curvtrain.curvature.psgd.layout import Bucket, Member, Side
from curvtrain.curvature.psgd.placement import factor_spec, side_axes
from curvtrain.curvature.psgd.tensors import multiply
from curvtrain.curvature.unstack import on_one_device

PyTree = Any

DTYPES = ("float32", "bfloat16")  # as which factors may be stored


@dataclasses.dataclass(frozen=True)
class Kronecker(MatrixPreconditioner):
    """The base of the family's members: see `Kron` for the options.

    A Python loop goes over *buckets*, tensors of equal sides, and only for products with tensors; all else is done to
    all factors of one size together, where the program is for one device. Where it may be for several, every bucket's
    factors stay where they live, and each bucket is fitted by itself.
    """

    geometry: str = "PRO"
    _: dataclasses.KW_ONLY
    block_size: int | None = 64
    max_size: int = 8192
    max_skew: float = 2.0
    dtype: str | None = None
    order: str = "bounded"

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        _checks.one_of(f"{name}(geometry)", self.geometry, GEOMETRIES)
        if self.block_size is not None:
            _checks.positive_int(f"{name}(block_size)", self.block_size, minimum=2)
        _checks.positive_int(f"{name}(max_size)", self.max_size, minimum=0)
        _checks.number_in(f"{name}(max_skew)", self.max_skew, 0.0)
        if self.dtype is not None:
            _checks.one_of(f"{name}(dtype)", self.dtype, DTYPES)
        check_order(name, self.order, self.lipschitz_decay)
        if self.dtype == "bfloat16" and self.geometry in ("EQ", "QEP"):
            raise ValueError(
                f"{name}(dtype={self.dtype!r}) rounds the steps of geometry={self.geometry!r} away. Use "
                f"dtype='float32', or geometry='PRO'."
            )

    @abc.abstractmethod
    def sides(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[Side, ...]]:
        """(the order of the axes, the sides) of one tensor, which has at least one factor."""

    def buckets(self, structure: Structure) -> tuple[Bucket, ...]:
        """Tensors by their sides, in the order of the parameters. Parameters without entries are in none."""
        found: dict[tuple[Side, ...], list[Member]] = {}
        for leaf, (shape, axes) in enumerate(zip(structure.shapes, structure.scan_axes, strict=True)):
            if math.prod(shape):
                order, sides = self.sides(shape[axes:])
                found.setdefault(sides, []).append(Member(leaf, math.prod(shape[:axes]), order))
        return tuple(Bucket(sides, tuple(members)) for sides, members in found.items())

    def blocks(self, structure):
        rows = []
        for bucket in self.buckets(structure):
            state = jax.eval_shape(lambda bucket=bucket: self._start(bucket, structure.dtype))
            total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
            names = [structure.paths[member.leaf] for member in bucket.members]
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            rows.append((shown, f"{self.geometry} {bucket.name}", total))
        return rows

    # -- state ---------------------------------------------------------------------------------------------------------

    def init(self, structure):
        return {bucket.name: self._start(bucket, structure.dtype) for bucket in self.buckets(structure)}

    def _start(self, bucket: Bucket, width: str) -> dict[str, Any]:
        dtype, count = self.dtype or width, bucket.count
        each = 1.0 if self.initial_scale is None else self.initial_scale ** (0.5 / bucket.factors)  # of Q
        Q, P, L = {}, {}, {}
        for i, side in enumerate(bucket.sides):
            if side.kind == "dense":
                q = (each * jnp.eye(side.block, dtype=width)).astype(dtype)
                whole = lambda a, side=side: jnp.zeros((count, side.count, side.block, side.block), dtype) + a
                Q[str(i)], P[str(i)] = whole(q), whole(jnp.square(q.astype(width)).astype(dtype))
                L[str(i)] = jnp.zeros((count, side.count), width)
            elif side.kind == "diagonal":
                Q[str(i)], L[str(i)] = jnp.full((count, side.size), each, dtype), jnp.zeros(count, width)
        return {"Q": Q, "P": P, "L": L, "seen": jnp.zeros(count, bool)}

    def fit(self, structure, state, v, h, key, rate):
        buckets = self.buckets(structure)
        if not buckets:
            return state, jnp.int32(0)
        step = KronFit(
            self.geometry,
            self.order,
            self.lipschitz_decay,
            self.dtype or structure.dtype,
            self.initial_scale is None,
            self.damped,
            self.share(structure, v is None) > 0,
        ).step
        hs = structure.treedef.flatten_up_to(h)
        vs = None if v is None else structure.treedef.flatten_up_to(v)
        seeds, sizes = jax.random.bits(key, (len(buckets),), jnp.uint32), self.floors(structure, h, v is None)
        floors = [jnp.concatenate([sizes[m.leaf].ravel() for m in bucket.members]) for bucket in buckets]
        together = on_one_device()
        parts = [slice(None)] if together else [slice(i, i + 1) for i in range(len(buckets))]
        new, failures = {}, jnp.int32(0)
        with jax.default_matmul_precision(self.precision):
            for part in parts:
                some = buckets[part]
                H = [bucket.read(structure, hs) for bucket in some]
                V = None if vs is None else [bucket.read(structure, vs) for bucket in some]
                states = [state[bucket.name] for bucket in some]
                found, failed = step(some, states, V, H, seeds[part], floors[part], rate, together)
                new |= {bucket.name: one for bucket, one in zip(some, found, strict=True)}
                failures += failed
        return new, failures

    # -- what it does --------------------------------------------------------------------------------------------------

    def apply(self, structure, state, vector):
        return self._map(structure, state, vector, lambda side, q, p: p if side.kind == "dense" else jnp.square(q))

    def invert(self, structure, state, vector):
        def inverse(side, q, p):
            if side.kind != "dense":
                return 1.0 / jnp.square(q)
            flat = p.reshape(-1, side.block, side.block)
            return stacks.inverse(flat, jnp.zeros(len(flat), flat.dtype)).reshape(p.shape)

        return self._map(structure, state, vector, inverse)

    def _map(self, structure: Structure, state: PyTree, vector: PyTree, factor: Callable[..., jax.Array]) -> PyTree:
        leaves = [a[None] for a in structure.treedef.flatten_up_to(vector)]
        out: list[Any] = [
            jnp.zeros((1, *shape), structure.dtype) if not math.prod(shape) else None for shape in structure.shapes
        ]
        with jax.default_matmul_precision(self.precision):
            for bucket in self.buckets(structure):
                filed = state[bucket.name]
                of = lambda name, i, filed=filed: (
                    filed[name][str(i)].astype(structure.dtype) if str(i) in filed[name] else None
                )
                used = [
                    None if side.kind == "none" else factor(side, of("Q", i), of("P", i))
                    for i, side in enumerate(bucket.sides)
                ]
                bucket.write(structure, multiply(bucket.sides, used, bucket.read(structure, leaves)), out)
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
