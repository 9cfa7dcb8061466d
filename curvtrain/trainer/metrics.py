"""Metrics as (total, weight) pairs, exact under masks, micro-batches, devices and a padded last batch."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics

from curvtrain.losses import example_weights

Metrics = dict[str, clu_metrics.Metric]


def measure(values: Mapping[str, Any], batch: Any) -> Metrics:
    """Turns what `Trainer.metrics` returned for a batch into mergeable metrics.

    Args:
      values: by name, one value per example, shape (batch,) or (batch, time); or a `clu.metrics.Metric`, for what is
        not a mean over examples.
      batch: its `mask` and `weights` weight the means.

    Raises:
      TypeError, ValueError: another kind of value, or a shape without a batch axis.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"Trainer.metrics should return a dict of per-example values, not {type(values).__name__}.")
    return {name: _metric(name, value, batch) for name, value in values.items()}


def _metric(name: str, value: Any, batch: Any) -> clu_metrics.Metric:
    if isinstance(value, clu_metrics.Metric):
        return value
    value = jnp.asarray(value)
    if value.ndim == 0:
        raise ValueError(
            f"Trainer.metrics[{name!r}] is a scalar; return one value per example, shape (batch,), so that the mean is "
            f"exact under padding and accumulation, or a clu.metrics.Metric."
        )
    weights = example_weights(batch, value.shape)
    total = jnp.sum(jnp.where(weights > 0, weights * value.astype(jnp.float32), 0.0))
    return clu_metrics.Average(total=total, count=jnp.sum(weights))


def merge(first: Metrics | None, second: Metrics) -> Metrics:
    """The metrics of two sets of examples, from those of each."""
    return second if first is None else {name: metric.merge(second[name]) for name, metric in first.items()}


def reduce_pieces(stacked: Metrics) -> Metrics:
    """The metrics of a batch, from those of its micro-batches stacked along a leading axis."""
    return {name: metric.reduce() for name, metric in stacked.items()}


def compute(metrics: Metrics | None) -> dict[str, float]:
    """Plain numbers by name."""
    return {} if metrics is None else {name: float(jax.device_get(m.compute())) for name, m in metrics.items()}
