"""The layout of a run's state: which arrays there are, and where they live, before any of them is allocated.

The abstract training state made here is the layout into which the state is born, the target into which a checkpoint is
restored, and the subject of the dry run's report.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from curvtrain.curvature import CurvatureEstimator
from curvtrain.curvature.posterior import with_examples
from curvtrain.curvature.request import Request, as_wished, check_requests, requested_part, requests
from curvtrain.losses import Loss
from curvtrain.objective import Objective, annotated_specs, by_path, nested, path_name
from curvtrain.trainer.config import TrainerConfig
from curvtrain.trainer.mesh import sharding
from curvtrain.trainer.run.step import MetricsFn, average_of
from curvtrain.trainer.state import TrainState

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Task:
    """The task of a run, as a Trainer's methods and attributes define it.

    Attributes:
      name: the Trainer's class, for messages.
      build_model: makes the model.
      predict: `(model, batch) -> outputs`.
      loss: the loss of the outputs.
      metrics: `(outputs, batch) -> values`.
      trainable: an NNX filter of the parameters that are trained.
      regulariser: a penalty of the parameters, or None.
    """

    name: str
    build_model: Callable[[nnx.Rngs], nnx.Module]
    predict: Callable[[Any, Any], Any]
    loss: Loss
    metrics: MetricsFn
    trainable: Any = nnx.Param
    regulariser: Callable[[PyTree], Any] | None = None


class Layout:
    """The shapes and shardings of a run's state, and how it is born in them. Building a layout allocates nothing.

    Attributes:
      mesh: the devices.
      state: the abstract training state: shapes with shardings.
      objective: the objective, with the abstract model state and frozen parameters.
      estimator: the estimator with its open options fixed, or None.
      choices: the values of those options, by name.
      requests: the optimizer's requests to the estimator.
    """

    def __init__(
        self,
        config: TrainerConfig,
        task: Task,
        mesh: Mesh,
        tx: optax.GradientTransformation,
        estimator: CurvatureEstimator | None,
        saved_choices: Mapping[str, Any],
        examples: Callable[[Objective, PyTree], int] | None = None,
    ):
        """Evaluates the run's state abstractly.

        Args:
          config: the run's options.
          task: the run's task.
          mesh: the devices.
          tx: the optimizer.
          estimator: maintains the curvature, or None.
          saved_choices: the choices in the run's checkpoints, which bind it; empty for a new run.
          examples: the number of training examples for an objective and its parameters; None where nobody knows it.

        Raises:
          TypeError, ValueError: a part that does not fit the others, by its name.
        """
        self.mesh, self.choices = mesh, {}
        self._config, self._task, self._tx, self._examples = config, task, tx, examples
        static: dict[str, Any] = {}

        def begin():
            static["objective"], state, static["annotated"] = self._parts()
            return state

        shapes = jax.eval_shape(begin)
        self.objective: Objective = shapes.at(static["objective"])
        self.requests: list[Request] = requests(shapes.opt_state)
        self.estimator = self._settled(estimator, shapes, saved_choices)
        shapes = dataclasses.replace(shapes, curvature=self._abstract_curvature(shapes))
        shardings = sharding.named(mesh, self._specs(shapes, static["annotated"]))
        abstract = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
        self.state: TrainState = jax.tree.map(abstract, shapes, shardings)

    @property
    def shardings(self) -> TrainState:
        """The sharding of every leaf of the state."""
        return jax.tree.map(lambda a: a.sharding, self.state)

    @property
    def measured(self) -> tuple[Objective, PyTree]:
        """(the objective, its abstract parameters) that the estimator sees: those that the optimizer asks about."""
        return requested_part(self.requests, self.objective, self.state.params)

    def initial_state(self) -> TrainState:
        """The state before the first step, born in its layout: no device ever holds more than its share."""

        def begin():
            objective, state, _ = self._parts()
            if self.estimator is None:
                return state
            part = requested_part(requests(state.opt_state), objective, state.params)
            return dataclasses.replace(state, curvature=self.estimator.init(*part))

        return jax.jit(begin, out_shardings=self.shardings)()

    def first_opt_state(self, objective: Objective, params: PyTree) -> PyTree:
        """The optimizer's state before the first step; posteriors in it know the number of training examples."""
        count = None if self._examples is None else functools.partial(self._examples, objective, params)
        return with_examples(self._tx.init(params), count)

    # -- abstract values -------------------------------------------------------------------------------------------

    def _parts(self) -> tuple[Objective, TrainState, PyTree]:
        """The objective, the state before the first step without its curvature, and the NNX annotations."""
        config, task = self._config, self._task
        with nnx.use_eager_sharding(False):
            model = task.build_model(nnx.Rngs(config.seed))
        if not isinstance(model, nnx.Module):
            raise TypeError(f"{task.name}.build_model should return an nnx.Module, not {type(model).__name__}.")
        objective, params = Objective.from_model(
            model,
            task.predict,
            task.loss,
            microbatch=None if config.accumulate == 1 else config.batch_size // config.accumulate,
            wrt=self._trained(model),
            regulariser=task.regulariser,
        )
        state = TrainState(
            step=jnp.int32(0),
            params=params,
            model_state=objective.model_state,
            opt_state=self.first_opt_state(objective, params),
            curvature=None,
            ema=None if config.ema is None else average_of(params),
            key=jax.random.key(config.seed),
            frozen=objective.frozen or None,
            ema_model_state=self._average_of_state(objective.model_state),
        )
        return objective, state, annotated_specs(model)

    def _average_of_state(self, model_state: PyTree) -> PyTree:
        """The average of the model state before the first step; None without an average, or if nothing moves in it."""
        moves = any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(model_state))
        return average_of(model_state) if moves and self._config.ema is not None else None

    def _trained(self, model: nnx.Module) -> Any:
        """The filter of the trained parameters. Raises ValueError, with some names, if it matches none of them."""
        if self._task.trainable is nnx.Param:
            return nnx.Param
        trained = nnx.All(nnx.Param, self._task.trainable)
        if not by_path(nnx.state(model, trained)):
            names = list(map(path_name, by_path(nnx.state(model, nnx.Param))))
            raise ValueError(
                f"{self._task.name}(trainable={self._task.trainable!r}) matches no parameter of the model. Their names "
                f"are, for example, {names[:4]}; a filter is a class of nnx.Param, nnx.PathContains('head'), or a "
                f"function (path, variable) -> bool, whose path is a tuple."
            )
        return trained

    def _settled(
        self, estimator: CurvatureEstimator | None, shapes: TrainState, saved: Mapping[str, Any]
    ) -> CurvatureEstimator | None:
        """The estimator with the options fixed that it leaves open.

        They are what the optimizer wishes; what depends on the mesh is as in the checkpoints, else for this one.
        """
        argument = f"{self._task.name}(curvature)"
        check_requests([request for request in self.requests if not request.paths], None, argument)
        if estimator is None:
            return None
        estimator = as_wished(estimator, self.requests)
        choices = estimator.choices(*requested_part(self.requests, self.objective, shapes.params), self.mesh)
        if not choices:
            return estimator
        self.choices = choices | {name: value for name, value in saved.items() if name in choices}
        open_options: Any = estimator  # only dataclasses leave options open
        return dataclasses.replace(open_options, **self.choices)

    def _abstract_curvature(self, shapes: TrainState) -> PyTree:
        """The curvature's shapes. Raises TypeError unless it is what the optimizer takes."""
        curvature = None
        if self.estimator is not None:
            objective, params = requested_part(self.requests, self.objective, shapes.params)
            init = self.estimator.init
            curvature = jax.eval_shape(
                lambda params, state, frozen: init(objective.with_state(state).with_frozen(frozen), params),
                params,
                objective.model_state,
                objective.frozen,
            )
        check_requests(self.requests, curvature, f"{self._task.name}(curvature)")
        return curvature

    def _specs(self, shapes: TrainState, annotated: PyTree) -> TrainState:
        """A PartitionSpec for every leaf of the state; frozen parameters get theirs like trained ones."""
        mesh = self.mesh
        everything = nested(by_path(shapes.params) | by_path(shapes.frozen))
        found = by_path(sharding.param_specs(everything, annotated, self._config.sharding, mesh))
        specs_of = lambda tree: nested({path: found[path] for path in by_path(tree)})
        replicated = lambda tree: jax.tree.map(lambda _: PartitionSpec(), tree)
        params = specs_of(shapes.params)
        curvature = None
        if self.estimator is not None:
            _, own = requested_part(self.requests, self.objective, params)
            curvature = self.estimator.partition_specs(shapes.curvature, own, mesh)
        return TrainState(
            step=PartitionSpec(),
            params=params,
            model_state=replicated(shapes.model_state),
            opt_state=sharding.like_params(shapes.opt_state, shapes.params, params, mesh),
            curvature=curvature,
            ema=None if shapes.ema is None else params,
            key=PartitionSpec(),
            frozen=None if shapes.frozen is None else specs_of(shapes.frozen),
            ema_model_state=replicated(shapes.ema_model_state),
        )
