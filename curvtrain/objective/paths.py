"""Parameters by the names of their leaves, whatever containers they come in.

The same parameters come as nested dicts (from an `Objective`), as an `nnx.State` of variables or of arrays (from
`nnx.Optimizer`), and with holes (`optax.masked` puts a node without leaves where a parameter is not). A leaf's path,
a tuple of dictionary keys, indices and attribute names, is the same in all of them.
"""

from collections.abc import Collection, Mapping
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


def chosen_of(params: PyTree, paths: Collection[Path]) -> tuple[dict[Path, Any], dict[Path, Any]]:
    """(the leaves at these paths, the others). Raises ValueError for a path that is no parameter's, or none at all."""
    leaves, chosen = by_path(params), set(paths)
    if not chosen or not chosen <= leaves.keys():
        unknown = sorted(map(path_name, chosen - leaves.keys()))
        raise ValueError(
            f"Objective.select(paths) should name parameters, such as {list(leaves)[:3]}"
            + (f"; {unknown[:3]} are none." if unknown else ", at least one.")
        )
    of = lambda inside: {path: leaf for path, leaf in leaves.items() if (path in chosen) == inside}
    return of(True), of(False)


def over(vector: PyTree, wanted: Collection[Path]) -> PyTree:
    """A vector as a nested dict. Raises ValueError if its leaves are not just at the wanted paths."""
    leaves = by_path(vector)
    if leaves.keys() != set(wanted):
        odd = sorted(map(path_name, leaves.keys() ^ set(wanted)))
        raise ValueError(
            f"The objective is a function of other parameters than it is given: {', '.join(odd[:3])} "
            f"{'is' if len(odd) == 1 else 'are'} on one side only. Freeze the others with Objective.select(params, "
            f"paths)."
        )
    return nested(leaves)


def path_name(path: Path) -> str:
    """A path as users read and write it: "encoder/0/kernel"."""
    return "/".join(map(str, path))


def _plain(key: Any) -> Any:
    """The dictionary key, index or attribute name that an entry of a JAX key path stands for."""
    for field in ("key", "idx", "name"):
        if hasattr(key, field):
            return getattr(key, field)
    return str(key)
