"""AdaFisher and AdaFisherW: momentum, divided by the diagonal of K-FAC's factors.

Gomes et al. (2024), arXiv 2405.16397, over `curvature.KroneckerDiagonal`. The paper's code does something else than the
paper (`curvature/fisher/released.py` says what): `faithful=True` is that code, and the default repairs the method.

| symbol | name here | meaning |
|---|---|---|
| F_l | | A_i G_j of layer l: diagonals of the factors, per example, with a debiased average; else the exact diagonal |
| m | `mu` | average of gradients; m^ is divided by 1 - b1^t |
| tau | `damping` | lambda_l = tau mean(F_l), for each copy of a layer's matrix |
| c | `trust_cap` | rate / lambda_l^p <= c: lambda_l is at least (rate / c)^(1/p) |
| p | `exponent` | 1, or 1/2 for a step like Adam's |
| Lambda | `damping` | with `faithful`; F~ = S (x) H + Lambda, and 1 for parameters without factors |
| kappa | `weight_decay` | |

    adafisher     g <- g + kappa theta;  m <- b1 m + (1 - b1) g;  theta <- theta - rate m^ / (F + lambda_l)^p
    adafisherw    m <- b1 m + (1 - b1) g;  theta <- theta - rate (m^ / (F + lambda_l)^p + kappa theta)
    faithful      the same with m^ / F~
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain.curvature import DiagonalFactors, ReleasedFactors, trees
from curvtrain.curvature.request import Request
from curvtrain.optim.averages import divided
from curvtrain.optim.base import chained, require_curvature, transformation, vectors_for
from curvtrain.optim.psgd import momentum_like, moving_average
from curvtrain.optim.scale_by_curvature import check_damping, value_at

PyTree = Any

AUTO = "auto"
TAU, TRUST_CAP, RATE = 0.1, 2.0, 0.02  # of the repaired method
LAMBDA, RELEASED_RATE, RELEASED_PERIOD = 1e-3, 1e-3, 100  # of the released code


class ScaleByAdaFisherState(NamedTuple):
    """State of `scale_by_adafisher`.

    Attributes:
      count: int32 (), updates so far.
      mu: m, like the parameters; empty without momentum.
      damping: (), tau, or Lambda with `faithful`.
      floor: (), the least lambda_l that the trust cap allowed in the last update.
      exponent: (), p.
      request: what is asked of whoever maintains the curvature.
    """

    count: jax.Array
    mu: PyTree
    damping: jax.Array
    floor: jax.Array
    exponent: jax.Array
    request: Request


def adafisher(
    learning_rate: optax.ScalarOrSchedule | None = None,
    faithful: bool = False,
    weight_decay: float = 0.0,
    *,
    b1: float = 0.9,
    damping: optax.ScalarOrSchedule | None = None,
    exponent: float = 1.0,
    trust_cap: float | str | None = AUTO,
    mask: Any = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaFisher with coupled weight decay, which is part of the gradient.

        Trainer(..., optimizer=optim.adafisher(), curvature=curvature.KroneckerDiagonal("empirical"))

    The step is as large as that of gradient descent at the rate `learning_rate / (F + lambda_l)`, of at most
    `learning_rate / lambda_l`: where `damping` is lowered, the rate is to be lowered with it. A constant rate needs no
    warm-up, as the cap bounds the first steps.

    Args:
      learning_rate: a number or an optax schedule; None is 0.02, or 1e-3 with `faithful`.
      faithful: do what the released code does, with `curvature.KroneckerDiagonal(faithful=True)`: gradient descent with
        momentum, but for rounding, at the rate of 1000 learning rates. A Trainer without a schedule then updates the
        factors every 100 steps.
      weight_decay: kappa.
      b1: decay of the momentum; 0 keeps none.
      damping: tau, the share of a layer's mean curvature that is added to it; None is 0.1. With `faithful` Lambda,
        which is added to factors in [0, 1]; None is 1e-3. A number or an optax schedule.
      exponent: p; 0.5 divides by a root, as Adam does, and wants rates of 0.1 to 0.3: F is that of single examples, so
        its root is up to sqrt(batch size) times Adam's.
      trust_cap: c, the largest rate of gradient descent that any parameter may get; "auto" is 2 where p is 1 and
        otherwise None: no such limit. A cap of 10 can be faster; in small networks with ReLU it made the first steps
        too large.
      mask: tree of bools, or a function that makes one of the parameters: which of them decay.
      mu_dtype: of the momentum; None for float64 where a parameter is, otherwise float32.

    Returns:
      A transformation whose `update` needs `curvature=`, the `DiagonalFactors` of `curvature.KroneckerDiagonal()`, or,
      with `faithful`, the `ReleasedFactors` of `curvature.KroneckerDiagonal(faithful=True)`; others raise TypeError.
    """
    rate = _rate(learning_rate, faithful)
    link = _link("adafisher", b1, faithful, damping, exponent, trust_cap, rate, mu_dtype)
    return chained("adafisher", link, rate, weight_decay, mask, coupled=True)


def adafisherw(
    learning_rate: optax.ScalarOrSchedule | None = None,
    faithful: bool = False,
    weight_decay: float = 0.01,
    *,
    b1: float = 0.9,
    damping: optax.ScalarOrSchedule | None = None,
    exponent: float = 1.0,
    trust_cap: float | str | None = AUTO,
    mask: Any = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaFisher with decoupled weight decay, which is not preconditioned. Arguments as for `adafisher`.

    The decay is rate * kappa: with `faithful`, where a gradient's share is scaled by about 1000, it is next to none.
    """
    rate = _rate(learning_rate, faithful)
    link = _link("adafisherw", b1, faithful, damping, exponent, trust_cap, rate, mu_dtype)
    return chained("adafisherw", link, rate, weight_decay, mask)


def scale_by_adafisher(
    b1: float = 0.9,
    *,
    faithful: bool = False,
    damping: optax.ScalarOrSchedule | None = None,
    exponent: float = 1.0,
    trust_cap: float | str | None = AUTO,
    learning_rate: optax.ScalarOrSchedule | None = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """`adafisher` without its learning rate, sign and weight decay: a link of a chain. Arguments as there.

    `learning_rate` is the rate that follows in the chain; the trust cap alone needs it.
    """
    rate = _rate(learning_rate, faithful)
    return _link("scale_by_adafisher", b1, faithful, damping, exponent, trust_cap, rate, mu_dtype)


def _link(
    name: str, b1: Any, faithful: bool, damping: Any, exponent: Any, trust_cap: Any, rate: Any, mu_dtype: Any
) -> optax.GradientTransformationExtraArgs:
    """The link of the three, whose options are checked under the name of the one that was called."""
    _check(name, b1, faithful, damping, exponent, trust_cap, rate, mu_dtype)
    kind = ReleasedFactors if faithful else DiagonalFactors
    estimator = f"curvature.KroneckerDiagonal({'faithful=True' if faithful else ''})"
    damping = (LAMBDA if faithful else TAU) if damping is None else damping
    is_one = not isinstance(exponent, jax.Array) and exponent == 1  # of an array nobody knows

    def floor_at(count, like):
        if faithful or trust_cap is None:
            return jnp.zeros((), trees.width(like))
        p, cap = value_at(exponent, count, like), TRUST_CAP if isinstance(trust_cap, str) else trust_cap
        floor = (value_at(rate, count, like) / cap) ** (1 / p)
        return jnp.where(p == 1, floor, 0) if isinstance(trust_cap, str) else floor

    def init(params):
        zero = jnp.int32(0)
        mu = {} if _checks.is_off(b1) else momentum_like(params, mu_dtype)
        settings = value_at(damping, zero, params), floor_at(zero, params), value_at(exponent, zero, params)
        request = Request.of(name, kind, params, update_every=RELEASED_PERIOD if faithful else None)
        return ScaleByAdaFisherState(zero, mu, *settings, request)

    def update(updates, state, params=None, *, curvature=None, **extra):
        C = require_curvature(name, curvature, kind, estimator)
        averaged, factor, mu = moving_average(updates, state.mu, state.count, b1, False)
        settings = value_at(damping, state.count, updates), floor_at(state.count, updates)
        power = value_at(exponent, state.count, updates)
        to, back = vectors_for(name, C, updates)
        d = trees.scale(factor, back(direction(C, to(averaged), *settings, 1 if is_one else power)))
        return trees.cast(d, updates), ScaleByAdaFisherState(state.count + 1, mu, *settings, power, state.request)

    return transformation(init, update)


def direction(C: DiagonalFactors | ReleasedFactors, m: PyTree, damping: Any, floor: Any, exponent: Any) -> PyTree:
    """m, a vector of the curvature, divided as the module's docstring says; m itself before the first update."""
    if isinstance(C, ReleasedFactors):
        return C.map(m, lambda F, v: v if F is None else v / (F + damping))
    # zero where no gradient ever came
    of = lambda F, v: divided(v, (F + damping_of(F, damping, floor)) ** exponent)
    return C.map(m, lambda F, v: jnp.where(C.weight > 0, of(F, v), v))


def damping_of(F: jax.Array, tau: Any, floor: Any) -> jax.Array:
    """lambda_l, (K, 1, 1), of one layer's F (K, d_i, d_o)."""
    mean = jnp.sum(F, axis=(1, 2), keepdims=True) / max(F.shape[1] * F.shape[2], 1)
    return jnp.maximum(tau * mean, floor)


def _rate(learning_rate: Any, faithful: bool) -> Any:
    return (RELEASED_RATE if faithful else RATE) if learning_rate is None else learning_rate


def _check(
    name: str, b1: Any, faithful: Any, damping: Any, exponent: Any, trust_cap: Any, rate: Any, mu_dtype: Any
) -> None:
    """Raises TypeError or ValueError about an option."""
    if not isinstance(faithful, bool):
        raise TypeError(f"{name}(faithful) should be True or False, not {faithful!r}.")
    check_damping(f"{name}(learning_rate)", rate)
    _checks.number_in(f"{name}(b1)", b1, 0.0, 1.0, open_high=True)
    _checks.number_in(f"{name}(exponent)", exponent, 0.0, 1.0, open_low=True)
    if damping is not None and not callable(damping):
        _checks.number_in(f"{name}(damping)", damping, 0.0, open_low=True)
    if isinstance(trust_cap, str):
        _checks.one_of(f"{name}(trust_cap)", trust_cap, (AUTO,))
    elif trust_cap is not None:
        _checks.number_in(f"{name}(trust_cap)", trust_cap, 0.0, open_low=True)
    if faithful:
        if not isinstance(exponent, jax.Array) and exponent != 1:
            raise ValueError(f"{name}(exponent={exponent}): the released code divides by F itself. Leave it out.")
        if trust_cap is not None and not isinstance(trust_cap, str):
            raise ValueError(f"{name}(trust_cap={trust_cap}): the released code has no such limit. Leave it out.")
    if _checks.is_off(b1) and mu_dtype is not None:
        raise ValueError(f"{name}(mu_dtype) is about the momentum, and b1=0 keeps none. Leave it out.")
