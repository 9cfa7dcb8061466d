"""Restoring a run's state: the newest checkpoint that can be read, as the program needs it that goes on with it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath  # orbax's paths

from curvtrain.trainer.disk.reading import (
    DAMAGE,
    STATE,
    CheckpointError,
    Mismatch,
    by_name,
    compare,
    read_meta,
    short,
)
from curvtrain.trainer.mesh import distributed
from curvtrain.trainer.mesh.sharding import path_name

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a folder's newest readable checkpoint holds.

    Attributes:
      step: the checkpoint's step.
      state: like the target.
      meta: its metadata.
      damaged: newer checkpoints that cannot be read, and why.
    """

    step: int
    state: PyTree
    meta: dict[str, Any]
    damaged: dict[int, str]


def restore_newest(folder: Path, steps: Sequence[int], target: PyTree, expected: dict[str, Any]) -> Restored:
    """Restores the newest checkpoint that all processes can read; changes nothing on disk. All processes call it.

    Args:
      folder: where the checkpoints are.
      steps: those that there are, ascending.
      target: the abstract state with shardings: the checkpoint may come from another mesh.
      expected: the run's description; every entry should equal the checkpoint's.

    Raises:
      Mismatch: the checkpoint belongs to another run. This never falls back.
      CheckpointError: none can be read.
    """
    damaged = {}
    for step in reversed(steps):
        state = meta = mismatch = damage = None
        try:
            meta = read_meta(folder / str(step))
            arrays, handler = epath.Path(folder / str(step) / STATE), ocp.StandardCheckpointHandler()
            saved = handler.metadata(arrays).tree
            compare(folder, step, expected, meta["run"], saved, target)
            state = _restore(handler, arrays, saved, target)
        except Mismatch as error:
            mismatch = str(error)
        except DAMAGE as error:
            damage = short(error)
        if (mismatch := distributed.first_problem(mismatch)) is not None:
            raise Mismatch(mismatch)
        if (damage := distributed.first_problem(damage)) is not None:
            damaged[step] = damage
            continue
        assert meta is not None
        return Restored(step, state, meta, damaged)
    raise CheckpointError(
        f"None of the checkpoints in {folder} can be read: {damaged}. Choose another workdir, or move "
        f"these folders away to start anew."
    )


def _restore(handler: ocp.StandardCheckpointHandler, arrays: epath.Path, saved: PyTree, target: PyTree) -> PyTree:
    """The arrays like the target; counters of schedules that are new (`lone_counters`) begin at the updates done."""
    have, want = by_name(saved), by_name(target)
    if have.keys() == want.keys() and all(_dtype(want[name]) == have[name].dtype for name in want):
        return handler.restore(arrays, args=ocp.args.StandardRestore(target))
    like = next(iter(want.values())).sharding
    replicated = jax.sharding.NamedSharding(like.mesh, jax.sharding.PartitionSpec())

    def wanted(path, leaf):
        name = path_name(path)
        if name in want and _dtype(want[name]) == leaf.dtype:
            return want[name]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    whole = jax.tree_util.tree_map_with_path(wanted, saved)
    found = by_name(handler.restore(arrays, args=ocp.args.StandardRestore(whole)))
    done = _updates_done(found)

    def take(path, leaf):
        value = found.get(path_name(path))
        if value is None:
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda _: np.asarray(done, leaf.dtype))
        return value if value.dtype == leaf.dtype else value.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(take, target)


def _updates_done(found: dict[str, Any]) -> int:
    """The updates of the optimizer so far: what its counters say if they agree (it may skip steps), else the step."""
    is_counter = lambda name, leaf: name.startswith("opt_state/") and name.endswith("/count") and leaf.shape == ()
    counts = {int(leaf) for name, leaf in found.items() if is_counter(name, leaf)}
    return counts.pop() if len(counts) == 1 else int(found["step"])


def _dtype(leaf: Any) -> Any:
    """The dtype with which a leaf is on disk: of a random key, that of its data."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, leaf).dtype
    return leaf.dtype
