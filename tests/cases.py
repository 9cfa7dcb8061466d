"""Every estimator and every optimizer: a line here, and the contract tests run over it."""

import dataclasses
from collections.abc import Callable

import optax

from curvtrain import optim
from curvtrain.curvature import (
    KFAC,
    PSGD,
    Affine,
    CurvatureEstimator,
    Dense,
    Diagonal,
    DiagonalFisher,
    FullBlock,
    GradientKronecker,
    InverseFree,
    InverseFreeKFAC,
    Kron,
    KroneckerDiagonal,
    Lanczos,
    LowRank,
    UnitWise,
    XMat,
)

PLAIN = dict(uncovered="diagonal")  # the contract's model has a parameter of no layer
SPLIT = "its solve is an approximation of (C + damping I)^-1: the damping is split over the factors"


@dataclasses.dataclass(frozen=True)
class Case:
    """An estimator, an optimizer that trains with it, and what of the contract is to be left out.

    Attributes:
      estimator: what maintains the curvature.
      optimizer: makes the transformation.
      dampings: for which `solve` is looked at; those of an indefinite curvature keep clear of its eigenvalues.
      inexact: why its `solve` is not (C + damping I)^-1; empty if it is.
      fitted: whether it starts as the identity, and its `solve` takes no damping.
      rounding: of its `solve` with parameters in bfloat16, against the same numbers in float32: where an estimator
        takes the training step's own gradients, these are in bfloat16.
    """

    estimator: CurvatureEstimator
    optimizer: Callable[[], optax.GradientTransformation]
    dampings: tuple[float, ...] = (0.02, 0.1, 7.0)
    inexact: str = ""
    fitted: bool = False
    rounding: float = 1e-6


def psgd(preconditioner, fit="gradient", rate=0.02, **options):
    """A case of a fitted preconditioner."""
    estimator = PSGD(preconditioner, fit, 0.3, **options)
    rounding = 1e-2 if fit == "gradient" else 1e-6
    return Case(estimator, lambda: optim.psgd(rate), dampings=(0.0,), fitted=True, rounding=rounding)


def whitened(optimizer, estimator):
    """A case of the gradient's covariance, for which a training step's own gradients are taken."""
    return Case(estimator, optimizer, rounding=1e-2)


def inverse_free(estimator, optimizer):
    """A case of inverse-free factors, which move fast."""
    rounding = 1e-2 if isinstance(estimator, InverseFree) else 1e-6
    return Case(estimator, optimizer, dampings=(0.0,), fitted=True, rounding=rounding)


def by_curvature(damping=0.1):
    return optax.chain(optim.scale_by_curvature(damping), optax.sgd(0.1, momentum=0.5))


def kfac():
    return optim.kfac(initial_damping=2.0, l2=1e-3, damping_every=2, damping_decay=0.95)


CASES = {
    "Lanczos": Case(Lanczos(k=3, l=1, m=8), lambda: optim.fosi(optax.sgd(0.1, momentum=0.5))),
    "KFAC": Case(KFAC("exact", **PLAIN), kfac, inexact=SPLIT),
    "KFAC, eigh": Case(KFAC("empirical", inverse="eigh", **PLAIN), kfac),
    "KFAC, stale": Case(KFAC("empirical", stale=0.1, slots=8, **PLAIN), kfac, inexact=SPLIT),
    "KFAC, ekfac": Case(
        KFAC("sampled", "reduce", "ekfac", scale_every=2, **PLAIN),
        lambda: optim.kfac(0.1, 0.8, 0.3),
    ),
    "DiagonalFisher": Case(DiagonalFisher("empirical"), by_curvature),
    "KroneckerDiagonal": Case(KroneckerDiagonal("sampled", **PLAIN), lambda: optim.adafisherw(0.01)),
    "KroneckerDiagonal, faithful": Case(
        KroneckerDiagonal(faithful=True, uncovered="one"), lambda: optim.adafisher(1e-4, faithful=True)
    ),
    "UnitWise": Case(UnitWise("exact", **PLAIN), by_curvature),
    "FullBlock": Case(FullBlock("exact", **PLAIN), kfac),
    "FullBlock, hessian": Case(FullBlock("hessian", **PLAIN), lambda: by_curvature(5.0), dampings=(7.0, 20.0)),
    "GradientKronecker": whitened(lambda: optim.soap(0.02), GradientKronecker(slots=8)),
    "GradientKronecker, kl": whitened(
        lambda: optim.kl_shampoo(0.02, b2=0.9), GradientKronecker("kl", decay=0.9, basis="eigh", max_size=4)
    ),
    "InverseFree": inverse_free(InverseFree(rate=0.2), lambda: optim.sirfshampoo(0.01, beta2=0.2)),
    "InverseFree, structures": inverse_free(
        InverseFree((("kernel", "upper_toeplitz"), ("table", ("block2diagonal", "diagonal"))), rates=(("bias", 0.5),)),
        lambda: optim.if_shampoo(0.01, lr_cov=0.01, damping=1e-3, weight_decay=0.1),
    ),
    "InverseFreeKFAC": inverse_free(
        InverseFreeKFAC("sampled", structure=[("blocks", ("hierarchical1_1", "dense"))], rate=0.2, **PLAIN),
        lambda: optim.singd(0.01, lr_cov=0.2),
    ),
    "PSGD, Kron": psgd(Kron(), momentum=0.9),
    "PSGD, Kron in blocks": psgd(Kron("QUAD", block_size=2), "hessian", 0.1, probes=2),
    "PSGD, Affine": psgd(Affine(), "ggn", 0.1, update_probability=0.5),
    "PSGD, LowRank": psgd(LowRank(2)),
    "PSGD, XMat": psgd(XMat(), "ggn", 0.1),
    "PSGD, Dense": psgd(Dense(), "hessian", 0.1, update_probability=0.5, rule="bernoulli"),
    "PSGD, Diagonal": psgd(Diagonal()),
}

# name -> (makes the transformation, an estimator of a curvature that it takes)
OPTIMIZERS = {
    "fosi": (lambda: optim.fosi(optax.adam(0.1)), Lanczos(k=2)),
    "kfac": (kfac, KFAC(**PLAIN)),
    "kfac, fixed": (lambda: optim.kfac(0.1, 0.9, 0.1, norm_constraint=1e-3), DiagonalFisher()),
    "natural_gradient": (lambda: optim.natural_gradient(0.1, momentum=0.9, l2=1e-3, lars=True), UnitWise(**PLAIN)),
    "scale_by_curvature": (by_curvature, UnitWise(**PLAIN)),
    "adafisher": (lambda: optim.adafisher(0.01, weight_decay=0.1), KroneckerDiagonal(**PLAIN)),
    "adafisherw": (lambda: optim.adafisherw(0.01, exponent=0.5, trust_cap=1.0), KroneckerDiagonal(**PLAIN)),
    "adafisher, faithful": (
        lambda: optim.adafisher(faithful=True, weight_decay=0.1),
        KroneckerDiagonal(faithful=True, uncovered="one"),
    ),
    "soap": (lambda: optim.soap(0.01, nesterov=True), GradientKronecker()),
    "kl_shampoo": (lambda: optim.kl_shampoo(0.01), GradientKronecker("kl", decay=0.98)),
    "shampoo": (lambda: optim.shampoo(0.01, exponent=-0.25, graft="sgd"), GradientKronecker(eigenvalues="product")),
    "sirfshampoo": (lambda: optim.sirfshampoo(0.01), InverseFree()),
    "if_shampoo": (
        lambda: optim.if_shampoo(0.01, weight_decay=0.1),
        InverseFree("diagonal", rate=0.05, damping=1e-4),
    ),
    "singd": (
        lambda: optim.singd(0.01, normalize_lr_cov=False, weight_decay=0.1),
        InverseFreeKFAC(normalized=False, **PLAIN),
    ),
    "ivon": (lambda: optim.ivon(0.1, 50.0, 0.5, b2=0.9), DiagonalFisher()),
    "ivon, gradsq": (lambda: optim.ivon(0.1, 50.0, hess_approx="gradsq", clip_radius=1.0), DiagonalFisher()),
    "vogn": (lambda: optim.vogn(0.1, 50.0, 2.0, kl_weight=optax.linear_schedule(0.1, 1.0, 5)), DiagonalFisher()),
    "vogn, Kronecker": (lambda: optim.vogn(0.1, 50.0, momentum=0.9), KFAC(inverse="eigh", **PLAIN)),
    "log_vogn": (lambda: optim.log_vogn(0.1, 50.0), DiagonalFisher("empirical", ema=0.0)),
    "psgd": (lambda: optim.psgd(0.01, weight_decay=0.1, clip_global_norm=1.0), PSGD()),
    "psgd, nesterov": (lambda: optim.psgd(0.01, nesterov=True, style="adam"), PSGD(Kron("EQ"), "hessian")),
}
