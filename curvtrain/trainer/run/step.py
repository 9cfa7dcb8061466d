"""The step programs: pure functions of the training state, compiled ahead of time, one per kind of step.

A step that updates or refreshes the curvature is a program of its own, chosen on the host, so a step that does neither
pays nothing for it. `update` is given the step's gradient, and measures that an estimator takes in backward passes are
taken together with the gradient: a step has one forward pass over each piece of its batch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvtrain._keys import Purpose, fold
from curvtrain.curvature.base import CurvatureEstimator, Estimate
from curvtrain.curvature.request import part_of, requested_damping, requested_part, requests
from curvtrain.losses import weight_like
from curvtrain.objective import Measure, Objective
from curvtrain.trainer.run.extra import extra_args
from curvtrain.trainer.run.sampling import Sampling
from curvtrain.trainer.state import TrainState
from curvtrain.trainer.watch.metrics import Metrics, measure, reduce_pieces, with_penalty

PyTree = Any
MetricsFn = Callable[[Any, Any], Mapping[str, Any]]  # (outputs, batch) -> per-example values
Seen = tuple[Metrics, jax.Array | None]  # (metrics, whether the step was skipped; None where none is)
Evaluated = Callable[[PyTree, PyTree], PyTree]  # (optimizer state, parameters) -> the parameters that are evaluated


@dataclasses.dataclass(frozen=True)
class Kind:
    """The kind of a step: what it does besides the optimizer's update."""

    update: bool = False
    refresh: bool = False

    def __str__(self) -> str:
        extras = [name for name, on in (("update", self.update), ("refresh", self.refresh)) if on]
        return " + ".join(["train", *extras])


def train_step(
    kind: Kind,
    objective: Objective,
    tx: optax.GradientTransformationExtraArgs,
    estimator: CurvatureEstimator | None,
    metrics_fn: MetricsFn,
    ema: float | None,
    refresh_microbatch: int | None,
    update_first: bool,
    skips: bool,
    sampling: Sampling,
) -> Callable[..., tuple[TrainState, Seen]]:
    """The function `(state, batch, curvature_batch) -> (state, (metrics, skipped))` of one kind of step.

    A refresh sees `curvature_batch`, or the training batch where that is None. The metrics are those of the training
    batch before the parameters move. With an optimizer that samples, loss, gradient, metrics, model state and what the
    estimator measures in backward passes are means over draws; what it computes by itself is at the parameters.

    Args:
      kind: whether the step updates and refreshes the curvature.
      objective: the run's objective; its state and its frozen parameters are those of the state.
      tx: the optimizer.
      estimator: maintains the curvature, or None.
      metrics_fn: `(outputs, batch) -> values` of the metrics.
      ema: decay of the average of the parameters, or None.
      refresh_microbatch: examples that a refresh on a curvature batch walks at a time.
      update_first: whether the optimizer is given the curvature after this step's update and refresh, or before.
      skips: whether a step whose loss, gradient or new parameters are not finite leaves all but the count as it was.
      sampling: how parameters are drawn.
    """

    def step(state: TrainState, batch: Any, curvature_batch: Any) -> tuple[TrainState, Seen]:
        here = state.at(objective)
        key = jax.random.fold_in(state.key, state.step)
        noise, refresh_key = fold(key, Purpose.NOISE), fold(key, Purpose.REFRESH)

        asked = requests(state.opt_state)
        part, params = requested_part(asked, here, state.params)  # the curvature is that of this part

        def look(theta, noise):
            absorbs = estimator is not None and kind.update
            of = requested_part(asked, here, theta)
            ride = estimator.measure(state.curvature, *of, batch, noise) if absorbs else None
            return _pass(here, metrics_fn, theta, batch, noise, ride)

        (loss, grads, model_state, measured, penalty), seen, draws = sampling.expect(look, state, key)

        def advance(curvature, opt_state):
            if estimator is not None and kind.update:
                if measured is None:
                    own = part_of(grads, params)
                    curvature = estimator.update(curvature, part, params, batch, noise, grads=own)
                else:
                    curvature = estimator.absorb(curvature, measured, noise)
            if estimator is not None and kind.refresh:
                wide = part if curvature_batch is None else part.with_microbatch(refresh_microbatch)
                data = batch if curvature_batch is None else curvature_batch
                damping = requested_damping(requests(opt_state))
                curvature = estimator.refresh(curvature, wide, params, data, refresh_key, damping=damping)
            return curvature

        curvature = advance(state.curvature, state.opt_state) if update_first else state.curvature

        extra = extra_args(curvature, here, part, batch, noise, loss, grads, draws)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
        moved = optax.apply_updates(state.params, updates)
        if not update_first:
            curvature = advance(curvature, opt_state)
        after = dataclasses.replace(
            state,
            step=state.step + 1,
            params=moved,
            model_state=model_state,
            opt_state=opt_state,
            curvature=curvature,
            ema=None if ema is None else moving_average(state.ema, moved, ema),
            ema_model_state=None if ema is None else moving_average(state.ema_model_state, model_state, ema),
        )
        seen = with_penalty(reduce_pieces(seen), penalty)
        if not skips:
            return after, (seen, None)
        fine = all_finite((loss, grads, moved))
        return _if_fine(fine, after, state), (seen, ~fine)

    return step


def _pass(
    objective: Objective, metrics_fn: MetricsFn, params: PyTree, batch: Any, key: jax.Array, ride: Measure | None
) -> tuple[tuple[Any, ...], Metrics]:
    """((loss, gradient, model state, what rides on the pass, penalty), metrics of the pieces), at some parameters."""
    weights = objective.loss_of_outputs.weights
    observe = lambda outputs, piece: measure(metrics_fn(outputs, piece), weights(outputs, piece))
    loss, grads, model_state, seen, measured = objective.value_grad_and_measure(
        params, batch, key, ride, observe=observe
    )
    return (loss, grads, model_state, measured, _penalty(objective, params)), seen


def _if_fine(fine: jax.Array, after: TrainState, before: TrainState) -> TrainState:
    """The state after a step; if it is not fine, the state before with the count of the step."""
    choose = lambda new, old: new if new is old else jnp.where(fine, new, old)
    return dataclasses.replace(jax.tree.map(choose, after, before), step=after.step)


def all_finite(tree: PyTree) -> jax.Array:
    """Says whether every element of a tree is finite, as a bool ()."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(tree)]))


def _penalty(objective: Objective, params: PyTree) -> jax.Array | None:
    return None if objective.regulariser is None else objective.penalty(params)


def average_of(tree: PyTree) -> PyTree:
    """The average before the first step: a copy, whose floating-point arrays have float32 at least."""
    wide = lambda a: jnp.promote_types(a.dtype, jnp.float32) if _is_float(a) else a.dtype
    return jax.tree.map(lambda a: jnp.array(a, wide(a)), tree)


def moving_average(average: PyTree, new: PyTree, decay: float) -> PyTree:
    """decay * average + (1 - decay) * new, in float32 at least: in bfloat16, 0.999 is 1. The rest (counts) is the new.

    An average that is None stays None.
    """
    if average is None:
        return None
    mean = lambda a, n: decay * a + (1.0 - decay) * n.astype(a.dtype) if _is_float(a) else n
    return jax.tree.map(mean, average, new)


def _is_float(a: Any) -> bool:
    return jnp.issubdtype(a.dtype, jnp.floating)


def eval_step(
    objective: Objective,
    metrics_fn: MetricsFn,
    like: tuple[PyTree, PyTree],
    evaluated: Evaluated | None,
    sampling: Sampling,
) -> Callable[..., Metrics]:
    """The function of the evaluation, with running averages and without dropout.

    It is `(params, opt_state, curvature, frozen, model_state, batch, real, key, index, rows=None) -> metrics`. Padding,
    where the bool (batch,) `real` is false, weighs nothing; the model alone sees it if `rows`, a Python int, says how
    many rows are real: all metrics are then of these, at the price of a program for this number. `key` is the run's,
    and `index` that of the batch: what the model draws at random differs from batch to batch, and is the same in every
    evaluation.

    Args:
      objective: the run's objective.
      metrics_fn: `(outputs, batch) -> values` of the metrics.
      like: (parameters, model state), in whose dtypes those that are given, averages perhaps, are used.
      evaluated: makes what is evaluated of the optimizer's state and the parameters; None where it is these.
      sampling: over which draws around them predictions are averaged.
    """

    def step(params, opt_state, curvature, frozen, model_state, batch, real, key, index, rows=None):
        if evaluated is not None:
            params = evaluated(opt_state, params)
        params, model_state = jax.tree.map(lambda a, p: a.astype(p.dtype), (params, model_state), like)
        here = objective.with_state(model_state).with_frozen(frozen).evaluation()
        own = jax.random.fold_in(fold(key, Purpose.EVALUATION), index)
        outputs = sampling.predict(here, params, opt_state, curvature, batch, key, own)
        if rows is not None:
            cut = lambda a: a[:rows] if a.ndim and len(a) == len(real) else a
            outputs, batch, real = jax.tree.map(cut, (outputs, batch, real))
        weights = here.loss_of_outputs.weights(outputs, batch)
        if len(weights) != len(real):
            raise ValueError(
                f"The loss has values of shape {weights.shape} for {len(real)} examples, so it is not known which of "
                f"them are of the rows that pad a batch: give it one value per example."
            )
        seen = measure(metrics_fn(outputs, batch), jnp.where(weight_like(real, weights), weights, 0.0))
        return with_penalty(seen, _penalty(here, params))

    return step


def telemetry(curvature: Estimate | None) -> dict[str, jax.Array]:
    """The scalars of a curvature that are logged."""
    if curvature is None:
        return {}
    return {f"curvature/{name}": jnp.asarray(value) for name, value in curvature.telemetry().items()}
