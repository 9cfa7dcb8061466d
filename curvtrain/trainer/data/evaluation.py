"""Batches for evaluation: every example once, in order, in batches of one size."""

from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from curvtrain.objective import batch_size as size_of
from curvtrain.trainer.data.nested import Batch, check_arrays, map_arrays
from curvtrain.trainer.data.training import grain_batches

ENDLESS = 2**40  # batches: grain gives a dataset that repeats a greater length


def eval_batches(data: Any, batch_size: int, argument: str = "eval_data") -> Iterator[Batch]:
    """Batches of exactly `batch_size` rows over the whole of `data`, in order; the last one is padded and masked.

    Padding repeats the last row. `mask` marks the real rows; if the data has a mask of its own, it is their product.

    Args:
      data: a dict of arrays, or a finite grain dataset of batches of any sizes.
      batch_size: rows per batch.
      argument: the name by which errors call the data.
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
        pieces = _recut(grain_batches(argument, data), batch_size)
    else:
        raise TypeError(
            f"{argument} should be a dict of numpy arrays or a finite grain dataset, not {type(data).__name__}."
        )
    for piece in pieces:
        yield _padded(piece, batch_size)


def first_and_sample(data: Any, batch_size: int, argument: str) -> tuple[Batch, Batch]:
    """(the first evaluation batch, the examples whose targets are checked): all arrays, or that batch of a dataset."""
    first = next(eval_batches(data, batch_size, argument), None)
    if first is None:
        raise ValueError(f"{argument} is an empty grain dataset.")
    return first, check_arrays(argument, data if isinstance(data, Mapping) else first)


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


def _padded(batch: Batch, size: int) -> Batch:
    real = size_of(batch)
    extra = size - real
    pad = lambda a: np.concatenate([a, np.repeat(a[-1:], extra, axis=0)]) if extra else a
    out = map_arrays(pad, batch)
    mask = np.arange(size) < real
    if "mask" in out:
        own = out["mask"]
        mask = own * mask.reshape((-1,) + (1,) * (own.ndim - 1)).astype(own.dtype)
    return {**out, "mask": mask}
