"""Which class of modules is which layer."""

from flax import nnx

from curvtrain.curvature.capture.layers.base import Layer
from curvtrain.curvature.capture.layers.conv import ConvLayer
from curvtrain.curvature.capture.layers.dense import DenseLayer
from curvtrain.curvature.capture.layers.einsum import EinsumLayer
from curvtrain.curvature.capture.layers.embed import EmbedLayer
from curvtrain.curvature.capture.layers.norm import NormLayer

LAYERS: dict[type, type[Layer]] = {
    nnx.Linear: DenseLayer,
    nnx.LinearGeneral: DenseLayer,
    nnx.Einsum: EinsumLayer,
    nnx.Conv: ConvLayer,
    nnx.Embed: EmbedLayer,
    nnx.LayerNorm: NormLayer,
    nnx.RMSNorm: NormLayer,
    nnx.GroupNorm: NormLayer,
    nnx.BatchNorm: NormLayer,
}

# Wrappers that compute the parameters which the layer inside them uses: its own statistics say nothing of them.
WRAPPERS: tuple[type, ...] = (nnx.WeightNorm, nnx.SpectralNorm)


def register_layer(module: type[nnx.Module], layer: type[Layer] = DenseLayer) -> None:
    """Says that modules of class `module` (exactly: not its subclasses) behave like `layer`.

    A subclass of `nnx.Linear` is not assumed to compute x W + b, since it may not: say so with
    `register_layer(MyLinear)`. For anything else, subclass `Layer`'s children and override what differs.

    Raises:
      TypeError: not a module class, or not a layer class.
    """
    if not (isinstance(module, type) and issubclass(module, nnx.Module)):
        raise TypeError(f"register_layer(module) should be a subclass of nnx.Module, not {module!r}.")
    if not (isinstance(layer, type) and issubclass(layer, Layer)):
        raise TypeError(f"register_layer(layer) should be a subclass of curvature.Layer, not {layer!r}.")
    LAYERS[module] = layer
