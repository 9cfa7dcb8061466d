"""Statistics of layers: what a tap computes of one call, for the batch's sums that `collect.py` takes.

Symbols as in `layers`, and: D_n (d_i, d_o), the gradient of example n with respect to a layer's matrix, sum_r a s^T;
w_n, the weight of example n: its cotangents s come multiplied by sqrt(w_n), so products of two are weighted.

A layer that is called more than once for one example (a recurrent cell, a shared block) adds up its calls as if each
were an example of its own, in every statistic: their cross terms are left out.
"""

import abc
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain.curvature.capture.layers import EmbedLayer, Layer, MatrixLayer, NormLayer
from curvtrain.curvature.capture.taps import Arrays, Call
from curvtrain.objective import safe

PyTree = Any

WEIGHT_SHARING = ("expand", "reduce")
FLOATS = 2**24  # of per-example gradients held at a time


@dataclasses.dataclass(frozen=True)
class Statistic(abc.ABC):
    """What is measured of every layer. A subclass says which arrays, and how they come of one call."""

    @abc.abstractmethod
    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """The statistics of one copy of a layer, by name; sums over examples, float32."""

    def given(self, layer: Layer) -> tuple[str, ...]:
        """Names of the arrays that the measurement needs."""
        return ()

    @abc.abstractmethod
    def __call__(self, call: Call, saved: PyTree, s: jax.Array, given: Arrays) -> dict[str, jax.Array]:
        """The statistics of one call."""


@dataclasses.dataclass(frozen=True)
class KroneckerStatistic(Statistic):
    """Kronecker factors, unnormalised: `A`, `G` of matrices and `rows`, the weight that A is to be divided by.

    Of an embedding: `counts` (the diagonal of A) and `G`; of its `attend`: `A_head`, `G_head` (a diagonal),
    `head_rows`. Of a norm layer, `F`: see `UnitStatistic`.

    Attributes:
      weight_sharing: "expand" or "reduce" (Eschenhagen et al. 2023, arXiv 2311.00636, sections 3.1 and 3.2).
      diagonal: only the diagonals of A and G.
      scales: also `S`, sum_n (Q_A^T D_n Q_G)^2 for given `QA`, `QG` (George et al. 2018, arXiv 1806.03884, eq. 9).
    """

    weight_sharing: str = "expand"
    diagonal: bool = False
    scales: bool = False

    def shapes(self, layer) -> dict[str, tuple[int, ...]]:
        if isinstance(layer, MatrixLayer):
            g, i, o = layer.groups, layer.d_i, layer.d_o
            square = (lambda n: (g, n)) if self.diagonal else (lambda n: (g, n, n))
            found: dict[str, tuple[int, ...]] = {"A": square(i), "G": square(o), "rows": ()}
            return found | ({"S": (g, i, o)} if self.scales else {})
        if isinstance(layer, EmbedLayer):
            v, d = layer.vocabulary, layer.features
            square = (d,) if self.diagonal else (d, d)
            return {"counts": (v,), "G": square, "rows": (), "A_head": square, "G_head": (v,), "head_rows": ()}
        return UnitStatistic().shapes(layer)

    def given(self, layer):
        return ("QA", "QG") if self.scales and isinstance(layer, MatrixLayer) else ()

    def __call__(self, call, saved, s, given):
        layer, n = call.layer, call.examples
        zeros = {name: jnp.zeros(shape) for name, shape in self.shapes(layer).items()}
        second = _second_moment_diagonal if self.diagonal else _second_moment
        if isinstance(layer, EmbedLayer):
            s = s.astype(jnp.float32)
            if call.use == "attend":
                a, s = (v.astype(jnp.float32).reshape(1, n, -1, v.shape[-1]) for v in (saved, s))
                a, s, w = self._share(a, s, given)
                found = {"A_head": second(a, w)[0], "G_head": _second_moment_diagonal(s, None)[0]}
                return zeros | found | {"head_rows": _total(a, w)}
            index = saved.reshape(n, -1)
            s = s.reshape(1, n, -1, layer.features)
            w = _row_weights(given, *index.shape)
            if self.weight_sharing == "reduce" and index.shape[1] > 1:
                raise ValueError(
                    f"weight_sharing='reduce' averages one-hot rows, which nnx.Embed {layer.name!r} does not have one "
                    f"of: use 'expand', or treat it as plain (plain={layer.name!r})."
                )
            counts = jnp.zeros(layer.vocabulary).at[index].add(1.0 if w is None else w)
            return zeros | {"counts": counts, "G": second(s, None)[0], "rows": jnp.sum(counts)}
        if isinstance(layer, NormLayer):
            return UnitStatistic()(call, saved, s, given)
        assert isinstance(layer, MatrixLayer)
        rows, s = layer.rows(saved, n), layer.cotangents(s, n)
        a, t, w = self._share(layer.with_one(rows), s, given)
        found = {"A": second(a, w), "G": second(t, None), "rows": _total(a, w)}
        if self.scales:
            QA, QG = given["QA"], given["QG"]
            rotated = jnp.einsum("gnri,gij->gnrj", layer.with_one(rows), QA), jnp.einsum("gnro,gop->gnrp", s, QG)
            found["S"] = _sum_of_squares(*rotated)
        return found

    def _share(self, a, s, given):
        """(a, s, row weights) with one row per position, or per example."""
        w = _row_weights(given, a.shape[1], a.shape[2])
        if self.weight_sharing == "expand" or a.shape[2] == 1:
            return a, s, w
        s = jnp.sum(s, axis=2, keepdims=True)
        if w is None:
            return jnp.mean(a, axis=2, keepdims=True), s, None
        mean = jnp.sum(w[None, :, :, None] * a, axis=2, keepdims=True) / safe(jnp.sum(w, 1))[None, :, None, None]
        return mean, s, jnp.max(w, axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class DiagonalStatistic(Statistic):
    """`D2`: sum_n D_n^2 elementwise, shaped like one copy of the layer's matrix."""

    def shapes(self, layer):
        return {"D2": _matrix_shape(layer)}

    def __call__(self, call, saved, s, given):
        layer, n = call.layer, call.examples
        if isinstance(layer, EmbedLayer):
            s = s.astype(jnp.float32)
            if call.use == "attend":
                h = saved.astype(jnp.float32).reshape(1, n, -1, layer.features)
                return {"D2": _sum_of_squares(s.reshape(1, n, -1, layer.vocabulary), h)[0]}
            index, s = saved.reshape(n, -1), s.reshape(n, -1, layer.features)
            # (sum of s over the positions of one token)^2 = sum over them of s times that sum
            same = (index[:, :, None] == index[:, None, :]).astype(jnp.float32)
            together = jnp.einsum("nrq,nqd->nrd", same, s)
            return {"D2": jnp.zeros((layer.vocabulary, layer.features)).at[index].add(s * together)}
        if isinstance(layer, NormLayer):
            return {"D2": jnp.sum(jnp.square(_norm_gradients(layer, saved, s, n)), axis=0)}
        assert isinstance(layer, MatrixLayer)
        return {"D2": _sum_of_squares(layer.with_one(layer.rows(saved, n)), layer.cotangents(s, n))}


@dataclasses.dataclass(frozen=True)
class UnitStatistic(Statistic):
    """`F`: sum_n of outer products of D_n's columns, one block for each unit (output or channel).

    Of a norm layer (p, p, C), p = 2 for scale and bias (Osawa et al. 2020, arXiv 2002.06015, section 4.2); of a matrix
    (g, d_o, d_i, d_i).
    """

    def shapes(self, layer) -> dict[str, tuple[int, ...]]:
        if isinstance(layer, NormLayer):
            return {"F": (layer.units, layer.units, layer.channels)}
        if isinstance(layer, MatrixLayer):
            return {"F": (layer.groups, layer.d_o, layer.d_i, layer.d_i)}
        assert isinstance(layer, EmbedLayer)  # a column of the table: one unit for each feature
        return {"F": (1, layer.features, layer.vocabulary, layer.vocabulary)}

    def __call__(self, call, saved, s, given):
        layer, n = call.layer, call.examples
        if isinstance(layer, NormLayer):
            D = _norm_gradients(layer, saved, s, n)
            return {"F": jnp.einsum("npc,nqc->pqc", D, D)}
        gradients = functools.partial(jnp.einsum, "gnio,gnjo->goij")
        return {"F": _over_gradients(lambda D: gradients(D, D), *_rows_of(call, saved, s))}


@dataclasses.dataclass(frozen=True)
class FullStatistic(Statistic):
    """`F`: sum_n vec(D_n) vec(D_n)^T, (g, d_i d_o, d_i d_o), row-major vec: the whole block of a layer."""

    def shapes(self, layer) -> dict[str, tuple[int, ...]]:
        shape = _matrix_shape(layer)
        g, size = (layer.groups, math.prod(shape[1:])) if isinstance(layer, MatrixLayer) else (1, math.prod(shape))
        return {"F": (g, size, size)}

    def __call__(self, call, saved, s, given):
        layer, n = call.layer, call.examples
        if isinstance(layer, NormLayer):
            D = _norm_gradients(layer, saved, s, n).reshape(n, -1)
            return {"F": (D.T @ D)[None]}

        def outer(D):
            D = D.reshape(*D.shape[:2], -1)
            return jnp.einsum("gnp,gnq->gpq", D, D)

        return {"F": _over_gradients(outer, *_rows_of(call, saved, s))}


# -- one call ----------------------------------------------------------------------------------------------------------


def _matrix_shape(layer: Layer) -> tuple[int, ...]:
    """Of one copy of M: (g, d_i, d_o), (V, D), (p, C) or (1, size)."""
    if isinstance(layer, MatrixLayer):
        return (layer.groups, layer.d_i, layer.d_o)
    if isinstance(layer, EmbedLayer):
        return (layer.vocabulary, layer.features)
    if isinstance(layer, NormLayer):
        return (layer.units, layer.channels)
    return (1, layer.size)


def _rows_of(call: Call, saved: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a, s) of a matrix, or of an embedding with its rows written out: for small ones."""
    layer, n = call.layer, call.examples
    if isinstance(layer, EmbedLayer):
        s = s.astype(jnp.float32)
        if call.use == "attend":
            h = saved.astype(jnp.float32).reshape(1, n, -1, layer.features)
            return s.reshape(1, n, -1, layer.vocabulary), h
        rows = jax.nn.one_hot(saved.reshape(1, n, -1), layer.vocabulary, dtype=jnp.float32)
        return rows, s.reshape(1, n, -1, layer.features)
    assert isinstance(layer, MatrixLayer)
    return layer.with_one(layer.rows(saved, n)), layer.cotangents(s, n)


def _norm_gradients(layer: NormLayer, normalised: jax.Array, s: jax.Array, examples: int) -> jax.Array:
    """D_n of a norm layer: (N, p, C)."""
    s = s.astype(jnp.float32).reshape(examples, -1, layer.channels)
    x = normalised.astype(jnp.float32).reshape(s.shape)
    each = {"scale": lambda: jnp.sum(s * x, axis=1), "bias": lambda: jnp.sum(s, axis=1)}
    return jnp.stack([each[name]() for name, _ in layer.shapes], axis=1)


def _row_weights(given: Arrays, examples: int, positions: int) -> jax.Array | None:
    """The weight of each row (N, R), None for all ones. A mask over time applies to layers whose positions are time; in
    others, an example counts if any of its positions does."""
    if "weights" not in given:
        return None
    w = given["weights"]
    if w.shape[0] != examples:
        raise ValueError(
            f"The batch has a mask or weights for {w.shape[0]} examples, and the model maps over them, so that a layer "
            f"sees {examples}: which weight is its own is not known. Call the model on the whole batch, or leave mask= "
            f"and weights= out."
        )
    w = w.reshape(examples, -1)
    if w.shape[1] != positions:
        w = jnp.max(w, axis=1, keepdims=True)
    return jnp.broadcast_to(w, (examples, positions))


def _total(a: jax.Array, w: jax.Array | None) -> jax.Array:
    return jnp.float32(a.shape[1] * a.shape[2]) if w is None else jnp.sum(w)


def _second_moment(a: jax.Array, w: jax.Array | None) -> jax.Array:
    """sum over rows of w a a^T: (g, d, d)."""
    a = a.reshape(a.shape[0], -1, a.shape[-1])
    weighted = a if w is None else a * w.reshape(1, -1, 1)
    return jnp.einsum("gmi,gmj->gij", weighted, a)


def _second_moment_diagonal(a: jax.Array, w: jax.Array | None) -> jax.Array:
    """sum over rows of w a^2: (g, d)."""
    a = jnp.square(a.reshape(a.shape[0], -1, a.shape[-1]))
    return jnp.sum(a if w is None else a * w.reshape(1, -1, 1), axis=1)


def _sum_of_squares(a: jax.Array, s: jax.Array) -> jax.Array:
    """sum_n (sum_r a s^T)^2 elementwise: (g, d_i, d_o)."""
    if a.shape[2] == 1:  # one position: the square of a product is the product of squares
        return jnp.einsum("gni,gno->gio", jnp.square(a[:, :, 0]), jnp.square(s[:, :, 0]))
    return _over_gradients(lambda D: jnp.sum(jnp.square(D), axis=1), a, s)


def _over_gradients(function, a: jax.Array, s: jax.Array) -> jax.Array:
    """sum of function(D) over chunks of examples, D (g, chunk, d_i, d_o): per-example gradients, a few at a time."""
    g, n = a.shape[:2]
    fit = max(1, FLOATS // (g * a.shape[-1] * s.shape[-1]))
    chunk = next(c for c in range(min(fit, n), 0, -1) if n % c == 0)
    of = lambda a, s: function(jnp.einsum("gnri,gnro->gnio", a, s))
    if chunk == n:
        return of(a, s)
    cut = lambda v: jnp.moveaxis(v.reshape(g, n // chunk, chunk, *v.shape[2:]), 1, 0)
    first = jax.eval_shape(of, *(v[:, :chunk] for v in (a, s)))
    total, _ = jax.lax.scan(lambda t, v: (t + of(*v), None), jnp.zeros(first.shape), (cut(a), cut(s)))
    return total
