"""The optimizers of the recipes by name, each with the curvature that it consumes and a schedule."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import optax

import curvtrain
from curvtrain import curvature, optim

OptimizerName = Literal[
    "fosi_adam",
    "fosi_momentum",
    "fosi_nesterov",
    "fosi_sgd",
    "kfac",
    "natural_gradient",
    "psgd",
    "soap",
    "shampoo",
    "kl_shampoo",
    "adamqlr",
    "sirfshampoo",
    "if_shampoo",
    "singd",
    "adafisher",
    "adafisherw",
    "ivon",
    "vogn",
    "fadam",
    "rf_rmsprop",
    "rf_adamw",
    "muon",
    "adam",
    "adamw",
    "momentum",
    "nesterov",
    "sgd",
]

Rate = optax.ScalarOrSchedule
Chosen = dict[str, Any]  # keywords of a Trainer: optimizer, and perhaps curvature, schedule, draws


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """Options of the optimizer of a run.

    Attributes:
      optimizer: the name of one of this file.
      learning_rate: None is the recipe's own, which says whether it was tuned. K-FAC and AdamQLR adapt theirs.
      decay: whether learning rates stay as they are, or fall to zero along a cosine.
      alpha: rate of FOSI's Newton part.
      k: number of FOSI's eigenpairs.
      curvature_batch: examples that a refresh of FOSI sees, a multiple of batch_size; None is the training batch.
      fisher: of layer-wise curvatures: which gradients their statistics are made of.
      inverse: of K-FAC: how its factors are inverted.
      weight_sharing: of K-FAC: what it does with several positions of one example.
      damping: of K-FAC, where None adapts it, and of the natural gradient, where None is 0.01.
      momentum: of K-FAC, where None adapts it.
      l2: of K-FAC: coefficient of a penalty l2/2 |parameters|^2.
      preconditioner: of PSGD: its family.
      fit: of PSGD: whether it whitens gradients, or inverts the Hessian or the Gauss-Newton matrix.
      mc_samples: of IVON and VOGN: draws of the parameters at which each step takes gradients.
      predictive_samples: of IVON and VOGN: draws over which an evaluation averages predictions; 0: at the mean.
      update_every: steps between two statistics (1 unless given), or two fits of PSGD (1 for 500 steps unless given,
        then ever more).
      refresh_every: steps between refreshes of eigenpairs (100 unless given), of K-FAC's inverses (5 unless given,
        after ten first steps of one), or of the bases of SOAP and Shampoo (10 unless given).
    """

    optimizer: OptimizerName = "fosi_adam"
    learning_rate: float | None = None
    decay: Literal["none", "cosine"] = "none"
    alpha: float = 0.1
    k: int = 10
    curvature_batch: int | None = None
    fisher: Literal["exact", "sampled", "empirical"] = "sampled"
    inverse: Literal["cholesky", "eigh", "ekfac"] = "cholesky"
    weight_sharing: Literal["expand", "reduce"] = "expand"
    damping: float | None = None
    momentum: float | None = None
    l2: float = 0.0
    preconditioner: Literal["kron", "affine", "low_rank", "xmat", "dense", "diagonal"] = "kron"
    fit: Literal["gradient", "hessian", "ggn"] = "gradient"
    mc_samples: int = 1
    predictive_samples: int = 16
    update_every: int | None = None
    refresh_every: int | None = None


def chosen(options: OptimizerOptions, name: str, rate: float | None, steps: int) -> Chosen:
    """The optimizer of a name, with the curvature that it consumes: keywords of a Trainer.

    Args:
      options: of the run.
      name: an OptimizerName; perhaps another one than the options', to compare with.
      rate: the learning rate; None for those that adapt theirs.
      steps: after which a rate with options.decay="cosine" is zero.

    Raises:
      ValueError: no rate for an optimizer that needs one, or one for an optimizer that takes none.
    """
    if rate is None and name not in ADAPTIVE:
        raise ValueError(f"--optimizer {name} needs --learning-rate: this recipe has none for it.")
    if rate is not None and name == "adamqlr":
        raise ValueError(f"--optimizer {name} takes its rates from the loss: leave out --learning-rate {rate:g}.")
    scheduled = optax.cosine_decay_schedule(rate, steps) if rate is not None and options.decay == "cosine" else rate
    if name.startswith("fosi_"):
        return _fosi(options, name.removeprefix("fosi_"), scheduled)
    if name in WITHOUT_CURVATURE:
        return dict(optimizer=WITHOUT_CURVATURE[name](scheduled))
    return WITH_CURVATURE[name](options, scheduled)


# -- without a curvature -----------------------------------------------------------------------------------------------

BASES: dict[str, Callable[[Rate], optax.GradientTransformation]] = {
    "adam": optax.adam,
    "adamw": lambda rate: optax.adamw(rate, weight_decay=1e-2),
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "nesterov": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "sgd": optax.sgd,
}
WITHOUT_CURVATURE: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    **BASES,
    "adamqlr": lambda _: optim.adamqlr(),
    "fadam": lambda rate: optim.fadam(rate, weight_decay=1e-2),
    "rf_rmsprop": lambda rate: optim.rf_rmsprop(rate, momentum=0.9),
    "rf_adamw": lambda rate: optim.rf_adamw(rate, weight_decay=1e-2),
    "muon": lambda rate: optim.muon(rate, weight_decay=1e-2),
}

# -- with one ----------------------------------------------------------------------------------------------------------

ADAPTIVE = ("kfac", "adamqlr")  # rates adapt to the loss
MOMENTUM = {"adam": "ema", "momentum": "heavy_ball", "nesterov": "nesterov", "sgd": "none"}  # of FOSI's Newton part
FAMILIES: dict[str, Callable[[], curvature.Preconditioner]] = {
    "kron": curvature.Kron,
    "affine": curvature.Affine,
    "low_rank": curvature.LowRank,
    "xmat": curvature.XMat,
    "dense": curvature.Dense,
    "diagonal": curvature.Elementwise,
}


def _fosi(options: OptimizerOptions, base: str, rate: Any) -> Chosen:
    every = options.refresh_every or 100
    return dict(
        optimizer=optim.fosi(BASES[base](rate), alpha=options.alpha, momentum=MOMENTUM[base]),
        curvature=curvature.Lanczos(k=options.k),
        schedule=curvtrain.CurvatureSchedule(
            refresh_every=every,
            start=min(every, 20),  # the first steps change the curvature too fast to be worth a refresh
            batch_size=options.curvature_batch,
        ),
    )


def _factors(options: OptimizerOptions) -> Chosen:
    """K-FAC's factors, inverted in each of the first ten steps, in which they change fastest."""
    every = options.refresh_every or 5
    return dict(
        curvature=curvature.KFAC(options.fisher, options.weight_sharing, options.inverse, uncovered="diagonal"),
        schedule=curvtrain.CurvatureSchedule(
            update_every=options.update_every or 1, refresh_every=lambda step: 1 if step < 10 else every
        ),
    )


def _kfac(options: OptimizerOptions, rate: Any) -> Chosen:
    given: dict[str, Any] = dict(learning_rate=rate, momentum=options.momentum, damping=options.damping)
    given = {option: value for option, value in given.items() if value is not None}
    return dict(optimizer=optim.kfac(**given, l2=options.l2), **_factors(options))


def _natural_gradient(options: OptimizerOptions, rate: Any) -> Chosen:
    damping = 1e-2 if options.damping is None else options.damping
    return dict(optimizer=optim.natural_gradient(rate, damping, momentum=0.9), **_factors(options))


def _psgd(options: OptimizerOptions, rate: Any) -> Chosen:
    return dict(
        optimizer=optim.psgd(rate, weight_decay=1e-2),
        curvature=curvature.PSGD(FAMILIES[options.preconditioner](), options.fit),
        schedule=curvtrain.CurvatureSchedule(update_every=options.update_every or curvature.Annealed().period),
    )


def _inverse_free(options: OptimizerOptions, optimizer: Any, estimator: Any, every: Any) -> Chosen:
    schedule = curvtrain.CurvatureSchedule(update_every=options.update_every or every)
    return dict(optimizer=optimizer, curvature=estimator, schedule=schedule)


def _sirfshampoo(options: OptimizerOptions, rate: Any) -> Chosen:
    return _inverse_free(options, optim.sirfshampoo(rate), curvature.InverseFree(), 1)


def _if_shampoo(options: OptimizerOptions, rate: Any) -> Chosen:
    return _inverse_free(options, optim.if_shampoo(rate), curvature.InverseFree(), curvature.Warmed(10))


def _singd(options: OptimizerOptions, rate: Any) -> Chosen:
    estimator = curvature.InverseFreeKFAC(weight_sharing=options.weight_sharing, uncovered="diagonal")
    return _inverse_free(options, optim.singd(rate), estimator, 10)


def _diagonals(make: Callable[[Any], optax.GradientTransformation]) -> Callable[..., Chosen]:
    """AdaFisher's factors."""

    def function(options: OptimizerOptions, rate: Any) -> Chosen:
        return dict(
            optimizer=make(rate),
            curvature=curvature.KroneckerDiagonal(options.fisher, uncovered="diagonal"),
            schedule=curvtrain.CurvatureSchedule(update_every=options.update_every or 1),
        )

    return function


def _ivon(options: OptimizerOptions, rate: Any) -> Chosen:
    return dict(optimizer=optim.ivon(rate, hess_init=0.1), **_draws(options))


def _vogn(options: OptimizerOptions, rate: Any) -> Chosen:
    return dict(
        optimizer=optim.vogn(rate, momentum=0.9),
        curvature=curvature.DiagonalFisher("empirical", ema=0.99),
        schedule=curvtrain.CurvatureSchedule(update_every=options.update_every or 1),
        **_draws(options),
    )


def _draws(options: OptimizerOptions) -> Chosen:
    return dict(mc_samples=options.mc_samples, predictive_samples=options.predictive_samples)


def _whitening(
    make: Callable[[Any], optax.GradientTransformation], estimator: curvature.GradientKronecker
) -> Callable[..., Chosen]:
    """SOAP and its relatives: the covariance moves in every step, its bases in every tenth."""

    def function(options: OptimizerOptions, rate: Any) -> Chosen:
        return dict(
            optimizer=make(rate),
            curvature=estimator,
            schedule=curvtrain.CurvatureSchedule(
                update_every=options.update_every or 1, refresh_every=options.refresh_every or 10
            ),
        )

    return function


WITH_CURVATURE: dict[str, Callable[[OptimizerOptions, Any], Chosen]] = {
    "kfac": _kfac,
    "natural_gradient": _natural_gradient,
    "psgd": _psgd,
    "adafisher": _diagonals(optim.adafisher),
    "adafisherw": _diagonals(optim.adafisherw),
    "ivon": _ivon,
    "vogn": _vogn,
    "sirfshampoo": _sirfshampoo,
    "if_shampoo": _if_shampoo,
    "singd": _singd,
    "soap": _whitening(optim.soap, curvature.GradientKronecker()),
    "shampoo": _whitening(
        lambda rate: optim.shampoo(rate, graft="adam", weight_decay=1e-2),
        curvature.GradientKronecker(eigenvalues="product"),
    ),
    "kl_shampoo": _whitening(optim.kl_shampoo, curvature.GradientKronecker("kl", decay=0.98)),
}
