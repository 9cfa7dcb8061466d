"""The Trainer's options: a frozen dataclass, checked when it is built."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

from curvtrain import _checks

WRITERS = ("jsonl", "csv", "tensorboard")
SHARDINGS = ("replicated", "fsdp")
NONFINITE = ("stop", "skip")
ShardingRules = Sequence[tuple[str, PartitionSpec | str]]


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """The options of a run.

    Attributes:
      steps: optimizer steps in all. A finished run that is given more steps goes on.
      batch_size: examples per step, over all devices and processes.
      seed: the seed of initialisation, data order, dropout and estimators; step t uses fold_in(seed, t).
      workdir: folder for checkpoints and logs; None keeps everything in memory.
      mesh: axes and sizes, among "data", "fsdp", "tensor" and "mc"; -1 is the rest of the devices. The batch is split
        over data and fsdp, and over mc the draws of an optimizer that samples.
      sharding: "replicated"; "fsdp" (every parameter split along its largest axis that divides); or rules
        [(regex of the parameter's path, PartitionSpec or one of these words), ...]. The first match counts; without a
        match a parameter is replicated. A parameter that carries an NNX sharding annotation keeps it.
      save_every: steps between checkpoints (with a workdir; the last step is always saved); None: the last step only.
      eval_every: steps between evaluations of `eval_data` (which also follow the last step); None: never.
      log_every: steps over which logged training metrics are averaged.
      accumulate: number of micro-batches in which a batch is walked; same gradients, less memory.
      ema: decay of an exponential moving average of the parameters, which `evaluate` then looks at; None: no average.
        Batch statistics, and all other floating-point state of the model, are averaged with it, so that the averaged
        parameters are evaluated with statistics of their own.
      eval_batch_size: examples per evaluation step; None: batch_size.
      keep_latest, keep_best: checkpoints to keep: the newest ones, and the best by `best_metric`.
      best_metric, best_mode: the evaluation metric that ranks checkpoints, and whether "min" or "max" is better.
      writers: the formats in which scalars are logged in the workdir, among "jsonl", "csv", "tensorboard".
      nonfinite: what becomes of a step whose loss, gradient or new parameters are not finite. "stop": the run ends with
        `trainer.Diverged`. "skip": the batch is used up, and parameters, their averages, optimizer state, curvature
        and model state stay as they are; the step is logged as a warning and counted in "train/skipped".
      max_nonfinite: steps in succession that "skip" skips; one more ends the run.
      progress: whether to print progress; None: yes, on process 0.
      compilation_cache: where JAX keeps compiled programs during `fit`, so that a repeated or resumed run starts
        without compiling again. True: in the workdir's folder `compiled`, which may be deleted at any time; without a
        workdir, or where you have configured a cache of JAX's own (JAX_COMPILATION_CACHE_DIR), nothing is changed. A
        path: in that folder, which several runs may share. False or None: nowhere. On a mesh of several CPU devices
        nothing is kept or read, whatever is configured: XLA's programs for these may hang when they are read back.
    """

    steps: int
    batch_size: int
    seed: int = 0
    workdir: str | os.PathLike | None = None
    mesh: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"data": -1})
    sharding: str | ShardingRules = "replicated"
    save_every: int | None = 500
    eval_every: int | None = None
    log_every: int = 50
    accumulate: int = 1
    ema: float | None = None
    eval_batch_size: int | None = None
    keep_latest: int = 2
    keep_best: int = 1
    best_metric: str = "loss"
    best_mode: str = "min"
    writers: Sequence[str] = ("jsonl",)
    nonfinite: str = "stop"
    max_nonfinite: int = 10
    progress: bool | None = None
    compilation_cache: str | os.PathLike | bool | None = True

    def __post_init__(self):
        name = "TrainerConfig({})".format
        for field in ("steps", "batch_size", "log_every", "accumulate", "keep_latest"):
            _checks.positive_int(name(field), getattr(self, field))
        for field in ("save_every", "eval_every", "eval_batch_size"):
            if getattr(self, field) is not None:
                _checks.positive_int(name(field), getattr(self, field))
        _checks.positive_int(name("seed"), self.seed, minimum=0)
        _checks.positive_int(name("keep_best"), self.keep_best, minimum=0)
        _checks.one_of(name("nonfinite"), self.nonfinite, NONFINITE)
        _checks.positive_int(name("max_nonfinite"), self.max_nonfinite, minimum=0)
        if self.ema is not None:
            _checks.number_in(name("ema"), self.ema, 0.0, 1.0, open_high=True)
        _checks.one_of(name("best_mode"), self.best_mode, ("min", "max"))
        if isinstance(self.writers, str) or not isinstance(self.writers, Sequence):
            raise TypeError(f"{name('writers')} should be a list of names, such as ['jsonl'], not {self.writers!r}.")
        for writer in self.writers:
            _checks.one_of(name("writers"), writer, WRITERS)
        if not isinstance(self.workdir, str | os.PathLike | None):
            raise TypeError(f"{name('workdir')} should be a path or None, not {type(self.workdir).__name__}.")
        if not isinstance(self.compilation_cache, str | os.PathLike | bool | None):
            raise TypeError(
                f"{name('compilation_cache')} should be True, False, a path or None, not "
                f"{type(self.compilation_cache).__name__}."
            )
        if not isinstance(self.mesh, Mapping):
            raise TypeError(
                f"{name('mesh')} should be a dict of axes and sizes, such as {{'data': -1}}, not {self.mesh!r}."
            )
        if isinstance(self.sharding, str):
            _checks.one_of(name("sharding"), self.sharding, SHARDINGS)
        else:
            _check_rules(name("sharding"), self.sharding)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"TrainerConfig(accumulate) should divide batch_size={self.batch_size}, and {self.accumulate} does not."
            )


def _check_rules(argument: str, rules: ShardingRules) -> None:
    """Raises TypeError or ValueError unless every rule is a regular expression and a PartitionSpec."""
    for rule in rules if isinstance(rules, Sequence) else [rules]:
        pair = isinstance(rule, tuple | list) and len(rule) == 2
        if not (pair and isinstance(rule[0], str) and isinstance(rule[1], PartitionSpec | str)):
            raise TypeError(
                f"{argument} should be 'replicated', 'fsdp' or a list of (regular expression, PartitionSpec) pairs; "
                f"{rule!r} is not such a pair."
            )
        if isinstance(rule[1], str):
            _checks.one_of(f"{argument} of {rule[0]!r}", rule[1], SHARDINGS)
        try:
            re.compile(rule[0])
        except re.error as error:
            raise ValueError(f"{argument}: {rule[0]!r} is not a regular expression: {error}.") from error
