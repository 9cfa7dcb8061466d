"""Statistics of layers over a batch: the backward passes that make taps compute them.

Symbols as in `layers` and `statistics.py`, and: W, the sum of the examples' weights w_n. The cotangents of the outputs
are seeded with sqrt(w_n).

| fisher | seeds of the outputs' cotangents | backward passes |
|---|---|---|
| exact, ggn | the columns of a factor of the loss's output Hessian | number of outputs, times positions of a sequence |
| sampled | d l / d z with targets drawn from the model | 1 |
| empirical | d l / d z with the batch's targets: not the Fisher | 1 |

In "sampled" and "empirical", the example of D_n is what the batch's leading axis counts: the positions of a sequence
add up before anything is squared. For "sampled" their cross terms vanish in expectation.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.interpreters import partial_eval

from curvtrain.curvature.capture.coverage import Coverage, at
from curvtrain.curvature.capture.statistics import FLOATS, Statistic
from curvtrain.curvature.capture.taps import Arrays, Tap, attach, record_calls
from curvtrain.losses import (
    RESERVED,
    SigmoidCrossEntropy,
    SoftmaxCrossEntropy,
    SquaredError,
    example_weights,
    unmasked,
    weight_like,
)
from curvtrain.objective import Objective, batch_size

PyTree = Any

FISHERS = ("exact", "ggn", "sampled", "empirical")
_PASSES = 1024  # the most backward passes that an exact Fisher takes before it is refused
_AT_ONCE = 16  # of them, mapped over at a time


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
        for name in _OF_INPUTS:  # in one order: several processes must write the same program
            if name in found[layer.name]:
                found[layer.name][name] = found[layer.name][name] / _number(seeds)
    return found, weight


_OF_INPUTS = ("A", "rows", "counts", "A_head", "head_rows")


def _plain_sums(objective, params, piece, key, coverage, fisher, who):
    """Exact per-example sums of squares for plain parameters: each example's gradient of these parameters alone."""
    layers = coverage.plain
    if _normalises_over_examples(objective, params):
        names = ", ".join(layer.name for layer in layers)
        raise ValueError(
            f"{who}: the exact diagonal of {names} needs the gradient of one example at a time, and this model has a "
            f"BatchNorm over the batch, which couples its examples."
        )
    chosen = {layer.name: layer.matrix(at(params, layer.path)) for layer in layers}

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
    each = jax.lax.map(lambda x: one(*x), (piece, keys), batch_size=max(1, min(n, FLOATS // size)))
    return {name: {"D2": jnp.sum(squares, axis=0)[0]} for name, squares in each.items()}


def _with(params, layers, chosen):
    """The parameters with the chosen plain ones in place of theirs."""
    copy = jax.tree.map(lambda a: a, params)
    for layer in layers:
        at(copy, layer.path).update(layer.parameters(chosen[layer.name]))
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
