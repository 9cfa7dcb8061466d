"""The ends of a call of `fit`: its result, and the loop's own exceptions."""

import dataclasses


class Diverged(RuntimeError):
    """The loss or the parameters are not finite. The message names the step and the newest checkpoint."""


class Preempted(SystemExit):
    """SIGTERM came: the run was saved at a step boundary. Exits with status 0 unless it is caught."""


@dataclasses.dataclass(frozen=True)
class FitResult:
    """The result of a call of `fit`.

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
