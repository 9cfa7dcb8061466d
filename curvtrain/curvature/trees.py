"""Linear algebra on pytrees of parameters, and on a basis: a pytree whose leaves stack m vectors, (m, *param.shape).

No vector is ever flattened or concatenated, so every leaf keeps the sharding of its parameter: an inner product is a
local contraction and one reduction of a scalar (of m scalars for a basis).

What is made of parameters has the dtype that `width` chooses for them: float64 where one of them is, float32 otherwise.
See `curvtrain/_dtypes.py` for the rule.
"""

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain._dtypes import cast as cast
from curvtrain._dtypes import wide as wide
from curvtrain._dtypes import width as width

PyTree = Any

exact = functools.partial(jax.default_matmul_precision, "highest")  # TF32 or bf16 contractions lose orthogonality


def size(params: PyTree) -> int:
    """The number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def zeros(params: PyTree, rows: int | None = None) -> PyTree:
    """A zero vector like the parameters, or a basis of `rows` of them, in the dtype of `width`."""
    lead, dtype = () if rows is None else (rows,), width(params)
    return jax.tree.map(lambda p: jnp.zeros(lead + p.shape, dtype), params)


def offsets(sizes: Sequence[int]) -> list[int]:
    """Where each of several consecutive pieces begins."""
    return list(itertools.accumulate(sizes, initial=0))[:-1]


def random(key: jax.Array, params: PyTree, draw: jax.Array | int = 0) -> PyTree:
    """A vector like the parameters: independent uniform entries of mean 0 and variance 1, in the dtype of `width`.

    For start vectors, where only the mean and the variance count. An entry is a hash of the key, of the number `draw`
    and of its index in the raveled vector: a few elementwise instructions, and the same number however the vector is
    stored.
    """
    leaves, treedef = jax.tree.flatten(params)
    starts, dtype = offsets([leaf.size for leaf in leaves]), width(params)
    of = lambda p, start: noise(key, p.shape, [start], draw)[0].astype(dtype)
    return treedef.unflatten([of(p, start) for p, start in zip(leaves, starts, strict=True)])


def noise(key: jax.Array, shape: tuple[int, ...], starts: Sequence[int], draw: jax.Array | int = 0) -> jax.Array:
    """Pieces of a vector that `random` draws: float32 (pieces, *shape), piece i from the index `starts[i]` on."""
    seeds = jax.random.bits(key, (2,), jnp.uint32)
    whole = (len(starts), *shape)
    first = jnp.asarray([start % 2**32 for start in starts], jnp.uint32)
    index = jnp.broadcast_to(first.reshape(-1, *[1] * len(shape)), whole)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        index = index + jnp.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, whole, axis + 1)
    bits = _mixed(_mixed(index ^ seeds[0]) ^ (seeds[1] + jnp.asarray(draw, jnp.uint32)))
    uniform = (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24) + jnp.float32(2**-25 - 0.5)
    return uniform * jnp.float32(math.sqrt(12))


def _mixed(bits: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: every bit of the input changes every bit of the result."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def normal(key: jax.Array, params: PyTree, rows: int | None = None) -> PyTree:
    """A vector of standard normal entries like the parameters, or a basis of `rows` of them, of `width`'s dtype."""
    lead, dtype = () if rows is None else (rows,), width(params)
    leaves, treedef = jax.tree.flatten(params)
    of = lambda i, p: jax.random.normal(jax.random.fold_in(key, i), lead + p.shape, dtype)
    return treedef.unflatten([of(i, p) for i, p in enumerate(leaves)])


def add(a: PyTree, b: PyTree) -> PyTree:
    """a + b."""
    return jax.tree.map(jnp.add, a, b)


def subtract(a: PyTree, b: PyTree) -> PyTree:
    """a - b."""
    return jax.tree.map(jnp.subtract, a, b)


def scale(factor: jax.Array | float, a: PyTree) -> PyTree:
    """factor * a."""
    return jax.tree.map(lambda x: factor * x, a)


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """<a, b>, a scalar in the dtype of `width`."""
    # dot_general over all axes, not vdot: vdot ravels its arguments, which would gather a sharded leaf
    leaf = lambda x, y: jax.lax.dot_general(x, y, ((tuple(range(x.ndim)),) * 2, ((), ())))
    dtype = width((a, b))
    same = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    with exact():
        parts = jax.tree.leaves(jax.tree.map(leaf, same(a), same(b)))
    return functools.reduce(operator.add, parts)


def norm(a: PyTree) -> jax.Array:
    """|a|, a scalar in the dtype of `width`."""
    return jnp.sqrt(dot(a, a))


def coefficients(basis: PyTree, vector: PyTree) -> jax.Array:
    """Q v: the m inner products of a basis with a vector, (m,) in the basis's dtype."""

    def leaf(q, v):
        axes = tuple(range(v.ndim))
        return jax.lax.dot_general(q, v.astype(q.dtype), ((tuple(a + 1 for a in axes), axes), ((), ())))

    with exact():
        parts = jax.tree.leaves(jax.tree.map(leaf, basis, vector))
    return functools.reduce(operator.add, parts)


def combine(weights: jax.Array, basis: PyTree) -> PyTree:
    """Q^T c: the combination of a basis's vectors. `weights` (m,) gives a vector, (m, k) a basis of k vectors."""
    with exact():
        return jax.tree.map(lambda q: jnp.tensordot(weights.T, q, axes=1), basis)


def row(basis: PyTree, index: jax.Array | int) -> PyTree:
    """Vector `index` of a basis."""
    return jax.tree.map(lambda q: jax.lax.dynamic_index_in_dim(q, index, 0, keepdims=False), basis)


def with_row(basis: PyTree, index: jax.Array | int, vector: PyTree) -> PyTree:
    """The basis with vector `index` replaced; in place where the basis is not read again."""
    return jax.tree.map(lambda q, v: jax.lax.dynamic_update_index_in_dim(q, v, index, 0), basis, vector)


def matrix(basis: PyTree) -> jax.Array:
    """The basis as a dense (m, n) matrix, columns in `jax.flatten_util.ravel_pytree` order. For small problems."""
    leaves = jax.tree.leaves(basis)
    return jnp.concatenate([q.reshape(q.shape[0], -1) for q in leaves], axis=1)
