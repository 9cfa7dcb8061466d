"""Low-rank PSGD: Q = (I + U V^T) diag(d), Li, arXiv 2211.04422 ("LRA", "UVd"). Symbols as in `base.py`, and:

| symbol | shape | meaning |
|---|---|---|
| U, V | (r, *param.shape) | bases; as matrices their rows are the columns of the paper's U and V |
| d | like the parameters | diagonal |
| K | (r, r) | I + V^T U |
| a, b | like h | Q h, Q^-T v |
| y, w | like h | P h, P^-1 v |

All that couples parameters goes through inner products with U or V: a local contraction of every leaf, and one
reduction of a few numbers. Nothing is flattened or concatenated, so U, V and d are sharded like the parameters.
"""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from curvtrain import _checks
from curvtrain.curvature import trees
from curvtrain.curvature.psgd.base import (
    TINY,
    MatrixPreconditioner,
    Structure,
    accept,
    check_order,
    choose,
    initial_scale_of_all,
    running_bound,
    step_length,
)

PyTree = Any

_SIZE = 0.1  # |U|^2 = |V|^2 at the start
_RESCALES = 0.01  # probability of a rescaling in the old orders


@dataclasses.dataclass(frozen=True)
class LowRank(MatrixPreconditioner):
    """P = diag(d) (I + V U^T) (I + U V^T) diag(d) over all parameters: O(n r) memory and work.

    Every step fits d, and U or V, each with probability 1/2 by the key. Whitening draws its v from the key too.

    U starts as zero and V at random, so that P is a multiple of I before the first fit, and fits a multiple of I at
    once; the original starts both at random. P that is small along few directions is learnt slowly, in steps
    proportional to K.

    Attributes:
      rank: r, the number of columns of U and V. 0 leaves the diagonal.
      order: how a step is normalised. "bounded": by a running bound of the curvature for each of d, U and V, after U
        and V have been made more alike. As in the original code, without memory: "2nd", by the present bound of the
        curvature, or "1st", by the size of the direction; both rescale U and V once in 100 steps or so.
      seed: of the random V at the start.
    """

    rank: int = 10
    order: str = "bounded"
    _: dataclasses.KW_ONLY
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        _checks.positive_int("LowRank(rank)", self.rank, minimum=0)
        check_order("LowRank", self.order, self.lipschitz_decay)
        _checks.positive_int("LowRank(seed)", self.seed, minimum=0)
        if not self.rank and self.seed:
            raise ValueError(f"LowRank(seed={self.seed}) is that of the random V, and rank=0 has none. Leave it out.")

    def mixes(self):
        return True

    def init(self, structure):
        n = structure.size
        if self.rank > n:
            raise ValueError(
                f"LowRank(rank={self.rank}) exceeds the number of parameters, {n}. Use a rank of at most {n}; "
                f"for so few parameters Dense() costs no more and fits better."
            )
        start = math.sqrt(1.0 if self.initial_scale is None else self.initial_scale)
        state = {
            "d": jax.tree.map(lambda zero: zero + start, structure.like()),
            "L": jnp.zeros(3, structure.dtype),
            "seen": jnp.bool_(False),
        }
        if self.rank:
            V = self._basis(jax.random.key(self.seed), structure)
            state |= {"U": jax.tree.map(jnp.zeros_like, V), "V": V}
        return state

    def _basis(self, key: jax.Array, structure: Structure) -> PyTree:
        V = trees.normal(key, structure.like(), self.rank)
        if self.order == "bounded":
            return trees.scale(math.sqrt(_SIZE) / trees.norm(V), V)
        return trees.scale(1.0 / math.sqrt(structure.size * (self.rank + 10)), V)

    # -- fit -----------------------------------------------------------------------------------------------------------

    def fit(self, structure, state, v, h, key, rate):
        keys = jax.random.split(key, 4)
        exact, new = h, dict(state)
        if self.initial_scale is None:
            scale = jnp.where(state["seen"], 1.0, jnp.sqrt(initial_scale_of_all(v, h)))
            new["d"] = trees.scale(scale, state["d"])
        whitens = v is None
        v = trees.normal(keys[0], h) if v is None else v
        h = self.floored(structure, keys[1], h, whitens)
        with jax.default_matmul_precision(self.precision):
            if self.rank:
                new["U"], new["V"] = self._balanced(keys[2], state["U"], state["V"])
            new = self._step(new, v, h, jax.random.bernoulli(keys[3], np.float32(0.5)), rate)
        accepted, failed = accept(exact, new)
        return choose(accepted, new, state), failed.astype(jnp.int32)

    def _step(self, state: PyTree, v: PyTree, h: PyTree, choice: jax.Array, rate: jax.Array) -> PyTree:
        """A step of d and, by `choice`, of U or of V; all from the same old values."""
        d = state["d"]
        a = self._Q(state, h)
        y = self._Qt(state, a)
        b = self._inverse_Qt(state, v)
        w = self._inverse_Q(state, b)
        mean = lambda x: jnp.mean(x, axis=0)

        t1, t2 = (jax.tree.map(lambda x, y: mean(x * y), *pair) for pair in ((y, h), (v, w)))
        present = _largest(t1) + _largest(t2)
        L = state["L"].at[0].set(running_bound(state["L"][0], present, self.lipschitz_decay))
        if self.order == "bounded":
            size = L[0]
        elif self.order == "2nd":  # |t1 - t2|^2 <= mean(y^2 + v^2) mean(h^2 + w^2)
            sides = lambda x, y: mean(jnp.square(x) + jnp.square(y))
            product = jax.tree.map(lambda y, v, h, w: jnp.sqrt(sides(y, v)) * jnp.sqrt(sides(h, w)), y, v, h, w)
            size = _largest(product)
        else:
            size = _largest(trees.subtract(t1, t2))
        step = step_length(rate, size)
        new = state | {
            "d": jax.tree.map(lambda d, t1, t2: d - step * d * (t1 - t2), d, t1, t2),
            "seen": jnp.bool_(True),
        }
        if not self.rank:
            return new | {"L": L}

        def step_U():
            U, V = state["U"], state["V"]
            Y, size, l = self._pull(V, a, b, L[1])
            K = _eye(self.rank, V) + _inner(V, U)
            return _minus(U, step_length(rate, size), _mix(K.T, Y)), V, L.at[1].set(l)  # dU = (a a^T - b b^T) V K

        def step_V():
            U, V = state["U"], state["V"]
            Y, size, l = self._pull(U, a, b, L[2])
            direction = trees.add(Y, _mix(_inner(Y, U), V))  # dV = (I + V U^T) (a a^T - b b^T) U
            return U, _minus(V, step_length(rate, size), direction), L.at[2].set(l)

        U, V, L = jax.lax.cond(choice, step_U, step_V)
        return new | {"U": U, "V": V, "L": L}

    def _pull(self, X: PyTree, a: PyTree, b: PyTree, L: jax.Array) -> tuple[PyTree, jax.Array, jax.Array]:
        """(Y = (a a^T - b b^T) X, mean over probes; what divides the rate; the running bound) for X = U or V."""
        k = jax.tree.leaves(a)[0].shape[0]
        aX, bX, XX = _inner(a, X), _inner(b, X), _inner(X, X)
        Y = trees.subtract(_mix(aX.T / k, a), _mix(bX.T / k, b))
        # |a a^T X X^T|_F and the same of b, of means over probes; for one probe |a| |X X^T a|
        size = lambda x, xX: jnp.sqrt(jnp.maximum(jnp.sum(_inner(x, x) * (xX @ XX @ xX.T)), 0.0)) / k
        present = size(a, aX) + size(b, bX)
        bound = running_bound(L, present, self.lipschitz_decay)
        if self.order == "bounded":
            return Y, bound, bound
        if self.order == "1st":
            present = jnp.sqrt(jnp.maximum(jnp.sum(_inner(Y, Y) * XX), 0.0))  # |(a a^T - b b^T) X X^T|
        return Y, present, bound

    def _balanced(self, key: jax.Array, U: PyTree, V: PyTree) -> tuple[PyTree, PyTree]:
        """U and V of equal norms, and the same U V^T. "bounded": of more equal U^T U and V^T V too."""
        UU, VV = _inner(U, U), _inner(V, V)
        sizes = jnp.trace(UU), jnp.trace(VV)
        both = (sizes[0] > 0) & (sizes[1] > 0)  # at the start U is zero
        ratio = jnp.where(both, sizes[0] / jnp.where(both, sizes[1], 1.0), 1.0) ** 0.25
        if self.order != "bounded":
            ratio = jnp.where(jax.random.bernoulli(key, np.float32(_RESCALES)), ratio, 1.0)
            return trees.scale(1.0 / ratio, U), trees.scale(ratio, V)
        UU, VV = UU / ratio**2, VV * ratio**2
        S = jnp.where(both, 0.1 / jnp.maximum(jnp.trace(UU) + jnp.trace(VV), TINY), 0.0) * (UU - VV)
        even = jnp.eye(self.rank, dtype=S.dtype) + 0.5 * S @ S  # exp(-S) and exp(S) to second order
        return _mix((even - S) / ratio, U), _mix((even + S) * ratio, V)

    # -- Q and P, of k vectors (k, *param.shape) -----------------------------------------------------------------------

    def _Q(self, state: PyTree, x: PyTree) -> PyTree:
        """(I + U V^T) (d x)."""
        x = _times(state["d"], x)
        return trees.add(x, _mix(_inner(x, state["V"]), state["U"])) if self.rank else x

    def _Qt(self, state: PyTree, x: PyTree) -> PyTree:
        """d (I + V U^T) x."""
        x = trees.add(x, _mix(_inner(x, state["U"]), state["V"])) if self.rank else x
        return _times(state["d"], x)

    def _inverse_Q(self, state: PyTree, x: PyTree) -> PyTree:
        """(x - U K^-1 V^T x) / d."""
        if self.rank:
            U, V = state["U"], state["V"]
            K = _eye(self.rank, V) + _inner(V, U)
            x = trees.subtract(x, _mix(jnp.linalg.solve(K, _inner(x, V).T).T, U))
        return _over(x, state["d"])

    def _inverse_Qt(self, state: PyTree, x: PyTree) -> PyTree:
        """x / d - V K^-T U^T (x / d)."""
        x = _over(x, state["d"])
        if self.rank:
            U, V = state["U"], state["V"]
            K = _eye(self.rank, V) + _inner(V, U)
            x = trees.subtract(x, _mix(jnp.linalg.solve(K.T, _inner(x, U).T).T, V))
        return x

    def apply(self, structure, state, vector):
        with jax.default_matmul_precision(self.precision):
            return _only(self._Qt(state, self._Q(state, _one(vector))))

    def invert(self, structure, state, vector):
        with jax.default_matmul_precision(self.precision):
            return _only(self._inverse_Q(state, self._inverse_Qt(state, _one(vector))))

    def partition_specs(self, structure, state, param_specs, mesh):
        is_spec = lambda node: isinstance(node, PartitionSpec)
        bases = jax.tree.map(lambda spec: PartitionSpec(None, *spec), param_specs, is_leaf=is_spec)
        specs = {"d": param_specs, "L": PartitionSpec(), "seen": PartitionSpec()}
        return specs | ({"U": bases, "V": bases} if self.rank else {})

    def blocks(self, structure):
        return [(name, f"{what} of rank {self.rank}", size) for name, what, size in super().blocks(structure)]


def _inner(X: PyTree, Y: PyTree) -> jax.Array:
    """X^T Y (m, r), the inner products of m vectors with r."""

    def leaf(x, y):
        axes = tuple(range(1, x.ndim))
        return jax.lax.dot_general(x, y, ((axes, axes), ((), ())))

    return functools.reduce(operator.add, jax.tree.leaves(jax.tree.map(leaf, X, Y)))


def _mix(C: jax.Array, X: PyTree) -> PyTree:
    """X C^T: m combinations of r vectors, by C (m, r)."""
    return jax.tree.map(lambda x: jnp.tensordot(C, x, axes=1), X)


def _eye(rank: int, X: PyTree) -> jax.Array:
    return jnp.eye(rank, dtype=trees.width(X))


def _largest(x: PyTree) -> jax.Array:
    """max |x|."""
    return functools.reduce(jnp.maximum, [jnp.max(jnp.abs(a), initial=0.0) for a in jax.tree.leaves(x)])


def _minus(X: PyTree, step: jax.Array, Y: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x - step * y, X, Y)


def _times(d: PyTree, x: PyTree) -> PyTree:
    return jax.tree.map(lambda d, x: d * x, d, x)


def _over(x: PyTree, d: PyTree) -> PyTree:
    return jax.tree.map(lambda x, d: x / d, x, d)


def _one(vector: PyTree) -> PyTree:
    return jax.tree.map(lambda a: a[None], vector)


def _only(vectors: PyTree) -> PyTree:
    return jax.tree.map(lambda a: a[0], vectors)
