"""The two streams of batches that a run draws from, and their positions, which are part of every checkpoint."""

from collections.abc import Mapping
from typing import Any

import jax

from curvtrain.trainer.data.nested import Batch
from curvtrain.trainer.data.training import CURVATURE, TRAIN, Batches, TrainData
from curvtrain.trainer.mesh import distributed

Positions = dict[str, Any]  # {"train": position, "curvature": position}


class Streams:
    """Training batches, and the wider batches that refreshes draw from a stream of their own.

    Between two calls of `fit` the streams are closed: the iterators, with their threads and buffers, are gone, and only
    their positions are kept.
    """

    def __init__(self, data: TrainData, refresh_multiple: int):
        self._data, self._multiple = data, refresh_multiple
        self._train: Batches | None = None
        self._curvature: Batches | None = None
        self._positions: Positions | None = None  # while closed

    def open(self, positions: Positions | None = None) -> None:
        """Makes the iterators, at these positions, or else where the streams were closed, or at the beginning."""
        positions = self._positions if positions is None else positions
        self._train = self._data.iterator(TRAIN)
        self._curvature = self._data.iterator(CURVATURE, self._multiple)
        if positions is not None:
            self._train.set_state(positions["train"])
            self._curvature.set_state(positions["curvature"])

    def close(self) -> None:
        """Drops the iterators and keeps their positions."""
        self._positions = self.positions
        self._train = self._curvature = None

    @property
    def positions(self) -> Positions | None:
        """The positions of this process's iterators; None before the first opening."""
        if self._train is None or self._curvature is None:
            return self._positions
        return {"train": self._train.get_state(), "curvature": self._curvature.get_state()}

    def next_training(self) -> Batch:
        """This process's examples of the next training batch."""
        assert self._train is not None
        return next(self._train)

    def next_curvature(self) -> Batch:
        """This process's examples of the next batch of a refresh."""
        assert self._curvature is not None
        return next(self._curvature)


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
