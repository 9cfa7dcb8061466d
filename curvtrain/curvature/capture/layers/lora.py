"""The two matrices of a low-rank adapter, y = x A B: Hu et al. (2022), arXiv 2106.09685.

`nnx.LoRA` holds A (d_i, r) and B (r, d_o), and perhaps adds the output of a base module; with the cotangent s of y,

| matrix | its rows | cotangents of its products |
|---|---|---|
| A | x | s B^T |
| B | x A | s |
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar

import jax

from curvtrain._dtypes import wide
from curvtrain.curvature.capture.layers.base import Layer, scan_axes_of
from curvtrain.curvature.capture.layers.blocks import Factored
from curvtrain.curvature.capture.layers.gradients import Products


@dataclasses.dataclass(frozen=True)
class _LoRALayer(Layer):
    """One of the two matrices: a layer whose only parameter is it."""

    parameter: ClassVar[str] = ""

    @classmethod
    def from_module(cls, path, module):
        A, B = module.lora_a.get_value(), module.lora_b.get_value()
        shape = {"lora_a": A.shape[-2:], "lora_b": B.shape[-2:]}[cls.parameter]
        scan_axes = scan_axes_of({"lora_a": A, "lora_b": B}[cls.parameter], cls.parameter, shape)
        return cls(path, type(module).__name__, scan_axes, ((cls.parameter, shape),))

    @property
    def name(self):
        return "/".join(map(str, (*self.path, self.parameter)))

    @property
    def d_i(self):
        return self.shapes[0][1][0]

    @property
    def d_o(self):
        return self.shapes[0][1][1]

    def matrix(self, parameters):
        return parameters[self.parameter].reshape(self.copies, self.d_i, self.d_o)

    def parameters(self, matrix):
        return {self.parameter: matrix.reshape(*self.scan_axes, self.d_i, self.d_o)}

    def saved(self, module, x, options):
        return x, module.lora_a.get_value(), module.lora_b.get_value()

    def gradients(self, backward):
        x, A, B = (wide(v) for v in backward.saved)
        s = wide(backward.s)
        rows = lambda v: v.reshape(1, backward.examples, math.prod(v.shape[:-1]) // backward.examples, v.shape[-1])
        a, s = self._operands(rows(x), rows(s), A, B)
        return Products(a, s)

    @abc.abstractmethod
    def _operands(self, x: jax.Array, s: jax.Array, A: jax.Array, B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(what multiplies the matrix, cotangents of the products)."""

    def block(self):
        return Factored()


@dataclasses.dataclass(frozen=True)
class LoRADown(_LoRALayer):
    """A of `nnx.LoRA`: from the inputs down to the rank."""

    parameter: ClassVar[str] = "lora_a"

    def _operands(self, x, s, A, B):
        return x, s @ B.T


@dataclasses.dataclass(frozen=True)
class LoRAUp(_LoRALayer):
    """B of `nnx.LoRA`: from the rank up to the outputs."""

    parameter: ClassVar[str] = "lora_b"

    def _operands(self, x, s, A, B):
        return x @ A, s


LORA: tuple[Any, ...] = (LoRADown, LoRAUp)
