"""Statistics of layers, captured from NNX modules without editing them and without matching jaxprs."""

from curvtrain.curvature.capture.coverage import Coverage as Coverage
from curvtrain.curvature.capture.coverage import cover as cover
from curvtrain.curvature.capture.layers import Backward as Backward
from curvtrain.curvature.capture.layers import ConvLayer as ConvLayer
from curvtrain.curvature.capture.layers import DenseLayer as DenseLayer
from curvtrain.curvature.capture.layers import EinsumLayer as EinsumLayer
from curvtrain.curvature.capture.layers import EmbedLayer as EmbedLayer
from curvtrain.curvature.capture.layers import Explicit as Explicit
from curvtrain.curvature.capture.layers import Factored as Factored
from curvtrain.curvature.capture.layers import Layer as Layer
from curvtrain.curvature.capture.layers import MatrixLayer as MatrixLayer
from curvtrain.curvature.capture.layers import NormLayer as NormLayer
from curvtrain.curvature.capture.layers import PlainParameter as PlainParameter
from curvtrain.curvature.capture.layers import Products as Products
from curvtrain.curvature.capture.layers import UnitBlocks as UnitBlocks
from curvtrain.curvature.capture.layers import register_layer as register_layer
from curvtrain.curvature.capture.measure import LayerMeasure as LayerMeasure
from curvtrain.curvature.capture.seeds import FISHERS as FISHERS
from curvtrain.curvature.capture.statistics import Statistic as Statistic
