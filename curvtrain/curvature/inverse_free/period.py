"""A period that grows with time: factors that start from the identity move in every step at first."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain import _checks

_LARGEST = 15  # 4^16 is no int32


@dataclasses.dataclass(frozen=True)
class Warmed:
    """min(max(floor(log4(t + 1)), 1), most): IF-Shampoo's steps between two updates of its factors.

    `CurvatureSchedule(update_every=Warmed(10))`. Lin et al. (2024), arXiv 2402.03496, in their prototype.

    Attributes:
      most: the largest period, at most 15 steps: later ones begin after 2^31 steps.
    """

    most: int = 10

    def __post_init__(self):
        _checks.positive_int("Warmed(most)", self.most)

    def __call__(self, step: Any) -> Any:
        """The period at a step. An int for an int, an int32 array for an array."""
        powers = [4**k for k in range(2, min(self.most, _LARGEST) + 1)]
        if isinstance(step, jax.Array):
            return 1 + jnp.sum(step + 1 >= jnp.asarray(powers, jnp.int32), dtype=jnp.int32)
        return 1 + sum(step + 1 >= power for power in powers)
