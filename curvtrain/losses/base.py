"""The interface of losses: values per example, their weights, and what follows from them by differentiation."""

import abc
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from curvtrain._dtypes import width
from curvtrain._outputs import floats, with_floats
from curvtrain.losses.masking import unmasked
from curvtrain.losses.weighing import (
    KnownWeights,
    check_values,
    checked_names,
    is_mask,
    spread,
    times,
    traced_reads,
    valid_values,
    weighing_entries,
)

Batch = Mapping[str, Any]

_OF_VALUES = ("hessian_product", "hessian_columns", "sample_targets", "average")  # methods that belong to one `values`
_STALE = weakref.WeakSet()  # methods in the place of such that belong to others


class Loss(abc.ABC):
    """A per-example loss of the outputs. A subclass needs `values` alone; the rest has defaults.

    A subclass that overrides `values` is another loss. Of what it inherits, `hessian_columns`, `sample_targets` and
    `average` are those of the old one and raise, until it defines them or says that they are right as they are: in the
    class, `hessian_columns = SoftmaxCrossEntropy.hessian_columns`. Everything else follows from the new values.

    Attributes:
      has_factor: whether the loss has a `hessian_columns` of its own.
      can_sample: whether it has a `sample_targets` of its own.
      can_average: whether it has an `average` of its own.
      hessian_is_fisher: whether its Hessian in output space is the Fisher information of a distribution that it knows.
      weights_are_known: whether its weights are those that `known_weights` reads off the batch.
    """

    has_factor: ClassVar[bool] = False
    can_sample: ClassVar[bool] = False
    can_average: ClassVar[bool] = False
    hessian_is_fisher: ClassVar[bool] = False
    weights_are_known: ClassVar[bool] = True

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        mro = cls.__mro__
        depth = lambda name: next(i for i, base in enumerate(mro) if name in vars(base))
        base = mro.index(Loss)
        for name in _OF_VALUES:  # what is defined further up than the values belongs to others
            if depth("values") < depth(name) < base:
                stale = getattr(Loss, name) if name == "hessian_product" else _stale(name, mro[depth(name)])
                setattr(cls, name, stale)
        own = lambda name: depth(name) <= depth("values") and getattr(cls, name) not in _STALE
        flags = {
            "has_factor": own("hessian_columns"),
            "can_sample": own("sample_targets"),
            "can_average": own("average"),
            "hessian_is_fisher": cls.hessian_is_fisher and depth("hessian_is_fisher") <= depth("values"),
            "weights_are_known": cls.weights_are_known and depth("known_weights") <= depth("weights"),
        }
        for name, value in flags.items():
            if name not in vars(cls):
                setattr(cls, name, value)

    @property
    def weighted_by(self) -> str | tuple[str, ...] | None:
        """Names the entries that weight examples; None for `mask` and `weights`, where that is clear; () for none."""
        return None

    @property
    def targets_read(self) -> tuple[str, ...]:
        """The names of the entries that `values` reads as targets, as far as the loss knows them."""
        return ()

    @property
    def _name(self) -> str:
        """The loss's class, for messages."""
        return type(self).__name__

    # -- values and weights --------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def values(self, outputs: Any, batch: Batch) -> jax.Array:
        """The loss of each example, unweighted: (batch,) or (batch, time), float64 if the outputs are, or float32."""

    def weights(self, outputs: Any, batch: Batch) -> jax.Array:
        """The weight of each example, in the shape of `values`.

        Raises:
          ValueError: an entry whose shape does not fit the values, or that could be something other than weights;
            values that are not one per example.
        """
        entries = self._entries(batch)
        values, read = traced_reads(lambda entries: self.values(outputs, _with(batch, entries)), entries)
        shape = self._one_per_example(values, outputs)
        for name, entry in entries.items():
            if self._masks_outputs(name, entry, outputs) and name in read:
                continue
            self._check_fits(name, entry, shape)
            if self.weighted_by is None and name in read:
                raise ValueError(
                    f"The batch has an entry {name!r}, and {self._function} reads it. If it weights the examples as "
                    f"well, say weighted_by={name!r}; if it is a target, weighted_by=()."
                )
        product, ones = self.known_weights(batch).product, jnp.ones(shape, width(values))
        if product is None:
            return ones
        if product.shape != shape[: product.ndim]:
            raise ValueError(
                f"{self._name} has weights of shape {product.shape} and values of shape {shape}: what weights "
                f"positions, such as ignore_index, needs one value for each of them."
            )
        return ones * spread(product.astype(ones.dtype), shape)

    def known_weights(self, batch: Batch) -> KnownWeights:
        """The weights that can be read off the batch before there are outputs."""
        mask = scale = None
        for name, entry in self._entries(batch).items():
            w = self._of_examples(name, valid_values(name, entry))
            if is_mask(name, entry):
                mask = times(mask, w)
            else:
                scale = times(scale, w)
        return KnownWeights(mask, scale)

    def _masks_outputs(self, name: str, entry: Any, outputs: Any) -> bool:
        """Says whether an entry is a mask of single outputs."""
        return False

    def _of_examples(self, name: str, entry: Any) -> Any:
        """An entry's values as weights of whole examples."""
        return entry

    # -- derivatives and the distribution ------------------------------------------------------------------------------

    def hessian_product(self, outputs: Any, batch: Batch, tangent: Any) -> Any:
        """H_l times `tangent`, per example and times its weight; the Hessian is taken in output space.

        Shapes: `outputs`, `tangent` and the result are alike; leaves that are not floating-point numbers are neither
        read in the tangent nor changed in the result. It is the jvp of the gradient, exact for any loss whose example
        i depends on the outputs of example i alone.
        """
        weights = self.weights(outputs, batch)
        total = lambda z: jnp.sum(weights * self.values(unmasked(with_floats(outputs, z), weights), batch))
        return with_floats(outputs, jax.jvp(jax.grad(total), (floats(outputs),), (floats(tangent),))[1])

    def hessian_columns(self, outputs: Any) -> Any:
        """S with sum_c S[c] S[c]^T = H_l for each example, shape (columns, *outputs.shape); unweighted."""
        raise TypeError(f"{self._name} has no closed factor of its output-space Hessian.")

    def columns_for(self, outputs: Any, batch: Batch) -> Any:
        """`hessian_columns` for a batch, of which single outputs may be masked; examples are unweighted."""
        return self.hessian_columns(outputs)

    def sample_targets(self, outputs: Any, batch: Batch, key: jax.Array) -> Batch:
        """The batch with its targets drawn from the model's own distribution p(t | outputs)."""
        raise TypeError(f"{self._name} cannot be sampled: it defines no distribution over targets.")

    def average(self, stacked: Any) -> Any:
        """The outputs of the mean prediction, from the outputs of several draws along a new leading axis."""
        raise TypeError(f"{self._name} does not say how predictions are averaged: it defines no average(stacked).")

    @property
    def fishers(self) -> tuple[str, ...]:
        """The kinds of Fisher that the loss allows: any of "exact", "ggn", "sampled", "empirical"."""
        exact = ("exact",) if self.has_factor and self.hessian_is_fisher else ()
        ggn = ("ggn",) if self.has_factor else ()
        return (*exact, *ggn, *(("sampled",) if self.can_sample else ()), "empirical")

    # -- reports and checks --------------------------------------------------------------------------------------------

    def metrics(self, outputs: Any, batch: Batch) -> dict[str, jax.Array]:
        """What a Trainer reports by default: one value per example under each name."""
        return {"loss": self.values(outputs, batch)}

    def check(self, batch: Mapping[str, np.ndarray], outputs: Any) -> None:  # noqa: B027 - a default, not abstract
        """Looks on the host at targets as numpy arrays; `outputs` are shapes. Raises ValueError or TypeError.

        A Trainer calls it for every batch, or once for all arrays in memory. Targets of masked examples may be
        anything, see `counted`.
        """

    def check_batch(self, batch: Mapping[str, np.ndarray], outputs: Any) -> None:
        """Checks all that the loss reads of a batch, weights and targets. Raises as `check` does."""
        for name, entry in self._entries(batch).items():
            check_values(name, np.asarray(entry))
        self.check(batch, outputs)

    def counted(self, batch: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        """Which targets count, on the host: bool, of this shape, which examples' axes begin; false where masked."""
        counted = np.ones(shape, bool)
        for entry in map(np.asarray, self._entries(batch).values()):
            if entry.shape == shape[: entry.ndim]:
                counted &= spread(entry != 0, shape)
        return counted

    # -- inside --------------------------------------------------------------------------------------------------------

    def _entries(self, batch: Any) -> dict[str, Any]:
        """The entries that weight, as arrays."""
        names = checked_names(f"{self._name}(weighted_by)", self.weighted_by)
        found = weighing_entries(self._name, batch, names, self.targets_read)
        return {name: e if isinstance(e, jax.Array) else np.asarray(e) for name, e in found.items()}

    def _one_per_example(self, values: Any, outputs: Any) -> tuple[int, ...]:
        """The shape of the values. Raises TypeError or ValueError unless they are one for each example."""
        if not hasattr(values, "shape"):
            raise TypeError(f"{self._function} should return an array, not {type(values).__name__}.")
        lengths = {z.shape[0] for z in jax.tree.leaves(outputs) if jnp.ndim(z)}
        if values.shape == () or (values.shape[0] == 1 and lengths and 1 not in lengths):
            raise ValueError(
                f"{self._function} should return one value per example, shape (batch,) or (batch, time), not one for "
                f"all of them, shape {values.shape}: leave out the mean over examples, which the objective takes, with "
                f"their weights. A scalar loss, without outputs, is for Objective.from_loss."
            )
        return values.shape

    @property
    def _function(self) -> str:
        """How messages call the function that computes the values."""
        return f"{self._name}.values"

    def _check_fits(self, name: str, entry: Any, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless an entry has one weight per example or position, and nothing else can be meant."""
        if not entry.ndim or entry.shape != shape[: entry.ndim]:
            raise ValueError(
                f"batch[{name!r}] has shape {entry.shape}, but the per-example values have shape {shape}: pass one "
                f"weight per example, shape {shape[:1]} or {shape} (a mask over time needs a loss with one value per "
                f"position: integer labels of shape (batch, time), or sequence=True). If {name!r} is not meant to "
                f"weight examples, pass {self._name}(weighted_by=())."
            )
        clear = entry.dtype == jnp.bool_ or (name != "mask" and jnp.issubdtype(entry.dtype, jnp.floating))
        if self.weighted_by is None and entry.ndim > 2 and not clear:
            raise ValueError(
                f"batch[{name!r}], {entry.dtype} of shape {entry.shape}, could be weights or a target: say "
                f"{self._name}(weighted_by={name!r}) if it weights the values, and weighted_by=() if it does not."
            )


def _with(batch: Any, entries: dict[str, Any]) -> Any:
    """The batch, which need not be a mapping, with other values of some entries."""
    return {**batch, **entries} if entries else batch


def one_array(loss: Loss, outputs: Any) -> Any:
    """The outputs of a model that has one array of them. Raises TypeError for others."""
    if not hasattr(outputs, "shape"):
        raise TypeError(
            f"{loss._name} takes one array of outputs, not {type(outputs).__name__}: return one from predict, or write "
            f"a losses.PerExample(function) of all of them."
        )
    if not outputs.shape:
        raise ValueError(f"{loss._name} takes one output or more for each example, and the model's are one number.")
    return outputs


def _stale(name: str, owner: type) -> Any:
    """A method in the place of one that belongs to the values of another class."""

    def method(self, *args):
        raise TypeError(
            f"{self._name} overrides the values of {owner.__name__} and inherits its {name}, which belongs to those: "
            f"define {self._name}.{name}."
        )

    _STALE.add(method)
    return method
