"""What adds up over pieces, devices and processes: the total loss of a piece and its weight; and what is added once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain.losses import Loss, unmasked
from curvtrain.objective.pieces import loss_only_weight, safe

PyTree = Any


def total_of_outputs(loss: Loss, outputs: Any, piece: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """(sum_i w_i l_i, sum_i w_i)."""
    weights = loss.weights(outputs, piece)
    values = loss.values(unmasked(outputs, weights), piece)
    # where, not a product: a masked example may hold anything, and 0 * inf is not 0
    total = jnp.sum(jnp.where(weights != 0, weights * values, 0.0))
    return total.astype(dtype), jnp.sum(weights).astype(dtype)


def mean_of_loss_fn(
    loss_fn: Callable[[PyTree, Any], Any], params: PyTree, piece: Any, split: bool, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """(the mean loss of a piece, its weight); `split` as for `loss_only_weight`."""
    value = loss_fn(params, piece)
    if jnp.shape(value) != ():
        raise ValueError(
            f"The function given to Objective.from_loss should return a scalar, not shape {jnp.shape(value)}."
        )
    if jnp.iscomplexobj(value):
        raise TypeError(
            f"The function given to Objective.from_loss should return a real number, not "
            f"{jnp.asarray(value).dtype}: take jnp.abs of it, or its real part."
        )
    weight = loss_only_weight(piece, split).astype(dtype)
    return jnp.asarray(value, dtype) * (weight / safe(weight)), weight  # 0 where all is masked


def penalty_of(regulariser: Callable[[PyTree], Any], params: PyTree, dtype: Any) -> jax.Array:
    """The regulariser's value. Raises TypeError unless it is a real scalar."""
    value = regulariser(params)
    array = hasattr(value, "shape") or isinstance(value, int | float)
    if not array or jnp.shape(value) != () or not jnp.issubdtype(jnp.asarray(value).dtype, jnp.floating):
        what = f"{jnp.asarray(value).dtype} of shape {jnp.shape(value)}" if array else f"a {type(value).__name__}"
        raise TypeError(f"regulariser(params) should return a scalar, a real floating-point number, not {what}.")
    return jnp.asarray(value, dtype)


def check_regulariser(argument: str, regulariser: Any) -> None:
    """Raises TypeError unless it is a function or None."""
    if regulariser is not None and not callable(regulariser):
        raise TypeError(
            f"{argument} should be a function of the parameters, such as lambda params: 1e-4 * "
            f"optax.tree.norm(params, squared=True), not {type(regulariser).__name__}."
        )
