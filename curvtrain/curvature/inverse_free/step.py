"""One step of inverse-free factors: K K^T approaches the inverse of a Kronecker factor, by products alone.

| symbol | shape | meaning |
|---|---|---|
| K_n | (L, d_n, d_n) | the factor of side n of L tensors; P = (x)_n K_n K_n^T multiplies gradients |
| m_n | | its momentum, in the algebra of the group that K_n is in |
| T_n | (L, d_n, d_n) | the statistics of a batch in the coordinates of K: I where P fits them, without damping |
| tau_n | (L,) | tr(K_n^T K_n) / d_n; in K-FAC's way 1 |
| lambda, beta, alpha | | damping, rate, decay of the momentum |

    M_n = 1/2 [T_n + lambda (prod_{j != n} tau_j) K_n^T K_n - I]
    m_n <- alpha m_n + (1 - alpha) Pi(M_n),    K_n <- K_n (I - beta / max(1, |m_n|) m_n)

The statistics of all sides are taken with the K of the start. Lin et al. (2024), arXiv 2402.03496 (SIRF-Shampoo: |m| is
the Frobenius norm) and arXiv 2312.05705 (SINGD and IKFAC; normalised, |m| is the largest entry). A diagonal factor is
(L, d_n), and so is everything that belongs to it.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain.curvature.inverse_free.structures import Structure
from curvtrain.curvature.inverse_free.tensors import Stack
from curvtrain.curvature.psgd.layout import Side
from curvtrain.curvature.psgd.tensors import contract, multiply_side

PyTree = Any
Filed = dict[str, Any]  # by side, what is stored


@dataclasses.dataclass(frozen=True)
class Rule:
    """The options of a step, which are static.

    Attributes:
      rate: beta, in (0, 1).
      momentum: alpha.
      damping: lambda.
      kfac_like: traces of other sides are 1.
      limit: the size |m| of a step that is not exceeded: "norm", "entry", or "none" (then there is no 1 - alpha).
    """

    rate: float
    momentum: float
    damping: float
    kfac_like: bool = False
    limit: str = "norm"

    @property
    def normalized(self) -> bool:
        """Says whether there is a limit."""
        return self.limit != "none"


def advance(
    rule: Rule, stack: Stack, K: list[jax.Array], momenta: Filed, T: list[jax.Array], dtype: Any, key: jax.Array
) -> tuple[Filed, Filed, jax.Array]:
    """(the stored factors and momenta after a step, whether all of a tensor is finite (L,)).

    Args:
      K, T: of each side, as in the table.
      momenta: as stored.
      dtype: in which factors and momenta are stored.
      key: for the rounding of factors to bfloat16, which is up or down by chance: a step is smaller than half of
        bfloat16's resolution, and would be lost.
    """
    tau = [1.0 if rule.kfac_like else _trace(k) / d for k, d in zip(K, stack.sides, strict=True)]
    rates = jnp.asarray(rule.rate * stack.rates, K[0].dtype)
    factors, moved, finite = {}, {}, []
    for n, (k, t, d, structure) in enumerate(zip(K, T, stack.sides, stack.structures, strict=True)):
        others = functools.reduce(operator.mul, (tau[j] for j in range(len(tau)) if j != n), 1.0)
        M = 0.5 * (t + rule.damping * _wide(others, k) * gram(structure, k) - unit(structure, k))
        share = 1.0 if rule.limit == "none" else 1.0 - rule.momentum
        old = jax.tree.map(lambda a, k=k: a.astype(k.dtype), momenta[str(n)])
        new = jax.tree.map(lambda m, p, share=share: rule.momentum * m + share * p, old, structure.project(M))
        m = structure.matrix(new, d)
        step = _wide(rates / jnp.maximum(1.0, _size(rule.limit, m)), m) * m
        k = k - (k * step if structure.is_vector else k @ step)
        finite.append(_finite(k) & _finite(m))
        noise = jax.random.fold_in(key, n)
        factors[str(n)] = rounded(structure.read(k), dtype, noise)
        moved[str(n)] = jax.tree.map(lambda a: a.astype(dtype), new)
    return factors, moved, functools.reduce(operator.and_, finite)


def of_gradient(stack: Stack, K: Sequence[jax.Array], G: jax.Array, B: jax.Array) -> list[jax.Array]:
    """T of a gradient G (L, *sides) of the mean loss of B examples: B d_n / P times the Gramian of its unfoldings.

    The gradient is that in the coordinates of K, G x_1 K_1^T ... x_N K_N^T, and P the number of its entries.
    """
    X, sides = G[None], sides_of(stack)
    for i, (side, k) in enumerate(zip(sides, K, strict=True)):
        X = along(side, i, turned(k), X)
    entries = X.size // max(stack.count, 1)
    found = []
    for i, side in enumerate(sides):
        product = contract(side, i, X)
        product = product[:, 0] if side.kind == "dense" else product
        found.append(product * (B * (side.size / entries)).astype(X.dtype))
    return found


def of_factors(rule: Rule, stack: Stack, K: Sequence[jax.Array], statistics: Sequence[jax.Array]) -> list[jax.Array]:
    """T of Kronecker factors: (tr H_j / d_j) H_n with H = K^T A K, or H_n alone in K-FAC's way.

    Args:
      statistics: for each side A (L, d, d); of a tensor with one side, which is diagonal, the diagonal (L, d).
    """
    H = []
    for k, A, structure in zip(K, statistics, stack.structures, strict=True):
        if structure.is_vector:
            A = jnp.diagonal(A, axis1=-2, axis2=-1) if A.ndim > k.ndim else A
            H.append(jnp.square(k) * A)
        else:
            H.append(turned(k) @ A @ k)
    if rule.kfac_like or len(H) == 1:
        return H
    trace = lambda h, s: jnp.sum(h, axis=-1) if s.is_vector else jnp.trace(h, axis1=-2, axis2=-1)
    traces = [trace(h, s) / d for h, s, d in zip(H, stack.structures, stack.sides, strict=True)]
    return [_wide(traces[1 - n], h) * h for n, h in enumerate(H)]


def sides_of(stack: Stack) -> list[Side]:
    """The sides, for products along them."""
    pairs = zip(stack.sides, stack.structures, strict=True)
    return [Side(d, "diagonal") if s.is_vector else Side(d, "dense", d) for d, s in pairs]


def along(side: Side, i: int, k: jax.Array, X: jax.Array) -> jax.Array:
    """X (1, L, *sides) with a factor applied along side i."""
    return multiply_side(side, i, k[:, None] if side.kind == "dense" else k, X)


def turned(k: jax.Array) -> jax.Array:
    """K^T."""
    return k if k.ndim == 2 else jnp.swapaxes(k, -1, -2)


def gram(structure: Structure, k: jax.Array) -> jax.Array:
    """K^T K."""
    return jnp.square(k) if structure.is_vector else turned(k) @ k


def unit(structure: Structure, k: jax.Array) -> jax.Array:
    """I, once for all tensors."""
    return jnp.ones(k.shape[1:], k.dtype) if structure.is_vector else jnp.eye(k.shape[-1], dtype=k.dtype)


def rounded(tree: PyTree, dtype: Any, key: jax.Array) -> PyTree:
    """Arrays as another dtype; to bfloat16 up or down by chance, so that the mean is the number itself."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return jax.tree.map(lambda a: a.astype(dtype), tree)
    leaves, treedef = jax.tree.flatten(tree)
    out = []
    for i, leaf in enumerate(leaves):
        noise = jax.random.bits(jax.random.fold_in(key, i), leaf.shape, jnp.uint16).astype(jnp.uint32)
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32) + noise
        cut = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
        out.append(cut.astype(dtype))
    return treedef.unflatten(out)


def _trace(k: jax.Array) -> jax.Array:
    """tr(K^T K) (L,)."""
    return jnp.sum(jnp.square(k), axis=tuple(range(1, k.ndim)))


def _size(limit: str, m: jax.Array) -> jax.Array:
    axes = tuple(range(1, m.ndim))
    if limit == "none":
        return jnp.zeros(len(m), m.dtype)
    return jnp.max(jnp.abs(m), axis=axes) if limit == "entry" else jnp.sqrt(jnp.sum(jnp.square(m), axis=axes))


def _finite(a: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(a), axis=tuple(range(1, a.ndim)))


def _wide(numbers: jax.Array | float, k: jax.Array) -> jax.Array | float:
    """One number for every tensor, to be multiplied with its factor."""
    return numbers.reshape(-1, *(1,) * (k.ndim - 1)) if isinstance(numbers, jax.Array) else numbers
