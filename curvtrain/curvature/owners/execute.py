"""A layout at work: functions of slots, run by each device on those of its owners.

Which mesh that is, says `curvature/mesh.py`: the one that a program is traced for.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from curvtrain.curvature.mesh import axes_for, constrain, everywhere, mesh_shape, spec_for, split
from curvtrain.curvature.owners.layout import Layout, Slots, inside, layout_of, slots_of
from curvtrain.curvature.unstack import unstack

PyTree = Any
Arrays = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Blocks(Mapping[str, jax.Array]):
    """For each matrix's name an array (K, d_i, d_o); those of equal shapes are in one array of slots.

    Attributes:
      by_shape: for each shape's name, (L, d_i, d_o).
      layout: which slot is whose.
    """

    by_shape: Arrays
    layout: Layout = dataclasses.field(metadata=dict(static=True))

    def __getitem__(self, name: str) -> jax.Array:
        copies = {matrix.name: matrix.copies for matrix in self.layout.matrices}
        for shape, (names, slots) in self.layout.blocks:
            if name in names:
                before = sum(copies[other] for other in names[: names.index(name)])
                return slots.take(self.by_shape[shape], before, copies[name])
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (matrix.name for matrix in self.layout.matrices)

    def __len__(self) -> int:
        return len(self.layout.matrices)


def blocks(layout: Layout, arrays: Mapping[str, jax.Array]) -> Blocks:
    """Arrays (K, ...) by matrix's name in slots; `Blocks` are returned as they are."""
    if isinstance(arrays, Blocks):
        return arrays
    return Blocks(
        {shape: slots.place([arrays[m] for m in members]) for shape, (members, slots) in layout.blocks}, layout
    )


def shared(tree: PyTree, layout: Layout) -> PyTree:
    """Arrays of slots that every device has whole, each device's share of them."""
    return constrain(everywhere(tree), axes_for(mesh_shape(), layout.owners))


def from_parameters(X: jax.Array) -> jax.Array:
    """Gradients in slots on their way to the owners.

    On axes other than "data", which splits nothing but examples, parameters are split: then the compiler finds the
    exchange of their pieces. On "data" alone every device has all of them, but the compiler would split them first.
    """
    return everywhere(X) if mesh_shape().keys() <= {"data"} else X


def to_parameters(found: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
    """Blocks by matrix's name, on their way back from the owners; what is no `Blocks` is there already.

    On "data" alone they are gathered; where parameters are split, they leave split along another axis: on 8 devices an
    eighth of the bytes. For arrays that are mostly padding, owners scatter their entries into zeros, and those are
    summed, instead of gathering padding.
    """
    if not isinstance(found, Blocks):
        return found
    shape, layout = mesh_shape(), found.layout
    devices, axes, whole = math.prod(shape.values()), tuple(shape), shape.keys() <= {"data"}
    home = axes_for(shape, layout.owners)
    results: Arrays = {}
    for name, (members, slots) in layout.blocks:
        X = found.by_shape[name]
        axis = None if whole else next((i for i in (2, 1) if X.shape[i] % devices == 0), None)
        if slots.count >= 2 * len(slots.at):
            X, slots = _summed(X, slots, home, axis), slots_of([0] * len(slots.at), 1)
        else:
            X = everywhere(X) if axis is None else jax.lax.with_sharding_constraint(X, spec_for(axes, axis))
        results |= _cut(layout, members, slots.take(X))
    return results


def _cut(layout: Layout, members: Sequence[str], X: jax.Array) -> Arrays:
    """The entries of a shape, in order, by matrix's name."""
    parts = unstack(X, [layout.by_name[member].copies for member in members], axis=0)
    return dict(zip(members, parts, strict=True))


def _summed(X: jax.Array, slots: Slots, axes: tuple[str, ...], axis: int | None) -> jax.Array:
    """The entries of an array alone, in order: on every device, or split along an axis."""
    count = len(slots.at)
    entry = np.full(slots.count, count)
    entry[list(slots.at)] = np.arange(count)

    def local(X, entry):
        own = jnp.zeros((count, *X.shape[1:]), X.dtype).at[entry].set(X, mode="drop")
        if axis is None:
            return jax.lax.psum(own, axes)
        return jax.lax.psum_scatter(own, axes, scatter_dimension=axis, tiled=True)

    out = PartitionSpec() if axis is None else spec_for(axes, axis)
    return jax.shard_map(local, in_specs=spec_for(axes), out_specs=out, check_vma=False)(X, jnp.asarray(entry))


def factorise(function: Callable[[dict[str, PyTree]], PyTree], layout: Layout, arrays: dict[str, PyTree]) -> PyTree:
    """function({size: (arrays, which slots are due)}) by the owners; where all is replicated, by all, a share each.

    Args:
      function: of a dictionary by size of pairs (arrays, which of the slots are due or None for all); its results are
        dictionaries by size of arrays with the same slots.
      layout: which slot is whose.
      arrays: for each size, (arrays (L, ...), due).

    Returns:
      The function's result; of what is padding, anything.
    """
    shape = mesh_shape()
    axes = axes_for(shape, layout.owners)
    real = lambda layout, arrays: {size: (part, layout.due(size, due)) for size, (part, due) in arrays.items()}
    if axes or not shape:
        return split(function, axes)(real(layout, arrays))
    sizes = tuple(D for _, (D, _) in layout.factors)
    other = layout_of(layout.matrices, math.prod(shape.values()), sizes)
    move = lambda size, a, b, tree: jax.tree.map(lambda X: b.of_size(size).place([a.of_size(size).take(X)]), tree)
    moved = {size: move(size, layout, other, tree) for size, tree in arrays.items()}
    found = split(function, tuple(shape))(real(other, everywhere(moved)))
    back = lambda tree: {size: move(size, other, layout, x) for size, x in everywhere(tree).items()}
    return jax.tree.map(back, found, is_leaf=lambda x: isinstance(x, dict))


def by_shape(
    function: Callable[..., jax.Array],
    layout: Layout,
    arrays: Sequence[Arrays],
    extras: Sequence[Mapping[str, jax.Array]],
) -> Mapping[str, jax.Array]:
    """function(A's part, G's part, of each of the arrays, and of each of the extras), all of a shape at once.

    Args:
      function: of arrays with equal leading axes.
      layout: which slot is whose.
      arrays: dictionaries by size.
      extras: by matrix's name, or `Blocks`.

    Returns:
      A result (K, d_i, d_o) for each matrix: `Blocks` that are split over the owners; where nothing is split, a dict.
    """
    axes = axes_for(mesh_shape(), layout.owners)
    if axes:
        return _by_owner(function, layout, arrays, extras, axes)
    results: Arrays = {}
    for shape, (members, slots) in layout.blocks:
        dims = map(int, shape.split("x"))
        sides = list(zip(layout.entries[shape], dims, strict=True))
        parts = [_rows(X[size], rows, d) for X in arrays for (size, rows), d in sides]
        given = [_entries_of(extra, shape, members, slots) for extra in extras]
        results |= _cut(layout, members, function(*parts, *given))
    return results


def _entries_of(extra: Mapping[str, jax.Array], shape: str, members: Sequence[str], slots: Slots) -> jax.Array:
    """The entries of a shape in order, without padding."""
    if isinstance(extra, Blocks):
        return slots.take(extra.by_shape[shape])
    return extra[members[0]] if len(members) == 1 else jnp.concatenate([extra[m] for m in members])


def _rows(X: jax.Array, rows: np.ndarray, d: int) -> jax.Array:
    """The entries of size d in these slots."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    contiguous = np.array_equal(rows, np.arange(first, last))
    return inside(X[first:last] if contiguous else X[rows], d)


def _by_owner(function, layout, arrays, extras, axes) -> Blocks:
    shape = mesh_shape()
    devices = math.prod(shape[axis] for axis in axes)
    sizes, rows, inputs = {}, {}, {}
    for name, (members, slots) in layout.blocks:
        pair = layout.rows(name)
        sizes[name] = [size for size, _ in pair]
        rows[name] = []
        for size, wide in pair:
            home = layout.of_size(size)
            whole = home.count == slots.count and np.array_equal(wide[list(slots.at)], slots.at)
            rows[name].append(None if whole else jnp.asarray(wide % (home.count // devices)))
        inputs[name] = [
            extra.by_shape[name]
            if isinstance(extra, Blocks)
            else from_parameters(slots.place([extra[m] for m in members]))
            for extra in extras
        ]
    dims = {name: [int(d) for d in name.split("x")] for name in inputs}
    used = {name: jnp.asarray(slots.used) if slots.padded else None for name, (_, slots) in layout.blocks}

    def local(arrays, rows, inputs, mine):
        pick = lambda X, row, d: inside(X if row is None else X[row], d)
        where = lambda name: zip(sizes[name], rows[name], dims[name], strict=True)
        parts = lambda name: [pick(X[size], row, d) for X in arrays for size, row, d in where(name)]
        return {name: of_some(mine[name], *parts(name), *given) for name, given in inputs.items()}

    def of_some(mine, *given):
        """The function, but zeros from owners who have nothing but padding."""
        if mine is None:
            return function(*given)
        result = jax.eval_shape(function, *given)
        zeros = lambda: jnp.zeros(result.shape, result.dtype)
        return jax.lax.cond(jnp.any(mine), lambda: function(*given), zeros)

    return Blocks(split(local, axes)(list(arrays), rows, inputs, used), layout)
