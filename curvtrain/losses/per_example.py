"""Any function as a loss."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain._dtypes import wide
from curvtrain.losses.base import Batch, Loss
from curvtrain.losses.weighing import checked_names


@dataclasses.dataclass(frozen=True)
class PerExample(Loss):
    """Any function `(outputs, batch) -> values` of shape (batch,) or (batch, time) as a loss.

    Hessian and GGN products work (by differentiation); the factors and draws that other Fishers than the empirical one
    need are those of a class with `hessian_columns` and `sample_targets`.

    Attributes:
      function: the values of examples, unweighted.
      weighted_by: the entries that weight the examples, see the package.
    """

    function: Callable[[Any, Batch], jax.Array]
    _: dataclasses.KW_ONLY
    weighted_by: str | tuple[str, ...] | None = None

    def __post_init__(self):
        object.__setattr__(self, "weighted_by", checked_names("PerExample(weighted_by)", self.weighted_by))
        if not callable(self.function):
            raise TypeError(f"PerExample(function) should be a function, not {type(self.function).__name__}.")

    @property
    def _function(self):
        return "PerExample(function)"

    def values(self, outputs, batch):
        values = self.function(outputs, batch)
        self._one_per_example(values, outputs)
        return wide(jnp.asarray(values))
