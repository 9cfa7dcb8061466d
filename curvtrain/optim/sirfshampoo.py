"""SIRF-Shampoo and IF-Shampoo: Shampoo without inverses, roots and eigenvectors, over `curvature.InverseFree`.

Lin et al. (2024), arXiv 2402.03496: structured inverse-free and root-free Shampoo, and its dense prototype.
"""

from typing import Any

import optax

from curvtrain.optim.inverse_free import by_inverse_free


def sirfshampoo(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    beta2: float = 1e-2,
    alpha1: float = 0.9,
    alpha2: float = 0.5,
    lam: float = 1e-3,
    kappa: float = 0.0,
    *,
    mask: Any = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """SIRF-Shampoo: the gradient times K K^T along every side, weight decay, momentum.

        Trainer(..., optimizer=optim.sirfshampoo(1e-2), curvature=curvature.InverseFree("diagonal", dtype="bfloat16"),
                schedule=CurvatureSchedule(update_every=1))

    Structures, the dtype of the factors and the rates of some of them are options of the estimator; the paper's T is
    the `update_every` of the schedule.

    Measured: a perceptron 64-64-10 (ReLU) on the 1,437 training digits of scikit-learn, batches of 128, 200 steps, T =
    1, seeds 0, 1, 2: at the default rate the training loss comes to 0.16, 0.16, 0.16 (dense; the same with factors in
    bfloat16) and 0.16, 0.16, 0.15 (diagonal); at the paper's rate, 1e-3, to 1.7 (seed 0).

    Args:
      learning_rate: a number or an optax schedule. Updates have no common size: where gradients vanish, the
        preconditioner approaches 1 / lam.
      beta2: rate of the factors, in (0, 1), for an estimator whose rate was left open; it is checked against others, as
        are alpha2 and lam.
      alpha1: decay of the momentum, which is a sum and no average.
      alpha2: decay of the momentum of the factors.
      lam: damping, above 0.
      kappa: coefficient of the parameters that are added to the update, before momentum and learning rate.
      mask: tree of bools, or a function that makes one of the parameters: which of them decay.
      mu_dtype: of the momentum; None for float64 where a parameter is, otherwise float32.

    Returns:
      A transformation whose `update` needs `curvature=`, the `InverseFreeFactors` of `curvature.InverseFree()`; those
      of `InverseFreeKFAC` raise TypeError, those of other numbers ValueError. (A number that is traced, as under
      `optax.inject_hyperparams`, and wrong, gives NaN.)
    """
    rule = {"rate": ("beta2", beta2), "momentum": ("alpha2", alpha2), "damping": ("lam", lam)}
    momentum, decay = ("alpha1", alpha1), ("kappa", kappa)
    return by_inverse_free("sirfshampoo", "gradient", learning_rate, rule, momentum, decay, mask, mu_dtype)


def if_shampoo(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    momentum: float = 0.9,
    lr_cov: float = 5e-2,
    damping: float = 1e-4,
    alpha2: float = 0.5,
    weight_decay: float = 0.0,
    *,
    mask: Any = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """IF-Shampoo, the prototype of SIRF-Shampoo: the same update with other numbers.

        Trainer(..., optimizer=optim.if_shampoo(1e-2), curvature=curvature.InverseFree(rates=[("norm|bias", 0.25)]),
                schedule=CurvatureSchedule(update_every=curvature.Warmed(10)))

    Its factors move in every step at first, and in every tenth in the end, at most. The prototype lets those of
    parameters whose names have norm, proj or bias in them move at a quarter of the rate; here that is said explicitly,
    by the estimator's `rates`.

    Measured, as for `optim.sirfshampoo` and with the schedule above (all rates equal): 0.07, 0.07, 0.06.

    Args:
      learning_rate: a number or an optax schedule.
      momentum, lr_cov, damping, alpha2, weight_decay: alpha1, beta2, lam, alpha2 and kappa of `optim.sirfshampoo`.
      mask, mu_dtype: as there.

    Returns:
      As `optim.sirfshampoo`.
    """
    rule = {"rate": ("lr_cov", lr_cov), "momentum": ("alpha2", alpha2), "damping": ("damping", damping)}
    own, decay = ("momentum", momentum), ("weight_decay", weight_decay)
    return by_inverse_free("if_shampoo", "gradient", learning_rate, rule, own, decay, mask, mu_dtype)
