"""Factorisations of stacks against float64, and against what LAPACK makes of them in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvtrain.curvature import stacks

EPS = 2.0**-24


@jax.jit
def inverse(X, shift, kept=None):
    return stacks.inverses({"": X}, {"": shift}, {} if kept is None else {"": kept})[""]


def spd(d, condition, seed=0):
    """A random matrix of size d with eigenvalues from 1 down to 1 / condition, evenly in their logarithm."""
    Q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))
    return ((Q * np.geomspace(1, 1 / condition, d)) @ Q.T).astype(np.float32)


def error(got, X, shift=0.0):
    """Relative to the largest entry of the inverse in float64."""
    want = np.linalg.inv(X.astype(np.float64) + shift * np.eye(len(X)))
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


@functools.cache
def by_lapack(d):
    def function(X):
        L = jnp.linalg.cholesky(X, symmetrize_input=False)
        half = jax.scipy.linalg.solve_triangular(L, jnp.eye(d), lower=True)
        return jnp.matmul(half.T, half, precision="highest")

    return jax.jit(function)


# within one block, on the edges of blocks, and with a last block of every kind
@pytest.mark.parametrize("d", [1, 2, 31, 32, 33, 64, 65, 100, 256, 257, 300])
def test_inverses_are_as_accurate_as_lapack(d):
    for seed, condition in enumerate((1.0, 1e2, 1e4, 1e6)):
        X = spd(d, condition, seed)
        got = error(inverse(X[None], jnp.zeros(1))[0], X)
        assert got <= 1e-6 + 0.3 * EPS * condition
        assert got <= 1e-6 + 4 * error(by_lapack(d)(X), X)


def test_many_blocks():
    """Larger matrices have larger blocks, not more."""
    X = spd(1100, 1e3)
    assert error(inverse(X[None], jnp.zeros(1))[0], X) <= 1e-6 + EPS * 1e3


def test_each_matrix_has_its_shift():
    X = np.stack([np.zeros((70, 70), np.float32), spd(70, 1e2), 1e6 * spd(70, 1e4), 1e-6 * spd(70, 1e2)])
    shifts = np.array([1e-3, 0.1, 1e4, 1e-6], np.float32)
    for got, x, shift in zip(inverse(X, shifts), X, shifts, strict=True):
        assert error(got, x, shift) <= 5e-6


@pytest.mark.parametrize("d", [3, 80])
def test_a_matrix_without_an_inverse_shows_on_the_diagonal(d):
    """Not positive definite, or not finite: nothing else is touched."""
    good, indefinite, broken = spd(d, 10.0), np.diag(np.arange(d) - 1.0).astype(np.float32), spd(d, 10.0)
    broken[d - 1, 0] = np.nan
    got = np.asarray(inverse(np.stack([good, indefinite, broken, good]), jnp.zeros(4)))
    assert list(np.isfinite(np.diagonal(got, axis1=1, axis2=2)).all(1)) == [True, False, False, True]
    np.testing.assert_array_equal(got[0], got[3])


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
@pytest.mark.parametrize("due", [(True, False, True), (False, False, False), (True, True, True)])
def test_what_is_not_due_is_kept(together, due, monkeypatch):
    """Matrix by matrix, as on a CPU, or in a batch, as elsewhere."""
    if together:
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    X, due = np.stack([spd(40, 1e2, seed) for seed in range(3)]), np.array(due)
    old = np.arange(3.0, dtype=np.float32)[:, None, None] + np.zeros_like(X)
    found = jax.jit(inverse.__wrapped__)(X, np.full(3, 0.1, np.float32), (due, old))
    for got, x, before, now in zip(found, X, old, due, strict=True):
        assert error(got, x, 0.1) <= 1e-5 if now else np.array_equal(got, before)
    values, Q = jax.jit(stacks.eigh)(X, (due, (old[:, 0], old)))
    for i, now in enumerate(due):
        if now:
            np.testing.assert_allclose(Q[i] * values[i] @ Q[i].T, X[i], atol=1e-5)
        else:
            assert np.array_equal(values[i], old[i, 0]) and np.array_equal(Q[i], old[i])


def test_small_sizes_share_a_program():
    """Whatever of them is due."""
    X = {str(d): np.stack([spd(d, 1e2, seed) for seed in range(2)]) for d in (40, 41, 70, 7, 8)}
    shifts = {size: np.full(2, 0.1, np.float32) for size in X}
    old = {size: np.full_like(x, 7) for size, x in X.items()}
    kept = {size: (np.array([True, False]), old[size]) for size in ("41", "7")}
    found = jax.jit(stacks.inverses)(X, shifts, kept)
    for size, x in X.items():
        assert error(found[size][0], x[0], 0.1) <= 1e-5
        assert (
            np.array_equal(found[size][1], old[size][1]) if size in kept else error(found[size][1], x[1], 0.1) <= 1e-5
        )
    assert stacks._groups({size: int(size) for size in (*X, "300", "290")}) == {
        (96, 32): [*X],
        (320, 32): ["300", "290"],
    }


def test_eigenvectors_of_each_matrix():
    X = np.stack([spd(9, 1e3, seed) for seed in range(3)])
    for values, Q, x in zip(*jax.jit(stacks.eigh)(X), X, strict=True):
        np.testing.assert_allclose(Q @ np.diag(values) @ Q.T, x, atol=1e-6)


def test_stacks_go_in_turn():
    """Whatever the results are, not a number too, the next stack is what it was."""
    arrays = {"a": jnp.ones(2), "b": jnp.full(3, 2.0), "c": jnp.full(1, 3.0)}
    seen = jax.jit(lambda arrays: stacks.in_turn(lambda name, x: x * jnp.nan if name == "a" else x, arrays))(arrays)
    np.testing.assert_array_equal(seen["b"], arrays["b"])
    np.testing.assert_array_equal(seen["c"], arrays["c"])
