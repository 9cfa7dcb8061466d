"""Optimizers that sample: how they are made, and what a loop of one's own needs for them."""

from typing import Any

import jax
import optax

from curvtrain.curvature.draws import Draws
from curvtrain.curvature.posterior import sample_params

PyTree = Any


class SamplingTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation whose state holds a distribution of the parameters.

    It has `sample(opt_state, params, key, curvature=None) -> params`. All that a draw needs is in the state. Around it,
    `optax.chain`, `masked`, `multi_transform`, `inject_hyperparams`, `optim.route` and `optim.self_contained` make
    transformations without this method: there `optim.sample_params`, with the same arguments, draws from their states,
    and a Trainer finds the distribution in them, too.
    """

    @staticmethod
    def sample(opt_state: PyTree, params: PyTree, key: jax.Array, curvature: Any = None) -> PyTree:
        """Draws parameters, see `optim.sample_params`."""
        return sample_params(opt_state, params, key, curvature)


def sampling(tx: optax.GradientTransformationExtraArgs) -> SamplingTransformation:
    """The same transformation with a `sample`; its state, or a part of it, is a `Posterior`."""
    return SamplingTransformation(tx.init, tx.update)


def require_draws(optimizer: str, draws: Any, statistic: str) -> PyTree:
    """A statistic of the draws among an update's extra arguments. Raises TypeError if it is missing."""
    advice = (
        "A Trainer passes it. In a loop of your own take the gradient at draws: value, grads, draws = "
        "optim.at_draws(value_and_grad, opt_state, params, key), then update(grads, opt_state, params, draws=draws)."
    )
    if draws is None:
        raise TypeError(f"{optimizer}.update() needs draws= among its extra arguments, and there is none. {advice}")
    if not isinstance(draws, Draws):
        raise TypeError(f"{optimizer}.update(draws=) should be Draws, not {type(draws).__name__}. {advice}")
    found = getattr(draws, statistic)
    if found is None:
        raise TypeError(f"{optimizer}.update(draws=) has no {statistic}: they are of another optimizer. {advice}")
    return found
