"""Losses that are sums over the outputs of an example."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvtrain._dtypes import wide, width
from curvtrain.losses.base import Batch, Loss, one_array
from curvtrain.losses.masking import one_or_nan
from curvtrain.losses.weighing import checked_names, entry_of, is_mask, valid_values


@dataclasses.dataclass(frozen=True)
class Elementwise(Loss):
    """What squared error and sigmoid cross-entropy share: a sum over the outputs of an example.

    A mask in the shape of the outputs leaves single outputs out of the sum; an example of which none is left weighs
    zero, any other one.
    """

    def __post_init__(self):
        object.__setattr__(self, "weighted_by", checked_names(f"{self._name}(weighted_by)", self.weighted_by))

    @property
    @abc.abstractmethod
    def _kept(self) -> int:
        """How many leading axes count examples."""

    @property
    @abc.abstractmethod
    def _target(self) -> tuple[str, str]:
        """(the option that names the entry of targets, the entry)."""

    @property
    def targets_read(self):
        return self._target[1:]

    def _masks_outputs(self, name, entry, outputs):
        clear = self.weighted_by is not None or entry.dtype == np.bool_ or entry.ndim <= 2
        alike = hasattr(outputs, "shape") and entry.shape == outputs.shape
        return is_mask(name, entry) and alike and entry.ndim > self._kept and clear

    def _of_examples(self, name, entry):
        return jnp.max(entry, axis=tuple(range(self._kept, entry.ndim))) if entry.ndim > self._kept else entry

    def columns_for(self, outputs, batch):
        S, mask = self.hessian_columns(outputs), self._output_mask(outputs, batch)
        return S if mask is None else S * mask

    # -- for subclasses ------------------------------------------------------------------------------------------------

    def _sum(self, element: Any, outputs: jax.Array, batch: Batch) -> jax.Array:
        """The sum of element(z, t) over the outputs of each example."""
        z, t = wide(one_array(self, outputs)), self._targets(outputs, batch)
        if z.ndim < self._kept:
            raise ValueError(f"sequence=True needs outputs (batch, time, ...), not shape {z.shape}.")
        mask = self._output_mask(outputs, batch)
        if mask is not None:  # zeros go in, too: 0 * NaN is not 0
            z, t = jnp.where(mask != 0, z, 0.0), jnp.where(mask != 0, t, 0.0)
        elements = element(z, t) if mask is None else mask * element(z, t)
        return jnp.sum(elements, axis=tuple(range(self._kept, z.ndim)))

    def _columns(self, root: jax.Array) -> jax.Array:
        """diag(root)^(per example) as columns: (features, *outputs.shape)."""
        event = root.shape[self._kept :]
        unit = jnp.eye(int(np.prod(event)), dtype=root.dtype).reshape((-1,) + (1,) * self._kept + event)
        return unit * root[None]

    def _check_targets(self, batch: Mapping[str, np.ndarray], outputs: Any) -> np.ndarray:
        """The targets. Raises TypeError or ValueError unless those that count are finite real numbers."""
        option, key = self._target
        targets = np.asarray(entry_of(batch, key, option))
        if not any(jnp.issubdtype(targets.dtype, kind) for kind in (np.bool_, np.integer, np.floating)):
            raise TypeError(f"{option}={key!r} should hold real numbers, not {targets.dtype}.")
        with np.errstate(all="ignore"):
            if np.isfinite(targets.sum()):  # the fast way: then all of them are
                return targets
        if not np.all(np.isfinite(targets[self.counted(batch, targets.shape)])):
            raise ValueError(
                f"{option}={key!r} holds values that are not finite. Mask them with batch['mask']: targets of masked "
                f"examples may be anything."
            )
        return targets

    # -- inside --------------------------------------------------------------------------------------------------------

    def _targets(self, outputs, batch):
        option, key = self._target
        targets = jnp.asarray(entry_of(batch, key, option))
        if targets.shape != outputs.shape:
            raise ValueError(f"{option}={key!r} has shape {targets.shape}, but the outputs have {outputs.shape}.")
        return targets.astype(width(outputs))

    def _output_mask(self, outputs, batch):
        """The product of the masks of single outputs, in their shape and width; None if there are none."""
        masks = [
            valid_values(name, entry)
            for name, entry in self._entries(batch).items()
            if self._masks_outputs(name, entry, outputs)
        ]
        return None if not masks else jnp.prod(jnp.stack(masks), axis=0).astype(width(outputs))


@dataclasses.dataclass(frozen=True)
class SquaredError(Elementwise):
    """1/2 |z - t|^2 summed over the outputs of an example: the unit-variance Gaussian, so H_l = I and GGN = Fisher.

    Outputs and targets (batch, ...); with `sequence=True` (batch, time, ...), where every position is an example.

    Attributes:
      targets: the batch's entry of targets.
      sequence: whether the second axis counts examples, too.
      weighted_by: the entries that weight the examples, see the package.
    """

    targets: str = "target"
    sequence: bool = False
    _: dataclasses.KW_ONLY
    weighted_by: str | tuple[str, ...] | None = None

    hessian_is_fisher = True

    @property
    def _kept(self):
        return 2 if self.sequence else 1

    @property
    def _target(self):
        return f"{self._name}(targets)", self.targets

    def values(self, outputs, batch):
        return self._sum(lambda z, t: 0.5 * jnp.square(z - t), outputs, batch)

    def hessian_columns(self, outputs):
        return self._columns(jnp.ones(one_array(self, outputs).shape, width(outputs)))

    def sample_targets(self, outputs, batch, key):
        mean = wide(one_array(self, outputs))
        return {**batch, self.targets: mean + jax.random.normal(key, mean.shape, mean.dtype)}

    def average(self, stacked):
        """The mean output."""
        return jnp.mean(wide(one_array(self, stacked)), axis=0)

    def check(self, batch, outputs):
        self._check_targets(batch, outputs)


@dataclasses.dataclass(frozen=True)
class SigmoidCrossEntropy(Elementwise):
    """-t log p - (1 - t) log(1 - p) with p = sigmoid(z), summed over the outputs of an example; t in [0, 1].

    Outputs and labels (batch, ...); with `sequence=True` (batch, time, ...), where every position is an example.
    H_l = diag(p (1 - p)), the Fisher information of independent Bernoulli outputs.

    Attributes:
      labels: the batch's entry of labels.
      sequence: whether the second axis counts examples, too.
      weighted_by: the entries that weight the examples, see the package.
    """

    labels: str = "label"
    sequence: bool = False
    _: dataclasses.KW_ONLY
    weighted_by: str | tuple[str, ...] | None = None

    hessian_is_fisher = True

    @property
    def _kept(self):
        return 2 if self.sequence else 1

    @property
    def _target(self):
        return f"{self._name}(labels)", self.labels

    def values(self, outputs, batch):
        def element(z, t):
            return (jax.nn.softplus(z) - t * z) * one_or_nan((t >= 0) & (t <= 1), z.dtype)

        return self._sum(element, outputs, batch)

    def hessian_columns(self, outputs):
        p = jax.nn.sigmoid(wide(one_array(self, outputs)))
        return self._columns(jnp.sqrt(p * (1 - p)))

    def sample_targets(self, outputs, batch, key):
        p = jax.nn.sigmoid(wide(one_array(self, outputs)))
        return {**batch, self.labels: jax.random.bernoulli(key, p).astype(p.dtype)}

    def average(self, stacked):
        """The log odds of the mean probabilities."""
        z = wide(one_array(self, stacked))
        mean = lambda log_p: jax.nn.logsumexp(log_p, axis=0)
        return mean(jax.nn.log_sigmoid(z)) - mean(jax.nn.log_sigmoid(-z))

    def check(self, batch, outputs):
        within = lambda t: not t.size or (t.min() >= 0 and t.max() <= 1)
        labels = self._check_targets(batch, outputs)
        if within(labels):
            return
        labels = labels[self.counted(batch, labels.shape)]
        if not within(labels):
            raise ValueError(
                f"{self._name}(labels={self.labels!r}): labels run from {labels.min()} to {labels.max()}, but they are "
                f"probabilities and should lie in [0, 1]. Mask padding with batch['mask']: labels of masked examples "
                f"may be anything."
            )
