"""Diagonal PSGD: P = diag(q^2). Symbols as in `base.py`."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from curvtrain.curvature.psgd.base import Preconditioner, accept, choose, initial_scale
from curvtrain.curvature.psgd.geometry import step_diagonal


@dataclasses.dataclass(frozen=True)
class Elementwise(Preconditioner):
    """One number for every parameter: n numbers, sharded like the parameters, and a step of its own for each leaf.

    T1 = (P h)^2 and T2 = v^2 (whitening: 1), so an entry of P is fitted to rms(v) / rms(h): the inverse norm of a row
    of the Hessian, or the inverse RMS of a gradient's entry. A scanned layer counts as a leaf.
    """

    def init(self, structure):
        start = math.sqrt(1.0 if self.initial_scale is None else self.initial_scale)
        like = structure.like()
        leads = [shape[:lead] for shape, lead in zip(structure.shapes, structure.scan_axes, strict=True)]
        return {
            "q": jax.tree.map(lambda zero: zero + start, like),
            "L": structure.treedef.unflatten([jnp.zeros(lead, structure.dtype) for lead in leads]),
            "seen": structure.treedef.unflatten([jnp.zeros(lead, bool) for lead in leads]),
        }

    def fit(self, structure, state, v, h, key, rate):
        hs, noisy = (structure.treedef.flatten_up_to(tree) for tree in (h, self.noisy(key, h)))
        floors = self.floors(structure, h, v is None)
        vs = [None] * len(hs) if v is None else structure.treedef.flatten_up_to(v)
        state = {name: structure.treedef.flatten_up_to(tree) for name, tree in state.items()}
        found = {name: [] for name in state}
        failures = jnp.int32(0)
        for i, lead in enumerate(structure.scan_axes):
            old = {name: leaves[i] for name, leaves in state.items()}
            q, v_, axes = old["q"], vs[i], tuple(range(lead, old["q"].ndim))
            if self.initial_scale is None:
                scale = initial_scale(v_, hs[i], (0, *(axis + 1 for axis in axes)), floors[i])
                q = q * jnp.expand_dims(jnp.where(old["seen"], 1.0, jnp.sqrt(scale)), axes)
            P = jnp.square(q)
            T1 = jnp.mean(jnp.square(P * noisy[i]), axis=0) + jnp.square(P * jnp.expand_dims(floors[i], axes))
            T2 = jnp.ones_like(q) if v_ is None else jnp.mean(jnp.square(v_), axis=0)
            q, L = step_diagonal("PRO", q, T1, T2, rate, old["L"], self.lipschitz_decay, axes)
            new = {"q": q, "L": L, "seen": jnp.ones_like(old["seen"])}
            accepted, failed = accept(hs[i], new, lead)
            failures += jnp.sum(failed, dtype=jnp.int32)
            for name, leaf in choose(accepted, new, old).items():
                found[name].append(leaf)
        return {name: structure.treedef.unflatten(leaves) for name, leaves in found.items()}, failures

    def apply(self, structure, state, vector):
        return jax.tree.map(lambda q, x: jnp.square(q) * x, state["q"], vector)

    def invert(self, structure, state, vector):
        return jax.tree.map(lambda q, x: x / jnp.square(q), state["q"], vector)

    def partition_specs(self, structure, state, param_specs, mesh):
        return jax.tree.map(lambda _: PartitionSpec(), state) | {"q": param_specs}
