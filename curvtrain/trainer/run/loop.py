"""The training loop: batches in, steps out; logs, evaluates and saves between them.

Order within a step: batch, program, log, evaluate, hooks, save. A checkpoint is written after a step and before the
next batch is drawn, so the iterators' positions in it are those of the next step.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from curvtrain.trainer.data import own_positions, saved_positions
from curvtrain.trainer.disk.checkpoint import Checkpoints
from curvtrain.trainer.disk.compiled import compilation_cache_of
from curvtrain.trainer.disk.plain import from_plain, to_plain
from curvtrain.trainer.disk.reading import versions
from curvtrain.trainer.disk.workdir import claimed
from curvtrain.trainer.live import Ending, Run
from curvtrain.trainer.mesh import distributed
from curvtrain.trainer.mesh.sharding import of_several_cpus
from curvtrain.trainer.run.agreement import check_same_programs, check_same_run
from curvtrain.trainer.run.announcement import announce
from curvtrain.trainer.run.evaluation import evaluate
from curvtrain.trainer.run.plan import Plan
from curvtrain.trainer.run.results import Diverged, FitResult, Preempted
from curvtrain.trainer.run.resuming import with_new_constants
from curvtrain.trainer.run.termination import Termination
from curvtrain.trainer.run.window import Window
from curvtrain.trainer.watch.hooks import Hook
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
        bytes_of_batch = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(plan.programs.batch))
        self._window = Window(max(2, IN_FLIGHT_BYTES // bytes_of_batch))
        self._hooks_wait = of_several_cpus(plan.mesh)  # what a hook computes may keep a running step from its end
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
            announce(self.plan, self._report.say)  # the needs of the run, before they are allocated
            stack.callback(live.streams.close)
            start = self._restore_or_init()
            self._report.begin(start)
            over = start >= config.steps or self._stays_ended()
            if not over:
                self._try_to_save()
            complete = over and self._is_evaluated()  # nothing is left to be logged
            folder = Path(config.workdir) if config.workdir is not None and main and not complete else None
            self._writer = open_writers(config.writers, folder, start)
            stack.callback(self._close_writer)
            for hook in self.hooks:
                stack.callback(hook.close)
            if over or (start and self._due(config.eval_every) and not self._is_evaluated()):
                self._evaluate()  # the second case: SIGTERM had cut it short
            ended = self._termination.poll()  # after SIGTERM there is nothing new to be saved
            self._clock.restart()
            for step in range(start, start if ended or over else config.steps):
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
        state, seen = plan.programs.step(kind)(live.to_donate(), batch, wide)
        live.advance(step + 1, state)
        self._window.add(seen)

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
            if not finished:
                self._call([hook for hook in self.hooks if due(hook.every)])
            finished = finished or live.stop_reason is not None
            ending = self._termination.poll() or finished
            if ending:
                self._log()
            if finished and not self._termination.seen:
                if not self._is_evaluated():
                    self._evaluate()
                live.last = True
                self._call(self.hooks)
            live.end(config.steps)
            if ending or due(config.save_every):
                self._save()
        return ending

    def _call(self, hooks: Sequence[Hook]) -> None:
        if self._hooks_wait and hooks:
            jax.block_until_ready(self.live.current)
        for hook in hooks:
            hook(self.live)

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
        stack.enter_context(compilation_cache_of(config.compilation_cache, config.workdir, self.plan.mesh))
        return None if config.workdir is None else stack.enter_context(Checkpoints(config))

    def _restore_or_init(self) -> int:
        """Sets the run to the newest checkpoint, or else to where it was left or begins; returns its step."""
        live, meta = self.live, {}
        if self._checkpoints is not None and self._checkpoints.steps:
            live.forget_first()
            state, meta = self._checkpoints.restore(self.plan.layout.state, self._description)
            state, changed = with_new_constants(self.plan, state)
            live.restore(int(state.step), state, meta.get("logged", {}))
            live.ending = None if meta.get("ending") is None else Ending(**meta["ending"])
            live.skipped = tuple(meta.get("skipped", (0, 0)))
            self._report.say(f"resumed after step {live.step} from {self.config.workdir}")
            for name, (old, new) in changed.items():
                self._report.say(f"{name}, which was {old:.6g}, is {new:.6g} from now on")
        else:
            live.step = int(live.current.step)
            if live.ending is not None and live.ending.diverged:
                raise Diverged(live.ending.reason)
            if live.step:  # an earlier call of fit has left them
                self._check_parameters()
        positions = meta.get("positions")
        live.streams.open(None if positions is None else from_plain(own_positions(positions)))
        memories = list(meta.get("hooks", []))
        for hook in self.hooks:
            own = next((memory for memory in memories if memory["kind"] == type(hook).__name__), None)
            if own is not None:
                memories.remove(own)
                hook.load_state_dict(from_plain(own["state"]))
        return live.step

    def _stays_ended(self) -> bool:
        """Whether a hook had ended the run for good; says so. More steps than it had then let it go on."""
        live, steps = self.live, self.config.steps
        if live.ending is None:
            return False
        if steps > live.ending.steps:
            live.ending = None
            return False
        live.stop_reason = live.ending.reason
        log.warning(
            "The run was ended at step %d (%s) and is not trained on. With more steps than TrainerConfig(steps=%d) it "
            "goes on, and in a new workdir it begins anew.",
            live.step,
            live.stop_reason,
            live.ending.steps,
        )
        return True

    def _try_to_save(self) -> None:
        """Raises CheckpointError, or a hook's TypeError, if the run cannot be saved: now, not after hours."""
        if self._checkpoints is not None:
            self._checkpoints.try_out(self.live.current, self._meta())

    # -- between steps ---------------------------------------------------------------------------------------------

    def _log(self) -> None:
        """Averages and records the metrics of the steps since the last log. Raises Diverged if one is not finite."""
        if not len(self._window):
            return
        self._check_losses()
        rate = len(self._window) / self._clock.seconds
        self._clock.restart()
        scalars = {f"train/{name}": value for name, value in self._window.take().items()}
        if self.config.nonfinite == "skip":
            scalars["train/skipped"] = float(self.live.skipped[0])
        with self._clock.pause():  # it is compiled at the first log
            seen = jax.device_get(self.plan.programs.telemetry(self.live.current.curvature))
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
        scores = evaluate(self.plan, self.live.current, self.eval_data, self._termination.poll)
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
        self._checkpoints.save(live.step, live.current, self._meta(), scores if self._is_evaluated() else None)

    def _meta(self) -> dict[str, Any]:
        """The metadata of a checkpoint of now, plain JSON."""
        live = self.live
        memory = lambda hook: to_plain(hook.state_dict(), f"{type(hook).__name__}.state_dict()")
        return {
            "run": self._description,
            "versions": versions(),
            "config": {name: repr(value) for name, value in dataclasses.asdict(self.config).items()},
            "mesh": dict(self.plan.mesh.shape),
            "positions": saved_positions(to_plain(live.streams.positions, "the position of train_data")),
            "logged": {name: (live.logged_at[name], value) for name, value in live.metrics.items()},
            "hooks": [{"kind": type(hook).__name__, "state": memory(hook)} for hook in self.hooks],
            "ending": None if live.ending is None else dataclasses.asdict(live.ending),
            "skipped": live.skipped,
        }

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
        """Counts the steps that were skipped. Raises Diverged if too many were, or a loss is not finite."""
        live, limit = self.live, self.config.max_nonfinite
        first, last = live.step - len(self._window) + 1, live.step
        settled, bad = self._window.settle(live.step)
        if bad is not None:
            raise self._diverged(f"The training loss is {bad[1]} at step {bad[0]} (seen in steps {first} to {last})")
        skipped = [step for step, was_skipped in settled.items() if was_skipped]
        if skipped:
            log.warning("Skipped step %s: loss, gradient or new parameters not finite.", ", ".join(map(str, skipped)))
        for step, was_skipped in settled.items():
            total, in_succession = live.skipped
            live.skipped = (total + 1, in_succession + 1) if was_skipped else (total, 0)
            if live.skipped[1] > limit:
                raise self._diverged(
                    f"Loss, gradient or new parameters are not finite in steps {step - limit} to {step}, more in "
                    f"succession than TrainerConfig(max_nonfinite={limit})"
                )

    def _check_parameters(self) -> None:
        """Raises Diverged unless the parameters and their averages are finite."""
        state = self.live.current
        if not bool(self.plan.programs.all_finite((state.params, state.ema))):
            raise self._diverged(f"The parameters are not finite after step {self.live.step}")

    def _diverged(self, what: str) -> Diverged:
        newest = self._checkpoints.steps if self._checkpoints is not None else []
        if newest:
            where = f"The newest checkpoint is step {newest[-1]}. The next fit() goes on from there."
        else:
            where = "There is no checkpoint. This Trainer cannot go on: build a new one."
        advice = "Lower the learning rate, or raise the damping of the curvature."
        if self.config.nonfinite == "stop":
            advice += " For single bad batches there is TrainerConfig(nonfinite='skip')."
        message = f"{what}. {where} {advice}"
        self.live.ending = Ending(message, self.config.steps, diverged=True)
        return Diverged(message)


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    """Reports an OSError: a full disk does not end training."""
    try:
        yield
    except OSError as error:
        log.error("%s was not written: %s", what, error)
