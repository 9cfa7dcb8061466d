"""Parameters by the names of their leaves, whatever containers they come in.

The same parameters come as nested dicts (from an `Objective`), as an `nnx.State` of variables or of arrays (from
`nnx.Optimizer`), and with holes (`optax.masked` puts a node without leaves where a parameter is not). A leaf's path,
a tuple of dictionary keys, indices and attribute names, is the same in all of them.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

PyTree = Any
Path = tuple[Any, ...]


def by_path(tree: PyTree) -> dict[Path, Any]:
    """The leaves of a tree by path, in the order of `jax.tree.leaves`; variables count as what they hold."""
    is_variable = lambda node: isinstance(node, nnx.Variable)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable)
    value = lambda leaf: leaf.get_value() if is_variable(leaf) else leaf
    return {tuple(map(_plain, path)): value(leaf) for path, leaf in leaves}


def nested(leaves: Mapping[Path, Any]) -> PyTree:
    """A nested dict with these leaves; the inverse of `by_path` for trees of dicts."""
    tree: dict[Any, Any] = {}
    for path, leaf in leaves.items():
        if not path:
            return leaf
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return tree


def path_name(path: Path) -> str:
    """A path as users read and write it: "encoder/0/kernel"."""
    return "/".join(map(str, path))


def _plain(key: Any) -> Any:
    """The dictionary key, index or attribute name that an entry of a JAX key path stands for."""
    for field in ("key", "idx", "name"):
        if hasattr(key, field):
            return getattr(key, field)
    return str(key)
