"""Hooks: code that is called between steps, looks at the run, and may ask it to stop."""

import abc
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax

from curvtrain import _checks
from curvtrain.trainer.live import Run as Run


class Hook(abc.ABC):
    """Called every `every` steps and once more at the end of the run.

    The memory that a hook needs after a restart goes into `state_dict`, plain JSON that is part of every checkpoint.
    """

    every: int = 1

    @abc.abstractmethod
    def __call__(self, run: Run) -> None:
        """Is called after a step; the Trainer's `state`, `model` and `evaluate` are those of that step too."""

    def state_dict(self) -> dict[str, Any]:
        """The hook's memory, as plain JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - a default, not abstract
        """Takes over a memory that `state_dict` gave."""

    def close(self) -> None:  # noqa: B027 - a default, not abstract
        """Is called when training ends, by an error too."""


class Call(Hook):
    """Calls a function of the run every `every` steps: `Call(lambda run: ..., every=100)`."""

    def __init__(self, function: Callable[[Run], Any], every: int = 1):
        _checks.positive_int("hooks.Call(every)", every)
        self.every, self._function = every, function

    def __call__(self, run):
        self._function(run)


class EarlyStopping(Hook):
    """Stops when a logged metric has not improved for `patience` evaluations, that is, times that it was logged.

    Warns if the metric is not among the logged ones.

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
