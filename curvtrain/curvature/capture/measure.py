"""Statistics of layers as a measure: they are taken in the passes of a training step, or in passes of their own.

The forward pass is always the step's. Its backward pass serves the empirical Fisher, too: cotangents are then seeded
with w_n d l / d z where the statistics want sqrt(w_n), which is the same for a mask; for one weight per example, taps
correct it, exactly. Any other Fisher takes backward passes of its own, see `seeds.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from curvtrain._outputs import floats
from curvtrain.curvature.capture.calls import examples_of_calls
from curvtrain.curvature.capture.coverage import Coverage, at
from curvtrain.curvature.capture.layers.gradients import FLOATS
from curvtrain.curvature.capture.seeds import seeds_of
from curvtrain.curvature.capture.statistics import Statistic
from curvtrain.curvature.capture.taps import Arrays, Tap, attach
from curvtrain.losses import RESERVED, Loss, example_weights
from curvtrain.objective import Objective, batch_size

PyTree = Any
Sums = dict[str, dict[str, jax.Array]]

_OF_INPUTS = ("A", "rows", "counts", "A_head", "head_rows")  # statistics that no cotangent enters


@dataclasses.dataclass(frozen=True, eq=False)
class LayerMeasure:
    """The statistics of every layer, summed over the (unmasked) examples of a batch: an `objective.Measure`.

    Its sums are {layer name: {statistic: (*scan axes, g, ...)}}; a plain parameter has `D2` (1, 1, size) whatever the
    statistic.

    Attributes:
      objective, params: of the step.
      coverage: of the objective's model.
      statistic: what to measure.
      fisher: one of `FISHERS`.
      given: for each layer's name, the arrays that `statistic.given` names, scan axes first.
      who: named in errors.
      examples: for pieces of n examples, how many each layer sees at once.
      couples: whether the model normalises over examples, so that one's cotangents carry the others' weights.
    """

    objective: Objective
    params: PyTree
    coverage: Coverage
    statistic: Statistic
    fisher: str
    given: Mapping[str, Arrays]
    who: str
    examples: Callable[[int], dict[str, int]]
    couples: bool

    @classmethod
    def of(
        cls,
        objective: Objective,
        params: PyTree,
        batch: Any,
        key: jax.Array | None,
        coverage: Coverage,
        statistic: Statistic,
        fisher: str,
        *,
        given: Mapping[str, Arrays] | None = None,
        who: str,
    ) -> "LayerMeasure":
        """The measure for a batch; of `batch` and `key` only shapes are used.

        Raises:
          ValueError: a layer that is applied without the batch's axis of examples, so that its uses cannot be told
            apart; or whose parameters are used without calling it, so that a use would be missed.
        """
        examples = examples_of_calls(objective, params, batch, key, coverage, who)
        couples = _normalises_over_examples(objective, params)
        if coverage.plain and couples:
            names = ", ".join(layer.name for layer in coverage.plain)
            raise ValueError(
                f"{who}: the exact diagonal of {names} needs the gradient of one example at a time, and this model has "
                f"a BatchNorm over the batch, which couples its examples."
            )
        return cls(objective, params, coverage, statistic, fisher, given or {}, who, examples, couples)

    def prepare(self, piece: Any) -> tuple[PyTree, Callable[[Any, PyTree], None]]:
        """(zeros for the statistics of every layer, a function that taps a module with them)."""
        examples = self.examples(batch_size(piece))
        extra = self._arrays_of_weights(piece)
        zeros: dict[str, Arrays] = {}
        fixed: dict[str, dict[str, jax.Array]] = {}
        taps: dict[Any, tuple[Tap, ...]] = {}
        for layer in self.coverage.known:
            shapes = self.statistic.shapes(layer)
            make = lambda shape, layer=layer: jnp.zeros((*layer.scan_axes, *shape), self.coverage.dtype)
            zeros[layer.name] = {name: make(shape) for name, shape in shapes.items()}
            wide = {name: jnp.broadcast_to(w, (*layer.scan_axes, *w.shape)) for name, w in extra.items()}
            fixed[layer.name] = {**self.given.get(layer.name, {}), **wide}
            tap = Tap(layer, examples[layer.name], self.statistic, tuple(shapes), tuple(fixed[layer.name]))
            taps[layer.path] = (*taps.get(layer.path, ()), tap)
        arrays = lambda slots: {name: {**slots[name], **fixed[name]} for name in slots}
        return zeros, lambda module, slots: attach(module, taps, arrays(slots))

    def sums(
        self, pull: Callable[[list[jax.Array]], PyTree], own: PyTree, outputs: Any, piece: Any, key: jax.Array | None
    ) -> Sums:
        """The statistics of a piece: those of the loss's own backward pass, or of others."""
        loss = self.objective.loss_of_outputs
        sums = own
        if not self.rides(outputs, piece):
            seeds = seeds_of(loss, outputs, piece, key, self.fisher, self.who)
            sums = seeds.total(pull)
            for layer in self.coverage.known:  # what depends on inputs alone was counted once for every backward pass
                mine = sums[layer.name]
                inputs = {name: mine[name] / seeds.count for name in _OF_INPUTS if name in mine}
                sums = {**sums, layer.name: {**mine, **inputs}}
        return {**sums, **self._plain_sums(piece, key)}

    def rides(self, outputs: Any, piece: Any) -> bool:
        """Whether the loss's own backward pass gives the statistics: see the module's docstring.

        Not in float16, where that pass has to be the mean's: a sum's overflows.
        """
        halves = any(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves((self.params, outputs)))
        return not halves and self._may_ride(piece)

    def _may_ride(self, piece: Any) -> bool:
        if self.fisher != "empirical":
            return False
        if type(self.objective.loss_of_outputs).weights is not Loss.weights:
            return False  # weights of the loss's own making are known only after the forward pass
        examples = batch_size(piece)
        simple = all(w.ndim == 1 for w in _float_weights(piece)) and not self.couples
        each = set(self.examples(examples).values()) <= {examples}
        return not _float_weights(piece) or (simple and each)

    def _arrays_of_weights(self, piece: Any) -> dict[str, jax.Array]:
        """`weights` for rows, and `correction` for cotangents, see `Backward`; where the batch has such entries."""
        entries = [jnp.shape(piece[name]) for name in RESERVED if isinstance(piece, Mapping) and name in piece]
        if not entries:
            return {}
        arrays = {"weights": example_weights(piece, max(entries, key=len), self.coverage.dtype)}
        wide = _float_weights(piece)
        if wide and self._may_ride(piece):
            w = jnp.prod(jnp.stack([w.astype(self.coverage.dtype) for w in wide]), axis=0)
            arrays["correction"] = jnp.where(w > 0, jax.lax.rsqrt(jnp.where(w > 0, w, 1.0)), 0.0)
        return arrays

    def _plain_sums(self, piece: Any, key: jax.Array | None) -> Sums:
        """Exact sums of squares for plain parameters, from each example's gradient of these parameters alone."""
        layers = [layer for layer in self.coverage.plain if layer.size]
        empty = {
            layer.name: {"D2": jnp.zeros((1, 1, 0), self.coverage.dtype)}
            for layer in self.coverage.plain
            if not layer.size
        }
        if not layers:
            return empty
        objective = self.objective
        # read exactly, then differentiated in the curvature's dtype: a derivative in bfloat16 would be rounded
        of = lambda layer: layer.matrix(at(self.params, layer.path)).astype(self.coverage.dtype)
        chosen = {layer.name: of(layer) for layer in layers}

        def with_chosen(chosen):
            copy = jax.tree.map(lambda a: a, self.params)
            for layer in layers:
                at(copy, layer.path).update(layer.parameters(chosen[layer.name]))
            return copy

        def one(example, k):
            example = jax.tree.map(lambda a: a[None], example)

            def outputs_of(chosen):
                outputs = objective.predict(with_chosen(chosen), example, k)
                return floats(outputs), outputs

            _, vjp, outputs = jax.vjp(outputs_of, chosen, has_aux=True)
            seeds = seeds_of(objective.loss_of_outputs, outputs, example, k, self.fisher, self.who)
            square = lambda s: jax.tree.map(lambda g: jnp.square(g), vjp(s)[0])
            return seeds.total(square)

        n = batch_size(piece)
        keys = None if key is None else jax.random.split(key, n)
        size = sum(layer.size for layer in layers)
        each = jax.lax.map(lambda x: one(*x), (piece, keys), batch_size=max(1, min(n, FLOATS // size)))
        return empty | {name: {"D2": jnp.sum(squares, axis=0)} for name, squares in each.items()}


def _float_weights(piece: Any) -> list[jax.Array]:
    """The entries of a batch that weight its examples other than by a mask."""
    entries = [jnp.asarray(piece[name]) for name in RESERVED if isinstance(piece, Mapping) and name in piece]
    return [entry for entry in entries if entry.dtype != jnp.bool_]


def _normalises_over_examples(objective: Objective, params: PyTree) -> bool:
    module = jax.eval_shape(objective.module, params)
    return any(isinstance(m, nnx.BatchNorm) and not m.use_running_average for _, m in nnx.iter_modules(module))
