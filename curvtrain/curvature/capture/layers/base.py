"""The interface of a layer. Symbols in the package's docstring."""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

PyTree = Any
Path = tuple[Any, ...]


class Unsupported(Exception):
    """Why a module of a known class cannot be covered."""


@dataclasses.dataclass(frozen=True)
class Layer(abc.ABC):
    """One module of the model, as static data. `register_layer` adds classes; `from_module` makes one of a module.

    Attributes:
      path: of the module in the model.
      kind: its class name.
      stack: leading axes that `nnx.scan` or `nnx.vmap` gave its parameters.
      shapes: (name, shape without the stack) of each of its parameters, those that M is made of.
    """

    path: Path
    kind: str
    stack: tuple[int, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    @abc.abstractmethod
    def from_module(cls, path: Path, module: Any) -> "Layer":
        """The layer of a module. Raises Unsupported with a reason."""

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.stack) * sum(math.prod(shape) for _, shape in self.shapes)

    @property
    def name(self) -> str:
        return "/".join(map(str, self.path))

    def saved(self, module: Any, x: Any, options: Mapping[str, Any]) -> PyTree:
        """What of a call with input x, and other arguments by name, is kept for its statistics."""
        return x

    def leading(self, shape: tuple[int, ...]) -> int:
        """Length of the first axis of an input of this shape that is neither features nor groups; 1 if there is none.

        For a model that is called on a batch, this axis is that of the examples.
        """
        return shape[0] if len(shape) > 1 else 1

    @abc.abstractmethod
    def matrix(self, parameters: Mapping[str, jax.Array]) -> jax.Array:
        """The parameters, or a vector like them, as M."""

    @abc.abstractmethod
    def parameters(self, matrix: jax.Array) -> dict[str, jax.Array]:
        """The inverse of `matrix`."""


def stack_of(module: Any, name: str, array: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The leading axes of a parameter beyond `shape`. Raises Unsupported if the rest of it is not `shape`."""
    lead = array.ndim - len(shape)
    if lead < 0 or array.shape[lead:] != shape:
        raise Unsupported(
            f"its {name} has shape {array.shape}, not (..., {', '.join(map(str, shape))}): axes that nnx.scan or "
            f"nnx.vmap add should lead"
        )
    return array.shape[:lead]
