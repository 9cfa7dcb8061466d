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

A stack that few factors share is mostly padding. So a size d joins the stack of the next larger size D where an owner
then has less memory and work to spare for them in all. Its factors stand in the last d rows and columns: what is before
them is zero, of which a factorisation makes something that is finite and belongs to nobody (`Stack.outside`), and the
ascending eigenvalues, of which the first are of the padding, keep their places too.

Where n does not divide S: over as many axes of the mesh as do; where none does, everything is replicated, each device
still factorises only its share, and the results are gathered once. That is what S = 1 chooses: more memory, and no
communication between two refreshes.

Which mesh that is, says `curvature/mesh.py`.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from curvtrain._text import table
from curvtrain.curvature.capture import Coverage
from curvtrain.curvature.capture.layers import MatrixLayer
from curvtrain.curvature.mesh import axes_for, constrain, everywhere, mesh_shape, spec_for, split

PyTree = Any
Shape = tuple[int, int]  # d_i, d_o

MOST = 64  # owners that are chosen by themselves
PADDING = 0.1  # share of all bytes that may be padding then
TRIED = 12  # sizes of stacks of which all ways to join two are tried


@dataclasses.dataclass(frozen=True)
class Stack:
    """Entry k of so many is in slot at[k]; the other slots are padding.

    Of a stack of factors, D is the room of a slot, and dims[k] the d of entry k.
    """

    slots: int
    at: tuple[int, ...]
    D: int = 0
    dims: tuple[int, ...] = ()

    @property
    def padded(self) -> bool:
        return len(self.at) < self.slots

    @property
    def used(self) -> np.ndarray:
        """Whether a slot has an entry (slots,)."""
        used = np.zeros(self.slots, bool)
        used[list(self.at)] = True
        return used

    @property
    def outside(self) -> np.ndarray | None:
        """Which rows of a slot are before those of its entry (slots, D); None if none are."""
        if all(d == self.D for d in self.dims):
            return None
        outside = np.zeros((self.slots, self.D), bool)
        for at, d in zip(self.at, self.dims, strict=True):
            outside[at, : self.D - d] = True
        return outside

    def place(self, parts: Sequence[jax.Array]) -> jax.Array:
        """The entries, given in order and in parts (k, ...), in their slots; zero elsewhere."""
        if self.D:
            before = lambda X: [(0, 0), *[(self.D - n, 0) for n in X.shape[1:]]]
            parts = [X if all(n == self.D for n in X.shape[1:]) else jnp.pad(X, before(X)) for X in parts]
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
      factors: for each size's name, (D, stack).
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
        total = used = 0
        for _, (D, stack) in self.factors:
            total, used = total + D * D * stack.slots, used + sum(d * d for d in stack.dims)
        for name, (_, stack) in self.blocks if scales else ():
            count = math.prod(map(int, name.split("x")))
            total, used = total + count * stack.slots, used + count * len(stack.at)
        return total, total - used


def matrices_of(coverage: Coverage) -> list[MatrixLayer]:
    return [layer for layer in coverage.layers if isinstance(layer, MatrixLayer)]


@functools.cache
def layout_of(coverage: Coverage, slots: int = 1, sizes: tuple[int, ...] | None = None) -> Layout:
    """The layout for so many owners; `sizes` of the stacks: those that cost an owner least."""
    shapes = collections.defaultdict[Shape, list[MatrixLayer]](list)
    for layer in matrices_of(coverage):
        shapes[layer.d_i, layer.d_o].append(layer)
    counts = {shape: sum(layer.copies for layer in layers) for shape, layers in shapes.items()}
    homes = _homes(counts, sizes or _sizes(counts, slots))
    dims: dict[int, list[int]] = {D: [] for D in homes.values()}
    at = []
    for layer in matrices_of(coverage):
        where: list[Any] = []
        for d in (layer.d_i, layer.d_o):
            where += [str(homes[d]), len(dims[homes[d]])]
            dims[homes[d]] += [d] * layer.copies
        at.append((layer.name, tuple(where)))
    shares = _shares(counts, homes, slots)[0]
    owners = {D: [0] * len(entries) for D, entries in dims.items()}
    blocks, first = {}, dict(at)
    for shape, layers in shapes.items():
        mine = [int(owner) for owner in np.repeat(np.arange(slots), shares[shape])]
        blocks[name_of(*shape)] = (tuple(layer.name for layer in layers), _stack(mine, slots))
        for layer in layers:
            (a, i, g, j), K = first[layer.name], layer.copies
            owners[int(a)][i : i + K] = owners[int(g)][j : j + K] = mine[:K]
            mine = mine[K:]
    factors = {str(D): (D, _stack(owners[D], slots, D, tuple(dims[D]))) for D in sorted(dims)}
    return Layout(tuple(at), tuple(factors.items()), tuple(blocks.items()))


def name_of(d_i: int, d_o: int) -> str:
    """Of a shape."""
    return f"{d_i}x{d_o}"


def _homes(counts: Mapping[Shape, int], sizes: Sequence[int]) -> dict[int, int]:
    """The size D of the stack in which factors of each size d are."""
    return {d: min(D for D in sizes if d <= D) for d in {d for shape in counts for d in shape}}


def _sizes(counts: Mapping[Shape, int], slots: int) -> tuple[int, ...]:
    """Of stacks, so that the memory and the work of the owner who has most of each are small shares of all.

    One size after another joins the next larger one: the most similar ones while there are more than `TRIED`, then
    always that which saves most, while that saves something.
    """
    numbers = sum(count * (a**2 + g**2) for (a, g), count in counts.items())
    flops = sum(count * (a**3 + g**3) for (a, g), count in counts.items())

    def cost(sizes):
        homes = _homes(counts, sizes)
        shares, used = _shares(counts, homes, slots)
        work = np.sum([share * (homes[a] ** 3 + homes[g] ** 3) for (a, g), share in shares.items()], axis=0)
        return sum(D * D * entries.max() for D, entries in used.items()) / numbers + np.max(work) / flops

    sizes = tuple(sorted({d for shape in counts for d in shape}))
    if slots == 1 or len(sizes) < 2:
        return sizes
    without = lambda i: sizes[:i] + sizes[i + 1 :]
    while len(sizes) > TRIED:
        sizes = without(min(range(len(sizes) - 1), key=lambda i: sizes[i + 1] / sizes[i]))
    best = cost(sizes)
    while len(sizes) > 1:
        options = [without(i) for i in range(len(sizes) - 1)]
        costs = [cost(option) for option in options]
        if min(costs) > best:
            break
        best = min(costs)
        sizes = options[costs.index(best)]
    return sizes


def _shares(
    counts: Mapping[Shape, int], homes: Mapping[int, int], slots: int
) -> tuple[dict[Shape, np.ndarray], dict[int, np.ndarray]]:
    """(how many matrices of each shape every owner has, how many entries of each stack)."""
    cost = lambda shape: shape[0] ** 3 + shape[1] ** 3
    shares = {shape: np.full(slots, count // slots) for shape, count in counts.items()}
    load, used = np.zeros(slots), {D: np.zeros(slots, int) for D in homes.values()}
    for shape, share in shares.items():
        load += share * cost(shape)
        for d in shape:
            used[homes[d]] += share
    spread = np.argsort([int(f"{owner:016b}"[::-1], 2) for owner in range(slots)])  # far apart, also for fewer devices
    rank = np.argsort(spread)
    for shape in sorted(counts, key=cost, reverse=True):
        free = np.ones(slots, bool)
        for _ in range(counts[shape] % slots):
            longer = np.zeros(slots)
            for D, more in collections.Counter(homes[d] for d in shape).items():
                longer += D * D * np.maximum(used[D] + more - used[D].max(), 0)
            owner = np.lexsort((rank, load, longer, ~free))[0]
            free[owner] = False
            shares[shape][owner] += 1
            load[owner] += cost(shape)
            for d in shape:
                used[homes[d]][owner] += 1
    return shares, used


def _stack(owners: Sequence[int], slots: int, D: int = 0, dims: tuple[int, ...] = ()) -> Stack:
    """Of entries with these owners."""
    room = max(collections.Counter(owners).values())
    seen = collections.Counter()
    at = []
    for owner in owners:
        at.append(owner * room + seen[owner])
        seen[owner] += 1
    return Stack(room * slots, tuple(at), D, dims)


def inside(X: jax.Array, d: int) -> jax.Array:
    """What entries of size d have in the slots of a stack: (k, D, ..) to (k, d, ..)."""
    return X[(slice(None), *[slice(n - d, None) for n in X.shape[1:]])]


def slots_for(coverage: Coverage, scales: bool, mesh: Mapping[str, int] | None = None) -> int:
    """How many owners a mesh, or, without one, any mesh is best served by.

    On several devices, their number or a power of two: what takes the fewest bytes on each, and of equal ones the most.
    Else the largest power of two of which padding is a small share, `PADDING` at most, and no stack has to hold smaller
    factors, which one device would cut out of it again and again.
    """
    devices = math.prod((mesh or {}).values())
    most = min(MOST, max(devices, sum(layer.copies for layer in matrices_of(coverage))))
    options = {2**k for k in range(most.bit_length())}
    if mesh and devices > 1:
        split = lambda slots: math.prod(mesh[axis] for axis in axes_for(mesh, slots))
        cost = lambda slots: layout_of(coverage, slots).numbers(scales)[0] / split(slots)
        return min(options | {devices}, key=lambda slots: (cost(slots), -slots))
    alike = lambda layout: all(stack.outside is None for _, (_, stack) in layout.factors)
    small = lambda layout: layout.numbers(scales)[1] <= PADDING * layout.numbers(scales)[0]
    return max(n for n in options if alike(layout := layout_of(coverage, n)) and small(layout))


def overview(layout: Layout, slots: int) -> str:
    """A table of the stacks of factors: which sizes are in each, and what share of a copy of it is padding."""
    rows = [("stack", "sizes", "factors", "slots", "bytes per owner", "padding")]
    for size, (D, stack) in layout.factors:
        sizes = ", ".join(f"{d} x {count}" for d, count in sorted(collections.Counter(stack.dims).items()))
        padding = 1 - sum(d * d for d in stack.dims) / (D * D * stack.slots)
        each = 4 * D * D * stack.slots // slots
        rows.append((size, sizes, str(len(stack.at)), str(stack.slots), f"{each:,}", f"{padding:.1%}"))
    total, pads = layout.numbers(scales=False)
    rows.append(("all", "", "", "", f"{4 * total // slots:,}", f"{pads / total:.1%}"))
    return table(rows, left=2)


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


def from_parameters(X: jax.Array) -> jax.Array:
    """A stack of gradients on its way to the owners.

    On axes other than "data", which splits nothing but examples, parameters are split: then the compiler finds the
    exchange of their pieces. On "data" alone every device has all of them, but the compiler would split them first.
    """
    return everywhere(X) if mesh_shape().keys() <= {"data"} else X


def to_parameters(blocks: "Blocks") -> dict[str, jax.Array]:
    """Blocks by matrix's name, on their way back.

    On "data" alone they are gathered; where parameters are split, they leave split along another axis: on 8 devices an
    eighth of the bytes. Of a stack that is mostly padding, owners add what they have to zeros.
    """
    shape = mesh_shape()
    devices, axes, whole = math.prod(shape.values()), tuple(shape), shape.keys() <= {"data"}
    home = axes_for(shape, blocks.slots)
    copies = {layer.name: layer.copies for layer in matrices_of(blocks.coverage)}
    found = {}
    for name, (members, stack) in layout_of(blocks.coverage, blocks.slots).blocks:
        X = blocks.stacks[name]
        axis = None if whole else next((i for i in (2, 1) if X.shape[i] % devices == 0), None)
        if stack.slots >= 2 * len(stack.at):
            X, stack = _summed(X, stack, home, axis), _stack([0] * len(stack.at), 1)
        else:
            X = everywhere(X) if axis is None else jax.lax.with_sharding_constraint(X, spec_for(axes, axis))
        start = 0
        for member in members:
            found[member] = stack.take(X, start, copies[member])
            start += copies[member]
    return found


def _summed(X: jax.Array, stack: Stack, axes: tuple[str, ...], axis: int | None) -> jax.Array:
    """The entries of a stack alone, in order: on every device, or split along an axis."""
    count = len(stack.at)
    entry = np.full(stack.slots, count)
    entry[list(stack.at)] = np.arange(count)

    def local(X, entry):
        own = jnp.zeros((count, *X.shape[1:]), X.dtype).at[entry].set(X, mode="drop")
        if axis is None:
            return jax.lax.psum(own, axes)
        return jax.lax.psum_scatter(own, axes, scatter_dimension=axis, tiled=True)

    out = PartitionSpec() if axis is None else spec_for(axes, axis)
    return jax.shard_map(local, in_specs=spec_for(axes), out_specs=out, check_vma=False)(X, jnp.asarray(entry))


def shared(tree: PyTree, slots: int) -> PyTree:
    """Stacks that every device has, each device's share."""
    return constrain(everywhere(tree), axes_for(mesh_shape(), slots))


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
    sizes = tuple(D for _, (D, _) in layout.factors)
    real = lambda layout, stacks: {size: (arrays, layout.due(size, due)) for size, (arrays, due) in stacks.items()}
    if axes or not shape:
        return split(function, axes)(real(layout, stacks))
    other = layout_of(coverage, math.prod(shape.values()), sizes)
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
            extra.stacks[name]
            if isinstance(extra, Blocks)
            else from_parameters(stack.place([extra[m] for m in members]))
            for extra in extras
        ]
        inputs[name] = given
    sizes = {name: [size for size, _ in pair] for name, pair in index.items()}
    rows = {name: [row for _, row in pair] for name, pair in index.items()}
    dims = {name: [int(d) for d in name.split("x")] for name in index}
    used = {name: jnp.asarray(stack.used) if stack.padded else None for name, (_, stack) in layout.blocks}

    def local(stacks, rows, inputs, mine):
        pick = lambda X, row, d: inside(X if row is None else X[row], d)
        where = lambda name: zip(sizes[name], rows[name], dims[name], strict=True)
        parts = lambda name: [pick(X[size], row, d) for X in stacks for size, row, d in where(name)]
        return {name: of_some(mine[name], *parts(name), *given) for name, given in inputs.items()}

    def of_some(mine, *given):
        """The function, but zeros from owners who have nothing but padding."""
        if mine is None:
            return function(*given)
        zeros = lambda: jnp.zeros(jax.eval_shape(function, *given).shape)
        return jax.lax.cond(jnp.any(mine), lambda: function(*given), zeros)

    return Blocks(split(local, axes)(list(stacks), rows, inputs, used), coverage, slots)
