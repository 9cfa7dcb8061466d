"""Retention: which of a run's checkpoints stay on disk."""

import math
import warnings
from collections.abc import Sequence

from curvtrain.trainer.config import TrainerConfig


class Retention:
    """Decides which checkpoints stay: the newest, and the best of those with a score.

    Scores come from the checkpoints' metadata, so a resumed run knows those of earlier ones.
    """

    def __init__(self, config: TrainerConfig):
        self._latest, self._best, self._metric = config.keep_latest, config.keep_best, config.best_metric
        self._sign = 1.0 if config.best_mode == "max" else -1.0
        self._scores: dict[int, float] = {}

    def rank(self, step: int, scores: dict[str, float]) -> None:
        """Takes note of a checkpoint's scores; a score that is not finite does not count."""
        if scores and self._best and self._metric not in scores:
            message = f"TrainerConfig(best_metric={self._metric!r}) is none of the evaluated"
            warnings.warn(f"{message} {sorted(scores)}: nothing is kept as the best.", RuntimeWarning, stacklevel=2)
        value = self._sign * scores.get(self._metric, math.nan)
        if math.isfinite(value):
            self._scores[step] = value

    def kept(self, steps: Sequence[int]) -> list[int]:
        """The steps, of these, whose checkpoints stay."""
        steps = sorted(steps)
        ranked = sorted((step for step in steps if step in self._scores), key=lambda step: (self._scores[step], step))
        kept = {*steps[-self._latest :], *ranked[len(ranked) - min(self._best, len(ranked)) :]}
        return sorted(kept)
