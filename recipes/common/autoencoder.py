"""The deep autoencoder that second-order methods are compared on since Hinton & Salakhutdinov 2006 and Martens 2010."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


class Autoencoder(nnx.Module):
    """A mirrored multilayer perceptron: features (batch, sizes[0]) -> logits (batch, sizes[0]), at least float32.

    `sizes = (64, 48, 24, 8)` gives 64-48-24-8-24-48-64. Every layer is followed by `activation` but two: the code layer
    (size 8 here) is linear, as in Hinton & Salakhutdinov (Science 313, 2006) and Martens (ICML 2010), so that codes are
    not squashed; and the last layer's outputs are logits, for a sigmoid cross-entropy on pixels in [0, 1], or plain
    values for a squared error.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: Callable[[jax.Array], jax.Array] = nnx.tanh,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        """Build the network.

        Args:
            sizes: from the input to the code, at least those two.
            activation: elementwise; not used after the code and the last layer.
            dtype: of the computation; parameters stay float32.
            rngs: the stream "params" is drawn from.

        Raises:
            ValueError: fewer than two sizes, or one that is not positive.
        """
        sizes = tuple(sizes)
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(
                f"Autoencoder(sizes={sizes}): give at least two positive sizes, from the input to the code, "
                f"e.g. (64, 48, 24, 8)."
            )
        self.activation = activation
        self.encoder = nnx.List(nnx.Linear(a, b, dtype=dtype, rngs=rngs) for a, b in pairwise(sizes))
        self.decoder = nnx.List(nnx.Linear(a, b, dtype=dtype, rngs=rngs) for a, b in pairwise(sizes[::-1]))

    def encode(self, x: jax.Array) -> jax.Array:
        """(batch, sizes[0]) -> codes (batch, sizes[-1])."""
        return self._stack(self.encoder, x)

    def decode(self, code: jax.Array) -> jax.Array:
        """Codes (batch, sizes[-1]) -> logits (batch, sizes[0])."""
        return self._stack(self.decoder, code)

    def __call__(self, x: jax.Array) -> jax.Array:
        logits = self.decode(self.encode(x))
        return logits.astype(jnp.float32) if jnp.finfo(logits.dtype).bits < 32 else logits

    def _stack(self, layers: nnx.List, x: jax.Array) -> jax.Array:
        """The layers with the activation between them, none after the last."""
        *hidden, last = layers
        for layer in hidden:
            x = self.activation(layer(x))
        return last(x)
