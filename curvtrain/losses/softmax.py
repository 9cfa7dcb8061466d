"""Cross-entropy of classes."""

import dataclasses
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from curvtrain._dtypes import wide
from curvtrain.losses.base import Loss, one_array
from curvtrain.losses.masking import one_or_nan
from curvtrain.losses.weighing import KnownWeights, checked_names, entry_of, times

_ROUNDING = 1e-2  # how far probabilities may be from adding up to one: bfloat16 has eight bits


@dataclasses.dataclass(frozen=True)
class SoftmaxCrossEntropy(Loss):
    """-log softmax(z)[t] for integer labels t in [0, classes), or -sum_c t_c log softmax(z)_c for probabilities t.

    Outputs (..., classes), labels (...): every label is an example. Labels that are floating-point and have the shape
    of the outputs are probabilities, which add up to one. The Hessian is diag(p) - p p^T for both, which is also the
    Fisher information of the categorical distribution (so GGN = Fisher).

    Attributes:
      labels: the batch's entry of labels.
      ignore_index: a label, often -100, -1 or that of padding; examples that have it weigh zero. None for none.
      weighted_by: the entries that weight the examples, see the package.

    Raises:
      TypeError: an argument of the wrong type.
    """

    labels: str = "label"
    _: dataclasses.KW_ONLY
    ignore_index: int | None = None
    weighted_by: str | tuple[str, ...] | None = None

    hessian_is_fisher = True

    def __post_init__(self):
        object.__setattr__(self, "weighted_by", checked_names(f"{self._name}(weighted_by)", self.weighted_by))
        index = self.ignore_index
        if index is not None and (not isinstance(index, numbers.Integral) or isinstance(index, bool)):
            raise TypeError(f"{self._name}(ignore_index) should be an integer label or None, not {index!r}.")

    @property
    def targets_read(self):
        return (self.labels,)

    def known_weights(self, batch):
        known = super().known_weights(batch)
        if self.ignore_index is None:
            return known
        labels = self._labels(batch)
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            return known
        kept = (labels.astype(jnp.int32) != self.ignore_index).astype(jnp.float32)
        return KnownWeights(times(known.mask, kept), known.scale)

    def values(self, outputs, batch):
        z = wide(one_array(self, outputs))
        labels, classes = self._labels(batch), z.shape[-1]
        log_p = jax.nn.log_softmax(z)
        if _are_probabilities(labels, z):
            t = labels.astype(z.dtype)
            right = jnp.all(t >= 0, axis=-1) & (jnp.abs(jnp.sum(t, axis=-1) - 1) < _ROUNDING)
            # where, not a product: a class that the model rules out has log p = -inf
            return -jnp.sum(jnp.where(t != 0, t * log_p, 0.0), axis=-1) * one_or_nan(right, z.dtype)
        if labels.shape != z.shape[:-1]:
            raise ValueError(
                f"{self._name}(labels={self.labels!r}) needs labels of shape {z.shape[:-1]} for outputs of shape "
                f"{z.shape}, not {labels.shape}; floating-point labels of shape {z.shape} are probabilities."
            )
        if not any(jnp.issubdtype(labels.dtype, kind) for kind in (np.integer, np.bool_)):
            raise self._no_classes(labels, classes)
        labels = labels.astype(jnp.int32)
        known = (labels >= 0) & (labels < classes)
        value = -jnp.take_along_axis(log_p, jnp.where(known, labels, 0)[..., None], axis=-1)[..., 0]
        # A class that is ignored keeps its value, which targets drawn from the model need; its weight is zero.
        if self.ignore_index is None:
            return value * one_or_nan(known, z.dtype)
        ignored = labels == self.ignore_index
        return jnp.where(ignored & ~known, 0.0, value) * one_or_nan(known | ignored, z.dtype)

    def hessian_columns(self, outputs):
        p = jax.nn.softmax(wide(one_array(self, outputs)))
        # S_c = sqrt(p_c) (e_c - p): sum_c p_c (e_c - p)(e_c - p)^T = diag(p) - p p^T
        unit = jnp.expand_dims(jnp.eye(outputs.shape[-1], dtype=p.dtype), tuple(range(1, outputs.ndim)))
        root = jnp.moveaxis(jnp.sqrt(p), -1, 0)[..., None]
        return root * (unit - p[None])

    def sample_targets(self, outputs, batch, key):
        drawn = jax.random.categorical(key, wide(one_array(self, outputs))).astype(jnp.int32)
        if self.ignore_index is not None and self._labels(batch).shape == drawn.shape:
            ignored = self._labels(batch).astype(jnp.int32) == self.ignore_index
            drawn = jnp.where(ignored, self.ignore_index, drawn)
        return {**batch, self.labels: drawn}

    def average(self, stacked):
        """The logarithms of the mean probabilities."""
        log_p = jax.nn.log_softmax(wide(one_array(self, stacked)))
        return jax.nn.logsumexp(log_p, axis=0) - jnp.log(float(len(log_p)))

    def metrics(self, outputs, batch):
        labels = self._labels(batch)
        right = jnp.argmax(labels, axis=-1) if _are_probabilities(labels, outputs) else labels
        correct = jnp.argmax(outputs, axis=-1) == right
        return {"loss": self.values(outputs, batch), "accuracy": correct.astype(jnp.float32)}

    def check(self, batch, outputs):
        labels = np.asarray(entry_of(batch, self.labels, f"{self._name}(labels)"))
        classes = one_array(self, outputs).shape[-1]
        if _are_probabilities(labels, outputs):
            self._check_probabilities(labels, batch)
            return
        if not np.issubdtype(labels.dtype, np.integer):
            raise self._no_classes(labels, classes)
        if _within(labels, classes):
            return
        counted = self.counted(batch, labels.shape)
        labels = labels[counted if self.ignore_index is None else counted & (labels != self.ignore_index)]
        if not _within(labels, classes):
            low, high = int(labels.min()), int(labels.max())
            pad = low if low < 0 else high
            raise ValueError(
                f"{self._name}(labels={self.labels!r}): labels run from {low} to {high}, but the model has {classes} "
                f"outputs, so they should lie in [0, {classes - 1}]. If {pad} stands for padding, pass "
                f"ignore_index={pad}, or mask it with batch['mask']: labels of masked examples may be anything."
            )

    def _labels(self, batch):
        return jnp.asarray(entry_of(batch, self.labels, f"{self._name}(labels)"))

    def _no_classes(self, labels, classes) -> TypeError:
        return TypeError(
            f"{self._name}(labels={self.labels!r}) needs integer class labels, not {labels.dtype}: for one-hot labels "
            f"pass labels.argmax(-1); probabilities have the shape of the outputs, (..., {classes}), and those of "
            f"independent classes are for SigmoidCrossEntropy."
        )

    def _check_probabilities(self, t, batch):
        t = t[self.counted(batch, t.shape[:-1])].astype(np.float64)
        right = np.all(t >= 0, axis=-1) & (np.abs(t.sum(-1) - 1) < _ROUNDING)
        if not np.all(right):
            odd = t[~right][0]
            raise ValueError(
                f"{self._name}(labels={self.labels!r}): labels in the shape of the outputs are probabilities, of zero "
                f"or more, which add up to 1 over the classes; those of one example add up to {odd.sum():.6g}, and the "
                f"least of them is {odd.min():.6g}."
            )


def _are_probabilities(labels, outputs) -> bool:
    """Says whether labels are probabilities of the classes, of as many examples or of others."""
    return (
        jnp.issubdtype(labels.dtype, jnp.floating)
        and labels.ndim == len(outputs.shape)
        and labels.shape[1:] == outputs.shape[1:]
    )


def _within(labels: np.ndarray, classes: int) -> bool:
    return not labels.size or (labels.min() >= 0 and labels.max() < classes)
