"""Factors of equal shape, from all sides of all tensors, as the rows of one array: they are stepped in one go.

| name | meaning |
|---|---|
| tensor | one of the tensors of all buckets, numbered through |
| unit | the factor of one side of one tensor |
| row | a unit's block, a matrix (b, b), or a diagonal unit, a vector (n,); numbered through all groups |
| group | rows of equal shape; each bucket's side is a contiguous part of one |

Sums over the rows of a unit, or the units of a tensor, are reductions of gathered rows, by tables that are known when
the program is traced.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from curvtrain.curvature.psgd.layout import Bucket, Side
from curvtrain.curvature.psgd.tensors import Factors

Reduction = Callable[..., jax.Array]  # jnp.max, jnp.sum, jnp.prod


@dataclasses.dataclass(frozen=True)
class Part:
    """The factors of one side of a bucket; `lead` are their leading axes, (L, B) if they are dense, otherwise (L,)."""

    bucket: int
    side: int
    lead: tuple[int, ...]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return math.prod(self.lead)


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows of one shape: dense factors with blocks of one size, or diagonal ones of one length."""

    dense: bool
    size: int
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return sum(part.rows for part in self.parts)

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes of the group's array: (rows,), or those of its only part, which may be split over a mesh."""
        return self.parts[0].lead if len(self.parts) == 1 else (self.rows,)

    def gather(self, factors: Sequence[Factors]) -> jax.Array:
        """(*lead, ...) of arrays for each side of each bucket."""
        arrays = [factors[part.bucket][part.side] for part in self.parts]
        if len(arrays) == 1:
            return arrays[0]
        of = lambda part, a: a.reshape(part.rows, *a.shape[len(part.lead) :])
        return jnp.concatenate([of(part, a) for part, a in zip(self.parts, arrays, strict=True)])

    def spread(self, rows: jax.Array, out: Sequence[Factors]) -> None:
        """The inverse of `gather`: writes the rows into `out`."""
        start = 0
        for part in self.parts:
            piece = rows
            if len(self.parts) > 1:
                piece = rows[start : start + part.rows].reshape(*part.lead, *rows.shape[1:])
            out[part.bucket][part.side] = piece
            start += part.rows


class Rows:
    """The groups of some buckets, and the tables that say which row belongs to which unit and tensor.

    Attributes:
      groups: of all rows, in their order.
      tensor: (rows,), the tensor of each row. All tables are NumPy arrays.
      unit: (rows,), the unit of each row.
      factors: (tensors,), how many units a tensor has.
      weight: (rows,), N / n_i: the entries of a tensor for each entry of the row's side.
      unfactored: (tensors,), the product of the lengths of the sides that have no factor.
    """

    def __init__(self, buckets: Sequence[Bucket], together: bool):
        """`together`: whether rows of several sides and buckets share a group; otherwise each side has its own."""
        self.buckets = buckets
        firsts = np.cumsum([0, *(bucket.count for bucket in buckets)])
        found: dict[tuple, list[Part]] = {}
        for index, bucket in enumerate(buckets):
            for i, side in enumerate(bucket.sides):
                if side.kind != "none":
                    dense = side.kind == "dense"
                    shape = (dense, side.block if dense else side.size)
                    lead = (bucket.count, side.count) if dense else (bucket.count,)
                    key = shape if together else (*shape, index, i)
                    found.setdefault(key, []).append(Part(index, i, lead))
        self.groups = tuple(Group(key[0], key[1], tuple(parts)) for key, parts in found.items())
        tensor, unit, weight, units = [], [], [], 0
        for group in self.groups:
            for part in group.parts:
                bucket = buckets[part.bucket]
                each = part.rows // bucket.count
                tensor.append(np.repeat(np.arange(bucket.count) + firsts[part.bucket], each))
                unit.append(np.repeat(np.arange(bucket.count) + units, each))
                weight.append(np.full(part.rows, bucket.entries / bucket.sides[part.side].size))
                units += bucket.count
        self.tensor, self.unit, self.weight = (np.concatenate(parts) for parts in (tensor, unit, weight))
        self._rows_of_units = _table(self.unit, units)
        self._tensor_of_unit = self.tensor[self._rows_of_units[:, 0]]
        self._units_of_tensors = _table(self._tensor_of_unit, int(firsts[-1]))
        self.factors = np.bincount(self._tensor_of_unit, minlength=int(firsts[-1]))
        free = [np.prod([s.size for s in bucket.sides if s.kind == "none"], initial=1.0) for bucket in buckets]
        self.unfactored = np.repeat(free, [bucket.count for bucket in buckets])

    def per_group(self, rows: jax.Array) -> list[jax.Array]:
        """Numbers (rows,) as one array (*lead,) for each group."""
        parts = jnp.split(rows, np.cumsum([group.rows for group in self.groups])[:-1])
        return [part.reshape(group.lead) for group, part in zip(self.groups, parts, strict=True)]

    def of_groups(self, parts: Sequence[jax.Array]) -> jax.Array:
        """The inverse of `per_group`."""
        return jnp.concatenate([part.ravel() for part in parts])

    def over_rows(self, reduce: Reduction, rows: jax.Array, neutral: float) -> jax.Array:
        """(units,), a reduction of (rows,) over the rows of each unit."""
        return _reduced(reduce, rows, self._rows_of_units, neutral)

    def over_units(self, reduce: Reduction, units: jax.Array, neutral: float) -> jax.Array:
        """(tensors,), a reduction of (units,) over the units of each tensor."""
        return _reduced(reduce, units, self._units_of_tensors, neutral)

    def others(self, units: jax.Array) -> jax.Array:
        """(units,), for each unit the product of its tensor's other units, and of its sides without a factor."""
        tables = self._units_of_tensors[self._tensor_of_unit]
        tables = np.where(tables == np.arange(len(tables))[:, None], len(tables), tables)
        return _reduced(jnp.prod, units, tables, 1.0) * jnp.asarray(self.unfactored[self._tensor_of_unit], units.dtype)

    def of_tensors(self, tensors: jax.Array) -> jax.Array:
        """(rows,) of (tensors,)."""
        return tensors[self.tensor]

    def of_units(self, units: jax.Array) -> jax.Array:
        """(rows,) of (units,)."""
        return units[self.unit]

    def of_tensors_by_unit(self, tensors: jax.Array) -> jax.Array:
        """(units,) of (tensors,)."""
        return tensors[self._tensor_of_unit]

    def mask(self, group: Group) -> np.ndarray | None:
        """(*lead, b), whether an entry is no padding; None if there is no padding."""
        if not group.dense:
            return None
        sides: list[tuple[Bucket, Side]] = [
            (self.buckets[p.bucket], self.buckets[p.bucket].sides[p.side]) for p in group.parts
        ]
        if all(side.padded == side.size for _, side in sides):
            return None
        inside = lambda side: (np.arange(side.padded) < side.size).reshape(side.count, side.block)
        rows = np.concatenate([np.tile(inside(side), (bucket.count, 1)) for bucket, side in sides])
        return rows.reshape(*group.lead, group.size)


def _table(owner: np.ndarray, owners: int) -> np.ndarray:
    """(owners, most), the entries of each owner; the number of entries stands for none."""
    counts = np.bincount(owner, minlength=owners)
    table = np.full((owners, counts.max(initial=1)), len(owner))
    order = np.argsort(owner, kind="stable")
    place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    table[owner[order], place] = order
    return table


def _reduced(reduce: Reduction, values: jax.Array, table: np.ndarray, neutral: float) -> jax.Array:
    if table.shape[1] == 1 and (table < len(values)).all():
        return values[table[:, 0]]
    return reduce(jnp.append(values, jnp.asarray(neutral, values.dtype))[table], axis=1)
