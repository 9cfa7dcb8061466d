"""Kronecker-factored curvature: C = A (x) G for every layer's matrix, exact small blocks for everything else.

Symbols as in `capture/layers/__init__.py`, and:

| symbol | shape | meaning |
|---|---|---|
| A, G | (K, d_i, d_i), (K, d_o, d_o) | factors; those of one size D, or almost, live in one stack (slots, D, D) |
| lambda | () | damping |
| pi | (K,) | sqrt((tr A / d_i) / (tr G / d_o)): how the damping is split over the factors |
| Q_A, alpha, Q_G, gamma | | eigenvectors and eigenvalues of A and G |
| S | (K, d_i, d_o) | EKFAC: second moments of the gradient in the basis Q_A (x) Q_G |

    cholesky   (A + pi sqrt(lambda) I)^-1 M (G + sqrt(lambda) / pi I)^-1           Martens, Grosse 2015, section 6.3
    eigh       Q_A [(Q_A^T M Q_G) / (alpha gamma^T + lambda)] Q_G^T                 the exact (A (x) G + lambda I)^-1
    ekfac      the same with S in place of alpha gamma^T                            George et al. 2018, eq. 10

Blocks of other layers, each exact for any damping:

* embedding: row v of the table has c_v G + h_v H, c the share of token v, H and h the factors of `attend` (zero without
  it).
* norm layer: p x p for every channel. Plain parameter: its diagonal.

Stacks, and what is done with them, are split over devices by `owners.py`; other blocks are not.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain.curvature import stacks, trees
from curvtrain.curvature.base import Curvature
from curvtrain.curvature.capture import Coverage, EmbedLayer, NormLayer, PlainParameter
from curvtrain.curvature.capture.layers import Layer, MatrixLayer
from curvtrain.curvature.kfac import owners
from curvtrain.curvature.kfac.owners import Layout, layout_of, matrices_of
from curvtrain.curvature.kfac.stale import Staleness
from curvtrain.curvature.mesh import everywhere
from curvtrain.curvature.products import as_matrix

PyTree = Any
Arrays = dict[str, jax.Array]

INVERSES = ("cholesky", "eigh", "ekfac")
_CG_TOLERANCE = 1e-6
_CG_STEPS = 100


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerFactors(Curvature):
    """Kronecker factors of every layer, with what has been factorised of them.

    Attributes:
      factors: for each size D, all factors of about that size, (slots, D, D); moving averages. Which slot is whose
        says `layout`; what is nobody's is zero.
      embeddings: for each embedding, counts (K, V), G (K, D, D), A_head (K, D, D), G_head (K, V).
      norms: for each norm layer, (K * C, p, p).
      plain: for each plain parameter, its diagonal, like the parameter's vector (size,).
      weight: what the moving averages have seen, sum of powers of the decay.
      inverses: "cholesky": for each size, (slots, D, D) damped inverses.
      vectors, values: "eigh" and "ekfac": eigenvectors (slots, D, D) as columns and eigenvalues (slots, D).
      bases: for each embedding, eigenvectors (K, D, D) of its rows' matrix, and the diagonals (K, D) of G and A_head.
      scales: "ekfac": for each matrix, S (K, d_i, d_o).
      scale_weight: as `weight`, for S in the present basis.
      stale: what is remembered of each factor where each has an interval of its own between refreshes.
      damping: that the inverses were made for; NaN before the first refresh.
      updates, refreshes: so far.
      failures: factors and embeddings whose factorisation was not finite; the last good one was kept.
      skipped: updates with statistics that were not finite, or of no example; nothing was absorbed.
      slots: of how many owners stacks are; see `owners.py`.
    """

    factors: Arrays
    embeddings: dict[str, Arrays]
    norms: Arrays
    plain: Arrays
    weight: jax.Array
    inverses: Arrays
    vectors: Arrays
    values: Arrays
    bases: dict[str, Arrays]
    scales: Mapping[str, jax.Array]
    scale_weight: jax.Array
    stale: Staleness
    damping: jax.Array
    updates: jax.Array
    refreshes: jax.Array
    failures: jax.Array
    skipped: jax.Array
    coverage: Coverage = dataclasses.field(metadata=dict(static=True))
    inverse: str = dataclasses.field(metadata=dict(static=True))
    slots: int = dataclasses.field(default=1, metadata=dict(static=True))

    # -- factors -------------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """Which slot is whose."""
        return layout_of(self.coverage, self.slots)

    def pair(self, stacks: Arrays, name: str) -> tuple[jax.Array, jax.Array]:
        """(A's part, G's part) of a dictionary of stacks, for one matrix."""
        layer = next(layer for layer in matrices_of(self.coverage) if layer.name == name)
        a, i, g, j = dict(self.layout.at)[name]
        take = lambda size, start, d: owners.inside(self.layout.stack(size).take(stacks[size], start, layer.copies), d)
        return take(a, i, layer.d_i), take(g, j, layer.d_o)

    def pis(self) -> dict[str, jax.Array]:
        """For each matrix pi (K,): 1 where a factor is zero."""
        traces = everywhere({size: jnp.sum(diagonals(X), axis=-1) for size, X in self.factors.items()})
        found = {}
        for layer in matrices_of(self.coverage):
            a, g = (trace / d for trace, d in zip(self.pair(traces, layer.name), (layer.d_i, layer.d_o), strict=True))
            ok = (a > 0) & (g > 0)
            found[layer.name] = jnp.sqrt(jnp.where(ok, a, 1.0) / jnp.where(ok, g, 1.0))
        return found

    def damped_inverses(self, damping: jax.Array | float, due: Arrays | None = None) -> tuple[Arrays, Arrays]:
        """The inverses of all factors with the damping split by pi, stack by stack; or of those that are due.

        Returns (inverses, whether they are finite (slots,)): where one is not finite, or not due, the cached one
        stands.
        """
        root, pis = jnp.sqrt(jnp.float32(damping)), self.pis()
        parts: dict[str, list[jax.Array]] = {size: [] for size in self.factors}
        for name, (a, _, g, _) in self.layout.at:
            parts[a].append(pis[name] * root)
            parts[g].append(root / pis[name])
        shifts = everywhere({size: self.layout.stack(size).place(shift) for size, shift in parts.items()})

        def factorise(given):
            X, shifts, old = ({size: arrays[i] for size, (arrays, _) in given.items()} for i in range(3))
            X = {size: _outside(A, given[size][0][3:], 1.0) for size, A in X.items()}  # an inverse, whatever the shift
            kept = {size: None if due is None else (due, old[size]) for size, (_, due) in given.items()}
            new = stacks.in_turn(lambda size, shift: stacks.inverse(X[size], shift, kept[size]), shifts)
            return keep_finite(new, old, {size: diagonals(X) for size, X in new.items()})

        given = {size: (X, shifts[size], self.inverses[size], *self._rows(size)) for size, X in self.factors.items()}
        return self.spread(factorise, given, due)

    def eigenbases(self, due: Arrays | None = None) -> tuple[dict[str, tuple[jax.Array, jax.Array]], Arrays]:
        """(eigenvalues and eigenvectors of all factors, or of those that are due; which are finite (slots,))."""

        def factorise(given):
            old = {size: arrays[1:3] for size, (arrays, _) in given.items()}
            kept = {size: None if due is None else (due, old[size]) for size, (_, due) in given.items()}
            # eigenvalues below all others, so that their vectors stay apart, and are the first
            X = {size: _outside(arrays[0], arrays[3:], -1.0) for size, (arrays, _) in given.items()}
            found = stacks.in_turn(lambda size, X: _positive(*stacks.eigh(X, kept[size])), X)
            return keep_finite(found, old)

        old = lambda size: (self.values[size], self.vectors[size])
        given = {size: (X, *old(size), *self._rows(size)) for size, X in self.factors.items()}
        return self.spread(factorise, given, due)

    def _rows(self, size: str) -> tuple[jax.Array, ...]:
        """Where factors of a stack are smaller than its slots, which rows are not theirs (slots, D)."""
        outside = self.layout.stack(size).outside
        return () if outside is None else (jnp.asarray(outside),)

    def spread(self, function: Callable[..., Any], given: dict[str, PyTree], due: Arrays | None) -> Any:
        """function({size: (arrays, which are due)}), each device at its share."""
        pairs = {size: (arrays, None if due is None else due[size]) for size, arrays in given.items()}
        return owners.spread(function, self.coverage, self.slots, pairs)

    def by_matrix(
        self, function: Callable[..., jax.Array], stacks: tuple[Arrays, ...], *extras: Mapping[str, jax.Array]
    ) -> Mapping[str, jax.Array]:
        """{name: function(A's part and G's part of each of the stacks, and each of the extras)}, (K, d_i, d_o) each."""
        found = owners.by_shape(function, self.coverage, self.slots, stacks, extras)
        if found is not None:
            return found
        parts = lambda name: (part for stack in stacks for part in self.pair(stack, name))
        names = [layer.name for layer in matrices_of(self.coverage)]
        return {name: function(*parts(name), *(extra[name] for extra in extras)) for name in names}

    def blocks(self, found: Mapping[str, jax.Array]) -> owners.Blocks:
        """Blocks by matrix in stacks."""
        return found if isinstance(found, owners.Blocks) else owners.blocks(self.coverage, self.slots, found)

    # -- as a matrix ---------------------------------------------------------------------------------------------------

    def like(self) -> PyTree:
        return self.coverage.like()

    def groups(self):
        return self.coverage.groups()

    def matvec(self, vector: PyTree) -> PyTree:
        """C v."""

        def matrices(Ms):
            if self.inverse == "ekfac":
                product = lambda QA, QG, M, S: _rotate(QA, S * _rotate(_t(QA), M, QG), _t(QG))
                return self.by_matrix(product, (self.vectors,), Ms, self.scales)
            return self.by_matrix(_between, (self.factors,), Ms)

        def unit(name, x):
            return jnp.einsum("upq,uq->up", self.norms[name], x)

        return self._map(vector, matrices, self._embedding_matvec, unit, lambda d, x: d * x)

    def solve(self, vector: PyTree, damping: jax.Array | float) -> PyTree:
        """(C + damping I)^-1 v; with "cholesky" the factored approximation of it, pi-damped.

        Uses what the last refresh factorised; "cholesky", with another damping than it was made for, factorises again.
        """
        damping = jnp.float32(damping)

        def with_inverses(inverses):
            def matrices(Ms):
                if self.inverse == "cholesky":
                    return self.by_matrix(_between, (inverses,), Ms)
                return self._in_bases(Ms, lambda C: 1.0 / (C + damping))

            return self._map(
                vector,
                matrices,
                functools.partial(self._embedding_solve, damping=damping),
                lambda name, x: _solve_small(self.norms[name], x, damping),
                lambda d, x: x / (d + damping),
            )

        if self.inverse != "cholesky":
            return with_inverses({})
        # the barrier keeps XLA from fusing a refresh in the same program into these products, which are then no longer
        # library calls: a hundred times slower on CPU
        cached = lambda: with_inverses(jax.lax.optimization_barrier(self.inverses))
        return jax.lax.cond(damping == self.damping, cached, lambda: with_inverses(self.damped_inverses(damping)[0]))

    def power(self, vector: PyTree, damping: jax.Array | float, exponent: float) -> PyTree:
        """(C + damping I)^exponent v, with an eigenbasis ("eigh", "ekfac"); of tied embeddings, without cross terms.

        Raises TypeError with inverse="cholesky", unless the exponent is -1.
        """
        if exponent == -1.0:
            return self.solve(vector, damping)
        if self.inverse == "cholesky":
            raise TypeError(
                f"KroneckerFactors of KFAC(inverse='cholesky') have no power {exponent}: build KFAC(inverse='eigh') or "
                f"'ekfac'."
            )
        damping = jnp.float32(damping)
        power = lambda C: (jnp.maximum(C, 0.0) + damping) ** exponent
        matrices = lambda Ms: self._in_bases(Ms, power)

        eigen = stacks.in_turn(lambda _, F: stacks.eigh(F), self.norms)

        def unit(name, x):
            values, Q = eigen[name]
            return jnp.einsum("upq,uq->up", Q, power(values) * jnp.einsum("uqp,uq->up", Q, x))

        return self._map(
            vector, matrices, lambda layer, M: self._embedding_basis(layer, M, power), unit, lambda d, x: power(d) * x
        )

    def as_matrix(self) -> jax.Array:
        return as_matrix(self.matvec, self.coverage.zeros())

    def telemetry(self) -> dict[str, jax.Array]:
        """Largest and mean trace of a factor, counts, and with `stale` the share of factors at the last refresh."""
        traces = everywhere({size: jnp.sum(diagonals(X), axis=-1) for size, X in self.factors.items()})
        traces = [self.layout.stack(size).take(trace) for size, trace in traces.items()]
        traces = jnp.concatenate(traces) if traces else jnp.zeros(1)
        due = everywhere(self.stale.due)
        due = {size: self.layout.stack(size).take(X) for size, X in due.items()}
        return {
            "factor_trace_max": jnp.max(traces),
            "factor_trace_mean": jnp.mean(traces),
            "refreshes": self.refreshes,
            "failures": self.failures,
            "skipped": self.skipped,
        } | ({"refreshed_share": dataclasses.replace(self.stale, due=due).share()} if self.stale.due else {})

    # -- inside --------------------------------------------------------------------------------------------------------

    def _map(self, vector, matrices, embedding, unit, plain):
        """Applies a function to the block of every layer; to those of all matrices at once."""
        given, found = self.coverage.matrices(trees.float32(vector)), {}
        with trees.exact():
            mine = matrices({layer.name: given[layer.name] for layer in matrices_of(self.coverage)})
            mine = owners.to_parameters(mine) if isinstance(mine, owners.Blocks) else mine
            for name, M in given.items():
                layer = next(layer for layer in self.coverage.layers if layer.name == name)
                if isinstance(layer, MatrixLayer):
                    found[name] = mine[name]
                elif isinstance(layer, EmbedLayer):
                    found[name] = embedding(layer, M)
                elif isinstance(layer, NormLayer):
                    found[name] = from_units(unit(name, to_units(M)), M.shape)
                else:
                    assert isinstance(layer, PlainParameter)
                    found[name] = plain(self.plain[name], M)
        return self.coverage.vector(found)

    def _in_bases(self, Ms: Mapping[str, jax.Array], function) -> Mapping[str, jax.Array]:
        """Q_A [function(C) * (Q_A^T M Q_G)] Q_G^T for the eigenvalues C (K, d_i, d_o) of each block."""
        inside = lambda QA, QG, M, C: _rotate(QA, function(C) * _rotate(_t(QA), M, QG), _t(QG))
        if self.inverse == "ekfac":
            return self.by_matrix(inside, (self.vectors,), Ms, self.scales)
        each = lambda QA, QG, alpha, gamma, M: inside(QA, QG, M, alpha[:, :, None] * gamma[:, None, :])
        return self.by_matrix(each, (self.vectors, self.values), Ms)

    def _embedding_matvec(self, layer: Layer, M: jax.Array) -> jax.Array:
        e = self.embeddings[layer.name]
        return e["counts"][..., None] * (M @ e["G"]) + e["G_head"][..., None] * (M @ e["A_head"])

    def _embedding_basis(self, layer: Layer, M: jax.Array, function) -> jax.Array:
        e, b = self.embeddings[layer.name], self.bases[layer.name]
        C = e["counts"][..., None] * b["G"][:, None] + e["G_head"][..., None] * b["A_head"][:, None]
        return (function(C) * (M @ b["Q"])) @ _t(b["Q"])

    def _embedding_solve(self, layer: Layer, M: jax.Array, damping: jax.Array | float) -> jax.Array:
        """Exact in the eigenbasis of G; for a table that `attend` uses too, conjugate gradients started from there."""
        inverse = lambda M: self._embedding_basis(layer, M, lambda C: 1.0 / (C + damping))

        def tied(M):
            product = lambda M: self._embedding_matvec(layer, M) + damping * M
            cg = jax.scipy.sparse.linalg.cg
            return cg(product, M, x0=inverse(M), tol=_CG_TOLERANCE, maxiter=_CG_STEPS, M=inverse)[0]

        return jax.lax.cond(jnp.any(self.embeddings[layer.name]["G_head"] > 0), tied, inverse, M)


def diagonals(X: jax.Array) -> jax.Array:
    """(..., d) of matrices (..., d, d). Those that are sums of v v^T are finite wherever their diagonals are."""
    return jnp.diagonal(X, axis1=-2, axis2=-1)


def _outside(X: jax.Array, rows: tuple[jax.Array, ...], value: float) -> jax.Array:
    """X (slots, D, D) with a value on the diagonal in these rows (slots, D), if there are such."""
    return X if not rows else jnp.where(jnp.eye(X.shape[-1], dtype=bool) & rows[0][:, None], value, X)


def keep_finite(new: PyTree, old: PyTree, shown: PyTree = None) -> tuple[PyTree, Arrays]:
    """(new, but old where its leading axis has an entry that is not finite; by name, which entries are finite).

    Dictionaries by name; the arrays of one name share their leading axis and stand or fall together. `shown` has, by
    name, what shows whether they are finite, if less than all of `new` does.
    """
    kept, finite = {}, {}
    for name, arrays in new.items():
        entries = [jnp.isfinite(a).reshape(len(a), -1).all(1) for a in jax.tree.leaves((shown or new)[name])]
        finite[name] = ok = functools.reduce(jnp.logical_and, entries)
        pick = lambda a, b, ok=ok: jnp.where(ok.reshape(-1, *(1,) * (a.ndim - 1)), a, b)
        kept[name] = jax.tree.map(pick, arrays, old[name])
    return kept, finite


def _positive(values: jax.Array, Q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues of a positive semi-definite matrix, without what rounding made negative."""
    return jnp.maximum(values, 0.0), Q


def to_units(M: jax.Array) -> jax.Array:
    """(K, p, C) as (K * C, p): one row for every channel."""
    return jnp.moveaxis(M, 1, 2).reshape(-1, M.shape[1])


def from_units(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `to_units`."""
    K, p, C = shape
    return jnp.moveaxis(x.reshape(K, C, p), 2, 1)


def _t(Q: jax.Array) -> jax.Array:
    return jnp.swapaxes(Q, -1, -2)


def _rotate(left: jax.Array, M: jax.Array, right: jax.Array) -> jax.Array:
    return left @ M @ right


def _between(A: jax.Array, G: jax.Array, M: jax.Array) -> jax.Array:
    return _rotate(A, M, G)


def _solve_small(block: jax.Array, x: jax.Array, damping: jax.Array | float) -> jax.Array:
    """(block + damping I)^-1 x for 1 x 1 and 2 x 2 blocks (u, p, p), in closed form."""
    if block.shape[-1] == 1:
        return x / (block[:, :, 0] + damping)
    a, b, d = block[:, 0, 0] + damping, block[:, 0, 1], block[:, 1, 1] + damping
    det = a * d - b * b
    return jnp.stack([d * x[:, 0] - b * x[:, 1], a * x[:, 1] - b * x[:, 0]], axis=1) / det[:, None]
