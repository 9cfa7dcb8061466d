"""Checkpoints: one orbax composite per step, saved asynchronously, restored strictly, falling back loudly.

A checkpoint named by its step holds

| item | content |
|---|---|
| `state` | the `TrainState`: parameters, optimizer, curvature, model state |
| `meta` | JSON: the run's description (trainer, data, seed), versions, positions of the data iterators, scores |

This is the only file that knows orbax.
"""

import asyncio
import contextlib
import functools
import importlib.metadata
import itertools
import json
import logging
import math
import os
import shutil
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath  # orbax's paths

from curvtrain.trainer import distributed
from curvtrain.trainer.config import TrainerConfig
from curvtrain.trainer.sharding import path_name

PyTree = Any

VERSIONED = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "curvtrain")
STATE, META = "state", "meta"
UNFINISHED, REMOVED, WRITTEN = ".orbax-checkpoint-tmp", ".removed-", ".written-"  # + by whom
PATIENCE = 24 * 3600 * 1000  # ms that slow disks have: of a process that is gone JAX tells the others much sooner
ELSEWHERE = "another process did not write its part."
_DAMAGE = (ValueError, KeyError, AttributeError, OSError, TypeError)  # what orbax raises on missing or truncated files

log = logging.getLogger("curvtrain")

_saves = itertools.count()  # of this process's life, alike on all: a barrier's name counts once


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, and why."""


class Mismatch(CheckpointError):
    """A checkpoint of another run: the message names every difference."""


class Checkpoints:
    """The checkpoints of one workdir. A context manager: leaving it waits for the save under way.

    A save that fails (a full disk) is reported and cleared away, and training goes on: older checkpoints stay, the next
    save tries again. Leaving raises CheckpointError if it was the last one.

    Several processes make one checkpoint, which counts on all or none of them: each writes what it holds, with orbax's
    handlers; process 0 makes the folder, and gives it its name when all have written. They learn of it, and of a
    failure anywhere, when the next save begins or the run ends. (Orbax's own manager does not agree: of a process that
    fails it tells the others nothing, which wait for it in barriers.)
    """

    def __init__(self, config: TrainerConfig):
        self.folder = Path(config.workdir or "").absolute()
        self._retention = _Retention(config)
        self._under_way: _Save | None = None
        self._failure: str | None = None  # of the newest save
        self._steps: list[int] = []
        for step, scores in distributed.from_first(self._open):
            self._steps.append(step)
            self._retention.rank(step, scores)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        self._wait(agree=kind is None)  # after an error the others may be anywhere
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
          step: names the checkpoint. One that exists is left as it is.
          state: arrays that the caller may donate as soon as this returns.
          meta: plain JSON; anything else raises TypeError.
          scores: the evaluation at this step by which checkpoints are ranked, if there was one.
        """
        self._wait()
        if step in self._steps:
            return True
        # now, not in the background: a hook may change what it handed out, and what is not JSON is a mistake to be told
        meta = json.loads(json.dumps({**meta, "scores": scores or {}}))
        self._retention.rank(step, meta["scores"])
        self._failure = None
        try:
            distributed.from_first(lambda: self._make_room(step))
        except OSError as error:
            self._failed(step, _short(error))
            return False
        self._under_way = _Save(self._unfinished(step), step, state, meta, self._steps, self._retention)
        self._under_way.begin()
        return True

    def restore(self, target: PyTree, expected: dict[str, Any]) -> tuple[PyTree, dict[str, Any]]:
        """The newest checkpoint that all processes can read, and its metadata. Newer ones are set aside, and warned of.

        Args:
          target: the abstract state with shardings: the checkpoint may come from another mesh.
          expected: the run's description; every entry should equal the checkpoint's.

        Raises:
          Mismatch: the checkpoint belongs to another run. This never falls back, and deletes nothing.
          CheckpointError: none can be read.
        """
        damaged = {}
        for step in reversed(self.steps):
            state = meta = mismatch = damage = None
            try:
                meta = _read_meta(self.folder / str(step))
                arrays, handler = epath.Path(self.folder / str(step) / STATE), ocp.StandardCheckpointHandler()
                _compare(self.folder, step, expected, meta["run"], handler.metadata(arrays).tree, target)
                state = handler.restore(arrays, args=ocp.args.StandardRestore(target))
            except Mismatch as error:
                mismatch = str(error)
            except _DAMAGE as error:
                damage = _short(error)
            if (mismatch := distributed.first_problem(mismatch)) is not None:
                raise Mismatch(mismatch)
            if (damage := distributed.first_problem(damage)) is not None:
                damaged[step] = damage
                continue
            for broken, reason in damaged.items():
                message = f"Checkpoint {broken} in {self.folder} is damaged; going on from checkpoint {step}."
                warnings.warn(f"{message} ({reason})", RuntimeWarning, stacklevel=5)
                distributed.from_first(functools.partial(self._set_aside, broken))
                self._steps.remove(broken)
            assert meta is not None
            return state, meta
        raise CheckpointError(
            f"None of the checkpoints in {self.folder} can be read: {damaged}. Choose another workdir, or move "
            f"these folders away to start anew."
        )

    def _unfinished(self, step: int) -> Path:
        return self.folder / f"{step}{UNFINISHED}"

    def _wait(self, agree: bool = True) -> None:
        """For the save under way; takes note of what became of it."""
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
        if problems[0] is not None:  # which is ELSEWHERE
            self._failed(save.step, ELSEWHERE)

    def _failed(self, step: int, problem: str) -> None:
        self._failure = f"Saving step {step} failed: {problem} On disk in {self.folder}: {self._steps}."
        if jax.process_index() == 0:
            log.error("%s Training goes on; the next save tries again.", self._failure)

    # -- of process 0 ----------------------------------------------------------------------------------------------

    def _open(self) -> list[tuple[int, dict[str, float]]]:
        """Makes the folder if it is not there, and clears it of what a kill left; steps in it and their scores."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear_leftovers()
        found = []
        for step in _steps_in(self.folder):
            scores = {}
            with contextlib.suppress(*_DAMAGE):  # which `restore` reports
                scores = dict(_read_meta(self.folder / str(step))["scores"])
            found.append((step, scores))
        return found

    def _clear_leftovers(self) -> None:
        for leftover in (*self.folder.glob(f"*{UNFINISHED}*"), *self.folder.glob(f"{REMOVED}*")):
            shutil.rmtree(leftover, ignore_errors=True)

    def _make_room(self, step: int) -> None:
        """The folders into which all write."""
        self._clear_leftovers()
        for item in (STATE, META):
            (self._unfinished(step) / item).mkdir(parents=True)

    def _set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, else its step could not be saved again; nobody's data is deleted."""
        aside = self.folder / f"damaged-{step}"
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
        (self.folder / str(step)).rename(aside)


class _Save(threading.Thread):
    """One save on this process, from the copy of the arrays off the devices to the checkpoint's name.

    `problem` says afterwards what went wrong here; on process 0, why it is no checkpoint.
    """

    def __init__(self, unfinished: Path, step: int, state: PyTree, meta: dict[str, Any], steps: list[int], retention):
        super().__init__(name=f"save of step {step}")
        self.step = step
        self.problem: str | None = None
        self.keep = retention.kept([*steps, step])
        self._replaced = [other for other in steps if other not in self.keep]
        self._unfinished, self._state, self._meta = unfinished, state, meta
        self._key = f"curvtrain/save/{next(_saves)}"
        self._all_have_written = ocp.multihost.get_barrier_sync_fn()
        self._is_copied = threading.Event()

    def begin(self) -> None:
        """Starts; returns when the arrays are copied, for the next step donates them."""
        self.start()
        self._is_copied.wait()

    def run(self) -> None:
        """All of it; what goes wrong is left in `problem`."""
        try:
            self._write()
        except Exception as error:  # the file system's, orbax's or tensorstore's, of many types
            self.problem = _short(error)
        finally:
            self._is_copied.set()
        try:
            self._all_have_written(key=self._key, timeout_ms=PATIENCE)
            if jax.process_index() == 0:
                self._finish()
        except Exception as error:
            self.problem = self.problem or _short(error)
        if self.problem is not None and jax.process_index() == 0:
            shutil.rmtree(self._unfinished, ignore_errors=True)  # it takes the room that the next save needs

    def _write(self) -> None:
        """This process's part, and a mark that it is whole."""
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
        """Makes it a checkpoint if all have written, and removes those that it replaces."""
        marks = [self._unfinished / f"{WRITTEN}{index}" for index in range(jax.process_count())]
        if not all(mark.exists() for mark in marks):
            self.problem = self.problem or ELSEWHERE
            return
        for mark in marks:
            mark.unlink()
        ocp.StandardCheckpointHandler().finalize(epath.Path(self._unfinished / STATE))
        (self._unfinished / "_CHECKPOINT_METADATA").write_text(json.dumps(_for_orbax()))
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
    """Waits for it."""
    try:
        future.result()
    except Exception as error:
        return error
    return None


class _Retention:
    """Which checkpoints stay: the newest, and the best of those with a score.

    Scores come from the checkpoints' metadata, so a resumed run knows those of earlier ones.
    """

    def __init__(self, config: TrainerConfig):
        self._latest, self._best, self._metric = config.keep_latest, config.keep_best, config.best_metric
        self._sign = 1.0 if config.best_mode == "max" else -1.0
        self._scores: dict[int, float] = {}

    def rank(self, step: int, scores: dict[str, float]) -> None:
        """Takes note of a checkpoint's scores; one that is not finite does not count."""
        if scores and self._best and self._metric not in scores:
            message = f"TrainerConfig(best_metric={self._metric!r}) is none of the evaluated"
            warnings.warn(f"{message} {sorted(scores)}: nothing is kept as the best.", RuntimeWarning, stacklevel=2)
        value = self._sign * scores.get(self._metric, math.nan)
        if math.isfinite(value):
            self._scores[step] = value

    def kept(self, steps: Sequence[int]) -> list[int]:
        """Those of the steps that stay."""
        steps = sorted(steps)
        ranked = sorted((step for step in steps if step in self._scores), key=lambda step: (self._scores[step], step))
        kept = {*steps[-self._latest :], *ranked[len(ranked) - min(self._best, len(ranked)) :]}
        return sorted(kept)


def read_params(
    workdir: str | os.PathLike, target: dict[str, PyTree], step: int | None
) -> tuple[int, dict[str, PyTree]]:
    """Parts of a checkpoint's state (such as params and model_state), for inference: (step, the parts restored).

    Args:
      workdir: of the run.
      target: abstract parts by field name of `TrainState`.
      step: which checkpoint; None is the newest.
    """
    folder = Path(os.fspath(workdir)).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"load_model(workdir={os.fspath(workdir)!r}): there is no such folder.")
    steps = _steps_in(folder)
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(
            f"load_model(workdir={os.fspath(workdir)!r}, step={step}): the checkpoints there are {steps}."
        )
    chosen = steps[-1] if step is None else step
    arrays, handler = epath.Path(folder / str(chosen) / STATE), ocp.PyTreeCheckpointHandler()
    args = ocp.args.PyTreeRestore(
        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    try:
        saved = handler.metadata(arrays).tree
        differences = _spec_differences({name: saved.get(name) for name in target}, target)
        if differences:
            raise Mismatch(_differ(folder, chosen, differences))
        return chosen, handler.restore(arrays, args=args)
    except _DAMAGE as error:
        raise CheckpointError(
            f"Checkpoint {chosen} in {folder} is damaged: {_short(error)} The others there are "
            f"{[other for other in steps if other != chosen]}; choose one with load_model(step=...)."
        ) from error


def saved_run(workdir: str | os.PathLike) -> dict[str, Any]:
    """The description of the run whose checkpoints these are; empty if there are none to read."""
    folder = Path(os.fspath(workdir)).absolute()
    if not folder.is_dir():
        return {}
    for step in reversed(_steps_in(folder)):
        with contextlib.suppress(*_DAMAGE):  # which `restore` reports
            return _read_meta(folder / str(step))["run"]
    return {}


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that a run depends on."""
    return {name: importlib.metadata.version(name) for name in VERSIONED}


def _steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def _read_meta(checkpoint: Path) -> dict[str, Any]:
    return dict(ocp.JsonCheckpointHandler().restore(epath.Path(checkpoint / META)))


def _for_orbax() -> dict[str, Any]:
    """What orbax's own manager leaves beside the items: with it, that reads the checkpoint without being told how."""
    handlers = {STATE: ocp.StandardCheckpointHandler, META: ocp.JsonCheckpointHandler}
    names = {item: f"{handler.__module__}.{handler.__qualname__}" for item, handler in handlers.items()}
    return {"item_handlers": names, "metrics": {}, "performance_metrics": {}, "custom_metadata": {}}


def _compare(folder, step, expected, run, saved, target) -> None:
    have, want = flat(run), flat(expected)
    differences = [
        f"{name}: {have.get(name)!r} in the checkpoint, {want.get(name)!r} now"
        for name in sorted(have.keys() | want.keys())
        if have.get(name) != want.get(name)
    ]
    differences += _spec_differences(saved, target)
    if differences:
        raise Mismatch(_differ(folder, step, differences))


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict of plain values with names joined by dots."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in flat(sub, f"{prefix}.{name}" if prefix else name).items()}


def _differ(folder: Path, step: int, differences: list[str]) -> str:
    shown = "\n  ".join(differences[:12]) + (f"\n  and {len(differences) - 12} more" if len(differences) > 12 else "")
    return (
        f"Checkpoint {step} in {folder} belongs to another run:\n  {shown}\n"
        f"Choose another workdir, or restore what you changed."
    )


def _spec_differences(saved: PyTree, wanted: PyTree) -> list[str]:
    """Leaves whose presence, shape or dtype differ, in words. Orbax would cast a dtype silently."""
    plain = lambda v: jax.eval_shape(jax.random.key_data, v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v
    flat = lambda tree: {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    signature = lambda v: f"{jnp.dtype(v.dtype).name}{list(v.shape)}"
    have = {name: signature(v) for name, v in flat(saved).items() if hasattr(v, "shape")}
    want = {name: signature(plain(v)) for name, v in flat(wanted).items()}
    return [
        f"{name}: {have.get(name, 'absent')} in the checkpoint, {want.get(name, 'absent')} now"
        for name in sorted(have.keys() | want.keys(), key=lambda name: (not name.startswith("params/"), name))
        if have.get(name) != want.get(name)
    ]


def _short(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) < 300 else text[:300] + "..."
