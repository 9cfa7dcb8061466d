"""Sums over the rows of products: every position of an example by itself, or one row for each example."""

import math

import jax
import jax.numpy as jnp

from curvtrain.curvature.capture.layers.gradients import Backward, Products
from curvtrain.objective import safe


def shared(
    products: Products, backward: Backward, weight_sharing: str
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(a, s, row weights) with one row per position, or per example."""
    a, s = products.a, products.s
    w = backward.row_weights(a.shape[2], s)
    if weight_sharing == "expand" or a.shape[2] == 1:
        return a, s, w
    s = jnp.sum(s, axis=2, keepdims=True)
    if w is None:
        return jnp.mean(a, axis=2, keepdims=True), s, None
    mean = jnp.sum(w[None, :, :, None] * a, axis=2, keepdims=True) / safe(jnp.sum(w, 1))[None, :, None, None]
    return mean, s, jnp.max(w, axis=1, keepdims=True)


def total_weight(a: jax.Array, w: jax.Array | None) -> jax.Array:
    """The weight of all rows a (g, N, R, d)."""
    return jnp.float32(math.prod(a.shape[1:3])) if w is None else jnp.sum(w)


def second_moment(a: jax.Array, w: jax.Array | None) -> jax.Array:
    """sum over rows of w a a^T: (g, d, d)."""
    a = a.reshape(a.shape[0], -1, a.shape[-1])
    weighted = a if w is None else a * w.reshape(1, -1, 1)
    return jnp.einsum("gmi,gmj->gij", weighted, a)


def second_moment_diagonal(a: jax.Array, w: jax.Array | None) -> jax.Array:
    """sum over rows of w a^2: (g, d)."""
    a = jnp.square(a.reshape(a.shape[0], -1, a.shape[-1]))
    return jnp.sum(a if w is None else a * w.reshape(1, -1, 1), axis=1)
