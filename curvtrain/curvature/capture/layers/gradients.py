"""Gradients of single examples with respect to a layer's matrix, and sums over them without holding all at once."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any

FLOATS = 2**24  # of per-example gradients held at a time
_UNREACHED = 1e-30  # weight of a row that no output depends on: nothing, unless there are no others


@dataclasses.dataclass(frozen=True)
class Backward:
    """What a tap sees of one call of a layer in a backward pass.

    Attributes:
      use: the name of the method that was called: "call", or "attend" of an embedding.
      examples: N, or 1 where the model maps over its examples one by one.
      saved: what `Statistic.saved` kept of the call.
      s: the cotangent of the layer's output, in its shape.
      reach: whether s is zero just where no unmasked output depends on a row.
      given: arrays by name: "weights" (N, ...) of the examples, if there are any; "correction" (N,), if the cotangents
        were seeded with w_n in the place of sqrt(w_n); and what the statistic asked for.
    """

    use: str
    examples: int
    saved: PyTree
    s: jax.Array
    given: dict[str, jax.Array]
    reach: bool = False

    def corrected(self, s: jax.Array) -> jax.Array:
        """Cotangents s (g, N, ...) as if they had been seeded with sqrt(w_n)."""
        if "correction" not in self.given:
            return s
        return s * self.given["correction"].reshape(1, self.examples, *(1,) * (s.ndim - 2))

    def row_weights(self, positions: int, s: jax.Array) -> jax.Array | None:
        """The weight of each row (N, R), None for all ones; s (g, N, R, d_o) are the cotangents of the rows' products.

        A mask over time applies to layers whose positions are time. In others an example counts if any of its positions
        does; of a layer that is called several times for an example (a recurrent cell) only those rows of it on which
        an unmasked output depends.
        """
        if "weights" not in self.given:
            return None
        w = self.given["weights"]
        if w.shape[0] != self.examples:
            raise ValueError(
                f"The batch has a mask or weights for {w.shape[0]} examples, and the model maps over them, so that a "
                f"layer sees {self.examples}: which weight is its own is not known. Call the model on the whole batch, "
                f"or leave mask= and weights= out."
            )
        w = w.reshape(self.examples, -1)
        if w.shape[1] == positions:
            return w
        w = jnp.broadcast_to(jnp.max(w, axis=1, keepdims=True), (self.examples, positions))
        return w * jnp.where(jnp.any(s != 0, axis=(0, 3)), 1.0, _UNREACHED) if self.reach else w


class Gradients(abc.ABC):
    """The gradients D_n (g, N, d_i, d_o) of N examples with respect to g copies of a matrix, written out or not."""

    @abc.abstractmethod
    def corrected(self, backward: Backward) -> "Gradients":
        """The gradients as if cotangents had been seeded with sqrt(w_n), see `Backward`."""

    @abc.abstractmethod
    def total(self, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The sum of function(D) over chunks D (g, n, d_i, d_o) of a few examples; the function sums over those."""

    def squares(self) -> jax.Array:
        """sum_n D_n^2 elementwise: (g, d_i, d_o)."""
        return self.total(lambda D: jnp.sum(jnp.square(D), axis=1))

    def units(self) -> jax.Array:
        """sum_n D_n[:, o] D_n[:, o]^T for every column o: (g, d_o, d_i, d_i)."""
        return self.total(lambda D: jnp.einsum("gnio,gnjo->goij", D, D))

    def full(self) -> jax.Array:
        """sum_n vec(D_n) vec(D_n)^T with row-major vec: (g, d_i d_o, d_i d_o)."""

        def outer(D):
            D = D.reshape(*D.shape[:2], -1)
            return jnp.einsum("gnp,gnq->gpq", D, D)

        return self.total(outer)

    @abc.abstractmethod
    def rotated(self, QA: jax.Array, QG: jax.Array) -> "Gradients":
        """Q_A^T D_n Q_G for QA (g, d_i, d_i) and QG (g, d_o, d_o)."""


@dataclasses.dataclass(frozen=True)
class Explicit(Gradients):
    """Gradients that are written out: for layers with few parameters.

    Attributes:
      D: (g, N, d_i, d_o).
    """

    D: jax.Array

    def corrected(self, backward):
        return Explicit(backward.corrected(self.D))

    def total(self, function):
        return function(self.D)

    def rotated(self, QA, QG):
        return Explicit(jnp.einsum("gij,gnio,gop->gnjp", QA, self.D, QG))


@dataclasses.dataclass(frozen=True)
class Products(Gradients):
    """Gradients that are sums of products, D_n = sum_r a s^T, over the positions r of an example.

    Attributes:
      a: (g, N, R, d_i), what multiplies the matrix.
      s: (g, N, R, d_o), cotangents of the products.
    """

    a: jax.Array
    s: jax.Array

    def corrected(self, backward):
        return Products(self.a, backward.corrected(self.s))

    def rotated(self, QA, QG):
        return Products(jnp.einsum("gnri,gij->gnrj", self.a, QA), jnp.einsum("gnro,gop->gnrp", self.s, QG))

    def total(self, function):
        a, s = self.a, self.s
        g, n = a.shape[:2]
        fit = max(1, FLOATS // (g * a.shape[-1] * s.shape[-1]))
        chunk = next(c for c in range(min(fit, n), 0, -1) if n % c == 0)
        chunk_total = lambda a, s: function(jnp.einsum("gnri,gnro->gnio", a, s))
        if chunk == n:
            return chunk_total(a, s)
        cut = lambda v: jnp.moveaxis(v.reshape(g, n // chunk, chunk, *v.shape[2:]), 1, 0)
        first = jax.eval_shape(chunk_total, *(v[:, :chunk] for v in (a, s)))
        add = lambda total, v: (total + chunk_total(*v), None)
        return jax.lax.scan(add, jnp.zeros(first.shape, first.dtype), (cut(a), cut(s)))[0]

    def squares(self):
        if self.a.shape[2] == 1:  # one position: the square of a product is the product of squares
            return jnp.einsum("gni,gno->gio", jnp.square(self.a[:, :, 0]), jnp.square(self.s[:, :, 0]))
        return super().squares()
