"""What a run will be, before anything is allocated: mesh, shapes, shardings, data and the compiled programs.

The abstract training state made here is at once the layout into which the state is born, the target into which a
checkpoint is restored, and what the dry run reports on.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from curvtrain.curvature import CurvatureEstimator, CurvatureSchedule
from curvtrain.curvature.request import check_requests, requested_part, requests
from curvtrain.losses import Loss
from curvtrain.objective import Objective, annotated_specs, batch_size
from curvtrain.trainer import sharding
from curvtrain.trainer.checkpoint import saved_run
from curvtrain.trainer.config import TrainerConfig
from curvtrain.trainer.data import CURVATURE, Batch, check_arrays, eval_batches, make_train_data
from curvtrain.trainer.report import DryRun, ProgramReport, StateReport
from curvtrain.trainer.state import TrainState
from curvtrain.trainer.step import Kind, MetricsFn, eval_step, telemetry, train_step

PyTree = Any

HORIZON = 10_000  # steps of the schedule that are looked at to learn which programs a run needs


@dataclasses.dataclass(frozen=True)
class Task:
    """The methods of a Trainer that say what is trained."""

    name: str
    build_model: Callable[[nnx.Rngs], nnx.Module]
    predict: Callable[[Any, Any], Any]
    loss: Loss
    metrics: MetricsFn


class Plan:
    """Mesh, data, abstract state and programs of a run. Building one checks everything and allocates nothing."""

    def __init__(
        self,
        config: TrainerConfig,
        task: Task,
        train_data: Any,
        optimizer: optax.GradientTransformation,
        estimator: CurvatureEstimator | None,
        schedule: CurvatureSchedule,
    ):
        self.config, self.task, self.estimator, self.schedule = config, task, estimator, schedule
        self.tx = _with_extra_args(optimizer)
        self.choices: dict[str, Any] = {}  # what was left open in the estimator
        self.mesh = sharding.make_mesh(config.mesh)
        self._check_batch_sizes()
        self._shard, self._shards = sharding.process_rows(self.mesh)
        self.data = make_train_data(train_data, config.batch_size, config.seed, self._shard, self._shards)
        self.data.iterator(CURVATURE, self.refresh_multiple)  # raises if the data does not hold so many examples
        self.state, self.objective = self._abstract_state()
        self.batch = self._abstract_batch(self.data.first())
        self.outputs = self._abstract_outputs()
        task.loss.check(self.data.sample(), self.outputs)
        self._steps: dict[Kind, Any] = {}

    # -- checks ----------------------------------------------------------------------------------------------------

    def _check_batch_sizes(self) -> None:
        config, shards = self.config, sharding.batch_shards(self.mesh)
        mesh = f"the mesh {dict(self.mesh.shape)}, which splits a batch into {shards}"
        for name, size in (("batch_size", config.batch_size), ("eval_batch_size", config.eval_batch_size)):
            if size is not None and size % shards:
                raise ValueError(f"TrainerConfig({name}={size}) should be divisible over {mesh}.")
        if config.batch_size // config.accumulate % shards:
            raise ValueError(
                f"TrainerConfig(accumulate={config.accumulate}) leaves micro-batches of "
                f"{config.batch_size // config.accumulate} examples, which are not divisible over {mesh}."
            )
        wide = self.schedule.batch_size
        if wide is not None and wide % config.batch_size:
            raise ValueError(
                f"CurvatureSchedule(batch_size={wide}) should be a multiple of TrainerConfig(batch_size="
                f"{config.batch_size}): a refresh walks it in training batches."
            )

    def check_eval_data(self, data: Any, argument: str = "eval_data") -> None:
        """Raises TypeError or ValueError if data to be evaluated does not fit the loss and the model.

        Arrays are looked at as a whole, of a grain dataset the first batch.
        """
        first = next(eval_batches(data, self.eval_batch_size, argument), None)
        if first is None:
            raise ValueError(f"{argument} is an empty grain dataset.")
        self.task.loss.check(check_arrays(argument, data if isinstance(data, Mapping) else first), self.outputs)
        self.eval_program.eval_shape(self.state.params, self.state.model_state, self._abstract_batch(first))

    @property
    def eval_batch_size(self) -> int:
        """Examples per evaluation step."""
        return self.config.eval_batch_size or self.config.batch_size

    @property
    def refresh_multiple(self) -> int:
        """How many training batches a refresh sees."""
        return (self.schedule.batch_size or self.config.batch_size) // self.config.batch_size

    # -- abstract values -------------------------------------------------------------------------------------------

    def _model(self) -> tuple[Objective, PyTree, PyTree]:
        """The objective, the parameters before the first step, and their NNX sharding annotations."""
        with nnx.use_eager_sharding(False):
            model = self.task.build_model(nnx.Rngs(self.config.seed))
        if not isinstance(model, nnx.Module):
            raise TypeError(f"{self.task.name}.build_model should return an nnx.Module, not {type(model).__name__}.")
        accumulate = self.config.accumulate
        microbatch = None if accumulate == 1 else self.config.batch_size // accumulate
        objective, params = Objective.from_model(model, self.task.predict, self.task.loss, microbatch=microbatch)
        return objective, params, annotated_specs(model)

    def _begin(self, objective: Objective, params: PyTree) -> TrainState:
        """The training state before the first step."""
        opt_state = self.tx.init(params)
        asked = requests(opt_state)
        curvature = None
        if self.estimator is not None:
            curvature = self.estimator.init(*requested_part(asked, objective, params))
        check_requests(asked, curvature, f"{self.task.name}(curvature)")
        ema = None if self.config.ema is None else jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
        return TrainState(
            step=jnp.int32(0),
            params=params,
            model_state=objective.model_state,
            opt_state=opt_state,
            curvature=curvature,
            ema=ema,
            key=jax.random.key(self.config.seed),
        )

    def _settle(self, objective: Objective, params: PyTree) -> None:
        """Fixes what the estimator leaves open: as in the run's checkpoints, or, if there are none, for this mesh."""
        if self.estimator is not None:
            asked = requests(self.tx.init(params))
            choices = self.estimator.choices(*requested_part(asked, objective, params), self.mesh)
            if choices and self.config.workdir is not None:
                saved = saved_run(self.config.workdir).get("curvature_choices", {})
                choices |= {name: value for name, value in saved.items() if name in choices}
            if choices:
                estimator: Any = self.estimator
                self.choices, self.estimator = choices, dataclasses.replace(estimator, **choices)

    def _abstract_state(self) -> tuple[TrainState, Objective]:
        static = {}

        def init():
            static["objective"], params, static["annotated"] = self._model()
            self._settle(static["objective"], params)
            return self._begin(static["objective"], params)

        shapes = jax.eval_shape(init)
        self.schedule = self.schedule.settled(requests(shapes.opt_state))
        params = sharding.param_specs(shapes.params, static["annotated"], self.config.sharding, self.mesh)
        replicated = lambda tree: jax.tree.map(lambda _: PartitionSpec(), tree)
        curvature = shapes.curvature
        if self.estimator is not None:
            _, own = requested_part(requests(shapes.opt_state), static["objective"], params)
            curvature = self.estimator.partition_specs(curvature, own, self.mesh)
        specs = TrainState(
            step=PartitionSpec(),
            params=params,
            model_state=replicated(shapes.model_state),
            opt_state=sharding.like_params(shapes.opt_state, shapes.params, params, self.mesh),
            curvature=curvature,
            ema=None if shapes.ema is None else params,
            key=PartitionSpec(),
        )
        layout = sharding.named(self.mesh, specs)
        abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, layout)
        return abstract, static["objective"].with_state(shapes.model_state)

    def _abstract_batch(self, local: Batch, multiple: int = 1) -> PyTree:
        rows = NamedSharding(self.mesh, sharding.batch_spec(self.mesh))
        dtype = lambda a: jax.dtypes.canonicalize_dtype(a.dtype)
        shape = lambda a: (a.shape[0] * self._shards * multiple, *a.shape[1:])
        return {name: jax.ShapeDtypeStruct(shape(a), dtype(a), sharding=rows) for name, a in local.items()}

    def _abstract_outputs(self) -> PyTree:
        predict = lambda params, state, batch: self.objective.with_state(state).predict(params, batch)
        return jax.eval_shape(predict, self.state.params, self.state.model_state, self.batch)

    @property
    def measured(self) -> tuple[Objective, PyTree]:
        """(the objective, its abstract parameters) that the estimator sees: those that the optimizer asks about."""
        return requested_part(requests(self.state.opt_state), self.objective, self.state.params)

    # -- values ----------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> TrainState:
        """The sharding of every leaf of the state."""
        return jax.tree.map(lambda a: a.sharding, self.state)

    def initial_state(self) -> TrainState:
        """The state before the first step, born in its layout: no device ever holds more than its share."""
        return jax.jit(lambda: self._begin(*self._model()[:2]), out_shardings=self.layout)()

    def put(self, batch: Batch, *, whole: bool = False) -> dict[str, jax.Array]:
        """A process's rows of a batch as global arrays; `whole`: each process gives all rows, and its own are taken."""
        rows, shards = NamedSharding(self.mesh, sharding.batch_spec(self.mesh)), self._shards
        if jax.process_count() == 1:
            return jax.device_put(batch, rows)
        if whole:
            batch = {name: np.split(a, shards)[self._shard] for name, a in batch.items()}
        put = lambda a: jax.make_array_from_process_local_data(rows, a, (len(a) * shards, *a.shape[1:]))
        return {name: put(a) for name, a in batch.items()}

    def description(self) -> dict[str, Any]:
        """What makes this run this run, as plain JSON: a checkpoint is resumed only if all of it is the same."""
        estimator = None if self.estimator is None else type(self.estimator).__name__
        return {
            "trainer": self.task.name,
            "seed": self.config.seed,
            "train_data": self.data.description(),
            "curvature": estimator,
            **({"curvature_choices": self.choices} if self.choices else {}),
        }

    # -- programs --------------------------------------------------------------------------------------------------

    def kind(self, step: int) -> Kind:
        """What the schedule has for a step."""
        if self.estimator is None:
            return Kind()
        update = self.estimator.absorbs and self.schedule.updates(step)
        return Kind(update, self.estimator.factorises and self.schedule.refreshes(step))

    @functools.cached_property
    def kinds(self) -> list[Kind]:
        """The kinds of step that the schedule has, in order of appearance (in its first steps, if the run is long)."""
        return list(dict.fromkeys(map(self.kind, range(min(self.config.steps, HORIZON)))))

    def wide(self, kind: Kind) -> bool:
        """Whether a step of this kind needs a curvature batch besides the training batch."""
        return kind.refresh and self.refresh_multiple > 1

    def is_compiled(self, kind: Kind) -> bool:
        """Whether `step_program(kind)` is ready."""
        return kind in self._steps

    def step_program(self, kind: Kind) -> Any:
        """The compiled step of a kind; traced and compiled once."""
        if kind not in self._steps:
            self._steps[kind] = self.lower(kind).compile()
        return self._steps[kind]

    @functools.lru_cache(maxsize=8)  # noqa: B019 - a plan lives as long as its trainer
    def lower(self, kind: Kind) -> Any:
        """The traced step of a kind: raises what is wrong with model, loss or optimizer, compiles nothing."""
        microbatch = self.config.batch_size // self.config.accumulate
        step = train_step(
            kind,
            self.objective,
            self.tx,
            self.estimator,
            self.task.metrics,
            self.config.ema,
            microbatch,
            self.schedule.update_first,
        )
        wide = self._abstract_batch(self.data.first(), self.refresh_multiple) if self.wide(kind) else None
        out = (self.layout, NamedSharding(self.mesh, PartitionSpec()))
        with jax.set_mesh(self.mesh):  # estimators split their work over it
            return jax.jit(step, donate_argnums=0, out_shardings=out).lower(self.state, self.batch, wide)

    @functools.cached_property
    def eval_program(self) -> Any:
        """The evaluation step, `(params, model_state, batch) -> metrics`; compiled per shape of its batch."""
        return jax.jit(
            eval_step(self.objective, self.task.metrics, self.state.params),
            out_shardings=NamedSharding(self.mesh, PartitionSpec()),
        )

    @functools.cached_property
    def telemetry(self) -> Callable[[Any], dict[str, jax.Array]]:
        """Scalars of the curvature; in one program, for many small ones at once can wait for each other's devices."""
        return jax.jit(telemetry, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    @functools.cached_property
    def all_finite(self) -> Callable[[PyTree], jax.Array]:
        """Whether every element of a tree is finite."""
        finite = lambda tree: jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(tree)]))
        return jax.jit(finite, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    # -- dry run ---------------------------------------------------------------------------------------------------

    def state_report(self) -> StateReport:
        """Bytes of the state on each device."""
        config = self.config
        kept = 0 if config.workdir is None else config.keep_latest + config.keep_best + 1  # one is being written
        return StateReport.of(self.state, kept)

    def report(self) -> DryRun:
        """Memory and FLOPs of every program, and of the state; allocates nothing."""
        programs = [ProgramReport.of(str(kind), self.step_program(kind)) for kind in self.kinds]
        return DryRun(programs, self.state_report(), dict(self.mesh.shape), batch_size(self.batch))


def _with_extra_args(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    if isinstance(optimizer, optax.MultiSteps):  # takes extra arguments, but does not say so
        update: Any = optimizer.update
        return optax.GradientTransformationExtraArgs(optimizer.init, update)
    return optax.with_extra_args_support(optimizer)
