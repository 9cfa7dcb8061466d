"""FOSI: Newton steps on the extreme eigenvectors of the curvature, any first-order optimizer on the complement.

Sivan, Gabel, Schuster, "FOSI: Hybrid First and Second Order Optimization", ICLR 2024, arXiv 2302.08484, algorithm 2.

Symbols, after the paper:

| symbol | shape | meaning |
|---|---|---|
| g | params | gradient |
| V, lambda | (k + l, params), (k + l,) | eigenvectors as rows, eigenvalues; unconverged pairs are left out |
| d | (k + l,) | 1 / max(abs(lambda), delta max abs(lambda)): damped, sign-safe inverse eigenvalues |
| g1, g2 | params | V^T V g, and g - g1 |
| vel | params | momentum of the Newton part |
| alpha | () | rate of the Newton part |
| s | () | multiplier of the base part, in [1, clip]: lambda_max over the largest curvature left to `base` |

One step, where `base` is any optax transformation:

    vel    <- momentum(g1, vel)
    u      <- base(g2);  u <- u - V^T V u
    update  = s u - alpha V^T (d * V vel)
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain._extra import accepting
from curvtrain.curvature import trees
from curvtrain.curvature.eigenpairs import Eigenpairs
from curvtrain.curvature.packing import Packing
from curvtrain.curvature.request import Request
from curvtrain.optim.base import require_curvature, require_params, require_transformation, transformation, vectors_for

PyTree = Any
Number = float | jax.Array
Momentum = Callable[[jax.Array, jax.Array], jax.Array]  # (g1, vel) -> vel: elementwise and linear

MOMENTA: dict[str, Callable[[Number], Momentum]] = {
    "ema": lambda decay: lambda g1, vel: (1 - decay) * g1 + decay * vel,
    "heavy_ball": lambda decay: lambda g1, vel: g1 + decay * vel,
    # FOSI's own "Nesterov": vel is this recursion's output, so its memory decays with decay^2
    "nesterov": lambda decay: lambda g1, vel: (1 + decay) * g1 + decay**2 * vel,
    "none": lambda decay: lambda g1, vel: g1,
}


_SMALL = 4096  # numbers; copying a leaf of so many costs no more than a product with it of its own


class FosiState(NamedTuple):
    """State of `fosi`.

    Attributes:
      count: int32 (), updates so far.
      base: the base optimizer's state.
      velocity: like the parameters, the momentum of the Newton part. It lives in parameter space, so it
        survives a refresh: the new eigenvectors see what of it lies in their span.
      request: tells whoever maintains the eigenpairs for which parameters they are needed.
    """

    count: jax.Array
    base: optax.OptState
    velocity: PyTree
    request: Request


def fosi(
    base: optax.GradientTransformation,
    alpha: optax.ScalarOrSchedule = 0.1,
    *,
    momentum: str | Momentum = "ema",
    decay: Number = 0.9,
    damping: Number = 1e-3,
    learning_rate_clip: Number = 1.0,
    l: int | jax.Array = 0,
    accumulator_dtype: str | None = None,  # no dtype: `inject_hyperparams` calls whatever is callable
) -> optax.GradientTransformationExtraArgs:
    """Newton steps on the eigenvectors in `curvature`, `base` on their orthogonal complement.

    Every number may be an array, traced or not, so `optax.inject_hyperparams` wraps this function as it is.
    (It takes functions for schedules: a `momentum` that is a function has to be among its `static_args`.)

    Before the first refresh, and for pairs that have not converged, this is `base` alone. Decoupled weight decay in
    `base` acts on the complement only; to decay all of the parameters, give the Trainer or the
    objective a `regulariser`.

    Args:
      base: any optax transformation; it sees the parameter pytree, so masks, partitions and per-layer rules work.
      alpha: rate of the Newton part, a number or an optax schedule. With "ema" it is the share of a Newton step taken
        per step; with "heavy_ball" the steps add up to alpha / (1 - decay).
      momentum: rule of the Newton part's velocity: "ema" (to go with Adam), "heavy_ball", "nesterov", "none" (SGD), or
        a linear elementwise function (g1, vel) -> vel. See `MOMENTA`.
      decay: share of the velocity that a step keeps, in [0, 1).
      damping: delta; inverse eigenvalues are 1 / max(|lambda|, delta max|lambda|). Negative curvature is descended
        along with its magnitude. 0 reproduces the original.
      learning_rate_clip: the base's update is multiplied by s = clip(lambda_max / lambda_k, 1, learning_rate_clip),
        the paper's scaling of the learning rate, over the k largest pairs; one of them that is left to the base counts
        for lambda_k if it is larger. 1 turns it off: with it, a comparison with the base at the same rate compares
        learning rates. A linear base (SGD, heavy ball) moves in the complement as it does alone, so this is all that
        it gains from the largest pairs; Adam gains without.
      l: number of smallest pairs in the curvature, as in `Lanczos(k, l)`: they do not count in s.
      accumulator_dtype: dtype of the velocity; None for float64 where a parameter is, otherwise float32.

    Returns:
      A transformation whose `update` needs `curvature=Eigenpairs` and the parameters, and passes the other extra
      arguments on to `base`.
    """
    require_transformation("fosi(base)", base)
    if not callable(alpha):
        _checks.number_in("fosi(alpha)", alpha, 0.0)
    _checks.number_in("fosi(decay)", decay, 0.0, 1.0, open_high=True)
    _checks.number_in("fosi(damping)", damping, 0.0)
    _checks.number_in("fosi(learning_rate_clip)", learning_rate_clip, 1.0)
    _checks.positive_int("fosi(l)", l, minimum=0)
    if not callable(momentum):
        _checks.one_of("fosi(momentum)", momentum, MOMENTA)
        momentum = MOMENTA[momentum](decay)
    advance = momentum
    base = accepting(base)

    def init(params):
        dtype = accumulator_dtype or trees.width(params)
        velocity = jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)
        return FosiState(jnp.int32(0), base.init(params), velocity, Request.of("fosi", Eigenpairs, params))

    def update(updates, state, params=None, *, curvature=None, **extra):
        require_params("fosi", params)
        pairs = require_curvature("fosi", curvature, Eigenpairs, "curvature.Lanczos(k)")
        to, back = vectors_for("fosi", pairs, updates)
        pairs, d, s = _inverse(pairs, damping, learning_rate_clip, l)

        span = _Span(pairs, state.count)
        a = span.coefficients(to(updates))  # V g
        g1 = back(span.combine(a))
        g2 = jax.tree.map(lambda g, g1: (trees.wide(g) - g1).astype(g.dtype), updates, g1)
        b = advance(a, span.coefficients(to(state.velocity)))  # V vel: linear, so it commutes with V
        velocity = jax.tree.map(lambda g, v: advance(g, v.astype(g.dtype)).astype(v.dtype), g1, state.velocity)
        u, base_state = base.update(g2, state.base, params, **extra)
        rate = alpha(state.count) if callable(alpha) else alpha
        # s (u - V^T V u) - alpha V^T (d * V vel), with one pass over V
        inside = back(span.combine(s * span.coefficients(to(u)) + rate * d * b))
        out = jax.tree.map(lambda u, i: (s * trees.wide(u) - i).astype(u.dtype), u, inside)
        return out, FosiState(state.count + 1, base_state, velocity, state.request)

    return transformation(init, update)


class _Span:
    """The span of the usable eigenvectors, with small leaves packed: one product for all of them."""

    def __init__(self, pairs: Eigenpairs, count: jax.Array):
        self._packing = Packing.of_basis(pairs.vectors, largest=_SMALL)
        self._unpack = self._packing.unpacker(count)
        self._V, self._used = self._packing.pack(pairs.vectors), pairs.converged

    def coefficients(self, vector: PyTree) -> jax.Array:
        """V v, zero for pairs that are not used: (k + l,)."""
        return jnp.where(self._used, trees.coefficients(self._V, self._packing.pack(vector)), 0.0)

    def combine(self, weights: jax.Array) -> PyTree:
        """V^T c: a vector like the parameters."""
        return self._unpack(trees.combine(weights, self._V))


def _inverse(
    pairs: Eigenpairs, damping: Number, clip: Number, l: int | jax.Array
) -> tuple[Eigenpairs, jax.Array, jax.Array]:
    """Returns (the pairs that can be inverted, d, s)."""
    magnitude = jnp.abs(pairs.values)
    largest = jnp.max(magnitude, initial=0.0, where=pairs.converged)
    # a pair of zero curvature has no Newton step: it is left to the base optimizer
    usable = pairs.converged & (magnitude > jnp.finfo(magnitude.dtype).eps * largest)
    pairs = dataclasses.replace(pairs, converged=usable)
    d = jnp.where(usable, 1.0 / jnp.where(usable, jnp.maximum(magnitude, damping * largest), 1.0), 0.0)
    top = jnp.arange(magnitude.size) < magnitude.size - l  # a mask, not a slice: l may be traced
    lambda_k = jnp.min(magnitude, initial=jnp.inf, where=usable & top)
    left = jnp.max(magnitude, initial=0.0, where=~usable & top)  # the base optimizer would overshoot on it
    s = jnp.clip(jnp.max(magnitude, initial=0.0, where=usable & top) / jnp.maximum(lambda_k, left), 1.0, clip)
    return pairs, d, s
