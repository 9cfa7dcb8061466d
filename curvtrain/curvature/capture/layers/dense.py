"""Products over any axes."""

import dataclasses
import math

from flax import nnx

from curvtrain._dtypes import wide
from curvtrain.curvature.capture.layers.base import Unsupported
from curvtrain.curvature.capture.layers.matrix import MatrixLayer, kernel_shapes


@dataclasses.dataclass(frozen=True)
class DenseLayer(MatrixLayer):
    """`nnx.Linear` and `nnx.LinearGeneral` (so the projections of `nnx.MultiHeadAttention`): any contracted axes.

    Attributes:
      axis: contracted axes of the input, as the module has them.
      batch: axes that input, kernel and output share (groups).
    """

    axis: tuple[int, ...] = (-1,)
    batch: tuple[int, ...] = ()

    @classmethod
    def from_module(cls, path, module):
        if isinstance(module, nnx.LinearGeneral):
            sizes, axis = tuple(module.batch_axis.values()), tuple(module.axis)
            ins, outs, batch = module.in_features, module.out_features, tuple(sorted(module.batch_axis))
        else:
            sizes, axis, ins, outs, batch = (), (-1,), (module.in_features,), (module.out_features,), ()
        if getattr(module, "dot_general_cls", None) is not None:
            raise Unsupported("it has a dot_general_cls, so what it multiplies is not known")
        names = {"kernel": (*sizes, *ins, *outs), "bias": (*sizes, *outs)}
        scan_axes, shapes = kernel_shapes(module, names)
        order = tuple(range(len(names["kernel"])))
        groups, inputs, outputs = map(math.prod, (sizes, ins, outs))
        return cls(path, type(module).__name__, scan_axes, shapes, groups, order, inputs, outputs, axis, batch)

    def leading(self, shape):
        axis = tuple(a % len(shape) for a in self.axis)
        rest = [n for i, n in enumerate(shape) if i not in axis and i not in self.batch]
        return rest[0] if rest else 1

    def rows(self, x, examples):
        x = wide(x)
        axis = sorted(a % x.ndim for a in self.axis)  # nnx.LinearGeneral contracts them in this order, however given
        rest = tuple(i for i in range(x.ndim) if i not in axis and i not in self.batch)
        x = x.transpose((*self.batch, *rest, *axis))
        return x.reshape(self.groups, examples, -1, self.inputs)

    def cotangents(self, s, examples):
        return wide(s).reshape(self.groups, examples, -1, self.outputs)
