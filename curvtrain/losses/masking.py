"""Weights applied to outputs."""

from typing import Any

import jax
import jax.numpy as jnp


def one_or_nan(right: jax.Array, dtype: Any) -> jax.Array:
    """One where `right` is true, else NaN: a factor that shows in values and in all of their derivatives."""
    return jnp.where(right, 1.0, jnp.nan).astype(dtype)


def weight_like(weights: jax.Array, outputs: jax.Array) -> jax.Array:
    """Per-example weights, shaped to multiply outputs whose leading axes are the examples."""
    return weights.reshape(weights.shape + (1,) * (outputs.ndim - weights.ndim))


def unmasked(outputs: Any, weights: jax.Array) -> Any:
    """The outputs, zero where their example's weight is: this cuts masked examples out of every derivative."""

    def leaf(z):
        per_example = z.shape[: weights.ndim] == weights.shape
        return jnp.where(weight_like(weights != 0, z), z, 0) if per_example else z

    return jax.tree.map(leaf, outputs)
