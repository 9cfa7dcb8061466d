"""How curvature lies on a mesh: the axes over which an array can be split, and work that each device does on its share.

The mesh is that of `jax.set_mesh` while a program is traced; without one, or on one device, all of this does nothing.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

PyTree = Any

SMALLEST = 1024  # numbers; an array with fewer is not split: gathering it costs more than it saves


def axes_for(shape: Mapping[str, int], count: int) -> tuple[str, ...]:
    """Chooses the axes of a mesh that span the most devices among those that divide `count` evenly."""
    names = [axis for axis, size in shape.items() if size > 1]
    options = [o for r in range(len(names), 0, -1) for o in itertools.combinations(names, r)]
    size = lambda option: math.prod(shape[axis] for axis in option)
    return max((o for o in options if count % size(o) == 0), key=size, default=())


def spec_for(axes: tuple[str, ...], position: int = 0) -> PartitionSpec:
    """The spec of an array whose axis `position` is split over these axes of the mesh."""
    return PartitionSpec(*[None] * position, axes if len(axes) > 1 else axes[0]) if axes else PartitionSpec()


def spread_spec(mesh: Mapping[str, int], shape: Sequence[int]) -> PartitionSpec:
    """The spec of an array that mirrors no parameter: it is split along the first axis that mesh axes divide."""
    if math.prod(shape) < SMALLEST:
        return PartitionSpec()
    options = ((axes_for(mesh, length), position) for position, length in enumerate(shape))
    return next((spec_for(axes, position) for axes, position in options if axes), PartitionSpec())


def mesh_shape() -> dict[str, int]:
    """Axes and sizes of the mesh that a program is traced for, if it is the compiler that splits arrays over it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return {}
    return {axis: size for axis, size in mesh.shape.items() if size > 1}


def may_be_split(tree: PyTree) -> bool:
    """Whether the compiler may split these arrays over devices: they, or the ambient mesh, span several.

    A traced array knows the mesh that it lies on, though not along which of its axes it is split.
    """
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree))]
    return any(
        size > 1 and kind != AxisType.Manual  # inside `jax.shard_map` an array is one device's own
        for mesh in meshes
        for size, kind in zip(mesh.shape.values(), mesh.axis_types, strict=True)
    )


def everywhere(tree: PyTree) -> PyTree:
    """The same arrays, all of each on every device."""
    return constrain(tree, ())


def constrain(tree: PyTree, axes: tuple[str, ...]) -> PyTree:
    """The same arrays with the leading axis split over these axes."""
    return jax.lax.with_sharding_constraint(tree, spec_for(axes)) if mesh_shape() else tree


def split(function: Callable[..., PyTree], axes: tuple[str, ...]) -> Callable[..., PyTree]:
    """The function, run by each device on its share of the leading axis of all arguments and results."""
    if not axes:
        return function
    spec = spec_for(axes)
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)
