"""The training loop: batches in, steps out; logs, evaluates and saves between them.

Order within a step: batch, program, log, evaluate, hooks, save. A checkpoint is written after a step and before the
next batch is drawn, so the iterators' positions in it are those of the next step.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

from curvtrain._text import human_bytes
from curvtrain.trainer.data import own_positions, saved_positions
from curvtrain.trainer.disk.checkpoint import Checkpoints
from curvtrain.trainer.disk.compiled import compilation_cache_of
from curvtrain.trainer.disk.reading import versions
from curvtrain.trainer.disk.workdir import claimed
from curvtrain.trainer.live import Run
from curvtrain.trainer.mesh import distributed
from curvtrain.trainer.run.agreement import check_same_programs, check_same_run
from curvtrain.trainer.run.evaluation import evaluate
from curvtrain.trainer.run.plan import Plan
from curvtrain.trainer.run.results import Diverged, FitResult, Preempted
from curvtrain.trainer.run.termination import Termination
from curvtrain.trainer.watch.hooks import Hook
from curvtrain.trainer.watch.metrics import Metrics, compute, merge
from curvtrain.trainer.watch.progress import Clock, ProgressReport
from curvtrain.trainer.watch.writers import open_writers

log = logging.getLogger("curvtrain")

IN_FLIGHT_BYTES = 2**27  # the bytes of batches that may wait on the devices limit how far the host runs ahead


class Loop:
    """One call of `fit`. What it trains is held by the `Run` alone."""

    def __init__(self, plan: Plan, run: Run, eval_data: Any, hooks: Iterable[Hook]):
        self.plan, self.config, self.eval_data, self.hooks = plan, plan.config, eval_data, list(hooks)
        self.live = run
        self.history: list[dict[str, float]] = []
        self._window: list[Metrics] = []  # one entry per step since the last log
        bytes_of_batch = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(plan.programs.batch))
        self._in_flight = max(2, IN_FLIGHT_BYTES // bytes_of_batch)
        self._clock = Clock()
        self._termination = Termination()

    # -- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> FitResult:
        """Trains to `config.steps`, from the newest checkpoint if the workdir holds one."""
        began, config, live = time.perf_counter(), self.config, self.live
        with contextlib.ExitStack() as stack:
            stack.enter_context(distributed.exits_noted())
            stack.enter_context(self._termination.watched())  # first: SIGTERM must not cut short the last save either
            self._check()
            self._checkpoints = self._open_workdir(stack)
            main = jax.process_index() == 0
            self._report = ProgressReport(main and config.progress is not False, config.steps)
            stack.callback(self._report.close)
            live.begin(self._record, self._report.say)
            self._announce()  # the needs of the run, before they are allocated
            stack.callback(live.streams.close)
            start = self._restore_or_init()
            if start:
                self._report.say(f"resumed after step {start} from {config.workdir}")
            self._report.begin(start)
            complete = start >= config.steps and self._is_evaluated()  # nothing is left to be logged
            folder = Path(config.workdir) if config.workdir is not None and main and not complete else None
            self._writer = open_writers(config.writers, folder, start)
            stack.callback(self._close_writer)
            for hook in self.hooks:
                stack.callback(hook.close)
            if start >= config.steps or (start and self._due(config.eval_every) and not self._is_evaluated()):
                self._evaluate()  # the second case: SIGTERM had cut it short
            ended = self._termination.poll()  # after SIGTERM there is nothing new to be saved
            self._clock.restart()
            for step in range(start, start if ended else config.steps):
                self._step(step)
                if self._between_steps():
                    break
        if self._termination.seen:
            raise Preempted(0)
        seconds = time.perf_counter() - began
        return FitResult(live.step, dict(live.metrics), self.history, seconds, live.stop_reason)

    def _step(self, step: int) -> None:
        plan, live = self.plan, self.live
        kind = plan.programs.kind(step)
        if not plan.programs.is_compiled(kind):
            with self._clock.pause():
                began = time.perf_counter()
                plan.programs.step(kind)
                live.say(f"compiled {kind!s} in {time.perf_counter() - began:.1f} s")
        batch = plan.batches.put(live.streams.next_training())
        wide = plan.batches.put(live.streams.next_curvature()) if plan.programs.wide(kind) else None
        state, seen = plan.programs.step(kind)(live.state, batch, wide)
        live.advance(step + 1, state)
        self._window.append(seen)
        if len(self._window) > self._in_flight:
            jax.block_until_ready(self._window[-self._in_flight])

    def _between_steps(self) -> bool:
        """Logs, evaluates, calls hooks and saves, as they are due; says whether the run ends here.

        After SIGTERM there is no time: an evaluation is broken off, and hooks are not called for a last time.
        """
        config, live, due = self.config, self.live, self._due
        finished = live.step == config.steps
        if finished or due(config.log_every):
            self._log()
        with self._clock.pause():
            if finished or due(config.eval_every):
                self._evaluate()
            for hook in self.hooks:
                if due(hook.every) and not finished:
                    hook(live)
            finished = finished or live.stop_reason is not None
            ending = self._termination.poll() or finished
            if ending:
                self._log()
            if finished and not self._termination.seen:
                if not self._is_evaluated():
                    self._evaluate()
                live.last = True
                for hook in self.hooks:
                    hook(live)
            if ending or due(config.save_every):
                self._save()
        return ending

    def _due(self, every: int | None) -> bool:
        return every is not None and self.live.step % every == 0

    # -- beginning -------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raises the errors that are in model, optimizer or data, before anything is written."""
        self._description = self.plan.description()
        check_same_run(self.plan, self.eval_data, self._description)
        for kind in self.plan.programs.kinds:
            self.plan.programs.lower(kind)
        check_same_programs(self.plan)

    def _open_workdir(self, stack: contextlib.ExitStack) -> Checkpoints | None:
        """Takes the workdir's lock, and opens the compilation cache and the checkpoints; they close with the stack."""
        config = self.config
        if config.workdir is not None:
            stack.enter_context(claimed(Path(config.workdir).absolute()))
        stack.enter_context(compilation_cache_of(config.compilation_cache, config.workdir))
        return None if config.workdir is None else stack.enter_context(Checkpoints(config))

    def _restore_or_init(self) -> int:
        """Sets the run to the newest checkpoint, or else to where it was left or begins; returns its step."""
        live, meta = self.live, {}
        if self._checkpoints is not None and self._checkpoints.steps:
            state, meta = self._checkpoints.restore(self.plan.layout.state, self._description)
            live.restore(int(state.step), state, meta.get("logged", {}))
        else:
            live.advance(int(live.state.step), live.state)
            if live.step:  # an earlier call of fit has left them, perhaps with Diverged
                self._check_parameters()
        positions = meta.get("positions")
        live.streams.open(None if positions is None else own_positions(positions))
        memories = list(meta.get("hooks", []))
        for hook in self.hooks:
            own = next((memory for memory in memories if memory["kind"] == type(hook).__name__), None)
            if own is not None:
                memories.remove(own)
                hook.load_state_dict(own["state"])
        return live.step

    def _announce(self) -> None:
        say, plan = self._report.say, self.plan
        state, estimator = plan.layout.state, plan.layout.estimator
        say(parameter_overview.get_parameter_overview(state.params, include_stats=False, max_lines=40))
        if state.frozen is not None:
            leaves = jax.tree.leaves(state.frozen)
            size = human_bytes(sum(a.size * a.dtype.itemsize for a in leaves))
            say(f"and {sum(a.size for a in leaves):,} frozen parameters in {len(leaves)} arrays, {size}")
        if estimator is not None and (table := estimator.overview(*plan.layout.measured)):
            say(table)
        say(f"\n{plan.state_report()}\n")
        if plan.refresh_note:
            say(plan.refresh_note)
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
            seen = jax.device_get(self.plan.programs.telemetry(self.live.state.curvature))
        seen = {name: float(value) for name, value in seen.items()}
        scalars |= {name: value for name, value in seen.items() if math.isfinite(value)}  # no eigenpairs yet: infinite
        scalars["steps_per_second"] = rate
        self._record(self.live.step, scalars)
        self._report.log(self.live.step, scalars, rate)

    def _is_evaluated(self) -> bool:
        return self.live.logged_at.get("eval/loss") == self.live.step

    def _evaluate(self) -> None:
        if self.eval_data is None:
            return
        scores = evaluate(self.plan, self.live.state, self.eval_data, self._termination.poll)
        if scores is None:  # interrupted by SIGTERM
            return
        step, steps = self.live.step, self.config.steps
        self._record(step, {f"eval/{name}": value for name, value in scores.items()})
        shown = "  ".join(f"eval/{name} {value:.4g}" for name, value in scores.items())
        self._report.say(f"step {step:>{len(str(steps))}}/{steps}  {shown}")

    def _save(self) -> None:
        self._check_losses()
        self._check_parameters()
        live = self.live
        if self._checkpoints is None:
            return
        scores = {name[5:]: value for name, value in live.metrics.items() if name.startswith("eval/")}
        meta = {
            "run": self._description,
            "versions": versions(),
            "config": {name: repr(value) for name, value in dataclasses.asdict(self.config).items()},
            "mesh": dict(self.plan.mesh.shape),
            "positions": saved_positions(live.streams.positions),
            "logged": {name: (live.logged_at[name], value) for name, value in live.metrics.items()},
            "hooks": [{"kind": type(hook).__name__, "state": hook.state_dict()} for hook in self.hooks],
        }
        self._checkpoints.save(live.step, live.state, meta, scores if self._is_evaluated() else None)

    def _record(self, step: int, scalars: dict[str, float]) -> None:
        self.live.record(step, scalars)
        self.history.append({"step": step, **scalars})
        with _reported(f"What was logged at step {step}"):
            self._writer.write(step, scalars)

    def _close_writer(self) -> None:
        with _reported("The end of the log"):
            self._writer.close()

    # -- divergence ------------------------------------------------------------------------------------------------

    def _check_losses(self) -> None:
        """Raises Diverged at the first step since the last log whose loss is not finite."""
        self._window = jax.device_get(self._window)
        first, last = self.live.step - len(self._window) + 1, self.live.step
        for step, seen in enumerate(self._window, start=first):
            if not np.isfinite(seen["loss"].total):
                loss = float(seen["loss"].compute())
                raise self._diverged(f"The training loss is {loss} at step {step} (seen in steps {first} to {last})")

    def _check_parameters(self) -> None:
        """Raises Diverged unless the parameters and their averages are finite."""
        state = self.live.state
        if not bool(self.plan.programs.all_finite((state.params, state.ema))):
            raise self._diverged(f"The parameters are not finite after step {self.live.step}")

    def _diverged(self, what: str) -> Diverged:
        newest = self._checkpoints.steps if self._checkpoints is not None else []
        where = f"The newest checkpoint is step {newest[-1]}." if newest else "There is no checkpoint."
        return Diverged(f"{what}. {where} Lower the learning rate, or raise the damping of the curvature.")


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    """Reports an OSError: a full disk does not end training."""
    try:
        yield
    except OSError as error:
        log.error("%s was not written: %s", what, error)
