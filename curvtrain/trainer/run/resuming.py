"""What a new program says counts from the first step after a resume, where the optimizer's state remembers it too.

Most options live in the program alone: rates, schedules, decays. Some are kept in an optimizer's state, so that they
can be read there, and a checkpoint brings back the old ones: the constants of `optax.inject_hyperparams`, a constant
damping in a `Request`, the numbers that make a `Posterior`, and the interpolation of `optax.contrib.schedule_free`.
These are taken from a state made anew.
"""

import dataclasses
from typing import Any

import jax
import optax

from curvtrain.curvature.posterior import Posterior
from curvtrain.curvature.request import Request
from curvtrain.trainer.disk.reading import is_constant
from curvtrain.trainer.mesh.sharding import path_name
from curvtrain.trainer.run.plan import Plan
from curvtrain.trainer.state import TrainState

PyTree = Any


def with_new_constants(plan: Plan, state: TrainState) -> tuple[TrainState, dict[str, tuple[Any, Any]]]:
    """(a restored state with the program's constants, {name of such a leaf: (the old value, the new one)})."""
    names = constants(plan.layout.state.opt_state)
    if not names:
        return state, {}
    placed = {name: leaf.sharding for name, leaf in _leaves(plan.layout.state.opt_state) if name in names}
    first = lambda params: plan.layout.first_opt_state(plan.layout.objective, params)
    made = lambda params: {name: leaf for name, leaf in _leaves(first(params)) if name in names}
    new = jax.jit(made, out_shardings=placed)(state.params)
    old = {name: leaf for name, leaf in _leaves(state.opt_state) if name in names}
    before, after = jax.device_get((old, new))
    values = {name: (before[name].item(), after[name].item()) for name in sorted(names)}
    changed = {name: pair for name, pair in values.items() if pair[0] != pair[1]}
    take = lambda path, leaf: new.get(f"opt_state/{path_name(path)}", leaf)
    opt_state = jax.tree_util.tree_map_with_path(take, state.opt_state)
    return dataclasses.replace(state, opt_state=opt_state), changed


def constants(opt_state: PyTree) -> set[str]:
    """The names of those leaves of an optimizer's state that are numbers of the program, and no update changes."""
    leaves = dict(_leaves(opt_state))
    scheduled = [f"{name}/".replace("/hyperparams_states/", "/hyperparams/") for name in leaves]
    follows = lambda name: any(other.startswith(f"{name}/") for other in scheduled if other[:-1] not in leaves)
    found = {name for name, leaf in leaves.items() if is_constant(name) and leaf.shape == () and not follows(name)}
    for name, node in _nodes(opt_state, Request):
        if node.constant and node.damping is not None:
            found.add(f"{name}/damping")
    for name, node in _nodes(opt_state, Posterior):
        found |= {f"{name}/{constant}" for constant in node.constants}
    return found | {f"{name}/b1" for name, _ in _nodes(opt_state, optax.contrib.ScheduleFreeState)}


def _leaves(opt_state: PyTree) -> list[tuple[str, Any]]:
    return [(f"opt_state/{path_name(path)}", leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state)]


def _nodes(opt_state: PyTree, kind: type) -> list[tuple[str, Any]]:
    """The parts of an optimizer's state that are of a type, by name."""
    found = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=lambda node: isinstance(node, kind))
    name = lambda path: "/".join(filter(None, ("opt_state", path_name(path))))
    return [(name(path), node) for path, node in found if isinstance(node, kind)]
