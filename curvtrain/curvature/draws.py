"""Expectations over draws of parameters: means of gradients, and of whatever is measured with them.

No noise is ever stored: that of a draw is a function of a key and of the draw's index.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from curvtrain import _checks
from curvtrain._keys import Purpose, fold
from curvtrain.curvature import trees
from curvtrain.curvature.posterior import no_posterior, sampler_of, wanted

PyTree = Any
Drawn = TypeVar("Drawn")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """The extra argument `draws` of an update: means over the draws at which its gradient was taken.

    Attributes:
      noise_grad: n g, like the parameters: the noise of a draw, its distance from the mean, times the gradient there;
        None if no posterior wants it.
      square_grad: g^2, likewise.
    """

    noise_grad: PyTree = None
    square_grad: PyTree = None


def statistics(wants: frozenset[str], noise: PyTree, grads: PyTree) -> Draws:
    """The statistics of one draw."""
    of = lambda name, function: jax.tree.map(function, noise, trees.wide(grads)) if name in wants else None
    return Draws(of("noise_grad", lambda n, g: n * g), of("square_grad", lambda _, g: g * g))


def over_draws(
    draw: Callable[[jax.Array], Drawn],
    function: Callable[[Drawn, jax.Array], tuple[PyTree, PyTree]],
    key: jax.Array,
    samples: int,
    axis: str | None = None,
    group: int = 1,
) -> tuple[PyTree, PyTree]:
    """Means over draws, one in memory at a time, or as many as a mesh axis has devices.

    Draw d has the key fold_in(key, d), however draws are grouped.

    Args:
      draw: a function of a key.
      function: `(what was drawn, a key for its own randomness) -> (what is averaged, what is kept of each draw)`.
      key: of all draws.
      samples: how many draws.
      axis: of the ambient mesh, over which draws are split.
      group: the size of that axis; it divides `samples`.

    Returns:
      (means, in the dtypes of what is averaged; of leaves that are not floating-point, the last; what is kept, with a
      leading axis of draws).
    """
    keys_of = lambda index: (fold(at := jax.random.fold_in(key, index), Purpose.SAMPLE), fold(at, Purpose.NOISE))

    def one(index):
        ours, theirs = keys_of(index)
        return function(draw(ours), theirs)

    def several(indices):
        ours, theirs = jax.vmap(keys_of)(indices)
        # drawn one after the other: a curvature's work may itself be split over the mesh
        drawn = jax.tree.map(lambda a: _split(a, axis), jax.lax.map(draw, ours))
        means, kept = jax.vmap(function, spmd_axis_name=axis)(drawn, theirs)
        return jax.tree.map(lambda a: _total(a), means), kept

    if samples == 1:
        means, kept = one(0)
        return means, jax.tree.map(lambda a: a[None], kept)
    step = one if group == 1 else several
    indices = jnp.arange(samples) if group == 1 else jnp.arange(samples).reshape(-1, group)
    shapes, _ = jax.eval_shape(function, jax.eval_shape(draw, key), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, _sum_dtype(s.dtype)), shapes)

    def add(sums, index):
        means, kept = step(index)
        more = lambda total, new: total + new.astype(total.dtype) if _is_float(new) else new
        return jax.tree.map(more, sums, means), kept

    sums, kept = jax.lax.scan(add, zeros, indices)
    mean = lambda total, s: (total / samples).astype(s.dtype) if _is_float(s) else total
    if group > 1:
        kept = jax.tree.map(lambda a: a.reshape(samples, *a.shape[2:]), kept)
    return jax.tree.map(mean, sums, shapes), kept


def at_draws(
    function: Callable[[PyTree, jax.Array], tuple[jax.Array, PyTree]],
    opt_state: PyTree,
    params: PyTree,
    key: jax.Array,
    *,
    samples: int = 1,
    curvature: Any = None,
) -> tuple[jax.Array, PyTree, Draws]:
    """The value and the gradient of a loss in expectation over draws, for a loop of one's own. A Trainer does it.

        value, grads, draws = optim.at_draws(value_and_grad, opt_state, params, step_key, samples=2)
        updates, opt_state = tx.update(grads, opt_state, params, draws=draws)

    Args:
      function: `(params, key) -> (value, gradient)`; the key, another one for each draw, is for dropout and the like.
      opt_state: of an optimizer that samples.
      params: the means.
      key: of the step: each step needs its own.
      samples: number of draws, which are made one after the other.
      curvature: what is maintained for the optimizer.

    Returns:
      (mean value, mean gradient, the extra argument `draws` of the update).
    """
    _checks.positive_int("at_draws(samples)", samples)
    wants = wanted(opt_state)

    sampler = sampler_of(None, opt_state)
    if sampler is None:
        raise no_posterior("at_draws")
    draw = lambda key: sampler(opt_state, params, key, curvature)

    def look(drawn, key):
        theta, by = drawn
        value, grads = function(theta, key)
        return (value, grads, statistics(wants, by, grads)), ()

    return over_draws(draw, look, key, samples)[0]


def _is_float(a: Any) -> bool:
    return jnp.issubdtype(a.dtype, jnp.floating)


def _sum_dtype(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _total(stacked: jax.Array) -> jax.Array:
    """The sum over a leading axis; of what is not floating-point, the last."""
    return jnp.sum(stacked, axis=0, dtype=_sum_dtype(stacked.dtype)) if _is_float(stacked) else stacked[-1]


def _split(array: jax.Array, axis: str | None) -> jax.Array:
    """The leading axis over a mesh axis; the compiler chooses the rest."""
    if axis is None:
        return array
    rest: Sequence[Any] = [PartitionSpec.UNCONSTRAINED] * (array.ndim - 1)
    return jax.lax.with_sharding_constraint(array, PartitionSpec(axis, *rest))
