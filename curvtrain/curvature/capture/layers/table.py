"""The block of a table of embeddings: for row v, C_v = c_v G + h_v H.

| symbol | shape | meaning |
|---|---|---|
| c, `counts` | (n, V) | the share of token v among the rows that were looked up |
| G | (n, D, D) | second moments of the cotangents of what was looked up |
| H, `A_head` | (n, D, D) | second moments of the queries of `attend`; zero without it |
| h, `G_head` | (n, V) | second moments of the cotangents of its outputs |

Without `attend`, G's eigenbasis is that of all rows. A table that is used both ways (tied) has no common eigenbasis:
`solve` runs conjugate gradients started from a compromise, and `apply` and `logdet` factorise each row's matrix, which
takes V D^3 operations.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from curvtrain._dtypes import wide, width
from curvtrain.curvature import trees
from curvtrain.curvature.capture.layers.blocks import Arrays, OwnBlock, Shapes
from curvtrain.curvature.capture.layers.rows import second_moment, second_moment_diagonal, shared, total_weight

_CG_TOLERANCE = {4: 1e-6, 8: 1e-12}  # by the bytes of a number
_CG_STEPS = 100


@dataclasses.dataclass(frozen=True)
class TableBlock(OwnBlock):
    """The block of an embedding.

    Attributes:
      V: rows of the table.
      D: features.
    """

    V: int
    D: int

    spread: ClassVar[bool] = False

    @property
    def key(self):
        return f"table {self.V}x{self.D}"

    def shapes(self, layer, options) -> Shapes:
        V, D = (1, self.V), (1, self.D) if options.diagonal else (1, self.D, self.D)
        return {"counts": V, "G": D, "rows": (1,), "A_head": D, "G_head": V, "head_rows": (1,)}

    def measure(self, layer, backward, options):
        sums = {name: jnp.zeros(shape, width(backward.s)) for name, shape in self.shapes(layer, options).items()}
        second = second_moment_diagonal if options.diagonal else second_moment
        if backward.use == "attend":
            products = layer.gradients(backward)  # rows are the cotangents of its outputs, columns the queries
            flipped = dataclasses.replace(products, a=products.s, s=backward.corrected(products.a))
            a, s, w = shared(flipped, backward, options.weight_sharing)
            rows = jnp.broadcast_to(total_weight(a, w), 1)
            return sums | {"A_head": second(a, w), "G_head": second_moment_diagonal(s, None), "head_rows": rows}
        index = backward.saved.reshape(backward.examples, -1)
        if options.weight_sharing == "reduce" and index.shape[1] > 1:
            raise ValueError(
                f"weight_sharing='reduce' needs one token per example, but {layer.kind} {layer.name!r} looks up "
                f"{index.shape[1]}. Use 'expand', or treat it as plain (plain={layer.name!r})."
            )
        s = backward.corrected(wide(backward.s).reshape(1, backward.examples, -1, self.D))
        w = backward.row_weights(index.shape[1], s)
        counts = jnp.zeros((1, self.V), s.dtype if w is None else w.dtype).at[0, index].add(1.0 if w is None else w)
        return sums | {"counts": counts, "G": second(s, None), "rows": jnp.sum(counts, axis=1)}

    def diagonal_of(self, means):
        return (
            means["counts"][:, :, None] * means["G"][:, None] + means["G_head"][:, :, None] * means["A_head"][:, None]
        )

    def kind(self, layer):
        return "diagonal x dense"

    # -- as it is stored -----------------------------------------------------------------------------------------------

    def stored(self, copies, d_o) -> Shapes:
        V, D = (copies, self.V), (copies, self.D, self.D)
        return {"counts": V, "G": D, "A_head": D, "G_head": V}

    def basis_shapes(self, stored) -> Shapes:
        square = stored["G"]
        return {"Q": square, "G": square[:-1], "A_head": square[:-1]}

    def entries(self, M):
        return M

    def from_entries(self, x, copies):
        return x

    def to_factorise(self, means):
        """The matrix whose eigenvectors are the basis: of a tied table, a compromise between its two."""
        tied = jnp.any(means["G_head"] > 0, axis=1)[:, None, None]
        return _unit_trace(means["G"]) + jnp.where(tied, _unit_trace(means["A_head"]), 0.0)

    def basis(self, means, vectors):
        diagonal = lambda X: jnp.maximum(jnp.einsum("kij,kij->kj", vectors, X @ vectors), 0.0)
        return {"Q": vectors, "G": diagonal(means["G"]), "A_head": diagonal(means["A_head"])}

    def matvec(self, means, x):
        return means["counts"][..., None] * (x @ means["G"]) + means["G_head"][..., None] * (x @ means["A_head"])

    def apply(self, means, basis, x, function):
        def row_by_row(x):
            def one(row):
                values, Q = jnp.linalg.eigh(row[0], symmetrize_input=False)
                return Q @ (function(jnp.maximum(values, 0.0)) * (row[1] @ Q))

            return jax.lax.map(one, (self._rows(means), x.reshape(-1, self.D))).reshape(x.shape)

        return jax.lax.cond(_is_tied(means), row_by_row, lambda x: self._in_basis(means, basis, x, function), x)

    def solve(self, means, basis, x, damping):
        inverse = lambda x: self._in_basis(means, basis, x, lambda value: 1.0 / (value + damping))

        def tied(x):
            product = lambda x: self.matvec(means, x) + damping * x
            cg = jax.scipy.sparse.linalg.cg
            return cg(product, x, x0=inverse(x), tol=_CG_TOLERANCE[x.dtype.itemsize], maxiter=_CG_STEPS, M=inverse)[0]

        return jax.lax.cond(_is_tied(means), tied, inverse, x)

    def diagonal(self, means):
        of = lambda X: jnp.diagonal(X, axis1=1, axis2=2)[:, None]
        return means["counts"][..., None] * of(means["G"]) + means["G_head"][..., None] * of(means["A_head"])

    def logdet(self, means, basis, damping):
        def row_by_row():
            one = lambda row: jnp.linalg.slogdet(row + damping * jnp.eye(self.D, dtype=row.dtype))[1]
            return jnp.sum(jax.lax.map(one, self._rows(means)))

        in_basis = lambda: jnp.sum(jnp.log(jnp.abs(self._values(means, basis) + damping)))
        with trees.exact():
            return jax.lax.cond(_is_tied(means), row_by_row, in_basis)

    def _rows(self, means: Arrays) -> jax.Array:
        """Each row's matrix: (n V, D, D)."""
        wide = lambda v: v[:, :, None, None]
        rows = wide(means["counts"]) * means["G"][:, None] + wide(means["G_head"]) * means["A_head"][:, None]
        return rows.reshape(-1, self.D, self.D)

    def _values(self, means: Arrays, basis: Arrays) -> jax.Array:
        """What the basis makes of the eigenvalues: exact unless the table is tied."""
        head = means["G_head"][..., None] * basis["A_head"][:, None]
        return means["counts"][..., None] * basis["G"][:, None] + head

    def _in_basis(self, means, basis, x, function):
        return (function(self._values(means, basis)) * (x @ basis["Q"])) @ jnp.swapaxes(basis["Q"], 1, 2)


def _is_tied(means: Arrays) -> jax.Array:
    return jnp.any(means["G_head"] > 0)


def _unit_trace(X: jax.Array) -> jax.Array:
    trace = jnp.trace(X, axis1=-2, axis2=-1)[:, None, None]
    return X / jnp.where(trace > 0, trace, 1.0)
