"""VOGN and noisy K-FAC: a normal distribution of the parameters whose precision is the curvature's.

Osawa et al. (2019), "Practical deep learning with Bayesian principles", arXiv 1906.02506; Zhang et al. (2018), "Noisy
natural gradient as variational inference", arXiv 1712.02390. As in PyTorch-SSO's `VIOptimizer`, here over any curvature
with roots: a diagonal one makes the first of these, Kronecker factors the second.

| symbol | shape | meaning |
|---|---|---|
| m | params | the mean: the parameters that the optimizer moves |
| N | () | the number of examples |
| tau_t | () | weight of the KL term at step t = 0, 1, ...; the posterior is that at temperature tau |
| s | () | precision of the prior, which is normal around 0 |
| C, lambda | | the curvature of the mean loss; damping |
| l2 | () | tau s / N |
| P | | C + (lambda + l2) I; the posterior's precision is N P / tau |
| n | params | noise of a draw, sqrt(tau / N) P^(-1/2) e with e standard normal; theta = m + n |
| g | params | the gradient of the mean loss, averaged over the draws |

    m <- m - eta_t P^-1 (g + l2 m), with momentum, averages and decay in the stages of `natural_gradient`

Departures from PyTorch-SSO. Its Kronecker samples are wrong: they take the upper Cholesky factor U of an inverse M on
the left, so that their covariance is U U^T in the place of U^T U = M. P^(-1/2) is here the symmetric root in the
eigenbasis of A (x) G, whose covariance is P^-1 for any damping, not that of one split over the factors. And l2 follows
tau at once, where that code averages it with the curvature's decay.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain.curvature import trees
from curvtrain.curvature.base import Curvature
from curvtrain.curvature.posterior import Posterior
from curvtrain.objective import by_path, nested
from curvtrain.optim.base import require_curvature, require_params, transformation, vectors_for
from curvtrain.optim.natural_gradient import PRECONDITIONED, RAW, NaturalGradientState, Stages
from curvtrain.optim.sampling import SamplingTransformation, count_of, known_size, sampling
from curvtrain.optim.scale_by_curvature import check_damping, value_at

PyTree = Any

ESTIMATORS = "curvature.DiagonalFisher() or curvature.KFAC(inverse='eigh')"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VognState(Posterior):
    """State of `vogn`: its posterior, together with the curvature.

    Attributes:
      inner: of the stages of the update; its damping is lambda + l2 of the next draws and update.
      data_size: (), N; None until a Trainer says it.
      kl_weight: (), tau of the next draws.
      prior_precision: (), s.
      init_precision: (), that of C before the first update; infinite: the first step has no noise.
    """

    inner: NaturalGradientState
    data_size: jax.Array | None
    kl_weight: jax.Array
    prior_precision: jax.Array
    init_precision: jax.Array

    @property
    def constants(self):
        return "data_size", "prior_precision"

    def noise(self, params, key, curvature):
        if curvature is None:
            raise TypeError(
                "vogn draws from the posterior that its curvature makes, so sample(opt_state, params, key, curvature=) "
                "needs one. A Trainer passes it; in a loop of your own, pass what the estimator maintains."
            )
        C = require_curvature("vogn", curvature, Curvature, ESTIMATORS)
        scale = jnp.sqrt(self.kl_weight / known_size("vogn", "data_size", self.data_size))
        own = nested({path: params[path] for path in self.inner.request.paths})
        to, back = vectors_for("vogn", C, own)
        e = trees.normal(key, own)
        damping = self.inner.damping
        first = jnp.where(jnp.isinf(self.init_precision), 0.0, jax.lax.rsqrt(self.init_precision + damping))
        begins = self.inner.count == 0
        _require_root(C, to(e))
        root = back(C.power(to(e), damping, -0.5))
        choose = lambda e, r: scale * jnp.where(begins, first * e, r)
        return by_path(jax.tree.map(choose, e, root))

    def with_examples(self, examples):
        if self.data_size is not None:
            return self
        size = jnp.asarray(count_of("vogn", "data_size", examples), self.kl_weight.dtype)
        damping = self.inner.damping + self.kl_weight * self.prior_precision / size
        inner = self.inner._replace(request=self.inner.request.with_damping(damping))
        return dataclasses.replace(self, inner=inner, data_size=size)


def vogn(
    learning_rate: optax.ScalarOrSchedule,
    data_size: float | None = None,
    prior_precision: float = 1.0,
    *,
    damping: optax.ScalarOrSchedule = 0.0,
    kl_weight: optax.ScalarOrSchedule = 1.0,
    init_precision: float | None = None,
    momentum: optax.ScalarOrSchedule = 0.0,
    momentum_type: str = PRECONDITIONED,
    gradient_decay: float = 0.0,
    gradient_decay_type: str = RAW,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> SamplingTransformation:
    """Natural-gradient variational inference: gradients and curvature are taken at draws from the posterior.

    A Trainer draws (`mc_samples` times a step), absorbs the statistics of the curvature at the draws and averages
    predictions (`predictive_samples`). In a loop of your own:

        value, grads, _ = optim.at_draws(value_and_grad, opt_state, params, step_key, samples=4, curvature=curv)
        theta = tx.sample(opt_state, params, draw_key, curv)
        curv = estimator.refresh(estimator.update(curv, objective, theta, batch, key), objective, params, batch, key)
        updates, opt_state = tx.update(grads, opt_state, params, curvature=curv)

    `curvature.DiagonalFisher` makes a diagonal posterior, `KFAC(inverse="eigh")` or "ekfac" a Kronecker-factored one,
    `UnitWise` and `FullBlock` blocks; the default `KFAC`, "cholesky", has no roots. The estimator's `ema` is the share
    of the old curvature. KL warm-up is a schedule: `kl_weight=optax.linear_schedule(0.01, 1.0, 1000)`. Settings that
    have been published are in `optim.vogn_preset`.

    Args:
      learning_rate: a positive number or a schedule.
      data_size: N; None: the number of training examples, which a Trainer knows. Data augmentation has it multiplied,
        by 5 or 10 in the authors' settings.
      prior_precision: s, above 0.
      damping: lambda, added to the curvature in the update and in the posterior.
      kl_weight: tau.
      init_precision: of C before the first update, whose draws it is for; None: these have no noise.
      momentum, momentum_type, gradient_decay, gradient_decay_type, weight_decay, mask: as for `natural_gradient`.

    Returns:
      A transformation with `sample`, whose `update` needs the parameters and `curvature=`. It ends in parameters: no
      learning rate is to be chained after it. In `self_contained`, the curvature's statistics are those at the mean.

    Raises:
      TypeError, ValueError: options out of range; in `sample` and `update`, a curvature that is missing, of other
        parameters, or without roots, and a data size that nobody has said.
    """
    _check(learning_rate, data_size, prior_precision, damping, kl_weight, init_precision)
    own = damping if callable(damping) else (lambda count: damping)  # a constant would be taken from a state made anew
    buffers = momentum, momentum_type, False, gradient_decay, gradient_decay_type
    stages = Stages("vogn", learning_rate, own, *buffers, 0.0, weight_decay, False, PRECONDITIONED, None, mask)
    step = _Vogn(stages, data_size, prior_precision, damping, kl_weight, init_precision)
    return sampling(transformation(step.init, step.update))


@dataclasses.dataclass(frozen=True)
class _Vogn:
    """The options of `vogn`, checked, and its two functions; `stages` makes the step, given an l2."""

    stages: Stages
    data_size: float | None
    prior_precision: float
    damping: optax.ScalarOrSchedule
    kl_weight: optax.ScalarOrSchedule
    init_precision: float | None

    def init(self, params: PyTree) -> VognState:
        """The state before the first update."""
        number = lambda x: jnp.asarray(x, trees.width(params))
        s, tau = number(self.prior_precision), value_at(self.kl_weight, jnp.int32(0), params)
        size = None if self.data_size is None else number(self.data_size)
        inner = dataclasses.replace(self.stages, l2=0.0 if size is None else tau * s / size).init(params)
        first = number(jnp.inf if self.init_precision is None else self.init_precision)
        return VognState(inner, size, tau, s, first)

    def update(self, updates, state, params=None, *, curvature=None, **extra):
        """One step; see `vogn`."""
        require_params("vogn", params)
        C = require_curvature("vogn", curvature, Curvature, ESTIMATORS)
        N, tau, s = known_size("vogn", "data_size", state.data_size), state.kl_weight, state.prior_precision
        to, _ = vectors_for("vogn", C, updates)
        _require_root(C, to(updates))  # refused here, too, not just when somebody draws
        stages = dataclasses.replace(self.stages, l2=tau * s / N)
        delta, inner = stages.update(updates, state.inner, params, curvature=C)
        number = lambda x: jnp.asarray(x, tau.dtype)
        size = N if self.data_size is None else number(self.data_size)
        s, tau = number(self.prior_precision), value_at(self.kl_weight, inner.count, tau)
        asked = value_at(self.damping, inner.count, tau) + tau * s / size
        inner = inner._replace(request=inner.request.with_damping(asked))
        return delta, VognState(inner, size, tau, s, state.init_precision)


def _check(learning_rate, data_size, prior_precision, damping, kl_weight, init_precision) -> None:
    """Raises TypeError or ValueError for options that are not positive; `Stages` checks the others."""
    for name, value in (("data_size", data_size), ("init_precision", init_precision)):
        if value is not None:
            _checks.number_in(f"vogn({name})", value, 0.0, open_low=True)
    for name, value in (("learning_rate", learning_rate), ("kl_weight", kl_weight)):
        if not callable(value):
            _checks.number_in(f"vogn({name})", value, 0.0, open_low=True)
    _checks.number_in("vogn(prior_precision)", prior_precision, 0.0, open_low=True)
    check_damping("vogn(damping)", damping)


def _require_root(C: Curvature, vector: PyTree) -> None:
    """Raises TypeError if a curvature has no root to draw with; computes nothing."""
    try:
        jax.eval_shape(lambda v: C.power(v, 1.0, -0.5), vector)
    except TypeError as error:
        raise TypeError(
            f"vogn draws with the root (C + damping I)^-0.5, which {type(C).__name__} does not have here. Take "
            f"{ESTIMATORS}."
        ) from error
