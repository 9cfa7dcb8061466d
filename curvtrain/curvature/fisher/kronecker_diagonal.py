"""The diagonals of K-FAC's factors."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain.curvature import trees
from curvtrain.curvature.capture import Coverage, Layer
from curvtrain.curvature.capture.layers.blocks import means_of
from curvtrain.curvature.capture.statistics import KroneckerStatistic
from curvtrain.curvature.fisher import released
from curvtrain.curvature.fisher.base import LayerEstimator, spread_specs
from curvtrain.curvature.fisher.diagonal import Diagonal, LayerDiagonal
from curvtrain.curvature.fisher.released_statistic import ReleasedStatistic

PyTree = Any
Arrays = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalFactors(LayerDiagonal):
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

    def map(self, vector: PyTree, function: Callable[[jax.Array, jax.Array], jax.Array]) -> PyTree:
        """Applies function(F, M) to each layer's matrix M (K, d_i, d_o) and to F, its diagonal in that shape.

        What uses F elementwise, or its sum, is computed from the factors: F is not written out.
        """
        matrices = self.coverage.matrices(trees.wide(vector))
        F = {layer.name: layer.block().diagonal_of(self.factors[layer.name]) for layer in self.coverage.layers}
        return self.coverage.vector({name: function(F[name], matrices[name]) for name in F})

    def telemetry(self) -> dict[str, jax.Array]:
        """Largest and mean entry of the diagonal, and skipped updates."""
        return Diagonal(self.diagonal(), self.weight, self.skipped).telemetry()


@dataclasses.dataclass(frozen=True)
class KroneckerDiagonal(LayerEstimator[Any]):
    """The diagonals of K-FAC's factors: AdaFisher's curvature (Gomes et al. 2024, arXiv 2405.16397, section 3).

    Options as for `LayerEstimator`, two of which have other defaults. Norm layers and plain parameters have their exact
    diagonal.

    Attributes:
      fisher: None is "sampled"; with `faithful` it is "empirical", and nothing else.
      ema: decay of the averages; None is 0.95, and 0.8 with `faithful`, where it is the gamma of the released code.
      faithful: keep the factors that AdaFisher's released code keeps, for `optim.adafisher(faithful=True)`; see
        `curvature/fisher/released.py` for what they are, and why they precondition nothing. The curvature is then
        `ReleasedFactors`. The code's TCov is the schedule's `update_every`.
      uncovered: with `faithful`, "error" refuses layers that the released code has no factors for, and "one" leaves
        their momentum as it is, as that code does.
    """

    fisher: Any = None
    ema: Any = dataclasses.field(default=None, kw_only=True)
    faithful: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self):
        fisher, ema = ("empirical", 0.8) if self.faithful else ("sampled", 0.95)
        object.__setattr__(self, "fisher", fisher if self.fisher is None else self.fisher)
        object.__setattr__(self, "ema", ema if self.ema is None else self.ema)
        super().__post_init__()

    def _check_options(self):
        if self.faithful and self.fisher != "empirical":
            raise ValueError(
                f"KroneckerDiagonal(faithful=True) has the cotangents of the batch's own targets, fisher='empirical', "
                f"not {self.fisher!r}. Leave one of the two out."
            )

    @property
    def _uncovered_options(self):
        return released.UNCOVERED if self.faithful else super()._uncovered_options

    @property
    def _refuses_uncovered(self):
        return not self.faithful and super()._refuses_uncovered  # else `check_covered` says what is missing

    def coverage(self, objective, params) -> Coverage:
        """Returns which layer every parameter belongs to. Raises as `init` does."""
        coverage = super().coverage(objective, params)
        if self.faithful:
            released.check_covered(coverage, self.uncovered, self.plain, self.name)
        return coverage

    def init(self, objective, params) -> DiagonalFactors | released.ReleasedFactors:
        coverage = self.coverage(objective, params)
        if self.faithful:
            return released.ReleasedFactors.empty(coverage)
        zeros = lambda layer: {name: jnp.zeros(shape, coverage.dtype) for name, shape in self._shapes(layer).items()}
        factors = {layer.name: zeros(layer) for layer in coverage.layers}
        return DiagonalFactors(factors, jnp.zeros((), coverage.dtype), jnp.int32(0), coverage)

    def measure(self, curvature, objective, params, batch, key):
        """The sums of the statistics over a batch, taken in the passes of the training step."""
        if self.faithful:
            return released.measure(curvature.coverage, objective, params, batch, key, self.name)
        return super().measure(curvature, objective, params, batch, key)

    def absorb(self, curvature, measured, key):
        """The curvature with one more batch."""
        return curvature.absorb(*measured, self.ema) if self.faithful else super().absorb(curvature, measured, key)

    def refresh(self, curvature, objective, params, batch, key, damping=None):
        return curvature

    def partition_specs(self, curvature, param_specs, mesh):
        return spread_specs(curvature, mesh)

    def means(self, curvature: DiagonalFactors, sums, W):
        layers = curvature.coverage.layers
        return {"factors": {layer.name: means_of(layer, sums[layer.name], W) for layer in layers}}

    def _statistic(self):
        return ReleasedStatistic() if self.faithful else KroneckerStatistic(diagonal=True)

    def _described(self, layer):
        shapes = released.shapes(layer) if self.faithful else self._shapes(layer)
        kind = "diagonal" if "D2" in shapes else "diagonal x diagonal"
        if self.faithful:
            kind = "diagonal x diagonal, as released" if shapes else "none: divided by 1, as released"
        return kind, sum(map(math.prod, shapes.values()))

    def _shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """Of the layer's means."""
        sums = {
            name: jax.ShapeDtypeStruct((*layer.scan_axes, *shape), jnp.float32) for name, shape in self._sums(layer)
        }
        means = jax.eval_shape(lambda sums: means_of(layer, sums, jnp.float32(1)), sums)
        return {name: mean.shape for name, mean in means.items()}

    def _sums(self, layer: Layer):
        return KroneckerStatistic(diagonal=True).shapes(layer).items()
