"""Steps on spheres: every parameter keeps the norm that it began with, and a rate is an angle.

Each tensor's step is a share of its norm, and what it makes of the norm is undone, in place of weight decay:

    theta' = theta - rate R u / |u|,    theta <- R theta' / |theta'|,    R = |theta_0|.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain.curvature import trees
from curvtrain.optim.base import require_params, transformation

PyTree = Any


class HyperballState(NamedTuple):
    """State of `hyperball`.

    Attributes:
      count: int32 (), updates so far.
      radius: R of each parameter, ().
    """

    count: jax.Array
    radius: PyTree


def hyperball(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """The last link of a chain: turns directions into steps that keep every parameter's norm.

        optax.chain(optax.scale_by_adam(), optim.hyperball(0.02))

    A parameter that begins at zero, as most biases do, has no sphere: it moves by -rate u / |u|. Give those another
    optimizer by `route`.

    Args:
      learning_rate: a number or an optax schedule: the tangent of the angle of a step at right angles to theta.

    Returns:
      A transformation whose `update` needs the parameters: no rate or decay is to be chained after it.
    """
    if not callable(learning_rate):
        _checks.number_in("hyperball(learning_rate)", learning_rate, 0.0)

    def init(params):
        return HyperballState(jnp.int32(0), jax.tree.map(trees.norm, params))

    def update(updates, state, params=None, **extra):
        require_params("hyperball", params)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def step(u, p, R):
            theta, u = trees.wide(p), trees.wide(u)
            size = trees.norm(u)
            unit = u / jnp.where(size > 0, size, 1.0)
            moved = theta - rate * jnp.where(R > 0, R, 1.0) * unit
            norm = trees.norm(moved)
            moved = jnp.where((R > 0) & (norm > 0), moved * (R / jnp.where(norm > 0, norm, 1.0)), moved)
            return (moved - theta).astype(p.dtype)

        return jax.tree.map(step, updates, params, state.radius), HyperballState(state.count + 1, state.radius)

    return transformation(init, update)
