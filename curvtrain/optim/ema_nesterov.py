"""Nesterov's look ahead, along an average of the updates of any optimizer. arXiv 2605.25395.

| symbol | shape | meaning |
|---|---|---|
| theta | params | the iterates |
| m | params | average of their moves, m <- gamma m + (1 - gamma) (theta_{t+1} - theta_t) |
| phi | params | theta + beta m: where the gradient is taken. The parameters of a Trainer or a loop are phi |

    theta_{t+1} = phi_t + A(gradient at phi_t)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain._extra import accepting
from curvtrain.curvature import trees
from curvtrain.optim.base import require_params, require_transformation, transformation

PyTree = Any


class EmaNesterovState(NamedTuple):
    """State of `ema_nesterov`.

    Attributes:
      inner: the optimizer's.
      ahead: beta m, like the parameters, float32 or float64.
    """

    inner: Any
    ahead: PyTree


def ema_nesterov(
    tx: optax.GradientTransformation, beta: float = 1.0, gamma: float = 0.9
) -> optax.GradientTransformationExtraArgs:
    """Moves the parameters to a point ahead of the optimizer's iterates, where the next gradient is taken.

    The iterates are `ema_nesterov_params(opt_state, params)`: give that function to `Trainer(eval_params=...)`.

    Args:
      tx: A, any optimizer, with its learning rate.
      beta: how far ahead, in average moves; 0 is A alone.
      gamma: decay of the average of moves, which begins at zero.
    """
    require_transformation("ema_nesterov(tx)", tx)
    _checks.number_in("ema_nesterov(beta)", beta, 0.0)
    _checks.number_in("ema_nesterov(gamma)", gamma, 0.0, 1.0, open_high=True)
    inner = accepting(tx)

    def init(params):
        return EmaNesterovState(inner.init(params), jax.tree.map(lambda p: jnp.zeros(p.shape, trees.width(p)), params))

    def update(updates, state, params=None, **extra):
        require_params("ema_nesterov", params)
        moves, after = inner.update(updates, state.inner, params, **extra)
        # theta' - theta = (phi + move) - (phi - beta m), and the next phi is theta' + beta m'
        next_ahead = lambda u, a: gamma * a + beta * (1 - gamma) * (trees.wide(u) + a)
        ahead = jax.tree.map(next_ahead, moves, state.ahead)
        out = jax.tree.map(lambda u, a: (trees.wide(u) + a).astype(u.dtype), moves, ahead)
        return out, EmaNesterovState(after, ahead)

    return transformation(init, update)


def ema_nesterov_params(opt_state: PyTree, params: PyTree) -> PyTree:
    """The iterates theta, of the parameters phi and the state of an optimizer with one `ema_nesterov` in it.

    Raises:
      ValueError: the state has none, or several.
    """
    is_ours = lambda node: isinstance(node, EmaNesterovState)
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(node)]
    if len(found) != 1:
        raise ValueError(f"ema_nesterov_params(opt_state) should hold one state of ema_nesterov, not {len(found)}.")
    return jax.tree.map(lambda p, a: (trees.wide(p) - a).astype(p.dtype), params, found[0].ahead)
