"""Parameters without a layer."""

import dataclasses

from curvtrain.curvature.capture.layers.base import Layer, Unsupported


@dataclasses.dataclass(frozen=True)
class PlainParameter(Layer):
    """A parameter that belongs to no known layer: M is its vector, (1, 1, size), its path that of its module."""

    @classmethod
    def from_module(cls, path, module):
        raise Unsupported("a plain parameter is not a module")

    @property
    def name(self):
        return "/".join(map(str, (*self.path, self.shapes[0][0])))

    def matrix(self, parameters):
        return parameters[self.shapes[0][0]].reshape(1, 1, -1)

    def parameters(self, matrix):
        name, shape = self.shapes[0]
        return {name: matrix.reshape(shape)}
