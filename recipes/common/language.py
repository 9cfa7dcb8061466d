"""Two small language models over tokens: a causal transformer and a recurrent network of gated units.

Both map tokens int (batch, time) to logits (batch, time, vocabulary), at least float32, where `logits[:, t]` depends on
`tokens[:, : t + 1]` only. Dropout follows the modules' own flags: on, until `nnx.view(model, deterministic=True)` or
`model.eval()`. No token is checked against the vocabulary: in `nnx.Embed` one that is too large gives NaN, and a
negative one counts from the end.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


class TransformerBlock(nnx.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)): (batch, time, width) -> (batch, time, width), causal in time."""

    def __init__(self, width: int, heads: int, layers: int, *, dropout: float, dtype: DTypeLike | None, rngs: nnx.Rngs):
        # What adds to the residual stream starts smaller, so that its variance does not grow with the depth.
        to_stream = nnx.initializers.variance_scaling(1 / (2 * layers), "fan_in", "truncated_normal")
        self.norm1 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads,
            width,
            dropout_rate=dropout,
            broadcast_dropout=False,
            deterministic=False,
            decode=False,
            out_kernel_init=to_stream,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, kernel_init=to_stream, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.dropout(self.attention(self.norm1(x), is_causal=True))
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norm2(x)))))


class Transformer(nnx.Module):
    """A small GPT: pre-norm blocks, learned positions, GELU, separate (untied) output layer.

    Shapes follow GPT-2 (Radford et al. 2019, section 2.3), and so does the division of the initial weights by
    sqrt(2 layers) in the two layers of a block that add to the residual stream. Their scale is LeCun's, 1/sqrt(fan_in),
    and not GPT-2's 0.02, which suits a width of 768 (measured at width 64, 200 steps of Adam on the standard library's
    source: a loss of 2.30 against 2.62 nats).
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        *,
        layers: int = 2,
        width: int = 128,
        heads: int = 4,
        dropout: float = 0.0,
        remat: bool = False,
        scan: bool = False,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        """Build the network.

        Args:
            vocabulary: number of different tokens.
            length: the longest sequence, and the number of learned positions.
            layers: number of blocks.
            width: of the residual stream.
            heads: of attention; divides `width`.
            dropout: rate, on embeddings, attention weights and both branches of a block.
            remat: recompute each block in the backward pass instead of storing its insides: the same values, less
                memory.
            scan: keep the blocks' parameters in one stack, (layers, ...) each, and run one program over it: compile
                time does not grow with the depth.
            dtype: of the computation, e.g. bfloat16; parameters stay float32.
            rngs: the streams "params" and, for dropout, "dropout".

        Raises:
            ValueError: `heads` does not divide `width`.
        """
        if width % heads:
            raise ValueError(f"Transformer(width={width}, heads={heads}): `heads` should divide `width`.")
        self.length = length
        self.remat, self.scan = remat, scan
        self.embed = nnx.Embed(vocabulary, width, dtype=dtype, rngs=rngs)
        self.position = nnx.Embed(length, width, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        make = lambda rngs: TransformerBlock(width, heads, layers, dropout=dropout, dtype=dtype, rngs=rngs)
        if scan:
            self.blocks = nnx.split_rngs(splits=layers)(nnx.vmap(make, in_axes=(0,), out_axes=0))(rngs)
        else:
            self.blocks = nnx.List(make(rngs) for _ in range(layers))
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (batch, time, vocabulary) of tokens (batch, time).

        Raises:
            ValueError: not integers of two axes, or more than `length` positions.
        """
        _check_tokens("Transformer", tokens)
        time = tokens.shape[1]
        if time > self.length:
            raise ValueError(f"Transformer: {time} positions, but it was built with length={self.length}.")
        # positions with the batch's axis: what an example does to the table can then be told from another (K-FAC)
        positions = jnp.broadcast_to(jnp.arange(time), tokens.shape)
        x = self.dropout(self.embed(tokens) + self.position(positions))
        run = nnx.remat(_run_block) if self.remat else _run_block
        blocks: Any = self.blocks  # a list of them, where they are not scanned
        if self.scan:
            x = nnx.scan(run, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(blocks, x)
        else:
            for block in blocks:
                x = run(block, x)
        return _logits(self.head(self.norm(x)))


class GRU(nnx.Module):
    """Embedding, `layers` gated recurrent layers (Cho et al. 2014, arXiv:1406.1078), linear output layer.

    The state starts at zero and is passed to `nnx.RNN` explicitly, which therefore needs no random stream: the only
    state of this module besides its parameters is that of dropout.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        layers: int = 1,
        width: int = 128,
        dropout: float = 0.0,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        """Build the network.

        Args:
            vocabulary: number of different tokens.
            layers: number of recurrent layers.
            width: of the embedding and of each state.
            dropout: rate, on the input of each recurrent layer and of the output layer, not inside the recurrence
                (Zaremba et al. 2014, arXiv:1409.2329).
            dtype: of the computation, e.g. bfloat16; parameters stay float32.
            rngs: the streams "params" and, for dropout, "dropout".
        """
        self.embed = nnx.Embed(vocabulary, width, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.layers = nnx.List(
            nnx.RNN(nnx.GRUCell(width, width, dtype=dtype, rngs=rngs), rngs=False) for _ in range(layers)
        )
        self.head = nnx.Linear(width, vocabulary, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (batch, time, vocabulary) of tokens (batch, time).

        Raises:
            ValueError: not integers of two axes.
        """
        _check_tokens("GRU", tokens)
        x = self.embed(tokens)
        for layer in self.layers:
            x = self.dropout(x)
            x = layer(x, initial_carry=jnp.zeros_like(x[:, 0]))
        return _logits(self.head(self.dropout(x)))


def _run_block(block: TransformerBlock, x: jax.Array) -> jax.Array:
    return block(x)


def _logits(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def _check_tokens(model: str, tokens: jax.Array) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{model} takes integer tokens (batch, time), got {tokens.dtype} {tokens.shape}.")
