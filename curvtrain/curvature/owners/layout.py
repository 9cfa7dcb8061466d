"""Which owner has which matrices: the static layout of slots.

A *matrix* here is anything with two square factors, of sizes d_i and d_o, and a block of shape (d_i, d_o): a layer of
K-FAC, a parameter of Shampoo. Factors of one size are stored in one array of slots, and so are blocks of one shape.

| symbol | meaning |
|---|---|
| S | `owners`: their number; a matrix's two factors, its block and its gradient have the same owner |
| L | slots of an array, (L, D, D) for factors and (L, d_i, d_o) for blocks |
| n | devices |

Every array has room for the same number of entries of every owner, owner after owner; what is left over is padding,
which is zero and never factorised. So wherever n divides S, the leading axis of all arrays splits over all mesh axes,
each device has whole owners, and multiplying a gradient by its factors needs no one else's. S belongs to the state,
which is the same on any mesh: checkpoints made on 8 devices open on 4, 2 and 1.

Entries go to owners evenly, shape by shape; those that are left over go where they make no array longer, or to where
there is least work so far, d_i^3 + d_o^3 each.

An array that few factors share is mostly padding. So a size d joins the array of the next larger size D where an owner
then has less memory and work to spare for them in all. Its factors stand in the last d rows and columns. The rows
before them are zero; a factorisation gives them a harmless diagonal and ignores the result (`Slots.outside`). The
ascending eigenvalues, of which the first are of the padding, keep their places too.

Where n does not divide S, arrays are split over as many axes of the mesh as do; where none does, everything is
replicated, each device still factorises only its share, and the results are gathered once. That is what S = 1 chooses:
more memory, and no communication between two refreshes.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvtrain.curvature.owners.slots import Slots, inside, slots_of

Kind = tuple[int, int, int, int]  # d_i, d_o, and the sizes of the two factors

TRIED = 12  # sizes of arrays of which all ways to join two are tried


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One matrix, or several of one shape that belong together.

    Attributes:
      name: of the layer or parameter.
      copies: K, how many there are.
      d_i, d_o: its sides, which are the sizes of the two factors.
      factored: which of the two sides have a factor. One that has none has a slot of size 1 instead.
    """

    name: str
    copies: int
    d_i: int
    d_o: int
    factored: tuple[bool, bool] = (True, True)

    @property
    def kind(self) -> Kind:
        """(d_i, d_o, sizes of the two factors): matrices of one kind are handled together."""
        a, g = self.factored
        return self.d_i, self.d_o, self.d_i if a else 1, self.d_o if g else 1


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each matrix's factors and block are: static.

    Attributes:
      matrices: all of them, in order.
      owners: S.
      at: for each matrix's name, (size of A's array, its first entry there, size of G's array, its first entry there).
      factors: for each size's name, (D, its slots).
      blocks: for each shape's name, (names of its matrices in order, its slots).
    """

    matrices: tuple[Matrix, ...]
    owners: int
    at: tuple[tuple[str, tuple[str, int, str, int]], ...]
    factors: tuple[tuple[str, tuple[int, Slots]], ...]
    blocks: tuple[tuple[str, tuple[tuple[str, ...], Slots]], ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Matrix]:
        return {matrix.name: matrix for matrix in self.matrices}

    def of_size(self, size: str) -> Slots:
        """The slots of the factors of one size."""
        return dict(self.factors)[size][1]

    def due(self, size: str, due: jax.Array | None = None) -> Any:
        """`due` (L,) without the padding; None for all slots."""
        slots = self.of_size(size)
        if not slots.padded:
            return due
        return jnp.asarray(slots.used) if due is None else due & slots.used

    def pair(self, arrays: Mapping[str, jax.Array], name: str) -> tuple[jax.Array, jax.Array]:
        """(A's part (K, d_i, ...), G's part (K, d_o, ...)) of arrays by size, for one matrix."""
        matrix, (a, i, g, j) = self.by_name[name], dict(self.at)[name]
        take = lambda size, start, d: inside(self.of_size(size).take(arrays[size], start, matrix.copies), d)
        return take(a, i, matrix.kind[2]), take(g, j, matrix.kind[3])

    @functools.cached_property
    def entries(self) -> dict[str, tuple[tuple[str, np.ndarray], tuple[str, np.ndarray]]]:
        """For each shape's name, ((size of A, the slot of each entry's A), the same of G), entries in order."""
        first, found = dict(self.at), {}
        for shape, (members, _) in self.blocks:
            sizes: list[tuple[str, np.ndarray]] = []
            for side in (0, 2):
                size = str(first[members[0]][side])
                numbers = [int(first[m][side + 1]) + k for m in members for k in range(self.by_name[m].copies)]
                sizes.append((size, np.array(self.of_size(size).at)[numbers]))
            found[shape] = (sizes[0], sizes[1])
        return found

    def rows(self, shape: str) -> tuple[tuple[str, np.ndarray], tuple[str, np.ndarray]]:
        """For the slots of a shape's blocks, ((size of A, the slot of each one's A), the same of G); 0 for padding."""
        slots = dict(self.blocks)[shape][1]
        wide = []
        for size, numbers in self.entries[shape]:
            rows = np.zeros(slots.count, np.int32)
            rows[list(slots.at)] = numbers
            wide.append((size, rows))
        return wide[0], wide[1]

    @functools.cached_property
    def sides(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(slot of A, slot of G, d_i, d_o) of every matrix's copies; slots count on from size to size.

        With them, what is small and per factor (a trace, a shift) is one vector over all slots, see `joined`.
        """
        offsets, total = {}, 0
        for size, (_, slots) in self.factors:
            offsets[size], total = total, total + slots.count
        A, G, dims_i, dims_o = [], [], [], []
        for matrix, (_, (a, i, g, j)) in zip(self.matrices, self.at, strict=True):
            A += [offsets[a] + at for at in self.of_size(a).at[i : i + matrix.copies]]
            G += [offsets[g] + at for at in self.of_size(g).at[j : j + matrix.copies]]
            dims_i += [matrix.d_i] * matrix.copies
            dims_o += [matrix.d_o] * matrix.copies
        return np.array(A, int), np.array(G, int), np.array(dims_i, np.float32), np.array(dims_o, np.float32)

    def joined(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """Vectors (L,) by size as one."""
        parts = [arrays[size] for size, _ in self.factors]
        return jnp.concatenate(parts) if parts else jnp.zeros(0, jnp.float32)

    def parted(self, vector: jax.Array) -> dict[str, jax.Array]:
        """The inverse of `joined`."""
        ends = np.cumsum([slots.count for _, (_, slots) in self.factors])
        return (
            dict(zip([size for size, _ in self.factors], jnp.split(vector, ends[:-1]), strict=True))
            if len(ends)
            else {}
        )

    def numbers(self, scales: bool) -> tuple[int, int]:
        """How many numbers (a copy of all factors, and of all blocks, if there are scales) take: (all, of padding)."""
        total = used = 0
        for _, (D, slots) in self.factors:
            total, used = total + D * D * slots.count, used + sum(d * d for d in slots.dims)
        for name, (_, slots) in self.blocks if scales else ():
            count = math.prod(kind_of(name)[:2])
            total, used = total + count * slots.count, used + count * len(slots.at)
        return total, total - used


@functools.cache
def layout_of(matrices: tuple[Matrix, ...], owners: int = 1, sizes: tuple[int, ...] | None = None) -> Layout:
    """The layout for so many owners; `sizes` of the arrays: those that cost an owner least."""
    kinds = collections.defaultdict[Kind, list[Matrix]](list)
    for matrix in matrices:
        kinds[matrix.kind].append(matrix)
    counts = {kind: sum(matrix.copies for matrix in members) for kind, members in kinds.items()}
    homes = _homes(counts, sizes or _sizes(counts, owners))
    dims: dict[int, list[int]] = {D: [] for D in homes.values()}
    at = []
    for matrix in matrices:
        where: list[Any] = []
        for d in matrix.kind[2:]:
            where += [str(homes[d]), len(dims[homes[d]])]
            dims[homes[d]] += [d] * matrix.copies
        at.append((matrix.name, tuple(where)))
    shares = _shares(counts, homes, owners)[0]
    owner_of = {D: [0] * len(entries) for D, entries in dims.items()}
    blocks, first = {}, dict(at)
    for kind, members in kinds.items():
        mine = [int(owner) for owner in np.repeat(np.arange(owners), shares[kind])]
        blocks[name_of(*kind)] = (tuple(matrix.name for matrix in members), slots_of(mine, owners))
        for matrix in members:
            (a, i, g, j), K = first[matrix.name], matrix.copies
            owner_of[int(a)][i : i + K] = owner_of[int(g)][j : j + K] = mine[:K]
            mine = mine[K:]
    factors = {str(D): (D, slots_of(owner_of[D], owners, D, tuple(dims[D]))) for D in sorted(dims)}
    return Layout(matrices, owners, tuple(at), tuple(factors.items()), tuple(blocks.items()))


def name_of(*kind: int) -> str:
    """The name of a kind: "3x5", or "3x5_1x5" where one side of a 3 x 5 matrix has no factor."""
    d_i, d_o, *factors = kind
    return f"{d_i}x{d_o}" if [d_i, d_o] == factors else f"{d_i}x{d_o}_{factors[0]}x{factors[1]}"


def kind_of(name: str) -> Kind:
    """The inverse of `name_of`."""
    sides, _, factors = name.partition("_")
    (d_i, d_o), (f_i, f_o) = (map(int, part.split("x")) for part in (sides, factors or sides))
    return d_i, d_o, f_i, f_o


def _homes(counts: Mapping[Kind, int], sizes: Sequence[int]) -> dict[int, int]:
    """The size D of the array in which factors of each size d are."""
    return {d: min(D for D in sizes if d <= D) for d in {d for kind in counts for d in kind[2:]}}


def _sizes(counts: Mapping[Kind, int], slots: int) -> tuple[int, ...]:
    """Sizes of arrays, so that the memory and the work of the owner who has most of each are small shares of all.

    One size after another joins the next larger one: the most similar ones while there are more than `TRIED`, then
    always that which saves most, while that saves something.
    """
    numbers = sum(count * (a**2 + g**2) for (_, _, a, g), count in counts.items())
    flops = sum(count * (a**3 + g**3) for (_, _, a, g), count in counts.items())

    def cost(sizes):
        homes = _homes(counts, sizes)
        shares, used = _shares(counts, homes, slots)
        work = np.sum([share * (homes[a] ** 3 + homes[g] ** 3) for (_, _, a, g), share in shares.items()], axis=0)
        return sum(D * D * entries.max() for D, entries in used.items()) / numbers + np.max(work) / flops

    sizes = tuple(sorted({d for kind in counts for d in kind[2:]}))
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
    counts: Mapping[Kind, int], homes: Mapping[int, int], slots: int
) -> tuple[dict[Kind, np.ndarray], dict[int, np.ndarray]]:
    """(how many matrices of each kind every owner has, how many entries of each array)."""
    cost = lambda kind: kind[2] ** 3 + kind[3] ** 3
    shares = {kind: np.full(slots, count // slots) for kind, count in counts.items()}
    load, used = np.zeros(slots), {D: np.zeros(slots, int) for D in homes.values()}
    for kind, share in shares.items():
        load += share * cost(kind)
        for d in kind[2:]:
            used[homes[d]] += share
    spread = np.argsort([int(f"{owner:016b}"[::-1], 2) for owner in range(slots)])  # far apart, also for fewer devices
    rank = np.argsort(spread)
    for kind in sorted(counts, key=cost, reverse=True):
        free = np.ones(slots, bool)
        for _ in range(counts[kind] % slots):
            longer = np.zeros(slots)
            for D, more in collections.Counter(homes[d] for d in kind[2:]).items():
                longer += D * D * np.maximum(used[D] + more - used[D].max(), 0)
            owner = np.lexsort((rank, load, longer, ~free))[0]
            free[owner] = False
            shares[kind][owner] += 1
            load[owner] += cost(kind)
            for d in kind[2:]:
                used[homes[d]][owner] += 1
    return shares, used
