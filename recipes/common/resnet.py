"""The residual network for small images of He et al. 2015, "Deep Residual Learning" (arXiv:1512.03385), section 4.2.

A 3x3 convolution, three stages of n blocks (6n + 2 layers with weights), widths w, 2w, 4w, the second and third stage
at half the resolution of the one before, global average pooling, one linear layer. A block is

    y = relu(x' + BN(conv(relu(BN(conv(x))))))          x' = x, or BN(1x1 conv(x)) where the shape changes

Departures: the paper's CIFAR nets pad x with zero channels where the shape changes (option A); here a 1x1 convolution
projects it (option B), an ordinary layer that curvature estimators know. Padding is "SAME", which for a stride of 2 and
an even size pads at the end only. Depth 20 with width 16 is the paper's ResNet-20, up to those two.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

he_fan_out = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015, arXiv:1502.01852, eq. 14


def _conv(inputs: int, outputs: int, size: int, stride: int, dtype: DTypeLike | None, rngs: nnx.Rngs) -> nnx.Conv:
    """A convolution without bias: the batch normalisation after it has one."""
    return nnx.Conv(
        inputs,
        outputs,
        kernel_size=(size, size),
        strides=(stride, stride),
        padding="SAME",
        use_bias=False,
        kernel_init=he_fan_out,
        dtype=dtype,
        rngs=rngs,
    )


def _norm(features: int, dtype: DTypeLike | None, rngs: nnx.Rngs, *, zero: bool = False) -> nnx.BatchNorm:
    scale_init = nnx.initializers.zeros_init() if zero else nnx.initializers.ones_init()
    return nnx.BatchNorm(features, momentum=0.9, scale_init=scale_init, dtype=dtype, rngs=rngs)


class Block(nnx.Module):
    """Two 3x3 convolutions and a shortcut: (batch, h, w, inputs) -> (batch, h/stride, w/stride, outputs)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        *,
        zero_init: bool = False,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        self.conv1 = _conv(inputs, outputs, 3, stride, dtype, rngs)
        self.norm1 = _norm(outputs, dtype, rngs)
        self.conv2 = _conv(outputs, outputs, 3, 1, dtype, rngs)
        self.norm2 = _norm(outputs, dtype, rngs, zero=zero_init)
        self.project = stride != 1 or inputs != outputs
        if self.project:
            self.shortcut = _conv(inputs, outputs, 1, stride, dtype, rngs)
            self.shortcut_norm = _norm(outputs, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + (self.shortcut_norm(self.shortcut(x)) if self.project else x))


class ResNet(nnx.Module):
    """Images (batch, height, width, in_channels) -> logits (batch, classes), at least float32.

    Batch normalisation follows the modules' own flags: it uses the batch's statistics, and updates the running ones,
    until `nnx.view(model, use_running_average=True)` or `model.eval()`. Any height and width work; with 8x8 inputs the
    last stage sees 2x2.
    """

    def __init__(
        self,
        classes: int,
        in_channels: int,
        depth: int = 8,
        width: int = 16,
        *,
        zero_init: bool = False,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        """Build the network.

        Args:
            classes: number of logits.
            in_channels: channels of the images.
            depth: 6n + 2 for n >= 1: 8, 14, 20, 32, 44, 56, 110, ...
            width: channels of the first stage.
            zero_init: start the last scale of each block at zero, so that each block is the identity at first (Goyal et
                al. 2017, arXiv:1706.02677, section 5.1). It helps deep nets at large learning rates, but the gradients,
                and so the Kronecker factors, of the convolutions inside the blocks are exactly zero until those scales
                move: hence off by default.
            dtype: of the computation, e.g. bfloat16; parameters and running statistics stay float32.
            rngs: the stream "params" is drawn from.

        Raises:
            ValueError: another depth.
        """
        if depth < 8 or (depth - 2) % 6:
            below = 6 * max(1, (depth - 2) // 6) + 2
            nearest = f"{below}" if depth < 8 else f"{below} or {below + 6}"
            raise ValueError(f"ResNet(depth={depth}): the depth is 6n + 2 for a whole n >= 1; nearest: {nearest}.")
        self.stem = _conv(in_channels, width, 3, 1, dtype, rngs)
        self.norm = _norm(width, dtype, rngs)
        blocks, inputs = [], width
        for stage in range(3):
            for index in range((depth - 2) // 6):
                outputs, stride = width * 2**stage, 2 if stage > 0 and index == 0 else 1
                blocks.append(Block(inputs, outputs, stride, zero_init=zero_init, dtype=dtype, rngs=rngs))
                inputs = outputs
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(inputs, classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        logits = self.head(jnp.mean(x, axis=(1, 2)))
        return logits.astype(jnp.float32) if jnp.finfo(logits.dtype).bits < 32 else logits
