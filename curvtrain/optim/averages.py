"""Moving averages that begin at zero: how much they have seen, and what may be divided by them."""

from typing import Any

import jax
import jax.numpy as jnp


def seen(decay: float | jax.Array, count: jax.Array, dtype: Any) -> jax.Array:
    """1 - decay^count, to all digits: the weight of so many updates in the average, () of this dtype; 0 for none."""
    whole = -jnp.expm1(count.astype(dtype) * jnp.log(jnp.asarray(decay, dtype)))
    return jnp.where(count > 0, whole, jnp.zeros((), dtype))


def divided(x: jax.Array, average: jax.Array) -> jax.Array:
    """x / average, and 0 where the average is 0: nothing has been seen there, x included."""
    return jnp.where(average > 0, x / jnp.where(average > 0, average, 1.0), 0.0)
