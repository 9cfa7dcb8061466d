"""Optimizers that sample: how they are made, and what a loop of one's own needs for them."""

from collections.abc import Callable
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


def known_size(optimizer: str, argument: str, size: jax.Array | None) -> jax.Array:
    """The number of examples in a state. Raises ValueError if nobody has said it."""
    if size is None:
        raise ValueError(
            f"{optimizer}({argument}) is None, which is the number of training examples in a Trainer. In a loop of "
            f"your own pass this number, {optimizer}(learning_rate, {argument})."
        )
    return size


def count_of(optimizer: str, argument: str, examples: Callable[[], int] | None) -> int:
    """The number of examples that a Trainer counts. Raises ValueError if it cannot."""
    if examples is None:
        raise ValueError(
            f"{optimizer}({argument}) is None, and train_data does not say how many examples it has. Pass their "
            f"number, {optimizer}(learning_rate, {argument})."
        )
    return examples()
