"""KL-Shampoo: whitening by the matrix Gaussian that fits the gradients best, over `curvature.GradientKronecker("kl")`.

Lin et al. (2025), arXiv 2509.03378. What differs from the authors' code: the first step moves the parameters, factors
begin with the size of the first gradient, and no root is clamped at a number that depends on the gradient's size.
"""

from typing import Any

import optax

from curvtrain.optim.base import chained
from curvtrain.optim.whitening import scale_by_whitening


def kl_shampoo(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.01,
    mask: Any = None,
    nesterov: bool = False,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """KL-Shampoo with decoupled weight decay: (A x B)^(-1/2) for the momentum of every matrix.

        Trainer(..., optimizer=optim.kl_shampoo(1e-3), curvature=curvature.GradientKronecker("kl"),
                schedule=CurvatureSchedule(refresh_every=10))

    It needs neither second moments of the size of the parameters nor grafting. Vectors are moved as by Adam.

    Args:
      learning_rate: a number or an optax schedule; of Adam's size. A warm-up helps.
      b1, b2, eps, weight_decay, mask, nesterov, mu_dtype: as for `optim.soap`.

    Returns:
      A transformation whose `update` needs `curvature=`, the `GradientFactors` of
      `curvature.GradientKronecker("kl", "product")`; others raise TypeError, those of another decay ValueError.
    """
    link = scale_by_kl_shampoo(b1, b2, eps, nesterov=nesterov, mu_dtype=mu_dtype)
    return chained("kl_shampoo", link, learning_rate, weight_decay, mask)


def scale_by_kl_shampoo(
    b1: float = 0.9, b2: float = 0.98, eps: float = 1e-8, *, nesterov: bool = False, mu_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    """`kl_shampoo` without its learning rate, sign and weight decay: a link of a chain. Arguments as there."""
    return scale_by_whitening(
        "kl_shampoo", b1, b2, eps, fit="kl", eigenvalues="product", nesterov=nesterov, mu_dtype=mu_dtype
    )
