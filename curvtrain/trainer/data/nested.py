"""Batches as dicts of arrays, whose values may be dicts again: {"image": {"left": ..., "right": ...}, "label": ...}."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Batch = dict[str, Any]  # nested; its leaves are numpy arrays with one row per example


def map_arrays(function: Callable[..., Any], batch: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """Applies `function` to every array of a batch, and to the arrays of the same name in the other batches.

    Lists are arrays here, not containers as in `jax.tree.map`; names keep their order.
    """

    def apply(value, *rest):
        return map_arrays(function, value, *rest) if isinstance(value, Mapping) else function(value, *rest)

    return {name: apply(value, *(other[name] for other in others)) for name, value in batch.items()}


def by_name(batch: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The arrays of a batch by their paths, such as "image/left"."""
    found = {}
    for name, value in batch.items():
        found |= by_name(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def check_arrays(argument: str, arrays: Mapping[str, Any]) -> Batch:
    """The batch with its leaves as numpy arrays of one length.

    Raises:
      TypeError, ValueError: names the array that is none, or whose length differs, by its path.
    """
    if not arrays:
        raise ValueError(f"{argument} is an empty dict; it should hold arrays such as 'image' and 'label'.")
    for name, value in by_name(arrays).items():
        if flaw := _flaw(value):
            raise TypeError(f"{argument}[{name!r}] should be an array of numbers, a row per example; it is {flaw}.")
    checked = map_arrays(np.asarray, arrays)
    lengths = {name: len(array) for name, array in by_name(checked).items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"The arrays of {argument} should have one length, the number of examples, not {lengths}. Groups of "
            f"unequal length, such as interior and boundary points, can be rows of the same arrays, with an entry that "
            f"says which group a row belongs to."
        )
    if not lengths or 0 in lengths.values():
        raise ValueError(f"{argument} has no examples.")
    return checked


def check_alike(argument: str, batch: Mapping[str, Any], first: Mapping[str, Any], *, length: bool) -> None:
    """Raises ValueError unless a batch has the entries of the first one, in their dtypes and shapes.

    Args:
      argument: the name by which errors call the data.
      batch: any batch.
      first: the first one.
      length: whether the number of examples should be the same, too.
    """
    arrays, wanted = by_name(batch), by_name(first)
    if odd := sorted(arrays.keys() ^ wanted.keys()):
        raise ValueError(
            f"{argument} should yield batches of the same entries; {', '.join(odd)} is not in all of them."
        )
    lengths = {name: np.shape(array)[0] if np.ndim(array) else "a scalar" for name, array in arrays.items()}
    examples = next(iter(lengths.values()))
    if len(set(lengths.values())) > 1 or examples == "a scalar":
        raise ValueError(f"A batch of {argument} should have arrays of one length, a row per example, not {lengths}.")
    for name, array in arrays.items():
        like, dtype = wanted[name], jax.dtypes.canonicalize_dtype
        if array.shape[1:] != like.shape[1:] or dtype(array.dtype) != dtype(like.dtype):
            raise ValueError(
                f"{argument} yields {name!r} as {array.dtype} with rows of shape {array.shape[1:]} after {like.dtype} "
                f"with rows of shape {like.shape[1:]}: all batches should be alike."
            )
    wanted_length = len(next(iter(wanted.values())))
    if length and examples != wanted_length:
        raise ValueError(
            f"{argument} yields a batch of {examples} examples after batches of {wanted_length}: end the dataset with "
            f".batch({wanted_length}, drop_remainder=True), or .repeat() it before it is batched."
        )


def _flaw(value: Any) -> str:
    """Says why a value is not rows of numbers; empty if it is."""
    try:
        array = np.asarray(value)
    except ValueError:  # NumPy's error about ragged lists
        return "ragged"
    if array.ndim == 0:
        return "a scalar"
    numeric = any(jnp.issubdtype(array.dtype, kind) for kind in (np.number, np.bool_))
    return "" if numeric else f"of type {array.dtype} (ragged, or not numbers)"
