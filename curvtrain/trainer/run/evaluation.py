"""Evaluation: metrics over all of a data set, exact over a ragged last batch."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from curvtrain.trainer.data import eval_batches
from curvtrain.trainer.run.plan import Plan
from curvtrain.trainer.state import TrainState
from curvtrain.trainer.watch.metrics import Metrics, compute, merge


def evaluate(
    plan: Plan, state: TrainState, data: Any, interrupted: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """The metrics of a state by name.

    A model that draws random numbers when it is evaluated has other ones for every batch, and the same in every
    evaluation. They depend on the size of the batches, as a batch is drawn for as a whole.

    Args:
      plan: of the run.
      state: what `TrainState.evaluated` and `Trainer(eval_params)` choose of it is evaluated, or draws around that.
      data: a dict of arrays or a finite grain dataset.
      interrupted: is asked before every batch; if it says yes, evaluation ends and the result is None.
    """
    evaluated = plan.evaluated(state)
    total: Metrics | None = None
    batches = eval_batches(data, plan.eval_batch_size, check=plan.check_batch)
    for index, (batch, real) in enumerate(batches):
        if interrupted():
            return None
        if plan.coupling and not real.all():
            raise ValueError(
                f"evaluate(data): the last batch was padded to {plan.eval_batch_size} examples, but {plan.coupling}: "
                f"padding would change it. Give TrainerConfig(eval_batch_size) a divisor of the number of examples."
            )
        rows = int(real.sum())
        put = plan.batches.put({"batch": batch, "real": real}, whole=True)
        cut = rows if rows < len(real) and plan.metrics_count_rows else None
        seen = plan.programs.evaluate(*evaluated, put["batch"], put["real"], state.key, np.uint32(index), rows=cut)
        total = merge(total, jax.device_get(seen))
    if total is None:
        raise ValueError("evaluate(data) has no examples.")
    return compute(total)
