"""The run as it is now: one object that the loop advances, and that hooks and the Trainer look at."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain.trainer.data.streams import Streams
from curvtrain.trainer.state import TrainState

Write = Callable[[int, dict[str, float]], None]
Logged = Mapping[str, tuple[int, float]]  # {name: (step, value)}

_alone = [object()]
_OWN_REFERENCES = sys.getrefcount(_alone[0])  # to what is in one list: 2, or 1 where Python borrows arguments


@dataclasses.dataclass(frozen=True)
class Ending:
    """Why a run is not trained on, though steps are left.

    Attributes:
      reason: that of `Run.stop`, or the message of `Diverged`.
      steps: the `TrainerConfig(steps)` of then: with more steps a run that was stopped goes on.
      diverged: whether the loss or the parameters were not finite.
    """

    reason: str
    steps: int
    diverged: bool = False


class Run:
    """A run after its latest step. Its Trainer and its hooks hold this one object, and nobody keeps a copy of it.

    Attributes:
      step: number of optimizer steps done.
      metrics: the latest logged scalars by name, "train/loss", "eval/accuracy", "curvature/eigenvalue_max", ...
      logged_at: the step at which each of them was logged.
      last: whether hooks are called for the last time.
      stop_reason: why a hook ended the run, or None.
      say: prints a line.
      streams: the batches that the run draws.
      ending: why it is not trained on, though steps are left, or None.
      skipped: steps so far that `TrainerConfig(nonfinite="skip")` skipped, and how many of them are the latest steps.
    """

    def __init__(self, first_state: Callable[[], tuple[TrainState, Logged]], streams: Streams):
        """A run before the first `fit`; `first_state` makes, or reads, its state and what was logged by then."""
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.logged_at: dict[str, int] = {}
        self.last = False
        self.stop_reason: str | None = None
        self.say: Callable[[str], None] = print
        self.streams = streams
        self.ending: Ending | None = None
        self.skipped = (0, 0)
        self._first_state = first_state
        self._state: TrainState | None = None
        self._is_first = False  # whether the state is that of `first_state`
        self._handed_out = self._resumes = False
        self._write: Write = self.record

    @property
    def state(self) -> TrainState:
        """The training state after `step` steps. What is kept of it stays as it is, at the cost of a copy."""
        self._handed_out = True
        return self.current

    def stop(self, reason: str, *, resume: bool = False) -> None:
        """Ends training after this step; the run is evaluated and saved as at its last step.

        A run that was stopped stays stopped: a later `fit` returns its result, unless the config has more steps by
        then. With `resume` it goes on, as after a time limit.
        """
        self.stop_reason, self._resumes = reason, resume

    def write(self, scalars: Mapping[str, float]) -> None:
        """Logs scalars of a hook's own at this step."""
        self._write(self.step, {name: float(value) for name, value in scalars.items()})

    # -- for the loop and the Trainer ------------------------------------------------------------------------------

    @property
    def current(self) -> TrainState:
        """The training state, for a look that keeps none of it: the next step donates its arrays.

        Raises:
          RuntimeError: the run was interrupted while a step had them.
        """
        if self._state is None:
            state, logged = self._first_state()
            self.restore(int(state.step), state, logged)
            self._is_first = True
        assert self._state is not None
        if self._state.step.is_deleted():
            raise RuntimeError(
                "The run was interrupted in the middle of a step, which leaves no state. Call fit() of a new Trainer: "
                "it goes on from the newest checkpoint, if there is a workdir, and else begins anew."
            )
        return self._state

    def to_donate(self) -> TrainState:
        """The training state for the next step, which donates it; arrays that somebody has kept are copied before."""
        if self._handed_out:
            self._handed_out = False
            leaves, treedef = jax.tree.flatten(self.current)
            self._state = None  # its containers hold the arrays as well
            try:
                for i in range(len(leaves)):
                    if sys.getrefcount(leaves[i]) > _OWN_REFERENCES:
                        leaves[i] = _copy(leaves[i])
            finally:
                self._state = treedef.unflatten(leaves)
        return self.current

    def begin(self, write: Write, say: Callable[[str], None]) -> None:
        """Begins a call of `fit`, which logs and prints by these functions."""
        self._write, self.say = write, say
        self.last, self.stop_reason, self._resumes = False, None, False

    def end(self, steps: int) -> None:
        """Takes note that a hook ended the run, whose config has so many steps."""
        if self.stop_reason is not None and not self._resumes:
            self.ending = Ending(self.stop_reason, steps)

    def forget_first(self) -> None:
        """Drops a state that no call of `fit` has advanced: a checkpoint takes its place, and both take room."""
        if self._is_first:
            self._state = None

    def advance(self, step: int, state: TrainState) -> None:
        """Takes over the state after a step."""
        self.step, self._state, self._is_first = step, state, False

    def restore(self, step: int, state: TrainState, logged: Logged) -> None:
        """Takes over a checkpoint's state, and what had been logged by then."""
        self.advance(step, state)
        self.metrics, self.logged_at = {}, {}
        for name, (at, value) in logged.items():
            self.record(at, {name: value})

    def record(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes note of scalars that were logged at a step."""
        self.metrics.update(scalars)
        self.logged_at.update(dict.fromkeys(scalars, step))


def _copy(array: Any) -> Any:
    """A copy in the same place, made shard by shard: another process may have kept nothing, and makes none."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_copy(jax.random.key_data(array)), impl=jax.random.key_impl(array))
    shards = [shard.data.copy() for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)
