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

from curvtrain.curvature.base import CurvatureEstimator, Estimate
from curvtrain.curvature.request import part_of, requested_damping, requested_part, requests
from curvtrain.objective import Objective
from curvtrain.trainer.state import TrainState
from curvtrain.trainer.watch.metrics import Metrics, measure, reduce_pieces

PyTree = Any
MetricsFn = Callable[[Any, Any], Mapping[str, Any]]  # (outputs, batch) -> per-example values


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
    update_first: bool = True,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The function `(state, batch, curvature_batch) -> (state, metrics)` of one kind of step.

    A refresh sees `curvature_batch`, or the training batch where that is None. The metrics are those of the training
    batch before the parameters move.

    Args:
      kind: whether the step updates and refreshes the curvature.
      objective: the run's objective; its state and its frozen parameters are those of the state.
      tx: the optimizer.
      estimator: maintains the curvature, or None.
      metrics_fn: `(outputs, batch) -> values` of the metrics.
      ema: decay of the average of the parameters, or None.
      refresh_microbatch: examples that a refresh on a curvature batch walks at a time.
      update_first: whether the optimizer is given the curvature after this step's update and refresh, or before.
    """

    def step(state: TrainState, batch: Any, curvature_batch: Any) -> tuple[TrainState, Metrics]:
        here = state.at(objective)
        key = jax.random.fold_in(state.key, state.step)
        noise, refresh_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)

        asked = requests(state.opt_state)
        part, params = requested_part(asked, here, state.params)  # the curvature is that of this part
        updates_curvature = estimator is not None and kind.update
        ride = estimator.measure(state.curvature, part, params, batch, noise) if updates_curvature else None
        observe = lambda outputs, piece: measure(metrics_fn(outputs, piece), piece)
        loss, grads, model_state, seen, measured = here.value_grad_and_measure(
            state.params, batch, noise, ride, observe=observe
        )

        def advance(curvature, opt_state):
            if estimator is not None and kind.update:
                if ride is None:
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

        extra = _extra_args(curvature, here, part, batch, noise, loss, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
        moved = optax.apply_updates(state.params, updates)
        if not update_first:
            curvature = advance(curvature, opt_state)
        average = None if ema is None else moving_average(state.ema, moved, ema)
        after = dataclasses.replace(
            state,
            step=state.step + 1,
            params=moved,
            model_state=model_state,
            opt_state=opt_state,
            curvature=curvature,
            ema=average,
        )
        return after, reduce_pieces(seen)

    return step


def _extra_args(
    curvature: Any, objective: Objective, part: Objective, batch: Any, key: jax.Array, loss: jax.Array, grads: PyTree
) -> dict[str, Any]:
    """The extra arguments of an optimizer's update; `part` is the objective of the parameters that it asks about."""

    # optax's line searches pass the other extra arguments on to value_fn, and reject those that it does not name
    def value_fn(params, *, batch=batch, key=key, objective=objective, curvature=None):
        return objective.loss(params, batch, key)

    return {
        "curvature": curvature,
        "objective": part,
        "batch": batch,
        "key": key,
        "value": loss,
        "grad": grads,
        "value_fn": value_fn,
    }


def moving_average(average: PyTree, params: PyTree, decay: float) -> PyTree:
    """decay * average + (1 - decay) * params, in the average's dtype, float32 at least: in bfloat16, 0.999 is 1."""
    return jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p.astype(a.dtype), average, params)


def eval_step(
    objective: Objective, metrics_fn: MetricsFn, like: PyTree
) -> Callable[[PyTree, PyTree, PyTree, Any], Metrics]:
    """The function `(params, frozen, model_state, batch) -> metrics` with running averages and without dropout.

    The parameters (an average of them, perhaps) are used in the dtypes of `like`.
    """

    def step(params, frozen, model_state, batch):
        params = jax.tree.map(lambda a, p: a.astype(p.dtype), params, like)
        here = objective.with_state(model_state).with_frozen(frozen).evaluation()
        outputs = here.predict(params, batch)
        return measure(metrics_fn(outputs, batch), batch)

    return step


def telemetry(curvature: Estimate | None) -> dict[str, jax.Array]:
    """The scalars of a curvature that are logged."""
    if curvature is None:
        return {}
    return {f"curvature/{name}": jnp.asarray(value) for name, value in curvature.telemetry().items()}
