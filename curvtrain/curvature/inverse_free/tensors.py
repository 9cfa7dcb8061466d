"""Tensors that have factors: their sides, the structure of each side's factor, and who shares an array with whom.

A `Structures` says how factors look: a name for all sides of all tensors, or (regular expression, name) pairs that are
searched in the tensors' names, the first that matches counting, where instead of a name there may be one for every
side. What no pair matches is dense.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvtrain.curvature.inverse_free.structures import Diagonal, Structure, structure
from curvtrain.curvature.unstack import unstack

Structures = str | Sequence[tuple[str, str | Sequence[str]]]
Rates = Sequence[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Some tensors of one shape that belong together, such as the layers of a scan.

    Attributes:
      name: of the parameter or layer.
      copies: how many there are.
      sides: the shape of one.
      structures: of the factor of each side.
      rate: a factor of the rate at which its factors move.
    """

    name: str
    copies: int
    sides: tuple[int, ...]
    structures: tuple[Structure, ...]
    rate: float = 1.0


@dataclasses.dataclass(frozen=True)
class Stack:
    """Tensors of equal sides and structures: one array (L, *sides), tensor after tensor."""

    tensors: tuple[Tensor, ...]

    @property
    def sides(self) -> tuple[int, ...]:
        return self.tensors[0].sides

    @property
    def structures(self) -> tuple[Structure, ...]:
        return self.tensors[0].structures

    @property
    def count(self) -> int:
        """L."""
        return sum(tensor.copies for tensor in self.tensors)

    @property
    def name(self) -> str:
        """The key of its factors: "64x10_diagonal" has a dense and a diagonal side."""
        described = lambda d, s: f"{d}" if s.name == "dense" else f"{d}_{s.name}"
        return "x".join(map(described, self.sides, self.structures))

    @property
    def rates(self) -> np.ndarray:
        """(L,), the factors of the rate."""
        return np.repeat([tensor.rate for tensor in self.tensors], [tensor.copies for tensor in self.tensors])

    def read(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """Arrays (copies, ...) by the tensors' names, as one (L, ...)."""
        parts = [arrays[tensor.name] for tensor in self.tensors]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def write(self, X: jax.Array) -> dict[str, jax.Array]:
        """The inverse of `read`."""
        parts = unstack(X, [tensor.copies for tensor in self.tensors], axis=0)
        return {tensor.name: part for tensor, part in zip(self.tensors, parts, strict=True)}

    def matrices(self, stored: Mapping[str, Any], dtype: Any) -> list[jax.Array]:
        """The factors of each side, (L, d, d), or (L, d) of diagonal ones, in this dtype."""
        wide = lambda i: jax.tree.map(lambda a: a.astype(dtype), stored[str(i)])
        return [s.matrix(wide(i), d) for i, (d, s) in enumerate(zip(self.sides, self.structures, strict=True))]


@functools.cache
def stacks_of(tensors: tuple[Tensor, ...]) -> tuple[Stack, ...]:
    """Tensors by their sides and structures, in order."""
    found: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.sides, tensor.structures), []).append(tensor)
    return tuple(Stack(tuple(members)) for members in found.values())


def check_structures(argument: str, given: Any) -> Any:
    """The structures as they are kept, hashable. Raises TypeError or ValueError for what are none."""
    if isinstance(given, str):
        structure(argument, given)
        return given
    kept = []
    for pair in given if isinstance(given, Sequence) else [given]:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(
                f"{argument} should be a name, such as 'dense', or a list of (regular expression, name or names) "
                f"pairs, not {given!r}."
            )
        _check_regex(argument, pair[0])
        names = pair[1] if isinstance(pair[1], str) else tuple(pair[1])
        for name in [names] if isinstance(names, str) else names:
            structure(f"{argument} of {pair[0]!r}", name)
        kept.append((pair[0], names))
    return tuple(kept)


def check_rates(argument: str, given: Any, number: Any) -> tuple[tuple[str, float], ...]:
    """The factors of rates as they are kept. `number(argument, value)` checks a factor."""
    kept = []
    for pair in given if isinstance(given, Sequence) and not isinstance(given, str) else [given]:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(f"{argument} should be a list of (regular expression, factor) pairs, not {given!r}.")
        _check_regex(argument, pair[0])
        number(f"{argument} of {pair[0]!r}", pair[1])
        kept.append((pair[0], float(pair[1])))
    return tuple(kept)


def _check_regex(argument: str, regex: str) -> None:
    try:
        re.compile(regex)
    except re.error as error:
        raise ValueError(f"{argument}: {regex!r} is not a regular expression: {error}.") from error


def structures_for(
    argument: str, given: Structures, name: str, sides: tuple[int, ...], max_size: int
) -> tuple[Structure, ...]:
    """The structures of a tensor's sides; longer ones than `max_size` are diagonal.

    Raises ValueError where a structure does not fit its side, or there are not as many as there are sides.
    """
    if isinstance(given, str):
        chosen: Any = given
    else:
        chosen = next((names for regex, names in given if re.search(regex, name)), "dense")
    names = (chosen,) * len(sides) if isinstance(chosen, str) else chosen
    if len(names) != len(sides):
        raise ValueError(
            f"{argument} has {len(names)} structures for {name!r}, {', '.join(names)}, and its sides are {sides} "
            f"(those of length 1 do not count). Give one name, or one for each side."
        )
    found: list[Structure] = []
    for d, one in zip(sides, names, strict=True):
        s = structure(argument, one)
        if d > max_size:
            s = Diagonal()
        elif d < s.smallest:
            raise ValueError(
                f"{argument}: {one!r} needs a side of at least {s.smallest}, and {name!r} has one of {d}. Choose by "
                f"name, such as [({name!r}, 'dense'), ('.*', {one!r})]."
            )
        found.append(s)
    return tuple(found)
