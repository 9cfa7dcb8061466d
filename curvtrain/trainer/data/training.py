"""Training batches as a pure function of (seed, step), from arrays in memory or from a grain dataset.

Arrays go through a grain source whose elements are whole batches: a batch is one gather. The position is the step, so a
run resumes exactly, on any number of processes: every process takes its rows of the same global batch.
"""

import abc
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import grain
import numpy as np

from curvtrain.objective import batch_size as size_of
from curvtrain.trainer.data.fingerprint import checksum, rows_checksum
from curvtrain.trainer.data.nested import Batch, check_alike, check_arrays, map_arrays
from curvtrain.trainer.mesh import distributed

READ = grain.ReadOptions(num_threads=8, prefetch_buffer_size=16)  # in whole batches: grain's own 500 fill the memory
TRAIN, CURVATURE = 0, 1  # streams: the batches that refreshes draw never shift the order of the training data


class Batches(Protocol):
    """An iterator whose position can be saved."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class TrainData(abc.ABC):
    """Endless training batches, this process's rows of each.

    Attributes:
      check: called with every batch that was not part of the sample; raises if the run cannot take it.
    """

    check: Callable[[Batch], None] | None = None

    @abc.abstractmethod
    def iterator(self, stream: int = TRAIN, multiple: int = 1) -> Batches:
        """A fresh iterator whose batches hold `multiple` times the training batch."""

    @abc.abstractmethod
    def first(self) -> Batch:
        """The first training batch: for shapes, checks and the fingerprint."""

    @abc.abstractmethod
    def sample(self) -> Batch:
        """The examples that the loss checks before the run: all arrays, or the first batch of a dataset."""

    @abc.abstractmethod
    def description(self) -> dict[str, Any]:
        """Describes the data as plain JSON: a run is resumed only if the description is unchanged."""


class ArrayData(TrainData):
    """Shuffled epochs over arrays in memory; examples that do not fill a batch are left to the next shuffle."""

    def __init__(self, arrays: Mapping[str, Any], batch_size: int, seed: int, shard: int = 0, shards: int = 1):
        self.arrays = check_arrays("train_data", arrays)
        self.batch_size, self.seed, self.shard, self.shards = batch_size, seed, shard, shards
        examples = size_of(self.arrays)
        if examples < batch_size:
            raise ValueError(f"train_data has {examples} examples, fewer than TrainerConfig(batch_size={batch_size}).")

    def iterator(self, stream=TRAIN, multiple=1):
        size = self.batch_size * multiple
        if size_of(self.arrays) < size:
            raise ValueError(
                f"CurvatureSchedule(batch_size={size}) is more than the {size_of(self.arrays)} examples of train_data."
            )
        source = self._source(stream, size, self.shard, self.shards)
        # no prefetch thread: a gather costs less than handing a batch from one thread to another
        return iter(grain.MapDataset.source(source).to_iter_dataset(grain.ReadOptions(num_threads=0)))

    def first(self):
        return next(self.iterator())

    def sample(self):
        return self.arrays

    def description(self):
        return {
            "source": "arrays",
            "examples": size_of(self.arrays),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "checksum": checksum(self._source(TRAIN, self.batch_size, 0, 1)[0]),  # the global batch's
        }

    def _source(self, stream: int, size: int, shard: int, shards: int) -> "_Shuffled":
        return _Shuffled(self.arrays, size, (self.seed, stream), shard, shards)


class GrainData(TrainData):
    """A grain dataset whose elements are batches: its order, shuffling and repetition are its own.

    With several processes each one's dataset yields its own rows of every batch. If it takes every n-th example of a
    common order, as in `dataset.shuffle(seed)[process::processes].repeat().batch(rows, drop_remainder=True)`, global
    batches are the same on any number of processes, so a run goes on where it stopped though their number changed.
    """

    def __init__(self, dataset: grain.MapDataset | grain.IterDataset, batch_size: int, shard: int = 0, shards: int = 1):
        self.dataset, self.batch_size = dataset, batch_size
        try:
            self._first = check_arrays("train_data", next(iter(grain_batches("train_data", dataset))))
        except StopIteration:
            raise ValueError("train_data is an empty grain dataset.") from None
        found, wanted = size_of(self._first), batch_size // shards
        if found != wanted:
            raise ValueError(
                f"train_data yields batches of {found} examples, but TrainerConfig(batch_size={batch_size}) over "
                f"{shards} processes needs {wanted}: end the dataset with .batch({wanted}, drop_remainder=True)."
            )
        sums = dict(distributed.gather((shard, rows_checksum(self._first))))
        if len(set(sums.values())) < len(sums):
            warnings.warn(
                "train_data begins with the same examples on several processes, which then compute the same. Split it: "
                "dataset[jax.process_index() :: jax.process_count()] before batches are made.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._checksum = f"{sum(sums.values()) % 2**32:08x}"

    def iterator(self, stream=TRAIN, multiple=1):
        dataset = grain_batches("train_data", self.dataset).map(self._checked)  # in grain's threads, if it has some
        return _Endless(iter(dataset if multiple == 1 else dataset.batch(multiple, drop_remainder=True).map(_flatten)))

    def first(self):
        return self._first

    def sample(self):
        return self._first

    def description(self):
        return {
            "source": type(self.dataset).__name__,
            "batch_size": self.batch_size,
            "checksum": self._checksum,  # the global batch's, whichever process holds which rows
        }

    def _checked(self, batch: Batch) -> Batch:
        check_alike("train_data", batch, self._first, length=True)
        if self.check is not None:
            self.check(batch)
        return batch


def make_train_data(data: Any, batch_size: int, seed: int, shard: int = 0, shards: int = 1) -> TrainData:
    """`train_data` as given to a Trainer, as batches for this process. Raises TypeError for anything else.

    Args:
      data: the Trainer's argument.
      batch_size: examples of the global batch.
      seed: the run's seed, of which the order is a function.
      shard, shards: this process holds piece `shard` of the `shards` equal pieces of every batch.
    """
    if isinstance(data, grain.MapDataset | grain.IterDataset):
        return GrainData(data, batch_size, shard, shards)
    if isinstance(data, Mapping):
        return ArrayData(data, batch_size, seed, shard, shards)
    raise TypeError(
        f"train_data should be a dict of numpy arrays or a grain dataset of batches, not {type(data).__name__}."
    )


class _Shuffled(grain.sources.RandomAccessDataSource[Batch]):
    """A grain source of batches: batch i of epoch e is a slice of permutation(seed, e), a pure function of the step."""

    def __init__(self, arrays: Batch, size: int, seed: tuple[int, ...], shard: int, shards: int):
        self._arrays, self._size = arrays, size
        self._rows = slice(shard * size // shards, (shard + 1) * size // shards)  # in the global batch's order
        examples = size_of(arrays)
        self._per_epoch = examples // size
        permutation = lambda epoch: np.random.default_rng([*seed, epoch]).permutation(examples)
        self._permutation = functools.lru_cache(maxsize=2)(permutation)

    def __len__(self) -> int:
        return 2**31 - 1  # steps, not examples

    def __getitem__(self, index: int) -> Batch:
        epoch, i = divmod(int(index), self._per_epoch)
        rows = self._permutation(epoch)[i * self._size : (i + 1) * self._size][self._rows]
        return map_arrays(lambda a: a[rows], self._arrays)


class _Endless:
    """The batches of a grain dataset. Their end is an error, because only the dataset itself can repeat them."""

    def __init__(self, batches: grain.DatasetIterator):
        self._batches = batches
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self) -> Batch:
        try:
            return next(self._batches)
        except StopIteration:
            raise ValueError(
                "train_data ended before the run did: a grain dataset for training should repeat, as in "
                "dataset.repeat().batch(batch_size, drop_remainder=True)."
            ) from None


def grain_batches(argument: str, dataset: grain.MapDataset | grain.IterDataset) -> grain.IterDataset:
    """The elements of a dataset as dicts of numpy arrays."""
    iterable = dataset.to_iter_dataset(READ) if isinstance(dataset, grain.MapDataset) else dataset
    return iterable.map(functools.partial(_as_batch, argument))


def _as_batch(argument: str, element: Any) -> Batch:
    if not isinstance(element, Mapping):
        raise TypeError(f"{argument} should yield batches, dicts of arrays, not {type(element).__name__}.")
    return map_arrays(np.asarray, element)


def _flatten(batches: Batch) -> Batch:
    """(multiple, batch, ...) -> (multiple * batch, ...)."""
    return map_arrays(lambda a: a.reshape(-1, *a.shape[2:]), batches)
