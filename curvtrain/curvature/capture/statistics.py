"""Statistics of layers over a batch: what a tap computes, and the backward passes that make taps compute it.

Symbols as in `layers.py`, and: w_n weights of examples, W their sum, D_n (d_i, d_o) the gradient of example n with
respect to a layer's matrix, sum_r a s^T. The cotangents of the outputs are seeded with sqrt(w_n), so products of two
are weighted.

| fisher | seeds of the outputs' cotangents | backward passes |
|---|---|---|
| exact, ggn | the columns of a factor of the loss's output Hessian | number of outputs, times positions of a sequence |
| sampled | d l / d z with targets drawn from the model | 1 |
| empirical | d l / d z with the batch's targets: not the Fisher | 1 |

In "sampled" and "empirical", the example of D_n is what the batch's leading axis counts: the positions of a sequence
add up before anything is squared. For "sampled" their cross terms vanish in expectation.

A layer that is called more than once for one example (a recurrent cell, a shared block) adds up its calls as if each
were an example of its own, in every statistic: their cross terms are left out.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.interpreters import partial_eval

from curvtrain.curvature.capture.coverage import Coverage
from curvtrain.curvature.capture.layers import EmbedLayer, Layer, MatrixLayer, NormLayer, PlainParameter
from curvtrain.curvature.capture.taps import Arrays, Call, Tap, attach, record_calls
from curvtrain.losses import (
    RESERVED,
    SigmoidCrossEntropy,
    SoftmaxCrossEntropy,
    SquaredError,
    example_weights,
    unmasked,
    weight_like,
)
from curvtrain.objective import Objective, batch_size, safe

PyTree = Any

FISHERS = ("exact", "ggn", "sampled", "empirical")
WEIGHT_SHARING = ("expand", "reduce")
_PASSES = 1024  # the most backward passes that an exact Fisher takes before it is refused
_AT_ONCE = 16  # of them, mapped over at a time
_FLOATS = 2**24  # of per-example gradients held at a time


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
    fit = max(1, _FLOATS // (g * a.shape[-1] * s.shape[-1]))
    chunk = next(c for c in range(min(fit, n), 0, -1) if n % c == 0)
    of = lambda a, s: function(jnp.einsum("gnri,gnro->gnio", a, s))
    if chunk == n:
        return of(a, s)
    cut = lambda v: jnp.moveaxis(v.reshape(g, n // chunk, chunk, *v.shape[2:]), 1, 0)
    first = jax.eval_shape(of, *(v[:, :chunk] for v in (a, s)))
    total, _ = jax.lax.scan(lambda t, v: (t + of(*v), None), jnp.zeros(first.shape), (cut(a), cut(s)))
    return total


# -- over a batch ------------------------------------------------------------------------------------------------------


def collect(
    objective: Objective,
    params: PyTree,
    batch: Any,
    key: jax.Array,
    coverage: Coverage,
    statistic: Statistic,
    fisher: str,
    *,
    given: Mapping[str, Arrays] | None = None,
    who: str,
) -> tuple[dict[str, dict[str, jax.Array]], jax.Array]:
    """The statistics of every layer, summed over the (unmasked) examples of a batch.

    Args:
      objective, params, batch, key: as for `objective.loss`; the key also draws the targets of a sampled Fisher.
      coverage: of the objective's model.
      statistic: what to measure.
      fisher: one of `FISHERS`.
      given: for each layer's name, the arrays that `statistic.given` names, stacked copies first.
      who: named in errors.

    Returns:
      ({layer name: {statistic: (*stack, *shape)}}, W). A plain parameter has `D2` (1, size) whatever the statistic.

    Raises:
      ValueError: a layer that is applied without the batch's axis of examples, so that its uses cannot be told apart;
        or whose parameters are used without calling it, so that a use would be missed.
    """
    given = given or {}
    examples = _examples_of_calls(objective, params, batch, key, coverage, who)
    weighted = isinstance(batch, Mapping) and any(name in batch for name in RESERVED)

    def sums(piece, key):
        n = batch_size(piece)
        found, weight = _tapped_sums(
            objective, params, piece, key, coverage, statistic, fisher, given, examples(n), weighted, who
        )
        if coverage.plain:
            found |= _plain_sums(objective, params, piece, key, coverage, fisher, who)
        return found, weight

    return objective.accumulate(sums, batch, key)


def _tapped_sums(objective, params, piece, key, coverage, statistic, fisher, given, examples, weighted, who):
    taps, fixed = {}, {}
    zeros: dict[str, dict[str, jax.Array]] = {}
    for layer in coverage.known:
        shapes = statistic.shapes(layer)
        zeros[layer.name] = {name: jnp.zeros((*layer.stack, *shape)) for name, shape in shapes.items()}
        fixed[layer.name] = dict(given.get(layer.name, {}))
        if weighted:
            entries = [jnp.ndim(piece[name]) for name in RESERVED if name in piece]
            like = next(
                jnp.shape(piece[name]) for name in RESERVED if name in piece and jnp.ndim(piece[name]) == max(entries)
            )
            w = example_weights(piece, like)
            fixed[layer.name]["weights"] = jnp.broadcast_to(w, (*layer.stack, *w.shape))
        names, extra = tuple(zeros[layer.name]), tuple(fixed[layer.name])
        taps[layer.path] = Tap(layer, examples[layer.name], statistic, names, extra)

    def outputs(slots):
        arrays = {name: {**slots[name], **fixed[name]} for name in slots}
        return objective.predict(params, piece, key, prepare=lambda module: attach(module, taps, arrays))

    z, vjp = jax.vjp(outputs, zeros)
    seeds, weight = _seeds(objective, z, piece, key, fisher, who)
    found = _backward(lambda seed: vjp(seed.astype(z.dtype))[0], seeds)
    for layer in coverage.known:  # what does not depend on the cotangents was counted once for every backward pass
        for name in _OF_INPUTS & found[layer.name].keys():
            found[layer.name][name] = found[layer.name][name] / _number(seeds)
    return found, weight


_OF_INPUTS = frozenset(("A", "rows", "counts", "A_head", "head_rows"))


def _plain_sums(objective, params, piece, key, coverage, fisher, who):
    """Exact per-example sums of squares for plain parameters: each example's gradient of these parameters alone."""
    layers = coverage.plain
    if _normalises_over_examples(objective, params):
        names = ", ".join(layer.name for layer in layers)
        raise ValueError(
            f"{who}: the exact diagonal of {names} needs the gradient of one example at a time, and this model has a "
            f"BatchNorm over the batch, which couples its examples."
        )
    chosen = {layer.name: layer.matrix(_at(params, layer)) for layer in layers}

    def one(example, k):
        example = jax.tree.map(lambda a: a[None], example)

        def outputs(chosen):
            return objective.predict(_with(params, layers, chosen), example, k)

        z, vjp = jax.vjp(outputs, chosen)
        seeds, _ = _seeds(objective, z, example, k, fisher, who)
        square = lambda seed: jax.tree.map(lambda g: jnp.square(g.astype(jnp.float32)), vjp(seed.astype(z.dtype))[0])
        return _backward(square, seeds)

    n = batch_size(piece)
    keys = None if key is None else jax.random.split(key, n)
    size = sum(layer.size for layer in layers)
    each = jax.lax.map(lambda x: one(*x), (piece, keys), batch_size=max(1, min(n, _FLOATS // size)))
    return {name: {"D2": jnp.sum(squares, axis=0)[0]} for name, squares in each.items()}


def _at(params, layer: PlainParameter):
    node = params
    for part in layer.path:
        node = node[part]
    return node


def _with(params, layers, chosen):
    """The parameters with the chosen plain ones in place of theirs."""
    copy = jax.tree.map(lambda a: a, params)
    for layer in layers:
        _at(copy, layer).update(layer.parameters(chosen[layer.name]))
    return copy


def _normalises_over_examples(objective, params) -> bool:
    module = jax.eval_shape(objective.module, params)
    return any(isinstance(m, nnx.BatchNorm) and not m.use_running_average for _, m in nnx.iter_modules(module))


def _seeds(objective, z, piece, key, fisher, who):
    """(cotangents of the outputs, or a pair of Hessian columns and the shape of the examples; W)."""
    loss = objective.loss_of_outputs
    w = loss.weights(z, piece)
    root, weight = jnp.sqrt(w), jnp.sum(w)
    clean = unmasked(z, w)
    if fisher in ("exact", "ggn"):
        if fisher == "exact" and not isinstance(loss, SoftmaxCrossEntropy | SigmoidCrossEntropy | SquaredError):
            raise TypeError(
                f"{who}(fisher='exact') knows the distribution of the losses of curvtrain.losses, not of "
                f"{type(loss).__name__}. Use fisher='ggn', or 'sampled' with a loss that defines sample_targets."
            )
        columns = weight_like(root, z) * loss.hessian_columns(clean)
        positions = math.prod(w.shape[1:])
        if columns.shape[0] * positions > _PASSES:
            raise ValueError(
                f"{who}(fisher={fisher!r}) would take {columns.shape[0]} outputs x {positions} positions backward "
                f"passes for every batch, more than {_PASSES}. Use fisher='sampled': one pass, the same in expectation."
            )
        return (columns, w.shape), weight
    if fisher == "sampled":
        if key is None:
            raise ValueError(f"{who}(fisher='sampled') draws targets from the model and needs a key.")
        piece = loss.sample_targets(clean, piece, jax.random.fold_in(key, 1))
    r = jax.grad(lambda z: jnp.sum(loss.values(z, piece)))(clean)
    return jnp.where(weight_like(w != 0, r), weight_like(root, r) * r, 0), weight


def _number(seeds) -> int:
    return seeds[0].shape[0] * math.prod(seeds[1][1:]) if isinstance(seeds, tuple) else 1


def _backward(pull, seeds):
    """The sum of pull(seed) over the seeds."""
    if not isinstance(seeds, tuple):
        return pull(seeds)
    columns, (_, *time) = seeds
    positions = math.prod(time)

    def one(c):  # positions of a sequence are examples of their own, so each has its own columns
        mask = (jnp.arange(positions) == c % positions).reshape((*time, *(1,) * (columns.ndim - 2 - len(time))))
        return pull(jnp.where(mask, columns[c // positions], 0))

    index = jnp.arange(_number(seeds))
    total = index.shape[0]
    if total <= _AT_ONCE:
        return jax.tree.map(lambda a: jnp.sum(a, axis=0), jax.vmap(one)(index))
    chunk = next(c for c in range(_AT_ONCE, 0, -1) if total % c == 0)
    many = lambda i: jax.tree.map(lambda a: jnp.sum(a, axis=0), jax.vmap(one)(i))
    shapes = jax.eval_shape(many, index[:chunk])
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    add = lambda t, i: (jax.tree.map(jnp.add, t, many(i)), None)
    return jax.lax.scan(add, zeros, index.reshape(-1, chunk))[0]


def _examples_of_calls(objective, params, batch, key, coverage, who):
    """A function n -> {layer name: examples in the layer's input}, from two abstract runs of the model.

    Raises ValueError where taps would miss something: a layer that is applied without the axis of examples, or whose
    parameters are used without calling it.
    """
    n = batch_size(batch)
    layers = {layer.path: layer for layer in coverage.known}

    def seen(times):
        records = []
        fake = jax.tree.map(lambda a: jax.ShapeDtypeStruct((times * a.shape[0], *a.shape[1:]), a.dtype), batch)
        prepare = lambda module: records.append(record_calls(module, layers))
        jaxpr = jax.make_jaxpr(lambda p, b: objective.predict(p, b, key, prepare=prepare))(params, fake)
        return records[0].calls, jaxpr.jaxpr

    (once, jaxpr), (twice, _) = seen(1), seen(2)
    used = partial_eval.dce_jaxpr(jaxpr, True)[1]  # of the inputs, parameters first
    for (path, _), outside in zip(jax.tree_util.tree_leaves_with_path(params), used, strict=False):
        *owner, name = (k.key for k in path)
        if outside and tuple(owner) in layers:
            layer = layers[tuple(owner)]
            raise ValueError(
                f"{who}: the model uses the {name} of {layer.kind} {layer.name!r} without calling the layer, so a part "
                f"of its statistics would be missed. Call it, or treat its parameters as plain ones "
                f"({who}(plain={layer.name!r}))."
            )
    mapped = set()
    for layer in coverage.known:
        kinds = set()
        for one, two in zip(once.get(layer.name, []), twice.get(layer.name, []), strict=True):
            shape, length = one.shape, layer.leading(one.shape)
            if layer.leading(two.shape) == 2 * length and length % n == 0:
                kinds.add("batched")
            elif any(b == 2 * a and a % n == 0 for a, b in zip(one.mapped, two.mapped, strict=True)):
                kinds.add("mapped")
            else:
                raise ValueError(
                    f"{who}: {layer.kind} {layer.name!r} is applied to an input of shape {shape}, which does not grow "
                    f"with the batch of {n}: what its output does in one example cannot be told from another. Give it "
                    f"an input with the batch's leading axis (jnp.broadcast_to), or treat its parameters as plain ones "
                    f"({who}(plain={layer.name!r}))."
                )
        if len(kinds) == 2:
            raise ValueError(f"{who}: {layer.kind} {layer.name!r} is applied to a batch and, elsewhere, under vmap.")
        if kinds == {"mapped"}:
            mapped.add(layer.name)
    return lambda n: {layer.name: 1 if layer.name in mapped else n for layer in coverage.known}
