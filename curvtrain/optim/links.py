"""Small links for chains, without a state: what can be done to an update before its rate."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain.curvature import trees
from curvtrain.optim.base import require_params, transformation


def scale_by_norm(norm: float = 1.0) -> optax.GradientTransformationExtraArgs:
    """Gives the update of every parameter this Frobenius norm; where it is zero it stays zero.

    Args:
      norm: above 0.
    """
    _checks.number_in("scale_by_norm(norm)", norm, 0.0, open_low=True)

    def scaled(u):
        size = trees.norm(u)
        return (trees.wide(u) * (norm / jnp.where(size > 0, size, 1.0))).astype(u.dtype)

    update = lambda updates, state, params=None, **extra: (jax.tree.map(scaled, updates), state)
    return transformation(lambda params: optax.EmptyState(), update)


def add_cautious_decay(weight_decay: float, mask: Any = None) -> optax.GradientTransformationExtraArgs:
    """Adds weight decay only where it does not work against the update: entries with u theta >= 0.

    Chen et al. (2025), arXiv 2510.12402. A link before the learning rate, in place of `optax.add_decayed_weights`.

    Args:
      weight_decay: of the parameters that are added.
      mask: tree of bools, or a function that makes one of the parameters: which of them decay.
    """
    _checks.number_in("add_cautious_decay(weight_decay)", weight_decay, 0.0)
    decayed = lambda u, p: u + (weight_decay * jnp.where(u * p >= 0, p, 0.0)).astype(u.dtype)

    def update(updates, state, params=None, **extra):
        require_params("add_cautious_decay", params)
        return jax.tree.map(decayed, updates, params), state

    link = transformation(lambda params: optax.EmptyState(), update)
    return link if mask is None else optax.with_extra_args_support(optax.masked(link, mask))
