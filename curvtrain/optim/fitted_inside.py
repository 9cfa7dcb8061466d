"""Momentum, multiplied by a preconditioner that is fitted on the way: what the drop-ins of `psgd_dropin.py` are."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvtrain import _checks
from curvtrain._keys import Purpose, fold
from curvtrain.curvature import trees
from curvtrain.curvature.psgd.base import PRECISIONS, Preconditioner, Structure
from curvtrain.curvature.psgd.frequency import is_due
from curvtrain.optim.psgd import clip_all, moving_average, scale_each
from curvtrain.optim.psgd_checks import check_number, check_products

PyTree = Any
Number = float | jax.Array | Callable[[Any], Any]
Family = Callable[..., Preconditioner]  # (structure, whether gradients are whitened, **fixed options)

_SEED = 36  # the original's
_PRECISION = "jax_default_matmul_precision"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Fixed:
    """Options that shapes depend on, as plain numbers: fixed by `init`, and read from the state ever after.

    So `optax.inject_hyperparams` can turn them into arrays, whose values are not known while `update` is traced.
    """

    options: tuple[tuple[str, float | int | None], ...]

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any]) -> "Fixed":
        """The values of numbers, NumPy's or JAX's. Raises TypeError for one that is traced."""
        found = []
        for option, value in options.items():
            try:
                number = value.item() if isinstance(value, jax.Array | np.ndarray | np.generic) else value
            except jax.errors.ConcretizationTypeError:
                raise TypeError(
                    f"{name}({option}) decides on the shapes of the state, and is traced: its value is not known when "
                    f"init is compiled. Name it in optax.inject_hyperparams(..., static_args=({option!r},)), or call "
                    f"init outside of jit."
                ) from None
            found.append((option, number))
        return cls(tuple(found))


class FittedInsideState(NamedTuple):
    """State of `xmat`, `low_rank_approximation`, `affine` and `kron`.

    Attributes:
      count: int32 (), updates so far.
      key: the random key that the fit is given, folded with `count`.
      mu: moving average of gradients, like the parameters; empty without momentum.
      preconditioner: what the family of P keeps.
      waited: int32 (), updates since the last fit.
      failures: int32 (), parts of fits that were not made, as they were not finite.
      fixed: options that shapes depend on.
    """

    count: jax.Array
    key: jax.Array
    mu: PyTree
    preconditioner: PyTree
    waited: jax.Array
    failures: jax.Array
    fixed: Fixed


def scale_by_fitted(
    name: str,
    family_of: Family,
    fixed: Mapping[str, Any],
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
      family_of: makes the family, given the parameters' structure, whether gradients are whitened, and `fixed`.
      fixed: options that shapes depend on, numbers or None.
      fits_average: whether what is whitened is the moving average.
      clip_rms: the RMS that every leaf of the update is scaled down to, in whitening.
      clip_norm: the norm that the update is scaled down to.
      dtype: of the stored preconditioner.
      scanned: which leaves' first axis counts copies of a layer.
    """

    def init(params: Any) -> Any:
        structure = _structure(name, params, scanned)
        mu = jax.tree.map(lambda p: jnp.zeros(p.shape, mu_dtype or p.dtype), params)
        mu = {} if _checks.is_off(b1) else mu
        known = Fixed.of(name, fixed)
        state = _cast(family_of(structure, True, **dict(known.options)).init(structure), dtype or structure.dtype)
        return FittedInsideState(jnp.int32(0), key_of(seed), mu, state, jnp.int32(0), jnp.int32(0), known)

    @jax.jit  # called outside jit, as in the original's README, its conditionals would be compiled anew every time
    def step(updates, state, Hvp, vector, asked):
        whitens = Hvp is None
        structure = _structure(name, updates, scanned)
        family = family_of(structure, whitens, **dict(state.fixed.options)).with_precision(precision or _ambient())
        averaged, factor, mu = moving_average(updates, state.mu, state.count, b1, nesterov)
        averaged = scale_each(averaged, factor)
        noise = jax.random.fold_in(state.key, state.count)
        at = lambda option: jnp.asarray(option(state.count + 1) if callable(option) else option, structure.dtype)
        if whitens:
            v, h = None, averaged if fits_average else updates
            due = is_due(rule, at(probability), state.count, state.waited, fold(noise, Purpose.CHANCE))
        else:
            v, h, due = vector, Hvp, jnp.asarray(asked, bool)

        def fit(stored):
            one = lambda vector: jax.tree.map(lambda a: a.astype(structure.dtype)[None], vector)
            pair = (None if v is None else one(v), one(h))
            new, failed = family.fit(structure, _cast(stored, structure.dtype), *pair, noise, at(rate))
            return trees.cast(new, stored), failed

        if whitens and isinstance(probability, int | float) and probability == 1.0:
            due = True
            P, failed = fit(state.preconditioner)
        else:
            P, failed = jax.lax.cond(due, fit, lambda stored: (stored, jnp.int32(0)), state.preconditioner)

        family = family.with_precision(grads_precision or _ambient())
        out = family.apply(structure, _cast(P, structure.dtype), averaged)
        if whitens and clip_rms is not None:
            out = scale_each(out, 1.0, clip_rms)
        if clip_norm is not None:
            out = clip_all(out, clip_norm)
        out = jax.tree.map(lambda u, g: u.astype(g.dtype), out, updates)
        waited = jnp.where(due, 0, state.waited + 1).astype(jnp.int32)
        return out, FittedInsideState(state.count + 1, state.key, mu, P, waited, state.failures + failed, state.fixed)

    def update(updates, state, params=None, *, Hvp=None, vector=None, update_preconditioner=None, **extra):
        check_products(name, Hvp, vector, update_preconditioner)
        return step(updates, state, Hvp, vector, None if Hvp is None else update_preconditioner)

    return optax.GradientTransformationExtraArgs(init, update)


def chain(
    name: str,
    link: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    mask: Any,
    mask_name: str = "mask",
) -> optax.GradientTransformationExtraArgs:
    check_number(f"{name}(learning_rate)", learning_rate)
    _checks.number_in(f"{name}(weight_decay)", weight_decay, 0.0)
    links: list[optax.GradientTransformation] = [link]
    if not _checks.is_off(weight_decay):
        links.append(optax.add_decayed_weights(weight_decay, mask))
    return optax.chain(*links, optax.scale_by_learning_rate(learning_rate))


def _structure(name: str, params: PyTree, scanned: PyTree | None) -> Structure:
    """Shapes of the parameters, with an axis of copies where a layer is scanned."""
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


def key_of(seed: Any) -> jax.Array:
    """A random key of a seed, or a copy of one: a state may be donated, the seed is wanted again."""
    seed = _SEED if seed is None else seed
    if jnp.ndim(seed) == 0 and not (isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)):
        return jax.random.PRNGKey(seed)
    return jnp.copy(seed)


def _ambient() -> str:
    """The precision that `jax.default_matmul_precision` has set."""
    present = getattr(jax.config, _PRECISION) or "default"
    return present if present in PRECISIONS else "highest"


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    """The floating leaves in a dtype."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)
