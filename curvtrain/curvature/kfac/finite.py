"""Results of factorisations that may not be finite: the last good ones are kept, and padding stays harmless."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
Arrays = dict[str, jax.Array]


def diagonals(X: jax.Array) -> jax.Array:
    """(..., d) of matrices (..., d, d). Those that are sums of v v^T are finite wherever their diagonals are."""
    return jnp.diagonal(X, axis1=-2, axis2=-1)


def outside(X: jax.Array, rows: tuple[jax.Array, ...], value: float) -> jax.Array:
    """X (slots, D, D) with a value on the diagonal in these rows (slots, D), if there are such."""
    return X if not rows else jnp.where(jnp.eye(X.shape[-1], dtype=bool) & rows[0][:, None], value, X)


def keep_finite(new: PyTree, old: PyTree, shown: PyTree = None) -> tuple[PyTree, Arrays]:
    """(new, but old where its leading axis has an entry that is not finite; by name, which entries are finite).

    Dictionaries by name; the arrays of one name share their leading axis and stand or fall together. `shown` has, by
    name, what shows whether they are finite, if less than all of `new` does.
    """
    kept, finite = {}, {}
    for name, arrays in new.items():
        entries = [jnp.isfinite(a).reshape(len(a), -1).all(1) for a in jax.tree.leaves((shown or new)[name])]
        finite[name] = ok = functools.reduce(jnp.logical_and, entries)
        pick = lambda a, b, ok=ok: jnp.where(ok.reshape(-1, *(1,) * (a.ndim - 1)), a, b)
        kept[name] = jax.tree.map(pick, arrays, old[name])
    return kept, finite


def positive(values: jax.Array, Q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues of a positive semi-definite matrix, without what rounding made negative."""
    return jnp.maximum(values, 0.0), Q
