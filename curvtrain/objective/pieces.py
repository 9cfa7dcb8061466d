"""Batches in pieces: their sizes, and what is summed over them in the backward passes of a loss."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from curvtrain._keys import Purpose, fold
from curvtrain.losses import loss_only_weights

PyTree = Any


class Measure(Protocol):
    """Sums over the examples of a batch that are taken in the backward passes of its loss.

    A measure adds *slots* to the model: zero-valued inputs whose cotangents are what it wants to know (see
    `curvature/capture/taps.py`). It shares the forward pass with the gradient, and the backward pass too if it uses
    the cotangents of the loss itself.
    """

    def prepare(self, piece: Any) -> tuple[PyTree, Callable[[Any, PyTree], None]]:
        """Returns (the slots for a piece, a function of a module and slots that puts the slots into the module)."""
        ...

    def rides(self, outputs: Any, piece: Any) -> bool:
        """Says whether `sums` reads `own`: then the loss's backward pass is seeded for the total, not for the mean."""
        ...

    def sums(
        self, pull: Callable[[list[jax.Array]], PyTree], own: PyTree, outputs: Any, piece: Any, key: jax.Array | None
    ) -> PyTree:
        """Returns sums over the examples of a piece; they are added up over the pieces of a batch.

        Args:
          pull: maps cotangents of the outputs' floating-point leaves to those of the slots: one backward pass.
          own: the slots' cotangents for the total loss, sum_i w_i l_i. They cost nothing where the gradient is taken
            too, and nothing where they are not used.
          outputs, piece, key: of the forward pass.
        """
        ...


def walk(step: Callable, state: PyTree, batch: Any, key: jax.Array | None, size: int | None) -> tuple[Any, Any, Any]:
    """Runs `step(state, piece, key) -> (state, sums, seen)` over a batch in pieces of `size` examples.

    Returns:
      (the last state, the sums added up over the pieces, what was seen stacked along a new leading axis of pieces).
      With `size` None, or no smaller than the batch, there is one piece, the batch itself.
    """
    if size is None or size >= batch_size(batch):
        state, sums, seen = step(state, batch, key)
        return state, sums, jax.tree.map(lambda a: a[None], seen)
    pieces, rest = divmod(batch_size(batch), size)
    keys = [None] * (pieces + 1) if key is None else jax.random.split(fold(key, Purpose.PIECES), pieces + 1)
    # Piece j takes rows j, j + pieces, ...: a batch that is sharded over devices in contiguous blocks then gives
    # every device its share of every piece, without communication.
    cut = lambda a: jnp.moveaxis(a[: pieces * size].reshape((size, pieces, *a.shape[1:])), 1, 0)
    stacked = jax.tree.map(cut, batch)

    def body(carry, xs):
        state, sums = carry
        piece, k = xs
        state, more, seen = step(state, piece, k)
        return (state, jax.tree.map(jnp.add, sums, more)), seen

    first = jax.tree.map(lambda a: a[0], stacked)
    shapes = jax.eval_shape(step, state, first, key)[1]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (state, sums), seen = jax.lax.scan(body, (state, zeros), (stacked, None if key is None else keys[:pieces]))
    if rest:
        state, more, last = step(state, jax.tree.map(lambda a: a[pieces * size :], batch), keys[pieces])
        sums = jax.tree.map(jnp.add, sums, more)
        seen = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), seen, last)
    return state, sums, seen


def safe(weight: jax.Array) -> jax.Array:
    """A denominator: the total weight, or one where every example is masked (then the sums above it are zero).

    No mean has a total weight below zero, or one that is not finite: the denominator is then NaN.
    """
    otherwise = jnp.where(weight == 0, 1.0, jnp.nan).astype(weight.dtype)
    return jnp.where((weight > 0) & jnp.isfinite(weight), weight, otherwise)


def batch_size(batch: Any) -> int:
    """The number of examples of a batch: the length that all of its arrays share. Raises ValueError if they do not."""
    lengths = {
        jax.tree_util.keystr(path, simple=True, separator="."): jnp.shape(leaf)[0] if jnp.ndim(leaf) else "a scalar"
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    }
    if len(set(lengths.values())) != 1 or "a scalar" in lengths.values():
        raise ValueError(
            f"The arrays of a batch should have one common length, their number of examples, not {lengths}. Groups of "
            f"unequal length, such as interior and boundary points, go through an objective in one piece (without "
            f"microbatch) with Lanczos or PSGD; for anything else make them rows of the same arrays, with an entry "
            f"that says which group a row belongs to."
        )
    return int(next(iter(lengths.values())))


def loss_only_weight(piece: Any, split: bool) -> jax.Array:
    """The weight of a piece of which only the mean loss is known: its examples, or their mask and weights.

    Args:
      piece: the piece.
      split: whether it may be one of several: the weight of a single one cancels, so no entry is read.
    """
    leading = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(piece) if jnp.ndim(leaf)}
    if len(leading) != 1:
        return jnp.float32(1.0)  # not examples along a common axis: the batch is one piece anyway
    examples = leading.pop()
    return jnp.sum(loss_only_weights(piece, examples)) if split else jnp.float32(examples)
