"""Products by an equation."""

import dataclasses
import math

from curvtrain._dtypes import wide
from curvtrain.curvature.capture.layers.base import Unsupported
from curvtrain.curvature.capture.layers.matrix import MatrixLayer, kernel_shapes


@dataclasses.dataclass(frozen=True)
class EinsumLayer(MatrixLayer):
    """`nnx.Einsum`: labels in input, kernel and output are groups; in input and kernel only, inputs; in kernel and
    output, outputs; in input and output, positions.

    Attributes:
      equation: (labels of the input, of the kernel, of the output), "." for an ellipsis.
    """

    equation: tuple[str, str, str] = ("", "", "")

    @classmethod
    def from_module(cls, path, module):
        if module.einsum_str is None:
            raise Unsupported("its equation is given at the call; give it to nnx.Einsum itself")
        x, rest = module.einsum_str.replace(" ", "").replace("...", ".").split(",")
        w, y = rest.split("->")
        bad = next((part for part in (x, w, y) if len(set(part)) != len(part)), None)
        if bad is not None or "." in w or set(y) - set(x) - set(w) or set(x) - set(w) - set(y):
            raise Unsupported(
                f"its equation {module.einsum_str!r} repeats a label, sums one operand alone, or has '...' in its "
                f"kernel"
            )
        if "." in y and [label for label in x if label not in w] != [label for label in y if label not in w]:
            raise Unsupported(f"its equation {module.einsum_str!r} reorders positions together with '...'")
        shape = tuple(module.kernel_shape)
        groups = [i for i, label in enumerate(w) if label in x and label in y]
        inputs = [i for i, label in enumerate(w) if label in x and label not in y]
        outputs = [i for i, label in enumerate(w) if label not in x and label in y]
        if len(groups) + len(inputs) + len(outputs) != len(w):
            raise Unsupported(f"its equation {module.einsum_str!r} sums its kernel alone")
        bias = tuple(shape[w.index(label)] for label in y if label in w)
        if module.bias is not None and [label for label in y if label in w] != [w[i] for i in (*groups, *outputs)]:
            raise Unsupported(
                f"its equation {module.einsum_str!r} orders the labels of its output differently from (shared with the "
                f"input, new), so its bias is not a row of its kernel"
            )
        if module.bias is not None:
            bias = tuple(module.bias_shape)
        scan_axes, shapes = kernel_shapes(module, {"kernel": shape, "bias": bias})
        of = lambda axes: math.prod(shape[i] for i in axes)
        return cls(
            path,
            type(module).__name__,
            scan_axes,
            shapes,
            of(groups),
            (*groups, *inputs, *outputs),
            of(inputs),
            of(outputs),
            (x, w, y),
        )

    def leading(self, shape):
        x, w, _ = self.equation
        ellipsis = len(shape) - len(x.replace(".", ""))
        labels = [label for part in x for label in ([part] * ellipsis if part == "." else [part])]
        rest = [n for label, n in zip(labels, shape, strict=True) if label not in w]
        return rest[0] if rest else 1

    def _arranged(self, array, labels, examples, last):
        """(g, N, R, ...) of an operand with these labels; `last` are the kernel's labels that it should end in."""
        x, w, y = self.equation
        ellipsis = array.ndim - len(labels.replace(".", ""))
        expanded = [(label, i) for label in labels for i in (range(ellipsis) if label == "." else (0,))]
        shared = [label for label in w if label in x and label in y]
        positions = [pair for pair in expanded if pair[0] not in w]
        where = [expanded.index(pair) for pair in [(s, 0) for s in shared] + positions + [(s, 0) for s in last]]
        array = wide(array).transpose(where)
        return array.reshape(self.groups, examples, -1, math.prod(array.shape[len(array.shape) - len(last) :]))

    def rows(self, x, examples):
        labels, w, y = self.equation
        return self._arranged(x, labels, examples, [label for label in w if label in labels and label not in y])

    def cotangents(self, s, examples):
        x, w, labels = self.equation
        # positions in the order of the input, so that rows and cotangents belong together
        order = [label for label in x if label not in w]
        mine = [label for label in labels if label not in w]
        if order != mine:
            new = [label for label in labels if label in w] + order
            s = s.transpose([labels.index(label) for label in new])
            labels = "".join(new)
        return self._arranged(s, labels, examples, [label for label in w if label not in x])
