"""What estimators of Fisher blocks share: which layers there are, and a debiased moving average over batches."""

import dataclasses
import functools
import operator
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp

from curvtrain import _checks
from curvtrain.curvature.base import Curvature, CurvatureEstimator
from curvtrain.curvature.capture import FISHERS, Coverage, PlainParameter, Statistic, collect, cover
from curvtrain.curvature.capture.coverage import UNCOVERED
from curvtrain.curvature.capture.layers import Layer, MatrixLayer
from curvtrain.curvature.mesh import spread_spec
from curvtrain.objective import Objective

PyTree = Any
C = TypeVar("C", bound=Curvature)


@dataclasses.dataclass(frozen=True)
class LayerEstimator(CurvatureEstimator[C], Generic[C]):
    """What estimators of blocks of layers share.

    Attributes:
      fisher: "exact" (= "ggn" for the losses of curvtrain.losses), "sampled" or "empirical".
      ema: decay of the moving average over updates, debiased; 0 keeps the last batch alone.
      uncovered: "error", or "diagonal": parameters of unknown layers get an exact diagonal of per-example gradients.
      plain: regular expression; layers and parameters whose path it matches get that diagonal too.

    Raises:
      TypeError, ValueError: when built with a bad argument; in `init` for an objective without outputs, and for
        parameters that belong to no known layer.
    """

    fisher: str = "sampled"
    _: dataclasses.KW_ONLY
    ema: float = 0.95
    uncovered: str = "error"
    plain: str | None = None

    fishers: ClassVar[tuple[str, ...]] = FISHERS

    def __post_init__(self):
        _checks.one_of(f"{self.name}(fisher)", self.fisher, self.fishers)
        _checks.number_in(f"{self.name}(ema)", self.ema, 0.0, 1.0, open_high=True)
        _checks.one_of(f"{self.name}(uncovered)", self.uncovered, UNCOVERED)

    @property
    def name(self) -> str:
        return type(self).__name__

    def coverage(self, objective: Objective | None, params: PyTree) -> Coverage:
        """Which layer every parameter belongs to."""
        if objective is None:
            raise TypeError(f"{self.name} finds the layers of a model, so init() needs the objective.")
        objective.require_outputs(self.name, "Lanczos(product='hessian')")
        return cover(objective, params, self.name, uncovered=self.uncovered, plain=self.plain)

    def overview(self, objective, params) -> str:
        coverage = self.coverage(objective, params)
        blocks = {layer.name: self._block(layer) for layer in coverage.layers}
        return coverage.table({name: (kind, 4 * floats) for name, (kind, floats) in blocks.items()})

    def _block(self, layer: Layer) -> tuple[str, int]:
        """(kind of a layer's block, floats of its curvature)."""
        return "diagonal", layer.size

    def collect(self, statistic: Statistic, coverage: Coverage, objective, params, batch, key):
        """({layer: {statistic: sum}}, W)."""
        return collect(objective, params, batch, key, coverage, statistic, self.fisher, who=self.name)

    def absorb(self, curvature: C, name: str, new: PyTree, W: jax.Array) -> C:
        """The curvature with one more batch in its debiased moving average, the field `name`: the first counts in full.

        A batch whose statistics are not finite, or that is all masked (W = 0), says nothing.
        """
        kept: Any = curvature  # whose type has `weight` and `skipped` besides
        old = getattr(kept, name)
        new = jax.tree.map(lambda old, new: new.reshape(old.shape), old, new)
        usable = functools.reduce(operator.and_, [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(new)], W > 0)
        weight = self.ema * kept.weight + 1.0
        average = jax.tree.map(lambda old, new: jnp.where(usable, old + (new - old) / weight, old), old, new)
        return dataclasses.replace(
            kept,
            **{name: average},
            weight=jnp.where(usable, weight, kept.weight),
            skipped=kept.skipped + ~usable,
        )

    def refresh(self, curvature: C, objective, params, batch, key, damping=None) -> C:
        return curvature

    def partition_specs(self, curvature: C, param_specs, mesh):
        """Blocks are split over as much of the mesh as divides their number, or else their rows."""
        return jax.tree.map(lambda a: spread_spec(mesh.shape, a.shape), curvature)


def stacked(x: jax.Array, layer: Layer) -> jax.Array:
    """A statistic (*stack, groups, ...) or (*stack, ...) with its copies as one leading axis."""
    if isinstance(layer, PlainParameter):
        return x.reshape(1, 1, -1)
    lead = len(layer.stack) + isinstance(layer, MatrixLayer)
    return x.reshape(-1, *x.shape[lead:])
