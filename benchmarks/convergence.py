"""Optimizers against each other on a recipe, all tuned with the same budget.

    python benchmarks/convergence.py --recipe autoencoder
    python benchmarks/convergence.py --recipe resnet --optimizers adamw kfac psgd --decay cosine
    python benchmarks/convergence.py --recipe transformer --steps 150 --optimizers adamw kfac psgd --decay cosine

Every optimizer gets as many trials on seed 0, at the recipe's model and number of steps: a grid of learning rates, for
K-FAC of rates and dampings. The trial with the lowest training loss over the last steps is then run on further seeds,
and these alone, which nothing was tuned on, are averaged. All other options stay at their defaults. Test metrics are
reported, not selected on. Seconds include compilation.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]  # run from a checkout without installing it

import char_lm
import classification
import mlp_autoencoder
import resnet_fosi
from benchmarks.machine import write
from common import images, optimizers, runs, text

import curvtrain


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe's trainer, and the learning rates around which the grids of its optimizers lie."""

    options: runs.RunOptions
    make: Callable[..., curvtrain.Trainer]
    rates: dict[str, float]

    def trials(self, name: str, number: int) -> list[dict[str, float]]:
        """As many trials for every optimizer: rates in steps of 10^(1/2), K-FAC's by its dampings in steps of 10."""
        center, half = self.rates[name.removeprefix("fosi_")], 10**0.5
        if name != "kfac":
            return [{"learning_rate": float(f"{center * half ** (i - number // 2):.2g}")} for i in range(number)]
        rates = [float(f"{center * half ** (i - number // 6):.2g}") for i in range(number // 3)]
        return [{"learning_rate": rate, "damping": damping} for rate in rates for damping in (0.01, 0.1, 1.0)]


CENTERS = {"momentum": 0.1, "nesterov": 0.1, "sgd": 0.1, "kfac": 0.1, "natural_gradient": 0.1}  # of small classifiers
CENTERS |= dict.fromkeys(("adam", "adamw", "psgd", "soap", "shampoo", "kl_shampoo", "muon", "fadam"), 0.01)
CENTERS |= {"rf_rmsprop": 1e-2, "rf_adamw": 1e-2}


def resnet() -> Case:
    options, data = resnet_fosi.Options(), images.load_images("digits")
    make = lambda config, **optimizer: resnet_fosi.ResNetTrainer(
        config, data=data, depth=options.depth, width=options.width, **optimizer
    )
    return Case(options, make, {"adam": 1e-2, "adamw": 1e-2, "momentum": 0.1, "kfac": 0.1, "psgd": 3e-3})


def autoencoder() -> Case:
    options, data = mlp_autoencoder.Options(), images.load_images("digits")
    low, high = data.train["image"].min(), data.train["image"].max()
    train, test = (mlp_autoencoder.pixels(part, low, high) for part in (data.train, data.test))
    make = lambda config, **optimizer: mlp_autoencoder.AutoencoderTrainer(
        config, train=train, test=test, sizes=options.sizes, **optimizer
    )
    return Case(options, make, {"adam": 1e-2, "adamw": 1e-2, "momentum": 1e-2, "kfac": 0.1, "psgd": 3e-3})


def characters(model: str) -> Case:
    options = char_lm.Options(model=model)  # pyrefly: ignore
    data = text.load_text(None, length=options.length)
    make = lambda config, **optimizer: char_lm.CharTrainer(config, data=data, options=options, **optimizer)
    return Case(options, make, {"adam": 3e-3, "adamw": 3e-3, "momentum": 0.3, "kfac": 0.1, "psgd": 3e-3})


def classifier(model: str) -> Case:
    options, data = classification.Options(model=model), images.load_images("digits")  # pyrefly: ignore
    make = lambda config, **optimizer: classification.ClassifierTrainer(
        config, data=data, model=model, sizes=options.sizes, **optimizer
    )
    return Case(options, make, CENTERS)


CASES: dict[str, Callable[[], Case]] = {
    "resnet": resnet,
    "autoencoder": autoencoder,
    "transformer": lambda: characters("transformer"),
    "gru": lambda: characters("gru"),
    "mlp": lambda: classifier("mlp"),
    "cnn": lambda: classifier("cnn"),
}


def train(case: Case, options: runs.RunOptions) -> dict[str, float]:
    """The last logged metrics of a run, infinite loss if it diverged."""
    config = curvtrain.TrainerConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
        log_every=min(50, options.steps),
        progress=False,
    )
    began = time.perf_counter()
    try:
        optimizer = optimizers.chosen(options, options.optimizer, options.learning_rate, options.steps)
        result = case.make(config, **optimizer).fit()
    except curvtrain.trainer.Diverged:
        return {"train/loss": float("inf")}
    keep = {key: value for key, value in result.metrics.items() if key.startswith(("train/", "eval/"))}
    return {**keep, "seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=CASES, default="resnet")
    parser.add_argument("--optimizers", nargs="+", default=["adam", "fosi_adam"])
    parser.add_argument("--decay", choices=["none", "cosine"], default="none", help="of all learning rates")
    parser.add_argument("--trials", type=int, default=9, help="of each optimizer, on seed 0")
    parser.add_argument("--seeds", type=int, default=3, help="further ones, for the best trial")
    parser.add_argument("--steps", type=int, default=None, help="default: the recipe's")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    case = CASES[args.recipe]()
    options = dataclasses.replace(case.options, decay=args.decay, steps=args.steps or case.options.steps)
    report: dict[str, Any] = {}
    for name in args.optimizers:
        momentum = 0.9 if name == "kfac" else None
        mine = dataclasses.replace(options, optimizer=name, momentum=momentum)
        grid = []
        for trial in case.trials(name, args.trials):
            found = train(case, dataclasses.replace(mine, **dict[str, Any](trial), seed=0))
            grid.append({**trial, **found})
            print(f"{name:<10} {trial}, seed 0: train/loss {found['train/loss']:.5g}", flush=True)
        best = min(case.trials(name, args.trials), key=lambda trial: _loss(grid, trial))
        chosen: dict[str, Any] = {**best}
        seeds = [train(case, dataclasses.replace(mine, **chosen, seed=seed)) for seed in range(1, args.seeds + 1)]
        means = {key: statistics.mean(run[key] for run in seeds) for key in seeds[0]}
        spread = {key: statistics.pstdev(run[key] for run in seeds) for key in seeds[0]}
        report[name] = {"best": best, "grid": grid, "seeds": seeds, "mean": means, "deviation": spread}
        shown = "  ".join(f"{key} {means[key]:.4g} ± {spread[key]:.1g}" for key in means)
        print(f"{name:<10} {best}, seeds 1-{args.seeds}: {shown}", flush=True)
    output = args.output or Path(__file__).parent / "results" / f"convergence_{args.recipe}.json"
    write(output, report, steps=options.steps)


def _loss(grid: list[dict[str, float]], trial: dict[str, float]) -> float:
    return next(run["train/loss"] for run in grid if trial.items() <= run.items())


if __name__ == "__main__":
    main()
