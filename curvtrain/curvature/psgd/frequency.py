"""How often a preconditioner is fitted: often at first, then ever more rarely."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain import _checks


@dataclasses.dataclass(frozen=True)
class Annealed:
    """p(t) = min(high, max(low, high exp(-decay (t - flat)))): the share of steps that fit, around step t.

    For `PSGD(update_probability=Annealed())`, or, decided on the host,
    `CurvatureSchedule(update_every=Annealed().period)`.
    """

    high: float = 1.0
    low: float = 0.03
    decay: float = 0.001
    flat: int = 500

    def __post_init__(self):
        _checks.number_in("Annealed(high)", self.high, 0.0, 1.0, open_low=True)
        _checks.number_in("Annealed(low)", self.low, 0.0, self.high, open_low=True)
        _checks.number_in("Annealed(decay)", self.decay, 0.0)
        _checks.positive_int("Annealed(flat)", self.flat, minimum=0)

    def __call__(self, step: Any) -> jax.Array:
        """p at a step, a number or an array."""
        return jnp.clip(self.high * jnp.exp(-self.decay * (step - self.flat)), self.low, self.high)

    def period(self, step: int) -> int:
        """1 / p, rounded: the steps between two fits."""
        falling = self.high * math.exp(-self.decay * max(step - self.flat, 0))
        return round(1.0 / min(self.high, max(self.low, falling)))
