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

import dataclasses
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
from curvtrain.optim.scale_by_curvature import check_damping, damping_now, is_constant, value_at

PyTree = Any

RAW, PRECONDITIONED = "raw", "preconditioned"
FAN_OUT = "fan_out"
_SMALL, _TINY = 1e-2, 1e-9  # PyTorch-SSO's: norms that are not normalised, and what keeps LARS finite


class NaturalGradientState(NamedTuple):
    """State of `natural_gradient`.

    Attributes:
      count: int32 (), updates so far.
      velocity: b, like the parameters, float32 or float64 (see `curvtrain/_dtypes.py`); None without momentum.
      average: a, likewise; None without averaging.
      request: what is asked of the curvature, with lambda + l2 of the next update.
      first_rate: (), eta_0.
    """

    count: jax.Array
    velocity: PyTree
    average: PyTree
    request: Request
    first_rate: jax.Array

    @property
    def damping(self) -> jax.Array:
        """(), lambda + l2: what the next update will ask of the curvature."""
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
    step = Stages(
        "natural_gradient",
        learning_rate,
        damping,
        momentum,
        momentum_type,
        momentum_correction,
        gradient_decay,
        gradient_decay_type,
        l2,
        weight_decay,
        lars,
        lars_type,
        rescale,
        mask,
    )
    return transformation(step.init, step.update)


@dataclasses.dataclass(frozen=True)
class Stages:
    """The options of `natural_gradient`, checked, and its two functions; `name` is what messages call them."""

    name: str
    learning_rate: optax.ScalarOrSchedule
    damping: optax.ScalarOrSchedule
    momentum: optax.ScalarOrSchedule
    momentum_type: str
    momentum_correction: bool
    gradient_decay: float
    gradient_decay_type: str
    l2: float | jax.Array
    weight_decay: float
    lars: bool
    lars_type: str
    rescale: str | float | None
    mask: Any

    def __post_init__(self):
        check_damping(f"{self.name}(learning_rate)", self.learning_rate)
        check_damping(f"{self.name}(damping)", self.damping)
        if not callable(self.momentum):
            _checks.number_in(f"{self.name}(momentum)", self.momentum, 0.0, 1.0, open_high=True)
        for name in ("momentum_type", "gradient_decay_type", "lars_type"):
            _checks.one_of(f"{self.name}({name})", getattr(self, name), (RAW, PRECONDITIONED))
        _checks.number_in(f"{self.name}(gradient_decay)", self.gradient_decay, 0.0, 1.0, open_high=True)
        _checks.number_in(f"{self.name}(l2)", self.l2, 0.0)
        _checks.number_in(f"{self.name}(weight_decay)", self.weight_decay, 0.0)
        if isinstance(self.rescale, str):
            _checks.one_of(f"{self.name}(rescale)", self.rescale, (FAN_OUT,))
        elif self.rescale is not None:
            _checks.number_in(f"{self.name}(rescale)", self.rescale, 0.0, open_low=True)
        _check_mask(self.name, self.mask, self.weight_decay)
        if self.momentum_correction:
            _check_first_rate(self.name, self.learning_rate)

    def init(self, params: PyTree) -> NaturalGradientState:
        """The state before the first update."""
        if self.mask is not None:
            _check_mask_fits(self.name, self.mask, params)
        first = value_at(self.damping, jnp.int32(0), params)
        first = (first + self.l2).astype(first.dtype)
        return NaturalGradientState(
            count=jnp.int32(0),
            velocity=None if _checks.is_off(self.momentum) else trees.zeros(params),
            average=None if _checks.is_off(self.gradient_decay) else trees.zeros(params),
            request=Request.of(self.name, Curvature, params, first, constant=is_constant(self.damping)),
            first_rate=value_at(self.learning_rate, jnp.int32(0), params),
        )

    def update(self, updates, state, params=None, *, curvature=None, **extra):
        """One step; see `natural_gradient`."""
        require_params(self.name, params)
        C = require_curvature(self.name, curvature, Curvature, "curvature.KFAC(), or another estimator")
        w, t = trees.wide(params), state.count
        rate = value_at(self.learning_rate, t, params)
        g = jax.tree.map(lambda g, w: g + self.l2 * w, trees.wide(updates), w)
        g, state = self._stage(RAW, g, w, rate, state)
        to, back = vectors_for(self.name, C, updates)
        g = back(C.solve(to(g), damping_now(self.damping, t, state.damping, self.l2)))
        if not _checks.is_off(self.weight_decay):
            decayed = optax.add_decayed_weights(self.weight_decay, self.mask)
            g, _ = decayed.update(g, decayed.init(w), w)
        g, state = self._stage(PRECONDITIONED, g, w, rate, state)
        delta = trees.scale(-rate, g)
        if self.rescale is not None:
            move = lambda d, w: _rescaled(w + d, self.rescale) - w if w.ndim >= 2 else d
            delta = jax.tree.map(move, delta, w)
        delta = trees.cast(delta, updates)
        damping = value_at(self.damping, t + 1, state.damping) + self.l2
        request = state.request.with_damping(damping.astype(state.damping.dtype))
        return delta, state._replace(count=t + 1, request=request)

    def _stage(self, kind: str, g: PyTree, w: PyTree, rate: jax.Array, state: NaturalGradientState):
        """What momentum, averaging and LARS of one kind make of g, and the state with their memories."""
        t = state.count
        if state.velocity is not None and self.momentum_type == kind:
            m = value_at(self.momentum, t, w)
            m = m * rate / state.first_rate if self.momentum_correction else m
            g = trees.cast(jax.tree.map(lambda b, g: m * b + g, state.velocity, g), state.velocity)
            state = state._replace(velocity=g)
        if state.average is not None and self.gradient_decay_type == kind:
            beta = self.gradient_decay
            average = trees.cast(jax.tree.map(lambda a, g: beta * a + (1 - beta) * g, state.average, g), state.average)
            whole = 1 - jnp.asarray(beta, trees.width(w)) ** (t + 1)
            g, state = trees.scale(1 / whole, average), state._replace(average=average)
        if self.lars and self.lars_type == kind:
            g = jax.tree.map(_lars, g, w)
        return g, state


def _lars(g: jax.Array, w: jax.Array) -> jax.Array:
    size = trees.norm(w)
    return jnp.where(size > _SMALL, size / (trees.norm(g) + _TINY), 1.0) * g


def _rescaled(w: jax.Array, norm: Any) -> jax.Array:
    size = trees.norm(w)
    target = (2 * w.shape[-1]) ** 0.5 if isinstance(norm, str) else norm
    return jnp.where(size > _SMALL, target / size, 1.0) * w


def _check_mask(name: str, mask: Any, weight_decay: Any) -> None:
    if mask is None:
        return
    if not callable(mask) and not all(isinstance(leaf, bool | np.bool_) for leaf in jax.tree.leaves(mask)):
        raise TypeError(
            f"{name}(mask) should be a tree of booleans like the parameters, or a function that makes one of "
            f"them, not {mask!r}."
        )
    if _checks.is_off(weight_decay):
        raise ValueError(f"{name}(mask) says what weight_decay is for; give a weight_decay, or no mask.")


def _check_mask_fits(name: str, mask: Any, params: PyTree) -> None:
    tree = mask(params) if callable(mask) else mask
    try:
        jax.tree.map(lambda m, p: None, tree, params)
    except ValueError as error:
        raise ValueError(
            f"{name}(mask) should be like the parameters, {jax.tree.structure(params)}, or a prefix of them, "
            f"not {jax.tree.structure(tree)}."
        ) from error


def _check_first_rate(name: str, learning_rate: optax.ScalarOrSchedule) -> None:
    first = value_at(learning_rate, jnp.int32(0), ())
    try:
        rate = float(first)
    except jax.errors.ConcretizationTypeError:  # optax.inject_hyperparams under jit: it has no value yet
        return
    if not rate > 0:
        raise ValueError(
            f"{name}(momentum_correction) divides by the learning rate at step 0, which is {rate}. "
            f"Start the schedule above zero, or give momentum a schedule of its own."
        )
