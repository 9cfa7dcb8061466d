"""The base of all families of fitted preconditioners: PSGD, Xi-Lin Li, arXiv 1512.04202, 1809.10232, 2211.04422.

A symmetric positive definite P = Q^T Q is fitted to pairs (v, h) by stochastic gradient steps on a Lie group of Q:

    minimise  E[h^T P h + v^T P^-1 v]

With v ~ N(0, I) and h = H v the minimum is P = |H|^-1. With gradients as h and v independent of them it is
P = E[g g^T]^(-1/2): the gradient is whitened, and v is integrated out wherever that is possible.

| symbol | meaning |
|---|---|
| v, h | probe and observation: pytrees like the parameters, with k probes as the leading axis |
| Q, P | Q is what is stored; P multiplies gradients |
| T1, T2, E | the two sides of the stationarity condition of one factor, E = T1 - T2 |
| mu | rate of the fit, a normalised step in (0, 1]; above 0.99 it counts as 0.99 |
| L, l, beta | running bound of a factor's curvature, L = max(beta L + (1 - beta) l, l), l = a bound of T1 + T2 |
| sigma | mu / L, or, in the orders of the original code, without memory: "2nd" mu / l, "1st" mu / (size of the step) |
"""

import abc
import dataclasses
import functools
import itertools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain import _checks
from curvtrain._keys import Purpose, fold
from curvtrain.curvature import trees

PyTree = Any

ORDERS = ("bounded", "2nd", "1st")
PRECISIONS = ("default", "high", "highest", "float32", "tensorfloat32", "bfloat16")
TINY = float(jnp.finfo(jnp.float32).tiny)
DECAY = 0.9
_ROUNDINGS = {True: 1000, False: 100}  # that the floor is, for whitening or not
_HIGHEST = 1e-3  # of that floor: 1000 roundings of bfloat16 would be larger than what they are to be told from
_LONGEST = 0.99  # a step of 1 may take a factor to zero, from where none comes back


@dataclasses.dataclass(frozen=True)
class Structure:
    """The shapes of the parameters: all that a preconditioner's layout depends on.

    Attributes:
      treedef: the structure of the parameters.
      shapes: the shapes of their leaves.
      scan_axes: for each leaf, how many leading axes count copies of one layer (`nnx.scan`).
      paths: the names of the leaves, for messages and tables.
      dtype: of a preconditioner, as `curvtrain._dtypes.width` chooses it for the parameters.
      rounding: the relative rounding of the finest dtype among the parameters, and so of gradients.
    """

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    scan_axes: tuple[int, ...]
    paths: tuple[str, ...]
    dtype: str = "float32"
    rounding: float = float(jnp.finfo(jnp.float32).eps)

    @classmethod
    def of(cls, params: PyTree, scan_axes: PyTree | None = None) -> "Structure":
        """Returns the structure of some parameters; raises TypeError for complex ones.

        `scan_axes` holds the numbers of their leading axes that count layers, as a tree like the parameters or a list.
        """
        found, treedef = jax.tree_util.tree_flatten_with_path(params)
        paths = tuple(jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in found)
        for path, (_, leaf) in zip(paths, found, strict=True):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(
                    f"PSGD fits a preconditioner of real parameters, and {path} is {leaf.dtype}. Split a complex one "
                    f"into its real and imaginary parts."
                )
        counts = (0,) * len(found) if scan_axes is None else tuple(jax.tree.leaves(scan_axes))
        shapes = tuple(tuple(leaf.shape) for _, leaf in found)
        rounding = min((float(jnp.finfo(leaf.dtype).eps) for _, leaf in found), default=cls.rounding)
        return cls(treedef, shapes, counts, paths, trees.width(params).name, rounding)

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    def like(self) -> PyTree:
        """Zeros like the parameters, in the preconditioner's dtype."""
        return self.treedef.unflatten([jnp.zeros(shape, self.dtype) for shape in self.shapes])

    def ravel(self, vector: PyTree) -> jax.Array:
        """Returns a vector as one array (n,), in the order of `jax.flatten_util.ravel_pytree`."""
        return jnp.concatenate([leaf.ravel() for leaf in self.treedef.flatten_up_to(vector)])

    def unravel(self, flat: jax.Array) -> PyTree:
        """The inverse of `ravel`."""
        stops = list(itertools.accumulate(math.prod(shape) for shape in self.shapes))
        parts = jnp.split(flat, stops[:-1])
        return self.treedef.unflatten([part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)])


@dataclasses.dataclass(frozen=True)
class Preconditioner(abc.ABC):
    """A family of P: frozen configuration. What it maintains is a pytree of arrays of one structure.

    Attributes:
      damping: the observations are h + (damping + eps |h|) noise, so that P is bounded where they vanish.
      relative_damping: the fit assumes more noise under the observations, of this size as a share of the mean |h| of
        a parameter or, if that is larger, of a typical one, the median. So directions in which observations are smaller
        are not amplified to the size of the others: what a gradient has there (of a bias before a batch normalisation,
        of the sum of a softmax's inputs) is rounding. None: 1,000 roundings of the parameters' dtype in whitening,
        1.2e-4 in float32, and 100 in fits to products; at most 1e-3. 0 turns it off, as does damping=0 where it is
        None.
      initial_scale: P starts as this multiple of I; None chooses the multiple that fits the first observation.
      lipschitz_decay: beta; 0 uses the present bound l alone.
    """

    _: dataclasses.KW_ONLY
    damping: float = 1e-9
    relative_damping: float | None = None
    initial_scale: float | None = None
    lipschitz_decay: float = DECAY

    def __post_init__(self):
        name = type(self).__name__
        _checks.number_in(f"{name}(damping)", self.damping, 0.0)
        if self.relative_damping is not None:
            _checks.number_in(f"{name}(relative_damping)", self.relative_damping, 0.0)
        _checks.number_in(f"{name}(lipschitz_decay)", self.lipschitz_decay, 0.0, 1.0, open_high=True)
        if self.initial_scale is not None:
            _checks.number_in(f"{name}(initial_scale)", self.initial_scale, 0.0, open_low=True)

    @abc.abstractmethod
    def init(self, structure: Structure) -> PyTree:
        """P = I (or the initial scale). Raises ValueError where the family does not fit the parameters."""

    @abc.abstractmethod
    def fit(
        self, structure: Structure, state: PyTree, v: PyTree | None, h: PyTree, key: jax.Array, rate: jax.Array
    ) -> tuple[PyTree, jax.Array]:
        """One step of the fit to pairs (v, h), or, where v is None, of whitening h.

        Args:
          v, h: like the parameters, in the structure's dtype, with a leading axis of probes, over which the steps'
            directions are means.
          key: for noise, and for v where the family needs one that it was not given.
          rate: mu, () of that dtype.

        Returns:
          (the new state, how many parts of it were left as they were because the step was not finite, int32 ()).
        """

    @abc.abstractmethod
    def apply(self, structure: Structure, state: PyTree, vector: PyTree) -> PyTree:
        """P v, for v like the parameters in the structure's dtype."""

    @abc.abstractmethod
    def invert(self, structure: Structure, state: PyTree, vector: PyTree) -> PyTree:
        """P^-1 v."""

    @abc.abstractmethod
    def partition_specs(self, structure: Structure, state: PyTree, param_specs: PyTree, mesh: jax.sharding.Mesh) -> Any:
        """A `PartitionSpec` for every leaf of the state."""

    def blocks(self, structure: Structure) -> list[tuple[str, str, int]]:
        """Rows (parameters, what they get, bytes) of the table that is printed when training starts."""
        state = jax.eval_shape(lambda: self.init(structure))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        return [("all parameters", type(self).__name__, size)]

    def mixes(self) -> bool:
        """Whether P of one parameter depends on the others."""
        return False

    def with_precision(self, precision: str) -> "Preconditioner":
        """The same with matrix products of this precision; itself if it has none."""
        return self

    def share(self, structure: Structure, whitens: bool) -> float:
        """The floor of the noise, as a share of the observations' size."""
        if self.relative_damping is not None:
            return self.relative_damping
        return min(_ROUNDINGS[whitens] * structure.rounding, _HIGHEST) if self.damping else 0.0

    def damped(self, h: jax.Array, seed: jax.Array) -> jax.Array:
        """h + (damping + eps |h|) noise, with random signs as the noise."""
        if not self.damping:
            return h
        return h + (self.damping + float(jnp.finfo(h.dtype).eps) * jnp.abs(h)) * signs(seed, h.shape)

    def noisy(self, key: jax.Array, h: PyTree) -> PyTree:
        """`damped` for every leaf, with seeds from a random key."""
        leaves, treedef = jax.tree.flatten(h)
        seeds = jax.random.bits(key, (len(leaves),), jnp.uint32)
        return treedef.unflatten([self.damped(a, seed) for a, seed in zip(leaves, seeds, strict=True)])

    def floors(self, structure: Structure, h: PyTree, whitens: bool) -> list[jax.Array]:
        """For each leaf (*scan axes,), the size of the noise that the fit assumes under the observations."""
        share, leaves = self.share(structure, whitens), structure.treedef.flatten_up_to(h)
        own = [mean_size(a, lead) for a, lead in zip(leaves, structure.scan_axes, strict=True)]
        typical = _upper_median(jnp.concatenate([size.ravel() for size in own]))
        return [share * jnp.maximum(size, typical) for size in own]

    def floored(self, structure: Structure, key: jax.Array, h: PyTree, whitens: bool) -> PyTree:
        """`noisy` with noise of the floors too: for families that have no closed form of what it adds to T1."""
        leaves, treedef = jax.tree.flatten(self.noisy(key, h))
        if not self.share(structure, whitens):
            return treedef.unflatten(leaves)
        seeds = jax.random.bits(fold(key, Purpose.FLOOR), (len(leaves),), jnp.uint32)
        floors = self.floors(structure, h, whitens)
        wide = lambda floor, a: floor.reshape(1, *floor.shape, *(1,) * (a.ndim - 1 - floor.ndim))
        more = [wide(floor, a) * signs(seed, a.shape) for a, seed, floor in zip(leaves, seeds, floors, strict=True)]
        return treedef.unflatten([a + b for a, b in zip(leaves, more, strict=True)])


@dataclasses.dataclass(frozen=True)
class MatrixPreconditioner(Preconditioner):
    """A family whose work is made of matrix products.

    Attributes:
      precision: that of the products, as in `jax.default_matmul_precision`.
    """

    _: dataclasses.KW_ONLY
    precision: str = "highest"

    def __post_init__(self):
        super().__post_init__()
        _checks.one_of(f"{type(self).__name__}(precision)", self.precision, PRECISIONS)

    def with_precision(self, precision):
        return dataclasses.replace(self, precision=precision)


def check_order(name: str, order: str, decay: float) -> None:
    """Raises ValueError for an unknown order, and for a decay of a running bound that the order does not have."""
    _checks.one_of(f"{name}(order)", order, ORDERS)
    if order != "bounded" and decay != DECAY:
        raise ValueError(
            f"{name}(lipschitz_decay={decay}) is that of the running bound of order='bounded', and order={order!r} has "
            f"none. Leave one of them out."
        )


def signs(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """+1 or -1 for every entry, from a hash of its index and a uint32 seed.

    The noise only needs to be there, so a hash suffices: it takes a tenth of the time of a random generator, and every
    shard makes its own.
    """
    mixed, stride = seed.astype(jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        if shape[axis] > 1:
            factor = jnp.uint32((stride * 0x9E3779B1) % 2**32)
            mixed = mixed + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * factor
        stride *= shape[axis]
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.broadcast_to(jnp.where(mixed >> 31, jnp.float32(1), jnp.float32(-1)), shape)


def running_bound(L: jax.Array, present: jax.Array, decay: float) -> jax.Array:
    """L = max(beta L + (1 - beta) l, l), and never zero."""
    return jnp.maximum(jnp.maximum(decay * L + (1.0 - decay) * present, present), TINY)


def step_length(rate: jax.Array, size: jax.Array) -> jax.Array:
    """sigma = mu / size, where mu is at most 0.99 and the size never zero."""
    return jnp.minimum(rate, _LONGEST) / jnp.maximum(size, TINY)


def mean_size(h: jax.Array, lead: int = 0) -> jax.Array:
    """The mean |h| (*lead,) of observations (k, *lead, ...)."""
    total = jnp.sum(jnp.abs(h), axis=(0, *range(1 + lead, h.ndim)))
    return total / max(h.size // max(total.size, 1), 1)


def _upper_median(sizes: jax.Array) -> jax.Array:
    """The median, of two the larger, of those that are finite and not zero: no single one of them counts for much."""
    used = jnp.isfinite(sizes) & (sizes > 0)
    ordered = jnp.sort(jnp.where(used, sizes, jnp.inf))
    middle = ordered[jnp.sum(used, dtype=jnp.int32) // 2] if sizes.size > 1 else ordered[0]
    return jnp.where(jnp.isfinite(middle), middle, 0.0)


def initial_scale(
    v: jax.Array | None, h: jax.Array, axes: tuple[int, ...] | None = None, floor: jax.Array | float = 0.0
) -> jax.Array:
    """Returns the scale s with which P = s I fits pairs (v, h), where sums are over `axes`, by default all.

    It is sqrt(sum v^2 / sum h^2), or, whitening, (mean h^4)^(-1/4), which one large entry cannot inflate, but at most
    1 / floor; and 1 where h is zero or not finite.
    """
    axes = tuple(range(h.ndim)) if axes is None else axes
    if v is None:
        entries = math.prod(h.shape[axis] for axis in axes)
        scale = (jnp.sum(jnp.square(jnp.square(h / _largest(h, axes))), axis=axes) / max(entries, 1)) ** -0.25
        scale = scale / jnp.squeeze(_largest(h, axes), axis=axes)
    else:
        scale = jnp.sqrt(jnp.sum(jnp.square(v), axis=axes) / jnp.sum(jnp.square(h), axis=axes))
    return usable(scale, floor)


def usable(scale: jax.Array, floor: jax.Array | float) -> jax.Array:
    """A scale, at most 1 / floor; 1 where it is zero or not finite."""
    capped = jnp.minimum(scale, 1.0 / jnp.maximum(floor, TINY))
    return jnp.where(jnp.isfinite(scale) & (scale > 0), capped, 1.0)


def _largest(h: jax.Array, axes: tuple[int, ...] | None) -> jax.Array:
    """max |h|, which keeps a fourth power from overflow."""
    return jnp.maximum(jnp.max(jnp.abs(h), axis=axes, keepdims=True, initial=0.0), TINY)


def initial_scale_of_all(v: PyTree | None, h: PyTree) -> jax.Array:
    """`initial_scale` with sums over all leaves."""
    h = jax.tree.leaves(h)
    if v is not None:
        scale = jnp.sqrt(trees.dot(jax.tree.leaves(v), jax.tree.leaves(v)) / trees.dot(h, h))
    else:
        largest = functools.reduce(jnp.maximum, [_largest(a, None).reshape(()) for a in h if a.size])
        fourth = [jnp.sum(jnp.square(jnp.square(a / largest))) for a in h]
        scale = (functools.reduce(operator.add, fourth) / trees.size(h)) ** -0.25 / largest
    return jnp.where(jnp.isfinite(scale) & (scale > 0), scale, 1.0)


def accept(h: PyTree, new: PyTree, lead: int = 0) -> tuple[jax.Array, jax.Array]:
    """(whether the state `new` replaces the old one, whether it failed), for each of `lead` axes of blocks.

    A zero observation says nothing, and neither changes anything nor fails. A non-finite one fails, as does a state.

    Args:
      h: (k, *lead, ...) leaves of probes.
      new: (*lead, ...) leaves.
    """
    every = lambda test, axes, leaf: test(leaf, axis=tuple(range(lead + axes, leaf.ndim)) + tuple(range(axes)))
    nonzero = [every(jnp.any, 1, a != 0) for a in jax.tree.leaves(h)]
    finite = [every(jnp.all, 1, jnp.isfinite(a)) for a in jax.tree.leaves(h)]
    finite += [every(jnp.all, 0, jnp.isfinite(a)) for a in jax.tree.leaves(new)]
    used, fine = functools.reduce(operator.or_, nonzero), functools.reduce(operator.and_, finite)
    return used & fine, used & ~fine


def choose(accepted: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where it is accepted (*lead,), for leaves (*lead, ...)."""
    along = lambda a: accepted.reshape(*accepted.shape, *(1,) * (a.ndim - accepted.ndim))
    return jax.tree.map(lambda new, old: jnp.where(along(new), new, old), new, old)
