"""FAdam: Adam read as a natural gradient of the diagonal empirical Fisher, with the consequences drawn.

Hwang (2024), arXiv 2405.12807, algorithm 1. The Fisher is the square of the *batch's* gradient, as Adam's second moment
is, not the mean of the examples' squares (`curvature.DiagonalFisher`).

| symbol | name here | meaning |
|---|---|---|
| f | `fim` | diagonal of the Fisher; f <- b f + (1 - b) g^2, b = b2 (1 - b2^(t-1)) / (1 - b2^t) |
| p | `exponent` | D = f^p + eps_t; 1/2 is Adam's, 1 the natural gradient's |
| c | `clip` | bound of the RMS of the natural gradient of each parameter, g / D |
| m | `mu` | average of natural gradients, m <- b1 m + (1 - b1) g / D |
| lambda | `weight_decay` | of the natural gradient of the penalty, theta / D, which is clipped too |

    theta <- theta - rate (m + lambda theta / D)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain.curvature import trees
from curvtrain.optim.averages import divided, seen
from curvtrain.optim.base import require_params, transformation

PyTree = Any

CLIP_FORMS = ("paper", "released")
EPS_MODES = ("released", "paper", "none")
_EPS2 = 0.01  # of the paper's eps_t = min(eps, eps2 RMS(g))


class FadamState(NamedTuple):
    """State of `scale_by_fadam`.

    Attributes:
      count: int32 (), updates so far.
      mu: m, like the parameters.
      fim: f, like the parameters.
    """

    count: jax.Array
    mu: PyTree
    fim: PyTree


def fadam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    *,
    weight_decay: float = 0.1,
    clip: float | None = 1.0,
    exponent: float = 0.5,
    eps: float = 1e-8,
    eps_mode: str = "released",
    clip_form: str = "paper",
    debias: bool = False,
    mu_dtype: Any = None,
    fim_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Natural gradients of Adam's Fisher, their average, and a decay that is a natural gradient as well.

    The average is not debiased, and a natural gradient's RMS is at most 1: the first steps are about ten times smaller
    than Adam's unless `debias` is set.

    Args:
      learning_rate: a number or an optax schedule.
      b1, b2: decays of the averages m and f.
      weight_decay: lambda; the parameters are clipped like gradients, so the decay differs from AdamW's.
      clip: c; None does not clip.
      exponent: p.
      eps: epsilon.
      eps_mode: "released" is eps max(1, RMS(g)), as in the authors' code; "paper" is min(eps, 0.01 RMS(g)); "none" is
        eps.
      clip_form: "paper" divides by max(1, RMS / c), so that what is below c stays; "released", as the authors' code
        does, by max(1, RMS) / c: the same for c = 1 alone.
      debias: whether m is divided by 1 - b1^t.
      mu_dtype, fim_dtype: of the averages; None for float32, or float64 for float64 parameters.

    Returns:
      A transformation whose `update` needs the parameters, for the decay.
    """
    if not callable(learning_rate):
        _checks.number_in("fadam(learning_rate)", learning_rate, 0.0)
    scale = scale_by_fadam(
        b1,
        b2,
        weight_decay=weight_decay,
        clip=clip,
        exponent=exponent,
        eps=eps,
        eps_mode=eps_mode,
        clip_form=clip_form,
        debias=debias,
        mu_dtype=mu_dtype,
        fim_dtype=fim_dtype,
    )
    return optax.chain(scale, optax.scale_by_learning_rate(learning_rate))


def scale_by_fadam(
    b1: float = 0.9,
    b2: float = 0.999,
    *,
    weight_decay: float = 0.1,
    clip: float | None = 1.0,
    exponent: float = 0.5,
    eps: float = 1e-8,
    eps_mode: str = "released",
    clip_form: str = "paper",
    debias: bool = False,
    mu_dtype: Any = None,
    fim_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """`fadam` without its learning rate and sign: a link of a chain. Arguments as there."""
    _checks.number_in("fadam(b1)", b1, 0.0, 1.0, open_high=True)
    _checks.number_in("fadam(b2)", b2, 0.0, 1.0, open_high=True)
    _checks.number_in("fadam(weight_decay)", weight_decay, 0.0)
    _checks.number_in("fadam(exponent)", exponent, 0.0, 1.0, open_low=True)
    _checks.number_in("fadam(eps)", eps, 0.0)
    _checks.one_of("fadam(eps_mode)", eps_mode, EPS_MODES)
    _checks.one_of("fadam(clip_form)", clip_form, CLIP_FORMS)
    if clip is not None:
        _checks.number_in("fadam(clip)", clip, 0.0, open_low=True)

    def clipped(x):
        if clip is None:
            return x
        size = _rms(x)
        return x / (jnp.maximum(1.0, size / clip) if clip_form == "paper" else jnp.maximum(1.0, size) / clip)

    def epsilon(g):
        if eps_mode == "none":
            return eps
        size = _rms(g)
        return eps * jnp.maximum(1.0, size) if eps_mode == "released" else jnp.minimum(eps, _EPS2 * size)

    def init(params):
        like = lambda dtype: jax.tree.map(lambda p: jnp.zeros(p.shape, dtype or trees.width(p)), params)
        return FadamState(jnp.int32(0), like(mu_dtype), like(fim_dtype))

    def update(updates, state, params=None, **extra):
        if not _checks.is_off(weight_decay):
            require_params("fadam", params)
        t = state.count + 1
        width = trees.width(updates)
        b = b2 * seen(b2, state.count, width) / seen(b2, t, width)  # 0 at first: then f is g^2
        whole = seen(b1, t, width) if debias else 1.0

        def step(g, m, f, *theta):
            g = trees.wide(g)
            f = b * trees.wide(f) + (1 - b) * jnp.square(g)
            D = f**exponent + epsilon(g)
            m = b1 * trees.wide(m) + (1 - b1) * clipped(divided(g, D))
            u = m / whole
            for p in theta:
                u = u + weight_decay * clipped(divided(trees.wide(p), D))
            return u, m, f

        decayed = () if _checks.is_off(weight_decay) else (params,)
        found = jax.tree.map(step, updates, state.mu, state.fim, *decayed)
        u, mu, fim = _unzipped(updates, found)
        return trees.cast(u, updates), FadamState(t, trees.cast(mu, state.mu), trees.cast(fim, state.fim))

    return transformation(init, update)


def _unzipped(like: PyTree, triples: PyTree) -> tuple[PyTree, PyTree, PyTree]:
    """A tree of triples as three trees."""
    return jax.tree.transpose(jax.tree.structure(like), jax.tree.structure((0, 0, 0)), triples)


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x)) / max(x.size, 1))
