"""What a run is and needs, for the console, before anything of it is allocated."""

from collections.abc import Callable

import jax
from clu import parameter_overview

from curvtrain._text import human_bytes
from curvtrain.trainer.run.plan import Plan


def announce(plan: Plan, say: Callable[[str], None]) -> None:
    """Prints tables of the parameters, the curvature and the state's bytes, and where the run takes place."""
    state, estimator = plan.layout.state, plan.layout.estimator
    say(parameter_overview.get_parameter_overview(state.params, include_stats=False, max_lines=40))
    if state.frozen is not None:
        leaves = jax.tree.leaves(state.frozen)
        size = human_bytes(sum(a.size * a.dtype.itemsize for a in leaves))
        say(f"and {sum(a.size for a in leaves):,} frozen parameters in {len(leaves)} arrays, {size}")
    if estimator is not None and (table := estimator.overview(*plan.layout.measured)):
        say(table)
    say(f"\n{plan.state_report()}\n")
    if plan.schedule_note:
        say(plan.schedule_note)
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), mesh {dict(plan.mesh.shape)}"
    say(f"{devices}; {plan.config.steps} steps of {plan.config.batch_size} examples")
