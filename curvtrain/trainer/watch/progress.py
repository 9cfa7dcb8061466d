"""Progress on the console: a bar with rate and time left on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

MAX_SHOWN = 5  # scalars on a line


class ProgressReport:
    """Prints the run's progress; silent when `enabled` is false."""

    def __init__(self, enabled: bool, steps: int):
        self._console = Console(quiet=not enabled, soft_wrap=True, highlight=False)
        self._steps = steps
        self._bar = None
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("train", total=steps, rate="")

    def begin(self, step: int) -> None:
        """Shows the bar, at this many steps."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
            self._bar.start()

    def say(self, text: str) -> None:
        """Prints a line of text."""
        self._console.print(text, markup=False)

    def log(self, step: int, scalars: Mapping[str, float], rate: float) -> None:
        """Prints a line of scalars, with the rate in steps per second and the time left."""
        shown = [f"{name} {value:.4g}" for name, value in scalars.items() if name != "steps_per_second"][:MAX_SHOWN]
        left = duration((self._steps - step) / rate) if rate > 0 else "?"
        width = len(str(self._steps))
        self.say("  ".join([f"step {step:>{width}}/{self._steps}", *shown, f"{rate:.1f} steps/s", f"{left} left"]))
        self.advance(step, rate)

    def advance(self, step: int, rate: float) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, rate=f"{rate:.1f} steps/s")

    def close(self) -> None:
        """Takes the bar away; the lines stay."""
        if self._bar is not None:
            self._bar.stop()


class Clock:
    """Counts the seconds of training, without those of compilation, evaluation and saving."""

    def __init__(self):
        self._since = time.perf_counter()
        self._paused = 0.0

    def restart(self) -> None:
        """Starts a new interval."""
        self._since, self._paused = time.perf_counter(), 0.0

    def pause(self) -> "_Pause":
        """A context whose time does not count."""
        return _Pause(self)

    @property
    def seconds(self) -> float:
        """Seconds that count since the interval began."""
        return max(time.perf_counter() - self._since - self._paused, 1e-9)


class _Pause:
    def __init__(self, clock: Clock):
        self._clock = clock

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *_):
        self._clock._paused += time.perf_counter() - self._start


def duration(seconds: float) -> str:
    """Formats seconds as 1:02:03 or 2:03."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
