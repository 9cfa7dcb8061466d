"""Dense PSGD: one n x n factor Q over all parameters as one vector, for small problems. Symbols as in `base.py`.

PRO, QUAD, QEQ   T1 = y y^T,  y = P h       T2 = v v^T,            whitening I
QEP              T1 = z z^T,  z = Q P h     T2 = (Q v) (Q v)^T,    whitening Q Q^T
EQ               T1 = a a^T,  a = Q h       T2 = b b^T, b = Q^-T v,  whitening Q^-T Q^-1
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.sharding import PartitionSpec

from curvtrain import _checks
from curvtrain.curvature.mesh import axes_for, spec_for
from curvtrain.curvature.psgd.base import MatrixPreconditioner, accept, choose, initial_scale
from curvtrain.curvature.psgd.geometry import GEOMETRIES, step_dense

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Dense(MatrixPreconditioner):
    """P of all parameters at once: n^2 numbers and, in most geometries, O(n^3) work per step.

    Attributes:
      geometry: "PRO" (Q0.5EQ1.5), "QUAD", "EQ" (triangular solves), "QEQ" or "QEP"; see `geometry.py`.
      max_size: more parameters than this raise an error.
    """

    geometry: str = "PRO"
    _: dataclasses.KW_ONLY
    max_size: int = 4096

    def __post_init__(self):
        super().__post_init__()
        _checks.one_of("Dense(geometry)", self.geometry, GEOMETRIES)
        _checks.positive_int("Dense(max_size)", self.max_size)

    def mixes(self):
        return True

    def init(self, structure):
        n = structure.size
        if n > self.max_size:
            raise ValueError(
                f"Dense(max_size={self.max_size}): Q of {n:,} parameters would be {n:,} x {n:,}, "
                f"{4 * n * n:,} bytes, and a step makes several such matrices. Use Kron(), or raise max_size."
            )
        start = math.sqrt(1.0 if self.initial_scale is None else self.initial_scale)
        return {
            "Q": start * jnp.eye(n, dtype=structure.dtype),
            "L": jnp.zeros((), structure.dtype),
            "seen": jnp.bool_(False),
        }

    def fit(self, structure, state, v, h, key, rate):
        noisy = self.floored(structure, key, h, v is None)
        exact, h = (jax.vmap(structure.ravel)(tree) for tree in (h, noisy))
        v = None if v is None else jax.vmap(structure.ravel)(v)
        Q = state["Q"]
        if self.initial_scale is None:
            Q = Q * jnp.where(state["seen"], 1.0, jnp.sqrt(initial_scale(v, exact)))
        with jax.default_matmul_precision(self.precision):
            T1, T2 = self._sides(Q, v, h)
            Q, L = step_dense(self.geometry, Q, T1, T2, rate, state["L"], self.lipschitz_decay)
        new = {"Q": Q, "L": L, "seen": jnp.bool_(True)}
        accepted, failed = accept(exact, new)
        return choose(accepted, new, state), failed.astype(jnp.int32)

    def _sides(self, Q: jax.Array, v: jax.Array | None, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """T1, T2 (n, n) of rows v, h (k, n)."""
        moment = lambda rows: rows.T @ rows / len(rows)
        a = h @ Q.T  # Q h
        if self.geometry == "EQ":
            if v is None:
                inverse = solve_triangular(Q, jnp.eye(len(Q), dtype=Q.dtype))
                return moment(a), inverse.T @ inverse
            return moment(a), moment(solve_triangular(Q, v.T, trans="T").T)
        y = a @ Q  # P h
        if self.geometry == "QEP":
            return moment(y @ Q.T), Q @ Q.T if v is None else moment(v @ Q.T)
        return moment(y), jnp.eye(len(Q), dtype=Q.dtype) if v is None else moment(v)

    def apply(self, structure, state, vector):
        with jax.default_matmul_precision(self.precision):
            return structure.unravel(state["Q"].T @ (state["Q"] @ structure.ravel(vector)))

    def invert(self, structure, state, vector):
        Q, x = state["Q"], structure.ravel(vector)
        with jax.default_matmul_precision(self.precision):
            if self.geometry == "EQ":
                return structure.unravel(solve_triangular(Q, solve_triangular(Q, x, trans="T")))
            return structure.unravel(jnp.linalg.solve(Q, jnp.linalg.solve(Q.T, x)))

    def partition_specs(self, structure, state, param_specs, mesh):
        rows = spec_for(axes_for(mesh.shape, len(state["Q"])))
        return {"Q": rows, "L": PartitionSpec(), "seen": PartitionSpec()}

    def blocks(self, structure):
        what = f"Dense {self.geometry}, {structure.size} x {structure.size}"
        return [(name, what, size) for name, _, size in super().blocks(structure)]
