"""The outputs of a model, a pytree of which only the floating-point leaves can be differentiated."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def floats(outputs: PyTree) -> list[jax.Array]:
    """The floating-point leaves of the outputs, in order: what derivatives are taken of."""
    return [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]


def with_floats(outputs: PyTree, values: Sequence[jax.Array]) -> PyTree:
    """The outputs with other floating-point leaves; the rest of them (labels, counts) stays as it is."""
    leaves, treedef = jax.tree.flatten(outputs)
    rest = iter(values)
    is_float = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    return treedef.unflatten([next(rest) if is_float(leaf) else leaf for leaf in leaves])
