"""The Trainer: the one class that is made to be subclassed."""

import abc
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from curvtrain import _checks
from curvtrain.curvature import CurvatureEstimator, CurvatureSchedule
from curvtrain.losses import Loss
from curvtrain.objective import Objective
from curvtrain.trainer.config import TrainerConfig
from curvtrain.trainer.disk.reading import read_params
from curvtrain.trainer.live import Run
from curvtrain.trainer.mesh import distributed
from curvtrain.trainer.run.evaluation import evaluate
from curvtrain.trainer.run.layout import Task
from curvtrain.trainer.run.loop import Loop
from curvtrain.trainer.run.plan import Plan
from curvtrain.trainer.run.results import FitResult
from curvtrain.trainer.state import TrainState
from curvtrain.trainer.watch.hooks import Hook
from curvtrain.trainer.watch.report import DryRun


@runtime_checkable
class _Optimizer(Protocol):
    """The two functions of an optax transformation, and the two methods of `optax.MultiSteps`."""

    @property
    def init(self) -> Any: ...

    @property
    def update(self) -> Any: ...


class Trainer(abc.ABC):
    """Owns model, data and mesh, trains, evaluates and checkpoints.

    Subclass it and say what is trained: the attribute `loss` and the methods `build_model`, `predict` and, if you
    like, `metrics` and `regulariser`. Nothing else is meant to be overridden.

    Args:
      config: the options of the run.
      train_data: a dict of numpy arrays with one row per example, whose values may be such dicts again, or a grain
        dataset whose elements are batches, dicts of that kind.
      eval_data: likewise (a grain dataset should be finite); None evaluates nothing.
      optimizer: any optax transformation, or an object of your own with `init` and `update`. Its update gets those of
        the extra arguments `curvature`, `objective`, `batch`, `key`, `value`, `grad`, `value_fn` and `grad_fn` that it
        takes. If it samples, which shows in a method `sample(opt_state, params, key, curvature=None)` or in a
        posterior in its state, gradients are taken at draws, and `draws` is an extra argument, too.
      curvature: the estimator of the curvature that the optimizer takes, or None.
      schedule: when it updates and refreshes; None is `CurvatureSchedule()`, which refreshes as often as the optimizer
        adapts its damping.
      hooks: called between steps.
      eval_params: a function `(opt_state, params) -> params` of what is evaluated and exported, where that is not the
        parameters at which gradients are taken: `optax.contrib.schedule_free_eval_params`, for instance. It is what
        `evaluate`, `model` and `load_model` look at. The model's other state (batch statistics) is that of training.
      trainable: an NNX filter of the parameters (`nnx.Param`s) that are trained: a class, such as `nnx.LoRAParam`, a
        predicate (path, variable) -> bool, such as `nnx.PathContains("head")`, or a combination of them. The others
        are frozen: sharded and checkpointed, but in no gradient, optimizer state, average or curvature. Other state
        (batch statistics) is no parameter and changes as the model changes it.
      mc_samples: with an optimizer that samples, the number of draws of the parameters at which a step takes gradients
        and statistics of the curvature, which are then averaged, as is the model's other state; one after the other, or
        split over the axis "mc" of the config's mesh. What is drawn depends on the seed, the step and the draw alone.
      predictive_samples: the number of draws over which `evaluate` averages predictions, by `Loss.average`; the same
        draws in every evaluation of a state. 0: the prediction at the parameters, the means.

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
        eval_params: Callable[[Any, Any], Any] | None = None,
        trainable: Any = nnx.Param,
        mc_samples: int = 1,
        predictive_samples: int = 0,
    ):
        name = type(self).__name__
        if not isinstance(config, TrainerConfig):
            raise TypeError(f"{name}(config) should be a TrainerConfig, not {type(config).__name__}.")
        _check_loss(self)
        if not isinstance(optimizer, _Optimizer):
            raise TypeError(f"{name}(optimizer) should be an optax transformation, not {_described(optimizer)}.")
        if curvature is not None and not isinstance(curvature, CurvatureEstimator):
            raise TypeError(f"{name}(curvature) should be a CurvatureEstimator, not {_described(curvature)}.")
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
        _check_filter(f"{name}(trainable)", trainable)
        distributed.start()
        self.config = config
        self._eval_data, self._hooks = eval_data, tuple(hooks)
        regulariser = None if type(self).regulariser is Trainer.regulariser else self.regulariser
        task = Task(name, self.build_model, self.predict, self.loss, self._metrics, trainable, regulariser)
        schedule = schedule or CurvatureSchedule()
        draws = mc_samples, predictive_samples
        self._plan = Plan(config, task, train_data, optimizer, curvature, schedule, eval_params, *draws)
        if eval_data is not None:
            self._plan.check_eval_data(eval_data)
        self._run = Run(self._plan.first_state, self._plan.streams())

    # -- for subclasses --------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def build_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Makes the model. It is called under jit, so that every parameter is born where it lives."""

    @abc.abstractmethod
    def predict(self, model: Any, batch: Any) -> Any:
        """Returns the outputs of the model for a batch, in the form that the loss takes."""

    def metrics(self, outputs: Any, batch: Any) -> Mapping[str, Any]:
        """Returns, by name, one value per example, shape (batch,) or (batch, time), or a `clu.metrics.Metric`.

        Means are weighted as the loss is, by the batch's `mask` and `weights`. The loss is always reported as "loss".
        The default is the loss's own metrics (accuracy, for classes). Rows that pad the last batch of an evaluation
        count in no metric; of the data's own mask, a `clu.metrics.Metric` knows what it is told here.
        """
        return self.loss.metrics(outputs, batch)

    def regulariser(self, params: Any) -> Any:
        """Returns a penalty of the parameters, a scalar, which is added to the mean loss.

        It is a part of the loss in every value that is reported ("loss" is with it, and "penalty" is it alone), in
        gradients, products and the curvature that is made of them; `accumulate` adds it once to a batch. `params` are
        the trained parameters, a nested dict in the model's own structure. The default is none.
        """
        return None

    # -- for users -------------------------------------------------------------------------------------------------

    def fit(self) -> FitResult:
        """Trains to `config.steps`, from the newest checkpoint if the workdir holds one.

        Called again, it goes on where the last call ended, by an error too. A run that is finished, or that a hook has
        ended (`hooks.EarlyStopping`), is only evaluated; to train for longer, build a Trainer with more steps on the
        same workdir. One that diverged raises Diverged again, unless there is a checkpoint to go on from.

        Returns:
          The last metrics, the history of this call, and why it ended.

        Raises:
          trainer.Mismatch: the workdir holds another run.
          trainer.CheckpointError: no checkpoint can be read, or the last one could not be written.
          trainer.WorkdirInUse: another job trains in the workdir.
          trainer.Diverged: the loss or the parameters are not finite.
          trainer.Preempted: SIGTERM came; the run is saved. It is a SystemExit with status 0.
        """
        return Loop(self._plan, self._run, self._eval_data, self._hooks).run()

    def evaluate(self, data: Any = None) -> dict[str, float]:
        """Metrics by name over all of `data` (default: the eval_data), exact over a ragged last batch.

        It looks at the current state, as `state` does; with `config.ema`, at the averaged parameters and the averaged
        model state. Random numbers that the model draws differ from batch to batch, and are the same in every call.
        """
        data = self._eval_data if data is None else data
        if data is None:
            raise ValueError(f"{type(self).__name__}.evaluate(data): there is no data, and no eval_data was given.")
        self._plan.check_eval_data(data, f"{type(self).__name__}.evaluate(data)")
        scores = evaluate(self._plan, self._run.current, data)
        assert scores is not None
        return scores

    @property
    def state(self) -> TrainState:
        """The training state: step, params, model_state, opt_state, curvature, ema, key, frozen.

        Before `fit` it is that of the newest checkpoint in the workdir, or the initial one if there is none. While a
        run is going on, from hooks too, it is that of the step that was just done. What you keep of it stays as it is,
        at the cost of a copy: the next step takes the memory of what nobody has kept. With several processes, all of
        them should ask for it.

        Raises:
          trainer.Mismatch: the workdir holds another run.
          trainer.CheckpointError: no checkpoint there can be read.
        """
        return self._run.state

    @property
    def objective(self) -> Objective:
        """The objective at the current state, for products and estimators outside of training."""
        return self.state.at(self._plan.layout.objective)

    @property
    def model(self) -> nnx.Module:
        """The model with the current parameters and state, in evaluation mode; a copy that training leaves alone.

        With `eval_params`, its parameters are what that gives. Returned by `build_model` of another Trainer, as a whole
        or as a part, it is trained as the original was: with dropout and moving batch statistics.
        """
        state = self._run.current
        return self._module(self._exported(state.opt_state, state.params), state.frozen, state.model_state)

    @property
    def ema_model(self) -> nnx.Module:
        """The model with the averaged parameters and the averaged model state; needs `config.ema`."""
        if self.config.ema is None:
            raise ValueError("ema_model needs TrainerConfig(ema=...), which is None.")
        state = self._run.current
        params, model_state = state.evaluated
        return self._module(params, state.frozen, model_state)

    def load_model(self, workdir: str | os.PathLike | None = None, step: int | None = None) -> nnx.Module:
        """The model of a checkpoint, for inference, in evaluation mode: the newest one, or that of `step`.

        Args:
          workdir: the run's folder; None is the config's.
          step: the checkpoint's step. With `config.ema`, the averages are read; with `eval_params`, what that gives.
        """
        workdir = self.config.workdir if workdir is None else workdir
        if workdir is None:
            raise ValueError("load_model(workdir): there is none, and TrainerConfig(workdir) is None.")
        state = self._plan.layout.state
        params = "params" if state.ema is None else "ema"
        model_state = "model_state" if state.ema_model_state is None else "ema_model_state"
        names = [params, model_state, "frozen", *(() if self._plan.eval_params is None else ("opt_state",))]
        target = {name: getattr(state, name) for name in names if getattr(state, name) is not None}
        _, parts = read_params(workdir, target, step)
        chosen = self._exported(parts.get("opt_state"), parts[params])
        return self._module(chosen, parts.get("frozen"), parts[model_state])

    def dry_run(self) -> DryRun:
        """Memory and FLOPs of each program and bytes of the state, without allocating any of it. Print it."""
        return self._plan.report()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _metrics(self, outputs: Any, batch: Any) -> Mapping[str, Any]:
        values = self.metrics(outputs, batch)
        if not isinstance(values, Mapping):
            raise TypeError(f"{type(self).__name__}.metrics should return a dict, not {_described(values)}.")
        return {**values, "loss": self.loss.values(outputs, batch)}

    def _exported(self, opt_state: Any, params: Any) -> Any:
        eval_params = self._plan.eval_params
        return params if eval_params is None else jax.jit(eval_params)(opt_state, params)

    def _module(self, params: Any, frozen: Any, model_state: Any) -> nnx.Module:
        # Copies, because the next step donates the state; in the model's own dtypes, which an average does not have.
        layout = self._plan.layout
        like = layout.state.params, layout.state.frozen, layout.state.model_state
        copy = lambda a, p: jnp.array(a, p.dtype)
        params, frozen, model_state = jax.tree.map(copy, (params, frozen, model_state), like)
        return layout.objective.with_state(model_state).with_frozen(frozen).evaluation().module(params)


def _check_loss(trainer: Trainer) -> None:
    try:
        loss = trainer.loss
    except AttributeError:
        loss = None
    if not isinstance(loss, Loss):
        raise TypeError(
            f"{type(trainer).__name__}.loss should be a curvtrain.losses.Loss, such as losses.SoftmaxCrossEntropy(), "
            f"and is {'absent' if loss is None else repr(loss)}."
        )


def _check_filter(argument: str, trainable: Any) -> None:
    try:
        nnx.All(trainable)
    except (TypeError, ValueError):  # the second, of NNX's own message
        raise TypeError(
            f"{argument} should be an NNX filter, such as nnx.LoRAParam or nnx.PathContains('head'), not {trainable!r}."
        ) from None


def _described(value: Any) -> str:
    """A wrong argument, for messages."""
    if isinstance(value, type):
        return f"the class {value.__name__}: call it, {value.__name__}()"
    if isinstance(value, jax.Array):
        return f"an array of shape {value.shape}"
    return type(value).__name__
