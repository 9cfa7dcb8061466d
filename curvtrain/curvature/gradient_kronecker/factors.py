"""The covariance of the gradient, C ~ E[g g^T]: a Kronecker product in an eigenbasis for every matrix.

| symbol | shape | meaning |
|---|---|---|
| G | (K, d_i, d_o) | the gradient of a parameter, as K matrices |
| A, B | (K, d_i, d_i), (K, d_o, d_o) | its two factors; those of about one size D are in one array of slots (L, D, D) |
| Q_A, Q_B | | orthogonal matrices, near the eigenvectors of A and B: columns |
| alpha, beta | (K, d_i), (K, d_o) | diag(Q_A^T A Q_A), diag(Q_B^T B Q_B) |
| V | (K, d_i, d_o) | second moments of the gradient in the basis, averages of (Q_A^T G Q_B)^2 |

    C v = Q_A [Gamma * (Q_A^T M Q_B)] Q_B^T     with the eigenvalues Gamma
    ema, product      alpha beta^T / tr A       A, B averages of G G^T and G^T G: Gupta et al. 2018, arXiv 1802.09568;
                                                the trace: Morwani et al. 2024, arXiv 2406.17748
    kl, product       alpha beta^T              the maximum likelihood of a matrix Gaussian, arXiv 2509.03378
    corrected         V                         with factors of either fit: SOAP, Vyas et al. 2024, arXiv 2409.11321

A side without a factor has the identity for a basis, and 1 for its eigenvalues; under "ema" the other side's are then
divided by its length. Parameters that are no matrices have a diagonal of second moments.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain import _checks
from curvtrain.curvature import owners, trees
from curvtrain.curvature.base import Curvature
from curvtrain.curvature.gradient_kronecker.views import Views
from curvtrain.curvature.mesh import everywhere
from curvtrain.curvature.owners import Layout
from curvtrain.objective import Path

PyTree = Any
Arrays = dict[str, jax.Array]
Function = Callable[[jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientFactors(Curvature):
    """The covariance of the gradient, of one block for every parameter.

    Attributes:
      factors: for each size D, all factors of about that size, (L, D, D). Which slot is whose says `layout`.
      values: for each size, alpha or beta, (L, D); with "corrected" and "ema" those of the last refresh.
      vectors: for each size, Q_A or Q_B, (L, D, D).
      scales: "corrected": for each matrix, V (K, d_i, d_o).
      diagonals: for each parameter that is no matrix, its second moments.
      weight: what the averages of "ema" factors have seen, a sum of powers of the decay.
      scale_weight: the same for `scales` and `diagonals`.
      updates, refreshes: so far; a refresh before the first update does not count.
      failures: factors whose new basis was not finite; the last good one was kept.
      skipped: updates with gradients that were not finite; nothing was absorbed.
      views: how parameters are matrices.
      layout: which slot is whose.
      fit: "ema" or "kl".
      eigenvalues: "product" or "corrected".
      decay: of the averages.
    """

    factors: Arrays
    values: Arrays
    vectors: Arrays
    scales: Mapping[str, jax.Array]
    diagonals: Arrays
    weight: jax.Array
    scale_weight: jax.Array
    updates: jax.Array
    refreshes: jax.Array
    failures: jax.Array
    skipped: jax.Array
    views: Views = dataclasses.field(metadata=dict(static=True))
    layout: Layout = dataclasses.field(metadata=dict(static=True))
    fit: str = dataclasses.field(metadata=dict(static=True))
    eigenvalues: str = dataclasses.field(metadata=dict(static=True))
    decay: float = dataclasses.field(metadata=dict(static=True))

    @property
    def slots(self) -> int:
        """Number of owners that share the matrices."""
        return self.layout.owners

    @property
    def begun(self) -> jax.Array:
        """Says whether there was any gradient, bool (): before that C is zero."""
        return self.updates > 0

    # -- as a matrix ---------------------------------------------------------------------------------------------------

    def like(self) -> PyTree:
        return self.views.like()

    def groups(self) -> tuple[tuple[Path, ...], ...]:
        """Each parameter by itself."""
        return tuple((path,) for path in self.views.paths)

    def map(self, vector: PyTree, function: Function, relative: jax.Array | float = 0.0) -> PyTree:
        """f(C) v, for a function of arrays of eigenvalues, elementwise.

        `relative` is a damping: this share of the mean of a matrix's eigenvalues is added to each of them.
        """
        matrices, diagonals = self.views.read(trees.wide(vector))
        damped = not _checks.is_off(relative)

        def inside(QA, QB, M, Gamma):
            if damped:
                Gamma = Gamma + relative * jnp.mean(Gamma, axis=(-2, -1), keepdims=True)
            return rotated(QA, function(Gamma) * rotated(QA, M, QB, back=True), QB)

        with trees.exact():
            found = self._by_matrix(inside, matrices) if matrices else {}
        return self.views.write(found, {name: function(self.diagonals[name]) * v for name, v in diagonals.items()})

    def matvec(self, vector: PyTree) -> PyTree:
        """C v."""
        return self.map(vector, lambda Gamma: Gamma)

    def solve(self, vector: PyTree, damping: jax.Array | float) -> PyTree:
        """(C + damping I)^-1 v."""
        return self.power(vector, damping, -1)

    def power(self, vector: PyTree, damping: jax.Array | float, exponent: jax.Array | float) -> PyTree:
        """(C + damping I)^exponent v."""
        damping = jnp.asarray(damping, self.weight.dtype)
        return self.map(vector, lambda Gamma: (Gamma + damping) ** exponent)

    def diagonal(self) -> PyTree:
        """diag(C), like the parameters."""
        of = lambda QA, QB, _, Gamma: rotated(jnp.square(QA), Gamma, jnp.square(QB))
        with trees.exact():
            found = self._by_matrix(of, self._zeros()) if self.layout.matrices else {}
        return self.views.write(found, self.diagonals)

    def logdet(self, damping: jax.Array | float) -> jax.Array:
        """log det(C + damping I)."""
        damping = jnp.asarray(damping, self.weight.dtype)
        log = lambda Gamma: jnp.log(Gamma + damping)
        found = self._by_matrix(lambda QA, QB, M, Gamma: log(Gamma), self._zeros()) if self.layout.matrices else {}
        parts = [jnp.sum(X) for X in found.values()] + [jnp.sum(log(V)) for V in self.diagonals.values()]
        return sum(parts, jnp.zeros((), self.weight.dtype))

    def telemetry(self) -> dict[str, jax.Array]:
        """Largest and mean trace of a factor, and counts."""
        traces = everywhere({size: jnp.trace(X, axis1=-2, axis2=-1) for size, X in self.factors.items()})
        traces = [self.layout.of_size(size).take(trace) for size, trace in traces.items()]
        joined = jnp.concatenate(traces) if traces else jnp.zeros(1, self.weight.dtype)
        return {
            "factor_trace_max": jnp.max(joined),
            "factor_trace_mean": jnp.mean(joined),
            "refreshes": self.refreshes,
            "failures": self.failures,
            "skipped": self.skipped,
        }

    # -- inside --------------------------------------------------------------------------------------------------------

    def _zeros(self) -> Arrays:
        return {m.name: jnp.zeros((m.copies, m.d_i, m.d_o), self.weight.dtype) for m in self.layout.matrices}

    def _by_matrix(self, function: Callable[..., jax.Array], Ms: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        """{name: function(Q_A, Q_B, M, Gamma)} of all matrices."""
        if self.eigenvalues == "corrected":
            found = owners.by_shape(function, self.layout, (self.vectors,), (Ms, self.scales))
        else:

            def of_product(QA, QB, alpha, beta, M):
                return function(QA, QB, M, self._product(alpha, beta, M))

            found = owners.by_shape(of_product, self.layout, (self.vectors, self.values), (Ms,))
        return owners.to_parameters(found)

    def _product(self, alpha: jax.Array, beta: jax.Array, M: jax.Array) -> jax.Array:
        """Gamma (k, d_i, d_o) for "product"."""
        _, d_i, d_o = M.shape
        left, right = alpha.shape[-1] == d_i, beta.shape[-1] == d_o
        if self.fit == "ema":
            if left and right:
                trace = jnp.sum(alpha, axis=-1, keepdims=True)
                alpha = alpha / jnp.where(trace > 0, trace, 1)
            else:
                alpha, beta = alpha / d_o, beta / d_i  # of the two, one is used
        alpha, beta = (x if used else jnp.ones_like(x) for x, used in ((alpha, left), (beta, right)))
        return jnp.broadcast_to(alpha[:, :, None] * beta[:, None, :], M.shape)


def rotated(QA: jax.Array, M: jax.Array, QB: jax.Array, back: bool = False) -> jax.Array:
    """Q_A M Q_B^T, or back, Q_A^T M Q_B; sides that Q_A or Q_B do not fit have no factor, and stay."""
    if QA.shape[-1] == M.shape[-2]:
        M = (jnp.swapaxes(QA, -1, -2) if back else QA) @ M
    if QB.shape[-1] == M.shape[-1]:
        M = M @ (QB if back else jnp.swapaxes(QB, -1, -2))
    return M
