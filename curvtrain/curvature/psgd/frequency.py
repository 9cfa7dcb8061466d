"""Numbers that fall with time: how often a preconditioner is fitted, and at what rate."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain import _checks

RULES = ("deterministic", "bernoulli")
_SURE = 2  # the first calls fit whatever the probability
_ROUNDING = 1e-5  # of a number of calls times a probability that should be 1


def is_due(rule: str, probability: Any, calls: jax.Array, waited: jax.Array, key: jax.Array) -> jax.Array:
    """Whether the call after `calls`, and after `waited` since the last fit, is to fit.

    "deterministic": the first, then as soon as 1 / probability have passed. "bernoulli": the first two, then by chance.
    """
    if rule == "bernoulli":
        return (jax.random.uniform(key, dtype=jnp.float32) < probability) | (calls < _SURE)
    return ((waited + 1) * probability >= 1.0 - _ROUNDING) | (calls == 0)


@dataclasses.dataclass(frozen=True)
class Annealed:
    """p(t) = min(high, max(low, high exp(-decay (t - flat)))).

    As the share of steps that fit: `PSGD(update_probability=Annealed())`, or, decided on the host,
    `CurvatureSchedule(update_every=Annealed().period)`. As the rate of the fits: `PSGD(rate=Annealed(0.5, 0.1))`.

    Attributes:
      high: the largest value, in (0, 1].
      low: the smallest value, in (0, high].
      decay: how fast it falls, per step.
      flat: the step from which on it falls.
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

    def period(self, step: Any) -> Any:
        """1 / p, rounded: the steps until the next fit. An int for an int, an int32 array for an array."""
        if not isinstance(step, jax.Array):
            falling = self.high * math.exp(-self.decay * max(step - self.flat, 0))
            return round(1.0 / min(self.high, max(self.low, falling)))
        return jnp.round(1.0 / self(step)).astype(jnp.int32)
