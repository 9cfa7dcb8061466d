"""Statistics from the gradients of single examples, taken one by one: exact whatever the model does with a parameter.

They serve parameters without a layer, and layers that are called several times for one example, whose D_n is a sum over
the calls that no tap sees as a whole. The cost is a forward and a backward pass over the batch for these parameters
alone; targets that are drawn, and dropout, are other draws than those of the batch.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain._keys import Purpose, fold
from curvtrain._outputs import floats
from curvtrain.curvature.capture.coverage import at
from curvtrain.curvature.capture.layers import Explicit, Layer
from curvtrain.curvature.capture.layers.gradients import FLOATS
from curvtrain.curvature.capture.seeds import AT_ONCE, seeds_of
from curvtrain.curvature.capture.statistics import Statistic
from curvtrain.objective import Objective, batch_size
from curvtrain.objective.pieces import walk

PyTree = Any
Arrays = Mapping[str, jax.Array]
Sums = dict[str, dict[str, jax.Array]]


def sums_of_examples(
    objective: Objective,
    params: PyTree,
    layers: list[Layer],
    statistic: Statistic,
    given: Mapping[str, Arrays],
    piece: Any,
    key: jax.Array | None,
    fisher: str,
    who: str,
    dtype: Any,
) -> Sums:
    """The statistics that `Statistic.of_examples` names, summed over a piece, by layer and name: (*scan axes, g, ...).

    A plain parameter has `D2` (1, 1, size), whatever the statistic.

    Args:
      objective, params: of the step.
      layers: whose statistics are wanted.
      statistic: what to measure.
      given: for each layer's name, the arrays that it needs, scan axes first.
      piece, key: examples, and what their noise and targets are drawn with.
      fisher: one of `FISHERS`.
      who: named in errors.
      dtype: of the statistics.
    """
    objective = objective.with_microbatch(None)  # which has nothing to say of one example
    # read exactly, then differentiated in the curvature's dtype: a derivative in bfloat16 would be rounded
    chosen = {layer.name: layer.matrix(at(params, layer.path)).astype(dtype) for layer in layers}

    def with_chosen(chosen):
        copy = jax.tree.map(lambda a: a, params)
        for layer in layers:
            own = layer.parameters(chosen[layer.name])
            if layer.tapped:  # flax's layers promote; in a loop, what a cell carries has to keep its dtype
                own = {name: a.astype(at(params, layer.path)[name].dtype) for name, a in own.items()}
            at(copy, layer.path).update(own)
        return copy

    def one(example, k):
        example = jax.tree.map(lambda a: a[None], example)

        def outputs_of(chosen):
            outputs = objective.predict(with_chosen(chosen), example, k)
            return floats(outputs), outputs

        _, vjp, outputs = jax.vjp(outputs_of, chosen, has_aux=True)
        seeds = seeds_of(objective.loss_of_outputs, outputs, example, k, fisher, who)

        def measured(s):
            D = vjp(s)[0]
            return {layer.name: _of_layer(layer, statistic, D[layer.name], given) for layer in layers}

        return seeds.total(measured)

    n = batch_size(piece)
    batch = piece, None if key is None else jax.random.split(fold(key, Purpose.EXAMPLES), n)
    example = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a)[1:], a.dtype), batch)
    found = sum(math.prod(a.shape) for a in jax.tree.leaves(jax.eval_shape(one, *example)))
    at_once = AT_ONCE if fisher in ("exact", "ggn") else 1
    fit = max(1, FLOATS // (at_once * max(found, sum(layer.size for layer in layers))))
    many = lambda batch: jax.tree.map(lambda a: jnp.sum(a, axis=0), jax.vmap(one)(*batch))
    return walk(lambda state, batch, _: (state, many(batch), None), None, batch, None, fit)[1]


def _of_layer(layer: Layer, statistic: Statistic, D: jax.Array, given: Mapping[str, Arrays]) -> dict[str, jax.Array]:
    """The statistics of one example's gradient D (K, d_i, d_o) of a layer."""
    if not layer.tapped:
        return {"D2": jnp.square(D)}
    stack = math.prod(layer.scan_axes)
    D = D.reshape(stack, layer.groups, 1, layer.d_i, layer.d_o)
    lead = len(layer.scan_axes)
    arrays = {name: a.reshape(stack, *a.shape[lead:]) for name, a in given.get(layer.name, {}).items()}
    measure: Callable[..., Any] = lambda D, arrays: statistic.measure_examples(layer, Explicit(D), arrays)
    sums = jax.vmap(measure)(D, arrays)
    return {name: a.reshape(*layer.scan_axes, *a.shape[1:]) for name, a in sums.items()}
