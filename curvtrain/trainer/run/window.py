"""The steps since the last log: their metrics, which stay on the devices until they are asked for."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from curvtrain.trainer.run.step import Seen
from curvtrain.trainer.watch.metrics import Metrics, compute, merge


class Window:
    """Metrics of steps. The host runs ahead of the devices, by so many steps at most."""

    def __init__(self, in_flight: int):
        self._seen: list[Seen] = []
        self._settled = 0  # so many of them have been looked at
        self._in_flight = in_flight

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, seen: Seen) -> None:
        """Takes note of a step; waits if too many are under way."""
        self._seen.append(seen)
        if len(self._seen) > self._in_flight:
            jax.block_until_ready(self._seen[-self._in_flight])

    def settle(self, step: int) -> tuple[dict[int, bool], tuple[int, float] | None]:
        """Fetches what has not been looked at yet; `step` is the latest step.

        Returns:
          ({step: whether it was skipped}, (the first other step whose loss is not finite, its loss) or None).
        """
        self._seen = jax.device_get(self._seen)
        first, skipped, bad = step - len(self._seen) + 1, {}, None
        for at, (metrics, was_skipped) in enumerate(self._seen[self._settled :], start=first + self._settled):
            skipped[at] = was_skipped is not None and bool(was_skipped)
            if bad is None and not skipped[at] and not np.isfinite(metrics["loss"].total):
                bad = at, float(metrics["loss"].compute())
        self._settled = len(self._seen)
        return skipped, bad

    def take(self) -> dict[str, float]:
        """The means over the steps that were not skipped, by name, and begins anew; empty if all were."""
        kept = [metrics for metrics, skipped in self._seen if skipped is None or not skipped]
        self._seen, self._settled = [], 0
        add: Callable[[Metrics | None, Metrics], Metrics] = merge
        return compute(functools.reduce(add, kept)) if kept else {}
