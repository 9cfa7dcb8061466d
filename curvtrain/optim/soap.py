"""SOAP: Adam in the eigenbasis of Shampoo's factors, over `curvature.GradientKronecker`.

Vyas et al. (2024), arXiv 2409.11321. What differs from the authors' code: the first step moves the parameters; second
moments are carried over a change of basis, not only permuted with it; a basis that is not finite is not taken.
"""

from typing import Any

import optax

from curvtrain.optim.base import chained
from curvtrain.optim.whitening import scale_by_whitening


def soap(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.01,
    mask: Any = None,
    nesterov: bool = False,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """SOAP with decoupled weight decay.

        Trainer(..., optimizer=optim.soap(3e-3), curvature=curvature.GradientKronecker(),
                schedule=CurvatureSchedule(refresh_every=10))

    Vectors are moved as by Adam. Embeddings and output layers of large vocabularies belong to another optimizer, see
    `optim.route`, or are one-sided by `GradientKronecker(max_size=...)`. With `GradientKronecker("kl", "corrected")` it
    is KL-SOAP.

    Args:
      learning_rate: a number or an optax schedule; of Adam's size. A warm-up helps.
      b1: decay of the momentum, bias-corrected.
      b2: decay of the curvature's averages, for an estimator whose decay was left open; it is checked against others.
      eps: added to the roots of the second moments.
      weight_decay: coefficient of the parameters that are added to the update, before the learning rate.
      mask: tree of bools, or a function that makes one of the parameters: which of them decay.
      nesterov: whether the momentum looks one step ahead.
      mu_dtype: of the momentum; None for float64 where a parameter is, otherwise float32.

    Returns:
      A transformation whose `update` needs `curvature=`, the `GradientFactors` of
      `curvature.GradientKronecker(eigenvalues="corrected")`; those of "product" raise TypeError, and those of another
      decay ValueError. (A b2 that is traced, as under `optax.inject_hyperparams`, and wrong, gives NaN.)
    """
    link = scale_by_soap(b1, b2, eps, nesterov=nesterov, mu_dtype=mu_dtype)
    return chained("soap", link, learning_rate, weight_decay, mask)


def scale_by_soap(
    b1: float = 0.95, b2: float = 0.95, eps: float = 1e-8, *, nesterov: bool = False, mu_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    """`soap` without its learning rate, sign and weight decay: a link of a chain. Arguments as there."""
    return scale_by_whitening(
        "soap", b1, b2, eps, fit=None, eigenvalues="corrected", nesterov=nesterov, mu_dtype=mu_dtype
    )
