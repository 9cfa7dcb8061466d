"""Simpler Fisher blocks than K-FAC's: diagonal, diagonal Kronecker factors, one block per unit, one block per layer.

All use exact per-example sums, never the square of a mean gradient. A layer that is used several times in one example
counts every use as an example of its own. Symbols in `capture/layers.py`.
"""

import abc
import dataclasses
import functools
import math
import operator
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

from curvtrain import _checks
from curvtrain.curvature import stacks, trees
from curvtrain.curvature.base import Curvature, CurvatureEstimator
from curvtrain.curvature.capture import FISHERS, Coverage, EmbedLayer, NormLayer, PlainParameter, collect, cover
from curvtrain.curvature.capture.coverage import UNCOVERED
from curvtrain.curvature.capture.layers import Layer, MatrixLayer
from curvtrain.curvature.capture.statistics import (
    DiagonalStatistic,
    FullStatistic,
    KroneckerStatistic,
    Statistic,
    UnitStatistic,
)
from curvtrain.curvature.products import as_matrix, hvp
from curvtrain.objective import Objective, safe

PyTree = Any
Arrays = dict[str, jax.Array]


# -- curvatures --------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagonal(Curvature):
    """C = diag(values). Without values, the name of PSGD's diagonal family: `PSGD(Diagonal())`.

    Attributes:
      values: float32, like the parameters.
      weight: float32 (): what the moving average has seen, a sum of powers of the decay; 0 before the first update.
      skipped: int32 (): updates with statistics that were not finite, or of no example; nothing was absorbed.
    """

    values: PyTree = ()
    weight: jax.Array = dataclasses.field(default_factory=lambda: jnp.float32(0))
    skipped: jax.Array = dataclasses.field(default_factory=lambda: jnp.int32(0))

    def matvec(self, vector: PyTree) -> PyTree:
        """C v."""
        return jax.tree.map(jnp.multiply, self.values, trees.float32(vector))

    def solve(self, vector: PyTree, damping: jax.Array | float) -> PyTree:
        """(C + damping I)^-1 v."""
        return jax.tree.map(lambda d, v: v / (d + damping), self.values, trees.float32(vector))

    def power(self, vector: PyTree, damping: jax.Array | float, exponent: float) -> PyTree:
        """(C + damping I)^exponent v."""
        if exponent == -1.0:
            return self.solve(vector, damping)
        return jax.tree.map(lambda d, v: (d + damping) ** exponent * v, self.values, trees.float32(vector))

    def as_matrix(self) -> jax.Array:
        return jnp.diag(ravel_pytree(self.values)[0])

    def telemetry(self) -> dict[str, jax.Array]:
        """Largest and mean entry, and skipped updates."""
        leaves = jax.tree.leaves(self.values)
        largest = jnp.max(jnp.stack([jnp.max(leaf) for leaf in leaves]))
        return {
            "diagonal_max": largest,
            "diagonal_mean": jnp.sum(jnp.stack([jnp.sum(leaf) for leaf in leaves])) / trees.size(self.values),
            "skipped": self.skipped,
        }


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks(Curvature):
    """C block-diagonal with dense blocks F, K of them per layer (or one for each of its units).

    Attributes:
      blocks: for each layer, F (K, d, d); moving averages.
      vectors, values: their eigenvectors (K, d, d) as columns, and eigenvalues (K, d), of the last refresh.
      weight: what the moving averages have seen.
      skipped: updates with statistics that were not finite, or of no example; nothing was absorbed.
      refreshes: so far.
      failures: blocks whose eigenvectors were not finite; the last ones were kept.
      coverage: which layer every parameter belongs to.
      unit: whether a block is that of a unit (an output, a channel), or of a whole matrix.
    """

    blocks: Arrays
    vectors: Arrays
    values: Arrays
    weight: jax.Array
    skipped: jax.Array
    refreshes: jax.Array
    failures: jax.Array
    coverage: Coverage = dataclasses.field(metadata=dict(static=True))
    unit: bool = dataclasses.field(metadata=dict(static=True))

    def matvec(self, vector: PyTree) -> PyTree:
        """C v."""
        return self._map(vector, lambda name, x: jnp.einsum("upq,uq->up", self.blocks[name], x))

    def solve(self, vector: PyTree, damping: jax.Array | float) -> PyTree:
        """(C + damping I)^-1 v, for the blocks of the last refresh."""
        return self._in_basis(vector, lambda value: 1.0 / (value + damping))

    def power(self, vector: PyTree, damping: jax.Array | float, exponent: float) -> PyTree:
        """(C + damping I)^exponent v, for the blocks of the last refresh; negative eigenvalues count as zero."""
        if exponent == -1.0:
            return self.solve(vector, damping)
        return self._in_basis(vector, lambda value: (jnp.maximum(value, 0.0) + damping) ** exponent)

    def as_matrix(self) -> jax.Array:
        return as_matrix(self.matvec, like(self.coverage))

    def telemetry(self) -> dict[str, jax.Array]:
        """Largest eigenvalue, refreshes, failures and skipped updates."""
        return {
            "block_eigenvalue_max": jnp.max(jnp.stack([jnp.max(value) for value in self.values.values()])),
            "refreshes": self.refreshes,
            "failures": self.failures,
            "skipped": self.skipped,
        }

    def _in_basis(self, vector, function):
        def apply(name, x):
            Q = self.vectors[name]
            inside = function(self.values[name]) * jnp.einsum("uqp,uq->up", Q, x)
            return jnp.einsum("upq,uq->up", Q, inside)

        return self._map(vector, apply)

    def _map(self, vector, function):
        found = {}
        with trees.exact():
            plain = {layer.name for layer in self.coverage.plain}
            for name, M in self.coverage.matrices(trees.float32(vector)).items():
                by_unit = self.unit or name in plain
                rows = jnp.swapaxes(M, 1, 2) if by_unit else M
                shape = rows.shape
                rows = rows.reshape(-1, shape[-1]) if by_unit else rows.reshape(shape[0], -1)
                rows = function(name, rows).reshape(shape)
                found[name] = jnp.swapaxes(rows, 1, 2) if by_unit else rows
        return self.coverage.vector(found)


def like(coverage: Coverage) -> PyTree:
    """A zero vector like the parameters."""
    zeros = lambda layer: {name: jnp.zeros((*layer.stack, *shape)) for name, shape in layer.shapes}
    return coverage.vector({layer.name: layer.matrix(zeros(layer)) for layer in coverage.layers})


# -- estimators --------------------------------------------------------------------------------------------------------

C = TypeVar("C", bound=Diagonal | DiagonalFactors | Blocks)


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
        old: Any = getattr(curvature, name)
        new = jax.tree.map(lambda old, new: new.reshape(old.shape), old, new)
        usable = functools.reduce(operator.and_, [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(new)], W > 0)
        weight = self.ema * curvature.weight + 1.0
        average = jax.tree.map(lambda old, new: jnp.where(usable, old + (new - old) / weight, old), old, new)
        return dataclasses.replace(
            curvature,
            **{name: average},
            weight=jnp.where(usable, weight, curvature.weight),
            skipped=curvature.skipped + ~usable,
        )

    def refresh(self, curvature: C, objective, params, batch, key, damping=None) -> C:
        return curvature

    def partition_specs(self, curvature: C, param_specs, mesh):
        return jax.tree.map(lambda _: PartitionSpec(), curvature)


@dataclasses.dataclass(frozen=True)
class DiagonalFisher(LayerEstimator[Diagonal]):
    """The diagonal of the Fisher: sums of squares of per-example gradients. Options as for `LayerEstimator`.

    Where a layer has one position per example they are never formed; elsewhere, a few at a time.

    For sequence outputs, "exact" treats every position as an example; "sampled" agrees with it in expectation.
    """

    uncovered: str = dataclasses.field(default="diagonal", kw_only=True)  # which is exact, as all of it is

    def init(self, objective, params) -> Diagonal:
        self.coverage(objective, params)
        return Diagonal(trees.zeros(params))

    def update(self, curvature: Diagonal, objective, params, batch, key) -> Diagonal:
        coverage = self.coverage(objective, params)
        found, W = self.collect(DiagonalStatistic(), coverage, objective, params, batch, key)
        D = coverage.vector(
            {layer.name: _stacked(found[layer.name]["D2"], layer) / safe(W) for layer in coverage.layers}
        )
        return self.absorb(curvature, "values", D, W)

    def partition_specs(self, curvature, param_specs, mesh):
        return dataclasses.replace(super().partition_specs(curvature, param_specs, mesh), values=param_specs)


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

    def update(self, curvature: DiagonalFactors, objective, params, batch, key) -> DiagonalFactors:
        coverage = curvature.coverage
        found, W = self.collect(KroneckerStatistic(diagonal=True), coverage, objective, params, batch, key)
        factors: dict[str, Arrays] = {}
        for layer in coverage.layers:
            x = found[layer.name]
            if isinstance(layer, NormLayer):
                x = {"D2": jnp.moveaxis(jnp.diagonal(_stacked(x["F"], layer), axis1=1, axis2=2), -1, 1) / safe(W)}
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


@dataclasses.dataclass(frozen=True)
class _BlockEstimator(LayerEstimator[Blocks]):
    """What `UnitWise` and `FullBlock` share.

    Attributes:
      largest: rows of a block, at most: it is a dense matrix, whose eigenvectors cost the cube of it.
    """

    largest: int = dataclasses.field(default=4096, kw_only=True)

    unit: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        _checks.positive_int(f"{self.name}(largest)", self.largest)

    def init(self, objective, params) -> Blocks:
        coverage = self.coverage(objective, params)
        sizes = {layer.name: self._size(layer) for layer in coverage.layers}
        for layer in coverage.layers:
            if sizes[layer.name][1] > self.largest:
                raise ValueError(
                    f"{self.name}: {layer.kind} {layer.name!r} would have blocks of {sizes[layer.name][1]} x "
                    f"{sizes[layer.name][1]}, more than {self.name}(largest={self.largest}). Raise it, give the layer "
                    f"a diagonal with {self.name}(plain={layer.name!r}), or use KFAC."
                )
        zeros = {name: jnp.zeros((count, d, d)) for name, (count, d) in sizes.items()}
        return Blocks(
            blocks=zeros,
            vectors={name: zero + jnp.eye(zero.shape[-1]) for name, zero in zeros.items()},
            values={name: jnp.zeros((count, d)) for name, (count, d) in sizes.items()},
            weight=jnp.float32(0),
            skipped=jnp.int32(0),
            refreshes=jnp.int32(0),
            failures=jnp.int32(0),
            coverage=coverage,
            unit=self.unit,
        )

    def refresh(self, curvature: Blocks, objective, params, batch, key, damping=None) -> Blocks:
        vectors, values, failures = {}, {}, curvature.failures
        found = stacks.in_turn(lambda _, F: stacks.eigh(F), curvature.blocks)
        for name, (value, Q) in found.items():
            finite = jnp.all(jnp.isfinite(value), axis=1) & jnp.all(jnp.isfinite(Q), axis=(1, 2))
            vectors[name] = jnp.where(finite[:, None, None], Q, curvature.vectors[name])
            values[name] = jnp.where(finite[:, None], value, curvature.values[name])
            failures += jnp.sum(~finite, dtype=jnp.int32)
        return dataclasses.replace(
            curvature, vectors=vectors, values=values, refreshes=curvature.refreshes + 1, failures=failures
        )

    def _block(self, layer):
        count, d = self._size(layer)
        return f"{count} x ({d} x {d})", count * (2 * d * d + d)  # a block, its eigenvectors and its eigenvalues

    @abc.abstractmethod
    def _size(self, layer: Layer) -> tuple[int, int]:
        """(number of blocks, rows of a block)."""


@dataclasses.dataclass(frozen=True)
class UnitWise(_BlockEstimator):
    """One block for each unit: the incoming weights of an output, or scale and bias of a channel (2 x 2).

    Osawa et al. (2020), arXiv 2002.06015, section 4.2. Options as for `LayerEstimator`, and `largest`, the rows of a
    block at most. Plain parameters have 1 x 1 blocks.
    """

    def update(self, curvature: Blocks, objective, params, batch, key) -> Blocks:
        found, W = self.collect(UnitStatistic(), curvature.coverage, objective, params, batch, key)
        new = {}
        for layer in curvature.coverage.layers:
            if isinstance(layer, PlainParameter):
                new[layer.name] = found[layer.name]["D2"] / safe(W)
            elif isinstance(layer, NormLayer):  # (..., p, p, C) → (..., C, p, p)
                new[layer.name] = jnp.moveaxis(found[layer.name]["F"], -1, -3) / safe(W)
            else:
                new[layer.name] = found[layer.name]["F"] / safe(W)
        return self.absorb(curvature, "blocks", new, W)

    def _size(self, layer):
        if isinstance(layer, MatrixLayer):
            return layer.copies * layer.d_o, layer.d_i
        if isinstance(layer, EmbedLayer):
            return layer.copies * layer.features, layer.vocabulary
        if isinstance(layer, NormLayer):
            return layer.copies * layer.channels, layer.units
        return layer.size, 1


@dataclasses.dataclass(frozen=True)
class FullBlock(_BlockEstimator):
    """One dense block for each layer's matrix: exact, for small layers. Options as for `UnitWise`.

    fisher="hessian" takes the block of the loss's Hessian instead, one product for each parameter of the layer; it
    may be indefinite.
    """

    unit = False
    fishers = (*FISHERS, "hessian")

    def update(self, curvature: Blocks, objective, params, batch, key) -> Blocks:
        coverage = curvature.coverage
        if self.fisher == "hessian":
            W = objective.accumulate(lambda piece, k: objective.total(params, piece, k)[1], batch, key)
            return self.absorb(curvature, "blocks", _hessian_blocks(coverage, objective, params, batch, key), W)
        found, W = self.collect(FullStatistic(), coverage, objective, params, batch, key)
        new = {}
        for layer in coverage.layers:
            new[layer.name] = found[layer.name]["D2" if isinstance(layer, PlainParameter) else "F"] / safe(W)
        return self.absorb(curvature, "blocks", new, W)

    def _size(self, layer):
        if isinstance(layer, PlainParameter):
            return layer.size, 1
        copies = layer.copies if isinstance(layer, MatrixLayer | EmbedLayer | NormLayer) else 1
        return copies, layer.size // copies


def _hessian_blocks(coverage: Coverage, objective, params, batch, key) -> Arrays:
    """The Hessian's block (K, d, d) of each layer: its columns are products with unit vectors."""
    zero = coverage.matrices(trees.zeros(params))
    plain = {layer.name for layer in coverage.plain}
    found = {}
    for name, M in zero.items():
        K, d = M.shape[0], math.prod(M.shape[1:])
        if name in plain:
            K, d = d, 1

        def column(i, name=name, M=M, K=K, d=d):
            unit = jnp.zeros(K * d).at[i].set(1.0).reshape(M.shape)
            Hv = hvp(objective, params, coverage.vector({**zero, name: unit}), batch, key)
            return coverage.matrices(Hv)[name].reshape(K, d)[i // d]

        found[name] = jax.lax.map(column, jnp.arange(K * d)).reshape(K, d, d)
    return found


def _rows(rows: jax.Array, x: jax.Array) -> jax.Array:
    return safe(rows).reshape(rows.shape + (1,) * (x.ndim - rows.ndim))


def _stacked(x: jax.Array, layer: Layer) -> jax.Array:
    """A statistic (*stack, groups, ...) or (*stack, ...) with its copies as one leading axis."""
    if isinstance(layer, PlainParameter):
        return x.reshape(1, 1, -1)
    lead = len(layer.stack) + isinstance(layer, MatrixLayer)
    return x.reshape(-1, *x.shape[lead:])
