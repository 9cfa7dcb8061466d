"""Linear algebra on pytrees against numpy on the flattened vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from curvtrain.curvature import trees

SHAPES = {"w": (2, 3), "b": (4,), "s": ()}  # 11 numbers
CLOSE = dict(rtol=1e-6, atol=1e-6)  # sums of 11 products of order 1 in float32: 3e-7 at worst


def tree(seed, lead=(), dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=lead + shape), dtype) for name, shape in SHAPES.items()}


def flat(vector):
    return np.asarray(ravel_pytree(vector)[0], np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_vectors(dtype):
    """Inner products are taken in float32 of the values as they are."""
    a, b = tree(0, dtype=dtype), tree(1, dtype=dtype)
    assert trees.size(a) == 11
    np.testing.assert_allclose(trees.dot(a, b), flat(a) @ flat(b), **CLOSE)
    np.testing.assert_allclose(trees.norm(a), np.linalg.norm(flat(a)), **CLOSE)
    assert trees.dot(a, b).dtype == jnp.float32
    a, b = trees.wide(a), trees.wide(b)
    np.testing.assert_allclose(flat(trees.add(a, b)), flat(a) + flat(b), **CLOSE)
    np.testing.assert_allclose(flat(trees.subtract(a, b)), flat(a) - flat(b), **CLOSE)
    np.testing.assert_allclose(flat(trees.scale(-2.0, a)), -2 * flat(a), **CLOSE)


def test_bases():
    Q, v = tree(0, (5,)), tree(1)
    dense = np.asarray(trees.matrix(Q), np.float64)
    assert dense.shape == (5, 11)
    np.testing.assert_array_equal(dense[3], flat(trees.row(Q, 3)))  # columns in ravel_pytree order
    np.testing.assert_allclose(trees.coefficients(Q, v), dense @ flat(v), **CLOSE)
    c, C = np.arange(5, dtype=np.float32), np.random.default_rng(2).normal(size=(5, 2)).astype(np.float32)
    np.testing.assert_allclose(flat(trees.combine(c, Q)), c @ dense, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(trees.matrix(trees.combine(C, Q)), C.T.astype(float) @ dense, **CLOSE)
    dense[2] = flat(v)
    np.testing.assert_array_equal(trees.matrix(trees.with_row(Q, 2, v)), dense)


def test_zeros():
    a = tree(0, dtype=jnp.bfloat16)
    assert not np.any(flat(trees.zeros(a)))
    assert {k: v.shape for k, v in trees.zeros(a, 3).items()} == {"w": (3, 2, 3), "b": (3, 4), "s": (3,)}


@pytest.mark.parametrize("draw", [trees.random, trees.normal])
def test_random_vectors(draw):
    many = {"u": jnp.zeros(5000), "v": jnp.zeros((50, 100), jnp.bfloat16)}
    z = draw(jax.random.key(0), many)
    assert {leaf.dtype for leaf in z.values()} == {jnp.dtype(jnp.float32)}
    z = flat(z)
    # mean 0, variance 1, and leaves that are independent of each other: five standard errors
    assert abs(z.mean()) < 5 / 100 and abs(z.var() - 1) < 5 * np.sqrt(2) / 100
    assert abs(np.mean(z[:5000] * z[5000:])) < 5 / np.sqrt(5000)


def test_a_normal_basis():
    rows = trees.normal(jax.random.key(0), tree(0), 3)
    assert {k: v.shape for k, v in rows.items()} == {"w": (3, 2, 3), "b": (3, 4), "s": (3,)}
    assert len(np.unique(trees.matrix(rows))) == 33
