"""The families of preconditioners as the original `psgd_jax` has them, for the drop-ins of `psgd_dropin.py`."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from curvtrain.curvature.psgd.base import signs
from curvtrain.curvature.psgd.kronecker import Kronecker
from curvtrain.curvature.psgd.layout import Side
from curvtrain.curvature.psgd.low_rank import LowRank


@dataclasses.dataclass(frozen=True)
class LowRankFromKey(LowRank):
    """`LowRank` whose random start is drawn with a key."""

    _: dataclasses.KW_ONLY
    key: Any = None

    def init(self, structure):
        state = super().init(structure)
        return state | {"V": self._basis(self.key, structure)} if self.rank else state


@dataclasses.dataclass(frozen=True)
class KronOfAxes(Kronecker):
    """`Kron` as it first was: a triangular factor for every axis, and noise that bounds what whitening makes of zeros.

    Attributes:
      max_size: longer axes have diagonal factors.
      min_ndim: tensors of fewer axes have diagonal factors.
      savings: None, "one_diag" or "all_diag".
      whitens: whether h are gradients: they get noise of 3e-4 of their mean size.
    """

    geometry: str = "EQ"
    _: dataclasses.KW_ONLY
    block_size: int | None = None
    order: str = "2nd"
    min_ndim: int = 2
    savings: str | None = None
    whitens: bool = True
    relative_damping: float | None = 0.0

    def sides(self, shape):
        sizes = tuple(n for n in shape if n != 1) or (1,)
        longest = max(range(len(sizes)), key=lambda i: (sizes[i], i))
        diagonal = [
            n == 1
            or n > self.max_size
            or len(shape) < self.min_ndim
            or self.savings == "all_diag"
            or (self.savings == "one_diag" and i == longest)
            for i, n in enumerate(sizes)
        ]
        made = [Side(n, "diagonal") if d else Side(n, "dense", n) for n, d in zip(sizes, diagonal, strict=True)]
        return tuple(range(len(shape))), tuple(made)

    def damped(self, h, seed):
        if not self.whitens:
            return super().damped(h, seed)
        size = jnp.mean(jnp.abs(h), axis=(0, *range(2, h.ndim)), keepdims=True)  # of each tensor of (k, L, ...)
        return h + math.sqrt(jnp.finfo(h.dtype).eps) * size * signs(seed, h.shape)
