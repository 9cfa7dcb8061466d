"""What adds up over pieces, devices and processes: the total loss of a piece and its weight; and what is added once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain.losses import Loss, unmasked
from curvtrain.objective.pieces import loss_only_weight

PyTree = Any


def total_of_outputs(loss: Loss, outputs: Any, piece: Any) -> tuple[jax.Array, jax.Array]:
    """(sum_i w_i l_i, sum_i w_i)."""
    weights = loss.weights(outputs, piece)
    values = loss.values(unmasked(outputs, weights), piece)
    # where, not a product: a masked example may hold anything, and 0 * inf is not 0
    return jnp.sum(jnp.where(weights != 0, weights * values, 0.0)), jnp.sum(weights)


def total_of_loss_fn(loss_fn: Callable[[PyTree, Any], Any], params: PyTree, piece: Any) -> tuple[jax.Array, jax.Array]:
    """(the mean loss of a piece times its weight, its weight)."""
    weight = loss_only_weight(piece)
    value = loss_fn(params, piece)
    if jnp.shape(value) != ():
        raise ValueError(
            f"The function given to Objective.from_loss should return a scalar, not shape {jnp.shape(value)}."
        )
    return jnp.asarray(value, jnp.float32) * weight, weight


def penalty_of(regulariser: Callable[[PyTree], Any], params: PyTree) -> jax.Array:
    """The regulariser's value. Raises TypeError unless it is a real scalar."""
    value = regulariser(params)
    array = hasattr(value, "shape") or isinstance(value, int | float)
    if not array or jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        what = f"{jnp.result_type(value)} of shape {jnp.shape(value)}" if array else f"a {type(value).__name__}"
        raise TypeError(f"regulariser(params) should return a scalar, a real floating-point number, not {what}.")
    return jnp.asarray(value, jnp.float32)


def check_regulariser(argument: str, regulariser: Any) -> None:
    """Raises TypeError unless it is a function or None."""
    if regulariser is not None and not callable(regulariser):
        raise TypeError(
            f"{argument} should be a function of the parameters, such as lambda params: 1e-4 * "
            f"optax.tree.norm(params, squared=True), not {type(regulariser).__name__}."
        )
