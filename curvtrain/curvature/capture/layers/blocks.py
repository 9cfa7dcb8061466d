"""Blocks of the Fisher as K-FAC measures, stores and applies them: what a layer's `block()` may be.

| block | the matrix C of a layer's M | for |
|---|---|---|
| `Factored` | A (x) G | products with a matrix; stored in the slots of owners, see `kfac/factors.py` |
| `UnitBlocks` | a dense p x p matrix for every column of M | norm layers |
| `TableBlock` (`table.py`) | for row v of the table c_v G + h_v H | embeddings |
| `DiagonalBlock` | a diagonal | parameters without a layer |

The blocks of layers with equal keys are stored together: arrays have a leading axis of entries, layer after layer.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from curvtrain.curvature.capture.layers.gradients import Backward, Gradients, Products
from curvtrain.curvature.capture.layers.rows import second_moment, second_moment_diagonal, shared, total_weight
from curvtrain.objective import safe

if TYPE_CHECKING:
    from curvtrain.curvature.capture.layers.base import Layer

Arrays = dict[str, jax.Array]
Shapes = dict[str, tuple[int, ...]]
Function = Callable[[jax.Array], jax.Array]  # of eigenvalues, elementwise

_ROWS = {"A": "rows", "counts": "rows", "A_head": "head_rows"}  # sums over rows, and the weight of those


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured of Kronecker factors.

    Attributes:
      weight_sharing: "expand" or "reduce" (Eschenhagen et al. 2023, arXiv 2311.00636, sections 3.1 and 3.2).
      diagonal: only the diagonals of A and G.
      scales: also `S`, sum_n (Q_A^T D_n Q_G)^2 for given `QA`, `QG` (George et al. 2018, arXiv 1806.03884, eq. 9).
      sometimes: only where the given `due` is true; else S is zero.
    """

    weight_sharing: str = "expand"
    diagonal: bool = False
    scales: bool = False
    sometimes: bool = False


class Block(abc.ABC):
    """The statistics of a layer's block. A statistic's array has the leading axis g; a call's arrays are sums."""

    @property
    @abc.abstractmethod
    def own(self) -> "OwnBlock | None":
        """The block, if it is stored in arrays of its own; None if in the slots of factors."""

    def given(self, options: Options) -> tuple[str, ...]:
        """Names of the arrays that `measure` needs."""
        return ()

    @abc.abstractmethod
    def shapes(self, layer: "Layer", options: Options) -> Shapes:
        """Shapes of the statistics of one call, by name: (g, ...), sums over examples, float32."""

    @abc.abstractmethod
    def measure(self, layer: "Layer", backward: Backward, options: Options) -> Arrays:
        """The statistics of one call."""

    def of_examples(self, options: Options) -> tuple[str, ...]:
        """Names of the statistics that are sums of products of D_n with itself: they need the gradients of examples,
        which those of calls are only where a layer is called once for each."""
        return ()

    def measure_examples(self, gradients: Gradients, given: Arrays, options: Options) -> Arrays:
        """The statistics that `of_examples` names, from the gradients of examples."""
        return {}

    @abc.abstractmethod
    def diagonal_of(self, means: Arrays) -> jax.Array:
        """The diagonal of C, like M, from the means of statistics with `Options(diagonal=True)`."""

    @abc.abstractmethod
    def kind(self, layer: "Layer") -> str:
        """A description for tables."""


def means_of(layer: "Layer", sums: Arrays, W: jax.Array) -> Arrays:
    """Sums over examples, and over rows, divided by their weights: (K, ...) each."""
    flat = {name: x.reshape(layer.copies, *x.shape[len(layer.scan_axes) + 1 :]) for name, x in sums.items()}
    weights = {name: safe(flat[rows]) for name, rows in _ROWS.items() if rows in flat}
    wide = lambda name, x: weights[name].reshape(-1, *(1,) * (x.ndim - 1)) if name in weights else W
    return {name: x / wide(name, x) for name, x in flat.items() if name not in _ROWS.values()}


@dataclasses.dataclass(frozen=True)
class Factored(Block):
    """A (x) G for a layer whose gradients are `Products`.

    Statistics: `A`, `G`, and `rows`, the weight that A is to be divided by; `S` with `Options(scales=True)`.
    """

    @property
    def own(self):
        return None

    def given(self, options):
        return (("QA", "QG", "due") if options.sometimes else ("QA", "QG")) if options.scales else ()

    def shapes(self, layer, options) -> Shapes:
        g, i, o = layer.groups, layer.d_i, layer.d_o
        square = (lambda n: (g, n)) if options.diagonal else (lambda n: (g, n, n))
        shapes: Shapes = {"A": square(i), "G": square(o), "rows": (g,)}
        return shapes | ({"S": (g, i, o)} if options.scales else {})

    def measure(self, layer, backward, options):
        products = layer.gradients(backward).corrected(backward)
        assert isinstance(products, Products), "a factored block is that of products"
        a, s, w = shared(products, backward, options.weight_sharing)
        second = second_moment_diagonal if options.diagonal else second_moment
        sums = {"A": second(a, w), "G": second(s, None), "rows": jnp.broadcast_to(total_weight(a, w), len(a))}
        if options.scales:
            given = backward.given
            of_basis = lambda: products.rotated(given["QA"], given["QG"]).squares()
            zeros = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(of_basis))
            sums["S"] = jax.lax.cond(given["due"], of_basis, zeros) if options.sometimes else of_basis()
        return sums

    def of_examples(self, options):
        return ("S",) if options.scales else ()

    def measure_examples(self, gradients, given, options):
        return {"S": gradients.rotated(given["QA"], given["QG"]).squares()} if options.scales else {}

    def diagonal_of(self, means):
        return means["A"][:, :, None] * means["G"][:, None, :]

    def kind(self, layer):
        return f"{layer.d_i} x {layer.d_o}" + (f" x {layer.copies}" if layer.copies > 1 else "")


class OwnBlock(Block):
    """A block that is stored in arrays of its own, and exact for any damping.

    Its eigenvalues are those of a positive semi-definite matrix: what rounding makes negative is zero.
    """

    spread: ClassVar[bool] = True  # whether its arrays are split over devices

    @property
    def own(self):
        return self

    @property
    @abc.abstractmethod
    def key(self) -> str:
        """Layers of equal keys are stored together."""

    @abc.abstractmethod
    def stored(self, copies: int, d_o: int) -> Shapes:
        """Shapes of the means (entries, ...) of a layer with K copies and d_o columns."""

    def basis_shapes(self, stored: Shapes) -> Shapes:
        """Shapes of what a refresh makes of the means."""
        return {}

    @abc.abstractmethod
    def entries(self, M: jax.Array) -> jax.Array:
        """M (K, d_i, d_o) as entries (n, ...)."""

    @abc.abstractmethod
    def from_entries(self, x: jax.Array, copies: int) -> jax.Array:
        """The inverse of `entries`."""

    def means(self, layer: "Layer", sums: Arrays, W: jax.Array) -> Arrays:
        """The means of a batch, as `stored`."""
        return means_of(layer, sums, W)

    def to_factorise(self, means: Arrays) -> jax.Array | None:
        """The symmetric matrices (n, d, d) whose eigenvectors a refresh needs; None if there are none."""
        return None

    def basis(self, means: Arrays, vectors: jax.Array) -> Arrays:
        """What a refresh keeps, as `basis_shapes`."""
        return {}

    @abc.abstractmethod
    def matvec(self, means: Arrays, x: jax.Array) -> jax.Array:
        """C x for entries x."""

    @abc.abstractmethod
    def apply(self, means: Arrays, basis: Arrays, x: jax.Array, function: Function) -> jax.Array:
        """function(C) x for entries x."""

    def solve(self, means: Arrays, basis: Arrays, x: jax.Array, damping: jax.Array) -> jax.Array:
        """(C + damping I)^-1 x for entries x."""
        return self.apply(means, basis, x, lambda value: 1.0 / (value + damping))

    @abc.abstractmethod
    def diagonal(self, means: Arrays) -> jax.Array:
        """The diagonal of C, as entries."""

    @abc.abstractmethod
    def logdet(self, means: Arrays, basis: Arrays, damping: jax.Array) -> jax.Array:
        """log |det(C + damping I)| of all entries together."""

    def diagonal_of(self, means):
        return means["D2"]


@dataclasses.dataclass(frozen=True)
class UnitBlocks(OwnBlock):
    """One dense p x p matrix for every column of M: for layers with few rows.

    Osawa et al. (2020), arXiv 2002.06015, section 4.2, for scale and bias of a norm layer. One by one and two by two
    blocks are diagonalised in closed form where they are applied; a refresh does it for larger ones.

    Attributes:
      p: rows of M.
    """

    p: int

    @property
    def key(self):
        return f"{self.p}x{self.p}"

    def shapes(self, layer, options) -> Shapes:
        if options.diagonal:
            return {"D2": (layer.groups, layer.d_i, layer.d_o)}
        return {"F": (layer.groups, layer.d_o, self.p, self.p)}

    def measure(self, layer, backward, options):
        return {"D2": layer.squares(backward)} if options.diagonal else {"F": layer.units(backward)}

    def of_examples(self, options):
        return ("D2",) if options.diagonal else ("F",)

    def measure_examples(self, gradients, given, options):
        return {"D2": gradients.squares()} if options.diagonal else {"F": gradients.units()}

    def stored(self, copies, d_o) -> Shapes:
        return {"F": (copies * d_o, self.p, self.p)}

    def basis_shapes(self, stored) -> Shapes:
        shape = stored["F"]
        return {} if self.p <= 2 else {"Q": shape, "values": shape[:-1]}

    def entries(self, M):
        return jnp.swapaxes(M, 1, 2).reshape(-1, self.p)

    def from_entries(self, x, copies):
        return jnp.swapaxes(x.reshape(copies, -1, self.p), 1, 2)

    def means(self, layer, sums, W):
        return {"F": sums["F"].reshape(-1, self.p, self.p) / W}

    def to_factorise(self, means):
        return None if self.p <= 2 else means["F"]

    def basis(self, means, vectors):
        if self.p <= 2:
            return {}
        values = jnp.einsum("nij,nij->nj", vectors, means["F"] @ vectors)
        return {"Q": vectors, "values": jnp.maximum(values, 0.0)}

    def matvec(self, means, x):
        return jnp.einsum("npq,nq->np", means["F"], x)

    def apply(self, means, basis, x, function):
        values, Q = self._eigen(means, basis)
        return jnp.einsum("npq,nq->np", Q, function(values) * jnp.einsum("nqp,nq->np", Q, x))

    def diagonal(self, means):
        return jnp.diagonal(means["F"], axis1=1, axis2=2)

    def logdet(self, means, basis, damping):
        return jnp.sum(jnp.log(jnp.abs(self._eigen(means, basis)[0] + damping)))

    def kind(self, layer):
        return f"unit-wise {self.p} x {self.p}"

    def _eigen(self, means, basis):
        if self.p > 2:
            return basis["values"], basis["Q"]
        F = means["F"]
        if self.p == 1:
            return jnp.maximum(F[:, 0], 0.0), jnp.ones_like(F)
        # One rotation of Jacobi's method (Golub and Van Loan, section 8.5.2): tangent t of the angle that makes it
        # diagonal.
        a, b, d = F[:, 0, 0], F[:, 0, 1], F[:, 1, 1]
        tau = (d - a) / (2.0 * jnp.where(b == 0, 1.0, b))
        t = jnp.where(b == 0, 0.0, jnp.where(tau < 0, -1.0, 1.0) / (jnp.abs(tau) + jnp.sqrt(1.0 + jnp.square(tau))))
        c = jax.lax.rsqrt(1.0 + jnp.square(t))
        Q = jnp.stack([jnp.stack([c, t * c], -1), jnp.stack([-t * c, c], -1)], 1)
        return jnp.maximum(jnp.stack([a - t * b, d + t * b], -1), 0.0), Q


@dataclasses.dataclass(frozen=True)
class DiagonalBlock(OwnBlock):
    """The exact diagonal `D2` of a parameter that belongs to no layer.

    Attributes:
      name: of the parameter.
    """

    name: str

    @property
    def key(self):
        return self.name

    def shapes(self, layer, options) -> Shapes:
        return {"D2": (1, 1, layer.size)}

    def measure(self, layer, backward, options):
        return {"D2": layer.squares(backward)}

    def of_examples(self, options):
        return ("D2",)

    def measure_examples(self, gradients, given, options):
        return {"D2": gradients.squares()}

    def stored(self, copies, d_o) -> Shapes:
        return {"D2": (copies, 1, d_o)}

    def entries(self, M):
        return M

    def from_entries(self, x, copies):
        return x

    def matvec(self, means, x):
        return means["D2"] * x

    def apply(self, means, basis, x, function):
        return function(means["D2"]) * x

    def diagonal(self, means):
        return means["D2"]

    def logdet(self, means, basis, damping):
        return jnp.sum(jnp.log(jnp.abs(means["D2"] + damping)))

    def kind(self, layer):
        return "diagonal"
