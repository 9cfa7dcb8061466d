"""What the recipes share: their options, their optimizers by name, and the comparison with the base optimizer."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import optax

import curvtrain
from curvtrain import curvature, optim
from curvtrain.trainer import FitResult, read_jsonl

OptimizerName = Literal[
    "fosi_adam",
    "fosi_momentum",
    "fosi_nesterov",
    "fosi_sgd",
    "kfac",
    "psgd",
    "adam",
    "adamw",
    "momentum",
    "nesterov",
    "sgd",
]

BASES: dict[str, Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]] = {
    "adam": optax.adam,
    "adamw": lambda rate: optax.adamw(rate, weight_decay=1e-2),
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "nesterov": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "sgd": optax.sgd,
}
FAMILIES: dict[str, Callable[[], curvature.Preconditioner]] = {
    "kron": curvature.Kron,
    "affine": curvature.Affine,
    "low_rank": curvature.LowRank,
    "xmat": curvature.XMat,
    "dense": curvature.Dense,
    "diagonal": curvature.Elementwise,
}
MOMENTUM = {"adam": "ema", "momentum": "heavy_ball", "nesterov": "nesterov", "sgd": "none"}  # of FOSI's Newton part


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options that every recipe has.

    Attributes:
      optimizer: a base optimizer, FOSI over it, K-FAC, or PSGD.
      learning_rate: of the base optimizer, of K-FAC or PSGD; None is the recipe's own, which says whether it was tuned.
      decay: whether learning rates stay as they are, or fall to zero along a cosine.
      alpha: rate of FOSI's Newton part.
      k: number of FOSI's eigenpairs.
      curvature_batch: examples that a refresh of FOSI sees, a multiple of batch_size; None is the training batch.
      fisher: of K-FAC: which gradients its factors are made of.
      inverse: of K-FAC: how its factors are inverted.
      weight_sharing: of K-FAC: what it does with several positions of one example.
      damping: of K-FAC; None adapts it.
      momentum: of K-FAC; None adapts it.
      l2: of K-FAC: coefficient of a penalty l2/2 |parameters|^2.
      preconditioner: of PSGD: its family.
      fit: of PSGD: whether it whitens gradients, or inverts the Hessian or the Gauss-Newton matrix.
      update_every: steps between two statistics of K-FAC (1 unless given), or two fits of PSGD (1 for 500 steps unless
        given, then ever more).
      refresh_every: steps between refreshes of eigenpairs (100 unless given) or of K-FAC's inverses (5 unless given,
        after ten first steps of one).
      compare: after a FOSI run, train its base optimizer for as many steps, after K-FAC or PSGD AdamW, and print both.
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

    optimizer: OptimizerName = "fosi_adam"
    learning_rate: float | None = None
    decay: Literal["none", "cosine"] = "none"
    alpha: float = 0.1
    k: int = 10
    curvature_batch: int | None = None
    fisher: Literal["exact", "sampled", "empirical"] = "sampled"
    inverse: Literal["cholesky", "eigh", "ekfac"] = "cholesky"
    weight_sharing: Literal["expand", "reduce"] = "expand"
    damping: float | None = None
    momentum: float | None = None
    l2: float = 0.0
    preconditioner: Literal["kron", "affine", "low_rank", "xmat", "dense", "diagonal"] = "kron"
    fit: Literal["gradient", "hessian", "ggn"] = "gradient"
    update_every: int | None = None
    refresh_every: int | None = None
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


LAYERWISE = ("kfac", "psgd")  # those that are compared with AdamW

MakeTrainer = Callable[..., curvtrain.Trainer]  # (config, optimizer=, curvature=, schedule=) -> Trainer


def run(options: RunOptions, rates: Mapping[str, float | None], make_trainer: MakeTrainer) -> dict[str, FitResult]:
    """Trains with the optimizer asked for, and with its base if `options.compare`; prints and draws the comparison.

    Args:
      options: of the recipe.
      rates: the default learning rate of every optimizer; None, or no entry, is an adaptive one of K-FAC.
      make_trainer: `(config, optimizer=, curvature=, schedule=) -> Trainer`.

    Returns:
      The results by optimizer.
    """
    names: list[str] = [options.optimizer]
    if options.compare and (options.optimizer in LAYERWISE or options.optimizer.startswith("fosi_")):
        names.append("adamw" if options.optimizer in LAYERWISE else options.optimizer.removeprefix("fosi_"))
    results: dict[str, FitResult] = {}
    for name in names:
        rate = rates.get(name) if options.learning_rate is None or name != options.optimizer else options.learning_rate
        trainer = make_trainer(options.config(name), **second_order(options, name, rate))
        if options.dry_run:
            print(f"{name}: {trainer.dry_run()}\n")
            continue
        print(f"--- {name}, learning rate {'adaptive' if rate is None else f'{rate:g}'}, {options.steps} steps")
        results[name] = trainer.fit()
    if results and jax.process_index() == 0:
        print(f"\n{_table(options, results)}")
        _draw(options, list(results))
    return results


def second_order(options: RunOptions, name: str, rate: Any) -> dict[str, Any]:
    """The optimizer of a name, with the curvature that it consumes: keywords of a Trainer."""
    if rate is not None and options.decay == "cosine":
        rate = optax.cosine_decay_schedule(rate, options.steps)
    if name == "kfac":
        given: dict[str, Any] = dict(learning_rate=rate, momentum=options.momentum, damping=options.damping)
        every = options.refresh_every or 5
        return dict(
            optimizer=optim.kfac(
                **{option: value for option, value in given.items() if value is not None}, l2=options.l2
            ),
            curvature=curvature.KFAC(options.fisher, options.weight_sharing, options.inverse, uncovered="diagonal"),
            schedule=curvtrain.CurvatureSchedule(
                update_every=options.update_every or 1,
                refresh_every=lambda step: 1 if step < 10 else every,  # the factors change fastest in the first steps
            ),
        )
    if rate is None:
        raise ValueError(f"{name} needs a learning rate.")
    if name == "psgd":
        return dict(
            optimizer=optim.psgd(rate, weight_decay=1e-2),
            curvature=curvature.PSGD(FAMILIES[options.preconditioner](), options.fit),
            schedule=curvtrain.CurvatureSchedule(update_every=options.update_every or curvature.Annealed().period),
        )
    base = BASES[name.removeprefix("fosi_")](rate)
    if not name.startswith("fosi_"):
        return dict(optimizer=base)
    every = options.refresh_every or 100
    return dict(
        optimizer=optim.fosi(base, alpha=options.alpha, momentum=MOMENTUM[name.removeprefix("fosi_")]),
        curvature=curvature.Lanczos(k=options.k),
        schedule=curvtrain.CurvatureSchedule(
            refresh_every=every,
            start=min(every, 20),  # the first steps change the curvature too fast to be worth a refresh
            batch_size=options.curvature_batch,
        ),
    )


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
