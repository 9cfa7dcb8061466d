"""A layout at work: functions of slots, run by each device on those of its owners.

Which mesh that is, says `curvature/mesh.py`: the one that a program is traced for.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from curvtrain.curvature.mesh import axes_for, constrain, everywhere, mesh_shape, spec_for, split
from curvtrain.curvature.owners.layout import Layout, kind_of, layout_of
from curvtrain.curvature.owners.slots import Slots, inside, slots_of
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


def placed(layout: Layout, arrays: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
    """Gradients (K, ...) by matrix's name, brought to their owners once, for several functions that read them."""
    axes = axes_for(mesh_shape(), layout.owners)
    if not axes:
        return arrays
    found = blocks(layout, arrays).by_shape
    return Blocks({shape: constrain(from_parameters(X), axes) for shape, X in found.items()}, layout)


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
        results |= _cut(layout, members, function(*_given(layout, arrays, extras, shape, members, slots)))
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


def by_size(
    function: Callable[..., tuple[PyTree, PyTree]],
    layout: Layout,
    arrays: Sequence[Arrays],
    extras: Sequence[Mapping[str, jax.Array]],
) -> dict[str, PyTree]:
    """Returns what a function makes for the two factors of every matrix, in the factors' slots.

    Args:
      function: as for `by_shape`, but returns two trees of arrays, (k, d_i, ...) for A's side and (k, d_o, ...) for
        G's, of the sizes of the factors.
      layout, arrays, extras: as for `by_shape`.

    Returns:
      For each size the tree, arrays (L, D, ...) that are zero where nobody's; split over the owners if anything is.
    """
    axes = axes_for(mesh_shape(), layout.owners)
    if axes:
        return _sides_by_owner(function, layout, arrays, extras, axes)
    made: dict[str, list[PyTree]] = {}
    for shape, (members, slots) in layout.blocks:
        trees = function(*_given(layout, arrays, extras, shape, members, slots))
        for tree in trees:
            leaves, treedef = jax.tree.flatten(tree)
            parts = [_cut(layout, members, X) for X in leaves]
            for member in members:
                made.setdefault(member, []).append(treedef.unflatten([part[member] for part in parts]))
    entries: dict[str, list[PyTree]] = {size: [] for size, _ in layout.factors}
    for matrix, (a, _, g, _) in layout.at:
        entries[a].append(made[matrix][0])
        entries[g].append(made[matrix][1])
    placed = lambda slots, trees: jax.tree.map(lambda *parts: slots.place(parts), *trees)
    return {size: placed(layout.of_size(size), trees) for size, trees in entries.items()}


def _given(layout, arrays, extras, shape, members, slots) -> list[jax.Array]:
    """The arguments of a function of the matrices of a shape, in order, where nothing is split."""
    sides = list(zip(layout.entries[shape], kind_of(shape)[2:], strict=True))
    parts = [_rows(X[size], rows, d) for X in arrays for (size, rows), d in sides]
    return [*parts, *(_entries_of(extra, shape, members, slots) for extra in extras)]


@dataclasses.dataclass(frozen=True)
class _Shares:
    """What each device needs of a layout's arrays, all of it split along the leading axis.

    Attributes:
      sizes: for each shape, the names of the sizes of its A and its G.
      dims: for each shape, the sizes of the factors.
      rows: for each shape, the slot on the device of each block's A, and of its G; None if it is the block's own.
      inputs: for each shape, the extras in its slots.
      used: for each shape, which of its slots are no padding; None if none are.
    """

    sizes: dict[str, list[str]]
    dims: dict[str, tuple[int, ...]]
    rows: dict[str, list[Any]]
    inputs: dict[str, list[jax.Array]]
    used: dict[str, Any]

    @classmethod
    def of(cls, layout: Layout, extras: Sequence[Mapping[str, jax.Array]], devices: int) -> "_Shares":
        """For so many devices."""
        sizes, rows, inputs = {}, {}, {}
        dims: dict[str, tuple[int, ...]] = {}
        for name, (members, slots) in layout.blocks:
            pair, dims[name] = layout.rows(name), kind_of(name)[2:]
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
        used = {name: jnp.asarray(slots.used) if slots.padded else None for name, (_, slots) in layout.blocks}
        return cls(sizes, dims, rows, inputs, used)

    def run(self, function: Callable[..., PyTree], name: str, arrays, rows, inputs, mine) -> PyTree:
        """On one device: the function of the blocks of a shape; zeros if they are all padding."""
        pick = lambda X, row, d: inside(X if row is None else X[row], d)
        where = list(zip(self.sizes[name], rows[name], self.dims[name], strict=True))
        given = [*(pick(X[size], row, d) for X in arrays for size, row, d in where), *inputs[name]]
        if mine[name] is None:
            return function(*given)
        zeros = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function, *given))
        return jax.lax.cond(jnp.any(mine[name]), lambda: function(*given), zeros)


def _by_owner(function, layout, arrays, extras, axes) -> Blocks:
    shares = _Shares.of(layout, extras, _count(axes))

    def local(*own):
        return {name: shares.run(function, name, *own) for name in shares.inputs}

    return Blocks(split(local, axes)(list(arrays), shares.rows, shares.inputs, shares.used), layout)


def _sides_by_owner(function, layout, arrays, extras, axes) -> dict[str, PyTree]:
    shares = _Shares.of(layout, extras, devices := _count(axes))

    def local(arrays, rows, inputs, mine):
        found: dict[str, PyTree] = {}
        for name in shares.inputs:
            trees = shares.run(function, name, arrays, rows, inputs, mine)
            for size, row, tree in zip(shares.sizes[name], rows[name], trees, strict=True):
                D, slots = dict(layout.factors)[size]
                place = functools.partial(_added, row, mine[name], slots.count // devices, D)
                before = found.get(size, jax.tree.map(lambda _: None, tree))
                found[size] = jax.tree.map(place, tree, before)
        return found

    return split(local, axes)(list(arrays), shares.rows, shares.inputs, shares.used)


def _added(row, mine, count: int, D: int, X: jax.Array, before: jax.Array | None) -> jax.Array:
    """The slots (count, D, ...) with one more shape's entries in their rows; of padding, nothing."""
    X = jnp.pad(X, [(0, 0), *((D - n, 0) for n in X.shape[1:])])
    if mine is not None:
        X = jnp.where(mine.reshape(-1, *[1] * (X.ndim - 1)), X, 0)
    if row is None:
        return X if before is None else before + X
    slots = jnp.zeros((count, *X.shape[1:]), X.dtype) if before is None else before
    return slots.at[row].add(X)


def _count(axes: tuple[str, ...]) -> int:
    shape = mesh_shape()
    return math.prod(shape[axis] for axis in axes)
