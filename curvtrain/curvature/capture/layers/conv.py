"""Convolutions, as products with patches."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain._dtypes import wide
from curvtrain.curvature.capture.layers.base import Unsupported
from curvtrain.curvature.capture.layers.matrix import MatrixLayer, kernel_shapes


@dataclasses.dataclass(frozen=True)
class ConvLayer(MatrixLayer):
    """`nnx.Conv` of any rank, strides, padding, dilations and groups.

    Attributes:
      window: kernel size; strides, padding, input_dilation, kernel_dilation: as for `nnx.Conv`, per axis.
    """

    window: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    padding: Any = "SAME"
    input_dilation: tuple[int, ...] = ()
    kernel_dilation: tuple[int, ...] = ()

    @classmethod
    def from_module(cls, path, module):
        if module.mask is not None:
            raise Unsupported("it has a mask, so its gradient is not a sum of outer products")
        window = tuple(module.kernel_size)
        each = lambda v: (1 if v is None else v,) * len(window) if v is None or isinstance(v, int) else tuple(v)
        g, outputs = module.feature_group_count, module.out_features
        names = {"kernel": (*window, module.in_features // g, outputs), "bias": (outputs,)}
        scan_axes, shapes = kernel_shapes(module, names)
        padding = module.padding
        if isinstance(padding, int):
            padding = ((padding, padding),) * len(window)
        elif not isinstance(padding, str):
            padding = tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)
        return cls(
            path,
            type(module).__name__,
            scan_axes,
            shapes,
            g,
            tuple(range(len(window) + 2)),
            math.prod(window) * (module.in_features // g),
            outputs // g,
            window,
            each(module.strides),
            padding,
            each(module.input_dilation),
            each(module.kernel_dilation),
        )

    def leading(self, shape):
        return shape[0] if len(shape) > len(self.window) + 1 else 1

    def _split_groups(self, kernel):  # (..., window, c_in / g, c_out), outputs group by group
        lead = len(self.scan_axes)
        split = kernel.reshape(*self.scan_axes, self.inputs, self.groups, self.outputs)
        return jnp.moveaxis(split, lead + 1, lead)

    def _join_groups(self, kernel):
        lead = len(self.scan_axes)
        return jnp.moveaxis(kernel.reshape(*self.scan_axes, self.groups, self.inputs, self.outputs), lead, lead + 1)

    def rows(self, x, examples):
        rank = len(self.window)
        x = wide(x)
        x = x.reshape(-1, *x.shape[x.ndim - rank - 1 :])
        padding = self.padding
        reach = [(k - 1) * d + 1 for k, d in zip(self.window, self.kernel_dilation, strict=True)]
        if padding in ("CIRCULAR", "REFLECT"):
            around = [((k - 1) // 2, k // 2) for k in reach]
            x = jnp.pad(x, [(0, 0), *around, (0, 0)], mode="wrap" if padding == "CIRCULAR" else "reflect")
            padding = "VALID"
        elif padding == "CAUSAL":
            x = jnp.pad(x, [(0, 0), (reach[0] - 1, 0), (0, 0)])
            padding = "VALID"
        dilated = [(n - 1) * d + 1 for n, d in zip(x.shape[1:-1], self.input_dilation, strict=True)]
        pads = jax.lax.padtype_to_pads(dilated, reach, self.strides, padding) if isinstance(padding, str) else padding
        edges = [(low, high, d - 1) for (low, high), d in zip(pads, self.input_dilation, strict=True)]
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
        ends = [(n - r) // s * s + 1 for n, r, s in zip(x.shape[1:-1], reach, self.strides, strict=True)]
        # A slice for each offset in the window, in the kernel's own order: conv_general_dilated_patches is a
        # convolution with as many groups as channels, which CPUs take minutes for.
        slices = []
        for offset in itertools.product(*map(range, self.window)):
            starts = [o * d for o, d in zip(offset, self.kernel_dilation, strict=True)]
            limits = [start + end for start, end in zip(starts, ends, strict=True)]
            slices.append(jax.lax.slice(x, (0, *starts, 0), (len(x), *limits, x.shape[-1]), (1, *self.strides, 1)))
        patches = jnp.stack(slices, axis=-2)  # (N, positions, window, channels)
        patches = patches.reshape(examples, -1, len(slices), self.groups, self.inputs // len(slices))
        return patches.transpose(3, 0, 1, 2, 4).reshape(self.groups, examples, -1, self.inputs)

    def cotangents(self, s, examples):
        s = wide(s).reshape(examples, -1, self.groups, self.outputs)
        return s.transpose(2, 0, 1, 3)
