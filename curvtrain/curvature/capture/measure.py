"""Statistics of layers as a measure: they are taken in the passes of a training step, or in passes of their own.

The forward pass is always the step's. Its backward pass serves the empirical Fisher, too: cotangents are then seeded
with w_n d l / d z where the statistics want sqrt(w_n), which is the same for a mask; for one weight per example, taps
correct it, exactly. Any other Fisher takes backward passes of its own, see `seeds.py`. What single examples' gradients
are needed for is taken of those, see `singly.py`.

Which rows enter a factor A under a mask over time: of a layer whose positions are time, those with weight; of any
other, all rows of an example that has any; but of one that is called several times for an example, in a loop over time,
those on which an unmasked output depends, which one more backward pass finds out.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from curvtrain.curvature.capture.calls import Calls, calls_of
from curvtrain.curvature.capture.coverage import Coverage
from curvtrain.curvature.capture.layers import Layer
from curvtrain.curvature.capture.penalty import penalty_diagonal, with_penalty
from curvtrain.curvature.capture.seeds import AS_GIVEN, reach_of, seeds_of
from curvtrain.curvature.capture.singly import sums_of_examples
from curvtrain.curvature.capture.statistics import Statistic
from curvtrain.curvature.capture.taps import Arrays, Tap, attach
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
      fisher: one of `FISHERS`, or `AS_GIVEN`.
      given: for each layer's name, the arrays that `statistic.given` names, scan axes first.
      who: named in errors.
      calls: how the model calls its layers.
      couples: whether the model normalises over examples, so that one's cotangents carry the others' weights.
    """

    objective: Objective
    params: PyTree
    coverage: Coverage
    statistic: Statistic
    fisher: str
    given: Mapping[str, Arrays]
    who: str
    calls: Calls
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
            apart; or whose parameters are used without calling it, so that a use would be missed; a loss of one example
            that depends on others; gradients of single examples that there are not, for a BatchNorm.
        """
        calls = calls_of(objective, params, batch, key, coverage, who)
        if why := objective.coupling(params, batch, key, calls.outputs):
            raise ValueError(
                f"{who} takes statistics of single examples, but {why}. Use Lanczos or PSGD, whose products are those "
                f"of the loss of the whole batch."
            )
        couples = _normalises_over_examples(objective, params)
        measure = cls(objective, params, coverage, statistic, fisher, given or {}, who, calls, couples)
        alone = [*coverage.plain, *measure._singly]
        if alone and couples:
            names = ", ".join(layer.name for layer in alone)
            raise ValueError(
                f"{who}: {'the exact diagonal' if not measure._singly else 'what is measured'} of {names} needs the "
                f"gradient of one example at a time, and this model has a BatchNorm over the batch, which couples its "
                f"examples."
            )
        return measure

    def prepare(self, piece: Any) -> tuple[PyTree, Callable[[Any, PyTree], None]]:
        """(zeros for the statistics of every layer, a function that taps a module with them)."""
        examples = self.calls.examples(batch_size(piece))
        extra = self._arrays_of_weights(piece)
        zeros: dict[str, Arrays] = {}
        fixed: dict[str, dict[str, jax.Array]] = {}
        taps: dict[Any, tuple[Tap, ...]] = {}
        reaching = self._reaching(piece)
        for layer in self._tapped:
            inputs = self.calls.inputs.get(layer.name)
            shapes = self.statistic.shapes(layer) if inputs is None else self.statistic.sized(layer, inputs)
            make = lambda shape, layer=layer: jnp.zeros((*layer.scan_axes, *shape), self.coverage.dtype)
            zeros[layer.name] = {name: make(shape) for name, shape in shapes.items()}
            wide = {name: jnp.broadcast_to(w, (*layer.scan_axes, *w.shape)) for name, w in extra.items()}
            fixed[layer.name] = {**self.given.get(layer.name, {}), **wide}
            names = tuple(shapes), tuple(fixed[layer.name])
            tap = Tap(layer, examples[layer.name], self.statistic, *names, layer in reaching)
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
            for layer in self._tapped:  # what depends on inputs alone was counted once for every backward pass
                mine = sums[layer.name]
                inputs = {name: mine[name] / seeds.count for name in _OF_INPUTS if name in mine}
                sums = {**sums, layer.name: {**mine, **inputs}}
        if reaching := self._reaching(piece):
            reached = pull(reach_of(loss, outputs, piece))
            for layer in reaching:
                inputs = {name: reached[layer.name][name] for name in _OF_INPUTS if name in reached[layer.name]}
                sums = {**sums, layer.name: {**sums[layer.name], **inputs}}
        singly = self._sums_of_examples(piece, key)
        sums = sums | {name: sums.get(name, {}) | mine for name, mine in singly.items()}
        if self.objective.regulariser is None:
            return sums
        weight = jnp.sum(loss.weights(outputs, piece))
        diagonal = self.coverage.matrices(penalty_diagonal(self.objective, self.params, key))
        layers = self.coverage.layers
        return {layer.name: with_penalty(layer, sums[layer.name], weight * diagonal[layer.name]) for layer in layers}

    @property
    def _singly(self) -> list[Layer]:
        """The layers of which something is measured of single examples, as they are called several times in each."""
        repeated = [layer for layer in self.coverage.known if layer.name in self.calls.repeated]
        return [layer for layer in repeated if self.statistic.of_examples(layer)]

    @property
    def _tapped(self) -> list[Layer]:
        """The layers of which something is measured in their calls."""
        all_singly = lambda layer: set(self.statistic.of_examples(layer)) == set(self.statistic.shapes(layer))
        singly = [layer for layer in self._singly if all_singly(layer)]
        return [layer for layer in self.coverage.known if layer not in singly]

    def _reaching(self, piece: Any) -> list[Layer]:
        """The layers of which those rows count on which an unmasked output depends: see the module's docstring."""
        weights = self._arrays_of_weights(piece).get("weights")
        if weights is None or weights.ndim < 2:
            return []
        return [
            layer
            for layer in self._tapped
            if layer.name in self.calls.repeated and not set(_OF_INPUTS).isdisjoint(self.statistic.shapes(layer))
        ]

    def rides(self, outputs: Any, piece: Any) -> bool:
        """Says whether the loss's own backward pass gives the statistics: see the module's docstring.

        Not in float16, where that pass has to be the mean's: a sum's overflows.
        """
        halves = any(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves((self.params, outputs)))
        return not halves and self._may_ride(piece)

    def _may_ride(self, piece: Any) -> bool:
        if self.fisher == AS_GIVEN:
            return True
        if self.fisher != "empirical":
            return False
        loss = self.objective.loss_of_outputs
        if not loss.weights_are_known:
            return False  # weights of the loss's own making are known only after the forward pass
        examples, scale = batch_size(piece), loss.known_weights(piece).scale
        each = set(self.calls.examples(examples).values()) <= {examples}
        return scale is None or (scale.ndim == 1 and not self.couples and each)

    def _arrays_of_weights(self, piece: Any) -> dict[str, jax.Array]:
        """`weights` for rows, and `correction` for cotangents, see `Backward`; where the batch has such entries."""
        known = self.objective.loss_of_outputs.known_weights(piece)
        if known.product is None:
            return {}
        dtype = self.coverage.dtype
        arrays = {"weights": known.product.astype(dtype)}
        if known.scale is not None and self.fisher == "empirical" and self._may_ride(piece):
            w = known.scale.astype(dtype)
            arrays["correction"] = jnp.where(w > 0, jax.lax.rsqrt(jnp.where(w > 0, w, 1.0)), 0.0)
        return arrays

    def _sums_of_examples(self, piece: Any, key: jax.Array | None) -> Sums:
        """Sums what is measured of single examples: plain parameters, layers that are called several times in each."""
        layers = [layer for layer in self.coverage.plain if layer.size] + self._singly
        empty = [layer for layer in self.coverage.plain if not layer.size]
        sums: Sums = {layer.name: {"D2": jnp.zeros((1, 1, 0), self.coverage.dtype)} for layer in empty}

        def of(layers):
            return sums_of_examples(
                self.objective,
                self.params,
                layers,
                self.statistic,
                self.given,
                piece,
                key,
                self.fisher,
                self.who,
                self.coverage.dtype,
            )

        now_and_then = [layer for layer in layers if "due" in self.given.get(layer.name, {})]
        always = [layer for layer in layers if layer not in now_and_then]
        if always:
            sums |= of(always)
        if now_and_then:
            due = jnp.any(jnp.stack([jnp.any(self.given[layer.name]["due"]) for layer in now_and_then]))
            shapes = jax.eval_shape(lambda: of(now_and_then))
            zeros = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
            sums |= jax.lax.cond(due, lambda: of(now_and_then), zeros)
        return sums


def _normalises_over_examples(objective: Objective, params: PyTree) -> bool:
    module = jax.eval_shape(objective.module, params)
    return any(isinstance(m, nnx.BatchNorm) and not m.use_running_average for _, m in nnx.iter_modules(module))
