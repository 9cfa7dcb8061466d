"""Where the factors of the Kronecker family live on a mesh."""

import math
from typing import Any

import jax
from jax.sharding import PartitionSpec

from curvtrain.curvature.mesh import spread_spec
from curvtrain.curvature.psgd.base import Structure
from curvtrain.curvature.psgd.layout import Bucket, Side


def side_axes(bucket: Bucket, structure: Structure, specs: list[PartitionSpec], i: int) -> Any:
    """The mesh axes that split side i in all of a bucket's parameters alike; None if they differ, or nothing does."""
    found = set()
    for member in bucket.members:
        lead, shape, spec = structure.scan_axes[member.leaf], structure.shapes[member.leaf], specs[member.leaf]
        names = [*spec, *[None] * (len(shape) - len(spec))]
        axes = [lead + axis for axis in member.order if shape[lead + axis] != 1]
        sizes, start = [side.size for side in bucket.sides], 0
        for side, size in enumerate(sizes):  # the axes of the leaf that make up this side: the first of them is split
            stop, product = start, 1
            while stop < len(axes) and product < size:
                product *= shape[axes[stop]]
                stop += 1
            if side == i:
                found.add(names[axes[start]] if start < stop else None)
            start = stop
    return found.pop() if len(found) == 1 else None


def factor_spec(side: Side, leaf: Any, axis: Any, mesh: jax.sharding.Mesh) -> PartitionSpec:
    """Chooses where a factor (L, B, b, b), (L, n), or its bounds, lives.

    It is split along with its side where the blocks (or the entries) are aligned with the shards; otherwise its L
    tensors are spread over the whole mesh, or, if that does not divide, over the largest part of the mesh that does.
    """
    size = lambda names: math.prod(mesh.shape[name] for name in names)
    names = () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)
    if names and leaf.ndim > 1 and leaf.shape[1] % size(names) == 0 and (side.kind != "dense" or side.count > 1):
        return PartitionSpec(None, axis)
    return spread_spec(mesh.shape, leaf.shape)
