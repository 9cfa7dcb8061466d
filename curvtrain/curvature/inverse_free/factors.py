"""Inverse-free estimators maintain P = (x)_n K_n K_n^T for every tensor. Symbols are those of `step.py`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from curvtrain.curvature import stacks, trees
from curvtrain.curvature.base import Estimate
from curvtrain.curvature.inverse_free.step import Rule, advance, along, sides_of, turned
from curvtrain.curvature.inverse_free.structures import Structure
from curvtrain.curvature.inverse_free.tensors import Stack, Tensor, stacks_of
from curvtrain.curvature.inverse_free.views import View
from curvtrain.curvature.mesh import spread_spec
from curvtrain.curvature.products import as_matrix
from curvtrain.objective import Path

PyTree = Any
Filed = dict[str, dict[str, Any]]  # by stack, by side, what is stored of (L, d, d)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InverseFreeFactors(Estimate):
    """P, one Kronecker product of K K^T for every tensor: a matrix that multiplies gradients as it is.

    Attributes:
      factors: for each stack of tensors of equal sides, for each side, K as its structure stores it, (L, ...).
      momenta: m, stored alike.
      updates: int32 (), so far.
      skipped: int32 (), updates with gradients or statistics that were not finite, or of no example.
      failures: int32 (), steps of a tensor's factors that were not finite; the last good ones were kept.
      view: how parameters are tensors.
      tensors: all of them.
      rule: how factors move.
      statistics: "gradient" or "kfac".
    """

    factors: Filed
    momenta: Filed
    updates: jax.Array
    skipped: jax.Array
    failures: jax.Array
    view: View = dataclasses.field(metadata=dict(static=True))
    tensors: tuple[Tensor, ...] = dataclasses.field(metadata=dict(static=True))
    rule: Rule = dataclasses.field(metadata=dict(static=True))
    statistics: str = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def begin(
        cls, view: View, tensors: tuple[Tensor, ...], rule: Rule, statistics: str, dtype: str | None
    ) -> "InverseFreeFactors":
        """P = I, with factors of a dtype; None for the view's."""

        def stored(stack: Stack, scale: float) -> dict[str, Any]:
            found = {}
            for n, (d, s) in enumerate(zip(stack.sides, stack.structures, strict=True)):
                one = jnp.ones(d, view.width) if s.is_vector else jnp.eye(d, dtype=view.width)
                start = s.read(jnp.zeros((stack.count, *one.shape), one.dtype) + scale * one)
                found[str(n)] = jax.tree.map(lambda a: a.astype(dtype or view.width), start)
            return found

        filed = lambda scale: {stack.name: stored(stack, scale) for stack in stacks_of(tensors)}
        count = lambda: jnp.int32(0)  # three arrays, which may all be donated
        return cls(filed(1.0), filed(0.0), count(), count(), count(), view, tensors, rule, statistics)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Tensors of equal sides."""
        return stacks_of(self.tensors)

    # -- as a matrix ---------------------------------------------------------------------------------------------------

    def like(self) -> PyTree:
        return self.view.like()

    def groups(self) -> tuple[tuple[Path, ...], ...]:
        """Parameters that share a tensor."""
        return self.view.groups()

    def apply(self, vector: PyTree) -> PyTree:
        """P v, for a vector shaped like the parameters; float64 where one of them is, otherwise float32."""

        def both(side, n, structure, k, X):
            return along(side, n, k, along(side, n, turned(k), X))

        return self._map(vector, both)

    def invert(self, vector: PyTree) -> PyTree:
        """P^-1 v: not free of inverses, and needed by no optimizer."""

        def inverse(side, n, structure, k, X):
            if structure.is_vector:
                return along(side, n, 1.0 / jnp.square(k), X)
            return along(side, n, stacks.inverse(k @ turned(k), jnp.zeros(len(k), k.dtype)), X)

        return self._map(vector, inverse)

    def _map(self, vector: PyTree, function: Callable[..., jax.Array]) -> PyTree:
        """A vector with `function(side, its number, structure, K, X)` applied along every side."""
        arrays, found = self.view.read(trees.wide(vector)), {}
        with trees.exact():
            for stack in self.stacks:
                K = stack.matrices(self.factors[stack.name], self.view.width)
                X = stack.read(arrays)[None]
                for n, (side, structure, k) in enumerate(zip(sides_of(stack), stack.structures, K, strict=True)):
                    X = function(side, n, structure, k, X)
                found |= stack.write(X[0])
        return self.view.write(found)

    def as_matrix(self) -> jax.Array:
        """P as a dense (n, n) matrix in `ravel_pytree(params)` order. Tests and small problems only."""
        return as_matrix(self.apply, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.like()))

    def telemetry(self) -> dict[str, jax.Array]:
        """Counts."""
        return {"updates": self.updates, "skipped": self.skipped, "failures": self.failures}

    # -- inside --------------------------------------------------------------------------------------------------------

    def moved(
        self, T: Callable[[Stack, list[jax.Array]], list[jax.Array]], usable: jax.Array, key: jax.Array
    ) -> "InverseFreeFactors":
        """The factors after a step.

        Args:
          T: for a stack and its K, the statistics in their coordinates.
          usable: whether these say anything; if not, nothing moves.
          key: for rounding.
        """
        factors, momenta, failures = {}, {}, self.failures
        with trees.exact():
            for i, stack in enumerate(self.stacks):
                old = self.factors[stack.name], self.momenta[stack.name]
                dtype = jax.tree.leaves(old)[0].dtype
                K = stack.matrices(old[0], self.view.width)
                *new, fine = advance(self.rule, stack, K, old[1], T(stack, K), dtype, jax.random.fold_in(key, i))
                take = fine & usable
                pick = lambda a, b, take=take: jnp.where(take.reshape(-1, *(1,) * (a.ndim - 1)), a, b)
                factors[stack.name], momenta[stack.name] = jax.tree.map(pick, tuple(new), old)
                failures += jnp.sum(usable & ~fine, dtype=jnp.int32)
        return dataclasses.replace(
            self,
            factors=factors,
            momenta=momenta,
            updates=self.updates + 1,
            skipped=self.skipped + jnp.asarray(~usable, jnp.int32),
            failures=failures,
        )

    def partition_specs(self, mesh: jax.sharding.Mesh | None) -> "InverseFreeFactors":
        """A `PartitionSpec` for every array: split over as much of the mesh as divides its tensors, or else rows."""
        shape = {} if mesh is None else mesh.shape
        specs = jax.tree.map(lambda _: PartitionSpec(), self)
        spread = lambda tree: jax.tree.map(lambda a: spread_spec(shape, a.shape), tree)
        return dataclasses.replace(specs, factors=spread(self.factors), momenta=spread(self.momenta))

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(tensor, its sides, their structures, bytes of its factors and momenta), for a table."""
        found = []
        for stack in self.stacks:
            leaves = jax.tree.leaves((self.factors[stack.name], self.momenta[stack.name]))
            each = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) // stack.count
            for tensor in stack.tensors:
                sides = " x ".join(map(str, tensor.sides))
                sides = sides if tensor.copies == 1 else f"{tensor.copies} x ({sides})"
                found.append((tensor.name, sides, described(tensor.structures), f"{tensor.copies * each:,}"))
        return found


def described(structures: tuple[Structure, ...]) -> str:
    """The names of structures; one, where all are equal."""
    names = [structure.name for structure in structures]
    return names[0] if len(set(names)) == 1 else ", ".join(names)
