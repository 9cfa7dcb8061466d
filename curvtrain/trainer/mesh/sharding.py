"""The placement of arrays: the mesh, a PartitionSpec for every leaf of the training state, and the batch's layout."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from curvtrain import _checks
from curvtrain.trainer.config import ShardingRules

PyTree = Any

DRAWS_AXIS = "mc"  # over which draws of parameters are split
AXES = ("data", "fsdp", "tensor", DRAWS_AXIS)
BATCH_AXES = ("data", "fsdp")  # axes over which the examples of a batch are split
SMALLEST = 1024  # elements; a smaller parameter is replicated by "fsdp": gathering it costs more than it saves


def make_mesh(axes: Mapping[str, int]) -> Mesh:
    """A mesh over all devices. Raises ValueError for unknown axes and sizes that do not multiply to their number."""
    devices = jax.devices()
    if not axes:
        raise ValueError(f"TrainerConfig(mesh) should name at least one axis of {AXES}.")
    for axis, size in axes.items():
        _checks.one_of("TrainerConfig(mesh) axis", axis, AXES)
        if size != -1:
            _checks.positive_int(f"TrainerConfig(mesh[{axis!r}])", size)
    sizes = dict(axes)
    rest = [axis for axis, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(rest) > 1:
        raise ValueError(f"TrainerConfig(mesh={dict(axes)}): only one axis can be -1 (the rest of the devices).")
    if rest and len(devices) % known == 0:
        sizes[rest[0]] = len(devices) // known
    processes = f" (of {jax.process_count()} processes)" if jax.process_count() > 1 else ""
    if int(np.prod(list(sizes.values()))) != len(devices) or (rest and sizes[rest[0]] == -1):
        raise ValueError(
            f"TrainerConfig(mesh={dict(axes)}) should multiply to the {len(devices)} devices of this run{processes}, "
            f"and {known} {'does not divide them' if rest else 'does not'}. Use -1 for the rest, as in {{'data': -1}}."
        )
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def of_several_cpus(mesh: Mesh) -> bool:
    """Says whether a mesh has several CPU devices, where XLA's programs may wait for themselves forever.

    Found with jaxlib 0.10.2. Programs read back from a compilation cache have forgotten the order between collectives
    inside a loop and those outside, and devices begin with different ones: a refresh of `FullBlock` did so in 3 of 3
    runs, and in none of 8 that compiled it. And devices share one pool of threads, in which operations that wait for a
    step that is still running may leave its collectives none: in 3 of 3 runs with a hook that computes.
    """
    return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"


def batch_spec(mesh: Mesh) -> PartitionSpec:
    """The leading axis of a batch, split over the mesh's data and fsdp axes."""
    return PartitionSpec(tuple(axis for axis in BATCH_AXES if axis in mesh.shape))


def batch_shards(mesh: Mesh) -> int:
    """The number of pieces into which the examples of a batch are split."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES if axis in mesh.shape]))


def process_rows(mesh: Mesh) -> tuple[int, int]:
    """Returns (index, count): this process holds piece `index` of the `count` equal pieces of every batch.

    Processes that share the "tensor" axis hold the same piece, so there may be fewer pieces than processes.
    """
    pieces = batch_shards(mesh)
    held: dict[int, set[int]] = {}  # for every process, so that all raise the same error
    for device, index in NamedSharding(mesh, batch_spec(mesh)).devices_indices_map((pieces,)).items():
        held.setdefault(device.process_index, set()).add(index[0].indices(pieces)[0])
    for process, found in sorted(held.items()):
        stretch = list(range(min(found), max(found) + 1))
        if sorted(found) != stretch or stretch[0] % len(stretch) or pieces % len(stretch) or len(found) != len(held[0]):
            raise ValueError(
                f"With mesh={dict(mesh.shape)} process {process} of {len(held)} has pieces {sorted(found)} of the "
                f"{pieces} of a batch: not one stretch of it, as long as that of others. Give the first axis the "
                f"number of processes or a multiple of it."
            )
    own = sorted(held[jax.process_index()])
    return own[0] // len(own), pieces // len(own)


def param_specs(shapes: PyTree, annotated: PyTree, sharding: str | ShardingRules, mesh: Mesh) -> PyTree:
    """A PartitionSpec for every parameter.

    Args:
      shapes: the parameters' shapes.
      annotated: the specs of NNX annotations, structured like `shapes`; an empty PartitionSpec where there is none.
      sharding: the option of `TrainerConfig`.
      mesh: the mesh.

    Raises:
      ValueError: a spec names an axis that the mesh does not have, or splits an axis unevenly; a rule matches nothing.
    """
    rules = [("", sharding)] if isinstance(sharding, str) else list(sharding)
    unused = {pattern for pattern, _ in rules if pattern}

    def choose(path, shape, annotation):
        name = path_name(path)
        if any(entry is not None for entry in annotation):
            return _checked(name, annotation, shape.shape, mesh)
        for pattern, spec in rules:
            if re.search(pattern, name):
                unused.discard(pattern)
                if isinstance(spec, PartitionSpec):
                    return _checked(name, spec, shape.shape, mesh)
                return _largest_axis(shape.shape, mesh) if spec == "fsdp" else PartitionSpec()
        return PartitionSpec()

    if any(spec == "fsdp" for _, spec in rules) and "fsdp" not in mesh.shape:
        raise ValueError(
            f"TrainerConfig(sharding): 'fsdp' needs an 'fsdp' axis in the mesh, which has {dict(mesh.shape)}."
        )
    specs = jax.tree_util.tree_map_with_path(choose, shapes, annotated)
    if unused:
        names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
        raise ValueError(
            f"TrainerConfig(sharding): the rules {sorted(unused)} match no parameter. Their names are, for example, "
            f"{names[:4]}; a rule is a regular expression that is searched in them."
        )
    return specs


def like_params(tree: PyTree, params: PyTree, specs: PyTree, mesh: Mesh) -> PyTree:
    """A PartitionSpec for every leaf of an optimizer's state, whatever the optimizer.

    A leaf belongs to the parameter whose path its own path ends in. It is laid out like the parameter if it has the
    parameter's shape (moments), that shape after a leading axis (the memory of L-BFGS), or that shape without some axes
    (the rows and columns of Adafactor). Other leaves (Kronecker factors, flattened copies) are split along their
    largest axis that divides, where parameters are split at all; small and odd ones are replicated.
    """
    known = {
        _keys(path): (leaf.shape, spec)
        for (path, leaf), spec in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(specs, is_leaf=is_spec), strict=True
        )
    }
    longest = max(map(len, known))
    split = "fsdp" in mesh.shape and any(entry is not None for _, spec in known.values() for entry in spec)

    def choose(path, leaf):
        names = _keys(path)
        for length in range(min(longest, len(names)), 0, -1):
            if names[-length:] in known:
                shape, spec = known[names[-length:]]
                if leaf.shape == shape:
                    return spec
                if leaf.shape[1:] == shape:
                    return PartitionSpec(None, *spec)
                if kept := _kept(leaf.shape, shape, spec):
                    return kept
        return _largest_axis(leaf.shape, mesh) if split else PartitionSpec()

    return jax.tree_util.tree_map_with_path(choose, tree)


def named(mesh: Mesh, specs: PyTree) -> PyTree:
    """NamedShardings for a tree of PartitionSpecs."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def is_spec(node: Any) -> bool:
    """Says whether a node of a tree is a PartitionSpec."""
    return isinstance(node, PartitionSpec)


def path_name(path: Any) -> str:
    """A leaf's path as users write it in rules: "encoder/0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _keys(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _kept(shape: tuple[int, ...], whole: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec | None:
    """The spec of a shape that is a parameter's `whole` shape without some of its axes; None if it is not.

    If several choices of axes fit, as for the rows of a square matrix, the one that splits most counts.
    """
    entries = [*spec, *[None] * (len(whole) - len(spec))]
    ways = itertools.combinations(range(len(whole)), len(shape)) if shape else ()
    found = [PartitionSpec(*(entries[i] for i in way)) for way in ways if shape == tuple(whole[i] for i in way)]
    return max(found, key=lambda spec: sum(entry is not None for entry in spec), default=None)


def _largest_axis(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    size = mesh.shape["fsdp"]
    axes = [i for i, length in enumerate(shape) if length % size == 0]
    if not axes or int(np.prod(shape)) < SMALLEST:
        return PartitionSpec()
    axis = max(axes, key=lambda i: (shape[i], i))  # among equal ones the last: the axis that a kernel's bias has
    return PartitionSpec(*(["fsdp" if i == axis else None for i in range(len(shape))]))


def _checked(name: str, spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    if len(spec) > len(shape):
        raise ValueError(f"Sharding of {name}: {spec} has more axes than the parameter's shape {shape}.")
    for length, entry in zip(shape, spec, strict=False):
        axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        for axis in axes:
            if axis not in mesh.shape:
                raise ValueError(
                    f"Sharding of {name}: {spec} names the mesh axis {axis!r}, but the mesh has {dict(mesh.shape)}. "
                    f"Add it to TrainerConfig(mesh), with size 1 where it should not split anything."
                )
        pieces = int(np.prod([mesh.shape[axis] for axis in axes]))
        if length % pieces:
            raise ValueError(f"Sharding of {name}: {spec} splits an axis of length {length} into {pieces} pieces.")
    return spec
