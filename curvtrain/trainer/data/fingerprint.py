"""Checksums of batches: by them a run recognises its data, and processes notice that theirs differ."""

import zlib

import numpy as np

from curvtrain.objective import batch_size as size_of
from curvtrain.trainer.data.nested import Batch, by_name, map_arrays


def checksum(batch: Batch) -> str:
    """A CRC of a batch's names, shapes, dtypes and bytes."""
    crc = 0
    for name, values in sorted(by_name(batch).items()):
        array = np.ascontiguousarray(values)
        crc = zlib.crc32(f"{name}{array.shape}{array.dtype}".encode(), crc)
        crc = zlib.crc32(array.tobytes(), crc)
    return f"{crc:08x}"


def rows_checksum(batch: Batch) -> int:
    """The sum of the examples' CRCs, each of its names, shapes, dtypes and bytes: their order does not count."""
    rows = range(size_of(batch))
    return sum(int(checksum(map_arrays(lambda a, row=row: a[row], batch)), 16) for row in rows) % 2**32
