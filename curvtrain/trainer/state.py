"""The one pytree that a run is: everything that a step changes and a checkpoint holds."""

import dataclasses
from typing import Any

import jax

PyTree = Any  # shapes, specs and shardings come in the same container


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State after `step` optimizer steps.

    Attributes:
      step: int32 ().
      params: nested dict of arrays in the module's own structure.
      model_state: the module's other state (batch statistics), a nested dict.
      opt_state: of the optimizer.
      curvature: what the estimator maintains, or None.
      ema: the averaged parameters, or None.
      key: the run's random key; step t uses fold_in(key, t), so it never changes.
    """

    step: Any
    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    curvature: PyTree
    ema: PyTree
    key: Any
