"""The entries of a batch that weight its examples: which they are, what they may hold, and their product."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvtrain._dtypes import width
from curvtrain.losses.masking import one_or_nan

RESERVED = ("mask", "weights")  # the entries of a batch that weight its examples by default


@dataclasses.dataclass(frozen=True)
class KnownWeights:
    """The weights of examples as far as the batch alone gives them, in the shapes of its entries.

    Attributes:
      mask: zeros and ones, (batch,) or (batch, time, ...); None where no example is masked.
      scale: any other weights, zero or more; None where there are none.
    """

    mask: jax.Array | None = None
    scale: jax.Array | None = None

    @property
    def product(self) -> jax.Array | None:
        """mask * scale, or None where every example counts the same."""
        return times(self.mask, self.scale)


def checked_names(option: str, names: Any) -> tuple[str, ...] | None:
    """The option `weighted_by` as a tuple of names, or None. Raises TypeError."""
    if names is None or isinstance(names, str):
        return names if names is None else (names,)
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"{option} should name entries of the batch, such as 'mask' or ('mask', 'weights'), or be (), for none; it "
            f"is {names!r}."
        )
    return tuple(names)


def weighing_entries(loss: str, batch: Any, names: tuple[str, ...] | None, targets: tuple[str, ...]) -> dict[str, Any]:
    """The entries that weight examples, by name.

    Args:
      loss: its class, for the message.
      batch: anything; only a mapping can carry weights.
      names: as `weighted_by` gives them; None for `RESERVED`, as far as the batch has them and they are no targets.
      targets: the entries that the loss reads.

    Raises:
      KeyError: one of the names is not in the batch.
    """
    if names is None:
        given = batch if isinstance(batch, Mapping) else {}
        could = lambda name: name in given and name not in targets and not isinstance(given[name], Mapping)
        return {name: given[name] for name in RESERVED if could(name)}
    return {name: entry_of(batch, name, f"{loss}(weighted_by)") for name in names}


def entry_of(batch: Any, key: str, option: str) -> Any:
    """batch[key]. Raises KeyError, naming the loss's option and the entries that there are."""
    if not isinstance(batch, Mapping) or key not in batch:
        have = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise KeyError(f"{option}={key!r} is not in the batch, which has {have}.")
    return batch[key]


def is_mask(name: str, entry: Any) -> bool:
    """Says whether an entry's values are zeros and ones: by its name, or by its dtype."""
    return name == "mask" or entry.dtype == np.bool_


def check_values(name: str, entry: np.ndarray, otherwise: str = "pass the loss weighted_by=()") -> None:
    """Raises TypeError or ValueError unless a mask holds zeros and ones, and weights finite numbers of zero or more.

    Args:
      name: of the entry.
      entry: its values.
      otherwise: what to do if the entry was never meant to weight anything.
    """
    if entry.dtype == np.bool_ or not entry.size:
        return
    if not any(jnp.issubdtype(entry.dtype, kind) for kind in (np.integer, np.floating)):
        raise TypeError(f"batch[{name!r}] weights the examples and should hold numbers, not {entry.dtype}.")
    if name == "mask":
        wrong = (entry != 0) & (entry != 1)
        should = (
            "a mask should be bool, or 0 and 1: of an additive mask pass mask == 0, and weights in an entry 'weights'"
        )
    else:
        wrong = ~np.isfinite(entry) | (entry < 0)
        should = "weights should be finite numbers of zero or more"
    if np.any(wrong):
        raise ValueError(
            f"batch[{name!r}] weights the examples and holds {entry[wrong][0]}; {should}. If it is something else, "
            f"{otherwise}."
        )


def valid_values(name: str, entry: Any, otherwise: str = "pass the loss weighted_by=()") -> jax.Array:
    """An entry as weights: NaN where they are wrong, and an error, as in `check_values`, if they are known.

    They are float64 if the entry is, else float32.
    """
    dtype = width(entry)
    if entry.dtype == np.bool_:
        return jnp.asarray(entry, dtype)
    if isinstance(entry, jax.core.Tracer) or (isinstance(entry, jax.Array) and not entry.is_fully_addressable):
        right = (entry == 0) | (entry == 1) if name == "mask" else jnp.isfinite(entry) & (entry >= 0)
        return entry.astype(dtype) * one_or_nan(right, dtype)
    check_values(name, np.asarray(entry), otherwise)
    return jnp.asarray(entry, dtype)


def spread(entry: Any, shape: tuple[int, ...]) -> Any:
    """An entry whose shape begins `shape`, with axes of length one for the rest."""
    return entry.reshape(entry.shape + (1,) * (len(shape) - entry.ndim))


def times(a: Any, b: Any) -> Any:
    """The product of two arrays of which one's shape begins the other's; None is one."""
    if a is None or b is None:
        return b if a is None else a
    ndim = max(a.ndim, b.ndim)
    return spread(a, (1,) * ndim) * spread(b, (1,) * ndim)


def traced_reads(function: Callable[[dict[str, Any]], Any], entries: dict[str, Any]) -> tuple[Any, list[str]]:
    """(shapes of what the function returns, the names of the entries that it depends on)."""
    names = sorted(entries)  # the order in which JAX flattens dicts
    program, shapes = jax.make_jaxpr(function, return_shape=True)(entries)
    used = _used(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return shapes, [name for name, is_used in zip(names, used, strict=True) if is_used]


def _used(jaxpr: Any, outputs: list[bool]) -> list[bool]:
    """Which inputs of a program some of its outputs depend on."""
    is_variable = lambda v: not hasattr(v, "val")  # a literal is none
    live = {v for v, used in zip(jaxpr.outvars, outputs, strict=True) if used and is_variable(v)}
    for eqn in reversed(jaxpr.eqns):
        outs = [v in live for v in eqn.outvars]
        if any(outs):
            nested = eqn.primitive.name in ("jit", "pjit")  # these keep arguments that they do not use
            ins = _used(eqn.params["jaxpr"].jaxpr, outs) if nested else [True] * len(eqn.invars)
            live |= {v for v, used in zip(eqn.invars, ins, strict=True) if used and is_variable(v)}
    return [v in live for v in jaxpr.invars]


def loss_only_weights(piece: Any, examples: int) -> jax.Array:
    """The weights of the examples of a piece, one of several, of which only the mean loss is known.

    Args:
      piece: anything; the entries `mask` and `weights` of a mapping are taken as the weights of its mean.
      examples: how many there are.

    Returns:
      (examples,), or (examples, time) for an entry of that shape, float64 if an entry is, else float32.

    Raises:
      ValueError: an entry that has another shape, or that does not hold weights.
    """
    rename = "give it another name, or leave out microbatch"
    product = jnp.ones((examples,), jnp.float32)
    for name, entry in weighing_entries("", piece, None, ()).items():
        entry = entry if isinstance(entry, jax.Array) else np.asarray(entry)
        if entry.ndim not in (1, 2) or entry.shape[0] != examples:
            raise ValueError(
                f"batch[{name!r}] has shape {entry.shape}, which is not one weight for each of {examples} examples or "
                f"of their positions, so it is not known how much a micro-batch counts in the mean loss that "
                f"Objective.from_loss was given. If it is something else, {rename}."
            )
        product = times(product, valid_values(name, entry, rename))
    return product
