"""The diagonals of K-FAC's factors."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain.curvature.base import Curvature
from curvtrain.curvature.capture import Coverage, EmbedLayer, NormLayer, PlainParameter
from curvtrain.curvature.capture.layers import Layer, MatrixLayer
from curvtrain.curvature.capture.statistics import KroneckerStatistic
from curvtrain.curvature.fisher.base import LayerEstimator, stacked
from curvtrain.curvature.fisher.diagonal import Diagonal
from curvtrain.objective import by_path, safe

PyTree = Any
Arrays = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalFactors(Curvature):
    """C = diag(a) (x) diag(g) for every layer's matrix; diagonals elsewhere.

    Attributes:
      factors: for each matrix A (K, d_i) and G (K, d_o); for an embedding also the factors of its `attend`; for any
        other layer its diagonal D2 (K, ...).
      weight: what the moving averages have seen.
      skipped: updates with statistics that were not finite, or of no example; nothing was absorbed.
      coverage: which layer every parameter belongs to.
    """

    factors: dict[str, Arrays]
    weight: jax.Array
    skipped: jax.Array
    coverage: Coverage = dataclasses.field(metadata=dict(static=True))

    def diagonal(self) -> PyTree:
        """diag(C), like the parameters."""
        found = {}
        for layer in self.coverage.layers:
            f = self.factors[layer.name]
            if isinstance(layer, MatrixLayer):
                found[layer.name] = f["A"][:, :, None] * f["G"][:, None, :]
            elif isinstance(layer, EmbedLayer):
                found[layer.name] = f["counts"][:, :, None] * f["G"][:, None, :]
                found[layer.name] += f["G_head"][:, :, None] * f["A_head"][:, None, :]
            else:
                found[layer.name] = f["D2"]
        return self.coverage.vector(found)

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

    def power(self, vector: PyTree, damping: jax.Array | float, exponent: float) -> PyTree:
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
        factors: dict[str, Arrays] = {}
        for layer in coverage.layers:
            shapes = self._shapes(layer)
            factors[layer.name] = {name: jnp.zeros(shape) for name, shape in shapes.items()}
        return DiagonalFactors(factors, jnp.float32(0), jnp.int32(0), coverage)

    def update(self, curvature: DiagonalFactors, objective, params, batch, key, *, grads=None) -> DiagonalFactors:
        coverage = curvature.coverage
        found, W = self.collect(KroneckerStatistic(diagonal=True), coverage, objective, params, batch, key)
        factors: dict[str, Arrays] = {}
        for layer in coverage.layers:
            x = found[layer.name]
            if isinstance(layer, NormLayer):
                x = {"D2": jnp.moveaxis(jnp.diagonal(stacked(x["F"], layer), axis1=1, axis2=2), -1, 1) / safe(W)}
            elif isinstance(layer, PlainParameter):
                x = {"D2": x["D2"] / safe(W)}
            else:
                rows = {"A": "rows", "counts": "rows", "A_head": "head_rows"}
                names = curvature.factors[layer.name]
                x = {name: x[name] / (_rows(x[rows[name]], x[name]) if name in rows else safe(W)) for name in names}
            factors[layer.name] = x
        return self.absorb(curvature, "factors", factors, W)

    def _block(self, layer):
        kind = "diagonal" if isinstance(layer, NormLayer | PlainParameter) else "diagonal x diagonal"
        return kind, sum(math.prod(shape) for shape in self._shapes(layer).values())

    @staticmethod
    def _shapes(layer: Layer) -> dict[str, tuple[int, ...]]:
        if isinstance(layer, MatrixLayer):
            return {"A": (layer.copies, layer.d_i), "G": (layer.copies, layer.d_o)}
        if isinstance(layer, EmbedLayer):
            V, D = (layer.copies, layer.vocabulary), (layer.copies, layer.features)
            return {"counts": V, "G": D, "A_head": D, "G_head": V}
        if isinstance(layer, NormLayer):
            return {"D2": (layer.copies, layer.units, layer.channels)}
        return {"D2": (1, 1, layer.size)}


def _rows(rows: jax.Array, x: jax.Array) -> jax.Array:
    return safe(rows).reshape(rows.shape + (1,) * (x.ndim - rows.ndim))
