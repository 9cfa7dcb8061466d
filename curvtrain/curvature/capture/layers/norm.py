"""Scale and bias of normalised inputs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from curvtrain._dtypes import wide
from curvtrain.curvature.capture.layers.base import Layer, Unsupported, scan_axes_of
from curvtrain.curvature.capture.layers.blocks import UnitBlocks
from curvtrain.curvature.capture.layers.gradients import Explicit


@dataclasses.dataclass(frozen=True)
class NormLayer(Layer):
    """`nnx.LayerNorm`, `RMSNorm`, `GroupNorm`, `BatchNorm`: y = scale * x̂ + bias, one pair for each channel."""

    channels: int = 0

    @classmethod
    def from_module(cls, path, module):
        names = [name for name in ("scale", "bias") if getattr(module, name, None) is not None]
        if not names:
            raise Unsupported("it has no parameters")
        if isinstance(module, nnx.LayerNorm | nnx.RMSNorm):
            axes = module.feature_axes
            if axes not in (-1, (-1,), [-1]):
                raise Unsupported(f"its feature_axes are {axes}, not -1")
        elif isinstance(module, nnx.BatchNorm) and module.axis != -1:
            raise Unsupported(f"its axis is {module.axis}, not -1")
        if getattr(module, "axis_name", None) is not None:
            raise Unsupported("it has an axis_name, of a pmap or shard_map that is not visible from here")
        array = getattr(module, names[0]).get_value()
        channels = array.shape[-1]
        scan_axes = scan_axes_of(array, names[0], (channels,))
        return cls(path, type(module).__name__, scan_axes, tuple((name, (channels,)) for name in names), channels)

    @property
    def d_i(self):
        """p: parameters of a channel, 2 or 1."""
        return len(self.shapes)

    @property
    def d_o(self):
        return self.channels

    def saved(self, module, x, options):
        self.refuse_mask(options)
        return _normalised(module, x, options) if "scale" in dict(self.shapes) else x

    def refuse_mask(self, options: Mapping[str, Any]) -> None:
        """Raises ValueError for a call with `mask=`."""
        if options.get("mask") is not None:
            raise ValueError(
                f"The statistics of {self.name} ({self.kind}) under mask= are not known: call it without, or treat its "
                f"parameters as plain ones (plain={self.name!r})."
            )

    def matrix(self, parameters):
        return jnp.stack([parameters[name].reshape(self.copies, self.channels) for name, _ in self.shapes], axis=1)

    def parameters(self, matrix):
        shape = (*self.scan_axes, self.channels)
        return {name: matrix[:, i].reshape(shape) for i, (name, _) in enumerate(self.shapes)}

    def gradients(self, backward):
        s = wide(backward.s).reshape(backward.examples, -1, self.channels)
        x = wide(backward.saved).reshape(s.shape)
        sums = {"scale": lambda: jnp.sum(s * x, axis=1), "bias": lambda: jnp.sum(s, axis=1)}
        return Explicit(jnp.stack([sums[name]() for name, _ in self.shapes], axis=1)[None])

    def block(self):
        return UnitBlocks(self.d_i)


def _normalised(module: Any, x: jax.Array, options: Mapping[str, Any]) -> jax.Array:
    """x̂: the input as the layer normalises it, before scale and bias; float32 at least.

    Recomputed, as (y - bias) / scale is undefined where the scale is zero.
    """
    x = wide(x)
    if isinstance(module, nnx.BatchNorm):
        running = options.get("use_running_average")
        running = module.use_running_average if running is None else running
        if running:
            mean, var = module.mean.get_value(), module.var.get_value()
        else:
            axes = tuple(range(x.ndim - 1))
            mean, var = x.mean(axes), x.var(axes)
        return (x - mean) * jax.lax.rsqrt(var + module.epsilon)
    if isinstance(module, nnx.GroupNorm):
        axes = module.reduction_axes
        axes = (*range(1, x.ndim - 1), -1) if axes is None else (axes,) if isinstance(axes, int) else tuple(axes)
        axes = sorted(axis % x.ndim for axis in axes)
        grouped = x.reshape(*x.shape[:-1], module.num_groups, module.group_size)
        axes = (*(axis for axis in axes if axis != x.ndim - 1), grouped.ndim - 1)
        mean, var = grouped.mean(axes, keepdims=True), grouped.var(axes, keepdims=True)
        return ((grouped - mean) * jax.lax.rsqrt(var + module.epsilon)).reshape(x.shape)
    axes = module.reduction_axes
    if isinstance(module, nnx.RMSNorm):
        return x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + module.epsilon)
    return (x - x.mean(axes, keepdims=True)) * jax.lax.rsqrt(x.var(axes, keepdims=True) + module.epsilon)
