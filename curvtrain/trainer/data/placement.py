"""The placement of batches: it says which examples each process and each device holds."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from curvtrain.trainer.data.nested import Batch, map_arrays
from curvtrain.trainer.mesh.sharding import batch_spec, process_rows

PyTree = Any


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """The layout of a batch: its examples are split over the mesh's data and fsdp axes.

    Attributes:
      mesh: the devices.
      shard, shards: this process holds piece `shard` of the `shards` equal pieces of every batch.
    """

    mesh: Mesh
    shard: int
    shards: int

    @classmethod
    def of(cls, mesh: Mesh) -> "BatchLayout":
        """The layout on a mesh. Raises ValueError if a process would hold scattered examples."""
        return cls(mesh, *process_rows(mesh))

    @property
    def sharding(self) -> NamedSharding:
        """The sharding of each array of a batch."""
        return NamedSharding(self.mesh, batch_spec(self.mesh))

    def abstract(self, local: Batch, multiple: int = 1) -> PyTree:
        """The global batch, as shapes with shardings, of which `local` is this process's part (times `multiple`)."""
        dtype = lambda a: jax.dtypes.canonicalize_dtype(a.dtype)
        shape = lambda a: (a.shape[0] * self.shards * multiple, *a.shape[1:])
        return map_arrays(lambda a: jax.ShapeDtypeStruct(shape(a), dtype(a), sharding=self.sharding), local)

    def put(self, batch: Batch, *, whole: bool = False) -> PyTree:
        """The global batch as arrays on the devices.

        Args:
          batch: this process's examples.
          whole: every process gives all examples instead, and its own are taken of them.
        """
        if jax.process_count() == 1:
            return jax.device_put(batch, self.sharding)
        if whole:
            batch = map_arrays(lambda a: np.split(a, self.shards)[self.shard], batch)
        put = jax.make_array_from_process_local_data
        return map_arrays(lambda a: put(self.sharding, a, (len(a) * self.shards, *a.shape[1:])), batch)
