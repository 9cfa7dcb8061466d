"""The diagonals of K-FAC's factors."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain.curvature.base import Curvature
from curvtrain.curvature.capture import Coverage, Layer
from curvtrain.curvature.capture.layers.blocks import means_of
from curvtrain.curvature.capture.statistics import KroneckerStatistic
from curvtrain.curvature.fisher.base import LayerEstimator, spread_specs
from curvtrain.curvature.fisher.diagonal import Diagonal
from curvtrain.objective import by_path

PyTree = Any
Arrays = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalFactors(Curvature):
    """C = diag(a) (x) diag(g) for every layer's matrix; diagonals elsewhere.

    Attributes:
      factors: for each matrix A (K, d_i) and G (K, d_o); for an embedding also the factors of its `attend`; for any
        other layer its diagonal D2 (K, ...).
      weight: what the moving averages have seen: the batches' weights times powers of the decay, added up.
      skipped: updates with statistics that were not finite, or of no example; nothing was absorbed.
      coverage: which layer every parameter belongs to.
    """

    factors: dict[str, Arrays]
    weight: jax.Array
    skipped: jax.Array
    coverage: Coverage = dataclasses.field(metadata=dict(static=True))

    def diagonal(self) -> PyTree:
        """diag(C), like the parameters."""
        layers = self.coverage.layers
        return self.coverage.vector(
            {layer.name: layer.block().diagonal_of(self.factors[layer.name]) for layer in layers}
        )

    def like(self) -> PyTree:
        return self.coverage.like()

    def groups(self):
        return tuple((path,) for path in by_path(self.like()))

    def logdet(self, damping: jax.Array | float) -> jax.Array:
        """log |det(C + damping I)|."""
        return Diagonal(self.diagonal()).logdet(damping)

    def matvec(self, vector: PyTree) -> PyTree:
        """C v."""
        return Diagonal(self.diagonal()).matvec(vector)

    def solve(self, vector: PyTree, damping: jax.Array | float) -> PyTree:
        """(C + damping I)^-1 v."""
        return Diagonal(self.diagonal()).solve(vector, damping)

    def power(self, vector: PyTree, damping: jax.Array | float, exponent: jax.Array | float) -> PyTree:
        """(C + damping I)^exponent v."""
        return Diagonal(self.diagonal()).power(vector, damping, exponent)

    def as_matrix(self) -> jax.Array:
        return Diagonal(self.diagonal()).as_matrix()

    def telemetry(self) -> dict[str, jax.Array]:
        """Largest and mean entry of the diagonal, and skipped updates."""
        return Diagonal(self.diagonal(), self.weight, self.skipped).telemetry()


@dataclasses.dataclass(frozen=True)
class KroneckerDiagonal(LayerEstimator[DiagonalFactors]):
    """The diagonals of K-FAC's factors: AdaFisher's curvature (Gomes et al. 2024, arXiv 2405.16397, section 3).

    Options as for `LayerEstimator`. Norm layers and plain parameters have their exact diagonal.
    """

    def init(self, objective, params) -> DiagonalFactors:
        coverage = self.coverage(objective, params)
        zeros = lambda layer: {name: jnp.zeros(shape, coverage.dtype) for name, shape in self._shapes(layer).items()}
        factors = {layer.name: zeros(layer) for layer in coverage.layers}
        return DiagonalFactors(factors, jnp.zeros((), coverage.dtype), jnp.int32(0), coverage)

    def refresh(self, curvature: DiagonalFactors, objective, params, batch, key, damping=None) -> DiagonalFactors:
        return curvature

    def partition_specs(self, curvature: DiagonalFactors, param_specs, mesh):
        return spread_specs(curvature, mesh)

    def means(self, curvature: DiagonalFactors, sums, W):
        layers = curvature.coverage.layers
        return {"factors": {layer.name: means_of(layer, sums[layer.name], W) for layer in layers}}

    def _statistic(self):
        return KroneckerStatistic(diagonal=True)

    def _described(self, layer):
        shapes = self._shapes(layer)
        return "diagonal" if "D2" in shapes else "diagonal x diagonal", sum(map(math.prod, shapes.values()))

    def _shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """Of the layer's means."""
        sums = {
            name: jax.ShapeDtypeStruct((*layer.scan_axes, *shape), jnp.float32) for name, shape in self._sums(layer)
        }
        means = jax.eval_shape(lambda sums: means_of(layer, sums, jnp.float32(1)), sums)
        return {name: mean.shape for name, mean in means.items()}

    def _sums(self, layer: Layer):
        return self._statistic().shapes(layer).items()
