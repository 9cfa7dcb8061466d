"""VOGN as its authors wrote it later: a diagonal posterior whose standard deviation moves along its logarithm.

The update of the comparisons with IVON (Shen et al., 2024, arXiv 2402.17641), of Khan et al. (2018), arXiv 1806.04854.

| symbol | shape | meaning |
|---|---|---|
| m | params | the mean: the parameters that the optimizer moves |
| N, s | () | the number of examples; precision of the prior |
| sigma | params | the posterior's standard deviation is sigma / sqrt(N) |
| n | params | noise of a draw, sigma e / sqrt(N) with e standard normal; theta = m + n |
| g | params | the gradient of the mean loss, averaged over the draws |
| c | params | the diagonal of the curvature of this step's draws |
| lambda, T | () | damping; temperature |
| a_t | () | share of the new curvature, the rate unless said otherwise |

    g_m <- b1 g_m + (1 - b1)(g + (s / N) m)
    m   <- m - rate sigma^2 g_m
    f   = (s / N + lambda + c) sigma^2 - T
    log sigma <- log sigma - 1/2 log(1 + a_t f)

So sigma is positive by construction, for a_t T < 1, and it rests where sigma^2 = T / (c + lambda + s / N).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain.curvature import trees
from curvtrain.curvature.base import Curvature
from curvtrain.curvature.posterior import Posterior
from curvtrain.curvature.request import Request
from curvtrain.objective import by_path
from curvtrain.optim.base import require_curvature, require_params, transformation, vectors_for
from curvtrain.optim.sampling import SamplingTransformation, count_of, known_size, sampling
from curvtrain.optim.scale_by_curvature import value_at

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogVognState(Posterior):
    """State of `log_vogn`: its posterior.

    Attributes:
      count: int32 (), updates so far.
      momentum: g_m.
      log_sigma: like the parameters.
      data_size: (), N; None until a Trainer says it.
      request: what is asked of the curvature.
    """

    count: jax.Array
    momentum: PyTree
    log_sigma: PyTree
    data_size: jax.Array | None
    request: Request

    @property
    def constants(self):
        return ("data_size",)

    def noise(self, params, key, curvature):
        root = jnp.sqrt(known_size("log_vogn", "data_size", self.data_size))
        e, logs = by_path(trees.normal(key, self.log_sigma)), by_path(self.log_sigma)
        return {path: jnp.exp(logs[path]) * e[path] / root for path in e}

    def with_examples(self, examples):
        if self.data_size is not None:
            return self
        size = count_of("log_vogn", "data_size", examples)
        return dataclasses.replace(self, data_size=jnp.asarray(size, trees.width(self.log_sigma)))


def log_vogn(
    learning_rate: optax.ScalarOrSchedule,
    data_size: float | None = None,
    prior_precision: float = 1.0,
    *,
    b1: float = 0.9,
    damping: float = 0.0,
    temperature: float = 1.0,
    curvature_rate: float | None = None,
    init_sigma: float = 1.0,
) -> SamplingTransformation:
    """VOGN with a standard deviation that is positive by construction, as its authors wrote it later.

    Its sigma is the average over steps, so that the curvature is to be that of one step: in a Trainer with
    `curvature.DiagonalFisher("empirical", ema=0.0)`, updated every step, this is their program. In a loop of your own
    it is used as `vogn` is, and draws need no curvature.

    Args:
      learning_rate: a number in (0, 1), or a schedule of such; with a curvature_rate, any positive one.
      data_size: N; None: the number of training examples, which a Trainer knows.
      prior_precision: s, above 0.
      b1: decay of g_m.
      damping: lambda.
      temperature: T; below 1 the posterior is colder.
      curvature_rate: a_t, in (0, 1) and below 1 / T; None: the learning rate.
      init_sigma: the first sigma.

    Returns:
      A transformation with `sample`, whose `update` needs the parameters and `curvature=`, which knows its diagonal. It
      ends in parameters: no learning rate is to be chained after it.

    Raises:
      TypeError, ValueError: options out of range; in `sample` and `update`, a data size that nobody has said, and a
        curvature that is missing or of other parameters.
    """
    positive = dict(prior_precision=prior_precision, temperature=temperature, init_sigma=init_sigma)
    positive |= {} if data_size is None else dict(data_size=data_size)
    for name, value in positive.items():
        _checks.number_in(f"log_vogn({name})", value, 0.0, open_low=True)
    if not callable(learning_rate):
        high = 1.0 if curvature_rate is None else math.inf
        _checks.number_in("log_vogn(learning_rate)", learning_rate, 0.0, high, open_low=True, open_high=True)
    _checks.number_in("log_vogn(b1)", b1, 0.0, 1.0, open_high=True)
    _checks.number_in("log_vogn(damping)", damping, 0.0)
    if curvature_rate is not None:
        _checks.number_in("log_vogn(curvature_rate)", curvature_rate, 0.0, 1.0, open_low=True, open_high=True)

    def init(params):
        dtype = trees.width(params)
        logs = jax.tree.map(lambda p: jnp.full(p.shape, jnp.log(jnp.asarray(init_sigma, dtype)), dtype), params)
        size = None if data_size is None else jnp.asarray(data_size, dtype)
        return LogVognState(jnp.int32(0), trees.zeros(params), logs, size, Request.of("log_vogn", Curvature, params))

    def update(updates, state, params=None, *, curvature=None, **extra):
        require_params("log_vogn", params)
        C = require_curvature("log_vogn", curvature, Curvature, "curvature.DiagonalFisher('empirical', ema=0.0)")
        N = known_size("log_vogn", "data_size", state.data_size)
        rate = value_at(learning_rate, state.count, N)
        share = rate if curvature_rate is None else curvature_rate
        own = prior_precision / N
        _, back = vectors_for("log_vogn", C, updates)
        c, sigma2 = back(C.diagonal()), jax.tree.map(lambda x: jnp.exp(2 * x), state.log_sigma)
        average = lambda m, g, p: b1 * m + (1 - b1) * (g + own * p)
        momentum = jax.tree.map(average, state.momentum, trees.wide(updates), trees.wide(params))
        delta = jax.tree.map(lambda v, m: -rate * v * m, sigma2, momentum)

        def moved(x, v, c):
            f = (own + damping + c) * v - temperature
            return x - 0.5 * jnp.log1p(share * f)

        logs = jax.tree.map(moved, state.log_sigma, sigma2, c)
        size = N if data_size is None else jnp.asarray(data_size, N.dtype)
        after = LogVognState(state.count + 1, momentum, logs, size, state.request)
        return trees.cast(delta, updates), after

    return sampling(transformation(init, update))
