"""Which device owns which factors: the slots of stacks, and functions of stacks that each device runs on its own share.

| symbol | meaning |
|---|---|
| S | `slots`: the number of owners; a matrix's two factors, its block and its gradient have the same one |
| L | entries of a stack: the factors of one size, or the matrices of one shape |
| n | devices |

Every stack has room for the same number of entries of every owner, owner after owner; what is left over is padding,
which is zero and never factorised. So wherever n divides S, the leading axis of all stacks splits over all mesh axes,
each device has whole owners, and multiplying a gradient by its factors needs no one else's. S belongs to the state,
which is the same on any mesh: checkpoints made on 8 devices open on 4, 2 and 1.

Entries go to owners evenly, shape by shape; those that are left over go where they make no stack longer, or to where
there is least work so far, d_i^3 + d_o^3 each.

Where n does not divide S: over as many axes of the mesh as do; where none does, everything is replicated, each device
still factorises only its share, and the results are gathered once. That is what S = 1 chooses: more memory, and no
communication between two refreshes.

The mesh is that of `jax.set_mesh` while a program is traced; without one, or on one device, none of this happens.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from curvtrain.curvature.capture import Coverage
from curvtrain.curvature.capture.layers import MatrixLayer

PyTree = Any
Shape = tuple[int, int]  # d_i, d_o

MOST = 64  # owners that are chosen by themselves
PADDING = 0.1  # share of all bytes that may be padding then


@dataclasses.dataclass(frozen=True)
class Stack:
    """Entry k of so many is in slot at[k]; the other slots are padding."""

    slots: int
    at: tuple[int, ...]

    @property
    def padded(self) -> bool:
        return len(self.at) < self.slots

    @property
    def used(self) -> np.ndarray:
        """Whether a slot has an entry (slots,)."""
        used = np.zeros(self.slots, bool)
        used[list(self.at)] = True
        return used

    def place(self, parts: Sequence[jax.Array]) -> jax.Array:
        """The entries, given in order and in parts (k, ...), in their slots; zero elsewhere."""
        if self.at == tuple(range(self.slots)):
            return jnp.concatenate(parts)
        rows = [(i, k) for i, part in enumerate(parts) for k in range(len(part))]
        held = dict(zip(self.at, rows, strict=True))
        pieces, slot = [], 0
        while slot < self.slots:
            run = slot + 1
            if slot not in held:
                while run < self.slots and run not in held:
                    run += 1
                pieces.append(jnp.zeros((run - slot, *parts[0].shape[1:]), parts[0].dtype))
            else:
                i, k = held[slot]
                while held.get(run) == (i, k + run - slot):
                    run += 1
                pieces.append(parts[i][k : k + run - slot])
            slot = run
        return jnp.concatenate(pieces)

    def take(self, X: jax.Array, start: int = 0, count: int | None = None) -> jax.Array:
        """So many entries, in order."""
        at = self.at[start:] if count is None else self.at[start : start + count]
        if at == tuple(range(at[0], at[0] + len(at))):
            return X[at[0] : at[0] + len(at)]
        return X[np.array(at)]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each layer's factors are: static.

    Attributes:
      at: for each matrix's name, (stack of A, its first entry there, stack of G, its first entry there).
      factors: for each size's name, (d, stack).
      blocks: for each shape's name, (names of its matrices in order, stack).
    """

    at: tuple[tuple[str, tuple[str, int, str, int]], ...]
    factors: tuple[tuple[str, tuple[int, Stack]], ...]
    blocks: tuple[tuple[str, tuple[tuple[str, ...], Stack]], ...]

    def stack(self, size: str) -> Stack:
        """Of the factors of one size."""
        return dict(self.factors)[size][1]

    def due(self, size: str, due: jax.Array | None = None) -> Any:
        """`due` (slots,) without the padding; None for all of them."""
        stack = self.stack(size)
        if not stack.padded:
            return due
        return jnp.asarray(stack.used) if due is None else due & stack.used

    def numbers(self, scales: bool) -> tuple[int, int]:
        """How many numbers (a copy of all factors, and of all blocks, if there are scales) take: (all, of padding)."""
        total = pads = 0
        shapes = {name: math.prod(map(int, name.split("x"))) for name, _ in self.blocks} if scales else {}
        each = [(d * d, stack) for _, (d, stack) in self.factors]
        each += [(shapes[name], stack) for name, (_, stack) in self.blocks if scales]
        for count, stack in each:
            total, pads = total + count * stack.slots, pads + count * (stack.slots - len(stack.at))
        return total, pads


def matrices_of(coverage: Coverage) -> list[MatrixLayer]:
    return [layer for layer in coverage.layers if isinstance(layer, MatrixLayer)]


@functools.cache
def layout_of(coverage: Coverage, slots: int = 1) -> Layout:
    """The layout for so many owners."""
    counts: dict[int, int] = {}
    at, shapes = [], collections.defaultdict[Shape, list[MatrixLayer]](list)
    for layer in matrices_of(coverage):
        shapes[layer.d_i, layer.d_o].append(layer)
        where: list[Any] = []
        for d in (layer.d_i, layer.d_o):
            where += [str(d), counts.get(d, 0)]
            counts[d] = counts.get(d, 0) + layer.copies
        at.append((layer.name, tuple(where)))
    shares = _shares({shape: sum(layer.copies for layer in layers) for shape, layers in shapes.items()}, slots)
    owners: dict[str, list[int]] = {str(d): [0] * count for d, count in counts.items()}
    blocks, first = {}, dict(at)
    for shape, layers in shapes.items():
        mine = [int(owner) for owner in np.repeat(np.arange(slots), shares[shape])]
        blocks[name_of(*shape)] = (tuple(layer.name for layer in layers), _stack(mine, slots))
        for layer in layers:
            (a, i, g, j), K = first[layer.name], layer.copies
            owners[a][i : i + K] = owners[g][j : j + K] = mine[:K]
            mine = mine[K:]
    factors = {str(d): (d, _stack(owners[str(d)], slots)) for d in sorted(counts)}
    return Layout(tuple(at), tuple(factors.items()), tuple(blocks.items()))


def name_of(d_i: int, d_o: int) -> str:
    """Of a shape."""
    return f"{d_i}x{d_o}"


def _shares(counts: Mapping[Shape, int], slots: int) -> dict[Shape, np.ndarray]:
    """How many matrices of each shape every owner has."""
    cost = lambda shape: shape[0] ** 3 + shape[1] ** 3
    shares = {shape: np.full(slots, count // slots) for shape, count in counts.items()}
    load, used = np.zeros(slots), collections.defaultdict[int, np.ndarray](lambda: np.zeros(slots, int))
    for shape, share in shares.items():
        load += share * cost(shape)
        for d in shape:
            used[d] += share
    spread = np.argsort([int(f"{owner:016b}"[::-1], 2) for owner in range(slots)])  # far apart, also for fewer devices
    rank = np.argsort(spread)
    for shape in sorted(counts, key=cost, reverse=True):
        free = np.ones(slots, bool)
        for _ in range(counts[shape] % slots):
            longer = np.zeros(slots)
            for d, more in collections.Counter(shape).items():
                longer += d * d * np.maximum(used[d] + more - used[d].max(), 0)
            owner = np.lexsort((rank, load, longer, ~free))[0]
            free[owner] = False
            shares[shape][owner] += 1
            load[owner] += cost(shape)
            for d in shape:
                used[d][owner] += 1
    return shares


def _stack(owners: Sequence[int], slots: int) -> Stack:
    """Of entries with these owners."""
    room = max(collections.Counter(owners).values())
    seen = collections.Counter()
    at = []
    for owner in owners:
        at.append(owner * room + seen[owner])
        seen[owner] += 1
    return Stack(room * slots, tuple(at))


def slots_for(coverage: Coverage, scales: bool) -> int:
    """The largest power of two for which padding is a small share, `PADDING` at most."""
    best, slots = 1, 2
    while slots <= MOST and slots <= sum(layer.copies for layer in matrices_of(coverage)):
        total, pads = layout_of(coverage, slots).numbers(scales)
        if pads <= PADDING * total:
            best = slots
        slots *= 2
    return best


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Blocks(Mapping[str, jax.Array]):
    """For each matrix's name an array (K, d_i, d_o); those of equal shapes are in one stack.

    Attributes:
      stacks: for each shape's name, (slots, d_i, d_o).
    """

    stacks: dict[str, jax.Array]
    coverage: Coverage = dataclasses.field(metadata=dict(static=True))
    slots: int = dataclasses.field(metadata=dict(static=True))

    def __getitem__(self, name: str) -> jax.Array:
        copies = {layer.name: layer.copies for layer in matrices_of(self.coverage)}
        for shape, (names, stack) in layout_of(self.coverage, self.slots).blocks:
            if name in names:
                before = sum(copies[other] for other in names[: names.index(name)])
                return stack.take(self.stacks[shape], before, copies[name])
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (layer.name for layer in matrices_of(self.coverage))

    def __len__(self) -> int:
        return len(matrices_of(self.coverage))


def blocks(coverage: Coverage, slots: int, found: Mapping[str, jax.Array]) -> Blocks:
    """Arrays (K, ...) by matrix's name in stacks, those of each shape in one."""
    layout = layout_of(coverage, slots).blocks
    return Blocks(
        {shape: stack.place([found[name] for name in names]) for shape, (names, stack) in layout}, coverage, slots
    )


# -- the mesh ----------------------------------------------------------------------------------------------------------


def axes_for(shape: Mapping[str, int], slots: int) -> tuple[str, ...]:
    """The axes of a mesh over which stacks of so many owners are split: the most devices that divide them."""
    names = [axis for axis, size in shape.items() if size > 1]
    options = [o for r in range(len(names), 0, -1) for o in itertools.combinations(names, r)]
    size = lambda option: math.prod(shape[axis] for axis in option)
    return max((o for o in options if slots % size(o) == 0), key=size, default=())


def spec_for(axes: tuple[str, ...]) -> PartitionSpec:
    """Of an array whose leading axis is split over these axes."""
    return PartitionSpec(axes if len(axes) > 1 else axes[0]) if axes else PartitionSpec()


def mesh_shape() -> dict[str, int]:
    """Axes and sizes of the mesh that a program is traced for, if it is the compiler that splits arrays over it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return {}
    return {axis: size for axis, size in mesh.shape.items() if size > 1}


def everywhere(tree: PyTree) -> PyTree:
    """The same arrays, all of each on every device."""
    return constrain(tree, ())


def constrain(tree: PyTree, axes: tuple[str, ...]) -> PyTree:
    """The same arrays with the leading axis split over these axes."""
    return jax.lax.with_sharding_constraint(tree, spec_for(axes)) if mesh_shape() else tree


def shared(tree: PyTree, slots: int) -> PyTree:
    """Stacks that every device has, each device's share."""
    return constrain(everywhere(tree), axes_for(mesh_shape(), slots))


def split(function: Callable[..., PyTree], axes: tuple[str, ...]) -> Callable[..., PyTree]:
    """The function, run by each device on its share of the leading axis of all arguments and results."""
    if not axes:
        return function
    spec = spec_for(axes)
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)


def spread(
    function: Callable[[dict[str, PyTree]], PyTree], coverage: Coverage, slots: int, stacks: dict[str, PyTree]
) -> PyTree:
    """function({size: arrays (slots, ...), due}) by the owners, or, where everything is replicated, a share each.

    Args:
      function: of a dictionary by size of pairs (arrays, which of the slots are due or None for all); results are
        dictionaries by size of arrays with the same slots.
      coverage, slots: of the layout.
      stacks: for each size, (arrays, due).

    Returns:
      The function's result; of what is padding, anything.
    """
    shape = mesh_shape()
    axes, layout = axes_for(shape, slots), layout_of(coverage, slots)
    real = lambda layout, stacks: {size: (arrays, layout.due(size, due)) for size, (arrays, due) in stacks.items()}
    if axes or not shape:
        return split(function, axes)(real(layout, stacks))
    other = layout_of(coverage, math.prod(shape.values()))
    move = lambda size, a, b, tree: jax.tree.map(lambda X: b.stack(size).place([a.stack(size).take(X)]), tree)
    moved = {size: move(size, layout, other, tree) for size, tree in stacks.items()}
    found = split(function, tuple(shape))(real(other, everywhere(moved)))
    back = lambda tree: {size: move(size, other, layout, x) for size, x in everywhere(tree).items()}
    return jax.tree.map(back, found, is_leaf=lambda x: isinstance(x, dict))


def by_shape(
    function: Callable[..., jax.Array],
    coverage: Coverage,
    slots: int,
    stacks: Sequence[dict[str, jax.Array]],
    extras: Sequence[Mapping[str, jax.Array]],
) -> Blocks | None:
    """function(A's part, G's part, of each of the stacks, and of each of the extras) by the owners, shape by shape.

    Args:
      function: of arrays with equal leading axes.
      coverage, slots: of the layout.
      stacks: dictionaries by size.
      extras: by matrix's name, or in stacks already.

    Returns:
      A block (d_i, d_o) for each matrix, split over the owners; None where nothing is split.
    """
    axes = axes_for(shape := mesh_shape(), slots)
    if not axes:
        return None
    layout, devices = layout_of(coverage, slots), math.prod(shape[axis] for axis in axes)
    first = dict(layout.at)
    copies = {layer.name: layer.copies for layer in matrices_of(coverage)}
    index, inputs = {}, {}
    for name, (members, stack) in layout.blocks:
        a, _, g, _ = first[members[0]]
        starts = [(first[m], copies[m]) for m in members]
        entries = (
            (a, [i + k for (_, i, _, _), K in starts for k in range(K)]),
            (g, [j + k for (_, _, _, j), K in starts for k in range(K)]),
        )
        rows = []
        for size, numbers in entries:
            home = layout.stack(size)
            at = [home.at[number] for number in numbers]
            local = np.zeros(stack.slots, np.int32)
            local[list(stack.at)] = np.array(at) % (home.slots // devices)
            rows.append((size, home.slots == stack.slots and at == list(stack.at), local))
        index[name] = [(size, None if whole else jnp.asarray(local)) for size, whole, local in rows]
        given = [
            extra.stacks[name] if isinstance(extra, Blocks) else everywhere(stack.place([extra[m] for m in members]))
            for extra in extras
        ]
        inputs[name] = given
    sizes = {name: [size for size, _ in pair] for name, pair in index.items()}
    rows = {name: [row for _, row in pair] for name, pair in index.items()}

    def local(stacks, rows, inputs):
        pick = lambda X, row: X if row is None else X[row]
        parts = lambda name: [
            pick(X[size], row) for X in stacks for size, row in zip(sizes[name], rows[name], strict=True)
        ]
        return {name: function(*parts(name), *given) for name, given in inputs.items()}

    return Blocks(split(local, axes)(list(stacks), rows, inputs), coverage, slots)
