"""FOSI against its base optimizer on a recipe, both tuned with the same budget.

    python benchmarks/convergence.py --recipe resnet             # a few minutes on 2 cores
    python benchmarks/convergence.py --recipe autoencoder

Every optimizer gets the same grid of learning rates on seed 0, at the recipe's model and number of steps; the rate with
the lowest training loss over the last steps is then run on further seeds. FOSI's other options stay at their defaults:
they are not tuned. Test metrics are reported, not selected on.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optax

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]  # run from a checkout without installing it

import char_lm
import mlp_autoencoder
import resnet_fosi
from benchmarks.machine import describe
from common import images, runs, text

import curvtrain


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe's trainer and its grid."""

    options: runs.RunOptions
    make: Callable[..., curvtrain.Trainer]
    rates: dict[str, list[float]]


def resnet() -> Case:
    options, data = resnet_fosi.Options(), images.load_images("digits")
    make = lambda config, **optimizer: resnet_fosi.ResNetTrainer(
        config, data=data, depth=options.depth, width=options.width, **optimizer
    )
    return Case(options, make, {"adam": [3e-3, 1e-2, 3e-2], "momentum": [0.03, 0.1, 0.3]})


def autoencoder() -> Case:
    options, data = mlp_autoencoder.Options(), images.load_images("digits")
    low, high = data.train["image"].min(), data.train["image"].max()
    train, test = (mlp_autoencoder.pixels(part, low, high) for part in (data.train, data.test))
    make = lambda config, **optimizer: mlp_autoencoder.AutoencoderTrainer(
        config, train=train, test=test, sizes=options.sizes, **optimizer
    )
    return Case(options, make, {"adam": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1], "momentum": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]})


def characters(model: str) -> Case:
    options = char_lm.Options(model=model)  # pyrefly: ignore
    data = text.load_text(None, length=options.length)
    make = lambda config, **optimizer: char_lm.CharTrainer(config, data=data, options=options, **optimizer)
    return Case(options, make, {"adam": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2], "momentum": [0.03, 0.1, 0.3, 1.0, 3.0]})


CASES: dict[str, Callable[[], Case]] = {
    "resnet": resnet,
    "autoencoder": autoencoder,
    "transformer": lambda: characters("transformer"),
    "gru": lambda: characters("gru"),
}


def train(case: Case, name: str, rate: float, seed: int, steps: int) -> dict[str, float]:
    """The last logged metrics of a run, infinite loss if it diverged."""
    config = curvtrain.TrainerConfig(
        steps=steps, batch_size=case.options.batch_size, seed=seed, log_every=min(50, steps), progress=False
    )
    began = time.perf_counter()
    try:
        result = case.make(config, **_tunable(case.options, name, rate)).fit()
    except curvtrain.trainer.Diverged:
        return {"train/loss": float("inf")}
    keep = {key: value for key, value in result.metrics.items() if key.startswith(("train/", "eval/"))}
    return {**keep, "seconds": time.perf_counter() - began}


def _tunable(options: runs.RunOptions, name: str, rate: float) -> dict[str, Any]:
    base = name.removeprefix("fosi_")
    tunable = optax.inject_hyperparams(runs.BASES[base])(rate)
    return runs.second_order(options, name, tunable)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=CASES, default="resnet")
    parser.add_argument("--bases", nargs="+", choices=["adam", "momentum"], default=["adam"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None, help="default: the recipe's")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    case = CASES[args.recipe]()
    steps = args.steps or case.options.steps
    report: dict[str, Any] = {}
    for base in args.bases:
        for name in (base, f"fosi_{base}"):
            grid = {}
            for rate in case.rates[base]:
                grid[rate] = train(case, name, rate, 0, steps)
                print(f"{name:<14} rate {rate:<8g} seed 0  train/loss {grid[rate]['train/loss']:.5g}", flush=True)
            best = min(grid, key=lambda rate: grid[rate]["train/loss"])
            seeds = [grid[best], *(train(case, name, best, seed, steps) for seed in range(1, args.seeds))]
            means = {key: statistics.mean(run[key] for run in seeds) for key in seeds[0]}
            spread = {key: statistics.pstdev(run[key] for run in seeds) for key in seeds[0]}
            report[name] = {"rate": best, "grid": grid, "seeds": seeds, "mean": means, "deviation": spread}
            shown = "  ".join(f"{key} {means[key]:.4g} ± {spread[key]:.1g}" for key in means)
            print(f"{name:<14} rate {best:g}, {args.seeds} seeds: {shown}", flush=True)
    output = args.output or Path(__file__).parent / "results" / f"convergence_{args.recipe}.json"
    command = " ".join(["python", "benchmarks/convergence.py", *sys.argv[1:]])
    output.parent.mkdir(parents=True, exist_ok=True)
    body = {"command": command, "machine": describe(), "steps": steps, "results": report}
    output.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
