"""Eigenpairs of the curvature, C = V^T diag(lambda) V: what Lanczos estimates and FOSI consumes.

Symbols: k + l pairs, values lambda (k + l,), vectors V with rows v_i of unit norm, shaped (k + l, *param.shape).
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp

from curvtrain.curvature import trees
from curvtrain.curvature.base import Curvature

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Eigenpairs(Curvature):
    """Extreme eigenpairs with their residuals.

    As a matrix it is C = sum_i lambda_i v_i v_i^T over the converged pairs, signs included, and zero elsewhere. C has
    low rank, so C + damping I is invertible only for a damping that is not zero, and `solve`, `power` and `logdet` take
    a positive one. A damping whose value is known and not positive raises ValueError, be it a number or an array; one
    that is traced makes the result NaN.

    Floating-point arrays are float64 where a parameter is, float32 otherwise.

    Attributes:
      values: (k + l,): the k largest, descending, then the l smallest, ascending (with `select="magnitude"`:
        by descending magnitude). Zeros before the first refresh.
      vectors: pytree like the parameters, every leaf (k + l, *param.shape).
      residuals: (k + l,): |C v_i - lambda_i v_i|; inf before the first refresh.
      converged: bool (k + l,): whether the residual is small enough for the pair to be used; other pairs are ignored
        by every operation. Unless given, residual <= 0.1 |value|, as `Lanczos` has it by default.
      refreshes: int32 (): refreshes so far.
      products: int32 (): curvature-vector products that the last refresh spent.
      failures: int32 (): refreshes that came out non-finite; the last good pairs were kept.
    """

    values: jax.Array
    vectors: PyTree
    residuals: jax.Array
    converged: jax.Array = dataclasses.field(default_factory=lambda: cast(jax.Array, None))
    refreshes: jax.Array = dataclasses.field(default_factory=lambda: jnp.int32(0))
    products: jax.Array = dataclasses.field(default_factory=lambda: jnp.int32(0))
    failures: jax.Array = dataclasses.field(default_factory=lambda: jnp.int32(0))

    def __post_init__(self):
        # trees of this class also hold shapes, shardings and sentinels, which are left as they are
        if self.converged is None and isinstance(self.residuals, jax.Array):
            object.__setattr__(self, "converged", self.residuals <= 0.1 * jnp.abs(self.values))

    def like(self) -> PyTree:
        return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), self.vectors)

    def coefficients(self, vector: PyTree) -> jax.Array:
        """V v, zero for the pairs that have not converged: (k + l,)."""
        return jnp.where(self.converged, trees.coefficients(self.vectors, vector), 0.0)

    def combine(self, coefficients: jax.Array) -> PyTree:
        """V^T c: a vector like the parameters."""
        return trees.combine(coefficients, self.vectors)

    def matvec(self, vector: PyTree) -> PyTree:
        """C v = V^T diag(lambda) V v."""
        return self.combine(self.values * self.coefficients(vector))

    def solve(self, vector: PyTree, damping: jax.Array | float) -> PyTree:
        """(C + damping I)^-1 v = v / damping + V^T ((lambda + damping)^-1 - damping^-1) V v.

        Along an eigenvector it is 1 / (lambda + damping), whatever the sign. Raises ValueError unless damping > 0.
        """
        damping = self._positive("solve", damping)
        inverse = 1.0 / (self.values + damping) - 1.0 / damping
        inside = self.combine(jnp.where(self.converged, inverse, 0.0) * self.coefficients(vector))
        return trees.add(trees.scale(1.0 / damping, trees.wide(vector)), inside)

    def power(self, vector: PyTree, damping: jax.Array | float, exponent: jax.Array | float) -> PyTree:
        """(C + damping I)^exponent v: damping^exponent v outside the eigenvectors.

        It is NaN where lambda + damping is negative and the exponent no integer. Raises ValueError unless damping > 0.
        """
        damping = self._positive("power", damping)
        outside = damping**exponent
        inside = (self.values + damping) ** exponent - outside
        inside = self.combine(jnp.where(self.converged, inside, 0.0) * self.coefficients(vector))
        return trees.add(trees.scale(outside, trees.wide(vector)), inside)

    def as_matrix(self) -> jax.Array:
        V = trees.matrix(self.vectors)
        with trees.exact():
            return (V * jnp.where(self.converged, self.values, 0.0)[:, None]).T @ V

    def diagonal(self) -> PyTree:
        values = jnp.where(self.converged, self.values, 0.0)
        return jax.tree.map(lambda v: jnp.tensordot(values, jnp.square(v), axes=1), self.vectors)

    def logdet(self, damping: jax.Array | float) -> jax.Array:
        """log |det(C + damping I)|: n log(damping), corrected for the pairs. Raises ValueError unless damping > 0."""
        damping = self._positive("logdet", damping)
        inside = jnp.where(self.converged, jnp.log(jnp.abs(self.values + damping)) - jnp.log(damping), 0.0)
        return trees.size(self.like()) * jnp.log(damping) + jnp.sum(inside)

    def telemetry(self) -> dict[str, jax.Array]:
        """Largest and smallest value, worst relative residual of the used pairs, how many are used, products spent."""
        used = self.converged
        relative = self.residuals / jnp.maximum(jnp.abs(self.values), jnp.finfo(self.values.dtype).tiny)
        return {
            "eigenvalue_max": jnp.max(jnp.where(used, self.values, -jnp.inf), initial=-jnp.inf, where=used),
            "eigenvalue_min": jnp.min(self.values, initial=jnp.inf, where=used),
            "residual_max": jnp.max(relative, initial=0.0, where=used),
            "eigenpairs": jnp.sum(used, dtype=jnp.int32),
            "products": self.products,
            "failures": self.failures,
        }

    def _positive(self, method: str, damping: jax.Array | float) -> jax.Array:
        """The damping in the values' dtype, NaN if it is not positive. Raises ValueError if that is known already."""
        try:
            refused = bool(jnp.asarray(damping) <= 0)
        except jax.errors.ConcretizationTypeError:
            refused = False
        if refused:
            raise ValueError(f"Eigenpairs.{method}(damping) should be positive (C has low rank), not {damping}.")
        damping = jnp.asarray(damping, self.values.dtype)
        return jnp.where(damping > 0, damping, jnp.nan)
