"""Dense blocks of the Fisher: one for each unit, or one for each layer."""

import abc
import dataclasses
import functools
import operator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from curvtrain import _checks
from curvtrain.curvature import stacks, trees
from curvtrain.curvature.base import Curvature, is_inverse
from curvtrain.curvature.capture import FISHERS, Coverage, Layer
from curvtrain.curvature.capture.statistics import FullStatistic, UnitStatistic
from curvtrain.curvature.fisher.base import LayerEstimator, spread_specs
from curvtrain.curvature.mesh import axes_for, mesh_shape, split
from curvtrain.curvature.products import hvp
from curvtrain.objective import Objective

PyTree = Any
Arrays = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks(Curvature):
    """C block-diagonal with dense blocks F, K of them per layer (or one for each of its units).

    Attributes:
      blocks: for each layer, F (K, d, d); moving averages.
      vectors, values: their eigenvectors (K, d, d) as columns, and eigenvalues (K, d), of the last refresh.
      weight: what the moving averages have seen: the batches' weights times powers of the decay, added up.
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

    def like(self) -> PyTree:
        return self.coverage.like()

    def groups(self):
        return self.coverage.groups()

    def matvec(self, vector: PyTree) -> PyTree:
        """C v."""
        return self._map(vector, lambda name, x: jnp.einsum("upq,uq->up", self.blocks[name], x))

    def solve(self, vector: PyTree, damping: jax.Array | float) -> PyTree:
        """(C + damping I)^-1 v, for the blocks of the last refresh."""
        return self._in_basis(vector, lambda value: 1.0 / (value + damping))

    def power(self, vector: PyTree, damping: jax.Array | float, exponent: jax.Array | float) -> PyTree:
        """(C + damping I)^exponent v, for the blocks of the last refresh.

        NaN where an eigenvalue of the damped matrix is negative and the exponent no integer: of a Fisher none is.
        """
        if is_inverse(exponent):
            return self.solve(vector, damping)
        return self._in_basis(vector, lambda value: (value + damping) ** exponent)

    def diagonal(self) -> PyTree:
        """diag(C), like the parameters."""
        diagonal = lambda name, _: jnp.diagonal(self.blocks[name], axis1=1, axis2=2)
        return self._map(self.coverage.zeros(), diagonal)

    def logdet(self, damping: jax.Array | float) -> jax.Array:
        """log |det(C + damping I)|, for the blocks of the last refresh."""
        log = lambda value: jnp.sum(jnp.log(jnp.abs(value + damping)))
        return functools.reduce(operator.add, map(log, self.values.values()))

    def telemetry(self) -> dict[str, jax.Array]:
        """Largest eigenvalue, refreshes, failures and skipped updates."""
        return {
            "block_eigenvalue_max": jnp.max(jnp.stack([jnp.max(v) for v in self.values.values() if v.size])),
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
        """Applies function(layer's name, rows (K, d)) to the rows of M that blocks belong to."""
        results = {}
        with trees.exact():
            matrices = self.coverage.matrices(trees.wide(vector))
            for layer in self.coverage.layers:
                M = matrices[layer.name]
                rows = jnp.swapaxes(M, 1, 2) if _by_unit(layer, self.unit) else M
                count, d = _size(layer, self.unit)
                mapped = function(layer.name, rows.reshape(count, d)).reshape(rows.shape)
                results[layer.name] = jnp.swapaxes(mapped, 1, 2) if _by_unit(layer, self.unit) else mapped
        return self.coverage.vector(results)


def _by_unit(layer: Layer, unit: bool) -> bool:
    """Whether a layer has a block for each column of M; parameters without a layer always do."""
    return unit or not layer.tapped


def _size(layer: Layer, unit: bool) -> tuple[int, int]:
    """(number of blocks, rows of a block)."""
    if _by_unit(layer, unit):
        return layer.copies * layer.d_o, layer.d_i
    return layer.copies, layer.d_i * layer.d_o


@dataclasses.dataclass(frozen=True)
class _BlockEstimator(LayerEstimator[Blocks]):
    """What `UnitWise` and `FullBlock` share.

    Attributes:
      largest: rows of a block, at most: it is a dense matrix, whose eigenvectors cost the cube of it.
    """

    largest: int = dataclasses.field(default=4096, kw_only=True)

    unit: ClassVar[bool]

    def _check_options(self):
        _checks.positive_int(f"{self.name}(largest)", self.largest)

    def init(self, objective, params) -> Blocks:
        coverage = self.coverage(objective, params)
        sizes = {layer.name: _size(layer, self.unit) for layer in coverage.layers}
        for layer in coverage.layers:
            if sizes[layer.name][1] > self.largest:
                raise ValueError(
                    f"{self.name}: {layer.kind} {layer.name!r} would have blocks of {sizes[layer.name][1]} x "
                    f"{sizes[layer.name][1]}, more than {self.name}(largest={self.largest}). Raise it, give the layer "
                    f"a diagonal with {self.name}(plain={layer.name!r}), or use KFAC."
                )
        dtype = coverage.dtype
        zeros = {name: jnp.zeros((count, d, d), dtype) for name, (count, d) in sizes.items()}
        return Blocks(
            blocks=zeros,
            vectors={name: zero + jnp.eye(zero.shape[-1], dtype=dtype) for name, zero in zeros.items()},
            values={name: jnp.zeros((count, d), dtype) for name, (count, d) in sizes.items()},
            weight=jnp.zeros((), dtype),
            skipped=jnp.int32(0),
            refreshes=jnp.int32(0),
            failures=jnp.int32(0),
            coverage=coverage,
            unit=self.unit,
        )

    def refresh(self, curvature: Blocks, objective, params, batch, key, damping=None) -> Blocks:
        own = {name: F for name, F in curvature.blocks.items() if F.size}
        # Layer by layer: on eight virtual devices of a CPU, programs with the blocks of all layers of one size together
        # waited for each other for ever.
        share = lambda F: split(stacks.eigh, axes_for(mesh_shape(), len(F)))  # of those of a layer, on each device
        eigen = stacks.in_turn(lambda _, F: share(F)(F), own)
        vectors, values, failures = dict(curvature.vectors), dict(curvature.values), curvature.failures
        for name, (value, Q) in eigen.items():
            value = self._rounded(value)
            finite = jnp.all(jnp.isfinite(value), axis=1) & jnp.all(jnp.isfinite(Q), axis=(1, 2))
            failures += jnp.sum(~finite, dtype=jnp.int32)
            values[name] = jnp.where(finite[:, None], value, values[name])
            vectors[name] = jnp.where(finite[:, None, None], Q, vectors[name])
        return dataclasses.replace(
            curvature, vectors=vectors, values=values, refreshes=curvature.refreshes + 1, failures=failures
        )

    def partition_specs(self, curvature: Blocks, param_specs, mesh):
        return spread_specs(curvature, mesh)

    def means(self, curvature: Blocks, sums, W):
        layers, blocks = curvature.coverage.layers, {}
        for layer in layers:
            (statistic,) = sums[layer.name].values()
            count, d = _size(layer, self.unit)
            blocks[layer.name] = statistic.reshape(count, d, d) / W
        return {"blocks": blocks}

    @abc.abstractmethod
    def _rounded(self, values: jax.Array) -> jax.Array:
        """Eigenvalues, without what rounding made negative."""

    def _described(self, layer):
        count, d = _size(layer, self.unit)
        return f"{count} x ({d} x {d})", count * (2 * d * d + d)  # a block, its eigenvectors and its eigenvalues


@dataclasses.dataclass(frozen=True)
class UnitWise(_BlockEstimator):
    """One block for each unit: the incoming weights of an output, or scale and bias of a channel (2 x 2).

    Osawa et al. (2020), arXiv 2002.06015, section 4.2. Options as for `LayerEstimator`, and `largest`, the rows of a
    block at most. Plain parameters have 1 x 1 blocks.
    """

    unit: ClassVar[bool] = True

    def _statistic(self):
        return UnitStatistic()

    def _rounded(self, values):
        return jnp.maximum(values, 0.0)


@dataclasses.dataclass(frozen=True)
class FullBlock(_BlockEstimator):
    """One dense block for each layer's matrix: exact, for small layers. Options as for `UnitWise`.

    fisher="hessian" takes the block of the loss's Hessian instead, one product for each parameter of the layer; it
    may be indefinite.
    """

    unit: ClassVar[bool] = False
    fishers: ClassVar[tuple[str, ...]] = (*FISHERS, "hessian")

    def measure(self, curvature: Blocks, objective, params, batch, key):
        if self.fisher != "hessian":
            return super().measure(curvature, objective, params, batch, key)
        return HessianMeasure(objective.with_microbatch(None), params, curvature.coverage)

    def _statistic(self):
        return None if self.fisher == "hessian" else FullStatistic()

    def _rounded(self, values):
        return values if self.fisher == "hessian" else jnp.maximum(values, 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class HessianMeasure:
    """The blocks of the Hessian of sum_n w_n l_n, layer by layer: an `objective.Measure` with passes of its own.

    Attributes:
      objective, params: of the step; the objective takes a piece as a whole.
      coverage: of its model.
    """

    objective: Objective
    params: PyTree
    coverage: Coverage

    def prepare(self, piece):
        return {}, lambda module, slots: None

    def rides(self, outputs, piece):
        """Never: the blocks have passes of their own."""
        return False

    def sums(self, pull, own, outputs, piece, key):
        """{layer name: {"F": (K, d, d)}}: columns are products with unit vectors."""
        W = self.objective.total(self.params, piece, key)[1]
        zero = self.coverage.matrices(trees.zeros(self.params))
        blocks = {}
        for layer in self.coverage.layers:
            count, d = _size(layer, unit=False)

            def column(i, layer=layer, count=count, d=d):
                unit = jnp.zeros(count * d, zero[layer.name].dtype).at[i].set(1.0).reshape(zero[layer.name].shape)
                vector = self.coverage.vector({**zero, layer.name: unit})
                product = hvp(self.objective, self.params, vector, piece, key)  # of the mean
                return W * self.coverage.matrices(product)[layer.name].reshape(count, d)[i // max(d, 1)]

            blocks[layer.name] = {"F": jax.lax.map(column, jnp.arange(count * d)).reshape(count, d, d)}
        return blocks
