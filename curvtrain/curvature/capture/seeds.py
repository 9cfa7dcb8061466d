"""Cotangents of the outputs whose pull-back makes taps compute a Fisher.

Symbols as in `layers` and `statistics.py`; z are the outputs' floating-point leaves, W is the sum of the w_n.

| fisher | cotangents of z | backward passes |
|---|---|---|
| exact, ggn | the columns of a factor of the loss's output Hessian | number of outputs, times positions of a sequence |
| sampled | d / dz sum_n sqrt(w_n) l_n with targets drawn from the model | 1 |
| empirical | the same with the batch's targets: not the Fisher | 1, or that of the loss |
| as given | d / dz sum_n w_n l_n, the loss itself: of no Fisher, see `AS_GIVEN` | that of the loss |

In "sampled" and "empirical", the example of D_n is what the batch's leading axis counts: the positions of a sequence
add up before anything is squared. For "sampled" their cross terms vanish in expectation.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain._keys import Purpose, fold
from curvtrain._outputs import floats, with_floats
from curvtrain.losses import Loss, unmasked

PyTree = Any
Cotangents = list[jax.Array]

FISHERS = ("exact", "ggn", "sampled", "empirical")
AS_GIVEN = "as given"  # for statistics of the loss's own cotangents, which no estimator offers as a Fisher
_PASSES = 1024  # the most backward passes that an exact Fisher takes before it is refused
AT_ONCE = 16  # of them, mapped over at a time


@dataclasses.dataclass(frozen=True)
class Seeds:
    """The cotangents of one or several backward passes.

    Attributes:
      columns: for each leaf (count, *shape).
      positions: shape of the positions of a sequence, which are examples of their own: every column is pulled back
        once for each of them.
    """

    columns: Cotangents
    positions: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Number of backward passes."""
        return len(self.columns[0]) * math.prod(self.positions)

    def total(self, pull: Callable[[Cotangents], PyTree]) -> PyTree:
        """The sum of pull(cotangents) over all backward passes, a few of them at a time."""
        if self.count == 1:
            return pull([c[0] for c in self.columns])
        positions = math.prod(self.positions)

        def one(i):
            here = (jnp.arange(positions) == i % positions).reshape(self.positions)
            mask = lambda c: here.reshape(*self.positions, *(1,) * (c.ndim - 2 - len(self.positions)))
            return pull([jnp.where(mask(c), c[i // positions], 0) for c in self.columns])

        index = jnp.arange(self.count)
        many = lambda i: jax.tree.map(lambda a: jnp.sum(a, axis=0), jax.vmap(one)(i))
        if self.count <= AT_ONCE:
            return many(index)
        chunk = next(c for c in range(AT_ONCE, 0, -1) if self.count % c == 0)
        shapes = jax.eval_shape(many, index[:chunk])
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        add = lambda t, i: (jax.tree.map(jnp.add, t, many(i)), None)
        return jax.lax.scan(add, zeros, index.reshape(-1, chunk))[0]


def seeds_of(loss: Loss, outputs: PyTree, piece: Any, key: jax.Array | None, fisher: str, who: str) -> Seeds:
    """The cotangents of the outputs for a Fisher.

    Raises:
      TypeError: the loss cannot say what this Fisher needs of such outputs.
      ValueError: too many backward passes, or no key to draw targets with.
    """
    w = loss.weights(outputs, piece)
    clean = unmasked(outputs, w)
    dtypes = [z.dtype for z in floats(outputs)]
    if fisher in ("exact", "ggn"):
        columns = _columns(loss, clean, piece, w, fisher, who)
        seeds = Seeds(columns, w.shape[1:])
        if seeds.count > _PASSES:
            raise ValueError(
                f"{who}(fisher={fisher!r}) would take {len(columns[0])} outputs x {math.prod(w.shape[1:])} positions "
                f"backward passes for every batch, more than {_PASSES}. Use fisher='sampled': one pass, the same in "
                f"expectation."
            )
    else:
        if fisher == "sampled":
            piece = _drawn(loss, clean, piece, key, who)

        def total(z):  # where, not a product, and twice: targets of masked examples may be anything, 0 * nan is nan
            values = loss.values(unmasked(with_floats(clean, z), w), piece)
            return jnp.sum(jnp.where(w != 0, (w if fisher == AS_GIVEN else jnp.sqrt(w)) * values, 0.0))

        seeds = Seeds([r[None] for r in jax.grad(total)(floats(clean))])
    columns = [c.astype(dtype) for c, dtype in zip(seeds.columns, dtypes, strict=True)]
    return dataclasses.replace(seeds, columns=columns)


def reach_of(loss: Loss, outputs: PyTree, piece: Any) -> Cotangents:
    """Cotangents that are zero for masked outputs and generic elsewhere: what they leave at zero reaches no other."""
    w = loss.weights(outputs, piece)

    def of(i, z):
        noise = jax.random.normal(jax.random.key(i), z.shape).astype(z.dtype)  # a fixed pattern: nothing is drawn
        shape = next((w.shape[:k] for k in range(w.ndim, 0, -1) if z.shape[:k] == w.shape[:k]), None)
        if shape is None:
            return noise
        seen = jnp.any(w.reshape(*shape, -1) != 0, axis=-1)
        return jnp.where(seen.reshape(*shape, *(1,) * (z.ndim - len(shape))), noise, 0)

    return [of(i, z) for i, z in enumerate(floats(outputs))]


def _drawn(loss, clean, piece, key, who):
    """The piece with targets drawn from the model."""
    if key is None:
        raise ValueError(f"{who}(fisher='sampled') draws targets from the model and needs a key.")
    try:
        return loss.sample_targets(clean, piece, fold(key, Purpose.TARGETS))
    except TypeError as error:
        raise TypeError(
            f"{who}(fisher='sampled') cannot draw targets: {type(loss).__name__}.sample_targets did not take "
            f"{_described(clean)} ({error}) {_advice(loss, 'sampled')}"
        ) from error


def _columns(loss, clean, piece, w, fisher, who) -> Cotangents:
    """sqrt(w) S, with sum_c S[c] S[c]^T the loss's Hessian in output space."""
    if fisher == "exact" and not loss.hessian_is_fisher:
        raise TypeError(
            f"{who}(fisher='exact') knows the distribution of the losses of curvtrain.losses, not of "
            f"{type(loss).__name__}, which has {_described(clean)}. {_advice(loss)}"
        )
    try:
        columns = floats(loss.columns_for(clean, piece))
    except TypeError as error:
        raise TypeError(
            f"{who}(fisher={fisher!r}) needs a factor of the loss's Hessian: {type(loss).__name__}.hessian_columns did "
            f"not take {_described(clean)} ({error}) {_advice(loss, 'exact', 'ggn')}"
        ) from error
    if any(c.shape[1 : 1 + w.ndim] != w.shape for c in columns):
        raise TypeError(
            f"{who}(fisher={fisher!r}) needs outputs that begin with the shape {w.shape} of the loss's values, not "
            f"{_described(clean)}. {_advice(loss, 'exact', 'ggn')}"
        )
    root = jnp.sqrt(w)
    return [root.reshape(1, *w.shape, *(1,) * (c.ndim - 1 - w.ndim)) * c for c in columns]


def _advice(loss: Loss, *but: str) -> str:
    """Names the kinds of Fisher that the loss allows, except those that were just found not to work."""
    kinds = [kind for kind in loss.fishers if kind not in but]
    return f"Use fisher={' or '.join(map(repr, kinds))}, which takes any outputs."


def _described(outputs: PyTree) -> str:
    """Outputs for a message: their shapes, in the containers in which they come."""
    return f"outputs {jax.tree.map(lambda z: z.shape, outputs)}"
