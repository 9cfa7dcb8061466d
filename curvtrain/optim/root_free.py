"""Root-free RMSProp and AdamW: the second moment is a curvature, and is divided by as it is.

Lin et al. (2024), arXiv 2402.03496, sections 3 and 4. The curvature is the square of the *batch's* gradient, scaled as
that of a sum over its B examples, not the mean of the examples' squares (`curvature.DiagonalFisher`).

| symbol | name here | meaning |
|---|---|---|
| B | `batch_size` | examples of the batch, whose loss is a mean |
| s | `nu` | B v, average of B g^2; begins at 1, which is a prior and not debiased |
| lambda | `damping` | is added to s. It is small on purpose: a large one makes the method SGD |
| kappa | `weight_decay` | |

    rf_rmsprop    s <- b2 s + (1 - b2) B g^2;  m <- mu m + g / (s + lambda) + kappa theta;  theta <- theta - rate m
    rf_adamw      m <- b1 m + (1 - b1) g;  s as above;  theta <- (1 - rate kappa) theta - rate m / (s + lambda)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain.curvature import trees
from curvtrain.objective import batch_size as examples_of
from curvtrain.optim.averages import divided, seen
from curvtrain.optim.base import chained, require_params, transformation

PyTree = Any

INITIALS = ("prior", "zero")


class RootFreeState(NamedTuple):
    """State of the two optimizers.

    Attributes:
      count: int32 (), updates so far.
      mu: like the parameters; rf_rmsprop's momentum, of preconditioned gradients, or rf_adamw's average, of gradients.
      nu: s, like the parameters.
    """

    count: jax.Array
    mu: PyTree
    nu: PyTree


def rf_rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    b2: float = 0.999,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    damping: float = 1e-4,
    initial: str = "prior",
    batch_size: int | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """RMSProp without its square root.

    The authors searched rates of 5e-3 to 0.1, dampings of 5e-6 to 5e-4, 1 - b2 of 5e-4 to 5e-3 for convolutional
    networks and of 8e-3 to 0.1 for transformers, and momenta of 0.5 to 0.99.

    Args:
      learning_rate: a number or an optax schedule.
      b2: decay of s.
      momentum: mu; 0 keeps none.
      weight_decay: kappa; the decay goes through the momentum, and is not preconditioned.
      damping: lambda.
      initial: s begins at 1 ("prior") or at 0 ("zero", an ablation of the paper).
      batch_size: B, over all micro-batches and devices; 1 for a loss that is a sum. None: that of `update`'s `batch=`,
        which a Trainer passes.
      mu_dtype, nu_dtype: of the momentum and of s; None for float32, or float64
        for float64 parameters.

    Returns:
      A transformation whose `update` needs `batch=`, unless `batch_size` is given, and for the decay the parameters.
    """
    _check("rf_rmsprop", learning_rate, b2, weight_decay, damping, initial, batch_size)
    _checks.number_in("rf_rmsprop(momentum)", momentum, 0.0, 1.0, open_high=True)
    has_momentum = not _checks.is_off(momentum)
    has_decay = not _checks.is_off(weight_decay)

    def init(params):
        mu = _like(params, mu_dtype) if has_momentum else {}
        return RootFreeState(jnp.int32(0), mu, _like(params, nu_dtype, initial))

    def update(updates, state, params=None, *, batch=None, **extra):
        if has_decay:
            require_params("rf_rmsprop", params)
        nu = _second_moment(updates, state.nu, b2, _examples("rf_rmsprop", batch_size, batch))
        d = jax.tree.map(lambda g, s: divided(trees.wide(g), s + damping), updates, nu)
        if has_decay:
            d = jax.tree.map(lambda d, p: d + weight_decay * trees.wide(p), d, params)
        if has_momentum:
            d = jax.tree.map(lambda m, d: momentum * trees.wide(m) + d, state.mu, d)
        mu = trees.cast(d, state.mu) if has_momentum else {}
        return trees.cast(d, updates), RootFreeState(state.count + 1, mu, trees.cast(nu, state.nu))

    return optax.chain(transformation(init, update), optax.scale_by_learning_rate(learning_rate))


def rf_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    *,
    weight_decay: float = 0.0,
    mask: Any = None,
    damping: float = 1e-4,
    initial: str = "prior",
    bias_correction: bool = False,
    batch_size: int | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW without its square root.

    Args:
      learning_rate: a number or an optax schedule; not Adam's, for an update is not of Adam's size.
      b1, b2: decays of the average of gradients and of s.
      weight_decay: kappa, decoupled.
      mask: tree of bools, or a function that makes one of the parameters: which of them decay.
      damping: lambda.
      initial: s begins at 1 ("prior") or at 0 ("zero").
      bias_correction: whether both averages are divided by 1 - b^t. That is for averages that begin at zero: a prior
        would be divided too, so that the first curvatures were far too large.
      batch_size, mu_dtype, nu_dtype: as for `rf_rmsprop`.

    Returns:
      A transformation whose `update` needs `batch=`, unless `batch_size` is given, and for the decay the parameters.
    """
    _check("rf_adamw", learning_rate, b2, weight_decay, damping, initial, batch_size)
    _checks.number_in("rf_adamw(b1)", b1, 0.0, 1.0, open_high=True)
    if bias_correction and initial == "prior":
        raise ValueError(
            "rf_adamw(bias_correction=True) is for averages that begin at zero, and divides the prior as well: give "
            "initial='zero' too, or no bias_correction."
        )

    def init(params):
        return RootFreeState(jnp.int32(0), _like(params, mu_dtype), _like(params, nu_dtype, initial))

    def update(updates, state, params=None, *, batch=None, **extra):
        nu = _second_moment(updates, state.nu, b2, _examples("rf_adamw", batch_size, batch))
        average = lambda m, g: b1 * trees.wide(m) + (1 - b1) * trees.wide(g)
        mu = jax.tree.map(average, state.mu, updates)
        t = state.count + 1
        width = trees.width(updates)
        of_m, of_s = (seen(b, t, width) if bias_correction else jnp.ones((), width) for b in (b1, b2))
        d = jax.tree.map(lambda m, s: divided(m / of_m, s / of_s + damping), mu, nu)
        return trees.cast(d, updates), RootFreeState(t, trees.cast(mu, state.mu), trees.cast(nu, state.nu))

    return chained("rf_adamw", transformation(init, update), learning_rate, weight_decay, mask)


def _check(name: str, learning_rate: Any, b2: Any, weight_decay: Any, damping: Any, initial: str, batch_size: Any):
    """Raises TypeError or ValueError about an option that both have."""
    if not callable(learning_rate):
        _checks.number_in(f"{name}(learning_rate)", learning_rate, 0.0)
    _checks.number_in(f"{name}(b2)", b2, 0.0, 1.0, open_high=True)
    _checks.number_in(f"{name}(weight_decay)", weight_decay, 0.0)
    _checks.number_in(f"{name}(damping)", damping, 0.0)
    _checks.one_of(f"{name}(initial)", initial, INITIALS)
    if batch_size is not None:
        _checks.positive_int(f"{name}(batch_size)", batch_size)


def _examples(name: str, given: Any, batch: Any) -> Any:
    """B, of the option or of the batch."""
    if given is not None:
        return given
    if batch is None:
        raise TypeError(
            f"{name} needs the number of examples of the batch. A Trainer passes batch=; in a loop of your own call "
            f"update(..., batch=batch), or give {name}(batch_size=...)."
        )
    return examples_of(batch)


def _like(params: PyTree, dtype: Any, initial: str = "zero") -> PyTree:
    value = 1.0 if initial == "prior" else 0.0
    return jax.tree.map(lambda p: jnp.full(p.shape, value, dtype or trees.width(p)), params)


def _second_moment(grads: PyTree, nu: PyTree, b2: Any, B: Any) -> PyTree:
    step = lambda g, s: b2 * trees.wide(s) + (1 - b2) * B * jnp.square(trees.wide(g))
    return jax.tree.map(step, grads, nu)
