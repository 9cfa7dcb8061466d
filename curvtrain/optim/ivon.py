"""IVON: a normal distribution of the parameters with a diagonal Hessian, learned at the price of Adam.

Shen et al. (2024), "Variational learning is effective for large deep networks", arXiv 2402.17641, algorithm 1.

| symbol | shape | meaning |
|---|---|---|
| m | params | the mean: the parameters that the optimizer moves |
| h | params | the diagonal of the Hessian of the mean loss, a moving average |
| delta | () | weight decay, the precision of the prior over ess |
| ess | () | effective sample size, lambda in the paper: the number of examples, or more for a colder posterior |
| sigma^2 | params | 1 / (ess (h + delta)), the variance |
| n | params | noise of a draw, normal with variance sigma^2; theta = m + n |
| g | params | the gradient of the mean loss at theta |
| h_hat | params | estimate of the Hessian: ess (h + delta) E[n g] ("price"), or ess E[g^2] ("gradsq") |

    g_m <- b1 g_m + (1 - b1) E[g]
    h   <- b2 h + (1 - b2) h_hat + (1 - b2)^2 (h - h_hat)^2 / (2 (h + delta))
    m   <- m - rate (hess_init + delta) clip((g_m / (1 - b1^t) + delta m) / (h + delta))

With x = (1 - b2)(h_hat - h) / (h + delta), the second line is h + delta <- (h + delta)(1 + x + x^2 / 2), which is at
least (h + delta) / 2 whatever h_hat is: h + delta stays positive.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain.curvature import trees
from curvtrain.curvature.posterior import Posterior, own_part
from curvtrain.objective import by_path
from curvtrain.optim.averages import seen
from curvtrain.optim.base import chained, require_params, transformation
from curvtrain.optim.sampling import SamplingTransformation, count_of, known_size, require_draws, sampling

PyTree = Any

HESSIANS = {"price": "noise_grad", "gradsq": "square_grad"}  # the estimate, and the statistic of draws that it takes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IvonState(Posterior):
    """State of `ivon`: its posterior.

    Attributes:
      count: int32 (), updates so far.
      momentum: g_m.
      hess: h.
      ess: (), that of the next draws; None until a Trainer says it.
      weight_decay: (), delta of the next draws.
      hess_approx: the estimate of the Hessian.
    """

    count: jax.Array
    momentum: PyTree
    hess: PyTree
    ess: jax.Array | None
    weight_decay: jax.Array
    hess_approx: str = dataclasses.field(metadata=dict(static=True))

    @property
    def wants(self):
        return (HESSIANS[self.hess_approx],)

    @property
    def constants(self):
        return "ess", "weight_decay"

    def noise(self, params, key, curvature):
        scale = known_size("ivon", "ess", self.ess)
        drawn, h = by_path(trees.normal(key, self.hess)), by_path(self.hess)
        return {path: e * jax.lax.rsqrt(scale * (h[path] + self.weight_decay)) for path, e in drawn.items()}

    def with_examples(self, examples):
        if self.ess is not None:
            return self
        return dataclasses.replace(self, ess=jnp.asarray(count_of("ivon", "ess", examples), self.weight_decay.dtype))


def ivon(
    learning_rate: optax.ScalarOrSchedule,
    ess: float | None = None,
    hess_init: float = 1.0,
    *,
    b1: float = 0.9,
    b2: float = 0.99999,
    weight_decay: float = 1e-4,
    hess_approx: str = "price",
    clip_radius: float | None = None,
    rescale_lr: bool = True,
    debias: bool = True,
) -> SamplingTransformation:
    """Learns a normal distribution of the parameters: its gradients are taken at draws from it.

    A Trainer draws (`mc_samples` times a step) and averages predictions (`predictive_samples`). In a loop of your own:

        tx = optim.ivon(0.1, ess=len(data))
        value_and_grad = lambda params, key: jax.value_and_grad(loss)(params, batch)

        value, grads, draws = optim.at_draws(value_and_grad, opt_state, params, step_key)
        updates, opt_state = tx.update(grads, opt_state, params, draws=draws)

        theta = tx.sample(opt_state, params, jax.random.key(7))     # predict with several of these, and average

    Settings of the authors: CIFAR-10, rate 0.2 along a cosine, hess_init 0.5, weight_decay 2e-4, 200 epochs of batches
    of 50; ImageNet (ResNet-50), 2.5, 0.05, 5e-5, b2 0.999995, batches of 1024; GPT-2, 300 (large: 150), 1e-3, 1e-6, ess
    1e10, clip_radius 1e-3. If h stays near its initial value, lower hess_init and b2 or raise the rate.

    Args:
      learning_rate: a positive number or a schedule.
      ess: effective sample size; None: the number of training examples, which a Trainer knows.
      hess_init: the first h, above 0.
      b1, b2: decays of g_m and of h.
      weight_decay: delta; it is the precision of the prior over ess, and so part of the update and of the variance.
      hess_approx: "price" or "gradsq".
      clip_radius: bound of every entry of a step before the rate; None: none.
      rescale_lr: whether the rate is multiplied by hess_init + delta, so that the first steps are of its size.
      debias: whether g_m is divided by 1 - b1^t.

    Returns:
      A transformation with `sample`, whose `update` needs the parameters and `draws=`. Under `optax.MultiSteps` draws
      are those of the last batch; `TrainerConfig(accumulate)` takes them all.

    Raises:
      TypeError, ValueError: options out of range; in `sample` and `update`, an ess that nobody has said, and missing
        draws.
    """
    if not callable(learning_rate):
        _checks.number_in("ivon(learning_rate)", learning_rate, 0.0, open_low=True)
    link = _Ivon(ess, hess_init, b1, b2, weight_decay, hess_approx, clip_radius, rescale_lr, debias)
    return sampling(chained("ivon", transformation(link.init, link.update), learning_rate, 0.0, None))


@dataclasses.dataclass(frozen=True)
class _Ivon:
    """The options of `ivon`, checked, and its two functions without the rate."""

    ess: float | None
    hess_init: float
    b1: float
    b2: float
    weight_decay: float
    hess_approx: str
    clip_radius: float | None
    rescale_lr: bool
    debias: bool

    def __post_init__(self):
        _checks.number_in("ivon(hess_init)", self.hess_init, 0.0, open_low=True)
        _checks.number_in("ivon(b1)", self.b1, 0.0, 1.0, open_high=True)
        _checks.number_in("ivon(b2)", self.b2, 0.0, 1.0, open_high=True)
        _checks.number_in("ivon(weight_decay)", self.weight_decay, 0.0)
        _checks.one_of("ivon(hess_approx)", self.hess_approx, HESSIANS)
        for name in ("ess", "clip_radius"):
            if getattr(self, name) is not None:
                _checks.number_in(f"ivon({name})", getattr(self, name), 0.0, open_low=True)

    def init(self, params: PyTree) -> IvonState:
        """The state before the first update."""
        dtype = trees.width(params)
        size = None if self.ess is None else jnp.asarray(self.ess, dtype)
        h = jax.tree.map(lambda p: jnp.full(p.shape, self.hess_init, dtype), params)
        delta = jnp.asarray(self.weight_decay, dtype)
        return IvonState(jnp.int32(0), trees.zeros(params), h, size, delta, self.hess_approx)

    def update(self, updates, state, params=None, *, draws=None, **extra):
        """One step uphill, of rate 1; see `ivon`."""
        require_params("ivon", params)
        scale, delta, t = known_size("ivon", "ess", state.ess), state.weight_decay, state.count + 1
        found = own_part(require_draws("ivon", draws, HESSIANS[self.hess_approx]), updates)
        b1, share = self.b1, 1 - self.b2
        momentum = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.momentum, trees.wide(updates))

        def learned(h, x):
            estimate = scale * x * (h + delta) if self.hess_approx == "price" else scale * x
            return h + share * (estimate - h) + 0.5 * jnp.square(share * (h - estimate)) / (h + delta)

        hess = jax.tree.map(learned, state.hess, found)
        whole = seen(b1, t, delta.dtype) if self.debias else 1.0
        u = jax.tree.map(lambda m, h, p: self._step(m / whole, h, p), momentum, hess, trees.wide(params))
        size = scale if self.ess is None else jnp.asarray(self.ess, scale.dtype)
        now = jnp.asarray(self.weight_decay, delta.dtype)
        return trees.cast(u, updates), IvonState(t, momentum, hess, size, now, self.hess_approx)

    def _step(self, g: jax.Array, h: jax.Array, p: jax.Array) -> jax.Array:
        delta = self.weight_decay
        u = (g + delta * p) / (h + delta)
        u = u if self.clip_radius is None else jnp.clip(u, -self.clip_radius, self.clip_radius)
        return (self.hess_init + delta) * u if self.rescale_lr else u
