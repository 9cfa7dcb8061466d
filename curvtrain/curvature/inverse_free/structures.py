"""Structures say which matrices a factor may be: groups of matrices, of which some entries are stored.

| structure | its matrices of size d | stored |
|---|---|---|
| `dense` | all | (d, d) |
| `diagonal` | diagonal ones | (d,) |
| `block30diagonal` | blocks of 30 on the diagonal; the rest is one smaller block | (d // 30, 30, 30), the rest |
| `hierarchical15_10` | [[A, B, C], [0, D, 0], [0, E, F]]: A of 15 rows, F of 10, D diagonal | [A B C], D, [E F] |
| `upper_toeplitz` | upper triangular, equal along each diagonal | (d,), the first row |
| `lower_toeplitz` | lower triangular, equal along each diagonal | (d,), the first column |

Each of these sets is closed under products and has the identity, and with every m of it has I - m, so a factor stays in
it. A direction M, which is symmetric, is taken to the set's m that changes K K^T most like it: m + m^T is nearest to
2 M, in the Frobenius norm. So an entry whose mirror image is not in the set counts twice, and along a diagonal of a
Toeplitz matrix there is the mean. Lin et al. (2024), arXiv 2312.05705.
"""

import abc
import dataclasses
import difflib
import functools
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

Stored = Any  # an array, or a dictionary of arrays, with a leading axis of tensors


@dataclasses.dataclass(frozen=True)
class Structure(abc.ABC):
    """A group of matrices. Its methods take and give whole matrices X (L, d, d)."""

    is_vector: ClassVar[bool] = False  # whether it works on diagonals (L, d) in the place of matrices

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """As users write it."""

    @property
    def smallest(self) -> int:
        """The smallest d that it fits."""
        return 1

    @abc.abstractmethod
    def read(self, X: jax.Array) -> Stored:
        """The stored entries of X, which is in the group, or of any X: those at their places."""

    @abc.abstractmethod
    def matrix(self, stored: Stored, d: int) -> jax.Array:
        """The inverse of `read`."""

    def project(self, M: jax.Array) -> Stored:
        """The stored entries of the m in the group's algebra with m + m^T nearest to 2 M, for symmetric M."""
        weights = _weights(self, M.shape[-1])
        return self.read(M if weights is None else M * jnp.asarray(weights, M.dtype))


@functools.cache
def _weights(structure: Structure, d: int) -> np.ndarray | None:
    """(d, d): 2 for entries whose mirror image is not in the group, else 1; None if that is so for all."""
    with jax.ensure_compile_time_eval():
        inside = structure.matrix(structure.read(jnp.ones((1, d, d), jnp.float32)), d)[0]
        inside = np.asarray(inside) != 0
    weights = np.where(inside & ~inside.T, 2.0, 1.0)
    return weights if np.any(weights != 1) else None


@dataclasses.dataclass(frozen=True)
class Dense(Structure):
    """All matrices."""

    name = "dense"

    def read(self, X):
        return X

    def matrix(self, stored, d):
        return stored


@dataclasses.dataclass(frozen=True)
class Diagonal(Structure):
    """Diagonal matrices, as vectors throughout: nothing of size d x d is ever made."""

    is_vector = True
    name = "diagonal"

    def read(self, X):
        return X

    def matrix(self, stored, d):
        return stored

    def project(self, M):
        return M


@dataclasses.dataclass(frozen=True)
class BlockDiagonal(Structure):
    """Blocks of b on the diagonal."""

    b: int

    @property
    def name(self):
        return f"block{self.b}diagonal"

    def read(self, X):
        L, d = X.shape[:2]
        n, whole = d // self.b, d - d % self.b
        stored = {}
        if n:
            blocks = X[:, :whole, :whole].reshape(L, n, self.b, n, self.b)
            stored["blocks"] = jnp.einsum("lnanb->lnab", blocks)
        if whole < d:
            stored["rest"] = X[:, whole:, whole:]
        return stored

    def matrix(self, stored, d):
        whole = d - d % self.b
        parts = []
        if whole:
            blocks = stored["blocks"]
            L, n = blocks.shape[:2]
            placed = jnp.eye(n, dtype=blocks.dtype)[None, :, None, :, None] * blocks[:, :, :, None, :]
            parts.append(jnp.pad(placed.reshape(L, whole, whole), ((0, 0), (0, 0), (0, d - whole))))
        if whole < d:
            parts.append(jnp.pad(stored["rest"], ((0, 0), (0, 0), (whole, 0))))
        return jnp.concatenate(parts, axis=1)


@dataclasses.dataclass(frozen=True)
class Hierarchical(Structure):
    """[[A, B, C], [0, D, 0], [0, E, F]] with so many rows of A and of F, and a diagonal D."""

    first: int
    last: int

    @property
    def name(self):
        return f"hierarchical{self.first}_{self.last}"

    @property
    def smallest(self):
        return self.first + self.last

    def read(self, X):
        d = X.shape[-1]
        stop = d - self.last
        stored = {"first": X[:, : self.first], "last": X[:, stop:, self.first :]}
        if self.first < stop:
            middle = X[:, self.first : stop, self.first : stop]
            stored["middle"] = jnp.diagonal(middle, axis1=-2, axis2=-1)
        return stored

    def matrix(self, stored, d):
        parts = [stored["first"]]
        if "middle" in stored:
            D = stored["middle"][:, :, None] * jnp.eye(d - self.smallest, dtype=stored["middle"].dtype)
            parts.append(jnp.pad(D, ((0, 0), (0, 0), (self.first, self.last))))
        parts.append(jnp.pad(stored["last"], ((0, 0), (0, 0), (self.first, 0))))
        return jnp.concatenate(parts, axis=1)


@dataclasses.dataclass(frozen=True)
class Toeplitz(Structure):
    """Triangular matrices that are equal along each diagonal."""

    lower: bool

    @property
    def name(self):
        return "lower_toeplitz" if self.lower else "upper_toeplitz"

    def read(self, X):
        return X[:, :, 0] if self.lower else X[:, 0]

    def matrix(self, stored, d):
        offsets = np.arange(d)[None] - np.arange(d)[:, None]
        offsets = -offsets if self.lower else offsets
        return jnp.where(offsets >= 0, stored[:, np.maximum(offsets, 0)], 0)

    def project(self, M):
        L, d = M.shape[:2]
        # with rows of 2 d read as rows of 2 d + 1, each row is one further to the left: diagonals are columns
        wide = jnp.pad(M, ((0, 0), (0, 0), (0, d))).reshape(L, -1)
        sums = jnp.sum(jnp.pad(wide, ((0, 0), (0, d))).reshape(L, d, 2 * d + 1), axis=1)[:, :d]
        twice = np.where(np.arange(d) == 0, 1.0, 2.0)
        return sums * jnp.asarray(twice / np.arange(d, 0, -1), M.dtype)


KNOWN = ("dense", "diagonal", "block30diagonal", "hierarchical15_15", "lower_toeplitz", "upper_toeplitz")
_FIXED = {s.name: s for s in (Dense(), Diagonal(), Toeplitz(True), Toeplitz(False))}


def structure(argument: str, name: Any) -> Structure:
    """The structure of a name; numbers in it may be others. Raises TypeError or ValueError for what is none."""
    if not isinstance(name, str):
        raise TypeError(f"{argument} should be the name of a structure, such as 'dense', not {name!r}.")
    if name in _FIXED:
        return _FIXED[name]
    if (found := re.fullmatch(r"block([1-9]\d*)diagonal", name)) is not None:
        return BlockDiagonal(int(found[1]))
    if (found := re.fullmatch(r"hierarchical([1-9]\d*)_([1-9]\d*)", name)) is not None:
        return Hierarchical(int(found[1]), int(found[2]))
    close = difflib.get_close_matches(name, KNOWN, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"{argument} should be one of {', '.join(map(repr, KNOWN))}, or with other numbers, not {name!r}.{hint}"
    )
