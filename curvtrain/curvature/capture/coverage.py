"""Which layer every parameter belongs to: proof that none is forgotten, and a table that says so."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from curvtrain._text import table
from curvtrain.curvature.capture.layers import LAYERS, WRAPPERS, Layer, Path, PlainParameter, Unsupported
from curvtrain.objective import Objective

PyTree = Any

UNCOVERED = ("error", "diagonal")


@dataclasses.dataclass(frozen=True)
class Coverage:
    """The layers of a model, every parameter in exactly one of them. Static: hashable, without arrays.

    Attributes:
      layers: in the order of the parameters; `PlainParameter`s last.
    """

    layers: tuple[Layer, ...]

    @property
    def known(self) -> tuple[Layer, ...]:
        """The layers other than plain parameters."""
        return tuple(layer for layer in self.layers if not isinstance(layer, PlainParameter))

    @property
    def plain(self) -> tuple[PlainParameter, ...]:
        return tuple(layer for layer in self.layers if isinstance(layer, PlainParameter))

    def matrices(self, vector: PyTree) -> dict[str, jax.Array]:
        """A vector like the parameters as each layer's M."""
        return {layer.name: layer.matrix(at(vector, layer.path)) for layer in self.layers}

    def vector(self, matrices: Mapping[str, jax.Array]) -> PyTree:
        """The inverse of `matrices`: a nested dict like the parameters."""
        tree: dict[Any, Any] = {}
        for layer in self.layers:
            node = tree
            for part in layer.path:
                node = node.setdefault(part, {})
            node.update(layer.parameters(matrices[layer.name]))
        return tree

    def zeros(self) -> PyTree:
        """A zero vector like the parameters."""
        zeros = lambda layer: {name: jnp.zeros((*layer.stack, *shape)) for name, shape in layer.shapes}
        return self.vector({layer.name: layer.matrix(zeros(layer)) for layer in self.layers})

    def like(self) -> PyTree:
        """Shapes and dtypes of a float32 vector like the parameters."""
        return jax.eval_shape(self.zeros)

    def groups(self) -> tuple[tuple[Path, ...], ...]:
        """The paths of each layer's parameters."""
        return tuple(tuple((*layer.path, name) for name, _ in layer.shapes) for layer in self.layers)

    def table(self, blocks: Mapping[str, tuple[str, int]], besides: Mapping[str, int] | None = None) -> str:
        """A table of path, layer, block, shapes, bytes of curvature and share of the parameters.

        Args:
          blocks: for each layer's name, the kind of its block and the bytes of its curvature.
          besides: bytes that belong to no layer, by what they are.
        """
        total = sum(layer.size for layer in self.layers)
        lines = [("parameters", "layer", "block", "shapes", "curvature bytes", "share")]
        for layer in self.layers:
            kind, size = blocks[layer.name]
            shapes = ", ".join(f"{name} {(*layer.stack, *shape)}" for name, shape in layer.shapes)
            lines.append((layer.name or ".", layer.kind, kind, shapes, f"{size:,}", f"{layer.size / total:.1%}"))
        besides = besides or {}
        lines += [(name, "", "", "", f"{size:,}", "") for name, size in besides.items()]
        bytes_ = sum(size for _, size in blocks.values()) + sum(besides.values())
        lines.append(("total", "", "", f"{total:,} parameters", f"{bytes_:,}", "100.0%"))
        return table(lines, left=4)


def cover(
    objective: Objective, params: PyTree, who: str, *, uncovered: str = "error", plain: str | None = None
) -> Coverage:
    """The coverage of an objective's model.

    Args:
      objective: with a model; its module is only looked at.
      params: its parameters.
      who: named in errors.
      uncovered: what to do about parameters of unknown layers: "error", or "diagonal" to treat them as plain vectors.
      plain: a regular expression; layers whose path, or a parameter's path, it matches from the start are treated as
        plain.

    Raises:
      ValueError: parameters that no known layer covers, with the reason for each, unless `uncovered` allows it; or
        `plain` matches nothing.
    """
    module = objective.module(params)
    named = (lambda path: False) if plain is None else (lambda path: re.match(plain, _join(path)) is not None)
    layers: list[Layer] = []
    reasons: dict[Path, str] = {}
    wrapped = [path for path, m in nnx.iter_modules(module) if isinstance(m, WRAPPERS)]
    users = _users(module)
    for path, m in nnx.iter_modules(module):
        known = next((cls for cls in type(m).__mro__ if cls in LAYERS), None)
        if known is None:
            continue
        others = sorted({_join(user) for v in _variables(m).values() for user in users[id(v)] if user != path})
        if type(m) is not known:
            reasons[path] = f"{type(m).__name__} is a subclass of {known.__name__}: register_layer it if it is one"
        elif any(path[: len(wrapper)] == wrapper for wrapper in wrapped):
            reasons[path] = "it is inside a wrapper that computes its parameters"
        elif others:
            reasons[path] = f"{', '.join(others)} has parameters of this {known.__name__} too"
        else:
            try:
                layers.append(LAYERS[known].from_module(path, m))
            except Unsupported as why:
                reasons[path] = str(why)
    chosen = {path for path, _ in _leaves(params) if named(path) or named(path[:-1])}
    if plain is not None and not chosen:
        paths = ", ".join(sorted(_join(path) for path, _ in _leaves(params))[:3])
        raise ValueError(f"{who}(plain={plain!r}) matches no parameter. Paths are like {paths}.")
    own = lambda layer: {(*layer.path, name) for name, _ in layer.shapes}
    for layer in layers:  # all of a layer is plain if a part of it is
        if own(layer) & chosen:
            chosen |= own(layer)
    layers = [layer for layer in layers if not own(layer) & chosen and _has(params, layer)]
    covered = {path for layer in layers for path in own(layer)}
    rest = [(path, leaf) for path, leaf in _leaves(params) if path not in covered]
    missing = [path for path, _ in rest if path not in chosen]
    if missing and uncovered == "error":
        lines = "\n".join(f"  {_join(p)}: {_reason(p, reasons)}" for p in missing)
        raise ValueError(
            f"{who}: {len(missing)} parameters belong to no layer that it knows:\n{lines}\nGive them an exact diagonal "
            f"block with {who}(uncovered='diagonal'), or name them in {who}(plain=<regular expression of paths>), or "
            f"say what their layer is with curvature.register_layer."
        )
    layers += [PlainParameter(p[:-1], "parameter", (), ((p[-1], tuple(leaf.shape)),)) for p, leaf in rest]
    return Coverage(tuple(layers))


def _has(params: PyTree, layer: Layer) -> bool:
    """Whether all of a layer's parameters are among the trainable ones."""
    node = params
    for part in layer.path:
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return all(name in node for name, _ in layer.shapes)


def at(tree: PyTree, path: Path) -> PyTree:
    """What a nested dict has there."""
    for part in path:
        tree = tree[part]
    return tree


def _leaves(params: PyTree) -> list[tuple[Path, Any]]:
    return [(tuple(k.key for k in path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]


def _reason(path: Path, reasons: Mapping[Path, str]) -> str:
    return next((why for module, why in reasons.items() if path[:-1] == module), "no layer that is registered has it")


def _join(path: Path) -> str:
    return "/".join(map(str, path))


def _variables(module: nnx.Module) -> dict[str, nnx.Variable]:
    """A module's own variables, by attribute."""
    return {name: value for name, value in vars(module).items() if isinstance(value, nnx.Variable)}


def _users(module: nnx.Module) -> dict[int, list[Path]]:
    """The modules that have a variable, by the variable's id."""
    users: dict[int, list[Path]] = {}
    for path, m in nnx.iter_modules(module):
        for variable in _variables(m).values():
            users.setdefault(id(variable), []).append(path)
    return users
