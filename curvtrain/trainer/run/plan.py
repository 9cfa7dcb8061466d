"""The plan of a run: its data, its layout and its programs, checked against each other before anything is allocated."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from curvtrain._extra import accepting
from curvtrain.curvature import CurvatureEstimator, CurvatureSchedule
from curvtrain.losses import Loss
from curvtrain.objective import batch_size, by_path, path_name
from curvtrain.trainer.config import TrainerConfig
from curvtrain.trainer.data import CURVATURE, Batch, Streams, first_and_sample, make_train_data
from curvtrain.trainer.data.placement import BatchLayout
from curvtrain.trainer.disk.reading import saved_run, steps_in
from curvtrain.trainer.disk.restoring import restore_newest
from curvtrain.trainer.mesh import distributed, sharding
from curvtrain.trainer.run.layout import Layout, Task
from curvtrain.trainer.run.programs import Programs
from curvtrain.trainer.run.sampling import Sampling, number_of_examples
from curvtrain.trainer.run.step import Evaluated
from curvtrain.trainer.state import TrainState
from curvtrain.trainer.watch.metrics import counts_rows
from curvtrain.trainer.watch.report import DryRun, ProgramReport, StateReport


class Plan:
    """A run before it runs. Building a plan checks everything and allocates nothing.

    Attributes:
      config, task, tx: the run's options, task and optimizer.
      batches: how batches lie on the mesh.
      data: the training data.
      layout: the abstract state.
      programs: the compiled programs, made when they are used.
      eval_params: the Trainer's argument of that name, or None.
      sampling: how parameters are drawn.
      schedule_note: how periods that the schedule leaves open were chosen, for the console; empty if it says them.
      outputs: the model's outputs for a training batch, as shapes.
      metrics_count_rows: whether some metrics of an evaluation would count rows that pad its last batch.
    """

    def __init__(
        self,
        config: TrainerConfig,
        task: Task,
        train_data: Any,
        optimizer: optax.GradientTransformation,
        estimator: CurvatureEstimator | None,
        schedule: CurvatureSchedule,
        eval_params: Evaluated | None = None,
        mc_samples: int = 1,
        predictive_samples: int = 0,
    ):
        self.config, self.task, self.tx, self.eval_params = config, task, accepting(optimizer), eval_params
        mesh = sharding.make_mesh(config.mesh)
        _check_batch_sizes(config, schedule, mesh)
        self.batches = BatchLayout.of(mesh)
        rows = self.batches.shard, self.batches.shards
        self.data = make_train_data(train_data, config.batch_size, config.seed, *rows)
        self.refresh_multiple = (schedule.batch_size or config.batch_size) // config.batch_size
        self.data.iterator(CURVATURE, self.refresh_multiple)  # raises if the data does not hold so many examples
        saved = {} if estimator is None or config.workdir is None else saved_run(config.workdir)
        first, multiple = self.data.first(), self.refresh_multiple
        batch = self.batches.abstract(first)
        count = None
        if isinstance(train_data, Mapping):
            arrays = self.data.sample()
            count = lambda objective, params: number_of_examples(arrays, task.loss, objective, params, batch)
        self.layout = Layout(config, task, mesh, self.tx, estimator, saved.get("curvature_choices", {}), count)
        own = task.name, optimizer, self.layout.state.opt_state
        self.sampling = Sampling.of(*own, mc_samples, predictive_samples, mesh, task.loss)
        if eval_params is not None:
            _check_eval_params(f"{task.name}(eval_params)", eval_params, config, self.layout.state)
        wide_batch = self.batches.abstract(first, multiple) if multiple > 1 else None
        settled = schedule.settled(self.layout.requests)
        self.programs = Programs(
            config, self.layout, self.tx, settled, task.metrics, batch, wide_batch, eval_params, self.sampling
        )
        notes = self._update_note(schedule, settled), self._refresh_note(schedule, settled)
        self.schedule_note = "; ".join(filter(None, notes))
        self.outputs = self._abstract_outputs()
        self.coupling = self._checked_coupling(schedule)
        self.metrics_count_rows = True  # until an evaluation is checked
        sample = self.data.sample()
        self.check_batch(sample)
        if isinstance(train_data, Mapping):
            _check_some_count(task.loss, sample)
        self.data.check = self.check_batch

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.layout.mesh

    @property
    def eval_batch_size(self) -> int:
        """Examples per evaluation step."""
        return self.config.eval_batch_size or self.config.batch_size

    def first_state(self) -> tuple[TrainState, Mapping[str, tuple[int, float]]]:
        """(the state before `fit` is called, what was logged by then): of the newest checkpoint, or the initial one.

        It only reads: another job may be at work in the workdir. Raises Mismatch or CheckpointError.
        """
        folder = None if self.config.workdir is None else Path(self.config.workdir).absolute()
        steps = distributed.from_first(lambda: steps_in(folder) if folder is not None and folder.is_dir() else [])
        if folder is None or not steps:
            return self.layout.initial_state(), {}
        found = restore_newest(folder, steps, self.layout.state, self.description())
        for broken, reason in found.damaged.items():
            message = f"Checkpoint {broken} in {folder} is damaged; this is the state of checkpoint {found.step}."
            warnings.warn(f"{message} ({reason})", RuntimeWarning, stacklevel=4)
        return found.state, found.meta.get("logged", {})

    def streams(self) -> Streams:
        """The batches that the run will draw, from the beginning."""
        return Streams(self.data, self.refresh_multiple)

    def check_eval_data(self, data: Any, argument: str = "eval_data") -> None:
        """Raises TypeError or ValueError if data to be evaluated does not fit the loss and the model.

        All arrays are checked; of a grain dataset, the first batch.
        """
        first, sample = first_and_sample(data, self.eval_batch_size, argument)
        self.check_batch(sample)
        self.check_padding(data, argument)
        state = self.layout.state
        batch = self.batches.abstract({"batch": first, "real": np.ones(self.eval_batch_size, bool)})
        evaluated, index = self.evaluated(state), jax.ShapeDtypeStruct((), jnp.uint32)
        seen = self.programs.evaluate.eval_shape(*evaluated, batch["batch"], batch["real"], state.key, index, rows=None)
        self.metrics_count_rows = counts_rows(seen)

    def evaluated(self, state: TrainState) -> tuple[Any, ...]:
        """(params, opt_state, curvature, frozen, model_state), of which the second and third only where they count."""
        params, model_state = state.evaluated
        draws = self.sampling.predictive_samples > 0
        opt_state = state.opt_state if draws or self.eval_params is not None else None
        return params, opt_state, state.curvature if draws else None, state.frozen, model_state

    def check_batch(self, batch: Batch) -> None:
        """Raises TypeError or ValueError if the loss cannot take what a batch, or all data, holds for it."""
        self.task.loss.check_batch(batch, self.outputs)

    def description(self) -> dict[str, Any]:
        """Identifies the run, as plain JSON: a checkpoint is resumed only if all of it is the same."""
        estimator, choices = self.layout.estimator, self.layout.choices
        return {
            "trainer": self.task.name,
            "seed": self.config.seed,
            "train_data": self.data.description(),
            "curvature": None if estimator is None else type(estimator).__name__,
            **({"curvature_choices": choices} if choices else {}),
        }

    def state_report(self) -> StateReport:
        """Bytes of the state on each device."""
        config = self.config
        kept = 0 if config.workdir is None else config.keep_latest + config.keep_best + 1  # one is being written
        return StateReport.of(self.layout.state, kept)

    def report(self) -> DryRun:
        """Memory and FLOPs of every program, and of the state; allocates nothing."""
        programs = [ProgramReport.of(str(kind), self.programs.step(kind)) for kind in self.programs.kinds]
        return DryRun(programs, self.state_report(), dict(self.mesh.shape), batch_size(self.programs.batch))

    def check_padding(self, data: Any, argument: str) -> None:
        """Raises ValueError if the loss of an example depends on others, and data would be padded to be evaluated."""
        rest = batch_size(data) % self.eval_batch_size if isinstance(data, Mapping) and data else 0
        if self.coupling and rest:
            raise ValueError(
                f"{argument} has {batch_size(data)} examples, so that the last of the batches of {self.eval_batch_size}"
                f" would be padded, but {self.coupling}: padding would change it. Give TrainerConfig(eval_batch_size), "
                f"on which such a loss depends, a divisor of the number of examples."
            )

    def _checked_coupling(self, schedule: CurvatureSchedule) -> str:
        """Says how examples' losses depend on each other. Raises ValueError where batches are walked in pieces."""
        whole, state = self.layout.objective.with_microbatch(None), self.layout.state
        said: list[str] = []
        look = lambda state, batch: said.append(state.at(whole).coupling(state.params, batch, None, self.outputs))
        jax.eval_shape(look, state, self.programs.batch)
        (why,) = said
        accumulate = f"TrainerConfig(accumulate={self.config.accumulate})"
        wide = f"CurvatureSchedule(batch_size={schedule.batch_size})"
        pieces = accumulate if self.config.accumulate > 1 else wide if self.refresh_multiple > 1 else ""
        if why and pieces:
            raise ValueError(
                f"{pieces} takes a batch in pieces, but {why}: in pieces it would be another loss. Leave it out, or, "
                f"to have examples compared within smaller batches, take a smaller TrainerConfig(batch_size) and "
                f"average gradients over several of them with optax.MultiSteps."
            )
        return why

    def _abstract_outputs(self) -> Any:
        state, objective = self.layout.state, self.layout.objective.with_microbatch(None)
        predict = lambda state, batch: state.at(objective).predict(state.params, batch)
        return jax.eval_shape(predict, state, self.programs.batch)

    def _update_note(self, schedule: CurvatureSchedule, settled: CurvatureSchedule) -> str:
        """Says how often the curvature absorbs a batch, where an optimizer chose it."""
        asking = [r.optimizer for r in self.layout.requests if r.update_every == settled.update_every]
        if self.layout.estimator is None or schedule.update_every is not None or not asking:
            return ""
        return f"update every {settled.update_every} steps, as optim.{asking[0]} asks"

    def _refresh_note(self, schedule: CurvatureSchedule, settled: CurvatureSchedule) -> str:
        """Says how often the curvature is refreshed, where neither the user nor the estimator does."""
        estimator = self.layout.estimator
        if estimator is None or not estimator.factorises or schedule.refresh_every is not None:
            return ""
        asking = [r.optimizer for r in self.layout.requests if r.damping_every == settled.refresh_every]
        reason = f", as optim.{asking[0]} adapts its damping" if asking else ""
        every = settled.refresh_every
        return f"refresh every {'step' if every == 1 else f'{every} steps'}{reason}"


def _check_eval_params(argument: str, eval_params: Any, config: TrainerConfig, state: TrainState) -> None:
    """Raises TypeError or ValueError unless `eval_params(opt_state, params)` gives parameters."""
    if not callable(eval_params):
        raise TypeError(f"{argument} should be a function of (opt_state, params), not {type(eval_params).__name__}.")
    if config.ema is not None:
        raise ValueError(f"{argument} and TrainerConfig(ema) both say what is evaluated. Leave one of them out.")
    try:
        found = jax.eval_shape(eval_params, state.opt_state, state.params)
    except Exception as error:
        raise TypeError(
            f"{argument} does not take this optimizer's state, {type(state.opt_state).__name__}: {error} Inside of a "
            f"chain or a wrapper, choose its part: lambda opt_state, params: function(opt_state[0], params)."
        ) from error
    shapes = lambda tree: {path_name(path): leaf.shape for path, leaf in by_path(tree).items()}
    if shapes(found) != shapes(state.params):
        raise ValueError(
            f"{argument} should give parameters like those that it is given, {shapes(state.params)}, not "
            f"{shapes(found)}."
        )


def _check_batch_sizes(config: TrainerConfig, schedule: CurvatureSchedule, mesh: Mesh) -> None:
    shards = sharding.batch_shards(mesh)
    where = f"the mesh {dict(mesh.shape)}, which splits a batch into {shards}"
    for name, size in (("batch_size", config.batch_size), ("eval_batch_size", config.eval_batch_size)):
        if size is not None and size % shards:
            raise ValueError(f"TrainerConfig({name}={size}) should be divisible over {where}.")
    if config.batch_size // config.accumulate % shards:
        raise ValueError(
            f"TrainerConfig(accumulate={config.accumulate}) leaves micro-batches of "
            f"{config.batch_size // config.accumulate} examples, which are not divisible over {where}."
        )
    wide = schedule.batch_size
    if wide is not None and wide % config.batch_size:
        raise ValueError(
            f"CurvatureSchedule(batch_size={wide}) should be a multiple of TrainerConfig(batch_size="
            f"{config.batch_size}): a refresh walks it in training batches."
        )


def _check_some_count(loss: Loss, examples: Batch) -> None:
    """Raises ValueError if all examples there are weigh zero."""
    weights = loss.known_weights(examples).product
    if weights is not None and weights.size and not np.any(weights):
        raise ValueError(
            "All examples of train_data weigh zero, by its mask or weights or by the loss's ignore_index: there is "
            "nothing to learn from. A mask is true, or 1, where an example counts."
        )
