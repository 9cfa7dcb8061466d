"""The training loop: batches in, steps out; logs, evaluates and saves between them.

Order within a step: batch, program, log, evaluate, hooks, save. A checkpoint is written after a step and before the
next batch is drawn, so the iterators' positions in it are those of the next step.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

from curvtrain.trainer import distributed
from curvtrain.trainer.checkpoint import Checkpoints, flat
from curvtrain.trainer.checkpoint import versions as checkpoint_versions
from curvtrain.trainer.data import CURVATURE, TRAIN, checksum, eval_batches, own_positions, saved_positions
from curvtrain.trainer.hooks import Hook, Run
from curvtrain.trainer.metrics import Metrics, compute, merge
from curvtrain.trainer.plan import HORIZON, Plan
from curvtrain.trainer.progress import Clock, ProgressReport
from curvtrain.trainer.state import TrainState
from curvtrain.trainer.workdir import claimed
from curvtrain.trainer.writers import open_writers

log = logging.getLogger("curvtrain")

IN_FLIGHT_BYTES = 2**27  # of batches that may wait on the devices: how far the host may run ahead of them


class Diverged(RuntimeError):
    """The loss or the parameters are not finite. The message names the step and the newest checkpoint."""


class Preempted(SystemExit):
    """SIGTERM came: the run was saved at a step boundary. Exits with status 0 unless it is caught."""


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What `fit` returns.

    Attributes:
      step: steps done in all.
      metrics: the last logged scalars by name: "train/loss", "eval/accuracy", "curvature/eigenvalue_max", ...
      history: all scalars logged by this call, as rows {"step": ..., name: value}.
      seconds: wall-clock time of this call.
      stopped: why a hook ended the run early, or None.
    """

    step: int
    metrics: dict[str, float]
    history: list[dict[str, float]]
    seconds: float
    stopped: str | None


class Loop:
    """One run of a plan. `state` is always the newest one, `positions` those of the data iterators."""

    def __init__(self, plan: Plan, eval_data: Any, hooks: Iterable[Hook], state: TrainState | None, positions: Any):
        self.plan, self.config, self.eval_data, self.hooks = plan, plan.config, eval_data, list(hooks)
        self.state: Any = state
        self.history: list[dict[str, float]] = []
        self.view = Run(self._record, print)
        self._positions = positions  # of an earlier call
        self._train_batches: Any = None
        self._curvature_batches: Any = None
        self._window: list[Metrics] = []  # of the steps since the last log
        self._in_flight = max(2, IN_FLIGHT_BYTES // sum(a.size * a.dtype.itemsize for a in plan.batch.values()))
        self._clock = Clock()
        self._sigterm = False

    @property
    def positions(self) -> dict[str, Any] | None:
        """Where the data iterators are."""
        if self._train_batches is None:
            return self._positions
        return {"train": self._train_batches.get_state(), "curvature": self._curvature_batches.get_state()}

    # -- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> FitResult:
        """Trains to `config.steps`, from the newest checkpoint if the workdir holds one."""
        began, config, view = time.perf_counter(), self.config, self.view
        with contextlib.ExitStack() as stack:
            stack.enter_context(distributed.exits_noted())
            stack.enter_context(self._catch_sigterm())  # before the rest: a second one must not cut short the last save
            self._description = self.plan.description()
            self._check_same_run()
            for kind in self.plan.kinds:
                self.plan.lower(kind)  # what is wrong with model or optimizer shows before anything is written
            self._check_same_programs()
            self._checkpoints = None
            if config.workdir is not None:
                stack.enter_context(claimed(Path(config.workdir).absolute()))
                self._checkpoints = stack.enter_context(Checkpoints(config))
            main = jax.process_index() == 0
            self._report = ProgressReport(main and config.progress is not False, config.steps)
            stack.callback(self._report.close)
            self._announce()  # what it will take, before it is taken
            start = self._restore_or_init()
            if start:
                self._report.say(f"resumed after step {start} from {config.workdir}")
            self._report.begin(start)
            view.step, view.state, view.say = start, self.state, self._report.say
            complete = start >= config.steps and self._is_evaluated()  # nothing is left to be logged
            folder = Path(config.workdir) if config.workdir is not None and main and not complete else None
            self._writer = open_writers(config.writers, folder, start)
            stack.callback(self._close_writer)
            for hook in self.hooks:
                stack.callback(hook.close)
            if start >= config.steps or (start and self._due(config.eval_every) and not self._is_evaluated()):
                self._evaluate()  # the latter: what SIGTERM cut short
            steps = (
                range(start, config.steps) if not self._is_preempted() else ()
            )  # after SIGTERM: nothing new to be saved
            self._clock.restart()
            for step in steps:
                self._step(step)
                if self._between_steps():
                    break
        if self._sigterm:
            raise Preempted(0)
        seconds = time.perf_counter() - began
        return FitResult(view.step, dict(view.metrics), self.history, seconds, view.stop_reason)

    def _step(self, step: int) -> None:
        plan, kind = self.plan, self.plan.kind(step)
        if not plan.is_compiled(kind):
            with self._clock.pause():
                began = time.perf_counter()
                plan.step_program(kind)
                self.view.say(f"compiled {kind!s} in {time.perf_counter() - began:.1f} s")
        batch = plan.put(next(self._train_batches))
        wide = plan.put(next(self._curvature_batches)) if plan.wide(kind) else None
        self.state, seen = plan.step_program(kind)(self.state, batch, wide)
        self._window.append(seen)
        if len(self._window) > self._in_flight:
            jax.block_until_ready(self._window[-self._in_flight])
        self.view.step, self.view.state = step + 1, self.state

    def _between_steps(self) -> bool:
        """Logs, evaluates, calls hooks and saves, as they are due; whether the run ends here.

        After SIGTERM there is no time: an evaluation is broken off, and hooks are not called for a last time.
        """
        config, view, due = self.config, self.view, self._due
        finished = view.step == config.steps
        if finished or due(config.log_every):
            self._log()
        with self._clock.pause():
            if finished or due(config.eval_every):
                self._evaluate()
            for hook in self.hooks:
                if due(hook.every) and not finished:
                    hook(view)
            finished = finished or view.stop_reason is not None
            ending = self._is_preempted() or finished
            if ending:
                self._log()
            if finished and not self._sigterm:
                if not self._is_evaluated():
                    self._evaluate()
                view.last = True
                for hook in self.hooks:
                    hook(view)
            if ending or due(config.save_every):
                self._save()
        return ending

    def _due(self, every: int | None) -> bool:
        return every is not None and self.view.step % every == 0

    # -- beginning -------------------------------------------------------------------------------------------------

    def _check_same_run(self) -> None:
        """Several processes with different runs would wait for each other, or train nonsense."""
        if jax.process_count() == 1:
            return
        plan, data = self.plan, None
        if self.eval_data is not None:
            data = checksum(next(eval_batches(self.eval_data, plan.eval_batch_size)))
        kinds = map(str, map(plan.kind, range(min(self.config.steps, HORIZON))))
        options = {f"TrainerConfig({name})": repr(value) for name, value in vars(self.config).items()}
        del options["TrainerConfig(progress)"]
        rest = {
            "checksum of eval_data's first batch": data,
            "CurvatureSchedule (checksum of its steps)": _crc(" ".join(kinds)),
        }
        distributed.check_same({**options, **flat(self._description), **rest})

    def _check_same_programs(self) -> None:
        """What no description holds: sizes of layers, learning rates, code."""
        if jax.process_count() == 1:
            return
        programs = {}
        for kind in self.plan.kinds:
            lines = self.plan.lower(kind).as_text().splitlines()
            own = (line for line in lines if "callback" not in line)  # which hold addresses in the process
            programs[f"model, loss, optimizer or estimator (checksum of {kind!s})"] = _crc("\n".join(own))
        distributed.check_same(programs)

    def _restore_or_init(self) -> int:
        """Sets the state, and what else there is, from the newest checkpoint, an earlier call, or anew: the step."""
        plan = self.plan
        meta: dict[str, Any] = {}
        if self._checkpoints is not None and self._checkpoints.steps:
            self.state, meta = self._checkpoints.restore(plan.state, self._description)
        elif self.state is None:
            self.state = plan.initial_state()
        positions = meta.get("positions", self._positions)
        self._train_batches = plan.data.iterator(TRAIN)
        self._curvature_batches = plan.data.iterator(CURVATURE, plan.refresh_multiple)
        if positions is not None:
            positions = own_positions(positions)
            self._train_batches.set_state(positions["train"])
            self._curvature_batches.set_state(positions["curvature"])
        for name, (at, value) in meta.get("logged", {}).items():
            self.view.record(at, {name: value})
        memories = list(meta.get("hooks", []))
        for hook in self.hooks:
            own = next((memory for memory in memories if memory["kind"] == type(hook).__name__), None)
            if own is not None:
                memories.remove(own)
                hook.load_state_dict(own["state"])
        return int(self.state.step)

    def _announce(self) -> None:
        say, plan = self._report.say, self.plan
        overview = parameter_overview.get_parameter_overview(plan.state.params, include_stats=False, max_lines=40)
        say(overview)
        if plan.estimator is not None and (table := plan.estimator.overview(*plan.measured)):
            say(table)
        say(f"\n{plan.state_report()}\n")
        devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), mesh {dict(plan.mesh.shape)}"
        say(f"{devices}; {self.config.steps} steps of {self.config.batch_size} examples")

    # -- between steps ---------------------------------------------------------------------------------------------

    def _log(self) -> None:
        """Averages and records the metrics of the steps since the last log. Raises Diverged if one is not finite."""
        if not self._window:
            return
        self._check_losses()
        window, self._window = self._window, []
        rate = len(window) / self._clock.seconds
        self._clock.restart()
        scalars = {f"train/{name}": value for name, value in compute(functools.reduce(merge, window)).items()}
        with self._clock.pause():  # it is compiled at the first log
            seen = jax.device_get(self.plan.telemetry(self.state.curvature))
        seen = {name: float(value) for name, value in seen.items()}
        scalars |= {name: value for name, value in seen.items() if math.isfinite(value)}  # no eigenpairs yet: infinite
        scalars["steps_per_second"] = rate
        self._record(self.view.step, scalars)
        self._report.log(self.view.step, scalars, rate)

    def _is_evaluated(self) -> bool:
        return self.view.logged_at.get("eval/loss") == self.view.step

    def _evaluate(self) -> None:
        if self.eval_data is None:
            return
        scores = evaluate(self.plan, self.state, self.eval_data, self._is_preempted)
        if scores is None:  # interrupted by SIGTERM
            return
        self._record(self.view.step, {f"eval/{name}": value for name, value in scores.items()})
        shown = "  ".join(f"eval/{name} {value:.4g}" for name, value in scores.items())
        self._report.say(f"step {self.view.step:>{len(str(self.config.steps))}}/{self.config.steps}  {shown}")

    def _save(self) -> None:
        self._check_losses()
        if not bool(self.plan.all_finite((self.state.params, self.state.ema))):
            raise self._diverged(f"The parameters are not finite after step {self.view.step}")
        if self._checkpoints is None:
            return
        metrics, logged_at = self.view.metrics, self.view.logged_at
        scores = {name[5:]: value for name, value in metrics.items() if name.startswith("eval/")}
        meta = {
            "run": self._description,
            "versions": checkpoint_versions(),
            "config": {name: repr(value) for name, value in dataclasses.asdict(self.config).items()},
            "mesh": dict(self.plan.mesh.shape),
            "positions": saved_positions(self.positions),
            "logged": {name: (logged_at[name], value) for name, value in metrics.items()},
            "hooks": [{"kind": type(hook).__name__, "state": hook.state_dict()} for hook in self.hooks],
        }
        self._checkpoints.save(self.view.step, self.state, meta, scores if self._is_evaluated() else None)

    def _record(self, step: int, scalars: dict[str, float]) -> None:
        self.view.record(step, scalars)
        self.history.append({"step": step, **scalars})
        with _reported(f"What was logged at step {step}"):
            self._writer.write(step, scalars)

    def _close_writer(self) -> None:
        with _reported("The end of the log"):
            self._writer.close()

    # -- ending early ----------------------------------------------------------------------------------------------

    def _check_losses(self) -> None:
        """Raises Diverged at the first step since the last log whose loss is not finite."""
        self._window = jax.device_get(self._window)
        first, last = self.view.step - len(self._window) + 1, self.view.step
        for step, seen in enumerate(self._window, start=first):
            if not np.isfinite(seen["loss"].total):
                loss = float(seen["loss"].compute())
                raise self._diverged(f"The training loss is {loss} at step {step} (seen in steps {first} to {last})")

    def _diverged(self, what: str) -> Diverged:
        newest = self._checkpoints.steps if self._checkpoints is not None else []
        where = f"The newest checkpoint is step {newest[-1]}." if newest else "There is no checkpoint."
        return Diverged(f"{what}. {where} Lower the learning rate, or raise the damping of the curvature.")

    def _is_preempted(self) -> bool:
        """Whether SIGTERM came. With several processes, to any of them: all see it in the same call."""
        self._sigterm = distributed.preempted() or self._sigterm
        return self._sigterm

    @contextlib.contextmanager
    def _catch_sigterm(self) -> Iterator[None]:
        """While training, SIGTERM asks for a save at the next step boundary."""
        if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
            yield  # only the main thread may install handlers; that of JAX's service stays
            return

        def handler(*_):
            self._sigterm = True

        before = signal.signal(signal.SIGTERM, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: not Python's


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    """A full disk does not end training: what could not be written is reported."""
    try:
        yield
    except OSError as error:
        log.error("%s was not written: %s", what, error)


def evaluate(
    plan: Plan, state: TrainState, data: Any, interrupted: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """Metrics over all of `data`, exact over a ragged last batch; None if it was interrupted."""
    params = state.params if state.ema is None else state.ema
    total: Metrics | None = None
    for batch in eval_batches(data, plan.eval_batch_size):
        if interrupted():
            return None
        seen = plan.eval_program(params, state.model_state, plan.put(batch, whole=True))
        total = merge(total, jax.device_get(seen))
    if total is None:
        raise ValueError("evaluate(data) has no examples.")
    return compute(total)
