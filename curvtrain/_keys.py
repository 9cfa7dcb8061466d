"""The purposes for which random keys are used: one list, so that no two uses of a key draw the same numbers.

Whatever is folded into a key is either one of these purposes, or an index (of a step, a stream, a leaf, an example).
All purposes lie above all indices, so the two never meet. `jax.random.split(key, n)[i]` is `jax.random.fold_in(key, i)`
and counts as an index, too. Nor does a purpose meet the keys that `nnx.Rngs(seed)` folds out of the same
seed to initialise a model. A test reads the package's source: constants are folded in by `fold` alone.
"""

import enum

import jax

_ABOVE_ALL_INDICES = 2**31


@enum.unique
class Purpose(enum.IntEnum):
    """Says what a key is folded for; the numbers are part of what a seed means, and do not change."""

    # of a step's key
    NOISE = _ABOVE_ALL_INDICES + 1  # the model's own randomness, and that of estimators which ride on its passes
    REFRESH = _ABOVE_ALL_INDICES + 2
    DRAWS = _ABOVE_ALL_INDICES + 14  # of parameters from a posterior; then the index of the draw
    # of the run's key
    EVALUATION = _ABOVE_ALL_INDICES + 3  # then the index of the batch
    PREDICTIVE = _ABOVE_ALL_INDICES + 15  # the draws at which predictions are averaged; then the index of the draw
    # of a draw's key, besides NOISE
    SAMPLE = _ABOVE_ALL_INDICES + 16  # the parameters that are drawn
    # of the key of a pass over a batch
    PIECES = _ABOVE_ALL_INDICES + 4  # then the index of the micro-batch
    STREAMS = _ABOVE_ALL_INDICES + 5  # then the index of the module's random stream
    EXAMPLES = _ABOVE_ALL_INDICES + 6  # then the index of the example, where each is walked alone
    TARGETS = _ABOVE_ALL_INDICES + 7  # that are drawn from the model
    # of an estimator's key
    PRODUCTS = _ABOVE_ALL_INDICES + 8  # the model's randomness in products with the curvature
    START = _ABOVE_ALL_INDICES + 9  # the first vectors of an eigensolver
    FIT = _ABOVE_ALL_INDICES + 10  # the noise of a fit
    PROBES = _ABOVE_ALL_INDICES + 11  # the vectors that a fit is made for
    CHANCE = _ABOVE_ALL_INDICES + 12  # whether there is a fit
    PENALTY = _ABOVE_ALL_INDICES + 13  # the probes of a regulariser's diagonal


def fold(key: jax.Array, purpose: Purpose) -> jax.Array:
    """The key for a purpose."""
    return jax.random.fold_in(key, int(purpose))
