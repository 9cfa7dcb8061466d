"""Natural gradient with momentum, averaging, decay and normalisation before or after preconditioning.

Osawa et al. (2020), arXiv 2002.06015, and (2019), 1811.12019: large-batch K-FAC, here over any curvature. The stages
are those of their PyTorch-SSO's `SecondOrderOptimizer`, in its order.

| symbol | shape | meaning |
|---|---|---|
| w, g | params | parameters; gradient, and what the stages make of it |
| C, lambda | | the curvature; damping |
| eta_t, m_t | () | learning rate and momentum of step t = 0, 1, ...; with correction m_t is momentum(t) eta_t / eta_0 |
| b, a | params | momentum buffer; moving average of gradients, decay beta |
| W, F | per leaf | the next parameters; fan_out: size of the last axis |

| stage | step | option |
|---|---|---|
| raw | g <- g + l2 w | `l2` |
| raw or preconditioned | b <- m_t b + g;  g <- b | `momentum`, `momentum_type` |
| | a <- beta a + (1 - beta) g;  g <- a / (1 - beta^(t+1)) | `gradient_decay`, `gradient_decay_type` |
| | g <- g norm(w) / (norm(g) + 1e-9), per leaf where norm(w) > 1e-2 | `lars`, `lars_type` |
| between the two | g <- (C + (lambda + l2) I)^-1 g | `damping` |
| preconditioned, first | g <- g + weight_decay w, where the mask says so | `weight_decay`, `mask` |
| update | W = w - eta_t g | `learning_rate` |
| rescale | W <- W sqrt(2 F) / norm(W), per leaf of two axes or more where norm(W) > 1e-2 | `rescale` |

Departures from PyTorch-SSO: beta is the share of the *old* value, and a is always debiased; momentum correction divides
by eta_0, as the papers say, where that code divides by the last step's rate.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvtrain import _checks
from curvtrain.curvature import trees
from curvtrain.curvature.base import Curvature
from curvtrain.curvature.request import Request
from curvtrain.optim.base import require_curvature, require_params, transformation, vectors_for
from curvtrain.optim.scale_by_curvature import check_damping, value_at

PyTree = Any

RAW, PRECONDITIONED = "raw", "preconditioned"
FAN_OUT = "fan_out"
_SMALL, _TINY = 1e-2, 1e-9  # PyTorch-SSO's: norms that are not normalised, and what keeps LARS finite


class NaturalGradientState(NamedTuple):
    """State of `natural_gradient`.

    Attributes:
      count: int32 (), updates so far.
      velocity: b, float32 like the parameters; None without momentum.
      average: a, float32 like the parameters; None without averaging.
      request: what is asked of the curvature, with lambda + l2 of the next update.
      first_rate: float32 (), eta_0.
    """

    count: jax.Array
    velocity: PyTree
    average: PyTree
    request: Request
    first_rate: jax.Array

    @property
    def damping(self) -> jax.Array:
        """float32 (), lambda + l2: what the next update will ask of the curvature."""
        assert self.request.damping is not None
        return self.request.damping


def natural_gradient(
    learning_rate: optax.ScalarOrSchedule,
    damping: optax.ScalarOrSchedule = 1e-3,
    *,
    momentum: optax.ScalarOrSchedule = 0.0,
    momentum_type: str = PRECONDITIONED,
    momentum_correction: bool = False,
    gradient_decay: float = 0.0,
    gradient_decay_type: str = RAW,
    l2: float = 0.0,
    weight_decay: float = 0.0,
    lars: bool = False,
    lars_type: str = PRECONDITIONED,
    rescale: str | float | None = None,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Natural-gradient descent, with what large-batch training adds to it. See the table of stages above.

    Args:
      learning_rate: eta, a number or an optax schedule.
      damping: lambda, a number or an optax schedule.
      momentum: a number in [0, 1), or an optax schedule.
      momentum_type: "raw" (of gradients) or "preconditioned" (of steps).
      momentum_correction: whether momentum follows the learning rate, so that steps of a larger rate do not linger
        when it has decayed. eta_0 is the rate at step 0: a warm-up would raise the momentum with the rate.
      gradient_decay: beta, in [0, 1); 0 keeps the last gradient alone.
      gradient_decay_type: "raw" or "preconditioned".
      l2: coefficient of l2/2 |w|^2, which is added to the loss, and l2 I to the curvature.
      weight_decay: decoupled, so that the curvature does not see it.
      lars: whether every leaf moves in proportion to its norm (You et al. 2017, arXiv 1708.03888).
      lars_type: "raw" or "preconditioned".
      rescale: the norm that every leaf of two axes or more has after the update; "fan_out": sqrt(2 fan_out). for
        weights that a normalisation follows, so that their scale is no part of the function.
      mask: what weight_decay is for: a tree of booleans like the parameters, or a function of them that gives one.

    Returns:
      A transformation whose `update` needs the parameters and `curvature=`. It ends in parameters: no learning rate is
      to be chained after it.
    """
    check_damping("natural_gradient(learning_rate)", learning_rate)
    check_damping("natural_gradient(damping)", damping)
    if not callable(momentum):
        _checks.number_in("natural_gradient(momentum)", momentum, 0.0, 1.0, open_high=True)
    for name, value in (
        ("momentum_type", momentum_type),
        ("gradient_decay_type", gradient_decay_type),
        ("lars_type", lars_type),
    ):
        _checks.one_of(f"natural_gradient({name})", value, (RAW, PRECONDITIONED))
    _checks.number_in("natural_gradient(gradient_decay)", gradient_decay, 0.0, 1.0, open_high=True)
    _checks.number_in("natural_gradient(l2)", l2, 0.0)
    _checks.number_in("natural_gradient(weight_decay)", weight_decay, 0.0)
    if isinstance(rescale, str):
        _checks.one_of("natural_gradient(rescale)", rescale, (FAN_OUT,))
    elif rescale is not None:
        _checks.number_in("natural_gradient(rescale)", rescale, 0.0, open_low=True)
    _check_mask(mask, weight_decay)
    if momentum_correction:
        _check_first_rate(learning_rate)
    has_momentum, averages, decays = (not _checks.is_off(option) for option in (momentum, gradient_decay, weight_decay))
    decayed_weights = optax.add_decayed_weights(weight_decay, mask)

    def init(params):
        if mask is not None:
            _check_mask_fits(mask, params)
        return NaturalGradientState(
            count=jnp.int32(0),
            velocity=trees.zeros(params) if has_momentum else None,
            average=trees.zeros(params) if averages else None,
            request=Request.of("natural_gradient", Curvature, params, value_at(damping, jnp.int32(0)) + l2),
            first_rate=value_at(learning_rate, jnp.int32(0)),
        )

    def update(updates, state, params=None, *, curvature=None, **extra):
        require_params("natural_gradient", params)
        C = require_curvature("natural_gradient", curvature, Curvature, "curvature.KFAC(), or another estimator")
        w, t = trees.float32(params), state.count
        rate, m = value_at(learning_rate, t), value_at(momentum, t)
        if momentum_correction:
            m = m * rate / state.first_rate
        velocity, average = state.velocity, state.average

        def stage(kind, g):
            nonlocal velocity, average
            if has_momentum and momentum_type == kind:
                g = velocity = jax.tree.map(lambda b, g: m * b + g, velocity, g)
            if averages and gradient_decay_type == kind:
                average = jax.tree.map(lambda a, g: gradient_decay * a + (1 - gradient_decay) * g, average, g)
                g = trees.scale(1 / (1 - gradient_decay ** (t + 1)), average)
            if lars and lars_type == kind:
                g = jax.tree.map(_lars, g, w)
            return g

        g = jax.tree.map(lambda g, w: g + l2 * w, trees.float32(updates), w)
        to, back = vectors_for("natural_gradient", C, updates)
        g = back(C.solve(to(stage(RAW, g)), state.damping))
        if decays:
            g, _ = decayed_weights.update(g, decayed_weights.init(w), w)
        delta = trees.scale(-rate, stage(PRECONDITIONED, g))
        if rescale is not None:
            delta = jax.tree.map(lambda d, w: _rescaled(w + d, rescale) - w if w.ndim >= 2 else d, delta, w)
        delta = jax.tree.map(lambda d, u: d.astype(u.dtype), delta, updates)
        request = state.request.with_damping(value_at(damping, t + 1) + l2)
        return delta, NaturalGradientState(t + 1, velocity, average, request, state.first_rate)

    return transformation(init, update)


def _lars(g: jax.Array, w: jax.Array) -> jax.Array:
    size = trees.norm(w)
    return jnp.where(size > _SMALL, size / (trees.norm(g) + _TINY), 1.0) * g


def _rescaled(w: jax.Array, norm: str | float) -> jax.Array:
    size = trees.norm(w)
    target = (2 * w.shape[-1]) ** 0.5 if isinstance(norm, str) else norm
    return jnp.where(size > _SMALL, target / size, 1.0) * w


def _check_mask(mask: Any, weight_decay: Any) -> None:
    if mask is None:
        return
    if not callable(mask) and not all(isinstance(leaf, bool | np.bool_) for leaf in jax.tree.leaves(mask)):
        raise TypeError(
            f"natural_gradient(mask) should be a tree of booleans like the parameters, or a function that makes one of "
            f"them, not {mask!r}."
        )
    if _checks.is_off(weight_decay):
        raise ValueError("natural_gradient(mask) says what weight_decay is for; give a weight_decay, or no mask.")


def _check_mask_fits(mask: Any, params: PyTree) -> None:
    tree = mask(params) if callable(mask) else mask
    try:
        jax.tree.map(lambda m, p: None, tree, params)
    except ValueError as error:
        raise ValueError(
            f"natural_gradient(mask) should be like the parameters, {jax.tree.structure(params)}, or a prefix of them, "
            f"not {jax.tree.structure(tree)}."
        ) from error


def _check_first_rate(learning_rate: optax.ScalarOrSchedule) -> None:
    first = value_at(learning_rate, jnp.int32(0))
    try:
        rate = float(first)
    except jax.errors.ConcretizationTypeError:  # optax.inject_hyperparams under jit: it has no value yet
        return
    if not rate > 0:
        raise ValueError(
            f"natural_gradient(momentum_correction) divides by the learning rate at step 0, which is {rate}. "
            f"Start the schedule above zero, or give momentum a schedule of its own."
        )
