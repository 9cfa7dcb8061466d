"""The diagonal of the Fisher."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from curvtrain.curvature import trees
from curvtrain.curvature.base import Curvature, is_inverse
from curvtrain.curvature.capture import Coverage
from curvtrain.curvature.capture.statistics import DiagonalStatistic
from curvtrain.curvature.fisher.base import LayerEstimator, spread_specs
from curvtrain.objective import by_path

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagonal(Curvature):
    """C = diag(values). Without values, the name of PSGD's diagonal family: `PSGD(Diagonal())`.

    Attributes:
      values: like the parameters; float64 where one of them is, otherwise float32.
      weight: (): what the moving average has seen: the batches' weights times powers of the decay, added up; 0 before
        the first update.
      skipped: int32 (): updates with statistics that were not finite, or of no example; nothing was absorbed.
      coverage: which layer every parameter belongs to, where an estimator of layers maintains it.
    """

    values: PyTree = ()
    # NumPy's: an array of JAX looks for devices, and `PSGD(Diagonal())` is written before processes are joined
    weight: Any = dataclasses.field(default_factory=lambda: np.float32(0))
    skipped: Any = dataclasses.field(default_factory=lambda: np.int32(0))
    coverage: Coverage | None = dataclasses.field(default=None, metadata=dict(static=True))

    def like(self) -> PyTree:
        return jax.tree.map(lambda d: jax.ShapeDtypeStruct(d.shape, d.dtype), self.values)

    def groups(self):
        return tuple((path,) for path in by_path(self.values))

    def diagonal(self) -> PyTree:
        return self.values

    def logdet(self, damping: jax.Array | float) -> jax.Array:
        """log |det(C + damping I)|."""
        logs = [jnp.sum(jnp.log(jnp.abs(d + damping))) for d in jax.tree.leaves(self.values)]
        return sum(logs, jnp.zeros((), trees.width(self.values)))

    def matvec(self, vector: PyTree) -> PyTree:
        """C v."""
        return jax.tree.map(jnp.multiply, self.values, trees.wide(vector))

    def solve(self, vector: PyTree, damping: jax.Array | float) -> PyTree:
        """(C + damping I)^-1 v."""
        return jax.tree.map(lambda d, v: v / (d + damping), self.values, trees.wide(vector))

    def power(self, vector: PyTree, damping: jax.Array | float, exponent: jax.Array | float) -> PyTree:
        """(C + damping I)^exponent v."""
        if is_inverse(exponent):
            return self.solve(vector, damping)
        return jax.tree.map(lambda d, v: (d + damping) ** exponent * v, self.values, trees.wide(vector))

    def as_matrix(self) -> jax.Array:
        return jnp.diag(ravel_pytree(self.values)[0])

    def telemetry(self) -> dict[str, jax.Array]:
        """Largest and mean entry, and skipped updates."""
        leaves = [leaf for leaf in jax.tree.leaves(self.values) if leaf.size]
        largest = jnp.max(jnp.stack([jnp.max(leaf) for leaf in leaves]))
        return {
            "diagonal_max": largest,
            "diagonal_mean": jnp.sum(jnp.stack([jnp.sum(leaf) for leaf in leaves])) / trees.size(self.values),
            "skipped": self.skipped,
        }


class LayerDiagonal(Curvature):
    """A curvature that is diagonal, and kept in another form: a subclass says `diagonal` and `like`."""

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


@dataclasses.dataclass(frozen=True)
class DiagonalFisher(LayerEstimator[Diagonal]):
    """The diagonal of the Fisher: sums of squares of per-example gradients. Options as for `LayerEstimator`.

    Where a layer has one position per example they are never formed; elsewhere, a few at a time.

    For sequence outputs, "exact" treats every position as an example; "sampled" agrees with it in expectation.
    """

    uncovered: str = dataclasses.field(default="diagonal", kw_only=True)  # which is exact, as all of it is

    def init(self, objective, params) -> Diagonal:
        coverage = self.coverage(objective, params)
        return Diagonal(trees.zeros(params), jnp.zeros((), coverage.dtype), jnp.int32(0), coverage)

    def refresh(self, curvature: Diagonal, objective, params, batch, key, damping=None) -> Diagonal:
        return curvature

    def partition_specs(self, curvature: Diagonal, param_specs, mesh):
        return dataclasses.replace(spread_specs(curvature, mesh), values=param_specs)

    def means(self, curvature: Diagonal, sums, W):
        assert curvature.coverage is not None
        layers = curvature.coverage.layers
        matrix = lambda layer: sums[layer.name]["D2"].reshape(layer.copies, layer.d_i, layer.d_o)
        return {"values": curvature.coverage.vector({layer.name: matrix(layer) / W for layer in layers})}

    def _statistic(self):
        return DiagonalStatistic()

    def _described(self, layer):
        return "diagonal", layer.size
