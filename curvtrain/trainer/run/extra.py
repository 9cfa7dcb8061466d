"""The extra arguments of an optimizer's update."""

from typing import Any

import jax

from curvtrain.curvature.draws import Draws
from curvtrain.objective import Objective

PyTree = Any


def extra_args(
    curvature: Any,
    objective: Objective,
    part: Objective,
    batch: Any,
    key: jax.Array,
    loss: jax.Array,
    grads: PyTree,
    draws: Draws | None,
) -> dict[str, Any]:
    """The extra arguments of an optimizer's update, in optax's own names where it has one.

    Args:
      curvature: what the estimator maintains.
      objective: of all parameters.
      part: of the parameters that the optimizer asks about.
      batch, key: of the step.
      loss, grads: of the step's parameters.
      draws: about the draws over which they are means; None where there are none.
    """

    # optax's line searches pass the other extra arguments on to value_fn, and reject those that it does not name
    def value_fn(params, *, batch=batch, key=key, objective=objective, curvature=None, grad_fn=None):
        return objective.loss(params, batch, key)

    def grad_fn(params, index=0):  # `optax.contrib.sam` counts its inner steps by the index
        return objective.value_and_grad(params, batch, key)[1]

    return {
        "curvature": curvature,
        "objective": part,
        "batch": batch,
        "key": key,
        "value": loss,
        "grad": grads,
        "value_fn": value_fn,
        "grad_fn": grad_fn,
        **({} if draws is None else {"draws": draws}),
    }
