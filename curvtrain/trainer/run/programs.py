"""The programs of a run: which kinds of step it needs, and their lowering and compilation, each done once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import tree_leaves_with_path as leaves_with_path

from curvtrain.curvature import CurvatureSchedule
from curvtrain.trainer.config import TrainerConfig
from curvtrain.trainer.mesh.sharding import path_name
from curvtrain.trainer.run.layout import Layout
from curvtrain.trainer.run.sampling import Sampling
from curvtrain.trainer.run.step import Evaluated, Kind, MetricsFn, all_finite, eval_step, telemetry, train_step
from curvtrain.trainer.state import TrainState

PyTree = Any

HORIZON = 10_000  # steps of the schedule that are examined to learn which programs a run needs


class Programs:
    """The step programs of a run by kind, and the smaller programs beside them. Nothing is compiled before it is used.

    Attributes:
      schedule: when the curvature is updated and refreshed.
      batch: the abstract training batch, with shardings.
      wide_batch: the abstract batch of a refresh, or None where refreshes see the training batch.
    """

    def __init__(
        self,
        config: TrainerConfig,
        layout: Layout,
        tx: optax.GradientTransformationExtraArgs,
        schedule: CurvatureSchedule,
        metrics: MetricsFn,
        batch: PyTree,
        wide_batch: PyTree,
        evaluated: Evaluated | None,
        sampling: Sampling,
    ):
        self.schedule, self.batch, self.wide_batch = schedule, batch, wide_batch
        self._config, self._layout, self._tx, self._metrics = config, layout, tx, metrics
        self._evaluated, self._sampling = evaluated, sampling
        self._replicated = NamedSharding(layout.mesh, PartitionSpec())
        self._lowered: dict[Kind, Any] = {}
        self._compiled: dict[Kind, Any] = {}

    # -- which -----------------------------------------------------------------------------------------------------

    def kind(self, step: int) -> Kind:
        """The kind of a step, by the schedule."""
        estimator = self._layout.estimator
        if estimator is None:
            return Kind()
        update = estimator.absorbs and self.schedule.updates(step)
        return Kind(update, estimator.factorises and self.schedule.refreshes(step))

    @functools.cached_property
    def kinds(self) -> list[Kind]:
        """The kinds of step that the schedule has (in its first steps, if the run is long), in order of appearance."""
        return list(dict.fromkeys(map(self.kind, range(min(self._config.steps, HORIZON)))))

    def wide(self, kind: Kind) -> bool:
        """Says whether a step of this kind needs a curvature batch besides the training batch."""
        return kind.refresh and self.wide_batch is not None

    # -- steps -----------------------------------------------------------------------------------------------------

    def lower(self, kind: Kind) -> Any:
        """The lowered step of a kind. Raises the errors that are in model, loss or optimizer; compiles nothing."""
        if kind not in self._lowered:
            config, layout = self._config, self._layout
            step = train_step(
                kind,
                layout.objective,
                self._tx,
                layout.estimator,
                self._metrics,
                config.ema,
                config.batch_size // config.accumulate,
                self.schedule.update_first,
                config.nonfinite == "skip",
                self._sampling,
            )
            program = jax.jit(step, donate_argnums=0, out_shardings=(layout.shardings, self._replicated))
            with jax.set_mesh(layout.mesh):  # estimators split their work over it
                wide = self.wide_batch if self.wide(kind) else None
                self._lowered[kind] = program.lower(layout.state, self.batch, wide)
            _check_same_state(layout.state, self._lowered[kind].out_info[0])
        return self._lowered[kind]

    def step(self, kind: Kind) -> Any:
        """The compiled step of a kind, `(state, batch, curvature_batch) -> (state, seen)`; it donates the state."""
        if kind not in self._compiled:
            self._compiled[kind] = self.lower(kind).compile()
        return self._compiled[kind]

    def is_compiled(self, kind: Kind) -> bool:
        """Says whether `step(kind)` is ready."""
        return kind in self._compiled

    # -- others ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def evaluate(self) -> Any:
        """The evaluation step, see `eval_step`.

        It is compiled per shape of its batch, and per number of real rows where metrics count rows.
        """
        state = self._layout.state
        like = state.params, state.model_state
        step = eval_step(self._layout.objective, self._metrics, like, self._evaluated, self._sampling)
        return jax.jit(step, out_shardings=self._replicated, static_argnames="rows")

    @functools.cached_property
    def telemetry(self) -> Callable[[Any], dict[str, jax.Array]]:
        """Scalars of the curvature, in one program: on eight devices, many small programs can wait for each other."""
        return jax.jit(telemetry, out_shardings=self._replicated)

    @functools.cached_property
    def all_finite(self) -> Callable[[PyTree], jax.Array]:
        """Says whether every element of a tree is finite, as a bool ()."""
        return jax.jit(all_finite, out_shardings=self._replicated)


def _check_same_state(before: TrainState, after: TrainState) -> None:
    """Raises TypeError if a step's state is not like the one that it was given: the next step could not take it."""
    shown = lambda tree: {path_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves_with_path(tree)}
    have, want = shown(after), shown(before)
    odd = [name for name in {**want, **have} if have.get(name) != want.get(name)]
    if odd:
        pairs = [f"{name} is {want.get(name, 'absent')} before, {have.get(name, 'absent')} after" for name in odd[:3]]
        raise TypeError(
            f"A step should leave every part of its state in its shape and dtype: {'; '.join(pairs)}. The optimizer's "
            f"init and update should agree on opt_state, and the model's calls on model_state."
        )
