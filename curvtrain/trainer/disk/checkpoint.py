"""Checkpoints: one orbax composite per step, saved asynchronously, restored strictly, falling back loudly.

A checkpoint named by its step holds

| item | content |
|---|---|
| `state` | the `TrainState`: parameters, optimizer, curvature, model state |
| `meta` | JSON: the run's description (trainer, data, seed), versions, positions of the data iterators, scores |

This package is the only one that knows orbax.
"""

import contextlib
import functools
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax

from curvtrain.trainer.config import TrainerConfig
from curvtrain.trainer.disk.reading import DAMAGE, META, STATE, CheckpointError, read_meta, short, steps_in
from curvtrain.trainer.disk.restoring import restore_newest
from curvtrain.trainer.disk.retention import Retention
from curvtrain.trainer.disk.saving import ELSEWHERE, REMOVED, UNFINISHED, Save
from curvtrain.trainer.mesh import distributed

PyTree = Any

log = logging.getLogger("curvtrain")


class Checkpoints:
    """The checkpoints of one workdir. A context manager: leaving it waits for the save under way.

    A save that fails (a full disk) is reported and cleared away, and training goes on: older checkpoints stay, the next
    save tries again. Leaving the context raises CheckpointError if the last save failed.

    Several processes make one checkpoint, which exists for all of them or for none: each writes its shards with orbax's
    handlers; process 0 makes the folder, and gives it its name when all have written. All learn of the result, and of
    a failure anywhere, when the next save begins or the run ends. (Orbax's own manager does not tell the other
    processes of a failure; they wait in its barriers.)
    """

    def __init__(self, config: TrainerConfig):
        self.folder = Path(config.workdir or "").absolute()
        self._retention = Retention(config)
        self._under_way: Save | None = None
        self._failure: str | None = None  # why the newest save failed, if it did
        self._steps: list[int] = []
        for step, scores in distributed.from_first(self._open):
            self._steps.append(step)
            self._retention.rank(step, scores)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        self._wait(agree=kind is None)  # after an error the other processes may be anywhere
        if jax.process_index() == 0:
            self._clear_leftovers()  # a writer that failed may have left something after it was given up
        if self._failure is not None and kind is None:
            raise CheckpointError(f"The last checkpoint was not written. {self._failure}")

    @property
    def steps(self) -> list[int]:
        """Steps that are on disk, or on their way there, ascending."""
        return sorted({*self._steps, *([] if self._under_way is None else [self._under_way.step])})

    def save(self, step: int, state: PyTree, meta: dict[str, Any], scores: dict[str, float] | None) -> bool:
        """Starts to save in the background; False, with a message, if that fails at once. All processes call it.

        Args:
          step: names the checkpoint. A checkpoint of this name that exists is left as it is.
          state: arrays; the caller may donate them as soon as this returns.
          meta: plain JSON; anything else raises TypeError.
          scores: the evaluation at this step by which checkpoints are ranked, if there was one.
        """
        self._wait()
        if step in self._steps:
            return True
        meta = _plain({**meta, "scores": scores or {}})
        self._retention.rank(step, meta["scores"])
        self._failure = None
        try:
            distributed.from_first(lambda: self._make_room(self._unfinished(step)))
        except OSError as error:
            self._failed(step, short(error))
            return False
        self._under_way = Save(
            self._unfinished(step), step, state, meta, self._steps, self._retention.kept([*self._steps, step])
        )
        self._under_way.begin()
        return True

    def restore(self, target: PyTree, expected: dict[str, Any]) -> tuple[PyTree, dict[str, Any]]:
        """Restores the newest checkpoint that all processes can read. Newer ones are set aside, with a warning.

        Args:
          target: the abstract state with shardings: the checkpoint may come from another mesh.
          expected: the run's description; every entry should equal the checkpoint's.

        Returns:
          (the state, the checkpoint's metadata).

        Raises:
          Mismatch: the checkpoint belongs to another run. This never falls back, and deletes nothing.
          CheckpointError: none can be read.
        """
        found = restore_newest(self.folder, self.steps, target, expected)
        for broken, reason in found.damaged.items():
            message = f"Checkpoint {broken} in {self.folder} is damaged; going on from checkpoint {found.step}."
            warnings.warn(f"{message} ({reason})", RuntimeWarning, stacklevel=5)
            distributed.from_first(functools.partial(self._set_aside, broken))
            self._steps.remove(broken)
        return found.state, found.meta

    def try_out(self, state: PyTree, meta: dict[str, Any]) -> None:
        """Saves under another name, waits, and removes it: what keeps a run from being saved is found as it begins.

        Raises:
          CheckpointError: it cannot be saved; the message says why. On all processes.
        """
        self._wait()
        meta, unfinished = _plain(meta), self.folder / f"first{UNFINISHED}"
        problem = None
        try:
            distributed.from_first(lambda: self._make_room(unfinished))
        except OSError as error:
            problem = short(error)
        if problem is None:
            save = Save(unfinished, 0, state, meta, [], [], trial=True)
            save.begin()
            save.join()
            problem = distributed.first_problem(save.problem)
        if problem is not None:
            raise CheckpointError(
                f"TrainerConfig(workdir={str(self.folder)!r}): a first save, tried before training begins, failed: "
                f"{problem} Make room there, or choose another workdir."
            )

    def _unfinished(self, step: int) -> Path:
        return self.folder / f"{step}{UNFINISHED}"

    def _wait(self, agree: bool = True) -> None:
        """Waits for the save under way and takes note of its result."""
        save, self._under_way = self._under_way, None
        if save is None:
            return
        save.join()
        problems = distributed.gather(save.problem) if agree else [save.problem]
        if agree and problems[0] is None:  # process 0 has given it its name
            self._steps = save.keep
            return
        for index, problem in enumerate(problems):
            if problem not in (None, ELSEWHERE):
                where = f" (process {index} of {len(problems)})" if len(problems) > 1 else ""
                self._failed(save.step, f"{problem}{where}")
                return
        if problems[0] is not None:  # then it is ELSEWHERE
            self._failed(save.step, ELSEWHERE)

    def _failed(self, step: int, problem: str) -> None:
        self._failure = f"Saving step {step} failed: {problem} On disk in {self.folder}: {self._steps}."
        if jax.process_index() == 0:
            log.error("%s Training goes on; the next save tries again.", self._failure)

    # -- of process 0 ----------------------------------------------------------------------------------------------

    def _open(self) -> list[tuple[int, dict[str, float]]]:
        """Makes the folder if it is not there and clears unfinished saves; returns the steps in it and their scores."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear_leftovers()
        found = []
        for step in steps_in(self.folder):
            scores = {}
            with contextlib.suppress(*DAMAGE):  # `restore` reports it
                scores = dict(read_meta(self.folder / str(step))["scores"])
            found.append((step, scores))
        return found

    def _clear_leftovers(self) -> None:
        for leftover in (*self.folder.glob(f"*{UNFINISHED}*"), *self.folder.glob(f"{REMOVED}*")):
            shutil.rmtree(leftover, ignore_errors=True)

    def _make_room(self, unfinished: Path) -> None:
        """Makes the folders into which all processes write."""
        self._clear_leftovers()
        for item in (STATE, META):
            (unfinished / item).mkdir(parents=True)

    def _set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, so that its step can be saved again; nothing is deleted."""
        aside = self.folder / f"damaged-{step}"
        shutil.rmtree(aside, ignore_errors=True)  # left by an earlier run
        (self.folder / str(step)).rename(aside)


def _plain(meta: dict[str, Any]) -> dict[str, Any]:
    """A copy: a hook may change the dicts that it handed out. Raises TypeError for values that are not JSON."""
    return json.loads(json.dumps(meta))
