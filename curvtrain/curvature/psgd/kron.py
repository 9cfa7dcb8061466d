"""Which factor each side of a parameter gets: by `Kron`, or, as in the original `affine`, by `Affine`."""

import dataclasses
import math

from curvtrain import _checks
from curvtrain.curvature.psgd.kronecker import Kronecker
from curvtrain.curvature.psgd.layout import Side, any_order, block_for, consecutive

BEYOND = ("diagonal", "none")


@dataclasses.dataclass(frozen=True)
class Kron(Kronecker):
    """One factor for every side of every parameter: dense, block-dense, diagonal, or none.

    Attributes:
      geometry: "PRO" (Q0.5EQ1.5), "QUAD", "EQ" (triangular solves), "QEQ" or "QEP"; see `geometry.py`.
      block_size: dense factors larger than this are block-diagonal, in blocks of about this size; None for whole ones.
      max_size: sides longer than this get no dense factor.
      max_skew: nor do sides whose factor would have more than this many numbers per parameter of the tensor.
      merge: whether tensors of more than two axes are seen as matrices, split where the two sides are most alike.
      min_ndim: tensors of fewer axes get diagonal factors.
      beyond: "diagonal" or "none": what a side gets that gets no dense factor. A tensor keeps one factor at least.
      dtype: "float32" or "bfloat16" (PRO, QUAD and QEQ, at rates of 0.1 and more): how factors are stored. None:
        float64 where a parameter is, otherwise float32.
      order: how a step is normalised: "bounded" by a running bound of the curvature; as in the original code without
        memory, "2nd" by the present bound, or "1st" by the size of the direction.
    """

    _: dataclasses.KW_ONLY
    merge: bool = True
    min_ndim: int = 2
    beyond: str = "diagonal"

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        _checks.positive_int(f"{name}(min_ndim)", self.min_ndim)
        _checks.one_of(f"{name}(beyond)", self.beyond, BEYOND)

    def sides(self, shape):
        squeezed = tuple(n for n in shape if n != 1) or (1,)
        sizes = consecutive(squeezed) if self.merge else squeezed
        kinds = ["dense" if self._dense(n, sizes) else self.beyond for n in sizes]
        if "dense" not in kinds and "diagonal" not in kinds:
            kinds[min(range(len(sizes)), key=sizes.__getitem__)] = "diagonal"
        made = [
            Side(n, kind, block_for(n, self.block_size) if kind == "dense" else 1)
            for n, kind in zip(sizes, kinds, strict=True)
        ]
        return tuple(range(len(shape))), tuple(made)

    def _dense(self, n: int, sizes: tuple[int, ...]) -> bool:
        numbers = n * block_for(n, self.block_size)
        return len(sizes) >= self.min_ndim and 1 < n <= self.max_size and numbers <= self.max_skew * math.prod(sizes)


@dataclasses.dataclass(frozen=True)
class Affine(Kronecker):
    """Every parameter as a matrix (m, n) with a left and a right factor, as in the original `affine`.

    More than two axes are shared among the two sides, in any order, so that the factors are the smallest; a vector is
    one row.

    Attributes:
      geometry, block_size, dtype, order: as in `Kron`.
      max_size, max_skew: a side is dense unless it is longer than `max_size`, or than `max_skew` times the other; then
        it is diagonal.
    """

    geometry: str = "EQ"
    _: dataclasses.KW_ONLY
    block_size: int | None = None
    max_size: int = 4096
    max_skew: float = 128.0

    def sides(self, shape):
        kept = tuple(axis for axis, n in enumerate(shape) if n != 1)
        ones = tuple(axis for axis, n in enumerate(shape) if n == 1)
        order, sizes = any_order(tuple(shape[axis] for axis in kept) or (1,))
        order = tuple(kept[axis] for axis in order) if kept else ()
        others = sizes[::-1] if len(sizes) == 2 else (1,)
        dense = [1 < n <= self.max_size and n <= self.max_skew * o for n, o in zip(sizes, others, strict=True)]
        made = [
            Side(n, "dense", block_for(n, self.block_size)) if d else Side(n, "diagonal")
            for n, d in zip(sizes, dense, strict=True)
        ]
        return (*order, *ones), tuple(made)
