"""What the recipes share: their options, and the comparison with a baseline."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import jax

import curvtrain
from curvtrain.trainer import FitResult, read_jsonl

from common.optimizers import BASES, OptimizerOptions, chosen


@dataclasses.dataclass(frozen=True)
class RunOptions(OptimizerOptions):
    """Options that every recipe has, besides those of the optimizer.

    Attributes:
      compare: after a FOSI run, train its base optimizer for as many steps, after any other that is no baseline itself
        AdamW, and print both.
      steps: optimizer steps.
      batch_size: examples per step.
      seed: of initialisation, data order and estimators.
      mesh: axes and sizes, as "data=2,fsdp=4"; -1 is the rest of the devices.
      sharding: of the parameters: "replicated" or "fsdp".
      accumulate: micro-batches per step.
      workdir: folder for checkpoints, logs and the picture; a run that was stopped goes on from there.
      save_every: steps between checkpoints.
      eval_every: steps between evaluations.
      log_every: steps between log lines.
      tensorboard: write TensorBoard event files too.
      dry_run: print memory and FLOPs of each program, and stop.
    """

    compare: bool = True
    steps: int = 300
    batch_size: int = 128
    seed: int = 0
    mesh: str = "data=-1"
    sharding: Literal["replicated", "fsdp"] = "replicated"
    accumulate: int = 1
    workdir: str = "runs/recipe"
    save_every: int = 100
    eval_every: int = 100
    log_every: int = 50
    tensorboard: bool = False
    dry_run: bool = False

    def config(self, name: str) -> curvtrain.TrainerConfig:
        """The TrainerConfig of the run `name`, in a folder of its own below the workdir."""
        return curvtrain.TrainerConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            seed=self.seed,
            workdir=os.path.join(self.workdir, name),
            mesh=parse_mesh(self.mesh),
            sharding=self.sharding,
            accumulate=self.accumulate,
            save_every=self.save_every,
            eval_every=self.eval_every,
            log_every=self.log_every,
            writers=("jsonl", "tensorboard") if self.tensorboard else ("jsonl",),
        )


def parse_mesh(text: str) -> dict[str, int]:
    """ "data=2,fsdp=-1" -> {"data": 2, "fsdp": -1}."""
    try:
        return {axis.strip(): int(size) for axis, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ValueError(f"--mesh should look like data=2,fsdp=4, not {text!r}.") from None


MakeTrainer = Callable[..., curvtrain.Trainer]  # (config, optimizer=, curvature=, schedule=) -> Trainer


def run(options: RunOptions, rates: Mapping[str, float | None], make_trainer: MakeTrainer) -> dict[str, FitResult]:
    """Trains with the optimizer asked for, and with its base if `options.compare`; prints and draws the comparison.

    Args:
      options: of the recipe.
      rates: the default learning rate of every optimizer; None, or no entry, is an adaptive one of K-FAC or AdamQLR.
      make_trainer: `(config, optimizer=, curvature=, schedule=) -> Trainer`.

    Returns:
      The results by optimizer.
    """
    names: list[str] = [options.optimizer]
    base = _compared_with(options.optimizer)
    if options.compare and base is not None:
        names.append(base)
    results: dict[str, FitResult] = {}
    for name in names:
        rate = rates.get(name) if options.learning_rate is None or name != options.optimizer else options.learning_rate
        trainer = make_trainer(options.config(name), **chosen(options, name, rate, options.steps))
        if options.dry_run:
            print(f"{name}: {trainer.dry_run()}\n")
            continue
        print(f"--- {name}, learning rate {'adaptive' if rate is None else f'{rate:g}'}, {options.steps} steps")
        results[name] = trainer.fit()
    if results and jax.process_index() == 0:
        print(f"\n{_table(options, results)}")
        _draw(options, list(results))
    return results


def _compared_with(name: str) -> str | None:
    """The baseline of an optimizer; None if it is one."""
    if name.startswith("fosi_"):
        return name.removeprefix("fosi_")
    return None if name in BASES else "adamw"


def _table(options: RunOptions, results: Mapping[str, FitResult]) -> str:
    metrics = sorted({name for r in results.values() for name in r.metrics if name.startswith(("train/", "eval/"))})
    rows = [["optimizer", "steps", *metrics, "seconds"]]
    for name, result in results.items():
        shown = [f"{result.metrics.get(metric, float('nan')):.4f}" for metric in metrics]
        rows.append([name, str(result.step), *shown, f"{result.seconds:.0f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines) + f"\nmetrics and checkpoints: {options.workdir}"


def _draw(options: RunOptions, names: list[str]) -> None:
    """Loss curves of the runs, and the largest eigenvalues, as comparison.png in the workdir."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    panels = (("train/loss", "training loss"), ("eval/loss", "test loss"), ("curvature/eigenvalue_max", "curvature"))
    for name in names:
        rows = read_jsonl(Path(options.workdir) / name / "metrics.jsonl")
        for axis, (metric, title) in zip(axes, panels, strict=True):
            points = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=name)
            axis.set(title=title, xlabel="step", yscale="log")
        points = [(row["step"], row["curvature/eigenvalue_min"]) for row in rows if row.get("curvature/eigenvalue_min")]
        if points:
            axes[2].plot(
                *zip(*points, strict=True), marker=".", linestyle=":", label=f"{name}, smallest of {options.k}"
            )
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
        axis.grid(alpha=0.3)
    path = os.path.join(options.workdir, "comparison.png")
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")
