"""Which layer every parameter belongs to: proof that none is forgotten, and a table that says so."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from curvtrain._dtypes import width
from curvtrain._text import table
from curvtrain.curvature.capture.layers import WRAPPERS, Layer, Path, PlainParameter, Unsupported, merged
from curvtrain.objective import Objective

PyTree = Any

UNCOVERED = ("error", "diagonal")


@dataclasses.dataclass(frozen=True)
class Coverage:
    """The layers of a model, every parameter in exactly one of them. Static: hashable, without arrays.

    Attributes:
      layers: in the order of the parameters; `PlainParameter`s last.
      dtype: of curvature, as `curvtrain._dtypes.width` chooses it for the parameters.
    """

    layers: tuple[Layer, ...]
    dtype: str = "float32"

    @property
    def known(self) -> tuple[Layer, ...]:
        """The layers other than plain parameters: those that are tapped."""
        return tuple(layer for layer in self.layers if layer.tapped)

    @property
    def plain(self) -> tuple[Layer, ...]:
        """The parameters that belong to no layer."""
        return tuple(layer for layer in self.layers if not layer.tapped)

    @property
    def factored(self) -> tuple[Layer, ...]:
        """The layers whose blocks K-FAC factorises."""
        return tuple(layer for layer in self.known if layer.block().own is None)

    @property
    def by_module(self) -> dict[Path, tuple[Layer, ...]]:
        """The tapped layers of each module."""
        modules: dict[Path, tuple[Layer, ...]] = {}
        for layer in self.known:
            modules[layer.path] = (*modules.get(layer.path, ()), layer)
        return modules

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
        zeros = lambda layer: {name: jnp.zeros((*layer.scan_axes, *s), self.dtype) for name, s in layer.shapes}
        return self.vector({layer.name: layer.matrix(zeros(layer)) for layer in self.layers})

    def like(self) -> PyTree:
        """Shapes and dtypes of a vector like the parameters."""
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
            shapes = ", ".join(f"{name} {(*layer.scan_axes, *shape)}" for name, shape in layer.shapes)
            lines.append((layer.name or ".", layer.kind, kind, shapes, f"{size:,}", f"{layer.size / total:.1%}"))
        besides = besides or {}
        lines += [(name, "", "", "", f"{size:,}", "") for name, size in besides.items()]
        bytes_ = sum(size for _, size in blocks.values()) + sum(besides.values())
        lines.append(("total", "", "", f"{total:,} parameters", f"{bytes_:,}", "100.0%"))
        return table(lines, left=4)


def cover(
    objective: Objective,
    params: PyTree,
    who: str,
    *,
    uncovered: str = "error",
    plain: str | None = None,
    layers: Mapping[type, Any] | None = None,
) -> Coverage:
    """The coverage of an objective's model.

    Args:
      objective: with a model; its module is only looked at.
      params: its parameters.
      who: named in errors.
      uncovered: what to do about parameters of unknown layers: "error", or "diagonal" to treat them as plain vectors.
      plain: a regular expression; layers whose path, or a parameter's path, it matches from the start are treated as
        plain.
      layers: for classes of modules, their layers, in the place of what `register_layer` was told.

    A layer of which only some parameters are trained covers those; one without any is left out.

    Raises:
      TypeError: `layers` has what are no classes of modules or layers.
      ValueError: parameters that no known layer covers, with the reason for each, unless `uncovered` allows it; or
        `plain` matches nothing.
    """
    module = objective.module(params)
    named = (lambda path: False) if plain is None else (lambda path: re.match(plain, _join(path)) is not None)
    known = merged(layers or {}, f"{who}(layers)")
    leaves = {path: leaf for path, leaf in _leaves(params) if leaf.size}
    all_layers, reasons = _layers_of(module, known)
    found = [_trained(layer, leaves) for layer in all_layers]
    chosen = {path for path, _ in _leaves(params) if named(path) or named(path[:-1])}
    if plain is not None and not chosen:
        paths = ", ".join(sorted(_join(path) for path, _ in _leaves(params))[:3])
        raise ValueError(f"{who}(plain={plain!r}) matches no parameter. Paths are like {paths}.")
    for layer in found:  # all of a layer is plain if a part of it is
        if set(_paths(layer)) & chosen:
            chosen |= set(_paths(layer))
    found = [layer for layer in found if layer.shapes and not set(_paths(layer)) & chosen]
    covered = {path for layer in found for path in _paths(layer)}
    rest = [(path, leaf) for path, leaf in _leaves(params) if path not in covered]
    missing = [path for path, leaf in rest if path not in chosen and leaf.size]
    if missing and uncovered == "error":
        lines = "\n".join(f"  {_join(p)}: {_reason(p, reasons)}" for p in missing)
        raise ValueError(
            f"{who}: {len(missing)} parameters belong to no layer that it knows:\n{lines}\nGive them an exact diagonal "
            f"block with {who}(uncovered='diagonal'), or name them in {who}(plain=<regular expression of paths>), or "
            f"say what their layer is with curvature.register_layer."
        )
    others = [PlainParameter(p[:-1], "parameter", (), ((p[-1], tuple(leaf.shape)),)) for p, leaf in rest]
    return Coverage((*found, *others), width(params).name)


def _layers_of(
    module: nnx.Module, known: Mapping[type, tuple[type[Layer], ...]]
) -> tuple[list[Layer], dict[Path, str]]:
    """(the layers of a model, trained or not; for each module that has none, the reason)."""
    layers: list[Layer] = []
    reasons: dict[Path, str] = {}
    wrapped = [path for path, m in nnx.iter_modules(module) if isinstance(m, WRAPPERS)]
    users = _users(module)
    for path, m in nnx.iter_modules(module):
        base = next((cls for cls in type(m).__mro__ if cls in known), None)
        if base is None:
            continue
        others = sorted({_join(user) for v in _variables(m).values() for user in users[id(v)] if user != path})
        if type(m) is not base:
            reasons[path] = f"{type(m).__name__} is a subclass of {base.__name__}: register_layer it if it is one"
        elif any(path[: len(wrapper)] == wrapper for wrapper in wrapped):
            reasons[path] = "it is inside a wrapper that computes its parameters"
        elif others:
            reasons[path] = f"{', '.join(others)} has parameters of this {base.__name__} too"
        else:
            try:
                layers += [layer.from_module(path, m) for layer in known[base]]
            except Unsupported as why:
                reasons[path] = str(why)
    return layers, reasons


def _paths(layer: Layer) -> list[Path]:
    return [(*layer.path, name) for name, _ in layer.shapes]


def _trained(layer: Layer, leaves: Mapping[Path, Any]) -> Layer:
    """The layer with those of its parameters that are trained and not empty."""
    names = [path[-1] for path in _paths(layer) if path in leaves]
    return layer if len(names) == len(layer.shapes) else layer.restricted(names)


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
