"""Vectors like the parameters as the tensors that have factors, and back."""

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain._dtypes import check_real, width
from curvtrain.curvature.capture import Coverage, Layer
from curvtrain.objective import Path, by_path, path_name

PyTree = Any
Arrays = dict[str, jax.Array]


class View(abc.ABC):
    """How parameters are tensors: static. An array of tensors is (copies, *sides)."""

    @property
    @abc.abstractmethod
    def width(self) -> str:
        """The dtype in which all is computed, as `curvtrain._dtypes.width` chooses it for the parameters."""

    @abc.abstractmethod
    def shapes(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """(copies, sides) of the tensors by name. Parameters without entries are none."""

    @abc.abstractmethod
    def read(self, vector: PyTree) -> Arrays:
        """The tensors of a vector like the parameters, by name."""

    @abc.abstractmethod
    def write(self, arrays: Mapping[str, jax.Array]) -> PyTree:
        """The inverse of `read`."""

    @abc.abstractmethod
    def like(self) -> PyTree:
        """Shapes and dtypes of a vector like the parameters."""

    @abc.abstractmethod
    def groups(self) -> tuple[tuple[Path, ...], ...]:
        """Paths of the parameters that share a tensor."""


@dataclasses.dataclass(frozen=True)
class EachParameter(View):
    """Every parameter is a tensor, without its axes of length 1; leading axes of an `nnx.scan` count copies.

    Attributes:
      treedef: the structure of the parameters.
      paths, leaf_shapes, scan_axes: of their leaves.
      dtype: the width.
    """

    treedef: Any
    paths: tuple[Path, ...]
    leaf_shapes: tuple[tuple[int, ...], ...]
    scan_axes: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, name: str, params: PyTree, scan_axes: Sequence[int]) -> "EachParameter":
        """Raises TypeError for parameters that are no real numbers; `name` is what messages call whoever asks."""
        check_real(params, f"Parameters of curvature.{name}", "Split a complex one into its real and imaginary part.")
        leaves = by_path(params)
        shapes = tuple(tuple(leaf.shape) for leaf in leaves.values())
        return cls(jax.tree.structure(params), tuple(leaves), shapes, tuple(scan_axes), width(params).name)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the leaves, in order."""
        return tuple(map(path_name, self.paths))

    @property
    def width(self):
        return self.dtype

    def shapes(self):
        found: dict[str, tuple[int, tuple[int, ...]]] = {}
        for name, shape, axes in zip(self.names, self.leaf_shapes, self.scan_axes, strict=True):
            if math.prod(shape):
                sides = tuple(d for d in shape[axes:] if d != 1)
                found[name] = math.prod(shape[:axes]), sides or (1,)
        return found

    def read(self, vector):
        leaves, shapes = dict(zip(self.names, self.treedef.flatten_up_to(vector), strict=True)), self.shapes()
        return {name: leaves[name].reshape(copies, *sides) for name, (copies, sides) in shapes.items()}

    def write(self, arrays):
        empty = lambda shape: jnp.zeros(shape, self.dtype)
        pairs = zip(self.names, self.leaf_shapes, strict=True)
        return self.treedef.unflatten([arrays[n].reshape(s) if n in arrays else empty(s) for n, s in pairs])

    def like(self):
        return self.treedef.unflatten([jax.ShapeDtypeStruct(s, jnp.dtype(self.dtype)) for s in self.leaf_shapes])

    def groups(self):
        return tuple((path,) for path in self.paths)


@dataclasses.dataclass(frozen=True)
class EachLayer(View):
    """Every layer is a matrix, or where K-FAC has no factors for it, a vector.

    Attributes:
      coverage: which layer every parameter belongs to.
    """

    coverage: Coverage

    @property
    def width(self):
        return self.coverage.dtype

    def shapes(self):
        return {layer.name: (layer.copies, self.sides(layer)) for layer in self.coverage.layers}

    @classmethod
    def sides(cls, layer: Layer) -> tuple[int, ...]:
        """The sides of a layer's tensor."""
        return (layer.d_i, layer.d_o) if cls.factored(layer) else (layer.d_i * layer.d_o,)

    @staticmethod
    def factored(layer: Layer) -> bool:
        """Whether K-FAC has factors for a layer."""
        return layer.tapped and layer.block().own is None

    def read(self, vector):
        matrices, shapes = self.coverage.matrices(vector), self.shapes()
        return {name: matrices[name].reshape(copies, *sides) for name, (copies, sides) in shapes.items()}

    def write(self, arrays):
        return self.coverage.vector({x.name: arrays[x.name].reshape(-1, x.d_i, x.d_o) for x in self.coverage.layers})

    def like(self):
        return self.coverage.like()

    def groups(self):
        return self.coverage.groups()
