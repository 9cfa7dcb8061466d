"""Parameters without a layer."""

import dataclasses
from typing import ClassVar

from curvtrain.curvature.capture.layers.base import Layer, Unsupported
from curvtrain.curvature.capture.layers.blocks import DiagonalBlock


@dataclasses.dataclass(frozen=True)
class PlainParameter(Layer):
    """A parameter that belongs to no known layer: M is its vector, (1, 1, size), its path that of its module.

    Its statistic, an exact diagonal, comes of the gradients of single examples, not of taps.
    """

    tapped: ClassVar[bool] = False

    @classmethod
    def from_module(cls, path, module):
        raise Unsupported("a plain parameter is not a module")

    @property
    def name(self):
        return "/".join(map(str, (*self.path, self.shapes[0][0])))

    @property
    def d_i(self):
        return 1

    @property
    def d_o(self):
        return self.size

    def matrix(self, parameters):
        return parameters[self.shapes[0][0]].reshape(1, 1, self.size)

    def parameters(self, matrix):
        name, shape = self.shapes[0]
        return {name: matrix.reshape(shape)}

    def block(self):
        return DiagonalBlock(self.name)
