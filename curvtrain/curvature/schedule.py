"""When curvature is updated and refreshed: a pure function of the step, decided on the host."""

import dataclasses
import operator
from collections.abc import Callable

from curvtrain import _checks

Period = int | Callable[[int], int]


@dataclasses.dataclass(frozen=True)
class CurvatureSchedule:
    """Which steps absorb their batch (`update`) and which factorise or eigensolve (`refresh`).

    Attributes:
      update_every, refresh_every: periods in steps, an int or a function `step -> int` (an annealed frequency). The
        first update and refresh happen at step `start`, before that step's parameters move.
      start: the first step (counted from 0) with curvature. Until then, optimizers see the initial, empty one.
      batch_size: number of examples that a refresh sees; None is the training batch itself. A larger number is drawn
        from a stream of its own, so the order of the training data does not depend on it, and is micro-batched.
      update_first: False lets a step move the parameters first, with the curvature as it was: independent of the batch
        that it is applied to, and off the critical path. Only then the batch is absorbed, and the curvature refreshed,
        still at the parameters of before.
    """

    update_every: Period = 1
    refresh_every: Period = 100
    start: int = 0
    batch_size: int | None = None
    update_first: bool = True

    def __post_init__(self):
        for name in ("update_every", "refresh_every"):
            period = getattr(self, name)
            if not callable(period):
                _checks.positive_int(f"CurvatureSchedule({name})", period)
        _checks.positive_int("CurvatureSchedule(start)", self.start, minimum=0)
        if self.batch_size is not None:
            _checks.positive_int("CurvatureSchedule(batch_size)", self.batch_size)

    def updates(self, step: int) -> bool:
        """Whether curvature absorbs the batch of this step."""
        return self._due(step, self.update_every)

    def refreshes(self, step: int) -> bool:
        """Whether curvature is factorised at this step."""
        return self._due(step, self.refresh_every)

    def _due(self, step: int, period: Period) -> bool:
        if step < self.start:
            return False
        every = period(step) if callable(period) else period
        try:
            every = operator.index(every)  # a fraction would be due at the steps that it happens to divide
        except TypeError:
            raise TypeError(
                f"A period of CurvatureSchedule should be an integer, not {every!r} at step {step}."
            ) from None
        if every < 1:
            raise ValueError(f"A period of CurvatureSchedule should be at least 1 step, not {every} at step {step}.")
        return (step - self.start) % every == 0
