"""AdaFisher's released code measures the following of a layer, here as sums over examples: pieces of a batch add up.

| symbol | statistic | shape | meaning |
|---|---|---|---|
| A, G, rows | the same | as `Factored` | of a matrix: sums of squares of rows and of cotangents, weight of the rows |
| u | `U` | (1, length) | of a norm layer's *raw* input x: sums over all axes but one, see `_sums_of_input` |
| v | `V` | (1, C) | sums of the cotangents of its outputs, per channel |
| B | `B` | (1,) | number of rows of x's first axis |

Cotangents are those of the loss as it is given (`AS_GIVEN`), times the total weight W.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from curvtrain._dtypes import wide
from curvtrain.curvature.capture import ConvLayer, DenseLayer, Layer, NormLayer, Statistic
from curvtrain.curvature.capture.layers import Options
from curvtrain.curvature.capture.statistics import Shapes

_DIAGONAL = Options(diagonal=True)


def is_released(layer: Layer) -> bool:
    """Says whether the released code has factors for a layer: `Linear`, `Conv` of two axes, `BatchNorm`, `LayerNorm`.

    It goes by the name of the class, as that code does.
    """
    if isinstance(layer, ConvLayer):
        return layer.kind == "Conv" and len(layer.window) == 2 and set(layer.kernel_dilation) == {1}
    if isinstance(layer, DenseLayer):
        return layer.kind == "Linear"
    return isinstance(layer, NormLayer) and layer.kind in ("BatchNorm", "LayerNorm")


@dataclasses.dataclass(frozen=True)
class ReleasedStatistic(Statistic):
    """The sums of the table above, for layers of `is_released`."""

    needs = ()

    def shapes(self, layer) -> Shapes:
        return self.sized(layer, (1, layer.d_o))

    def sized(self, layer, inputs) -> Shapes:
        if not isinstance(layer, NormLayer):
            return layer.block().shapes(layer, _DIAGONAL)
        length = inputs[1] if layer.kind == "LayerNorm" else layer.channels
        return {"U": (1, length), "V": (1, layer.channels), "B": (1,)}

    def saved(self, layer, module, x, options):
        if not isinstance(layer, NormLayer):
            return super().saved(layer, module, x, options)
        layer.refuse_mask(options)
        return x

    def __call__(self, layer, backward):
        if not isinstance(layer, NormLayer):
            return layer.block().measure(layer, backward, _DIAGONAL)
        x, n = wide(backward.saved), backward.examples
        s = wide(backward.s).reshape(1, n, -1, layer.channels)
        w, first = backward.row_weights(s.shape[2], s), backward.row_weights(len(x) // n, s)
        if w is not None:
            x = x * w.reshape(*x.shape[:-1], 1)
        U = _sums_of_input(layer, x)[None]
        B = jnp.full(1, len(x), U.dtype) if first is None else jnp.sum(first)[None]
        return {"U": U, "V": jnp.sum(s, axis=(1, 2)), "B": B}

    def check(self, layer, who):
        """Nothing is missing: a layer without factors is divided by one."""


def _sums_of_input(layer: NormLayer, x: jax.Array) -> jax.Array:
    """u of an input x (B, ..., C), over the square of the number of positions that were added up in one example.

    BatchNorm keeps the channels, the last axis; LayerNorm keeps axis 1, whatever that is: of (B, C) the channels, of a
    sequence (B, T, C) its positions.
    """
    kept = 1 if layer.kind == "LayerNorm" else x.ndim - 1
    others = tuple(axis for axis in range(x.ndim) if axis != kept)
    return jnp.sum(x, others) / math.prod(x.shape[axis] for axis in others[1:]) ** 2


def raw_factors(layer: Layer, sums: dict[str, jax.Array], W: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The factors H (c, 1, d_i) and S (c, g, d_o) of the sums of a batch, for each of c copies from scan axes.

    W is the total weight of the batch, of whose mean loss the cotangents are meant to be.
    """
    lead = len(layer.scan_axes)
    sums = {name: a.reshape(-1, *a.shape[lead:]) for name, a in sums.items()}
    some = lambda a: jnp.where(a > 0, a, 1)[..., None]
    if isinstance(layer, NormLayer):
        U, B = sums["U"], some(sums["B"])
        length = jnp.full(U.shape[:2], U.shape[-1], U.dtype)
        pair = jnp.stack([jnp.sum(jnp.square(U), -1), length], -1) / jnp.square(B)  # of scale and bias
        return pair, jnp.square(sums["V"] / W) / B
    rows = some(sums["rows"])
    inputs = layer.inputs if isinstance(layer, ConvLayer) else 1
    H = jnp.sum(sums["A"], axis=1, keepdims=True) / rows[:, :1] / inputs  # all groups of a convolution together
    return H, sums["G"] / rows / jnp.square(W)
