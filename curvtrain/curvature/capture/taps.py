"""Taps: identity functions on layers' outputs whose backward pass computes statistics.

A tapped layer owns *slots*: zero-valued variables with the shapes of its statistics. An identity on its output, with a
backward rule of its own, declares the statistics to be the cotangent of the slots. Differentiating with respect to the
slots then returns the statistics of every layer in one backward pass, in the model's own structure, through any NNX
transform: slots follow the layer's parameters through `nnx.scan`, `nnx.remat` and `nnx.vmap`, and a layer that is used
twice adds up its uses. The class of a module is swapped for a subclass of it, which survives split and merge.

Two limits: a tap is not linear in the cotangent, and it rejects forward-mode differentiation, so only a copy of the
model is ever tapped, and only where statistics are taken.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from curvtrain.curvature.capture.layers import Layer, Path

PyTree = Any
Arrays = Mapping[str, jax.Array]


class Slot(nnx.Param):
    """A zero whose cotangent is a statistic, or an array that a statistic needs. A `Param`: scanned as those are."""


class Measure(Protocol):
    """What a tap computes. Hashable: it is part of the module's static structure."""

    def __call__(self, call: "Call", saved: PyTree, s: jax.Array, given: Arrays) -> dict[str, jax.Array]:
        """Statistics of one call of a layer, from what it saved and the cotangent of its output."""
        ...


@dataclasses.dataclass(frozen=True)
class Call:
    """The static half of one kind of call.

    Attributes:
      layer: the layer.
      use: "call", or "attend" of an embedding.
      examples: how many examples its input holds: N, or 1 where the model maps over its examples one by one.
    """

    layer: Layer
    use: str
    examples: int


@dataclasses.dataclass(frozen=True)
class Tap:
    """The static attribute of a tapped module.

    Attributes:
      layer: its layer.
      examples: as in `Call`.
      measure: what to compute.
      names: of the slots that receive statistics.
      given: of the slots that hold arrays which `measure` needs.
    """

    layer: Layer
    examples: int
    measure: Measure
    names: tuple[str, ...]
    given: tuple[str, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _observe(measure, call, y, saved, given, slots):
    return y


def _observe_fwd(measure, call, y, saved, given, slots):
    return y, (saved, given, slots)


def _observe_bwd(measure, call, residuals, s):
    saved, given, slots = residuals
    found = measure(call, saved, s, given)
    # Where the model is mapped over examples, jax.vmap adds up over them what depends on them: a mere count would not.
    one = jnp.any(s != 0) | True
    of = lambda name, slot: jnp.where(one, found[name], 0).astype(slot.dtype).reshape(slot.shape)
    return s, None, None, {name: of(name, slot) for name, slot in slots.items()}


_observe.defvjp(_observe_fwd, _observe_bwd)


def _apply(module, use: str, y, x, options):
    tap: Tap = module.curvature_tap
    saved = jax.lax.stop_gradient(tap.layer.saved(module, x, options) if use == "call" else x)
    read = lambda name: getattr(module, f"slot_{name}").get_value()
    given = {name: read(name) for name in tap.given}
    slots = {name: read(name) for name in tap.names}
    return _observe(tap.measure, Call(tap.layer, use, tap.examples), y, saved, given, slots)


_USES = {"__call__": "call", "attend": "attend"}  # methods that use a layer's parameters


def _subclass(cls: type, prefix: str, wrap: Callable[[Callable[..., Any], str], Callable[..., Any]]) -> type:
    """A subclass of a module's class with the methods that use its parameters wrapped."""
    methods = {name: wrap(getattr(cls, name), use) for name, use in _USES.items() if hasattr(cls, name)}
    return type(cls)(f"{prefix}{cls.__name__}", (cls,), methods)


def _bound(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the input, the other arguments by name) of a call, however they were passed."""
    _, (_, x), *options = inspect.signature(method).bind(*args, **kwargs).arguments.items()
    return x, dict(options)


@functools.cache
def _tapped(cls: type) -> type:
    def wrap(method, use):
        @functools.wraps(method)
        def tapped(*args, **kwargs):
            return _apply(args[0], use, method(*args, **kwargs), *_bound(method, args, kwargs))

        return tapped

    return _subclass(cls, "Tapped", wrap)


def _modules(module: nnx.Module) -> list[tuple[Path, Any]]:
    return list(nnx.iter_modules(module))  # a list: what follows adds attributes


def attach(module: nnx.Module, taps: Mapping[Path, Tap], arrays: Mapping[str, Arrays]) -> None:
    """Taps the modules at these paths, in place.

    Args:
      module: a model that nobody else uses.
      taps: by path.
      arrays: for each layer's name, its slots and given arrays by name, with the layer's stack as leading axes.
    """
    for path, m in _modules(module):
        if path in taps:
            tap = taps[path]
            m.curvature_tap = tap
            for name in (*tap.names, *tap.given):
                setattr(m, f"slot_{name}", Slot(arrays[tap.layer.name][name]))
            m.__class__ = _tapped(type(m))


@dataclasses.dataclass
class Seen:
    """One call of a layer, as it was traced.

    Attributes:
      shape: of the input.
      mapped: lengths of the axes over which `jax.vmap` mapped the input.
    """

    shape: tuple[int, ...]
    mapped: list[int]


class Record:
    """What a recorder saw, filled while a model is traced: calls by layer name. Compared by identity."""

    def __init__(self):
        self.calls: dict[str, list[Seen]] = {}


@functools.cache
def _recording(cls: type) -> type:
    def wrap(method, use):
        @functools.wraps(method)
        def recording(*args, **kwargs):
            layer, record = args[0].curvature_record
            x = jnp.asarray(_bound(method, args, kwargs)[0])
            seen = Seen(x.shape, [])
            record.calls.setdefault(layer.name, []).append(seen)
            return _probe(method(_without_parameters(args[0], layer), *args[1:], **kwargs), x, seen)

        return recording

    return _subclass(cls, "Recording", wrap)


def _without_parameters(module: Any, layer: Layer) -> Any:
    """A copy with zeros for parameters: what still depends on them then uses them outside of the layer."""
    ghost: Any = nnx.clone(module)
    for name, _ in layer.shapes:
        variable = getattr(ghost, name)
        variable.set_value(jnp.zeros(variable.shape, variable.dtype))
    return ghost


def _probe(y: jax.Array, x: jax.Array, seen: Seen) -> jax.Array:
    """y, and a note of every vmap over x."""

    @jax.custom_batching.custom_vmap
    def probe(y, x):
        return y

    @probe.def_vmap
    def _(size, batched, y, x):
        if batched[1]:
            seen.mapped.append(size)
        return probe(y, x), batched[0]

    return probe(y, x)


def record_calls(module: nnx.Module, layers: Mapping[Path, Layer]) -> Record:
    """Makes the modules at these paths record the shapes of their inputs, in place; they compute with zeros."""
    record = Record()
    for path, m in _modules(module):
        if path in layers:
            m.curvature_record = layers[path], record
            m.__class__ = _recording(type(m))
    return record
