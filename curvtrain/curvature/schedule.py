"""When curvature is updated and refreshed: a pure function of the step, decided on the host."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from curvtrain import _checks
from curvtrain.curvature.request import Request

Period = int | Callable[[int], int]

REFRESH_EVERY = 100  # steps, unless the schedule or the optimizer says otherwise


@dataclasses.dataclass(frozen=True)
class CurvatureSchedule:
    """Which steps absorb their batch (`update`) and which factorise or eigensolve (`refresh`).

    Attributes:
      update_every, refresh_every: periods in steps, an int or a function `step -> int` (an annealed frequency): after
        an update at step t, the next is at step t + period(t). The first update and refresh happen at step `start`,
        before that step's parameters move. `update_every=None`: as often as the optimizer asks, which is every step
        for all but `optim.adafisher(faithful=True)`. `refresh_every=None`: as often as the optimizer adapts its
        damping, so that what is factorised fits it (`optim.kfac()`: every 5 steps); for others every 100 steps.
      start: the first step (counted from 0) with curvature. Until then, optimizers see the initial, empty one.
      batch_size: number of examples that a refresh sees; None is the training batch itself. A larger number is drawn
        from a stream of its own, so the order of the training data does not depend on it, and is micro-batched.
      update_first: False lets a step move the parameters first, with the curvature as it was: independent of the batch
        that it is applied to, and off the critical path. Only then the batch is absorbed, and the curvature refreshed,
        still at the parameters of before.
    """

    update_every: Period | None = None
    refresh_every: Period | None = None
    start: int = 0
    batch_size: int | None = None
    update_first: bool = True

    def __post_init__(self):
        for name in ("update_every", "refresh_every"):
            period = getattr(self, name)
            if period is not None and not callable(period):
                _checks.positive_int(f"CurvatureSchedule({name})", period)
        _checks.positive_int("CurvatureSchedule(start)", self.start, minimum=0)
        if self.batch_size is not None:
            _checks.positive_int("CurvatureSchedule(batch_size)", self.batch_size)

    def updates(self, step: int) -> bool:
        """Whether curvature absorbs the batch of this step."""
        return self._due(step, 1 if self.update_every is None else self.update_every)

    def refreshes(self, step: int) -> bool:
        """Whether curvature is factorised at this step."""
        return self._due(step, REFRESH_EVERY if self.refresh_every is None else self.refresh_every)

    def settled(self, found: Sequence[Request]) -> "CurvatureSchedule":
        """The same schedule with all periods fixed, for an optimizer with these requests."""
        shortest = lambda periods, default: min((p for p in periods if p is not None), default=default)
        update, refresh = self.update_every, self.refresh_every
        if update is None:
            update = shortest([request.update_every or 1 for request in found], 1)
        if refresh is None:
            refresh = shortest([request.damping_every for request in found], REFRESH_EVERY)
        return dataclasses.replace(self, update_every=update, refresh_every=refresh)

    def _due(self, step: int, period: Period) -> bool:
        if step < self.start:
            return False
        if not callable(period):
            return (step - self.start) % period == 0
        return _times(period, self.start).has(step)


class _Times:
    """The steps t, t + period(t), ... from a start, as far as they were asked for."""

    def __init__(self, period: Callable[[int], int], start: int):
        self._period, self._last, self._found = period, start, {start}

    def has(self, step: int) -> bool:
        """Whether a step is one of them."""
        while self._last < step:
            self._last += _checked_period(self._period(self._last), self._last)
            self._found.add(self._last)
        return step in self._found


@functools.lru_cache(maxsize=64)
def _times(period: Callable[[int], int], start: int) -> _Times:
    return _Times(period, start)


def _checked_period(every: Any, step: int) -> int:
    try:
        every = operator.index(every)  # a fraction is no number of steps
    except TypeError:
        raise TypeError(f"A period of CurvatureSchedule should be an integer, not {every!r} at step {step}.") from None
    if every < 1:
        raise ValueError(f"A period of CurvatureSchedule should be at least 1 step, not {every} at step {step}.")
    return every
