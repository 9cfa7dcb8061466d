"""Reading checkpoints: their metadata, parts of their state, and how they differ from what a run expects."""

import contextlib
import functools
import importlib.metadata
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath  # orbax's paths

from curvtrain.trainer.mesh.sharding import path_name

PyTree = Any

VERSIONED = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "curvtrain")
STATE, META = "state", "meta"  # the items of a checkpoint
DAMAGE = (ValueError, KeyError, AttributeError, OSError, TypeError)  # orbax's errors about missing or truncated files


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, and the reason."""


class Mismatch(CheckpointError):
    """A checkpoint of another run: the message names every difference."""


def read_params(
    workdir: str | os.PathLike, target: dict[str, PyTree], step: int | None
) -> tuple[int, dict[str, PyTree]]:
    """Reads parts of a checkpoint's state (such as params and model_state), for inference.

    Args:
      workdir: the run's folder.
      target: abstract parts by field name of `TrainState`.
      step: the checkpoint's step; None is the newest.

    Returns:
      (the checkpoint's step, the parts).

    Raises:
      FileNotFoundError: there is no such folder or checkpoint; the message lists those that there are.
      Mismatch: the checkpoint's shapes or dtypes differ from the target's; the message names the leaves.
      CheckpointError: the checkpoint is damaged.
    """
    folder = Path(os.fspath(workdir)).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"load_model(workdir={os.fspath(workdir)!r}): there is no such folder.")
    steps = steps_in(folder)
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
    except DAMAGE as error:
        raise CheckpointError(
            f"Checkpoint {chosen} in {folder} is damaged: {short(error)} The others there are "
            f"{[other for other in steps if other != chosen]}; choose one with load_model(step=...)."
        ) from error


def saved_run(workdir: str | os.PathLike) -> dict[str, Any]:
    """The description of the run whose checkpoints are in a folder; empty if none can be read."""
    folder = Path(os.fspath(workdir)).absolute()
    if not folder.is_dir():
        return {}
    for step in reversed(steps_in(folder)):
        with contextlib.suppress(*DAMAGE):  # `restore` reports it
            return read_meta(folder / str(step))["run"]
    return {}


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that a run depends on."""
    return {name: importlib.metadata.version(name) for name in VERSIONED}


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, ascending; other files and folders are passed over."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """The metadata of a checkpoint."""
    return dict(ocp.JsonCheckpointHandler().restore(epath.Path(checkpoint / META)))


def for_orbax() -> dict[str, Any]:
    """The metadata that orbax's own manager writes; with it, the manager can read the checkpoint."""
    handlers = {STATE: ocp.StandardCheckpointHandler, META: ocp.JsonCheckpointHandler}
    names = {item: f"{handler.__module__}.{handler.__qualname__}" for item, handler in handlers.items()}
    return {"item_handlers": names, "metrics": {}, "performance_metrics": {}, "custom_metadata": {}}


def compare(
    folder: Path, step: int, expected: dict[str, Any], run: dict[str, Any], saved: PyTree, target: PyTree
) -> None:
    """Raises Mismatch, which names every difference, unless a checkpoint belongs to the run.

    Args:
      folder, step: where the checkpoint is.
      expected: the run's description.
      run: the description in the checkpoint.
      saved: the shapes and dtypes in the checkpoint.
      target: the abstract state of the run.
    """
    have, want = flat(run), flat(expected)
    differences = [
        f"{name}: {have.get(name)!r} in the checkpoint, {want.get(name)!r} now"
        for name in sorted(have.keys() | want.keys())
        if have.get(name) != want.get(name)
    ]
    differences += _spec_differences(saved, target)
    if differences:
        raise Mismatch(_differ(folder, step, differences))


def by_name(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their paths, as errors call them: "opt_state/0/mu/fc1/kernel"."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def is_constant(name: str) -> bool:
    """Says whether a leaf is an injected option of the optimizer: the new program's counts, whatever its type."""
    return name.startswith("opt_state/") and "hyperparams" in name.split("/")


def lone_counters(names: Collection[str], others: Collection[str]) -> set[str]:
    """The counters of schedules that are among one state's names and not among another's.

    A schedule in place of a constant adds a counter to the optimizer's state, and a constant in place of a schedule
    removes one: a leaf "count" that is all that its part of the state has, where the other state's part has nothing.
    """
    found = set()
    for name in set(names) - set(others):
        part = name.rpartition("/")[0] + "/"
        lone = name == f"{part}count" and name.startswith("opt_state/")
        if lone and not any(n.startswith(part) for n in [*(set(names) - {name}), *others]):
            found.add(name)
    return found


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
    """Describes the leaves whose presence, shape or dtype differ. Orbax would cast a dtype silently."""
    plain = lambda v: jax.eval_shape(jax.random.key_data, v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v
    signature = lambda v: f"{jnp.dtype(v.dtype).name}{list(v.shape)}"
    have = {name: signature(v) for name, v in by_name(saved).items() if hasattr(v, "shape")}
    want = {name: signature(plain(v)) for name, v in by_name(wanted).items()}
    counters = lone_counters(have, want) | lone_counters(want, have)
    passed_over = {name for name in counters if "int32[]" in (have.get(name), want.get(name))}
    passed_over |= {name for name in have.keys() & want.keys() if is_constant(name)}
    return [
        f"{name}: {have.get(name, 'absent')} in the checkpoint, {want.get(name, 'absent')} now"
        for name in sorted(have.keys() | want.keys(), key=lambda name: (not name.startswith("params/"), name))
        if have.get(name) != want.get(name) and name not in passed_over
    ]


def short(error: Exception) -> str:
    """An error with its type, on at most 300 characters."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) < 300 else text[:300] + "..."
