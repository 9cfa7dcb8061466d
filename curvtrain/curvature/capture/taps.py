"""Taps: identity functions on layers' outputs whose backward pass computes statistics.

A tapped layer owns *slots*: zero-valued variables with the shapes of its statistics. An identity on its output, with a
backward rule of its own, declares the statistics to be the cotangent of the slots. Differentiating with respect to the
slots then returns the statistics of every layer in one backward pass, in the model's own structure, through any NNX
transform: slots follow the layer's parameters through `nnx.scan`, `nnx.remat` and `nnx.vmap`, and a layer that is used
twice adds up its uses, each by itself. The class of a module is swapped for a subclass of it, which survives split and
merge.

Two limits: a tap is not linear in the cotangent, and it rejects forward-mode differentiation, so only a copy of the
model is ever tapped, and only where statistics are taken.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from curvtrain.curvature.capture.layers import Backward, Layer, Path
from curvtrain.curvature.capture.statistics import Statistic

PyTree = Any
Arrays = Mapping[str, jax.Array]


class Slot(nnx.Param):
    """A zero whose cotangent is a statistic, or an array that a statistic needs. A `Param`: scanned as those are."""


@dataclasses.dataclass(frozen=True)
class Tap:
    """The static attribute of a tapped module, one for each of its layers.

    Attributes:
      layer: the layer.
      examples: how many examples its input holds: N, or 1 where the model maps over its examples one by one.
      statistic: what to compute.
      names: of the slots that receive statistics.
      given: of the slots that hold arrays which the statistic needs.
      reach: see `Backward`.
    """

    layer: Layer
    examples: int
    statistic: Statistic
    names: tuple[str, ...]
    given: tuple[str, ...]
    reach: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _observe(tap, use, y, saved, given, slots):
    return y


def _observe_fwd(tap, use, y, saved, given, slots):
    return y, (saved, given, slots)


def _observe_bwd(tap, use, residuals, s):
    saved, given, slots = residuals
    sums = tap.statistic(tap.layer, Backward(use, tap.examples, saved, s, given, tap.reach))
    # Where the model is mapped over examples, jax.vmap adds up over them what depends on them: a mere count would not.
    one = jnp.any(s != 0) | True
    cotangent = lambda name, slot: jnp.where(one, sums[name], 0).astype(slot.dtype).reshape(slot.shape)
    return s, None, None, {name: cotangent(name, slot) for name, slot in slots.items()}


_observe.defvjp(_observe_fwd, _observe_bwd)


def _apply(module, use: str, y, x, options):
    for i, tap in enumerate(module.curvature_taps):
        saved = jax.lax.stop_gradient(tap.statistic.saved(tap.layer, module, x, options) if use == "call" else x)
        read = lambda name, i=i: getattr(module, f"slot_{i}_{name}").get_value()
        given = {name: read(name) for name in tap.given}
        slots = {name: read(name) for name in tap.names}
        y = _observe(tap, use, y, saved, given, slots)
    return y


MARK = "curvtrain_call_"
_USES = {"__call__": "call", "attend": "attend"}  # methods that use a layer's parameters


def _subclass(cls: type, prefix: str, wrap: Callable[[Callable[..., Any], str], Callable[..., Any]]) -> type:
    """A subclass of a module's class with the methods that use its parameters wrapped."""
    methods = {name: wrap(getattr(cls, name), use) for name, use in _USES.items() if hasattr(cls, name)}
    return type(cls)(f"{prefix}{cls.__name__}", (cls,), methods)


def bound(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the input, the other arguments by name) of a call, however they were passed."""
    _, (_, x), *options = inspect.signature(method).bind(*args, **kwargs).arguments.items()
    return x, dict(options)


@functools.cache
def _tapped(cls: type) -> type:
    def wrap(method, use):
        @functools.wraps(method)
        def tapped(*args, **kwargs):
            return _apply(args[0], use, method(*args, **kwargs), *bound(method, args, kwargs))

        return tapped

    return _subclass(cls, "Tapped", wrap)


def modules_of(module: nnx.Module) -> list[tuple[Path, Any]]:
    """All modules by path. A list: adding attributes to them changes what iterating finds."""
    return list(nnx.iter_modules(module))


def attach(module: nnx.Module, taps: Mapping[Path, tuple[Tap, ...]], arrays: Mapping[str, Arrays]) -> None:
    """Taps the modules at these paths, in place.

    Args:
      module: a model that nobody else uses.
      taps: by path.
      arrays: for each layer's name, its slots and given arrays by name, with the layer's scan axes first.
    """
    for path, m in modules_of(module):
        if path in taps:
            m.curvature_taps = taps[path]
            for i, tap in enumerate(taps[path]):
                for name in (*tap.names, *tap.given):
                    setattr(m, f"slot_{i}_{name}", Slot(arrays[tap.layer.name][name]))
            m.__class__ = _tapped(type(m))


# -- calls -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Seen:
    """One call of a module, as it was traced.

    Attributes:
      shape: of the input.
      mapped: lengths of the axes over which `jax.vmap` mapped the input.
      differentiated: whether the model takes a derivative of the output.
      mark: name of the function that marks the call's output in a jaxpr; empty where nothing is to be marked.
      size: of that output, without axes of `jax.vmap`.
    """

    shape: tuple[int, ...]
    mapped: list[int]
    differentiated: bool = False
    mark: str = ""
    size: int = 0


class Record:
    """What a recorder saw, filled while a model is traced: calls by the module's path. Compared by identity.

    Attributes:
      maps: whether to note `jax.vmap`, too; such a model cannot be differentiated.
    """

    def __init__(self, maps: bool):
        self.calls: dict[Path, list[Seen]] = {}
        self.maps, self.marks = maps, 0


@functools.cache
def _recording(cls: type) -> type:
    def wrap(method, use):
        @functools.wraps(method)
        def recording(*args, **kwargs):
            path, names, record = args[0].curvature_record
            x = jnp.asarray(bound(method, args, kwargs)[0])
            seen = Seen(x.shape, [])
            record.calls.setdefault(path, []).append(seen)
            y = _note_derivatives(method(_without_parameters(args[0], names), *args[1:], **kwargs), seen)
            if not record.maps:
                return y
            record.marks += 1
            seen.mark, seen.size = f"{MARK}{record.marks}", max(y.size, 1)
            return _probe(y, x, seen)

        return recording

    return _subclass(cls, "Recording", wrap)


def _without_parameters(module: Any, names: tuple[str, ...]) -> Any:
    """A copy with zeros for these parameters: what still depends on them then uses them outside of the layer."""
    ghost: Any = nnx.clone(module)
    for name in names:
        variable = getattr(ghost, name)
        variable.set_value(jnp.zeros(variable.shape, variable.dtype))
    return ghost


def _note_derivatives(y: PyTree, seen: Seen) -> PyTree:
    """y, and a note if somebody differentiates it: JAX asks for the rule only then."""

    @jax.custom_jvp
    def note(y):
        return y

    @note.defjvp
    def _(primals, tangents):
        seen.differentiated = True
        return primals[0], tangents[0]

    return note(y)


def _probe(y: jax.Array, x: jax.Array, seen: Seen) -> jax.Array:
    """y, a note of every vmap over x, and a mark in the jaxpr."""

    @jax.custom_batching.custom_vmap
    def probe(y, x):
        return y

    @probe.def_vmap
    def _(size, batched, y, x):
        if batched[1]:
            seen.mapped.append(size)
        return probe(y, x), batched[0]

    def marked(y, x):
        return probe(y, x)

    marked.__name__ = seen.mark
    return jax.jit(marked)(y, x)


def record_calls(module: nnx.Module, layers: Mapping[Path, tuple[Layer, ...]], maps: bool) -> Record:
    """Makes the modules at these paths record the shapes of their inputs, in place; they compute with zeros."""
    record = Record(maps)
    for path, m in modules_of(module):
        if path in layers:
            names = tuple(name for layer in layers[path] for name, _ in layer.shapes)
            m.curvature_record = path, names, record
            m.__class__ = _recording(type(m))
    return record
