"""Slots: where the entries of one array are, and how they get in and out."""

import collections
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Slots:
    """Where the entries of one array are.

    Attributes:
      count: number of slots, L.
      at: `at[k]` is the slot of entry k; all other slots are padding.
      D: the room of a slot for factors; 0 for blocks.
      dims: `dims[k]` is the size d of factor k.
    """

    count: int
    at: tuple[int, ...]
    D: int = 0
    dims: tuple[int, ...] = ()

    @property
    def padded(self) -> bool:
        return len(self.at) < self.count

    @property
    def used(self) -> np.ndarray:
        """Whether a slot has an entry (slots,)."""
        used = np.zeros(self.count, bool)
        used[list(self.at)] = True
        return used

    @property
    def outside(self) -> np.ndarray | None:
        """Which rows of a slot are before those of its entry (slots, D); None if none are."""
        if all(d == self.D for d in self.dims):
            return None
        outside = np.zeros((self.count, self.D), bool)
        for at, d in zip(self.at, self.dims, strict=True):
            outside[at, : self.D - d] = True
        return outside

    def place(self, parts: Sequence[jax.Array]) -> jax.Array:
        """The entries, given in order and in parts (k, ...), in their slots; zero elsewhere."""
        if self.D:
            before = lambda X: [(0, 0), *[(self.D - n, 0) for n in X.shape[1:]]]
            parts = [X if all(n == self.D for n in X.shape[1:]) else jnp.pad(X, before(X)) for X in parts]
        if self.at == tuple(range(self.count)):
            return jnp.concatenate(parts)
        rows = [(i, k) for i, part in enumerate(parts) for k in range(len(part))]
        held = dict(zip(self.at, rows, strict=True))
        pieces, slot = [], 0
        while slot < self.count:
            run = slot + 1
            if slot not in held:
                while run < self.count and run not in held:
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


def slots_of(owners: Sequence[int], number: int, D: int = 0, dims: tuple[int, ...] = ()) -> Slots:
    """The slots of entries with these owners."""
    room = max(collections.Counter(owners).values())
    seen = collections.Counter()
    at = []
    for owner in owners:
        at.append(owner * room + seen[owner])
        seen[owner] += 1
    return Slots(room * number, tuple(at), D, dims)


def inside(X: jax.Array, d: int) -> jax.Array:
    """What entries of size d have in their slots: (k, D, ..) to (k, d, ..)."""
    return X[(slice(None), *[slice(n - d, None) for n in X.shape[1:]])]
