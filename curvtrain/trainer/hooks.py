"""Hooks: what runs between steps. A hook sees the run after a step and may ask it to stop."""

import abc
import math
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax

from curvtrain import _checks
from curvtrain.trainer.state import TrainState


class Run:
    """What a hook sees.

    Attributes:
      step: optimizer steps done.
      state: the training state after them. The next step donates its buffers: read it now, keep copies.
      metrics: the latest logged scalars by name, "train/loss", "eval/accuracy", "curvature/eigenvalue_max", ...
      logged_at: the step at which each of them was logged.
      last: whether this is the last call of the run.
    """

    def __init__(self, write: Callable[[int, dict[str, float]], None], say: Callable[[str], None]):
        self.step = 0
        self.state: TrainState | None = None
        self.metrics: dict[str, float] = {}
        self.logged_at: dict[str, int] = {}
        self.last = False
        self.stop_reason: str | None = None
        self._write = write
        self.say = say

    def stop(self, reason: str) -> None:
        """Ends training after this step; the run is evaluated and saved as at its last step."""
        self.stop_reason = reason

    def record(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes over what was logged at a step; the loop calls it."""
        self.metrics.update(scalars)
        self.logged_at.update(dict.fromkeys(scalars, step))

    def write(self, scalars: Mapping[str, float]) -> None:
        """Logs scalars of the hook's own at this step."""
        self._write(self.step, {name: float(value) for name, value in scalars.items()})


class Hook(abc.ABC):
    """Called every `every` steps and once more at the end of the run.

    What a hook must remember over a restart goes into `state_dict`, plain JSON that is part of every checkpoint.
    """

    every: int = 1

    @abc.abstractmethod
    def __call__(self, run: Run) -> None:
        """Looks at the run."""

    def state_dict(self) -> dict[str, Any]:
        """What the hook remembers, as plain JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - a default, not abstract
        """Takes over what `state_dict` gave."""

    def close(self) -> None:  # noqa: B027 - a default, not abstract
        """Called when training ends, by an error too."""


class Call(Hook):
    """Calls a function of the run every `every` steps: `Call(lambda run: ..., every=100)`."""

    def __init__(self, function: Callable[[Run], Any], every: int = 1):
        _checks.positive_int("hooks.Call(every)", every)
        self.every, self._function = every, function

    def __call__(self, run):
        self._function(run)


class EarlyStopping(Hook):
    """Stops when a logged metric has not improved for `patience` evaluations: times that it was logged.

    Warns if it is not among what is logged.

    Args:
      metric: its logged name, such as "eval/loss".
      patience: evaluations without improvement.
      mode: "min" or "max".
      min_delta: a smaller change is no improvement.
    """

    def __init__(self, metric: str = "eval/loss", patience: int = 5, mode: str = "min", min_delta: float = 0.0):
        _checks.positive_int("EarlyStopping(patience)", patience)
        _checks.one_of("EarlyStopping(mode)", mode, ("min", "max"))
        _checks.number_in("EarlyStopping(min_delta)", min_delta, 0.0)
        self._metric, self._patience, self._min_delta = metric, patience, min_delta
        self._sign = 1.0 if mode == "min" else -1.0
        self._best, self._waited, self._seen_at = math.inf, 0, -1

    def __call__(self, run):
        if self._metric not in run.metrics:
            self._warn_if_missing(run)
            return
        if run.logged_at[self._metric] == self._seen_at:
            return
        self._seen_at = run.logged_at[self._metric]
        value = self._sign * run.metrics[self._metric]
        if value < self._best - self._min_delta:
            self._best, self._waited = value, 0
            return
        self._waited += 1
        if self._waited >= self._patience and not run.last:
            run.stop(
                f"{self._metric} has not improved on {self._sign * self._best:.4g} for {self._patience} evaluations"
            )

    def _warn_if_missing(self, run: Run) -> None:
        group = self._metric.split("/")[0] + "/"
        if run.last or any(name.startswith(group) for name in run.metrics):
            names = sorted(run.metrics)
            warnings.warn(f"EarlyStopping(metric={self._metric!r}) is not among the logged {names}.", stacklevel=3)

    def state_dict(self):
        return {"best": None if math.isinf(self._best) else self._best, "waited": self._waited, "seen": self._seen_at}

    def load_state_dict(self, state):
        self._best = math.inf if state["best"] is None else state["best"]
        self._waited, self._seen_at = state["waited"], state["seen"]


class Profiler(Hook):
    """Records a JAX profiler trace of steps [start, start + steps) into `folder`, for TensorBoard or Perfetto."""

    def __init__(self, folder: str | os.PathLike, start: int = 10, steps: int = 5):
        _checks.positive_int("Profiler(start)", start)
        _checks.positive_int("Profiler(steps)", steps)
        self._folder, self._start, self._end, self._on = os.fspath(folder), start, start + steps, False

    def __call__(self, run):
        if run.step == self._start and not self._on and not run.last:
            jax.block_until_ready(run.state)
            jax.profiler.start_trace(self._folder)
            self._on = True
        elif self._on and (run.step >= self._end or run.last):
            jax.block_until_ready(run.state)
            self.close()
            run.say(f"profile of steps {self._start} to {run.step} written to {self._folder}")

    def close(self):
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
