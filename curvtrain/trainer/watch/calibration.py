"""How good predicted probabilities are: what a `Trainer.metrics` returns besides accuracy.

    def metrics(self, outputs, batch):
        return {
            "nll": calibration.negative_log_likelihood(outputs, batch["label"]),
            "brier": calibration.brier_score(outputs, batch["label"]),
            "entropy": calibration.predictive_entropy(outputs),
            "ece": calibration.CalibrationError.of(outputs, batch["label"]),
        }

Outputs are logits, (batch, classes) or (batch, time, classes), and labels integers without the last axis. With
`Trainer(predictive_samples=)` the outputs are the logarithms of averaged probabilities, and nothing else changes.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics

from curvtrain import _checks
from curvtrain._dtypes import wide
from curvtrain.losses import SoftmaxCrossEntropy, weight_like
from curvtrain.objective import safe

BINS = 15


def negative_log_likelihood(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """-log p of the right class, in the shape of the labels; NaN for a label that is no class."""
    return SoftmaxCrossEntropy(weighted_by=()).values(outputs, {"label": labels})


def brier_score(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The squared distance of the probabilities from the right class's one, sum_c (p_c - [c is right])^2, in [0, 2].

    Brier (1950); in the shape of the labels.
    """
    _check_fits("brier_score", outputs, labels)
    p = jax.nn.softmax(wide(outputs))
    return jnp.sum(jnp.square(p - jax.nn.one_hot(labels, p.shape[-1], dtype=p.dtype)), axis=-1)


def predictive_entropy(outputs: jax.Array) -> jax.Array:
    """-sum_c p_c log p_c, in nats: how unsure a prediction is; the outputs' shape without their last axis."""
    log_p = jax.nn.log_softmax(wide(outputs))
    return -jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0.0), axis=-1)


@flax.struct.dataclass
class CalibrationError(clu_metrics.Metric):
    """The expected calibration error: sum over bins of |number right - sum of confidences| / number of examples.

    Guo et al. (2017), arXiv 1706.04599, equation 5: the confidence is the probability of the predicted class, and bins
    ((i - 1) / 15, i / 15] are of one width. Sums per bin add up over batches and devices, so it is that of all examples
    at once.

    Attributes:
      count, confidence, right: (bins,), the weights, confidences and right predictions of the examples in each bin.
    """

    count: jax.Array
    confidence: jax.Array
    right: jax.Array

    @classmethod
    def of(
        cls, outputs: jax.Array, labels: jax.Array, weights: jax.Array | None = None, bins: int = BINS
    ) -> "CalibrationError":
        """Of a batch.

        Args:
          outputs: logits (..., classes).
          labels: (...), integers.
          weights: of examples, their leading axes, such as batch["mask"]; None: all count alike.
          bins: how many.
        """
        _check_fits("CalibrationError.of", outputs, labels)
        _checks.positive_int("CalibrationError.of(bins)", bins)
        p = jax.nn.softmax(wide(outputs))
        confidence, right = jnp.max(p, axis=-1), jnp.argmax(p, axis=-1) == labels
        ones = jnp.ones(labels.shape, p.dtype)
        w = ones if weights is None else ones * weight_like(jnp.asarray(weights).astype(p.dtype), ones)
        place = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
        inside = jax.nn.one_hot(place.ravel(), bins, dtype=p.dtype)
        total = lambda values: jnp.where(w != 0, w * values, 0.0).ravel() @ inside
        return cls(count=total(ones), confidence=total(confidence), right=total(right))

    @classmethod
    def empty(cls) -> "CalibrationError":
        return cls(*(jnp.zeros(BINS) for _ in range(3)))

    def merge(self, other: Any) -> "CalibrationError":
        return jax.tree.map(jnp.add, self, other)

    def compute(self) -> jax.Array:
        return jnp.sum(jnp.abs(self.right - self.confidence)) / safe(jnp.sum(self.count))


def _check_fits(function: str, outputs: Any, labels: Any) -> None:
    """Raises ValueError unless there is a label for each row of outputs."""
    if jnp.shape(labels) != jnp.shape(outputs)[:-1]:
        raise ValueError(
            f"calibration.{function} takes logits (..., classes) and integer labels (...), not outputs of shape "
            f"{jnp.shape(outputs)} and labels of shape {jnp.shape(labels)}."
        )
