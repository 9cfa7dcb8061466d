"""Drop-in replacements for the optimizers of the `fosi` package: same calls and defaults, only the import changes.

    from curvtrain.optim import fosi_adam            # was: from fosi import fosi_adam

They carry the curvature in their own state and estimate it from the fixed `batch` that they are built with, as the
original does. New programs are better served by `optim.fosi` with a `Trainer` or with `optim.self_contained`, which
see a fresh batch at every refresh and pay nothing between refreshes.

Differences from the original: eigenvectors warm-start from the previous ones, unconverged pairs are left to the base
optimizer, `update_ese(..., batch)` is honoured, the base optimizer sees the parameter pytree, not one flat vector, and
nothing switches JAX to float64.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from curvtrain import _checks
from curvtrain.curvature import products
from curvtrain.curvature.eigenpairs import Eigenpairs
from curvtrain.curvature.lanczos import Lanczos
from curvtrain.curvature.schedule import CurvatureSchedule
from curvtrain.objective import Objective
from curvtrain.optim.fosi import fosi
from curvtrain.optim.self_contained import SelfContainedState, self_contained

PyTree = Any
LossFn = Callable[[PyTree, Any], jax.Array]

_AXIS = "batch"  # the original's pmap axis


class FosiTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation with the original's third function, `update_ese(params, state, batch=None) -> state`."""

    update_ese: Callable[..., SelfContainedState]

    def __new__(cls, init, update, update_ese):
        self = super().__new__(cls, init, update)
        self.update_ese = update_ese
        return self


class _PmappedLanczos(Lanczos):
    """Lanczos whose products are averaged over the pmap axis of the original's `b_parallel`."""

    def refresh(self, curvature: Eigenpairs, objective, params, batch, key, damping=None) -> Eigenpairs:
        local = products.matvec(self.product, objective, params, batch)
        return self.of_map(lambda v: jax.lax.pmean(local(v), _AXIS), curvature, key)


def _build(
    name: str,
    momentum: str,
    decay: float,
    base_optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
    batch: Any,
    accumulator_dtype: Any,
    num_iters_to_approx_eigs: int,
    approx_k: int,
    approx_l: int,
    warmup_w: int | None,
    alpha: optax.ScalarOrSchedule,
    learning_rate_clip: float,
    b_call_ese_internally: bool,
    b_parallel: bool,
) -> FosiTransformation:
    period = num_iters_to_approx_eigs
    _checks.positive_int(f"{name}(num_iters_to_approx_eigs)", period)
    if b_parallel and b_call_ese_internally:
        raise ValueError(f"{name}(b_parallel=True) needs b_call_ese_internally=False: call update_ese inside pmap.")
    first = period if warmup_w is None else warmup_w
    estimator = (_PmappedLanczos if b_parallel else Lanczos)(k=approx_k, l=approx_l)
    objective, fixed_batch = Objective.from_loss(loss_fn), batch
    tx = fosi(
        base_optimizer,
        alpha,
        momentum=momentum,
        decay=decay,
        damping=0.0,
        learning_rate_clip=learning_rate_clip,
        l=approx_l,
        accumulator_dtype=accumulator_dtype,
    )
    # the original counts steps from 1: first refresh at step W, then every T
    start = first - 1 if first >= 1 else (first - 1) % period
    schedule = CurvatureSchedule(update_every=period, refresh_every=period, start=start)
    inside = self_contained(tx, estimator, schedule, objective, batch=batch)

    # other members of a chain may be given an `objective=`, `batch=` or `curvature=` that loss_fn does not expect
    def update_with_refresh(updates, state, params=None, **extra):
        return inside.update(updates, state, params, **extra | dict(objective=objective, batch=fixed_batch))

    def update_without_refresh(updates, state, params=None, **extra):
        updates, inner = tx.update(updates, state.inner, params, **extra | dict(curvature=state.curvature))
        return updates, dataclasses.replace(state, count=state.count + 1, inner=inner)

    @jax.jit  # called outside jit, a refresh would compile anew every time
    def refresh(curvature, params, batch, key):
        return estimator.refresh(curvature, objective, params, batch, key)

    def update_ese(params, state, batch=None):
        """Estimates the eigenpairs at `params` on `batch` (default: the batch given at construction)."""
        batch = fixed_batch if batch is None else batch
        key = jax.random.fold_in(state.key, state.count)
        return dataclasses.replace(state, curvature=refresh(state.curvature, params, batch, key))

    update = update_with_refresh if b_call_ese_internally else update_without_refresh
    return FosiTransformation(inside.init, update, update_ese)


def fosi_adam(
    base_optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
    batch: Any,
    decay: float = 0.9,
    accumulator_dtype: Any = None,
    num_iters_to_approx_eigs: int = 100,
    approx_k: int = 5,
    approx_l: int = 0,
    warmup_w: int | None = None,
    alpha: optax.ScalarOrSchedule = 0.1,
    b_call_ese_internally: bool = True,
    b_parallel: bool = False,
) -> FosiTransformation:
    """FOSI over Adam: the Newton part's momentum is an exponential average; the base's rate is never scaled.

    Args:
      base_optimizer: any optax transformation, meant for `optax.adam`.
      loss_fn: `(params, batch) -> scalar`, deterministic.
      batch: the batch on which eigenpairs are estimated.
      decay: share of the Newton part's velocity that a step keeps.
      accumulator_dtype: dtype of that velocity; None is float64 where a parameter is, otherwise float32.
      num_iters_to_approx_eigs: T, steps between refreshes.
      approx_k, approx_l: number of largest and smallest eigenpairs.
      warmup_w: W, the step (counted from 1) of the first refresh; None is T.
      alpha: rate of the Newton part, a number or a schedule.
      b_call_ese_internally: refresh inside `update`; False leaves it to calls of `update_ese`.
      b_parallel: `update_ese` runs inside `pmap` over an axis named "batch" and averages over it.
    """
    return _build("fosi_adam", "ema", decay, base_optimizer, loss_fn, batch, accumulator_dtype,
                  num_iters_to_approx_eigs, approx_k, approx_l, warmup_w, alpha, 1.0, b_call_ese_internally,
                  b_parallel)  # fmt: skip


def fosi_momentum(
    base_optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
    batch: Any,
    decay: float = 0.9,
    accumulator_dtype: Any = None,
    num_iters_to_approx_eigs: int = 100,
    approx_k: int = 5,
    approx_l: int = 0,
    warmup_w: int | None = None,
    alpha: optax.ScalarOrSchedule = 0.1,
    learning_rate_clip: float = 3.0,
    b_call_ese_internally: bool = True,
    b_parallel: bool = False,
) -> FosiTransformation:
    """FOSI over heavy ball. `learning_rate_clip` bounds the scaling of the base's rate; the rest as for `fosi_adam`."""
    return _build("fosi_momentum", "heavy_ball", decay, base_optimizer, loss_fn, batch, accumulator_dtype,
                  num_iters_to_approx_eigs, approx_k, approx_l, warmup_w, alpha, learning_rate_clip,
                  b_call_ese_internally, b_parallel)  # fmt: skip


def fosi_nesterov(
    base_optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
    batch: Any,
    decay: float = 0.9,
    accumulator_dtype: Any = None,
    num_iters_to_approx_eigs: int = 100,
    approx_k: int = 5,
    approx_l: int = 0,
    warmup_w: int | None = None,
    alpha: optax.ScalarOrSchedule = 0.1,
    learning_rate_clip: float = 3.0,
    b_call_ese_internally: bool = True,
    b_parallel: bool = False,
) -> FosiTransformation:
    """FOSI over Nesterov momentum, with the original's recursion. Arguments as for `fosi_momentum`."""
    return _build("fosi_nesterov", "nesterov", decay, base_optimizer, loss_fn, batch, accumulator_dtype,
                  num_iters_to_approx_eigs, approx_k, approx_l, warmup_w, alpha, learning_rate_clip,
                  b_call_ese_internally, b_parallel)  # fmt: skip


def fosi_sgd(
    base_optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
    batch: Any,
    accumulator_dtype: Any = None,
    num_iters_to_approx_eigs: int = 100,
    approx_k: int = 5,
    approx_l: int = 0,
    warmup_w: int | None = None,
    alpha: optax.ScalarOrSchedule = 0.1,
    learning_rate_clip: float = 3.0,
    b_call_ese_internally: bool = True,
    b_parallel: bool = False,
) -> FosiTransformation:
    """FOSI over plain gradient descent: no momentum. Arguments as for `fosi_momentum`."""
    return _build("fosi_sgd", "none", 0.0, base_optimizer, loss_fn, batch, accumulator_dtype,
                  num_iters_to_approx_eigs, approx_k, approx_l, warmup_w, alpha, learning_rate_clip,
                  b_call_ese_internally, b_parallel)  # fmt: skip
