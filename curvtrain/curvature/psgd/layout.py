"""How the Kronecker family sees parameters: as tensors of equal sides in one array, so that one program serves all.

A leaf loses its axes of length 1, and more than two axes are merged into two. Every side of what is left gets a factor:

| kind | factor | for |
|---|---|---|
| dense | (B, b, b), block-diagonal; one block unless `block_size` says otherwise | sides that are not too large |
| diagonal | (n,) | vectors, and sides that are too large |
| none | | sides that are too large, if so wished |

Leaves of the same sides share a bucket: its tensors are the leaves, and the layers of an `nnx.scan` within each.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from curvtrain.curvature.psgd.base import Structure
from curvtrain.curvature.unstack import unstack


@dataclasses.dataclass(frozen=True)
class Side:
    """One axis of a bucket's tensors: its length n, its factor's kind, and the size b of the blocks of a dense one."""

    size: int
    kind: str
    block: int = 1

    @property
    def count(self) -> int:
        """B, the number of blocks."""
        return -(-self.size // self.block)

    @property
    def padded(self) -> int:
        """The length that the blocks cover: above n if b does not divide it."""
        return self.count * self.block if self.kind == "dense" else self.size

    def mask(self) -> np.ndarray | None:
        """(B, b), whether an entry is one of the n; None if all are."""
        if self.padded == self.size:
            return None
        return (np.arange(self.padded) < self.size).reshape(self.count, self.block)

    @property
    def name(self) -> str:
        """Like "256" (dense), "256b64" (in blocks of 64), "10d" (diagonal) or "10n" (none)."""
        blocks = f"b{self.block}" if self.block != self.size else ""
        return f"{self.size}{blocks if self.kind == 'dense' else self.kind[0]}"


@dataclasses.dataclass(frozen=True)
class Member:
    """A leaf of the parameters in a bucket: its index, its number of copies, and its axes in the order of the sides."""

    leaf: int
    copies: int
    order: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Tensors with the same sides."""

    sides: tuple[Side, ...]
    members: tuple[Member, ...]

    @property
    def name(self) -> str:
        """The key of the bucket in the state."""
        return "x".join(side.name for side in self.sides)

    @property
    def count(self) -> int:
        """L, the number of tensors."""
        return sum(member.copies for member in self.members)

    @property
    def entries(self) -> int:
        """N, the number of entries of one tensor."""
        return math.prod(side.size for side in self.sides)

    @property
    def factors(self) -> int:
        """The number of sides that have a factor."""
        return sum(side.kind != "none" for side in self.sides)

    def read(self, structure: Structure, leaves: list[jax.Array]) -> jax.Array:
        """Returns (k, L, *padded sides) of leaves with a leading axis of probes."""
        parts = []
        for member in self.members:
            a, axes = leaves[member.leaf], structure.scan_axes[member.leaf]
            a = a.reshape(a.shape[0], member.copies, *a.shape[1 + axes :])
            a = a.transpose(0, 1, *(2 + axis for axis in member.order))
            parts.append(a.reshape(a.shape[0], member.copies, *(side.size for side in self.sides)))
        a = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
        pad = [(0, 0), (0, 0), *((0, side.padded - side.size) for side in self.sides)]
        return jnp.pad(a, pad) if any(high for _, high in pad) else a

    def write(self, structure: Structure, a: jax.Array, leaves: list) -> None:
        """The inverse of `read`: fills in `leaves`."""
        a = a[(slice(None), slice(None), *(slice(side.size) for side in self.sides))]
        parts = unstack(a, [member.copies for member in self.members], axis=1)
        for member, part in zip(self.members, parts, strict=True):
            shape = structure.shapes[member.leaf]
            single = shape[structure.scan_axes[member.leaf] :]
            part = part.reshape(a.shape[0], member.copies, *(single[axis] for axis in member.order))
            back = sorted(range(len(member.order)), key=member.order.__getitem__)
            leaves[member.leaf] = part.transpose(0, 1, *(2 + axis for axis in back)).reshape(a.shape[0], *shape)


def consecutive(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the matrix, made of consecutive axes, whose two factors are the smallest; at most two axes stay."""
    if len(shape) <= 2:
        return shape
    splits = [(math.prod(shape[:at]), math.prod(shape[at:])) for at in range(1, len(shape))]
    return min(splits, key=lambda sides: sides[0] ** 2 + sides[1] ** 2)


def any_order(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(order of the axes, sizes of the matrix) over all ways to share the axes among two sides: 2^p, not p!."""
    axes = range(len(shape))
    if len(shape) <= 2:
        return tuple(axes), shape
    best = None
    for size in range(1, len(shape)):
        for left in itertools.combinations(axes, size):
            right = tuple(axis for axis in axes if axis not in left)
            sides = (math.prod(shape[a] for a in left), math.prod(shape[a] for a in right))
            cost = sides[0] ** 2 + sides[1] ** 2
            if best is None or cost < best[0]:
                best = (cost, (*left, *right), sides)
    assert best is not None
    return best[1], best[2]


def block_for(size: int, block_size: int | None) -> int:
    """b: the size itself, its largest divisor that is at least half of `block_size`, or `block_size` with padding."""
    if block_size is None or size <= block_size:
        return size
    return next((b for b in range(block_size, (block_size - 1) // 2, -1) if size % b == 0), block_size)
