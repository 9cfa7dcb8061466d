"""The Trainer: the one class that is made to be subclassed."""

import abc
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from curvtrain import _checks
from curvtrain.curvature import CurvatureEstimator, CurvatureSchedule
from curvtrain.losses import Loss
from curvtrain.objective import Objective
from curvtrain.trainer import distributed
from curvtrain.trainer.checkpoint import read_params
from curvtrain.trainer.config import TrainerConfig
from curvtrain.trainer.hooks import Hook
from curvtrain.trainer.loop import FitResult, Loop, evaluate
from curvtrain.trainer.metrics import Mean
from curvtrain.trainer.plan import Plan, Task
from curvtrain.trainer.report import DryRun
from curvtrain.trainer.state import TrainState


class Trainer(abc.ABC):
    """Owns model, data and mesh, trains, evaluates and checkpoints.

    Subclass it and say what is trained: the attribute `loss` and the methods `build_model`, `predict` and, if you
    like, `metrics`. Nothing else is meant to be overridden.

    Args:
      config: what the run is.
      train_data: a dict of numpy arrays with one row per example, or a grain dataset whose elements are batches.
      eval_data: likewise (a grain dataset should be finite); None evaluates nothing.
      optimizer: any optax transformation. Its update gets the extra arguments `curvature`, `objective`, `batch`,
        `key`, `value`, `grad` and `value_fn`.
      curvature: what estimates the curvature, or None.
      schedule: when it does.
      hooks: called between steps.

    One of several processes (of `python -m curvtrain.launch`, SLURM, Open MPI, ...) joins the others here, see
    `curvtrain.trainer.distributed`.

    Raises:
      TypeError, ValueError: about any argument, before anything compiles, is allocated or is written.
    """

    loss: Loss

    def __init__(
        self,
        config: TrainerConfig,
        *,
        train_data: Any,
        eval_data: Any = None,
        optimizer: optax.GradientTransformation,
        curvature: CurvatureEstimator | None = None,
        schedule: CurvatureSchedule | None = None,
        hooks: Sequence[Hook] = (),
    ):
        name = type(self).__name__
        if not isinstance(config, TrainerConfig):
            raise TypeError(f"{name}(config) should be a TrainerConfig, not {type(config).__name__}.")
        if not isinstance(getattr(self, "loss", None), Loss):
            found = repr(getattr(self, "loss", "absent"))
            raise TypeError(
                f"{name}.loss should be a curvtrain.losses.Loss, such as losses.SoftmaxCrossEntropy(), and is {found}."
            )
        if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            raise TypeError(f"{name}(optimizer) should be an optax transformation, not {type(optimizer).__name__}.")
        if curvature is not None and not isinstance(curvature, CurvatureEstimator):
            raise TypeError(f"{name}(curvature) should be a CurvatureEstimator, not {type(curvature).__name__}.")
        if schedule is not None and curvature is None:
            raise ValueError(f"{name}(schedule) was given without curvature: there is nothing to schedule.")
        if schedule is not None and not isinstance(schedule, CurvatureSchedule):
            raise TypeError(f"{name}(schedule) should be a CurvatureSchedule, not {type(schedule).__name__}.")
        if not isinstance(hooks, Sequence):
            raise TypeError(f"{name}(hooks) should be a list of hooks, not {type(hooks).__name__}.")
        for hook in hooks:
            if not isinstance(hook, Hook):
                raise TypeError(f"{name}(hooks) should be Hooks, not {type(hook).__name__}; see hooks.Call.")
            _checks.positive_int(f"{name}(hooks): {type(hook).__name__}.every", hook.every)
        distributed.start()
        self.config = config
        self._eval_data, self._hooks = eval_data, tuple(hooks)
        task = Task(name, self.build_model, self.predict, self.loss, self._metrics)
        self._plan = Plan(config, task, train_data, optimizer, curvature, schedule or CurvatureSchedule())
        if eval_data is not None:
            self._plan.check_eval_data(eval_data)
        self._state: TrainState | None = None
        self._positions: Any = None

    # -- what subclasses say ---------------------------------------------------------------------------------------

    @abc.abstractmethod
    def build_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """The model. It is called under jit, so that every parameter is born where it lives."""

    @abc.abstractmethod
    def predict(self, model: Any, batch: Any) -> Any:
        """The outputs of the model for a batch, which the loss understands."""

    def metrics(self, outputs: Any, batch: Any) -> Mapping[str, Any]:
        """By name, one value per example, shape (batch,) or (batch, time), or a `clu.metrics.Metric`.

        Means are weighted by the batch's `mask` and `weights`. The loss is always reported as "loss". Default: what
        the loss reports of itself (accuracy, for classes).
        """
        return self.loss.metrics(outputs, batch)

    # -- what users call -------------------------------------------------------------------------------------------

    def fit(self) -> FitResult:
        """Trains to `config.steps`, from the newest checkpoint if the workdir holds one.

        Called again, it goes on where the last call ended, by an error too; a finished run is only evaluated. To train
        for longer, build a Trainer with more steps on the same workdir.

        Returns:
          The last metrics, the history of this call, and why it ended.

        Raises:
          checkpoint.Mismatch: the workdir holds another run.
          workdir.WorkdirInUse: another job trains in the workdir.
          loop.Diverged: the loss or the parameters are not finite.
          loop.Preempted: SIGTERM came; the run is saved. A SystemExit with status 0.
        """
        loop = Loop(self._plan, self._eval_data, self._hooks, self._state, self._positions)
        try:
            return loop.run()
        finally:
            self._state, self._positions = loop.state, loop.positions

    def evaluate(self, data: Any = None) -> dict[str, float]:
        """Metrics by name over all of `data` (default: the eval_data), exact over a ragged last batch.

        It looks at the current state: after `fit`, the trained one (with `config.ema`, the averaged parameters);
        before, the initial one.
        """
        data = self._eval_data if data is None else data
        if data is None:
            raise ValueError(f"{type(self).__name__}.evaluate(data): there is no data, and no eval_data was given.")
        self._plan.check_eval_data(data, f"{type(self).__name__}.evaluate(data)")
        scores = evaluate(self._plan, self.state, data)
        assert scores is not None
        return scores

    @property
    def state(self) -> TrainState:
        """The training state: step, params, model_state, opt_state, curvature, ema, key."""
        if self._state is None:
            self._state = self._plan.initial_state()
        return self._state

    @property
    def objective(self) -> Objective:
        """The objective at the current state, for products and estimators outside of training."""
        return self._plan.objective.with_state(self.state.model_state)

    @property
    def model(self) -> nnx.Module:
        """The model with the current parameters and state, in evaluation mode; a copy that training leaves alone."""
        return self._module(self.state.params, self.state.model_state)

    @property
    def ema_model(self) -> nnx.Module:
        """The model with the averaged parameters; needs `config.ema`."""
        if self.state.ema is None:
            raise ValueError("ema_model needs TrainerConfig(ema=...), which is None.")
        return self._module(self.state.ema, self.state.model_state)

    def load_model(self, workdir: str | os.PathLike | None = None, step: int | None = None) -> nnx.Module:
        """The model of a checkpoint, for inference, in evaluation mode: the newest one, or that of `step`.

        Args:
          workdir: of the run; None is the config's.
          step: which checkpoint. With `config.ema`, the averaged parameters are read.
        """
        workdir = self.config.workdir if workdir is None else workdir
        if workdir is None:
            raise ValueError("load_model(workdir): there is none, and TrainerConfig(workdir) is None.")
        params = "params" if self.config.ema is None else "ema"
        target = {name: getattr(self._plan.state, name) for name in (params, "model_state")}
        _, parts = read_params(workdir, target, step)
        return self._module(parts[params], parts["model_state"])

    def dry_run(self) -> DryRun:
        """Memory and FLOPs of each program and bytes of the state, without allocating any of it. Print it."""
        return self._plan.report()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _metrics(self, outputs: Any, batch: Any) -> Mapping[str, Any]:
        values = self.metrics(outputs, batch)
        if not isinstance(values, Mapping):
            raise TypeError(f"{type(self).__name__}.metrics should return a dict, not {type(values).__name__}.")
        return {**values, "loss": Mean.of(self.loss.values(outputs, batch), self.loss.weights(outputs, batch))}

    def _module(self, params: Any, model_state: Any) -> nnx.Module:
        # copies, for the next step donates the state; in the parameters' dtypes, which an average does not have
        params = jax.tree.map(lambda a, p: jnp.array(a, p.dtype), params, self._plan.state.params)
        model_state = jax.tree.map(jnp.array, model_state)
        return self._plan.objective.with_state(model_state).evaluation().module(params)
