"""The quadratic model of the loss along two directions, from products with the exact GGN of a batch.

Martens and Grosse (2015), arXiv 1503.05671, sections 6.4, 6.5 and 7.

| symbol | shape | meaning |
|---|---|---|
| V | (2, params) | the directions: d, a preconditioned step, and v, the last update |
| B | | the exact GGN of the batch |
| M | (2, 2) | V (B + (lambda + l2) I) V^T |
| b | (2,) | V g |
| w | (2,) | coefficients of the directions: w = -M^-1 b where both are free |
| q | () | (w^T M' w)/2 + b^T w, with M' = M without lambda: the change of the loss that the model predicts |
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvtrain.curvature import trees
from curvtrain.curvature.products import ggn_gram
from curvtrain.objective import Objective

PyTree = Any

_SINGULAR = 1e-6  # of det M / (M_00 M_11): below it, d and v are one direction to float32


class QuadraticModel(NamedTuple):
    """The model along two directions.

    Attributes:
      gram: V B V^T, (2, 2).
      dots: V V^T, (2, 2).
      slopes: b, (2,).
    """

    gram: jax.Array
    dots: jax.Array
    slopes: jax.Array

    def minimum(self, damping: jax.Array, rate: jax.Array | None, decay: jax.Array | None) -> jax.Array:
        """The w that minimises the model with `damping` (lambda + l2); a given rate or decay is held fixed.

        Where a direction has no curvature its coefficient is zero, and where both are one direction, v's is.
        """
        if rate is not None and decay is not None:
            return jnp.stack([rate, decay])
        M, b = self.gram + damping * self.dots, self.slopes
        safe = lambda x: jnp.where(x > 0, x, 1.0)
        if rate is not None:
            return jnp.stack([rate, jnp.where(M[1, 1] > 0, -(b[1] + M[1, 0] * rate) / safe(M[1, 1]), 0.0)])
        if decay is not None:
            return jnp.stack([jnp.where(M[0, 0] > 0, -(b[0] + M[0, 1] * decay) / safe(M[0, 0]), 0.0), decay])
        alone = jnp.stack([jnp.where(M[0, 0] > 0, -b[0] / safe(M[0, 0]), 0.0), jnp.zeros((), M.dtype)])
        det = M[0, 0] * M[1, 1] - M[0, 1] * M[1, 0]
        regular = det > _SINGULAR * M[0, 0] * M[1, 1]
        both = -jnp.stack([M[1, 1] * b[0] - M[0, 1] * b[1], M[0, 0] * b[1] - M[1, 0] * b[0]]) / safe(det)
        return jnp.where(regular, both, alone)

    def change(self, w: jax.Array, l2: jax.Array | float) -> jax.Array:
        """q: the predicted change of the loss plus l2/2 |theta|^2 along w; ()."""
        return 0.5 * w @ (self.gram + l2 * self.dots) @ w + self.slopes @ w


def quadratic_model(
    objective: Objective,
    params: PyTree,
    directions: tuple[PyTree, PyTree],
    gradient: PyTree,
    batch: Any,
    key: jax.Array | None,
) -> QuadraticModel:
    """The model at `params`: two forward-mode products and no backward pass.

    Args:
      objective: with outputs; params, batch, key: as for `objective.loss`.
      directions: d and v, like the parameters, in the containers of the optimizer.
      gradient: g, likewise.
    """
    own = objective.like_parameters
    gram = ggn_gram(objective, own(params), tuple(map(own, directions)), batch, key)
    dots = jnp.stack([jnp.stack([trees.dot(a, b) for b in directions]) for a in directions])
    return QuadraticModel(gram, dots, jnp.stack([trees.dot(a, gradient) for a in directions]))
