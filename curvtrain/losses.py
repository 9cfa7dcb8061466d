"""Losses that know more than their value: output-space curvature, the model's own distribution, host-side checks.

A loss sees `outputs` (what `predict` returned) and the `batch` (a dict), and gives one value per *example*.
For `SoftmaxCrossEntropy` every label is an example, so a sequence model with outputs (batch, time, classes) and
labels (batch, time) averages over tokens. `SquaredError` and `SigmoidCrossEntropy` sum over the outputs of an
example: everything but the batch axis, or everything but batch and time with `sequence=True`.

The entries `mask` (bool or 0/1) and `weights` (float) of a batch are honoured by every loss: shape (batch,), or the
shape of the values. The mean is sum(weights * values) / sum(weights). An example of weight zero may hold anything in
its targets and outputs, NaN included; its inputs should be finite, for a model's derivatives multiply them by zero.

Symbols: z the outputs of one example, t its target, l(z, t) its value, p the probabilities that z stands for.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvtrain._dtypes import FLOAT32, wide, width
from curvtrain._outputs import floats, with_floats

Batch = Mapping[str, Any]

RESERVED = ("mask", "weights")  # the entries of a batch that weight its examples


def example_weights(batch: Any, shape: tuple[int, ...], dtype: Any = FLOAT32) -> jax.Array:
    """The weight of each example, from the batch's `mask` and `weights` entries.

    Args:
      batch: anything; only a mapping can carry weights.
      shape: the shape of the per-example values, (batch,) or (batch, time).
      dtype: that of the values.

    Returns:
      An array of that shape and dtype; ones where the batch carries no weights.

    Raises:
      ValueError: an entry's shape is not a prefix of `shape`.
    """
    weights = jnp.ones(shape, dtype)
    for name in RESERVED:
        if not isinstance(batch, Mapping) or name not in batch:
            continue
        entry = jnp.asarray(batch[name])
        if entry.shape != shape[: entry.ndim]:
            raise ValueError(
                f"batch[{name!r}] has shape {entry.shape}, but the per-example values have shape {shape}: pass one "
                f"weight per example, shape {shape[:1]} or {shape} (a mask over time needs a loss with one value per "
                f"position: integer labels of shape (batch, time), or sequence=True)."
            )
        weights = weights * entry.astype(dtype).reshape(entry.shape + (1,) * (len(shape) - entry.ndim))
    return weights


def weight_like(weights: jax.Array, outputs: jax.Array) -> jax.Array:
    """Per-example weights, shaped to multiply outputs whose leading axes are the examples."""
    return weights.reshape(weights.shape + (1,) * (outputs.ndim - weights.ndim))


def unmasked(outputs: Any, weights: jax.Array) -> Any:
    """The outputs, zero where their example's weight is: this cuts masked examples out of every derivative."""

    def leaf(z):
        per_example = z.shape[: weights.ndim] == weights.shape
        return jnp.where(weight_like(weights != 0, z), z, 0) if per_example else z

    return jax.tree.map(leaf, outputs)


class Loss(abc.ABC):
    """A per-example loss of the outputs. A subclass needs `values` alone; the rest has defaults."""

    @abc.abstractmethod
    def values(self, outputs: Any, batch: Batch) -> jax.Array:
        """The loss of each example, unweighted: (batch,) or (batch, time), float64 if the outputs are, or float32."""

    def weights(self, outputs: Any, batch: Batch) -> jax.Array:
        """The weight of each example, in the shape of `values`."""
        values = jax.eval_shape(self.values, outputs, batch)
        return example_weights(batch, values.shape, width(values))

    def hessian_product(self, outputs: Any, batch: Batch, tangent: Any) -> Any:
        """H_l times `tangent`, per example and times its weight; the Hessian is taken in output space.

        Shapes: `outputs`, `tangent` and the result are alike; leaves that are not floating-point numbers are neither
        read in the tangent nor changed in the result. It is the jvp of the gradient, exact for any loss whose example
        i depends on the outputs of example i alone.
        """
        weights = self.weights(outputs, batch)
        total = lambda z: jnp.sum(weights * self.values(unmasked(with_floats(outputs, z), weights), batch))
        return with_floats(outputs, jax.jvp(jax.grad(total), (floats(outputs),), (floats(tangent),))[1])

    def hessian_columns(self, outputs: jax.Array) -> jax.Array:
        """S with sum_c S[c] S[c]^T = H_l for each example, shape (columns, *outputs.shape); unweighted."""
        raise TypeError(f"{type(self).__name__} has no closed factor of its output-space Hessian.")

    def sample_targets(self, outputs: Any, batch: Batch, key: jax.Array) -> Batch:
        """The batch with its targets drawn from the model's own distribution p(t | outputs)."""
        raise TypeError(
            f"{type(self).__name__} cannot be sampled: it defines no distribution over targets. Use fisher='exact', "
            f"fisher='empirical', or a loss of curvtrain.losses."
        )

    def metrics(self, outputs: Any, batch: Batch) -> dict[str, jax.Array]:
        """What a Trainer reports by default: one value per example under each name."""
        return {"loss": self.values(outputs, batch)}

    def check(self, batch: Mapping[str, np.ndarray], outputs: Any) -> None:  # noqa: B027 - a default, not abstract
        """Looks once, on the host, at targets as numpy arrays; `outputs` are shapes. Raises ValueError or TypeError."""


def _entry(batch: Any, key: str, option: str) -> Any:
    if not isinstance(batch, Mapping) or key not in batch:
        have = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise KeyError(f"{option}={key!r} is not in the batch, which has {have}.")
    return batch[key]


@dataclasses.dataclass(frozen=True)
class SoftmaxCrossEntropy(Loss):
    """-log softmax(z)[t] for integer labels t in [0, classes).

    Outputs (..., classes), labels (...): every label is an example. The Hessian is diag(p) - p p^T, which is also the
    Fisher information of the categorical distribution (so GGN = Fisher).
    """

    labels: str = "label"

    def values(self, outputs, batch):
        labels = jnp.asarray(_entry(batch, self.labels, "SoftmaxCrossEntropy(labels)"))
        if labels.shape != outputs.shape[:-1]:
            raise ValueError(
                f"SoftmaxCrossEntropy(labels={self.labels!r}) needs labels of shape {outputs.shape[:-1]} for outputs "
                f"of shape {outputs.shape}, not {labels.shape}."
            )
        log_p = jax.nn.log_softmax(wide(outputs))
        return -jnp.take_along_axis(log_p, labels[..., None].astype(jnp.int32), axis=-1)[..., 0]

    def hessian_columns(self, outputs):
        p = jax.nn.softmax(wide(outputs))
        # S_c = sqrt(p_c) (e_c - p): sum_c p_c (e_c - p)(e_c - p)^T = diag(p) - p p^T
        unit = jnp.expand_dims(jnp.eye(outputs.shape[-1], dtype=p.dtype), tuple(range(1, outputs.ndim)))
        root = jnp.moveaxis(jnp.sqrt(p), -1, 0)[..., None]
        return root * (unit - p[None])

    def sample_targets(self, outputs, batch, key):
        labels = jax.random.categorical(key, wide(outputs))
        return {**batch, self.labels: labels.astype(jnp.int32)}

    def metrics(self, outputs, batch):
        correct = jnp.argmax(outputs, axis=-1) == batch[self.labels]
        return {"loss": self.values(outputs, batch), "accuracy": correct.astype(jnp.float32)}

    def check(self, batch, outputs):
        labels = np.asarray(_entry(batch, self.labels, "SoftmaxCrossEntropy(labels)"))
        if not np.issubdtype(labels.dtype, np.integer):
            raise TypeError(
                f"SoftmaxCrossEntropy(labels={self.labels!r}) needs integer class labels, not {labels.dtype}: for "
                f"one-hot labels pass labels.argmax(-1); for probabilities use SigmoidCrossEntropy or your own Loss."
            )
        classes = outputs.shape[-1]
        low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
        if low < 0 or high >= classes:
            raise ValueError(
                f"SoftmaxCrossEntropy(labels={self.labels!r}): labels run from {low} to {high}, but the model has "
                f"{classes} outputs, so they should lie in [0, {classes - 1}]. Mask padding with batch['mask'] and "
                f"give it a valid label."
            )


@dataclasses.dataclass(frozen=True)
class _Elementwise(Loss):
    """What squared error and sigmoid cross-entropy share: a sum over the outputs of an example."""

    def _sum(self, elements: jax.Array, sequence: bool) -> jax.Array:
        kept = 2 if sequence else 1
        if elements.ndim < kept:
            raise ValueError(f"sequence=True needs outputs (batch, time, ...), not shape {elements.shape}.")
        return jnp.sum(elements, axis=tuple(range(kept, elements.ndim)))

    def _columns(self, root: jax.Array, sequence: bool) -> jax.Array:
        """diag(root)^(per example) as columns: (features, *outputs.shape)."""
        kept = 2 if sequence else 1
        event = root.shape[kept:]
        unit = jnp.eye(int(np.prod(event)), dtype=root.dtype).reshape((-1,) + (1,) * kept + event)
        return unit * root[None]

    def _matching(self, outputs: jax.Array, batch: Batch, key: str, option: str) -> jax.Array:
        targets = jnp.asarray(_entry(batch, key, option))
        if targets.shape != outputs.shape:
            raise ValueError(f"{option}={key!r} has shape {targets.shape}, but the outputs have {outputs.shape}.")
        return targets.astype(width(outputs))

    def _check_real(self, batch: Mapping[str, np.ndarray], key: str, option: str) -> np.ndarray:
        targets = np.asarray(_entry(batch, key, option))
        if not any(jnp.issubdtype(targets.dtype, kind) for kind in (np.bool_, np.integer, np.floating)):
            raise TypeError(f"{option}={key!r} should hold real numbers, not {targets.dtype}.")
        if not np.all(np.isfinite(targets)):
            raise ValueError(f"{option}={key!r} holds values that are not finite.")
        return targets


@dataclasses.dataclass(frozen=True)
class SquaredError(_Elementwise):
    """1/2 |z - t|^2 summed over the outputs of an example: the unit-variance Gaussian, so H_l = I and GGN = Fisher.

    Outputs and targets (batch, ...); with `sequence=True` (batch, time, ...), where every position is an example.
    """

    targets: str = "target"
    sequence: bool = False

    def values(self, outputs, batch):
        targets = self._matching(outputs, batch, self.targets, "SquaredError(targets)")
        return self._sum(0.5 * jnp.square(wide(outputs) - targets), self.sequence)

    def hessian_columns(self, outputs):
        return self._columns(jnp.ones(outputs.shape, width(outputs)), self.sequence)

    def sample_targets(self, outputs, batch, key):
        mean = wide(outputs)
        return {**batch, self.targets: mean + jax.random.normal(key, mean.shape, mean.dtype)}

    def check(self, batch, outputs):
        self._check_real(batch, self.targets, "SquaredError(targets)")


@dataclasses.dataclass(frozen=True)
class SigmoidCrossEntropy(_Elementwise):
    """-t log p - (1 - t) log(1 - p) with p = sigmoid(z), summed over the outputs of an example; t in [0, 1].

    Outputs and labels (batch, ...); with `sequence=True` (batch, time, ...), where every position is an example.
    H_l = diag(p (1 - p)), the Fisher information of independent Bernoulli outputs.
    """

    labels: str = "label"
    sequence: bool = False

    def values(self, outputs, batch):
        t = self._matching(outputs, batch, self.labels, "SigmoidCrossEntropy(labels)")
        z = wide(outputs)
        return self._sum(jax.nn.softplus(z) - t * z, self.sequence)

    def hessian_columns(self, outputs):
        p = jax.nn.sigmoid(wide(outputs))
        return self._columns(jnp.sqrt(p * (1 - p)), self.sequence)

    def sample_targets(self, outputs, batch, key):
        p = jax.nn.sigmoid(wide(outputs))
        return {**batch, self.labels: jax.random.bernoulli(key, p).astype(p.dtype)}

    def check(self, batch, outputs):
        labels = self._check_real(batch, self.labels, "SigmoidCrossEntropy(labels)")
        if labels.size and (labels.min() < 0 or labels.max() > 1):
            raise ValueError(
                f"SigmoidCrossEntropy(labels={self.labels!r}): labels run from {labels.min()} to {labels.max()}, but "
                f"they are probabilities and should lie in [0, 1]."
            )


@dataclasses.dataclass(frozen=True)
class PerExample(Loss):
    """Any function `(outputs, batch) -> values` of shape (batch,) or (batch, time) as a loss.

    Hessian and GGN products work (by differentiation); sampled Fisher does not, for want of a distribution.
    """

    function: Callable[[Any, Batch], jax.Array]

    def values(self, outputs, batch):
        return wide(self.function(outputs, batch))
