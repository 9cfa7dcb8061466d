"""SINGD and IKFAC: K-FAC without inverses, over `curvature.InverseFreeKFAC`. Lin et al. (2024), arXiv 2312.05705."""

from typing import Any

import optax

from curvtrain.optim.inverse_free import by_inverse_free


def singd(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    momentum: float = 0.9,
    lr_cov: float = 1e-2,
    damping: float = 1e-3,
    alpha1: float = 0.5,
    weight_decay: float = 0.0,
    *,
    kfac_like: bool = False,
    normalize_lr_cov: bool = True,
    mask: Any = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """SINGD: K K^T M C C^T for the gradient M of every layer, weight decay, momentum.

        Trainer(..., optimizer=optim.singd(1e-2), curvature=curvature.InverseFreeKFAC(),
                schedule=CurvatureSchedule(update_every=10))

    Which Fisher, how positions are counted, structures and the dtype of the factors are options of the estimator; the
    paper's T is the `update_every` of the schedule. Layers without Kronecker factors have a diagonal one; the authors'
    code leaves them untrained.

    Measured: a perceptron 64-64-10 (ReLU) on the 1,437 training digits of scikit-learn, batches of 128, 200 steps,
    seeds 0, 1, 2: at the default rate the training loss comes to 0.26, 0.28, 0.26 with T = 10 and 0.04, 0.05, 0.07 with
    T = 1, and with `kfac_like` and T = 1 to 0.06, 0.07, 0.07; at the paper's rate, 1e-3, with T = 10 to 1.9 (seed 0).

    Args:
      learning_rate: a number or an optax schedule.
      momentum: decay of the momentum, which is a sum and no average.
      lr_cov: rate of the factors, in (0, 1), for an estimator whose rate was left open; it is checked against others,
        as are damping, alpha1, kfac_like and normalize_lr_cov.
      damping: above 0.
      alpha1: decay of the momentum of the factors.
      weight_decay: coefficient of the parameters that are added to the update, before momentum and learning rate.
      kfac_like: IKFAC: K K^T approaches (A + damping I)^-1, that of K-FAC.
      normalize_lr_cov: factors' directions are averages, and steps of more than `lr_cov` in an entry are shortened;
        False is the algorithm as it is in the paper, which may be unstable at first.
      mask: tree of bools, or a function that makes one of the parameters: which of them decay.
      mu_dtype: of the momentum; None for float64 where a parameter is, otherwise float32.

    Returns:
      A transformation whose `update` needs `curvature=`, the `InverseFreeFactors` of `curvature.InverseFreeKFAC()`;
      those of `InverseFree` raise TypeError, those of other numbers ValueError. (A number that is traced, as under
      `optax.inject_hyperparams`, and wrong, gives NaN.)
    """
    rule = {
        "rate": ("lr_cov", lr_cov),
        "momentum": ("alpha1", alpha1),
        "damping": ("damping", damping),
        "kfac_like": ("kfac_like", kfac_like),
        "normalized": ("normalize_lr_cov", normalize_lr_cov),
    }
    own, decay = ("momentum", momentum), ("weight_decay", weight_decay)
    return by_inverse_free("singd", "kfac", learning_rate, rule, own, decay, mask, mu_dtype)
