"""Shampoo: whitening by averages of G G^T and G^T G, over `curvature.GradientKronecker`.

Gupta et al. (2018), arXiv 1802.09568; the power -1/2 of a product that is divided by its trace: Morwani et al. (2024),
arXiv 2406.17748; grafting: Anil et al. (2020), arXiv 2002.09018.
"""

from typing import Any

import optax

from curvtrain import _checks
from curvtrain.optim.base import chained
from curvtrain.optim.whitening import scale_by_whitening


def shampoo(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    exponent: float = -0.5,
    damping: float = 1e-3,
    graft: str = "none",
    weight_decay: float = 0.0,
    mask: Any = None,
    nesterov: bool = False,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo with decoupled weight decay: (A x B / tr A + damping)^exponent for the momentum of every matrix.

        Trainer(..., optimizer=optim.shampoo(1e-3), curvature=curvature.GradientKronecker(basis="eigh"),
                schedule=CurvatureSchedule(refresh_every=10))

    Vectors are moved as by Adam.

    Args:
      learning_rate: a number or an optax schedule; of Adam's size, with exponent=-0.25 and no grafting larger ones.
      b1, b2, weight_decay, mask, nesterov, mu_dtype: as for `optim.soap`.
      eps: added to the roots of the eigenvalues.
      damping: relative: this share of the mean of a matrix's eigenvalues is added to each. Of a single gradient with
        singular values s the factors make s / s^2, so that exponent=-0.5 needs some at the start.
      exponent: -0.5 whitens the gradients; -0.25 is that of the first Shampoo, A^(-1/4) M B^(-1/4) up to a factor.
      graft: "none"; "adam" or "sgd" give each parameter's update the length that Adam's, or the momentum, has.

    Returns:
      A transformation whose `update` needs `curvature=`, the `GradientFactors` of
      `curvature.GradientKronecker("ema", "product")`; others raise TypeError, those of another decay ValueError.
    """
    options: dict[str, Any] = dict(exponent=exponent, damping=damping, graft=graft)
    link = scale_by_shampoo(b1, b2, eps, **options, nesterov=nesterov, mu_dtype=mu_dtype)
    return chained("shampoo", link, learning_rate, weight_decay, mask)


def scale_by_shampoo(
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    exponent: float = -0.5,
    damping: float = 1e-3,
    graft: str = "none",
    nesterov: bool = False,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """`shampoo` without its learning rate, sign and weight decay: a link of a chain. Arguments as there."""
    _checks.number_in("shampoo(damping)", damping, 0.0)
    _checks.number_in("shampoo(exponent)", exponent, -1.0, 0.0, open_high=True)
    return scale_by_whitening(
        "shampoo",
        b1,
        b2,
        eps,
        fit="ema",
        eigenvalues="product",
        p=-exponent,
        damping=damping,
        nesterov=nesterov,
        graft=graft,
        mu_dtype=mu_dtype,
    )
