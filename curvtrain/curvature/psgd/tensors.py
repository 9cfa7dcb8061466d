"""Products with factors, and contractions, along one side of equal tensors: arrays X (k, L, *sides) of k probes.

| name | shape | meaning |
|---|---|---|
| factor | (L, B, b, b) or (L, n) | a dense factor in B blocks, or a diagonal one, for each of L tensors |
| contract_i(X) | like the factor | sum over all other axes of X[.. a ..] X[.. b ..]: its blocks, or its diagonal |
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain.curvature.psgd.layout import Bucket, Side

Factors = list[Any]  # one entry for each side: (L, B, b, b), (L, n), or None


def multiply(sides: Sequence[Side], factors: Factors, X: jax.Array) -> jax.Array:
    """X with every factor applied along its side."""
    for i, (side, factor) in enumerate(zip(sides, factors, strict=True)):
        X = multiply_side(side, i, factor, X)
    return X


def multiply_side(side: Side, i: int, factor: jax.Array | None, X: jax.Array) -> jax.Array:
    """X with a factor applied along side i; X itself where the side has none."""
    if factor is None:
        return X
    if side.kind != "dense":
        return X * factor.reshape(1, factor.shape[0], *(n if j == i else 1 for j, n in enumerate(X.shape[2:])))
    return _over_probes(lambda X: _in_blocks(factor, _split(side, i, X)).reshape(X.shape), X)


def contract(side: Side, i: int, X: jax.Array) -> jax.Array:
    """contract_i(X), the mean over probes."""
    k = X.shape[0]
    if side.kind != "dense":
        total = jnp.sum(jnp.square(X), axis=(0, *(2 + j for j in range(X.ndim - 2) if j != i)))
        return total if k == 1 else total / k
    products = _over_probes(lambda X: _gramian(_split(side, i, X)), X)
    return products[0] if k == 1 else jnp.mean(products, axis=0)


def masked(bucket: Bucket, X: jax.Array) -> jax.Array:
    """X with zeros in the padding of its sides."""
    for i, side in enumerate(bucket.sides):
        if (mask := side.mask()) is not None:
            X = X * mask.reshape(*(-1 if j == 2 + i else 1 for j in range(X.ndim)))
    return X


def along(x: jax.Array, ndim: int, axis: int = 0) -> jax.Array:
    """A vector as an array of `ndim` axes that runs along one of them."""
    return x.reshape(*(-1 if j == axis else 1 for j in range(ndim)))


def _in_blocks(factor: jax.Array, X: jax.Array) -> jax.Array:
    """Multiplies by the blocks (L, B, b, b) along b of X (L, before, B, b, after).

    Along a first side these are matrix products without copies, along a last one with copies whose innermost axis
    stays where it is.
    """
    L, before, B, b, after = X.shape
    if before == 1:
        return factor @ X.reshape(L, B, b, after)
    if after == 1:
        return jnp.swapaxes(jnp.swapaxes(X.reshape(L, before, B, b), 1, 2) @ jnp.swapaxes(factor, -1, -2), 1, 2)
    return jnp.einsum("lBab,lpBbq->lpBaq", factor, X)


def _gramian(X: jax.Array) -> jax.Array:
    """(L, B, b, b) of X (L, before, B, b, after)."""
    L, before, B, b, after = X.shape
    if before == 1:
        X = X.reshape(L, B, b, after)
        return X @ jnp.swapaxes(X, -1, -2)
    if after == 1:
        X = jnp.swapaxes(X.reshape(L, before, B, b), 1, 2)
        return jnp.swapaxes(X, -1, -2) @ X
    return jnp.einsum("lpBaq,lpBcq->lBac", X, X)


def _split(side: Side, i: int, X: jax.Array) -> jax.Array:
    """(L, before, B, b, after)."""
    before, after = math.prod(X.shape[1 : 1 + i]), math.prod(X.shape[2 + i :])
    return X.reshape(X.shape[0], before, side.count, side.block, after)


def _over_probes(function: Callable[[jax.Array], jax.Array], X: jax.Array) -> jax.Array:
    return function(X[0])[None] if len(X) == 1 else jax.vmap(function)(X)
