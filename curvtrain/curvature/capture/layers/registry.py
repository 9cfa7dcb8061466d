"""Which class of modules has which layers."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from curvtrain.curvature.capture.layers.base import Layer
from curvtrain.curvature.capture.layers.conv import ConvLayer
from curvtrain.curvature.capture.layers.dense import DenseLayer
from curvtrain.curvature.capture.layers.einsum import EinsumLayer
from curvtrain.curvature.capture.layers.embed import EmbedLayer
from curvtrain.curvature.capture.layers.lora import LORA
from curvtrain.curvature.capture.layers.norm import NormLayer

Layers = tuple[type[Layer], ...]

LAYERS: dict[type, Layers] = {
    nnx.Linear: (DenseLayer,),
    nnx.LinearGeneral: (DenseLayer,),
    nnx.LoRALinear: (DenseLayer,),  # its adapter is a module of its own
    nnx.LoRA: LORA,
    nnx.Einsum: (EinsumLayer,),
    nnx.Conv: (ConvLayer,),
    nnx.Embed: (EmbedLayer,),
    nnx.LayerNorm: (NormLayer,),
    nnx.RMSNorm: (NormLayer,),
    nnx.GroupNorm: (NormLayer,),
    nnx.BatchNorm: (NormLayer,),
}

# Wrappers that compute the parameters which the layer inside them uses: its own statistics say nothing of them.
WRAPPERS: tuple[type, ...] = (nnx.WeightNorm, nnx.SpectralNorm)


def register_layer(module: type[nnx.Module], layer: Any = DenseLayer) -> None:
    """Says, for the whole process, that modules of class `module` (exactly: not its subclasses) behave like `layer`.

    A subclass of `nnx.Linear` is not assumed to compute x W + b, since it may not: say so with
    `register_layer(MyLinear)`, or for one estimator alone with `KFAC(layers={MyLinear: curvature.DenseLayer})`. For
    anything else, subclass `Layer` or one of its children.

    Args:
      module: the class of modules.
      layer: a subclass of `Layer`, or several where the module's parameters form several matrices.

    Raises:
      TypeError: not a module class, or not a layer class.
    """
    LAYERS[module] = checked(module, layer, "register_layer(module)", "register_layer(layer)")


def merged(layers: Mapping[type, Any], argument: str) -> dict[type, Layers]:
    """The registered layers, with those of an estimator's argument in their place."""
    return LAYERS | {module: checked(module, layer, argument, argument) for module, layer in layers.items()}


def checked(module: Any, layer: Any, module_argument: str, layer_argument: str) -> Layers:
    """The layer classes of a module class. Raises TypeError if they are none."""
    if not (isinstance(module, type) and issubclass(module, nnx.Module)):
        raise TypeError(f"{module_argument} should be a subclass of nnx.Module, not {module!r}.")
    classes = layer if isinstance(layer, tuple) else (layer,)
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, Layer)):
            raise TypeError(f"{layer_argument} should be a subclass of curvature.Layer, not {cls!r}.")
    return classes
