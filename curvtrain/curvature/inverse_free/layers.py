"""Inverse-free factors from K-FAC's statistics: SINGD, and IKFAC, whose fixed point is K-FAC's damped inverse."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain import _checks
from curvtrain._keys import Purpose, fold
from curvtrain.curvature.capture import Layer, LayerMeasure, Statistic
from curvtrain.curvature.capture.layers.blocks import means_of
from curvtrain.curvature.capture.statistics import WEIGHT_SHARING, KroneckerStatistic
from curvtrain.curvature.fisher.base import LayerEstimator
from curvtrain.curvature.inverse_free.estimator import DTYPES, MAX_SIZE, check_rule, rule_of
from curvtrain.curvature.inverse_free.factors import InverseFreeFactors, described
from curvtrain.curvature.inverse_free.step import Rule, of_factors
from curvtrain.curvature.inverse_free.structures import Diagonal
from curvtrain.curvature.inverse_free.tensors import Structures, Tensor, check_structures, structures_for
from curvtrain.curvature.inverse_free.views import EachLayer
from curvtrain.objective import safe

PyTree = Any

NAME = "InverseFreeKFAC"


@dataclasses.dataclass(frozen=True)
class RootStatistic(Statistic):
    """Kronecker factors of the layers that have them, diagonals of all others.

    Attributes:
      weight_sharing: as for `KroneckerStatistic`.
    """

    weight_sharing: str = "expand"

    needs = ("block",)

    def _of(self, layer: Layer) -> KroneckerStatistic:
        return KroneckerStatistic(self.weight_sharing, diagonal=not EachLayer.factored(layer))

    def shapes(self, layer):
        return self._of(layer).shapes(layer)

    def __call__(self, layer, backward):
        return self._of(layer)(layer, backward)

    def of_examples(self, layer):
        return self._of(layer).of_examples(layer)

    def measure_examples(self, layer, gradients, given):
        return self._of(layer).measure_examples(layer, gradients, given)


@dataclasses.dataclass(frozen=True)
class InverseFreeKFAC(LayerEstimator[InverseFreeFactors]):
    """K K^T ~ A^-1 and C C^T ~ G^-1 for the factors A and G of K-FAC, by products alone, of every layer.

    `update` measures A and G of a batch and moves K and C; `refresh` has nothing to do. How often is the `update_every`
    of the `CurvatureSchedule` (T in the paper). Layers that have no factors in K-FAC (norm layers, embeddings, plain
    parameters) have a diagonal K instead, for the diagonal of their Fisher. What is left open (None) is what
    `optim.singd` asks for. Lin et al. (2024), arXiv 2312.05705.

    Attributes:
      fisher: "empirical", the paper's; "sampled" and "exact" as for `KFAC`.
      weight_sharing: "expand" or "reduce", as for `KFAC`.
      structure: of the factors, as for `InverseFree`; names of layers choose, and a pair of structures is that of K and
        of C.
      rate: beta in (0, 1); None: 0.01.
      momentum: alpha, of the factors' directions; None: 0.5.
      damping: lambda; None: 1e-3.
      kfac_like: IKFAC: traces of the other side's factor are 1, and K K^T approaches (A + damping I)^-1; None: False.
      normalized: whether a step's direction is 1 - alpha of the new one, and its largest entry at most 1; None: True.
        Without it the first steps may be unstable, so that the rate needs a warm-up.
      max_size: sides longer than this have diagonal factors.
      dtype: of factors and momenta, as for `InverseFree`.
      uncovered, plain, layers: as for `LayerEstimator`. There is no average of the statistics: `ema` is 0.

    Raises:
      TypeError, ValueError: as for `LayerEstimator` and `InverseFree`.
    """

    factorises = False

    fisher: str = "empirical"
    weight_sharing: str = "expand"
    _: dataclasses.KW_ONLY
    ema: float = 0.0
    structure: Structures = "dense"
    rate: float | None = None
    momentum: float | None = None
    damping: float | None = None
    kfac_like: bool | None = None
    normalized: bool | None = None
    max_size: int = MAX_SIZE
    dtype: str | None = None

    def _check_options(self):
        _checks.one_of(f"{NAME}(weight_sharing)", self.weight_sharing, WEIGHT_SHARING)
        if self.ema != 0:
            raise ValueError(
                f"{NAME}(ema={self.ema}) would average statistics, and factors follow those of the last batch: what "
                f"averages is {NAME}(momentum=...). Leave it out."
            )
        object.__setattr__(self, "structure", check_structures(f"{NAME}(structure)", self.structure))
        check_rule(NAME, self.rate, self.momentum, self.damping)
        for name in ("kfac_like", "normalized"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise TypeError(f"{NAME}({name}) should be True or False, not {value!r}.")
        _checks.positive_int(f"{NAME}(max_size)", self.max_size)
        if self.dtype is not None:
            _checks.one_of(f"{NAME}(dtype)", self.dtype, DTYPES)

    @property
    def rule(self) -> Rule:
        """The rule by which factors move; what was left open has the defaults."""
        limit = "none" if self.normalized is False else "entry"
        return rule_of(self.rate, self.momentum, self.damping, kfac_like=bool(self.kfac_like), limit=limit)

    def init(self, objective, params) -> InverseFreeFactors:
        view = EachLayer(self.coverage(objective, params))
        tensors = tuple(self._tensor(name, *shape) for name, shape in view.shapes().items())
        return InverseFreeFactors.begin(view, tensors, self.rule, "kfac", self.dtype)

    def _tensor(self, name: str, copies: int, sides: tuple[int, ...]) -> Tensor:
        if len(sides) == 1:
            return Tensor(name, copies, sides, (Diagonal(),))
        structures = structures_for(f"{NAME}(structure)", self.structure, name, sides, self.max_size)
        return Tensor(name, copies, sides, structures)

    # -- an update -----------------------------------------------------------------------------------------------------

    def _statistic(self):
        return RootStatistic(self.weight_sharing)

    def measure(self, curvature: InverseFreeFactors, objective, params, batch, key):
        view: Any = curvature.view
        statistic = self._statistic()
        return LayerMeasure.of(objective, params, batch, key, view.coverage, statistic, self.fisher, who=NAME)

    def means(self, curvature: InverseFreeFactors, sums, W) -> dict[str, tuple[jax.Array, ...]]:
        """For every layer A (K, d_i, d_i) and G (K, d_o, d_o), or the diagonal (K, n) of one that has none."""
        view: Any = curvature.view
        found: dict[str, tuple[jax.Array, ...]] = {}
        for layer in view.coverage.layers:
            mean = means_of(layer, sums[layer.name], W)
            if view.factored(layer):
                found[layer.name] = mean["A"], mean["G"]
            else:
                found[layer.name] = (layer.block().diagonal_of(mean).reshape(layer.copies, -1),)
        return found

    def absorb(self, curvature: InverseFreeFactors, measured, key) -> InverseFreeFactors:
        """The factors after a step for one more batch. One that is all masked, or not finite, moves nothing."""
        sums, W = measured
        c, means = curvature, self.means(curvature, sums, safe(W))
        finite = [jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(means)]
        usable = functools.reduce(jnp.logical_and, finite, W > 0)
        side = lambda stack, n: stack.read({tensor.name: means[tensor.name][n] for tensor in stack.tensors})
        T = lambda stack, K: of_factors(c.rule, stack, K, [side(stack, n) for n in range(len(K))])
        return c.moved(T, usable, fold(key, Purpose.FIT))

    def refresh(self, curvature, objective, params, batch, key, damping=None) -> InverseFreeFactors:
        """The factors as they are."""
        return curvature

    def partition_specs(self, curvature: InverseFreeFactors, param_specs, mesh):
        return curvature.partition_specs(mesh)

    def _stored_as(self, coverage):
        return self.dtype or coverage.dtype

    def _described(self, layer):
        sides = EachLayer.sides(layer)
        tensor = self._tensor(layer.name, layer.copies, sides)
        return f"{' x '.join(map(str, sides))}, {described(tensor.structures)}", _numbers(tensor)


def _numbers(tensor: Tensor) -> int:
    """Counts the numbers that the factors and momenta of a tensor are made of."""
    total = 0
    for d, s in zip(tensor.sides, tensor.structures, strict=True):
        shape = (tensor.copies, d) if s.is_vector else (tensor.copies, d, d)
        leaves = jax.tree.leaves(jax.eval_shape(s.read, jax.ShapeDtypeStruct(shape, jnp.float32)))
        total += 2 * sum(leaf.size for leaf in leaves)
    return total
