"""Batches as a pure function of (seed, step), from arrays in memory or from a grain dataset.

Arrays go through a batch-level grain source: a whole batch is one gather. The position is the step, so a run resumes
exactly, on any number of processes: every process takes its rows of the same global batch.
"""

import abc
import functools
import warnings
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np

from curvtrain.objective import batch_size as size_of
from curvtrain.trainer import distributed

Arrays = Mapping[str, np.ndarray]
Batch = dict[str, np.ndarray]
Positions = dict[str, Any]  # of the iterators "train" and "curvature"

READ = grain.ReadOptions(num_threads=8, prefetch_buffer_size=16)  # of whole batches: grain's own 500 fill the memory
ENDLESS = 2**40  # batches: grain's length of a dataset that repeats is larger
TRAIN, CURVATURE = 0, 1  # streams: what refreshes draw never shifts the order of the training data


class Batches(Protocol):
    """An iterator whose position can be saved."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class TrainData(abc.ABC):
    """Endless training batches, this process's rows of each."""

    @abc.abstractmethod
    def iterator(self, stream: int = TRAIN, multiple: int = 1) -> Batches:
        """A fresh iterator whose batches hold `multiple` times the training batch."""

    @abc.abstractmethod
    def first(self) -> Batch:
        """The first training batch: for shapes, checks and the fingerprint."""

    @abc.abstractmethod
    def sample(self) -> Batch:
        """What the loss checks once on the host: all of the data if it is in memory, else the first batch."""

    @abc.abstractmethod
    def description(self) -> dict[str, Any]:
        """What the data is made of, as plain JSON: a run is resumed only if it is unchanged."""


class ArrayData(TrainData):
    """Shuffled epochs over arrays in memory; what does not fill a batch is left to the next shuffle."""

    def __init__(self, arrays: Arrays, batch_size: int, seed: int, shard: int = 0, shards: int = 1):
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
            "checksum": checksum(self._source(TRAIN, self.batch_size, 0, 1)[0]),  # of the global batch
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
            self._first = check_arrays("train_data", next(iter(_batches("train_data", dataset))))
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
        dataset = _batches("train_data", self.dataset)
        return _Endless(iter(dataset if multiple == 1 else dataset.batch(multiple, drop_remainder=True).map(_flatten)))

    def first(self):
        return self._first

    def sample(self):
        return self._first

    def description(self):
        return {
            "source": type(self.dataset).__name__,
            "batch_size": self.batch_size,
            "checksum": self._checksum,  # of the global batch, whoever holds which of its rows
        }


def make_train_data(data: Any, batch_size: int, seed: int, shard: int = 0, shards: int = 1) -> TrainData:
    """`train_data` as given to a Trainer, as batches for this process. Raises TypeError for anything else.

    Args:
      data: `train_data`.
      batch_size, seed: of the run.
      shard, shards: which piece of every batch this process holds, of how many.
    """
    if isinstance(data, grain.MapDataset | grain.IterDataset):
        return GrainData(data, batch_size, shard, shards)
    if isinstance(data, Mapping):
        return ArrayData(data, batch_size, seed, shard, shards)
    raise TypeError(
        f"train_data should be a dict of numpy arrays or a grain dataset of batches, not {type(data).__name__}."
    )


def eval_batches(data: Any, batch_size: int, argument: str = "eval_data") -> Iterator[Batch]:
    """Batches of exactly `batch_size` rows over the whole of `data`, in order; the last one is padded and masked.

    Padding repeats the last row, and `mask` marks what is real (times a mask that the data has of its own). `argument`
    is what errors call the data.
    """
    if isinstance(data, Mapping):
        arrays = check_arrays(argument, data)
        examples = size_of(arrays)
        pieces: Iterator[Batch] = (
            {name: a[start : start + batch_size] for name, a in arrays.items()}
            for start in range(0, examples, batch_size)
        )
    elif isinstance(data, grain.MapDataset | grain.IterDataset):
        if isinstance(data, grain.MapDataset) and len(data) > ENDLESS:
            raise ValueError(
                f"{argument} repeats without end, and would be evaluated without end; leave out .repeat()."
            )
        pieces = _recut(_batches(argument, data), batch_size)
    else:
        raise TypeError(
            f"{argument} should be a dict of numpy arrays or a finite grain dataset, not {type(data).__name__}."
        )
    for piece in pieces:
        yield _padded(piece, batch_size)


def check_arrays(argument: str, arrays: Arrays) -> Batch:
    """The arrays as numpy arrays of one length. Raises TypeError or ValueError naming what is wrong with them."""
    if not arrays:
        raise ValueError(f"{argument} is an empty dict; it should hold arrays such as 'image' and 'label'.")
    out = {}
    for name, value in arrays.items():
        if flaw := _flaw(value):
            raise TypeError(f"{argument}[{name!r}] should be an array of numbers, a row per example; it is {flaw}.")
        out[name] = np.asarray(value)
    lengths = {name: len(array) for name, array in out.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"The arrays of {argument} should have one length, the number of examples, not {lengths}.")
    if 0 in lengths.values():
        raise ValueError(f"{argument} has no examples.")
    return out


def _flaw(value: Any) -> str:
    """What keeps a value from being rows of numbers, in words; empty if nothing does."""
    try:
        array = np.asarray(value)
    except ValueError:  # what NumPy says of ragged lists
        return "ragged"
    if array.ndim == 0:
        return "a scalar"
    numeric = any(jnp.issubdtype(array.dtype, kind) for kind in (np.number, np.bool_))
    return "" if numeric else f"of type {array.dtype} (ragged, or not numbers)"


def checksum(batch: Batch) -> str:
    """A CRC of a batch's names, shapes, dtypes and bytes."""
    crc = 0
    for name in sorted(batch):
        array = np.ascontiguousarray(batch[name])
        crc = zlib.crc32(f"{name}{array.shape}{array.dtype}".encode(), crc)
        crc = zlib.crc32(array.tobytes(), crc)
    return f"{crc:08x}"


def rows_checksum(batch: Batch) -> int:
    """A sum over a batch's examples of the CRCs of their names, shapes, dtypes and bytes: the order does not count."""
    rows = range(size_of(batch))
    return sum(int(checksum({name: array[row] for name, array in batch.items()}), 16) for row in rows) % 2**32


def saved_positions(own: Positions | None) -> Any:
    """The positions of all processes for a checkpoint: one if they are equal, as they are for arrays, else a list."""
    everyones = distributed.gather(own)
    return own if all(other == own for other in everyones) else everyones


def own_positions(saved: Any) -> Positions:
    """This process's entry of what `saved_positions` gave."""
    if isinstance(saved, Mapping):
        return dict(saved)
    if len(saved) != jax.process_count():
        raise ValueError(
            f"The checkpoint holds the positions of train_data on {len(saved)} processes, which differ, and this run "
            f"has {jax.process_count()}. Resume it on {len(saved)}: their number can change only where all positions "
            f"are equal, as with arrays."
        )
    return saved[jax.process_index()]


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
        return {name: array[rows] for name, array in self._arrays.items()}


class _Endless:
    """The batches of a grain dataset for training; their end is an error, for only the dataset can repeat itself."""

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


def _batches(argument: str, dataset: grain.MapDataset | grain.IterDataset) -> grain.IterDataset:
    """The elements of a dataset as dicts of numpy arrays."""
    iterable = dataset.to_iter_dataset(READ) if isinstance(dataset, grain.MapDataset) else dataset
    return iterable.map(functools.partial(_as_batch, argument))


def _as_batch(argument: str, element: Any) -> Batch:
    if not isinstance(element, Mapping):
        raise TypeError(f"{argument} should yield batches, dicts of arrays, not {type(element).__name__}.")
    return {name: np.asarray(value) for name, value in element.items()}


def _flatten(batches: Batch) -> Batch:
    """(multiple, batch, ...) -> (multiple * batch, ...)."""
    return {name: a.reshape(-1, *a.shape[2:]) for name, a in batches.items()}


def _recut(batches: Any, size: int) -> Iterator[Batch]:
    """Batches of any sizes as batches of `size`, the last one shorter."""
    held: Batch = {}
    for batch in batches:
        held = {name: np.concatenate([held[name], a]) for name, a in batch.items()} if held else batch
        while size_of(held) >= size:
            yield {name: a[:size] for name, a in held.items()}
            held = {name: a[size:] for name, a in held.items()}
    if held and size_of(held):
        yield held


def _padded(batch: Batch, size: int) -> Batch:
    real = size_of(batch)
    extra = size - real
    pad = lambda a: np.concatenate([a, np.repeat(a[-1:], extra, axis=0)]) if extra else a
    out = {name: pad(a) for name, a in batch.items()}
    mask = np.arange(size) < real
    if "mask" in out:
        own = out["mask"]
        mask = own * mask.reshape((-1,) + (1,) * (own.ndim - 1)).astype(own.dtype)
    return {**out, "mask": mask}
