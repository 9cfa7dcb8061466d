"""Metrics as (total, weight) pairs, exact under masks, micro-batches, devices and a padded last batch."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics

from curvtrain._dtypes import wide
from curvtrain.losses import weight_like
from curvtrain.objective import safe

Metrics = dict[str, clu_metrics.Metric]


@flax.struct.dataclass
class Mean(clu_metrics.Average):
    """sum_i w_i v_i / sum_i w_i; zero, like the loss of an objective, where every example is masked."""

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array) -> "Mean":
        """The mean of values with weights of their shape; a value of weight zero may be anything."""
        total = jnp.sum(jnp.where(weights != 0, weights * wide(values), 0.0))
        return cls(total=total, count=jnp.sum(weights))

    def compute(self) -> jax.Array:
        return self.total / safe(self.count)


def measure(values: Mapping[str, Any], weights: jax.Array) -> Metrics:
    """Turns the values that `Trainer.metrics` returned for a batch into mergeable metrics.

    Args:
      values: by name, one value per example, shape (batch,) or (batch, time); or a `clu.metrics.Metric`, for a
        quantity that is not a mean over examples.
      weights: of the loss, in the shape of its values. A value per sequence, of a loss per position, has the weight of
        the heaviest position.

    Raises:
      ValueError: a value without a batch axis.
    """
    return {name: _metric(name, value, weights) for name, value in values.items()}


def _metric(name: str, value: Any, weights: jax.Array) -> clu_metrics.Metric:
    if isinstance(value, clu_metrics.Metric):
        return value
    value = jnp.asarray(value)
    if value.ndim == 0:
        raise ValueError(
            f"Trainer.metrics[{name!r}] is a scalar; return one value per example, shape (batch,), so that the mean is "
            f"exact under padding and accumulation, or a clu.metrics.Metric."
        )
    shared = min(value.ndim, weights.ndim)
    if value.shape[:shared] != weights.shape[:shared]:
        raise ValueError(
            f"Trainer.metrics[{name!r}] has shape {value.shape} for a batch of {len(weights)} examples, whose losses "
            f"have shape {weights.shape}; return one value per example."
        )
    weights = jnp.max(weights, axis=tuple(range(shared, weights.ndim)))
    return Mean.of(value, jnp.broadcast_to(weight_like(weights, value), value.shape))


def counts_rows(metrics: Metrics) -> bool:
    """Says whether some metrics are of classes that count every row that they are given, padding included."""
    return any(not isinstance(metric, Mean) for metric in metrics.values())


def with_penalty(metrics: Metrics, penalty: jax.Array | None) -> Metrics:
    """The metrics with a penalty in every example's loss, and by itself; None adds nothing."""
    if penalty is None:
        return metrics
    loss: Any = metrics["loss"]
    alone = Mean(total=penalty * loss.count, count=loss.count)
    return {**metrics, "loss": Mean(total=loss.total + alone.total, count=loss.count), "penalty": alone}


def merge(first: Metrics | None, second: Metrics) -> Metrics:
    """The metrics of two sets of examples, from those of each."""
    return second if first is None else {name: metric.merge(second[name]) for name, metric in first.items()}


def reduce_pieces(stacked: Metrics) -> Metrics:
    """The metrics of a batch, from those of its micro-batches stacked along a leading axis."""
    return {name: metric.reduce() for name, metric in stacked.items()}


def compute(metrics: Metrics | None) -> dict[str, float]:
    """Plain numbers by name. Raises ValueError for a `clu.metrics.Metric` that is not a number."""
    return {name: _number(name, metric.compute()) for name, metric in (metrics or {}).items()}


def _number(name: str, value: Any) -> float:
    if jnp.shape(value) != ():
        raise ValueError(f"Trainer.metrics[{name!r}] computes an array of shape {jnp.shape(value)}, not a number.")
    return float(jax.device_get(value))
