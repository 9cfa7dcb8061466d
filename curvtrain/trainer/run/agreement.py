"""Several processes need the same run: with different ones they would wait for each other, or train nonsense."""

import zlib
from typing import Any

import jax

from curvtrain.trainer.data import checksum, eval_batches
from curvtrain.trainer.disk.reading import flat
from curvtrain.trainer.mesh import distributed
from curvtrain.trainer.run.plan import Plan
from curvtrain.trainer.run.programs import HORIZON


def check_same_run(plan: Plan, eval_data: Any, description: dict[str, Any]) -> None:
    """Raises ValueError on all processes if options, data or schedule differ; names them."""
    if jax.process_count() == 1:
        return
    data = None
    if eval_data is not None:
        data = checksum(next(eval_batches(eval_data, plan.eval_batch_size))[0])
    kinds = map(str, map(plan.programs.kind, range(min(plan.config.steps, HORIZON))))
    options = {f"TrainerConfig({name})": repr(value) for name, value in vars(plan.config).items()}
    del options["TrainerConfig(progress)"]
    rest = {
        "checksum of eval_data's first batch": data,
        "CurvatureSchedule (checksum of its steps)": _crc(" ".join(kinds)),
    }
    distributed.check_same({**options, **flat(description), **rest})


def check_same_programs(plan: Plan) -> None:
    """Raises ValueError if processes lowered different programs: layer sizes, learning rates and code differ."""
    if jax.process_count() == 1:
        return
    programs = {}
    for kind in plan.programs.kinds:
        lines = plan.programs.lower(kind).as_text().splitlines()
        own = (line for line in lines if "callback" not in line)  # such lines hold addresses in the process
        programs[f"model, loss, optimizer or estimator (checksum of {kind!s})"] = _crc("\n".join(own))
    distributed.check_same(programs)


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
