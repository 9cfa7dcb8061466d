"""The interface of a layer. Symbols in the package's docstring."""

import abc
import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import jax

from curvtrain.curvature.capture.layers.blocks import Block
from curvtrain.curvature.capture.layers.gradients import Backward, Gradients

PyTree = Any
Path = tuple[Any, ...]


class Unsupported(Exception):
    """Why a module of a known class cannot be covered."""


@dataclasses.dataclass(frozen=True)
class Layer(abc.ABC):
    """One matrix M (K, d_i, d_o) of the model's parameters and what is known of its use, as static data.

    `from_module` makes a layer of a module, `register_layer` says for which class of modules. A subclass says how its
    parameters form M; with `gradients` it has statistics for DiagonalFisher, UnitWise and FullBlock, and with `block`
    also for KFAC and KroneckerDiagonal.

    Attributes:
      path: of the module in the model.
      kind: the module's class name.
      scan_axes: leading axes that `nnx.scan` or `nnx.vmap` gave its parameters.
      shapes: (name, shape without the scan axes) of each of the parameters that M is made of.
    """

    path: Path
    kind: str
    scan_axes: tuple[int, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    tapped: ClassVar[bool] = True  # whether its statistics come of taps on a module

    # -- its parameters ------------------------------------------------------------------------------------------------

    @classmethod
    @abc.abstractmethod
    def from_module(cls, path: Path, module: Any) -> "Layer":
        """The layer of a module with all of its parameters. Raises Unsupported with a reason."""

    def restricted(self, names: Collection[str]) -> "Layer":
        """The same layer with some of its parameters alone: those that are trained."""
        return dataclasses.replace(self, shapes=tuple((name, shape) for name, shape in self.shapes if name in names))

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.scan_axes) * sum(math.prod(shape) for _, shape in self.shapes)

    @property
    def name(self) -> str:
        return "/".join(map(str, self.path))

    @property
    def groups(self) -> int:
        """g, copies of the matrix in one call of the layer."""
        return 1

    @property
    def copies(self) -> int:
        """K = g times the scan axes."""
        return math.prod(self.scan_axes) * self.groups

    @property
    @abc.abstractmethod
    def d_i(self) -> int:
        """Rows of M."""

    @property
    @abc.abstractmethod
    def d_o(self) -> int:
        """Columns of M."""

    @abc.abstractmethod
    def matrix(self, parameters: Mapping[str, jax.Array]) -> jax.Array:
        """The parameters, or a vector like them, as M."""

    @abc.abstractmethod
    def parameters(self, matrix: jax.Array) -> dict[str, jax.Array]:
        """The inverse of `matrix`."""

    # -- its use -------------------------------------------------------------------------------------------------------

    def saved(self, module: Any, x: Any, options: Mapping[str, Any]) -> PyTree:
        """What of a call with input x, and other arguments by name, is kept for its statistics."""
        return x

    def leading(self, shape: tuple[int, ...]) -> int:
        """Length of the first axis of an input of this shape that is neither features nor groups; 1 if there is none.

        For a model that is called on a batch, this axis is that of the examples.
        """
        return shape[0] if len(shape) > 1 else 1

    def gradients(self, backward: Backward) -> Gradients:
        """The gradients of the examples of one call with respect to M.

        Where a layer is called several times for one example, estimators that need the gradients of examples take them
        of the model as a whole, and those of a call are asked for by K-FAC alone.
        """
        raise TypeError(f"{type(self).__name__} says nothing of its gradients: give it a method gradients().")

    def squares(self, backward: Backward) -> jax.Array:
        """sum_n D_n^2 elementwise: (g, d_i, d_o)."""
        return self.gradients(backward).corrected(backward).squares()

    def units(self, backward: Backward) -> jax.Array:
        """sum_n D_n[:, o] D_n[:, o]^T for every column o: (g, d_o, d_i, d_i)."""
        return self.gradients(backward).corrected(backward).units()

    def full(self, backward: Backward) -> jax.Array:
        """sum_n vec(D_n) vec(D_n)^T with row-major vec: (g, d_i d_o, d_i d_o)."""
        return self.gradients(backward).corrected(backward).full()

    def block(self) -> Block:
        """Returns the block that K-FAC measures, stores and applies: `Factored()`, `UnitBlocks(...)` or one's own."""
        raise TypeError(f"{type(self).__name__} has no block of K-FAC: give it a method block().")

    def lacks(self, method: str) -> bool:
        """Says whether the layer's class leaves out a method that a subclass may leave out."""
        return getattr(type(self), method) is getattr(Layer, method)


def scan_axes_of(array: Any, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The leading axes of a parameter beyond `shape`. Raises Unsupported if the rest of it is not `shape`."""
    lead = array.ndim - len(shape)
    if lead < 0 or array.shape[lead:] != shape:
        raise Unsupported(
            f"its {name} has shape {array.shape}, not (..., {', '.join(map(str, shape))}): axes that nnx.scan or "
            f"nnx.vmap add should lead"
        )
    return array.shape[:lead]
