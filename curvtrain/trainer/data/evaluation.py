"""Batches for evaluation: every example once, in order, in batches of one size."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import numpy as np

from curvtrain.objective import batch_size as size_of
from curvtrain.trainer.data.nested import Batch, check_alike, check_arrays, map_arrays
from curvtrain.trainer.data.training import grain_batches

ENDLESS = 2**40  # batches: grain gives a dataset that repeats a greater length


def eval_batches(
    data: Any, batch_size: int, argument: str = "eval_data", check: Callable[[Batch], None] | None = None
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Batches of exactly `batch_size` rows over the whole of `data`, in order, and which of their rows are real.

    The last batch is padded with copies of its last row. Which rows are real is a bool array (batch_size,) beside the
    batch: an entry of the batch could have the name of one of the data's own.

    Args:
      data: a dict of arrays, or a finite grain dataset of batches of any sizes.
      batch_size: rows per batch.
      argument: the name by which errors call the data.
      check: called with every batch of a dataset; of arrays, `first_and_sample` gives all.
    """
    if isinstance(data, Mapping):
        arrays = check_arrays(argument, data)
        starts = range(0, size_of(arrays), batch_size)
        cut = lambda start: map_arrays(lambda a: a[start : start + batch_size], arrays)
        pieces: Iterator[Batch] = map(cut, starts)
    elif isinstance(data, grain.MapDataset | grain.IterDataset):
        if isinstance(data, grain.MapDataset) and len(data) > ENDLESS:
            raise ValueError(
                f"{argument} repeats without end, and would be evaluated without end; leave out .repeat()."
            )
        pieces = _recut(_checked(grain_batches(argument, data), argument, check), batch_size)
    else:
        raise TypeError(
            f"{argument} should be a dict of numpy arrays or a finite grain dataset, not {type(data).__name__}."
        )
    for piece in pieces:
        yield _padded(piece, batch_size)


def first_and_sample(data: Any, batch_size: int, argument: str) -> tuple[Batch, Batch]:
    """(the first evaluation batch, the examples whose targets are checked): all arrays, or that batch of a dataset."""
    first, _ = next(eval_batches(data, batch_size, argument), (None, None))
    if first is None:
        raise ValueError(f"{argument} is an empty grain dataset.")
    return first, check_arrays(argument, data if isinstance(data, Mapping) else first)


def _checked(batches: Any, argument: str, check: Callable[[Batch], None] | None) -> Iterator[Batch]:
    """The batches, each of which is like the first and passes the check."""
    first: Batch | None = None
    for batch in batches:
        first = check_arrays(argument, batch) if first is None else first
        check_alike(argument, batch, first, length=False)
        if check is not None:
            check(batch)
        yield batch


def _recut(batches: Any, size: int) -> Iterator[Batch]:
    """Batches of any sizes as batches of `size`, the last one shorter."""
    held: Batch = {}
    for batch in batches:
        held = map_arrays(lambda a, b: np.concatenate([a, b]), held, batch) if held else batch
        while size_of(held) >= size:
            yield map_arrays(lambda a: a[:size], held)
            held = map_arrays(lambda a: a[size:], held)
    if held and size_of(held):
        yield held


def _padded(batch: Batch, size: int) -> tuple[Batch, np.ndarray]:
    rows = size_of(batch)
    extra = size - rows
    pad = lambda a: np.concatenate([a, np.repeat(a[-1:], extra, axis=0)]) if extra else a
    return map_arrays(pad, batch), np.arange(size) < rows
