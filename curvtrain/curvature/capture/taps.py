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
from collections.abc import Mapping
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
    cotangents = {name: found[name].astype(slot.dtype).reshape(slot.shape) for name, slot in slots.items()}
    return s, None, None, cotangents


_observe.defvjp(_observe_fwd, _observe_bwd)


def _apply(module, use: str, y, x, kwargs):
    tap: Tap = module.curvature_tap
    saved = jax.lax.stop_gradient(tap.layer.saved(module, x, kwargs) if use == "call" else x)
    read = lambda name: getattr(module, f"slot_{name}").get_value()
    given = {name: read(name) for name in tap.given}
    slots = {name: read(name) for name in tap.names}
    return _observe(tap.measure, Call(tap.layer, use, tap.examples), y, saved, given, slots)


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if args:
        return args[0]
    return next(kwargs[name] for name in ("inputs", "x", "query") if name in kwargs)


@functools.cache
def _tapped(cls: type) -> type:
    def call(self, *args, **kwargs):
        y = cls.__call__(self, *args, **kwargs)
        return _apply(self, "call", y, _first(args, kwargs), kwargs)

    def attend(self, *args, **kwargs):
        y = cls.attend(self, *args, **kwargs)
        return _apply(self, "attend", y, _first(args, kwargs), kwargs)

    methods: dict[str, Any] = {"__call__": call}
    if hasattr(cls, "attend"):
        methods["attend"] = attend
    return type(cls)(f"Tapped{cls.__name__}", (cls,), methods)


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


class Record:
    """What a recorder saw, filled while a model is traced. Compared by identity."""

    def __init__(self):
        self.calls: dict[str, list[tuple[tuple[int, ...], bool]]] = {}  # name → (input shape, vmapped)


@functools.cache
def _recording(cls: type) -> type:
    def note(self, args, kwargs):
        layer, record = self.curvature_record
        x = jnp.asarray(_first(args, kwargs))
        seen = record.calls.setdefault(layer.name, [])
        seen.append((x.shape, False))
        at = len(seen) - 1

        @jax.custom_batching.custom_vmap
        def probe(x):
            return x

        @probe.def_vmap
        def _(size, batched, x):
            seen[at] = (seen[at][0], True)
            return probe(x), batched[0]

        return probe(x)

    def call(self, *args, **kwargs):
        x = note(self, args, kwargs)
        return cls.__call__(self, x, *args[1:], **{k: v for k, v in kwargs.items() if args or k not in _NAMES})

    def attend(self, *args, **kwargs):
        note(self, args, kwargs)
        return cls.attend(self, *args, **kwargs)

    methods: dict[str, Any] = {"__call__": call}
    if hasattr(cls, "attend"):
        methods["attend"] = attend
    return type(cls)(f"Recording{cls.__name__}", (cls,), methods)


_NAMES = ("inputs", "x", "query")


def record_calls(module: nnx.Module, layers: Mapping[Path, Layer]) -> Record:
    """Makes the modules at these paths record the shapes of their inputs, in place."""
    record = Record()
    for path, m in _modules(module):
        if path in layers:
            m.curvature_record = layers[path], record
            m.__class__ = _recording(type(m))
    return record
