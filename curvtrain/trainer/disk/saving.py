"""Saving in the background: a thread per save, orbax's handlers, and the moment at which a checkpoint gets its name."""

import asyncio
import contextlib
import itertools
import json
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath  # orbax's paths

from curvtrain.trainer.disk.reading import META, STATE, for_orbax, short

PyTree = Any

UNFINISHED, REMOVED, WRITTEN = ".orbax-checkpoint-tmp", ".removed-", ".written-"  # WRITTEN: and the process's index
PATIENCE = 24 * 3600 * 1000  # ms that slow disks may take: JAX reports a process that is gone much sooner
ELSEWHERE = "another process did not write its part."

log = logging.getLogger("curvtrain")

_saves = itertools.count()  # over this process's life, alike on all processes: a barrier's name counts once


class Save(threading.Thread):
    """One save on this process: copies the arrays off the devices, writes them, and gives the checkpoint its name.

    Attributes:
      step: the step that is saved.
      keep: the steps whose checkpoints stay once this one is there.
      trial: whether it is to be written only, and then removed.
      problem: afterwards, why this process did not write its part, or None; on process 0, why there is no checkpoint.
    """

    def __init__(
        self,
        unfinished: Path,
        step: int,
        state: PyTree,
        meta: dict[str, Any],
        steps: list[int],
        keep: list[int],
        trial: bool = False,
    ):
        super().__init__(name=f"save of step {step}")
        self.step = step
        self.problem: str | None = None
        self.keep = keep
        self._replaced = [other for other in steps if other not in self.keep]
        self._unfinished, self._state, self._meta, self._trial = unfinished, state, meta, trial
        self._key = f"curvtrain/save/{next(_saves)}"
        self._all_have_written = ocp.multihost.get_barrier_sync_fn()
        self._is_copied = threading.Event()

    def begin(self) -> None:
        """Starts, and returns when the arrays are copied: the next step donates them."""
        self.start()
        self._is_copied.wait()

    def run(self) -> None:
        """The whole save; an error is left in `problem`."""
        try:
            self._write()
        except Exception as error:  # the file system's, orbax's or tensorstore's, of many types
            self.problem = short(error)
        finally:
            self._is_copied.set()
        try:
            self._all_have_written(key=self._key, timeout_ms=PATIENCE)
            if jax.process_index() == 0:
                self._finish()
        except Exception as error:
            self.problem = self.problem or short(error)
        if self.problem is not None and jax.process_index() == 0:
            shutil.rmtree(self._unfinished, ignore_errors=True)  # it takes the room that the next save needs

    def _write(self) -> None:
        """Writes this process's part, and then a mark that the part is whole."""
        with contextlib.closing(asyncio.new_event_loop()) as loop:  # asyncio.run() disturbs those of orbax's threads
            futures = loop.run_until_complete(self._start_writing())
        self._state = None
        self._is_copied.set()
        errors = [error for future in futures if (error := _error_of(future)) is not None]
        if errors:
            raise errors[0]
        (self._unfinished / f"{WRITTEN}{jax.process_index()}").touch()

    async def _start_writing(self) -> list[Any]:
        arrays, plain = (epath.Path(self._unfinished / item) for item in (STATE, META))
        futures = await ocp.StandardCheckpointHandler().async_save(arrays, args=ocp.args.StandardSave(self._state))
        more = await ocp.JsonCheckpointHandler().async_save(plain, args=ocp.args.JsonSave(self._meta))
        return [*(futures or []), *(more or [])]

    def _finish(self) -> None:
        """Makes it a checkpoint if all processes have written, and removes the checkpoints that it replaces."""
        marks = [self._unfinished / f"{WRITTEN}{index}" for index in range(jax.process_count())]
        if not all(mark.exists() for mark in marks):
            self.problem = self.problem or ELSEWHERE
            return
        for mark in marks:
            mark.unlink()
        ocp.StandardCheckpointHandler().finalize(epath.Path(self._unfinished / STATE))
        if self._trial:
            shutil.rmtree(self._unfinished, ignore_errors=True)
            return
        (self._unfinished / "_CHECKPOINT_METADATA").write_text(json.dumps(for_orbax()))
        folder = self._unfinished.parent
        self._unfinished.rename(folder / str(self.step))
        for step in self._replaced:
            removed = folder / f"{REMOVED}{step}"
            try:
                (folder / str(step)).rename(removed)  # at once: a kill does not leave half a checkpoint
            except OSError as error:
                log.warning("Checkpoint %d in %s could not be removed: %s", step, folder, error)
            shutil.rmtree(removed, ignore_errors=True)


def _error_of(future: Any) -> Exception | None:
    """Waits for a future; returns its error, or None."""
    try:
        future.result()
    except Exception as error:
        return error
    return None
