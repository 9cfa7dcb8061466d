"""Layers that are a product with a matrix."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain.curvature.capture.layers.base import Layer, Unsupported, scan_axes_of
from curvtrain.curvature.capture.layers.blocks import Factored
from curvtrain.curvature.capture.layers.gradients import Products


@dataclasses.dataclass(frozen=True)
class MatrixLayer(Layer):
    """A layer y = a M whose parameters are a kernel and perhaps a bias; either may be frozen.

    Attributes:
      copies_in_call: g, copies of M within the layer.
      order: axes of the kernel in the order (groups, inputs, outputs), as indices into its shape.
      inputs: number of inputs of a group, without the bias.
      outputs: of a group.
    """

    copies_in_call: int
    order: tuple[int, ...]
    inputs: int
    outputs: int

    @property
    def groups(self):
        return self.copies_in_call

    @property
    def has_kernel(self) -> bool:
        return "kernel" in dict(self.shapes)

    @property
    def has_bias(self) -> bool:
        return "bias" in dict(self.shapes)

    @property
    def d_i(self):
        return self.inputs * self.has_kernel + self.has_bias

    @property
    def d_o(self):
        return self.outputs

    def matrix(self, parameters):
        lead, rows = len(self.scan_axes), []
        if self.has_kernel:
            axes = (*range(lead), *(lead + axis for axis in self.order))
            kernel = self._split_groups(parameters["kernel"].transpose(axes))
            rows.append(kernel.reshape(self.copies, self.inputs, self.outputs))
        if self.has_bias:
            bias = parameters["bias"].reshape(self.copies, 1, self.outputs)
            rows.append(bias.astype(rows[0].dtype) if rows else bias)
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)

    def parameters(self, matrix):
        lead, shapes, arrays = len(self.scan_axes), dict(self.shapes), {}
        if self.has_kernel:
            shape = shapes["kernel"]
            kernel = self._join_groups(matrix[:, : self.inputs])
            kernel = kernel.reshape(*self.scan_axes, *(shape[axis] for axis in self.order))
            back = sorted(range(len(shape)), key=self.order.__getitem__)
            arrays["kernel"] = kernel.transpose((*range(lead), *(lead + axis for axis in back)))
        if self.has_bias:
            arrays["bias"] = matrix[:, -1].reshape(*self.scan_axes, *shapes["bias"])
        return arrays

    def _split_groups(self, kernel):
        """The kernel with its groups as a leading axis after the scan axes; here they are there already."""
        return kernel

    def _join_groups(self, kernel):
        return kernel

    @abc.abstractmethod
    def rows(self, x: jax.Array, examples: int) -> jax.Array:
        """a without the bias's 1: (g, N, R, inputs), float32 at least."""

    @abc.abstractmethod
    def cotangents(self, s: jax.Array, examples: int) -> jax.Array:
        """s as (g, N, R, outputs), float32 at least."""

    def gradients(self, backward):
        s = self.cotangents(backward.s, backward.examples)
        a = [self.rows(backward.saved, backward.examples)] if self.has_kernel else []
        if self.has_bias:
            a.append(jnp.ones((*s.shape[:-1], 1), s.dtype))
        return Products(a[0] if len(a) == 1 else jnp.concatenate(a, axis=-1), s)

    def block(self):
        return Factored()


def kernel_shapes(module: Any, names: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, ...], tuple]:
    """(scan axes, shapes) of a module's kernel and bias, which should have the shapes in `names` after those axes."""
    scan_axes = scan_axes_of(module.kernel.get_value(), "kernel", names["kernel"])
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = (("kernel", names["kernel"]),)
    if module.bias is not None:
        if scan_axes_of(module.bias.get_value(), "bias", names["bias"]) != scan_axes:
            raise Unsupported("its kernel and bias have different axes of nnx.scan or nnx.vmap")
        shapes += (("bias", names["bias"]),)
    return scan_axes, shapes
