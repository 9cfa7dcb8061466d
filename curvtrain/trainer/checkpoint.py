"""Checkpoints: one orbax composite per step, saved asynchronously, restored strictly, falling back loudly.

A checkpoint named by its step holds

| item | content |
|---|---|
| `state` | the `TrainState`: parameters, optimizer, curvature, model state |
| `meta` | JSON: the run's description (trainer, data, seed), versions, positions of the data iterators, scores |

This is the only file that knows orbax.
"""

import contextlib
import functools
import importlib.metadata
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from curvtrain.trainer.config import TrainerConfig
from curvtrain.trainer.sharding import path_name

PyTree = Any

VERSIONED = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "curvtrain")
_DAMAGE = (ValueError, KeyError, AttributeError, OSError, TypeError)  # what orbax raises on missing or truncated files

log = logging.getLogger("curvtrain")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, and why."""


class Mismatch(CheckpointError):
    """A checkpoint of another run: the message names every difference."""


class Checkpoints:
    """The checkpoints of one workdir. A context manager: leaving it waits for the save under way.

    A save that fails (a full disk) is reported and cleared away, and training goes on: older checkpoints stay, the next
    save tries again. Leaving raises CheckpointError if it was the last one.
    """

    def __init__(self, config: TrainerConfig):
        self.folder = Path(config.workdir or "").absolute()
        self._retention = _Retention(config)
        self._under_way: int | None = None
        self._failure: str | None = None  # of the newest save
        self._manager = self._open(clean=True)
        for step in self.steps:
            with contextlib.suppress(*_DAMAGE):  # which `restore` reports
                self._retention.rank(step, self._meta(step)["scores"])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        self._wait()
        self._manager.close()
        self._clear_leftovers("*")  # a writer that failed may have left something after it was given up
        if self._failure is not None and kind is None:
            raise CheckpointError(f"The last checkpoint was not written. {self._failure}")

    @property
    def steps(self) -> list[int]:
        """Steps that are on disk, or on their way there, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: PyTree, meta: dict[str, Any], scores: dict[str, float] | None) -> bool:
        """Starts to save in the background; False, with a message, if that fails at once.

        Args:
          step: names the checkpoint. One that exists is left as it is.
          state: arrays that the caller may donate as soon as this returns.
          meta: plain JSON; anything else raises TypeError.
          scores: the evaluation at this step by which checkpoints are ranked, if there was one.
        """
        self._wait()
        if step in self.steps:
            return True
        # now, not in the background: a hook may change what it handed out, and what is not JSON is a mistake to be told
        meta = json.loads(json.dumps({**meta, "scores": scores or {}}))
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._retention.rank(step, meta["scores"])
        self._under_way, self._failure = step, None
        try:
            if not self._manager.save(step, args=args):
                raise CheckpointError("orbax declined to save it")
        except Exception as error:  # the file system's, orbax's or tensorstore's, of many types
            self._failed(error)
        return self._failure is None

    def restore(self, target: PyTree, expected: dict[str, Any]) -> tuple[PyTree, dict[str, Any]]:
        """The newest checkpoint that can be read, and its metadata. Newer ones are set aside, with a warning.

        Args:
          target: the abstract state with shardings: the checkpoint may come from another mesh.
          expected: the run's description; every entry should equal the checkpoint's.

        Raises:
          Mismatch: the checkpoint belongs to another run. This never falls back, and deletes nothing.
          CheckpointError: none can be read.
        """
        damaged = {}
        for step in reversed(self.steps):
            try:
                meta = self._meta(step)
                saved = self._manager.item_metadata(step)["state"].tree
                _compare(self.folder, step, expected, meta["run"], saved, target)
                args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
                state = self._manager.restore(step, args=args)["state"]
            except _DAMAGE as error:
                damaged[step] = _short(error)
                continue
            for broken, reason in damaged.items():
                message = f"Checkpoint {broken} in {self.folder} is damaged; going on from checkpoint {step}."
                warnings.warn(f"{message} ({reason})", RuntimeWarning, stacklevel=5)
                self._set_aside(broken)
            if damaged:
                self._manager.reload()
            return state, meta
        raise CheckpointError(
            f"None of the checkpoints in {self.folder} can be read: {damaged}. Choose another workdir, or move "
            f"these folders away to start anew."
        )

    def _clear_leftovers(self, step: str) -> None:
        if jax.process_index() == 0:
            for leftover in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, else its step could not be saved again; nobody's data is deleted."""
        if jax.process_index() == 0:
            aside = self.folder / f"damaged-{step}"
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
            (self.folder / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {step} set aside")

    def _open(self, clean: bool) -> ocp.CheckpointManager:
        return _Manager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._retention,
                save_decision_policy=policies.FixedIntervalPolicy(1),
                cleanup_tmp_directories=clean,
            ),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
        )

    def _meta(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def _wait(self) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # whatever the writer thread met
            self._failed(error)
        self._under_way = None

    def _failed(self, error: Exception) -> None:
        for _ in range(8):  # a manager keeps its writers' errors and raises them one at a time, even in later saves
            with contextlib.suppress(Exception):
                self._manager.close()
                break
        self._clear_leftovers(f"{self._under_way}")  # it takes the room that the next save needs
        self._manager = self._open(clean=False)
        self._failure = f"Saving step {self._under_way} failed: {_short(error)} On disk in {self.folder}: {self.steps}."
        log.error("%s Training goes on; the next save tries again.", self._failure)


class _Manager(ocp.CheckpointManager):
    """Leaves JAX's preemption service to the loop, see `distributed.preempted`.

    Orbax asks it at every save, by the number of the step and from background threads too. The service takes that for
    the newest call of the process, and the one that all were to stop at is then never made.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class _Retention:
    """Orbax's preservation policy: the newest checkpoints, and the best of those with a score.

    Scores come from the checkpoints' metadata, so a resumed run knows those of earlier ones. (Orbax's own `BestN` does
    not: without its older `best_fn` it keeps metrics in memory only.)
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

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each checkpoint, whether it stays."""
        steps = sorted(info.step for info in checkpoints)
        ranked = sorted((step for step in steps if step in self._scores), key=lambda step: (self._scores[step], step))
        kept = {*steps[-self._latest :], *ranked[len(ranked) - min(self._best, len(ranked)) :]}
        return [info.step in kept for info in checkpoints]


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
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
        steps = sorted(manager.all_steps())
        if not steps or (step is not None and step not in steps):
            raise FileNotFoundError(
                f"load_model(workdir={os.fspath(workdir)!r}, step={step}): the checkpoints there are {steps}."
            )
        chosen = steps[-1] if step is None else step
        args = ocp.args.PyTreeRestore(
            target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
        )
        try:
            saved = manager.item_metadata(chosen)["state"].tree
            differences = _spec_differences({name: saved.get(name) for name in target}, target)
            if differences:
                raise Mismatch(_differ(folder, chosen, differences))
            return chosen, manager.restore(chosen, args=ocp.args.Composite(state=args))["state"]
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
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(folder, options=options, item_handlers={"meta": ocp.JsonCheckpointHandler()}) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            with contextlib.suppress(*_DAMAGE):  # which `restore` reports
                return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]["run"]
    return {}


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that a run depends on."""
    return {name: importlib.metadata.version(name) for name in VERSIONED}


def _compare(folder, step, expected, run, saved, target) -> None:
    have, want = _flat(run), _flat(expected)
    differences = [
        f"{name}: {have.get(name)!r} in the checkpoint, {want.get(name)!r} now"
        for name in sorted(have.keys() | want.keys())
        if have.get(name) != want.get(name)
    ]
    differences += _spec_differences(saved, target)
    if differences:
        raise Mismatch(_differ(folder, step, differences))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict of plain values with names joined by dots."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}.{name}" if prefix else name).items()}


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
