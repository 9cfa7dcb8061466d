"""Dense blocks of the Fisher: one for each unit, or one for each layer."""

import abc
import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from curvtrain import _checks
from curvtrain.curvature import stacks, trees
from curvtrain.curvature.base import Curvature
from curvtrain.curvature.capture import FISHERS, Coverage, EmbedLayer, NormLayer, PlainParameter
from curvtrain.curvature.capture.layers import Layer, MatrixLayer
from curvtrain.curvature.capture.statistics import FullStatistic, UnitStatistic
from curvtrain.curvature.fisher.base import LayerEstimator
from curvtrain.curvature.mesh import axes_for, mesh_shape, split
from curvtrain.curvature.products import as_matrix, hvp
from curvtrain.objective import safe

PyTree = Any
Arrays = dict[str, jax.Array]


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

    def power(self, vector: PyTree, damping: jax.Array | float, exponent: float) -> PyTree:
        """(C + damping I)^exponent v, for the blocks of the last refresh; negative eigenvalues count as zero."""
        if exponent == -1.0:
            return self.solve(vector, damping)
        return self._in_basis(vector, lambda value: (jnp.maximum(value, 0.0) + damping) ** exponent)

    def as_matrix(self) -> jax.Array:
        return as_matrix(self.matvec, self.coverage.zeros())

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
        share = lambda F: split(stacks.eigh, axes_for(mesh_shape(), len(F)))  # of those of a layer, on each device
        found = stacks.in_turn(lambda _, F: share(F)(F), curvature.blocks)
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

    def update(self, curvature: Blocks, objective, params, batch, key, *, grads=None) -> Blocks:
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

    def update(self, curvature: Blocks, objective, params, batch, key, *, grads=None) -> Blocks:
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
