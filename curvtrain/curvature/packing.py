"""Vectors like the parameters as a few arrays, so that a program holds an algorithm once instead of once per leaf.

Leaves share an array in one of two ways:

* *raveled*, where no mesh splits the parameters: several leaves, raveled and concatenated, make one array (n,);
* *stacked*, on a mesh of several devices: the leaves of one shape make an array (leaves, *shape). The axes of a
  parameter stay axes of their own, so its sharding stays what it is and packing moves no data between devices. (A
  traced program does not know which axes are split. Of equal shapes that are split along different axes, the compiler
  reshards some.)

Basis vectors are packed in the same way, behind a leading axis: (m, n), or (m, leaves, *shape).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain.curvature import mesh, trees

PyTree = Any
Packed = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class _Group:
    """The leaves that share an array: their indices in the tree, their sizes, and whether they are raveled."""

    leaves: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...] | None  # of every leaf where they are stacked; None where they are raveled

    @property
    def axes(self) -> int:
        """The number of axes of a packed vector."""
        return 1 if self.shape is None else 1 + len(self.shape)

    def steps(self) -> list[int]:
        """The length of every leaf along the axis on which the leaves follow one another."""
        return list(self.sizes) if self.shape is None else [1] * len(self.leaves)


@dataclasses.dataclass(frozen=True)
class Packing:
    """The layout of the packed vectors of one parameter tree. Static: a description without arrays."""

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    groups: tuple[_Group, ...]
    dtype: Any

    @classmethod
    def of_basis(cls, basis: PyTree, largest: int | None = None) -> "Packing":
        """Chooses the layout for the vectors of a basis, an array or a tracer (rows, *shape) per parameter.

        Leaves of more than `largest` numbers get an array of their own: packing copies the others.
        """
        leaves, treedef = jax.tree.flatten(basis)
        shapes = tuple(leaf.shape[1:] for leaf in leaves)
        sizes = [math.prod(shape) for shape in shapes]
        split = mesh.may_be_split(basis)
        members: dict[Any, list[int]] = {}
        for index, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
            own = largest is not None and size > largest
            members.setdefault((shape if own or split else None, index if own else None), []).append(index)
        groups = [_Group(tuple(g), tuple(sizes[i] for i in g), shape) for (shape, _), g in members.items()]
        return cls(treedef, shapes, tuple(groups), trees.width(basis))

    def pack(self, tree: PyTree) -> Packed:
        """A vector like the parameters, or a basis, whose leaves are (rows, *shape), as arrays of the basis's dtype."""
        leaves = [leaf.astype(self.dtype) for leaf in self.treedef.flatten_up_to(tree)]

        def join(group: _Group) -> jax.Array:
            own = [leaves[index] for index in group.leaves]
            lead = own[0].ndim - len(self.shapes[group.leaves[0]])
            if group.shape is not None:
                return jnp.stack(own, axis=lead)
            raveled = [leaf.reshape(*leaf.shape[:lead], size) for leaf, size in zip(own, group.sizes, strict=True)]
            return jnp.concatenate(raveled, axis=lead)

        return tuple(map(join, self.groups))

    def unpacker(self, count: jax.Array) -> Callable[[Packed], PyTree]:
        """The inverse of `pack`, for a vector or for a basis.

        XLA compiles a slice at a constant offset once per leaf, but slices of one size at offsets that are data once
        for all of them: for 150 leaves in 0.15 s instead of 2.8. So the offsets come out of a conditional that it
        cannot decide.

        Args:
          count: an integer >= 0 that is not known before the program runs.
        """
        known = [[jnp.int32(start) for start in trees.offsets(group.steps())] for group in self.groups]
        starts = jax.lax.cond(count >= 0, lambda: known, lambda: jax.tree.map(jnp.zeros_like, known))

        def unpack(packed: Packed) -> PyTree:
            leaves: dict[int, jax.Array] = {}
            for group, array, begins in zip(self.groups, packed, starts, strict=True):
                lead = array.ndim - group.axes
                for index, begin, step in zip(group.leaves, begins, group.steps(), strict=True):
                    piece = array
                    if len(group.leaves) > 1:
                        piece = jax.lax.dynamic_slice_in_dim(array, begin, step, lead, allow_negative_indices=False)
                    leaves[index] = piece.reshape(array.shape[:lead] + self.shapes[index])
            return self.treedef.unflatten([leaves[index] for index in range(len(self.shapes))])

        return unpack

    def random(self, key: jax.Array, draw: jax.Array | int = 0) -> Packed:
        """The packed form of `trees.random(key, params, draw)`: the same numbers in either layout."""
        starts = trees.offsets([math.prod(shape) for shape in self.shapes])

        def piece(group: _Group) -> jax.Array:
            return of(group).astype(self.dtype)

        def of(group: _Group) -> jax.Array:
            own = [starts[index] for index in group.leaves]
            if group.shape is not None:
                return trees.noise(key, group.shape, own, draw)
            if len(own) == len(starts):  # all of the vector
                return trees.noise(key, (sum(group.sizes),), [0], draw)[0]
            return jnp.concatenate(
                [trees.noise(key, (n,), [at], draw)[0] for at, n in zip(own, group.sizes, strict=True)]
            )

        return tuple(map(piece, self.groups))
