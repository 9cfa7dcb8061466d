"""Meshes of some of the virtual devices."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from curvtrain.trainer.mesh import sharding


def on(devices, monkeypatch):
    """Meshes have so many of the devices."""

    def make_mesh(axes):
        sizes = [devices if size == -1 else size for size in axes.values()]
        grid = np.array(jax.devices()[:devices]).reshape(sizes)
        return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))

    monkeypatch.setattr(sharding, "make_mesh", make_mesh)
