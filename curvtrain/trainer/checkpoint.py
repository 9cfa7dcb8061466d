"""Checkpoints: one orbax composite per step, saved asynchronously, restored strictly, falling back loudly.

A checkpoint named by its step holds

| item | content |
|---|---|
| `state` | the `TrainState`: parameters, optimizer, curvature, model state |
| `meta` | JSON: the run's description (trainer, data, seed), versions, the position of the data iterators |

This is the only file that knows orbax.
"""

import importlib.metadata
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
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
    """The checkpoints of one workdir. A context manager: leaving it waits for the save under way."""

    def __init__(self, config: TrainerConfig):
        self.folder = Path(config.workdir or "").absolute()
        _check_writable(self.folder)
        better = (lambda m: -m[config.best_metric]) if config.best_mode == "min" else (lambda m: m[config.best_metric])
        keep: list[policies.PreservationPolicy] = [policies.LatestN(config.keep_latest)]
        if config.keep_best:
            best = policies.BestN(get_metric_fn=better, n=config.keep_best, keep_checkpoints_without_metrics=False)
            keep.append(best)
        self._best_metric = config.best_metric
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                save_decision_policy=policies.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,
            ),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # orbax raises whatever its writer thread met
            log.error(
                "The last checkpoint was not written: %s. Older checkpoints in %s are intact.", error, self.folder
            )
            if exception[0] is None:
                raise CheckpointError(f"The last checkpoint in {self.folder} was not written: {error}") from error
        finally:
            self._manager.close()

    @property
    def steps(self) -> list[int]:
        """Steps that are on disk, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: PyTree, meta: dict[str, Any], metrics: dict[str, float] | None) -> bool:
        """Starts to save in the background; False, with a message, if the disk or the previous save failed.

        Training goes on after a failed save: what is on disk stays, and the next save tries again.
        """
        ranked = metrics if metrics and self._best_metric in metrics else None
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        try:
            if step in self._manager.all_steps():
                return True
            return bool(self._manager.save(step, args=args, metrics=ranked))
        except Exception as error:  # orbax raises whatever its writer thread met
            log.error(
                "Checkpoint at step %d failed: %s. Training goes on; checkpoints on disk: %s.", step, error, self.steps
            )
            return False

    def restore(self, target: PyTree, expected: dict[str, Any]) -> tuple[PyTree, dict[str, Any]]:
        """The newest checkpoint that can be read, and its metadata.

        Args:
          target: the abstract state with shardings: the checkpoint may come from another mesh.
          expected: the run's description; every entry should equal the checkpoint's.

        Raises:
          Mismatch: the checkpoint belongs to another run. This never falls back.
          CheckpointError: none can be read.
        """
        damaged = {}
        for step in reversed(self.steps):
            try:
                meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
                saved = self._manager.item_metadata(step)["state"].tree
            except _DAMAGE as error:
                damaged[step] = _short(error)
                self._loud(step, damaged[step])
                continue
            _compare(self.folder, step, expected, meta["run"], saved, target)
            try:
                restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))
            except _DAMAGE as error:
                damaged[step] = _short(error)
                self._loud(step, damaged[step])
                continue
            for broken in damaged:
                self._manager.delete(broken)  # else its step could not be saved again
            return restored["state"], meta
        raise CheckpointError(
            f"None of the checkpoints in {self.folder} can be read: {damaged}. Choose another workdir, or move "
            f"these folders away to start anew."
        )

    def _loud(self, step: int, reason: str) -> None:
        message = f"Checkpoint {step} in {self.folder} is damaged and is left out; trying an older one. ({reason})"
        warnings.warn(message, RuntimeWarning, stacklevel=4)


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
        saved = manager.item_metadata(chosen)["state"].tree
        differences = _spec_differences({name: saved.get(name) for name in target}, target)
        if differences:
            raise Mismatch(_differ(folder, chosen, differences))
        args = ocp.args.PyTreeRestore(
            target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
        )
        return chosen, manager.restore(chosen, args=ocp.args.Composite(state=args))["state"]


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
        for name in sorted(have.keys() | want.keys())
        if have.get(name) != want.get(name)
    ]


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".curvtrain-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"TrainerConfig(workdir={os.fspath(folder)!r}) cannot be written: {error}. Choose another folder."
        ) from error


def _short(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) < 300 else text[:300] + "..."
