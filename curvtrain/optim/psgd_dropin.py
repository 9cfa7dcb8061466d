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
  factor. A stack of scanned layers is one program anyway: `lax_map_scanned_layers` has nothing to do.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain.curvature.psgd.base import PRECISIONS, Preconditioner, Structure, signs
from curvtrain.curvature.psgd.frequency import is_due
from curvtrain.curvature.psgd.kron import Affine, Kron
from curvtrain.curvature.psgd.layout import Side
from curvtrain.curvature.psgd.low_rank import LowRank
from curvtrain.curvature.psgd.xmat import XMat
from curvtrain.optim.psgd import clip_all, clip_each, moving_average

PyTree = Any
Number = float | Callable[[Any], Any]

_SEED = 36  # the original's
_RANK = 10  # the original's default
_RMS = 1.1
_ORDERS = ("2nd", "1st")
_SAVINGS = ("one_diag", "all_diag")
_ANY_SIZE = 2**31 - 1
_PRECISION = "jax_default_matmul_precision"


class FittedInsideState(NamedTuple):
    """State of `xmat`, `low_rank_approximation`, `affine` and `kron`: arrays only.

    Attributes:
      count: int32 (), updates so far.
      key: the random key that the fit is given, folded with `count`.
      mu: moving average of gradients, like the parameters; empty without momentum.
      preconditioner: what the family of P keeps.
      waited: int32 (), updates since the last fit.
      failures: int32 (), parts of fits that were not made, as they were not finite.
    """

    count: jax.Array
    key: jax.Array
    mu: PyTree
    preconditioner: PyTree
    waited: jax.Array
    failures: jax.Array


# -- the four optimizers -----------------------------------------------------------------------------------------------


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
    _check_common("xmat", b1, precond_lr, precond_init_scale, preconditioner_update_probability, mu_dtype)
    _check_older("xmat", update_global_norm_clip, step_normalizer_order, precision)
    family = XMat("flat", step_normalizer_order, initial_scale=_of_P(precond_init_scale))
    link = _scale_by(
        "xmat",
        lambda structure, whitens: family,
        b1=b1,
        nesterov=nesterov,
        rate=precond_lr,
        probability=preconditioner_update_probability,
        clip_norm=update_global_norm_clip,
        seed=seed,
        mu_dtype=mu_dtype,
        precision=precision,
    )
    return _chain("xmat", link, learning_rate, weight_decay, mask)


def low_rank_approximation(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    preconditioner_update_probability: Number = 1.0,
    b1: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mask: Any = None,
    uvd_rank_of_approximation: int = _RANK,
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
    _check_common(name, b1, precond_lr, precond_init_scale, preconditioner_update_probability, mu_dtype)
    _check_older(name, update_global_norm_clip, step_normalizer_order, precision)
    _checks.positive_int(f"{name}(uvd_rank_of_approximation)", rank, minimum=0)

    def family(structure, whitens):
        size = structure.size
        if rank > size and rank != _RANK:
            raise ValueError(
                f"{name}(uvd_rank_of_approximation={rank}) exceeds the number of parameters, {size}. Use a rank of at "
                f"most {size}."
            )
        scale = _of_P(precond_init_scale)
        return _LowRank(min(rank, size), step_normalizer_order, initial_scale=scale, key=_key(seed))

    link = _scale_by(
        name,
        family,
        b1=b1,
        nesterov=nesterov,
        rate=precond_lr,
        probability=preconditioner_update_probability,
        clip_norm=update_global_norm_clip,
        seed=seed,
        mu_dtype=mu_dtype,
        precision=precision,
    )
    return _chain(name, link, learning_rate, weight_decay, mask)


def affine(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    preconditioner_update_probability: Number = 1.0,
    b1: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mask: Any = None,
    max_size_triangular: int = 4096,
    max_skew_triangular: int = 128,
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
    _check_common("affine", b1, precond_lr, precond_init_scale, preconditioner_update_probability, mu_dtype)
    _check_older("affine", update_global_norm_clip, step_normalizer_order, precision)
    _checks.number_in("affine(max_size_triangular)", max_size_triangular, 0)
    _checks.number_in("affine(max_skew_triangular)", max_skew_triangular, 0)
    family = Affine(
        max_size=min(max_size_triangular, _ANY_SIZE),
        max_skew=max_skew_triangular,
        order=step_normalizer_order,
        initial_scale=_of_P(precond_init_scale),
    )
    link = _scale_by(
        "affine",
        lambda structure, whitens: family,
        b1=b1,
        nesterov=nesterov,
        rate=precond_lr,
        probability=preconditioner_update_probability,
        clip_norm=update_global_norm_clip,
        seed=seed,
        mu_dtype=mu_dtype,
        precision=precision,
    )
    return _chain("affine", link, learning_rate, weight_decay, mask)


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
    max_size_triangular: int = 8192,
    min_ndim_triangular: int = 2,
    memory_save_mode: str | None = None,
    momentum_into_precond_update: bool = True,
    preconditioner_lr: Number = 0.1,
    preconditioner_init_scale: float | None = 1.0,
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
    _check_common("kron", b1, preconditioner_lr, scale, preconditioner_update_probability, mu_dtype, "preconditioner")
    _check_precision("kron(precond_update_precision)", precond_update_precision)
    _check_precision("kron(precond_grads_precision)", precond_grads_precision)
    _check_dtype("kron(precond_dtype)", precond_dtype)
    _checks.number_in("kron(max_size_triangular)", max_size_triangular, 0)
    _checks.positive_int("kron(min_ndim_triangular)", min_ndim_triangular, minimum=0)
    if memory_save_mode is not None:
        _checks.one_of("kron(memory_save_mode)", memory_save_mode, _SAVINGS)
    _checks.positive_int("kron(lax_map_batch_size)", lax_map_batch_size, minimum=0)
    make = lambda whitens: _KronOfAxes(
        max_size=min(max_size_triangular, _ANY_SIZE),
        min_ndim=max(min_ndim_triangular, 1),
        savings=memory_save_mode,
        whitens=whitens,
        initial_scale=None if scale == 1.0 and not whitens else _of_P(scale),
    )
    families = {whitens: make(whitens) for whitens in (True, False)}
    link = _scale_by(
        "kron",
        lambda structure, whitens: families[whitens],
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
    return _chain("kron", link, learning_rate, weight_decay, weight_decay_mask, "weight_decay_mask")


# -- what they share ---------------------------------------------------------------------------------------------------


def _scale_by(
    name: str,
    family_of: Callable[[Structure, bool], Preconditioner],
    *,
    b1: float,
    rate: Number,
    probability: Number,
    precision: str | None,
    grads_precision: str | None = None,
    nesterov: bool = False,
    rule: str = "bernoulli",
    fits_average: bool = False,
    clip_rms: float | None = None,
    clip_norm: float | None = None,
    seed: Any = None,
    mu_dtype: Any = None,
    dtype: Any = None,
    scanned: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum, multiplied by P, which is fitted on the way.

    Args:
      family_of: of the parameters' structure, and whether gradients are whitened.
      fits_average: whether what is whitened is the moving average.
      clip_rms: of every leaf, in whitening.
      dtype: of the stored preconditioner.
    """

    def init(params):
        structure = _structure(name, params, scanned)
        mu = jax.tree.map(lambda p: jnp.zeros(p.shape, mu_dtype or p.dtype), params) if b1 else {}
        state = _cast(family_of(structure, True).init(structure), dtype)
        return FittedInsideState(jnp.int32(0), _key(seed), mu, state, jnp.int32(0), jnp.int32(0))

    @jax.jit  # called outside jit, as in the original's README, its conditionals would be compiled anew every time
    def step(updates, state, Hvp, vector, asked):
        whitens = Hvp is None
        structure = _structure(name, updates, scanned)
        family = dataclasses.replace(family_of(structure, whitens), precision=precision or _ambient())
        averaged, mu = moving_average(updates, state.mu, state.count, b1, nesterov)
        noise = jax.random.fold_in(state.key, state.count)
        at = lambda option: jnp.float32(option(state.count + 1) if callable(option) else option)
        if whitens:
            v, h = None, averaged if fits_average else updates
            due = is_due(rule, at(probability), state.count, state.waited, jax.random.fold_in(noise, 1))
        else:
            v, h, due = vector, Hvp, jnp.asarray(asked, bool)

        def fit(stored):
            one = lambda vector: jax.tree.map(lambda a: a.astype(jnp.float32)[None], vector)
            pair = (None if v is None else one(v), one(h))
            new, failed = family.fit(structure, _cast(stored, jnp.float32), *pair, noise, at(rate))
            return _cast(new, dtype), failed

        if whitens and not callable(probability) and probability == 1.0:
            due = True
            P, failed = fit(state.preconditioner)
        else:
            P, failed = jax.lax.cond(due, fit, lambda stored: (stored, jnp.int32(0)), state.preconditioner)

        family = dataclasses.replace(family, precision=grads_precision or _ambient())
        out = family.apply(structure, _cast(P, jnp.float32), averaged)
        if whitens and clip_rms is not None:
            out = clip_each(out, clip_rms)
        if clip_norm is not None:
            out = clip_all(out, clip_norm)
        out = jax.tree.map(lambda u, g: u.astype(g.dtype), out, updates)
        waited = jnp.where(due, 0, state.waited + 1).astype(jnp.int32)
        return out, FittedInsideState(state.count + 1, state.key, mu, P, waited, state.failures + failed)

    def update(updates, state, params=None, *, Hvp=None, vector=None, update_preconditioner=None, **extra):
        _check_products(name, Hvp, vector, update_preconditioner)
        return step(updates, state, Hvp, vector, None if Hvp is None else update_preconditioner)

    return optax.GradientTransformationExtraArgs(init, update)


def _chain(
    name: str,
    link: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    mask: Any,
    mask_name: str = "mask",
) -> optax.GradientTransformationExtraArgs:
    _check_number(f"{name}(learning_rate)", learning_rate)
    _checks.number_in(f"{name}(weight_decay)", weight_decay, 0.0)
    links: list[optax.GradientTransformation] = [link]
    if weight_decay:
        links.append(optax.add_decayed_weights(weight_decay, mask))
    return optax.chain(*links, optax.scale_by_learning_rate(learning_rate))


@dataclasses.dataclass(frozen=True)
class _LowRank(LowRank):
    """`LowRank` whose random start is drawn with a key."""

    _: dataclasses.KW_ONLY
    key: Any = None

    def init(self, structure):
        state = super().init(structure)
        return state | {"V": self._basis(self.key, structure)} if self.rank else state


@dataclasses.dataclass(frozen=True)
class _KronOfAxes(Kron):
    """`Kron` as it first was: a triangular factor for every axis, and noise that bounds what whitening makes of zeros.

    Attributes:
      savings: None, "one_diag" or "all_diag".
      whitens: whether h are gradients: they get noise of 3e-4 of their mean size.
    """

    geometry: str = "EQ"
    _: dataclasses.KW_ONLY
    block_size: int | None = None
    order: str = "2nd"
    savings: str | None = None
    whitens: bool = True

    def sides(self, shape):
        sizes = tuple(n for n in shape if n != 1) or (1,)
        longest = max(range(len(sizes)), key=lambda i: (sizes[i], i))
        diagonal = [
            n == 1
            or n > self.max_size
            or len(shape) < self.min_ndim
            or self.savings == "all_diag"
            or (self.savings == "one_diag" and i == longest)
            for i, n in enumerate(sizes)
        ]
        made = [Side(n, "diagonal") if d else Side(n, "dense", n) for n, d in zip(sizes, diagonal, strict=True)]
        return tuple(range(len(shape))), tuple(made)

    def noisy(self, key, h):
        if not self.whitens:
            return super().noisy(key, h)
        size = jnp.mean(jnp.abs(h), axis=(0, *range(2, h.ndim)), keepdims=True)  # of each of a stack (k, L, ...)
        return h + math.sqrt(jnp.finfo(jnp.float32).eps) * size * signs(jax.random.bits(key), h.shape)


def _structure(name: str, params: PyTree, scanned: PyTree | None) -> Structure:
    if scanned is None:
        return Structure.of(params)
    flags, leaves = jax.tree.leaves(scanned), jax.tree.leaves(params)
    if len(flags) != len(leaves):
        raise ValueError(
            f"{name}(scanned_layers) should be a tree of bools like the parameters, with {len(leaves)} leaves, not "
            f"{len(flags)}."
        )
    for flag, leaf in zip(flags, leaves, strict=True):
        if flag and not leaf.ndim:
            raise ValueError(f"{name}(scanned_layers) is True for a scalar, which has no axis of layers.")
    return Structure.of(params, [int(bool(flag)) for flag in flags])


def _key(seed: Any) -> jax.Array:
    """A copy: a state may be donated, the seed is wanted again."""
    if seed is None or isinstance(seed, int):
        return jax.random.PRNGKey(_SEED if seed is None else seed)
    return jnp.copy(seed)


def _of_P(scale: float | None) -> float | None:
    """The initial scale of P, given that of Q."""
    return None if scale is None else float(scale) ** 2


def _ambient() -> str:
    """The precision that `jax.default_matmul_precision` has set."""
    present = getattr(jax.config, _PRECISION) or "default"
    return present if present in PRECISIONS else "highest"


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    """The floating leaves in a dtype; as they are if it is None."""
    if dtype is None:
        return tree
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_common(name, b1, rate, scale, probability, mu_dtype, prefix: str = "precond") -> None:
    _checks.number_in(f"{name}(b1)", b1, 0.0, 1.0, open_high=True)
    _check_number(f"{name}({prefix}_lr)", rate, 1.0)
    if scale is not None:
        _checks.number_in(f"{name}({prefix}_init_scale)", scale, 0.0, open_low=True)
    _check_number(f"{name}(preconditioner_update_probability)", probability, 1.0)
    _check_dtype(f"{name}(mu_dtype)", mu_dtype)


def _check_older(name, clip_norm, order, precision) -> None:
    if clip_norm is not None:
        _checks.number_in(f"{name}(update_global_norm_clip)", clip_norm, 0.0, open_low=True)
    _checks.one_of(f"{name}(step_normalizer_order)", order, _ORDERS)
    _check_precision(f"{name}(precision)", precision)


def _check_number(argument: str, value: Any, high: float = math.inf) -> None:
    """A number from 0 to `high`, or a function or an array, which are not looked into."""
    if not (callable(value) or isinstance(value, jax.Array)):
        _checks.number_in(argument, value, 0.0, high)


def _check_precision(argument: str, value: str | None) -> None:
    if value is not None:
        _checks.one_of(argument, value, PRECISIONS)


def _check_dtype(argument: str, value: Any) -> None:
    if value is not None and not jnp.issubdtype(jnp.dtype(value), jnp.floating):
        raise TypeError(f"{argument} should be a floating dtype, not {value!r}.")


def _check_products(name: str, Hvp: Any, vector: Any, update_preconditioner: Any) -> None:
    given = {"Hvp": Hvp, "vector": vector, "update_preconditioner": update_preconditioner}
    missing = [f"{key}=" for key, value in given.items() if value is None]
    if missing and (Hvp is not None or vector is not None):
        present = [f"{key}=" for key, value in given.items() if value is not None]
        raise ValueError(
            f"{name}.update() was given {' and '.join(present)} without {' and '.join(missing)}. To fit P to the "
            f"Hessian, pass all three, as hessian_helper(...) returns them; to whiten gradients, none."
        )
