"""Drop-in replacements for the optimizers of the `psgd_jax` package: same calls and defaults, only imports change.

    from curvtrain.optim import hessian_helper, kron      # was: from psgd_jax.kron import kron, ...

They carry the preconditioner P in their own state and fit it inside `update`: to gradients (whitening), or, where
`update` is given `Hvp=`, `vector=` and `update_preconditioner=`, as `hessian_helper` makes them, to products with the
Hessian. New programs are better served by `optim.psgd` over `curvature.PSGD`: newer geometries, a state that is sharded
like the parameters, several probes, Gauss-Newton products, and steps without a fit that pay nothing for it.

What differs from the original:

- All modes: the initial scale is set by the first observation that is neither zero nor infinite, whenever that comes;
  automatic, in whitening, it is (mean g^4)^(-1/4), not (mean g^2)^(-1/2). An observation that is not finite leaves P as
  it is. Every leaf has its own noise; the observations' is relative, of 1e-7, and 1e-9. Factors are balanced in every
  fit, not in one of a hundred. A rate of the fit above 0.99 counts as 0.99. Updates have the gradients' dtypes. Complex
  parameters raise. Nothing is printed.
- Whitening: the probe v is integrated out, in `xmat`, `affine` and `kron`, rather than drawn.
- `low_rank_approximation` starts at U = 0, so that P is a multiple of I as in the others, and its default rank of 10 is
  lowered to the number of parameters.
- `kron` fits in its first call, whatever the probability. It takes `Hvp` too. Then nothing is clipped, and the default
  initial scale of 1 stands for the automatic one, as P = I is no start for a Newton step. Axes of length 1 have no
  factor. Scanned layers share one program anyway: `lax_map_scanned_layers` has nothing to do.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvtrain import _checks
from curvtrain.curvature.psgd.kron import Affine
from curvtrain.curvature.psgd.xmat import XMat
from curvtrain.optim.fitted_inside import Number, chain, key_of, scale_by_fitted
from curvtrain.optim.psgd_checks import check_common, check_dtype, check_older, check_precision
from curvtrain.optim.psgd_families import KronOfAxes, LowRankFromKey

PyTree = Any

# The original's defaults that shapes depend on. They are NumPy's numbers, which `optax.inject_hyperparams` leaves as
# they are, while it turns Python's into arrays that are traced.
_RANK, _AFFINE_SIZE, _AFFINE_SKEW = np.int32(10), np.int32(4096), np.int32(128)
_KRON_SIZE, _KRON_NDIM, _KRON_SCALE = np.int32(8192), np.int32(2), np.float32(1.0)
_RMS = 1.1
_SAVINGS = ("one_diag", "all_diag")
_ANY_SIZE = 2**31 - 1


def xmat(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    preconditioner_update_probability: Number = 1.0,
    b1: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mask: Any = None,
    precond_lr: Number = 0.1,
    precond_init_scale: float | None = None,
    update_global_norm_clip: float | None = None,
    step_normalizer_order: str = "2nd",
    seed: Any = None,
    mu_dtype: Any = None,
    precision: str | None = "tensorfloat32",
) -> optax.GradientTransformationExtraArgs:
    """PSGD with an X-shaped P, which pairs entries i and n - 1 - i of all parameters as one vector.

    Args:
      learning_rate: a number or an optax schedule.
      preconditioner_update_probability: of a fit, in whitening, after the first two steps; or a function of the step,
        counted from 1.
      b1: decay of the moving average of gradients, bias-corrected; 0 keeps none.
      nesterov: whether the average looks one step ahead.
      weight_decay: coefficient of the parameters that are added to the update, before the learning rate.
      mask: tree of bools, or a function that makes one of the parameters: which of them decay.
      precond_lr: rate of the fit in [0, 1], or a function of the step, counted from 1.
      precond_init_scale: of Q, where P = Q^T Q; None fits P as a multiple of I to the first observation.
      update_global_norm_clip: the update is scaled down to this norm, before the decay.
      step_normalizer_order: how steps of the fit are normalised: "2nd" by the curvature's bound, "1st" by their size.
      seed: a random key (or an int); None is `PRNGKey(36)`.
      mu_dtype: of the moving average; None for the parameters' own.
      precision: of the fit's matrix products; None for that of `jax.default_matmul_precision`.
    """
    check_common("xmat", b1, precond_lr, precond_init_scale, preconditioner_update_probability, mu_dtype)
    check_older("xmat", update_global_norm_clip, step_normalizer_order, precision)

    def family(structure, whitens, precond_init_scale):
        return XMat("flat", step_normalizer_order, relative_damping=0.0, initial_scale=_of_P(precond_init_scale))

    link = scale_by_fitted(
        "xmat",
        family,
        {"precond_init_scale": precond_init_scale},
        b1=b1,
        nesterov=nesterov,
        rate=precond_lr,
        probability=preconditioner_update_probability,
        clip_norm=update_global_norm_clip,
        seed=seed,
        mu_dtype=mu_dtype,
        precision=precision,
    )
    return chain("xmat", link, learning_rate, weight_decay, mask)


def low_rank_approximation(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    preconditioner_update_probability: Number = 1.0,
    b1: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mask: Any = None,
    uvd_rank_of_approximation: Any = _RANK,
    precond_lr: Number = 0.1,
    precond_init_scale: float | None = None,
    update_global_norm_clip: float | None = None,
    step_normalizer_order: str = "2nd",
    seed: Any = None,
    mu_dtype: Any = None,
    precision: str | None = "tensorfloat32",
) -> optax.GradientTransformationExtraArgs:
    """PSGD with P = diag(d) (I + V U^T) (I + U V^T) diag(d) over all parameters.

    `uvd_rank_of_approximation` is the number of columns of U and V. The rest as for `xmat`.
    """
    name, rank = "low_rank_approximation", uvd_rank_of_approximation
    check_common(name, b1, precond_lr, precond_init_scale, preconditioner_update_probability, mu_dtype)
    check_older(name, update_global_norm_clip, step_normalizer_order, precision)
    _checks.positive_int(f"{name}(uvd_rank_of_approximation)", rank, minimum=0)

    def family(structure, whitens, uvd_rank_of_approximation, precond_init_scale):
        rank = uvd_rank_of_approximation
        size = structure.size
        if rank > size and rank != _RANK:
            raise ValueError(
                f"{name}(uvd_rank_of_approximation={rank}) exceeds the number of parameters, {size}. Use a rank of at "
                f"most {size}."
            )
        options = dict(relative_damping=0.0, initial_scale=_of_P(precond_init_scale), key=key_of(seed))
        return LowRankFromKey(min(rank, size), step_normalizer_order, **options)

    link = scale_by_fitted(
        name,
        family,
        {"uvd_rank_of_approximation": rank, "precond_init_scale": precond_init_scale},
        b1=b1,
        nesterov=nesterov,
        rate=precond_lr,
        probability=preconditioner_update_probability,
        clip_norm=update_global_norm_clip,
        seed=seed,
        mu_dtype=mu_dtype,
        precision=precision,
    )
    return chain(name, link, learning_rate, weight_decay, mask)


def affine(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    preconditioner_update_probability: Number = 1.0,
    b1: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mask: Any = None,
    max_size_triangular: Any = _AFFINE_SIZE,
    max_skew_triangular: Any = _AFFINE_SKEW,
    precond_lr: Number = 0.1,
    precond_init_scale: float | None = None,
    update_global_norm_clip: float | None = None,
    step_normalizer_order: str = "2nd",
    seed: Any = None,
    mu_dtype: Any = None,
    precision: str | None = "tensorfloat32",
) -> optax.GradientTransformationExtraArgs:
    """PSGD with a left and a right factor of P for every parameter, which is seen as a matrix.

    A factor is triangular unless its side is longer than `max_size_triangular`, or than `max_skew_triangular` times the
    other; then it is diagonal. The rest as for `xmat`.
    """
    check_common("affine", b1, precond_lr, precond_init_scale, preconditioner_update_probability, mu_dtype)
    check_older("affine", update_global_norm_clip, step_normalizer_order, precision)
    _checks.number_in("affine(max_size_triangular)", max_size_triangular, 0)
    _checks.number_in("affine(max_skew_triangular)", max_skew_triangular, 0)

    def family(structure, whitens, max_size_triangular, max_skew_triangular, precond_init_scale):
        options = dict(order=step_normalizer_order, relative_damping=0.0, initial_scale=_of_P(precond_init_scale))
        return Affine(max_size=_whole(max_size_triangular), max_skew=max_skew_triangular, **options)

    link = scale_by_fitted(
        "affine",
        family,
        dict(
            max_size_triangular=max_size_triangular,
            max_skew_triangular=max_skew_triangular,
            precond_init_scale=precond_init_scale,
        ),
        b1=b1,
        nesterov=nesterov,
        rate=precond_lr,
        probability=preconditioner_update_probability,
        clip_norm=update_global_norm_clip,
        seed=seed,
        mu_dtype=mu_dtype,
        precision=precision,
    )
    return chain("affine", link, learning_rate, weight_decay, mask)


def precond_update_prob_schedule(
    max_prob: float = 1.0, min_prob: float = 0.03, decay: float = 0.001, flat_start: int = 500
) -> Callable[[Any], jax.Array]:
    """p(t) = min(max(max_prob exp(-decay (t - flat_start)), min_prob), max_prob): `max_prob` for 500 steps, `min_prob`
    from 4,000 on."""
    _checks.number_in("precond_update_prob_schedule(max_prob)", max_prob, 0.0, 1.0)
    _checks.number_in("precond_update_prob_schedule(min_prob)", min_prob, 0.0, 1.0)
    _checks.number_in("precond_update_prob_schedule(decay)", decay, 0.0)
    return lambda t: jnp.minimum(jnp.maximum(max_prob * jnp.exp(-decay * (t - flat_start)), min_prob), max_prob)


def kron(
    learning_rate: optax.ScalarOrSchedule = 0.001,
    b1: float = 0.9,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    preconditioner_update_probability: Number = precond_update_prob_schedule(),  # noqa: B008
    max_size_triangular: Any = _KRON_SIZE,
    min_ndim_triangular: Any = _KRON_NDIM,
    memory_save_mode: str | None = None,
    momentum_into_precond_update: bool = True,
    preconditioner_lr: Number = 0.1,
    preconditioner_init_scale: Any = _KRON_SCALE,
    mu_dtype: Any = None,
    precond_dtype: Any = None,
    precond_update_precision: str | None = "tensorfloat32",
    precond_grads_precision: str | None = None,
    scanned_layers: PyTree | None = None,
    lax_map_scanned_layers: bool = False,
    lax_map_batch_size: int = 8,
) -> optax.GradientTransformationExtraArgs:
    """PSGD with one factor of P for every axis of every parameter.

    Args:
      learning_rate: a number or an optax schedule.
      b1: decay of the moving average of gradients, bias-corrected; 0 keeps none.
      weight_decay: coefficient of the parameters that are added to the update, before the learning rate.
      weight_decay_mask: tree of bools, or a function that makes one of the parameters: which of them decay.
      preconditioner_update_probability: p, or a function of the step, counted from 1: in whitening, P is fitted as soon
        as 1 / p steps have passed.
      max_size_triangular: longer axes have diagonal factors.
      min_ndim_triangular: parameters of fewer axes have diagonal factors.
      memory_save_mode: "one_diag": the longest axis (the last of them) has a diagonal factor; "all_diag": all axes.
      momentum_into_precond_update: whether the moving average is whitened, or the gradient itself.
      preconditioner_lr: rate of the fit in [0, 1], or a function of the step, counted from 1.
      preconditioner_init_scale: of Q, where P = Q^T Q; None fits P as a multiple of I to the first observation.
      mu_dtype: of the moving average; None for the parameters' own.
      precond_dtype: in which P is stored between steps; None for float32. In bfloat16 rates below 0.1 are rounded away.
      precond_update_precision, precond_grads_precision: of matrix products in the fit, and with the gradients; None for
        that of `jax.default_matmul_precision`.
      scanned_layers: tree of bools like the parameters: the first axis of which of them counts copies of a layer.
      lax_map_scanned_layers, lax_map_batch_size: taken, and of no effect.
    """
    scale = preconditioner_init_scale
    check_common("kron", b1, preconditioner_lr, scale, preconditioner_update_probability, mu_dtype, "preconditioner")
    check_precision("kron(precond_update_precision)", precond_update_precision)
    check_precision("kron(precond_grads_precision)", precond_grads_precision)
    check_dtype("kron(precond_dtype)", precond_dtype)
    _checks.number_in("kron(max_size_triangular)", max_size_triangular, 0)
    _checks.positive_int("kron(min_ndim_triangular)", min_ndim_triangular, minimum=0)
    if memory_save_mode is not None:
        _checks.one_of("kron(memory_save_mode)", memory_save_mode, _SAVINGS)
    _checks.positive_int("kron(lax_map_batch_size)", lax_map_batch_size, minimum=0)

    def family(structure, whitens, max_size_triangular, min_ndim_triangular, preconditioner_init_scale):
        automatic = preconditioner_init_scale == 1.0 and not whitens
        return KronOfAxes(
            max_size=_whole(max_size_triangular),
            min_ndim=max(min_ndim_triangular, 1),
            savings=memory_save_mode,
            whitens=whitens,
            initial_scale=None if automatic else _of_P(preconditioner_init_scale),
        )

    link = scale_by_fitted(
        "kron",
        family,
        dict(
            max_size_triangular=max_size_triangular,
            min_ndim_triangular=min_ndim_triangular,
            preconditioner_init_scale=preconditioner_init_scale,
        ),
        b1=b1,
        rate=preconditioner_lr,
        probability=preconditioner_update_probability,
        rule="deterministic",
        fits_average=momentum_into_precond_update,
        clip_rms=_RMS,
        mu_dtype=mu_dtype,
        dtype=precond_dtype,
        precision=precond_update_precision,
        grads_precision=precond_grads_precision,
        scanned=scanned_layers,
    )
    return chain("kron", link, learning_rate, weight_decay, weight_decay_mask, "weight_decay_mask")


def _of_P(scale: float | None) -> float | None:
    """The initial scale of P, given that of Q."""
    return None if scale is None else float(scale) ** 2


def _whole(size: float) -> int:
    """A largest size as an integer; it may be infinite."""
    return int(min(size, _ANY_SIZE))
