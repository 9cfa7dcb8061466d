"""What is known of each layer class: how its parameters form a matrix, and which rows that matrix multiplies.

Symbols, after Martens and Grosse (2015), arXiv 1503.05671, in Flax's layout:

| symbol | shape | meaning |
|---|---|---|
| K | | copies of the layer's matrix: those that `nnx.scan` or `nnx.vmap` made, times the groups of a convolution |
| N, R | | examples of a batch, and positions of one that share the matrix: pixels, tokens, 1 for plain `Linear` |
| d_i, d_o | | inputs, plus 1 if there is a bias (homogeneous coordinate, last), and outputs |
| M | (K, d_i, d_o) | the layer's parameters as matrices; a bias is the last row |
| a | (g, N, R, d_i) | what M multiplies, for each of g groups: the gradient of example n is sum_r a s^T |
| s | (g, N, R, d_o) | gradient with respect to the layer's output |
| D_n | (g, d_i, d_o) | gradient of example n with respect to M |

Embeddings have one-hot rows a, kept as indices; a norm layer has (scale, bias) as its M (K, p, C) and the normalised
input as its a; any other parameter is `plain`: a vector of its own.
"""

from curvtrain.curvature.capture.layers.base import Layer as Layer
from curvtrain.curvature.capture.layers.base import Path as Path
from curvtrain.curvature.capture.layers.base import Unsupported as Unsupported
from curvtrain.curvature.capture.layers.blocks import Block as Block
from curvtrain.curvature.capture.layers.blocks import Factored as Factored
from curvtrain.curvature.capture.layers.blocks import Options as Options
from curvtrain.curvature.capture.layers.blocks import OwnBlock as OwnBlock
from curvtrain.curvature.capture.layers.blocks import UnitBlocks as UnitBlocks
from curvtrain.curvature.capture.layers.conv import ConvLayer as ConvLayer
from curvtrain.curvature.capture.layers.dense import DenseLayer as DenseLayer
from curvtrain.curvature.capture.layers.einsum import EinsumLayer as EinsumLayer
from curvtrain.curvature.capture.layers.embed import EmbedLayer as EmbedLayer
from curvtrain.curvature.capture.layers.gradients import Backward as Backward
from curvtrain.curvature.capture.layers.gradients import Explicit as Explicit
from curvtrain.curvature.capture.layers.gradients import Gradients as Gradients
from curvtrain.curvature.capture.layers.gradients import Products as Products
from curvtrain.curvature.capture.layers.lora import LoRADown as LoRADown
from curvtrain.curvature.capture.layers.lora import LoRAUp as LoRAUp
from curvtrain.curvature.capture.layers.matrix import MatrixLayer as MatrixLayer
from curvtrain.curvature.capture.layers.norm import NormLayer as NormLayer
from curvtrain.curvature.capture.layers.plain import PlainParameter as PlainParameter
from curvtrain.curvature.capture.layers.registry import LAYERS as LAYERS
from curvtrain.curvature.capture.layers.registry import WRAPPERS as WRAPPERS
from curvtrain.curvature.capture.layers.registry import merged as merged
from curvtrain.curvature.capture.layers.registry import register_layer as register_layer
