"""How a model calls its layers, learnt from abstract runs: where taps would miss something is found before they do."""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from curvtrain._outputs import floats
from curvtrain.curvature.capture.coverage import Coverage, at
from curvtrain.curvature.capture.taps import MARK, Record, record_calls
from curvtrain.objective import Objective, batch_size

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Calls:
    """The calls of a model's layers, as far as its statistics depend on them.

    Attributes:
      layers: the names of all that are known.
      mapped: of those that see one example at a time, because the model maps over them.
      repeated: of those that are called several times for one example: by the model, in a loop, or mapped over
        positions.
      outputs: shapes of the model's outputs for the batch.
      inputs: of layers that are called on the batch, the shape of the first call's input, by name.
    """

    layers: tuple[str, ...]
    mapped: frozenset[str]
    repeated: frozenset[str]
    outputs: PyTree
    inputs: Mapping[str, tuple[int, ...]]

    def examples(self, n: int) -> dict[str, int]:
        """For a piece of n examples, how many each layer sees at once, by its name."""
        return {name: 1 if name in self.mapped else n for name in self.layers}


def calls_of(
    objective: Objective, params: PyTree, batch: Any, key: jax.Array | None, coverage: Coverage, who: str
) -> Calls:
    """Finds out how the objective's model calls its layers for such a batch.

    Raises ValueError where taps would miss something: a layer that is applied without the axis of examples, whose
    parameters are used without calling it, or of whose output the model takes a derivative.
    """
    n = batch_size(batch)
    runs = (_record(objective, params, _repeated(batch, times), key, coverage, who) for times in (1, 2))
    (once, counts, shapes), (twice, _, _) = runs
    _check_uses(objective, params, batch, key, coverage, who)
    mapped, repeated = set(), set()
    for layer in coverage.known:
        kinds = set()
        for one, two in zip(once.calls.get(layer.path, []), twice.calls.get(layer.path, []), strict=True):
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
        uses = sum(counts[seen.mark] / seen.size for seen in once.calls.get(layer.path, []))
        if uses > math.prod(layer.scan_axes) * (n if kinds == {"mapped"} else 1):
            repeated.add(layer.name)
    names = tuple(layer.name for layer in coverage.known)
    first = {layer.name: once.calls[layer.path][0].shape for layer in coverage.known if once.calls.get(layer.path)}
    inputs = {name: shape for name, shape in first.items() if name not in mapped}
    return Calls(names, frozenset(mapped), frozenset(repeated), shapes, inputs)


def _repeated(batch: Any, times: int) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((times * a.shape[0], *a.shape[1:]), a.dtype), batch)


def _record(objective, params, batch, key, coverage, who) -> tuple[Record, collections.Counter, PyTree]:
    """(the calls of every covered module in an abstract forward pass, `_executed` of its jaxpr, the outputs).

    Raises ValueError if the model differentiates a layer.
    """
    records: list[Record] = []

    def run(maps: bool) -> tuple[Record, collections.Counter, PyTree]:
        def outputs(params, batch):
            prepare = lambda module: records.append(record_calls(module, coverage.by_module, maps=maps))
            return objective.predict(params, batch, key, prepare=prepare)

        jaxpr, shapes = jax.make_jaxpr(outputs, return_shape=True)(params, batch)
        return records[-1], _executed(jaxpr.jaxpr), shapes

    try:
        record, counts, shapes = run(maps=True)
    except Exception:  # JAX has no class for it; whatever is not of that cause is raised again
        if not records or not _differentiated(records[0], coverage):
            raise
        # what notes vmap cannot be differentiated, and JAX says so in words of its own, at the first layer
        record, counts, shapes = run(maps=False)
    if names := _differentiated(record, coverage):
        plain = [layer.name for layer in coverage.plain] + names
        raise ValueError(
            f"{who}: the model's outputs hold derivatives of {', '.join(names[:4])}, as in a physics-informed network, "
            f"and there is no rule for the statistics of a layer that is differentiated. Use curvature.Lanczos with "
            f"optim.fosi or curvature.PSGD with optim.psgd, which take any model; or the exact diagonal of these "
            f"layers, {who}(plain={'|'.join(plain) if len(plain) < 5 else '.*'!r})."
        )
    return record, counts, shapes


def _differentiated(record: Record, coverage: Coverage) -> list[str]:
    """The names of layers of whose outputs a derivative is taken."""
    calls = record.calls.items()
    paths = [path for path, seen in calls if any(call.differentiated for call in seen)]
    return [layer.name for path in paths for layer in coverage.by_module[path]]


def _executed(jaxpr: Jaxpr) -> collections.Counter:
    """By the mark of a call, the size of all that it computes: with the axes of vmap, in all rounds of loops."""
    total: collections.Counter = collections.Counter()
    for eqn in jaxpr.eqns:
        name = eqn.params.get("name")
        if isinstance(name, str) and name.startswith(MARK):
            total[name] += max(math.prod(getattr(eqn.invars[0].aval, "shape", ())), 1)
            continue
        # The length of a while loop is not known: two rounds stand for several.
        rounds = eqn.params["length"] if eqn.primitive.name == "scan" else 2 if eqn.primitive.name == "while" else 1
        inner = [_executed(sub) for sub in _jaxprs(list(eqn.params.values()))]
        found: collections.Counter = collections.Counter()
        for counts in inner:
            found = found | counts if eqn.primitive.name == "cond" else found + counts
        for mark, size in found.items():
            total[mark] += rounds * size
    return total


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
    """The jaxprs among the parameters of an equation."""
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _jaxprs(item)


def _check_uses(objective, params, batch, key, coverage, who) -> None:
    """Raises ValueError for a parameter of a layer that reaches the outputs other than through a call of the layer."""
    paths = [(layer, name) for layer in coverage.known for name, _ in layer.shapes]
    if not _reach(objective, params, batch, key, coverage, paths):
        return
    for layer, name in paths:
        if _reach(objective, params, batch, key, coverage, [(layer, name)]):
            raise ValueError(
                f"{who}: the model uses the {name} of {layer.kind} {layer.name!r} without calling the layer, so a part "
                f"of its statistics would be missed. Call it, or treat its parameters as plain ones "
                f"({who}(plain={layer.name!r}))."
            )


def _reach(objective, params, batch, key, coverage, paths) -> bool:
    """Whether the outputs depend differentiably on some of these parameters when no call of a layer uses its own.

    The outputs pass through an identity with a rule for reverse mode, which is told whether its input is perturbed.
    """
    perturbed = []

    @jax.custom_vjp
    def outputs_of(z):
        return z

    def forward(z):
        perturbed.extend(leaf.perturbed for leaf in z)
        return [leaf.value for leaf in z], None

    outputs_of.defvjp(forward, lambda _, s: (s,), symbolic_zeros=True)

    def run(chosen, params, batch):
        whole = jax.tree.map(lambda a: a, params)
        for (layer, name), value in zip(paths, chosen, strict=True):
            at(whole, layer.path)[name] = value
        prepare = lambda module: record_calls(module, coverage.by_module, maps=False)
        return outputs_of(floats(objective.predict(whole, batch, key, prepare=prepare)))

    def backward(params, batch):
        chosen = [at(params, layer.path)[name] for layer, name in paths]
        return jax.vjp(lambda chosen: run(chosen, params, batch), chosen)[0]

    jax.eval_shape(backward, params, _repeated(batch, 1))
    return any(perturbed)
