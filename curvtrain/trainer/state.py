"""The training state: one pytree that holds everything that a step changes and a checkpoint keeps."""

import dataclasses
from typing import Any

import jax

from curvtrain.objective import Objective

PyTree = Any  # arrays, shapes, specs and shardings come in the same container


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run after `step` optimizer steps.

    Attributes:
      step: int32 ().
      params: the trained parameters, a nested dict of arrays in the module's own structure.
      model_state: the module's other state (batch statistics), a nested dict.
      opt_state: the optimizer's state.
      curvature: the curvature that the estimator maintains, or None.
      ema: the averaged parameters, or None.
      key: the run's random key; step t uses fold_in(key, t), so it never changes.
      frozen: the parameters that `Trainer(trainable)` leaves as they are, a nested dict; None where all are trained.
      ema_model_state: the model state that belongs to `ema`: its floating-point arrays averaged with the same decay,
        the others as they are; None without an average, or without such state.
    """

    step: Any
    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    curvature: PyTree
    ema: PyTree
    key: Any
    frozen: PyTree = None
    ema_model_state: PyTree = None

    def at(self, objective: Objective) -> Objective:
        """The objective at this state: with its model state and its frozen parameters."""
        return objective.with_state(self.model_state).with_frozen(self.frozen)

    @property
    def evaluated(self) -> tuple[PyTree, PyTree]:
        """(the parameters that are evaluated, the model state that belongs to them): the averages, where there are."""
        if self.ema is None:
            return self.params, self.model_state
        return self.ema, self.model_state if self.ema_model_state is None else self.ema_model_state

    # -- as a pytree -----------------------------------------------------------------------------------------------

    def tree_flatten_with_keys(self):
        """The fields by name, without those that a run may lack and does, so that checkpoints lack them too."""
        absent = {name for name in ("frozen", "ema_model_state") if getattr(self, name) is None}
        names = tuple(f.name for f in dataclasses.fields(self) if f.name not in absent)
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names], names

    @classmethod
    def tree_unflatten(cls, names, values):
        """The state with these fields."""
        return cls(**dict(zip(names, values, strict=True)))
