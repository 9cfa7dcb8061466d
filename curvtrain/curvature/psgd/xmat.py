"""X-shaped PSGD: Q = diag(a) + antidiag(b), a sum of 2 x 2 blocks of paired entries. Symbols as in `base.py`, and:

| symbol | meaning |
|---|---|
| x~ | x in reverse: entry i of x is paired with entry i of x~ |
| a, b | row i of Q has a_i in column i and b_i in that of its partner |
| p, q | Q h, Q^-T v |
| D | a a~ - b b~, the determinants of the blocks |

Reverse order of all axes of an array is the reverse order of its entries: nothing is reshaped.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from curvtrain import _checks
from curvtrain.curvature.psgd.base import (
    Preconditioner,
    Structure,
    accept,
    check_order,
    choose,
    initial_scale,
    mean_size,
    running_bound,
    step_length,
)

PyTree = Any

PAIRINGS = ("leaf", "flat")


@dataclasses.dataclass(frozen=True)
class XMat(Preconditioner):
    """A 2 x 2 block for every pair of parameters: 2 n numbers, O(n) work, the cheapest P that is not diagonal.

    Attributes:
      pairing: "leaf" pairs entries i and N - 1 - i of every parameter (of every layer of a scanned one), each with a
        step of its own. "flat" pairs those of all parameters as one vector, as in the original code: it moves every
        entry across devices.
      order: how a step is normalised: "2nd" by the present bound of the curvature, "bounded" by a running one, "1st" by
        the size of the direction.
    """

    pairing: str = "leaf"
    order: str = "2nd"

    def __post_init__(self):
        super().__post_init__()
        _checks.one_of("XMat(pairing)", self.pairing, PAIRINGS)
        check_order("XMat", self.order, self.lipschitz_decay)

    def mixes(self):
        return self.pairing == "flat"

    def init(self, structure):
        start = math.sqrt(1.0 if self.initial_scale is None else self.initial_scale)
        arrays = self._arrays(structure, structure.like())
        leads = [a.shape[:lead] for a, lead in zip(arrays, self._leads(structure), strict=True)]
        state = {
            "a": [a + start for a in arrays],
            "b": arrays,
            "L": [jnp.zeros(lead, structure.dtype) for lead in leads],
            "seen": [jnp.zeros(lead, bool) for lead in leads],
        }
        return {name: self._tree(structure, leaves) for name, leaves in state.items()}

    def fit(self, structure, state, v, h, key, rate):
        hs = self._probes(structure, h)
        noisy = self._probes(structure, self.noisy(key, h))
        floors = self._floors(structure, h, v is None)
        vs = [None] * len(hs) if v is None else self._probes(structure, v)
        state = {name: jax.tree.leaves(tree) for name, tree in state.items()}
        found = {name: [] for name in state}
        failures = jnp.int32(0)
        for i, lead in enumerate(self._leads(structure)):
            old = {name: leaves[i] for name, leaves in state.items()}
            new = self._step(old, vs[i], noisy[i], hs[i], floors[i], lead, rate)
            accepted, failed = accept(hs[i], new, lead)
            failures += jnp.sum(failed, dtype=jnp.int32)
            for name, leaf in choose(accepted, new, old).items():
                found[name].append(leaf)
        return {name: self._tree(structure, leaves) for name, leaves in found.items()}, failures

    def _step(self, old: dict[str, jax.Array], v, h, exact, floor, lead: int, rate) -> dict[str, jax.Array]:
        """One array: a, b (*lead, ...), L (*lead), v and h (k, *lead, ...); `exact` is h without noise."""
        a, b = old["a"], old["b"]
        axes = tuple(range(lead, a.ndim))
        flip = lambda x: jnp.flip(x, axis=tuple(range(x.ndim - len(axes), x.ndim)))
        largest = lambda x: jnp.max(x, axis=axes, keepdims=True, initial=0.0)
        mean = lambda x: jnp.mean(x, axis=0)
        if self.initial_scale is None:
            scale = initial_scale(v, exact, (0, *(axis + 1 for axis in axes)), floor)
            a = a * jnp.where(old["seen"], 1.0, jnp.sqrt(scale)).reshape(largest(a).shape)
        a_, b_ = flip(a), flip(b)
        D = a * a_ - b * b_

        p = a * h + b * flip(h)
        p2, pp = mean(jnp.square(p)), mean(p * flip(p))
        floor = floor.reshape(largest(a).shape)
        fa, fb = floor * a, floor * b
        p2, pp = p2 + jnp.square(fa) + jnp.square(fb), pp + fa * flip(fb) + fb * flip(fa)
        if v is None:  # v integrated out: E[q q^T] = Q^-T Q^-1
            q2 = (jnp.square(a_) + jnp.square(b_)) / jnp.square(D)
            qq = -(a_ * b + a * b_) / jnp.square(D)
        else:
            q = (a_ * v - b_ * flip(v)) / D
            q2, qq = mean(jnp.square(q)), mean(q * flip(q))
        gA, gB = p2 - q2, jnp.where(_middle(a.shape, axes), 0.0, pp - qq)

        present = largest(p2 + q2)
        L = running_bound(old["L"].reshape(present.shape), present, self.lipschitz_decay)
        if self.order == "bounded":
            size = L
        elif self.order == "2nd":
            size = present
        else:
            size = jnp.maximum(largest(jnp.abs(gA)), largest(jnp.abs(gB)))
        step = step_length(rate, size)
        return {
            "a": a - step * (gA * a + gB * b_),
            "b": b - step * (gA * b + gB * a_),
            "L": L.reshape(old["L"].shape),
            "seen": jnp.ones_like(old["seen"]),
        }

    def apply(self, structure, state, vector):
        def leaf(a, b, g, flip):
            ab = a * b
            return (jnp.square(a) + flip(jnp.square(b))) * g + (ab + flip(ab)) * flip(g)

        return self._map(structure, state, vector, leaf)

    def invert(self, structure, state, vector):
        def leaf(a, b, x, flip):
            a_, b_ = flip(a), flip(b)
            D = a * a_ - b * b_
            q = (a_ * x - b_ * flip(x)) / D  # Q^-T x
            return (a_ * q - b * flip(q)) / D  # Q^-1 q

        return self._map(structure, state, vector, leaf)

    def _map(self, structure: Structure, state: PyTree, vector: PyTree, function) -> PyTree:
        out = []
        leaves = (jax.tree.leaves(state["a"]), jax.tree.leaves(state["b"]), self._arrays(structure, vector))
        for a, b, x, lead in zip(*leaves, self._leads(structure), strict=True):
            out.append(function(a, b, x, lambda y, lead=lead: jnp.flip(y, axis=tuple(range(lead, y.ndim)))))
        return structure.unravel(out[0]) if self.pairing == "flat" else structure.treedef.unflatten(out)

    def partition_specs(self, structure, state, param_specs, mesh):
        everywhere = jax.tree.map(lambda _: PartitionSpec(), state)
        return everywhere if self.pairing == "flat" else everywhere | {"a": param_specs, "b": param_specs}

    # -- parameters as the arrays within which entries are paired ------------------------------------------------------

    def _arrays(self, structure: Structure, vector: PyTree) -> list[jax.Array]:
        return [structure.ravel(vector)] if self.pairing == "flat" else structure.treedef.flatten_up_to(vector)

    def _probes(self, structure: Structure, vectors: PyTree) -> list[jax.Array]:
        if self.pairing == "flat":
            return [jax.vmap(structure.ravel)(vectors)]
        return structure.treedef.flatten_up_to(vectors)

    def _floors(self, structure: Structure, h: PyTree, whitens: bool) -> list[jax.Array]:
        if self.pairing == "leaf":
            return self.floors(structure, h, whitens)
        return [self.share(structure, whitens) * mean_size(jax.vmap(structure.ravel)(h))]

    def _leads(self, structure: Structure) -> tuple[int, ...]:
        return (0,) if self.pairing == "flat" else structure.scan_axes

    def _tree(self, structure: Structure, arrays: list[jax.Array]) -> PyTree:
        return arrays[0] if self.pairing == "flat" else structure.treedef.unflatten(arrays)


def _middle(shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """Where an entry is its own partner: in the middle of an odd number of them, whose block is 1 x 1."""
    found = jnp.ones((1,) * len(shape), bool)
    for axis in axes:
        n = shape[axis]
        index = jnp.arange(n).reshape(*(n if other == axis else 1 for other in range(len(shape))))
        found = found & (2 * index == n - 1)
    return found
