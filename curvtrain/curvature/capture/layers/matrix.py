"""Layers that are a product with a matrix."""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain.curvature.capture.layers.base import Layer, Unsupported, stack_of


@dataclasses.dataclass(frozen=True)
class MatrixLayer(Layer):
    """A layer y = a M whose parameters are a kernel and perhaps a bias.

    Attributes:
      groups: g, copies of M within the layer.
      order: axes of the kernel in the order (groups, inputs, outputs), as indices into its shape.
      inputs: number of inputs of a group, without the bias.
      outputs: of a group.
    """

    groups: int
    order: tuple[int, ...]
    inputs: int
    outputs: int

    @property
    def copies(self) -> int:
        """K."""
        return math.prod(self.stack) * self.groups

    @property
    def has_bias(self) -> bool:
        return len(self.shapes) > 1

    @property
    def d_i(self) -> int:
        return self.inputs + self.has_bias

    @property
    def d_o(self) -> int:
        return self.outputs

    def matrix(self, parameters):
        lead = len(self.stack)
        kernel = parameters["kernel"]
        axes = (*range(lead), *(lead + axis for axis in self.order))
        kernel = self._split_groups(kernel.transpose(axes)).reshape(self.copies, self.inputs, self.outputs)
        if not self.has_bias:
            return kernel
        bias = parameters["bias"].reshape(self.copies, 1, self.outputs)
        return jnp.concatenate([kernel, bias.astype(kernel.dtype)], axis=1)

    def parameters(self, matrix):
        lead, shapes = len(self.stack), dict(self.shapes)
        shape = shapes["kernel"]
        kernel = self._join_groups(matrix[:, : self.inputs]).reshape(*self.stack, *(shape[axis] for axis in self.order))
        back = sorted(range(len(shape)), key=self.order.__getitem__)
        found = {"kernel": kernel.transpose((*range(lead), *(lead + axis for axis in back)))}
        if self.has_bias:
            found["bias"] = matrix[:, self.inputs].reshape(*self.stack, *shapes["bias"])
        return found

    def _split_groups(self, kernel):
        """The kernel with its groups as a leading axis after the stack; here they are there already."""
        return kernel

    def _join_groups(self, kernel):
        return kernel

    @abc.abstractmethod
    def rows(self, x: jax.Array, examples: int) -> jax.Array:
        """a without the bias's 1: (g, N, R, inputs), float32."""

    @abc.abstractmethod
    def cotangents(self, s: jax.Array, examples: int) -> jax.Array:
        """s as (g, N, R, outputs), float32."""

    def with_one(self, a: jax.Array) -> jax.Array:
        """a with the bias's 1 appended."""
        return jnp.concatenate([a, jnp.ones((*a.shape[:-1], 1), a.dtype)], axis=-1) if self.has_bias else a


def kernel_shapes(module: Any, names: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, ...], tuple]:
    """(stack, shapes) of a module's kernel and bias, which should have the shapes in `names` after the stack."""
    stack = stack_of(module, "kernel", module.kernel.get_value(), names["kernel"])
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = (("kernel", names["kernel"]),)
    if module.bias is not None:
        if stack_of(module, "bias", module.bias.get_value(), names["bias"]) != stack:
            raise Unsupported("its kernel and bias are stacked differently")
        shapes += (("bias", names["bias"]),)
    return stack, shapes
