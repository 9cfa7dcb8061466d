"""Two small models for classification: a multilayer perceptron and a convolutional network."""

from collections.abc import Sequence
from itertools import pairwise

import jax
from flax import nnx


class MLP(nnx.Module):
    """Images, flattened, through hidden layers with ReLU: (batch, h, w, c) -> logits (batch, classes)."""

    def __init__(self, inputs: int, sizes: Sequence[int], classes: int, *, rngs: nnx.Rngs):
        """Builds the layers inputs -> sizes -> classes."""
        self.layers = nnx.List(nnx.Linear(i, o, rngs=rngs) for i, o in pairwise((inputs, *sizes, classes)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


class CNN(nnx.Module):
    """3x3 convolutions of stride 2 with ReLU, one for each width, then a linear layer on the mean over the positions.

    (batch, h, w, channels) -> logits (batch, classes). No normalisation, so that any optimizer can be tried on it.
    """

    def __init__(self, channels: int, widths: Sequence[int], classes: int, *, rngs: nnx.Rngs):
        """Builds the layers channels -> widths -> classes."""
        self.convolutions = nnx.List(
            nnx.Conv(i, o, (3, 3), strides=(2 if i != channels else 1), rngs=rngs)
            for i, o in pairwise((channels, *widths))
        )
        self.head = nnx.Linear(widths[-1], classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for convolution in self.convolutions:
            x = nnx.relu(convolution(x))
        return self.head(x.mean((1, 2)))
