"""What layer-wise estimators share: which layers there are, their statistics, and debiased averages over batches."""

import abc
import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp

from curvtrain import _checks
from curvtrain.curvature.base import CurvatureEstimator, Estimate
from curvtrain.curvature.capture import FISHERS, Coverage, Layer, LayerMeasure, Statistic, cover
from curvtrain.curvature.capture.coverage import UNCOVERED
from curvtrain.curvature.capture.layers import merged
from curvtrain.curvature.mesh import spread_spec
from curvtrain.objective import Measure, Objective, safe

PyTree = Any
C = TypeVar("C", bound=Estimate)
Sums = Mapping[str, dict[str, jax.Array]]  # by layer, by statistic


@dataclasses.dataclass(frozen=True)
class LayerEstimator(CurvatureEstimator[C], Generic[C]):
    """An estimator of blocks of layers: a subclass says which statistic, and what its curvature keeps of it.

    The Hessian of the objective's regulariser is in it as far as it is diagonal, and where blocks are kept as they are:
    diagonals, units, whole layers, norm layers. A Kronecker product has no place for it; there damping stands for it.

    A layer that is called several times for an example has the statistics of the example's gradient, in which its calls
    add up; for Kronecker factors each call counts as a position of its own. A mask over time keeps positions of weight
    zero out of a layer whose positions are time; out of one that is called in a loop over time, those on which no
    unmasked output depends; any other layer has the rows of all examples with an unmasked position.

    The curvature of a subclass has the fields `coverage`, `weight`, `skipped`, and the averages that `means` names.

    Attributes:
      fisher: "exact" (= "ggn" for the losses of curvtrain.losses), "sampled" or "empirical".
      ema: decay of the moving average over updates, debiased, in which a batch counts with the total weight of its
        examples; 0 keeps the last batch alone, and 1 is the plain mean: after a pass over a data set, in batches of any
        sizes, that over all of its examples.
      uncovered: "error", or "diagonal": parameters of unknown layers get an exact diagonal of per-example gradients.
      plain: regular expression; layers and parameters whose path it matches get that diagonal too.
      layers: for classes of modules, their layer, such as {MyLinear: curvature.DenseLayer}: what `register_layer` does
        for the whole process, for this estimator alone.

    Raises:
      TypeError, ValueError: when built with a bad argument; in `init` for an objective without outputs, for
        parameters that belong to no known layer, and for a layer that lacks the statistic; in `update` for layers of
        which statistics would miss something: called without the axis of examples, or parameters used without calling
        their layer; and for a loss of one example that depends on others.
    """

    fisher: str = "sampled"
    _: dataclasses.KW_ONLY
    ema: float = 0.95
    uncovered: str = "error"
    plain: str | None = None
    layers: Any = ()

    fishers: ClassVar[tuple[str, ...]] = FISHERS
    second_moments: ClassVar[frozenset[str]] = frozenset()  # fields of sums of v v^T: finite where their diagonals are

    def __post_init__(self):
        _checks.one_of(f"{self.name}(fisher)", self.fisher, self.fishers)
        _checks.number_in(f"{self.name}(ema)", self.ema, 0.0, 1.0)
        _checks.one_of(f"{self.name}(uncovered)", self.uncovered, self._uncovered_options)
        layers = dict(self.layers)
        merged(layers, f"{self.name}(layers)")
        object.__setattr__(self, "layers", tuple(layers.items()))  # hashable
        self._check_options()

    def _check_options(self) -> None:
        """Checks the options of a subclass."""

    @property
    def _uncovered_options(self) -> tuple[str, ...]:
        """The values that `uncovered` may have; all but "error" let any parameter be a plain one."""
        return UNCOVERED

    @property
    def _refuses_uncovered(self) -> bool:
        """Says whether a parameter of no known layer is an error."""
        return self.uncovered == "error"

    @property
    def name(self) -> str:
        return type(self).__name__

    # -- layers --------------------------------------------------------------------------------------------------------

    def coverage(self, objective: Objective | None, params: PyTree) -> Coverage:
        """Returns which layer every parameter belongs to. Raises as `init` does."""
        if objective is None:
            raise TypeError(f"{self.name} finds the layers of a model, so init() needs the objective.")
        objective.require_outputs(self.name, "Lanczos(product='hessian')")
        uncovered = "error" if self._refuses_uncovered else "diagonal"
        coverage = cover(objective, params, self.name, uncovered=uncovered, plain=self.plain, layers=dict(self.layers))
        statistic = self._statistic()
        if statistic is not None:
            for layer in coverage.layers:
                statistic.check(layer, self.name)
        return coverage

    def overview(self, objective, params) -> str:
        coverage = self.coverage(objective, params)
        blocks = {layer.name: self._described(layer) for layer in coverage.layers}
        size = jnp.dtype(self._stored_as(coverage)).itemsize
        return coverage.table({name: (kind, size * floats) for name, (kind, floats) in blocks.items()})

    def _stored_as(self, coverage: Coverage) -> str:
        """The dtype of the floats that `_described` counts."""
        return coverage.dtype

    @abc.abstractmethod
    def _described(self, layer: Layer) -> tuple[str, int]:
        """(kind of a layer's block, floats of its curvature)."""

    # -- statistics ----------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _statistic(self) -> Statistic | None:
        """The statistic of every layer; None if there is none, and `measure` is another."""

    @abc.abstractmethod
    def means(self, curvature: C, sums: Sums, W: jax.Array) -> dict[str, PyTree]:
        """The batch's means, by the field of the curvature that is their moving average."""

    def measure(self, curvature: C, objective, params, batch, key) -> Measure:
        """The sums of the statistic over a batch, taken in the passes of the training step."""
        statistic = self._statistic()
        assert statistic is not None
        kept: Any = curvature
        given = self._given(curvature)
        return LayerMeasure.of(
            objective, params, batch, key, kept.coverage, statistic, self.fisher, given=given, who=self.name
        )

    def absorb(self, curvature: C, measured, key) -> C:
        """The curvature with one more batch in its debiased moving averages: sum_b ema^(B-b) W_b X_b over that of W_b.

        A batch whose statistics are not finite, or that is all masked (W = 0), says nothing.
        """
        kept: Any = curvature  # see the class's docstring
        sums, W = measured
        means = self.means(curvature, sums, safe(W))
        usable = functools.reduce(
            operator.and_, [_finite(m, f in self.second_moments) for f, m in means.items()], W > 0
        )
        weight = self.ema * kept.weight + W
        share = W / safe(weight)
        moved = lambda old, new: (old + share * (new.reshape(old.shape) - old)).astype(old.dtype)
        average = lambda old, new: jnp.where(usable, moved(old, new), old)
        besides = self._besides(curvature, means, usable, W)
        averages = {
            field: jax.tree.map(average, getattr(kept, field), mean)
            for field, mean in means.items()
            if field not in besides
        }
        return dataclasses.replace(
            kept,
            **averages,
            **besides,
            weight=jnp.where(usable, weight, kept.weight),
            skipped=kept.skipped + ~usable,
        )

    def update(self, curvature: C, objective, params, batch, key, *, grads=None) -> C:
        measure = self.measure(curvature, objective, params, batch, key)
        return self.absorb(curvature, objective.measure(params, batch, key, measure), key)

    def _given(self, curvature: C) -> dict[str, dict[str, jax.Array]]:
        """For each layer's name, the arrays that the statistic needs."""
        return {}

    def _besides(self, curvature: C, means: dict[str, PyTree], usable: jax.Array, W: jax.Array) -> dict[str, Any]:
        """Fields of the curvature that an update changes in another way, and their values. W: of the batch."""
        return {}


def spread_specs(curvature: C, mesh: jax.sharding.Mesh) -> C:
    """A `PartitionSpec` for every array: split over as much of the mesh as divides its blocks, or else their rows."""
    return jax.tree.map(lambda a: spread_spec(mesh.shape, a.shape), curvature)


def _finite(means: PyTree, second_moments: bool) -> jax.Array:
    """Whether all means are finite: of second moments the diagonals show it, at a fraction of the cost."""
    shown = (lambda a: jnp.diagonal(a, axis1=-2, axis2=-1)) if second_moments else (lambda a: a)
    return functools.reduce(
        operator.and_, [jnp.all(jnp.isfinite(shown(a))) for a in jax.tree.leaves(means)], jnp.bool_(True)
    )
