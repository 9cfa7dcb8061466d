"""The floating-point type in which losses, curvature and averages are held: one rule, which everything follows.

| parameters | losses, curvature, averages, and the scalars among them | gradients and updates |
|---|---|---|
| float64, at least one | float64 | the parameter's own dtype |
| float32, bfloat16, float16 | float32, whatever the dtype that the model computes in | the parameter's own dtype |

Counters are int32. None of this depends on `jax_enable_x64`, but many defaults of JAX do: with the flag `jnp.zeros(3)`
is float64 and `jax.random.uniform(key)` draws other numbers. So whatever is kept is made with its dtype. Complex
numbers are refused: a derivative that loses its imaginary part is wrong without a word.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
SPLIT = "Split a complex parameter into two, its real and its imaginary part, and leave out what is no float."


def width(tree: PyTree) -> np.dtype:
    """Chooses the dtype for all that is made of a tree, of parameters for instance: float64 if a leaf is, else float32.

    Raises TypeError if a leaf is complex.
    """
    dtypes = [jax.dtypes.canonicalize_dtype(leaf.dtype) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        raise TypeError(
            "Complex numbers have no place here: losses and curvature are those of real parameters and real outputs. "
            "Split a complex array into its real and imaginary parts (z.real and z.imag) where it enters."
        )
    return FLOAT64 if FLOAT64 in dtypes else FLOAT32


def wide(tree: PyTree) -> PyTree:
    """The tree with all leaves in the dtype of `width`: exact, as no digit of theirs is lost."""
    dtype = width(tree)
    return jax.tree.map(lambda a: a.astype(dtype), tree)


def cast(tree: PyTree, like: PyTree) -> PyTree:
    """The tree with every leaf in the dtype of its counterpart in a tree of the same structure."""
    return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, like)


def check_real(params: PyTree, what: str, advice: str) -> None:
    """Raises TypeError unless all leaves are real floating-point numbers; `what` names them, `advice` helps."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.result_type(type(leaf))
        if not jnp.issubdtype(dtype, jnp.floating):
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "it"
            raise TypeError(f"{what} should be of real floating-point numbers, and {name} is {dtype}. {advice}")
