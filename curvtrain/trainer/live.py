"""The run as it is now: one object that the loop advances, and that hooks and the Trainer look at."""

from collections.abc import Callable, Mapping

from curvtrain.trainer.data.streams import Streams
from curvtrain.trainer.state import TrainState

Write = Callable[[int, dict[str, float]], None]


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
    """

    def __init__(self, initial_state: Callable[[], TrainState], streams: Streams):
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.logged_at: dict[str, int] = {}
        self.last = False
        self.stop_reason: str | None = None
        self.say: Callable[[str], None] = print
        self.streams = streams
        self._initial_state = initial_state
        self._state: TrainState | None = None
        self._write: Write = self.record

    @property
    def state(self) -> TrainState:
        """The training state after `step` steps. The next step donates its buffers: a hook that keeps it, copies it."""
        if self._state is None:
            self._state = self._initial_state()
        return self._state

    def stop(self, reason: str) -> None:
        """Ends training after this step; the run is evaluated and saved as at its last step."""
        self.stop_reason = reason

    def write(self, scalars: Mapping[str, float]) -> None:
        """Logs scalars of a hook's own at this step."""
        self._write(self.step, {name: float(value) for name, value in scalars.items()})

    # -- for the loop ----------------------------------------------------------------------------------------------

    def begin(self, write: Write, say: Callable[[str], None]) -> None:
        """Begins a call of `fit`, which logs and prints by these functions."""
        self._write, self.say = write, say
        self.last, self.stop_reason = False, None

    def advance(self, step: int, state: TrainState) -> None:
        """Takes over the state after a step."""
        self.step, self._state = step, state

    def restore(self, step: int, state: TrainState, logged: Mapping[str, tuple[int, float]]) -> None:
        """Takes over a checkpoint's state, and what had been logged by then: {name: (step, value)}."""
        self.advance(step, state)
        self.metrics, self.logged_at = {}, {}
        for name, (at, value) in logged.items():
            self.record(at, {name: value})

    def record(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes note of scalars that were logged at a step."""
        self.metrics.update(scalars)
        self.logged_at.update(dict.fromkeys(scalars, step))
