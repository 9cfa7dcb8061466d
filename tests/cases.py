"""Every estimator and every optimizer: a line here, and the contract tests run over it."""

import dataclasses
from collections.abc import Callable

import optax

from curvtrain import optim
from curvtrain.curvature import (
    KFAC,
    CurvatureEstimator,
    DiagonalFisher,
    FullBlock,
    KroneckerDiagonal,
    Lanczos,
    UnitWise,
)

SPLIT = "its solve is an approximation of (C + damping I)^-1: the damping is split over the factors"


@dataclasses.dataclass(frozen=True)
class Case:
    """An estimator, an optimizer that trains with it, and what of the contract is to be left out.

    Attributes:
      estimator: what maintains the curvature.
      optimizer: makes the transformation.
      dampings: for which `solve` is looked at; those of an indefinite curvature keep clear of its eigenvalues.
      inexact: why its `solve` is not (C + damping I)^-1; empty if it is.
    """

    estimator: CurvatureEstimator
    optimizer: Callable[[], optax.GradientTransformation]
    dampings: tuple[float, ...] = (0.02, 0.1, 7.0)
    inexact: str = ""


def by_curvature(damping=0.1):
    return optax.chain(optim.scale_by_curvature(damping), optax.sgd(0.1, momentum=0.5))


def kfac():
    return optim.kfac(initial_damping=0.5, l2=1e-3, damping_every=2)


CASES = {
    "Lanczos": Case(Lanczos(k=3, l=1, m=8), lambda: optim.fosi(optax.sgd(0.1, momentum=0.5))),
    "KFAC": Case(KFAC("exact"), kfac, inexact=SPLIT),
    "KFAC, eigh": Case(KFAC("empirical", inverse="eigh"), kfac),
    "KFAC, stale": Case(KFAC("empirical", stale=0.1), kfac, inexact=SPLIT),
    "KFAC, ekfac": Case(KFAC("sampled", "reduce", "ekfac", scale_every=2), lambda: optim.kfac(0.1, 0.9, 0.1)),
    "DiagonalFisher": Case(DiagonalFisher("empirical"), by_curvature),
    "KroneckerDiagonal": Case(KroneckerDiagonal("sampled"), by_curvature),
    "UnitWise": Case(UnitWise("exact"), by_curvature),
    "FullBlock": Case(FullBlock("exact"), kfac),
    "FullBlock, hessian": Case(FullBlock("hessian"), lambda: by_curvature(5.0), dampings=(3.0, 7.0)),
}

# name -> (makes the transformation, an estimator of a curvature that it takes)
OPTIMIZERS = {
    "fosi": (lambda: optim.fosi(optax.adam(0.1)), Lanczos(k=2)),
    "kfac": (kfac, KFAC()),
    "kfac, fixed": (lambda: optim.kfac(0.1, 0.9, 0.1, norm_constraint=1e-3), DiagonalFisher()),
    "natural_gradient": (lambda: optim.natural_gradient(0.1, momentum=0.9, l2=1e-3, lars=True), UnitWise()),
    "scale_by_curvature": (by_curvature, UnitWise()),
}
