"""Linear algebra on pytrees of parameters, and on a basis: a pytree whose leaves stack m vectors, (m, *param.shape).

No vector is ever flattened or concatenated, so every leaf keeps the sharding of its parameter: an inner product is a
local contraction and one reduction of a scalar (of m scalars for a basis).
"""

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any

exact = functools.partial(jax.default_matmul_precision, "highest")  # TF32 or bf16 contractions lose orthogonality

_BYTE_DEVIATION = math.sqrt((256**2 - 1) / 12)  # of a uniform byte


def size(params: PyTree) -> int:
    """The number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def float32(tree: PyTree) -> PyTree:
    """The tree in float32: curvature is taken there whatever the parameters' own dtype."""
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


def zeros(params: PyTree, rows: int | None = None) -> PyTree:
    """A float32 zero vector like the parameters, or a basis of `rows` of them."""
    lead = () if rows is None else (rows,)
    return jax.tree.map(lambda p: jnp.zeros(lead + p.shape, jnp.float32), params)


def random(key: jax.Array, params: PyTree) -> PyTree:
    """A float32 vector like the parameters: independent entries of mean 0 and variance 1, uniform on 256 levels.

    For start vectors, where only the mean and the variance count: bytes take a fifth of the time of a normal sample.
    """
    leaves, treedef = jax.tree.flatten(params)
    level = lambda k, p: (jax.random.bits(k, p.shape, jnp.uint8).astype(jnp.float32) - 127.5) / _BYTE_DEVIATION
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten([level(k, p) for k, p in zip(keys, leaves, strict=True)])


def normal(key: jax.Array, params: PyTree, rows: int | None = None) -> PyTree:
    """A float32 vector of standard normal entries like the parameters, or a basis of `rows` of them."""
    lead = () if rows is None else (rows,)
    leaves, treedef = jax.tree.flatten(params)
    of = lambda i, p: jax.random.normal(jax.random.fold_in(key, i), lead + p.shape, jnp.float32)
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
    """<a, b>, a float32 scalar."""
    # dot_general over all axes, not vdot: vdot ravels its arguments, which would gather a sharded leaf
    leaf = lambda x, y: jax.lax.dot_general(x, y, ((tuple(range(x.ndim)),) * 2, ((), ())))
    with exact():
        parts = jax.tree.leaves(jax.tree.map(leaf, float32(a), float32(b)))
    return functools.reduce(operator.add, parts)


def norm(a: PyTree) -> jax.Array:
    """|a|, a float32 scalar."""
    return jnp.sqrt(dot(a, a))


def coefficients(basis: PyTree, vector: PyTree) -> jax.Array:
    """Q v: the m inner products of a basis with a vector, float32 (m,)."""

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
