"""Kronecker-factored curvature: C = A (x) G for every layer's matrix, exact small blocks for everything else.

Symbols as in `capture/layers/__init__.py`, and:

| symbol | shape | meaning |
|---|---|---|
| A, G | (K, d_i, d_i), (K, d_o, d_o) | factors; those of about one size D are in one array of slots (L, D, D) |
| lambda | () | damping |
| pi | (K,) | sqrt((tr A / d_i) / (tr G / d_o)): how the damping is split over the factors |
| Q_A, alpha, Q_G, gamma | | eigenvectors and eigenvalues of A and G |
| S | (K, d_i, d_o) | EKFAC: second moments of the gradient in the basis Q_A (x) Q_G |

    cholesky   (A + pi sqrt(lambda) I)^-1 M (G + sqrt(lambda) / pi I)^-1           Martens, Grosse 2015, section 6.3
    eigh       Q_A [(Q_A^T M Q_G) / (alpha gamma^T + lambda)] Q_G^T                 the exact (A (x) G + lambda I)^-1
    ekfac      the same with S in place of alpha gamma^T                            George et al. 2018, eq. 10

Blocks of other layers are exact for any damping, see `capture/layers/blocks.py`. Which slot is whose, and how work on
slots is split over devices, says the package `owners`; other blocks are not split by it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain.curvature import owners, stacks, trees
from curvtrain.curvature.base import Curvature, is_inverse
from curvtrain.curvature.capture import Coverage, Layer
from curvtrain.curvature.capture.layers import OwnBlock
from curvtrain.curvature.kfac.finite import diagonals, keep_finite, outside, positive
from curvtrain.curvature.kfac.stale import Staleness
from curvtrain.curvature.mesh import everywhere
from curvtrain.curvature.owners import Layout, Matrix

PyTree = Any
Arrays = dict[str, jax.Array]

INVERSES = ("cholesky", "eigh", "ekfac")


@functools.cache
def matrices_of(coverage: Coverage) -> tuple[Matrix, ...]:
    """The matrices whose blocks are factored, for a layout."""
    return tuple(Matrix(layer.name, layer.copies, layer.d_i, layer.d_o) for layer in coverage.factored)


@functools.cache
def own_blocks(coverage: Coverage) -> dict[str, tuple[OwnBlock, tuple[Layer, ...]]]:
    """By key, the blocks that are not factored, and the layers that have such a block, in order."""
    members: dict[str, tuple[OwnBlock, tuple[Layer, ...]]] = {}
    for layer in coverage.layers:
        block = layer.block().own
        if block is not None:
            members[block.key] = (block, (*members.get(block.key, (block, ()))[1], layer))
    return members


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerFactors(Curvature):
    """Kronecker factors of every layer, with what has been factorised of them.

    Attributes:
      factors: for each size D, all factors of about that size, (L, D, D); moving averages. Which slot is whose says
        `layout`; what is nobody's is zero.
      blocks: for each kind of block that is not factored (its `key`), the means of all its layers in order.
      weight: what the moving averages have seen: the batches' weights times powers of the decay, added up.
      inverses: "cholesky": for each size, (L, D, D) damped inverses.
      vectors, values: "eigh" and "ekfac": eigenvectors (L, D, D) as columns and eigenvalues (L, D).
      bases: for each kind of block that is not factored, what a refresh made of it.
      scales: "ekfac": for each matrix, S (K, d_i, d_o).
      scale_weight: as `weight`, for S in the present basis.
      stale: what is remembered of each factor where each has an interval of its own between refreshes.
      damping: that the inverses were made for; NaN before the first refresh.
      updates, refreshes: so far.
      failures: factors and blocks whose factorisation was not finite; the last good one was kept.
      skipped: updates with statistics that were not finite, or of no example; nothing was absorbed.
      coverage: which layer every parameter belongs to.
      inverse: one of `INVERSES`.
      layout: which slot is whose.
    """

    factors: Arrays
    blocks: dict[str, Arrays]
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
    layout: Layout = dataclasses.field(metadata=dict(static=True))

    # -- factors -------------------------------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """Number of owners that share the layers."""
        return self.layout.owners

    def pair(self, arrays: Arrays, name: str) -> tuple[jax.Array, jax.Array]:
        """(A's part, G's part) of arrays by size, for one layer."""
        return self.layout.pair(arrays, name)

    def shifts(self, damping: jax.Array | float) -> Arrays:
        """For each size (L,): what is added to the diagonals of factors, the damping split by pi.

        pi is 1 where a factor is zero.
        """
        A, G, d_i, d_o = self.layout.sides
        traces = everywhere({size: jnp.sum(diagonals(X), axis=-1) for size, X in self.factors.items()})
        traces = self.layout.joined(traces)
        a, g = traces[A] / d_i, traces[G] / d_o
        ok = (a > 0) & (g > 0)
        pi, root = (
            jnp.sqrt(jnp.where(ok, a, 1.0) / jnp.where(ok, g, 1.0)),
            jnp.sqrt(jnp.asarray(damping, self.weight.dtype)),
        )
        shift = jnp.zeros_like(traces).at[A].set(pi * root).at[G].set(root / pi)
        return everywhere(self.layout.parted(shift))

    def damped_inverses(self, damping: jax.Array | float, due: Arrays | None = None, keep: bool = True) -> Any:
        """The inverses of all factors with the damping split by pi, or of those that are due.

        Returns (inverses, whether they are finite (L,), both by size): where one is not finite, or not due, the cached
        one stands; with keep=False, what is not finite stays.
        """
        shifts = self.shifts(damping)

        def factorise(given):
            X, shifts, old = ({size: arrays[i] for size, (arrays, _) in given.items()} for i in range(3))
            X = {size: outside(A, given[size][0][3:], 1.0) for size, A in X.items()}  # an inverse, whatever the shift
            if not keep:
                new = stacks.inverses(X, shifts)
                return keep_finite(new, new, {size: diagonals(X) for size, X in new.items()})
            kept = {size: (due, old[size]) for size, (_, due) in given.items() if due is not None}
            new = stacks.inverses(X, shifts, kept)
            shown = {size: diagonals(X) for size, X in new.items()}
            return keep_finite(new, old, shown)

        old = self.inverses if keep else self.factors  # of which nothing is kept
        given = {size: (X, shifts[size], old[size], *self._rows(size)) for size, X in self.factors.items()}
        return self._factorise(factorise, given, due)

    def eigenbases(self, due: Arrays | None = None) -> tuple[dict[str, tuple[jax.Array, jax.Array]], Arrays]:
        """(eigenvalues and eigenvectors of all factors, or of those that are due; which are finite (L,)), by size."""

        def factorise(given):
            old = {size: arrays[1:3] for size, (arrays, _) in given.items()}
            kept = {size: None if due is None else (due, old[size]) for size, (_, due) in given.items()}
            # eigenvalues below all others, so that their vectors stay apart, and are the first
            X = {size: outside(arrays[0], arrays[3:], -1.0) for size, (arrays, _) in given.items()}
            eigen = stacks.in_turn(lambda size, X: positive(*stacks.eigh(X, kept[size])), X)
            return keep_finite(eigen, old)

        old = lambda size: (self.values[size], self.vectors[size])
        given = {size: (X, *old(size), *self._rows(size)) for size, X in self.factors.items()}
        return self._factorise(factorise, given, due)

    def eigenvalues(self) -> Arrays:
        """The eigenvalues of all factors as they are now, by size: (L, D)."""

        def factorise(given):
            X = {size: outside(arrays[0], arrays[1:], -1.0) for size, (arrays, _) in given.items()}
            return stacks.in_turn(lambda _, X: jnp.maximum(stacks.eigh(X)[0], 0.0), X)

        given = {size: (X, *self._rows(size)) for size, X in self.factors.items()}
        return self._factorise(lambda given: (factorise(given),), given, None)[0]

    def _rows(self, size: str) -> tuple[jax.Array, ...]:
        """Where factors are smaller than their slots, which rows are not theirs (L, D)."""
        rows = self.layout.of_size(size).outside
        return () if rows is None else (jnp.asarray(rows),)

    def _factorise(self, function: Callable[..., Any], given: dict[str, PyTree], due: Arrays | None) -> Any:
        """function({size: (arrays, which are due)}), each device at its share."""
        pairs = {size: (arrays, None if due is None else due[size]) for size, arrays in given.items()}
        return owners.factorise(function, self.layout, pairs)

    def by_matrix(
        self, function: Callable[..., jax.Array], arrays: tuple[Arrays, ...], *extras: Mapping[str, jax.Array]
    ) -> Mapping[str, jax.Array]:
        """{name: function(A's part and G's part of each of the arrays, and each of the extras)}, (K, d_i, d_o) each."""
        return owners.by_shape(function, self.layout, arrays, extras)

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
            return self.by_matrix(_rotated_by, (self.factors,), Ms)

        return self._map(vector, matrices, lambda block, means, basis, x: block.matvec(means, x))

    def solve(self, vector: PyTree, damping: jax.Array | float) -> PyTree:
        """(C + damping I)^-1 v; with "cholesky" the factored approximation of it, pi-damped.

        Uses what the last refresh factorised; "cholesky", with another damping than it was made for, factorises again.
        Where that fails (a factor without an inverse, at damping 0), the layer's part of the result is not finite. A
        failure at a refresh keeps the last inverse and is counted, in `failures`.
        """
        is_cached = damping is self.damping  # in a program that has just refreshed for it: nothing else is compiled
        damping = jnp.asarray(damping, self.weight.dtype)

        def matrices(Ms):
            if self.inverse != "cholesky":
                return self._in_bases(Ms, lambda C: 1.0 / (C + damping))
            multiply = lambda inverses: self.by_matrix(_rotated_by, (inverses,), Ms)
            # the barrier keeps XLA from fusing a refresh in the same program into these products, which are then no
            # longer library calls: a hundred times slower on CPU
            cached = lambda: multiply(jax.lax.optimization_barrier(self.inverses))
            again = lambda: multiply(self.damped_inverses(damping, keep=False)[0])
            if is_cached:
                return cached()
            return jax.lax.cond(damping == self.damping, cached, again)

        return self._map(vector, matrices, lambda block, means, basis, x: block.solve(means, basis, x, damping))

    def power(self, vector: PyTree, damping: jax.Array | float, exponent: jax.Array | float) -> PyTree:
        """(C + damping I)^exponent v, with an eigenbasis ("eigh", "ekfac").

        Raises TypeError with inverse="cholesky", unless the exponent is -1.
        """
        if is_inverse(exponent):
            return self.solve(vector, damping)
        if self.inverse == "cholesky":
            raise TypeError(
                f"KroneckerFactors of KFAC(inverse='cholesky') have no power {exponent}: build KFAC(inverse='eigh') or "
                f"'ekfac'."
            )
        damping = jnp.asarray(damping, self.weight.dtype)
        power = lambda C: (C + damping) ** exponent
        own = lambda block, means, basis, x: block.apply(means, basis, x, power)
        return self._map(vector, lambda Ms: self._in_bases(Ms, power), own)

    def diagonal(self) -> PyTree:
        """diag(C), like the parameters."""

        def matrices(Ms):
            if self.inverse == "ekfac":
                of = lambda QA, QG, S: _rotate(jnp.square(QA), S, _t(jnp.square(QG)))
                return self.by_matrix(of, (self.vectors,), self.scales)
            of = lambda A, G: diagonals(A)[:, :, None] * diagonals(G)[:, None, :]
            return self.by_matrix(of, (self.factors,))

        return self._map(self.coverage.zeros(), matrices, lambda block, means, basis, x: block.diagonal(means))

    def logdet(self, damping: jax.Array | float) -> jax.Array:
        """log |det(C + damping I)|, for the eigenvalues of the last refresh.

        With inverse="cholesky", which has none, it takes those of the present factors: as dear as a refresh.
        """
        shift = jnp.asarray(damping, self.weight.dtype)
        log = lambda C: jnp.log(jnp.abs(C + shift))
        if self.inverse == "ekfac":
            logs = self.by_matrix(lambda QA, QG, S: log(S), (self.vectors,), self.scales)
        else:
            values = self.eigenvalues() if self.inverse == "cholesky" else self.values
            logs = self.by_matrix(lambda alpha, gamma: log(alpha[:, :, None] * gamma[:, None, :]), (values,))
        total = sum((jnp.sum(x) for x in owners.to_parameters(logs).values()), jnp.zeros((), self.weight.dtype))
        for key, (block, _) in own_blocks(self.coverage).items():
            total += block.logdet(self.blocks[key], self.bases[key], shift)
        return total

    def telemetry(self) -> dict[str, jax.Array]:
        """Largest and mean trace of a factor, counts, and with `stale` the share of factors at the last refresh."""
        traces = everywhere({size: jnp.sum(diagonals(X), axis=-1) for size, X in self.factors.items()})
        traces = [self.layout.of_size(size).take(trace) for size, trace in traces.items()]
        traces = jnp.concatenate(traces) if traces else jnp.zeros(1, self.weight.dtype)
        due = everywhere(self.stale.due)
        due = {size: self.layout.of_size(size).take(X) for size, X in due.items()}
        return {
            "factor_trace_max": jnp.max(traces),
            "factor_trace_mean": jnp.mean(traces),
            "refreshes": self.refreshes,
            "failures": self.failures,
            "skipped": self.skipped,
        } | ({"refreshed_share": dataclasses.replace(self.stale, due=due).share()} if self.stale.due else {})

    # -- inside --------------------------------------------------------------------------------------------------------

    def _map(self, vector, matrices, own):
        """Applies a function to the blocks of all matrices at once, and one to each kind of other blocks."""
        given = self.coverage.matrices(trees.wide(vector))
        with trees.exact():
            Ms = {matrix.name: given[matrix.name] for matrix in self.layout.matrices}
            results = dict(owners.to_parameters(matrices(Ms))) if Ms else {}
            for key, (block, layers) in own_blocks(self.coverage).items():
                parts = [block.entries(given[layer.name]) for layer in layers]
                x = own(
                    block, self.blocks[key], self.bases[key], parts[0] if len(parts) == 1 else jnp.concatenate(parts)
                )
                start = 0
                for layer, part in zip(layers, parts, strict=True):
                    results[layer.name] = block.from_entries(x[start : start + len(part)], layer.copies)
                    start += len(part)
        return self.coverage.vector(results)

    def _in_bases(self, Ms: Mapping[str, jax.Array], function) -> Mapping[str, jax.Array]:
        """Q_A [function(C) * (Q_A^T M Q_G)] Q_G^T for the eigenvalues C (K, d_i, d_o) of each block."""
        inside = lambda QA, QG, M, C: _rotate(QA, function(C) * _rotate(_t(QA), M, QG), _t(QG))
        if self.inverse == "ekfac":
            return self.by_matrix(inside, (self.vectors,), Ms, self.scales)
        each = lambda QA, QG, alpha, gamma, M: inside(QA, QG, M, alpha[:, :, None] * gamma[:, None, :])
        return self.by_matrix(each, (self.vectors, self.values), Ms)


def _t(Q: jax.Array) -> jax.Array:
    return jnp.swapaxes(Q, -1, -2)


def _rotate(left: jax.Array, M: jax.Array, right: jax.Array) -> jax.Array:
    return left @ M @ right


def _rotated_by(A: jax.Array, G: jax.Array, M: jax.Array) -> jax.Array:
    return _rotate(A, M, G)
