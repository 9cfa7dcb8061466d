"""Do posteriors know what they do not know? IVON and VOGN against AdamW's point estimate, on the digits.

    python benchmarks/calibration.py

The perceptron of recipes/classification.py (64-64-64-10) for 1,000 steps, rates falling along a cosine. Every optimizer
gets five learning rates on seed 0, of which the best by test loss is chosen, and then seeds 1 to 3, of which the means
are reported: accuracy, the loss (the negative log-likelihood) and the expected calibration error on the test digits, at
the mean of the parameters and averaged over draws. All choose by the same number, and none was chosen on the seeds that
are reported.
"""

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]  # run from a checkout without installing it

import classification
from benchmarks.machine import write
from common import images
from common.optimizers import chosen

import curvtrain

RATES = {"adamw": 3e-3, "ivon": 1.0, "vogn": 1e-2}  # the middle of each grid, in steps of 10^(1/2)
SHOWN = ("eval/accuracy", "eval/loss", "eval/calibration_error", "train/loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=32, help="over which predictions are averaged")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "calibration.json")
    args = parser.parse_args()
    data, report = images.load_images("digits"), {}
    for name in args.optimizers:
        rates = [float(f"{RATES[name] * 10 ** (i / 2):.2g}") for i in range(-2, 3)]
        grid = {rate: trained(name, data, rate, 0, args) for rate in rates}
        for rate, found in grid.items():
            print(f"{name:<6} rate {rate:g}, seed 0: {shown(found)}", flush=True)
        best = min(grid, key=lambda rate: grid[rate]["eval/loss"])
        seeds = [trained(name, data, best, seed, args) for seed in range(1, args.seeds + 1)]
        mean = {key: statistics.mean(run[key] for run in seeds) for key in SHOWN}
        spread = {key: statistics.pstdev(run[key] for run in seeds) for key in SHOWN}
        report[name] = {"rate": best, "grid": grid, "seeds": seeds, "mean": mean, "deviation": spread}
        print(f"{name:<6} rate {best:g}, seeds 1 to {args.seeds}: {shown(mean)}", flush=True)
    write(args.output, report, steps=args.steps, draws=args.draws)


def trained(name: str, data: images.ImageData, rate: float, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """The last metrics of a run; infinite ones if it diverged."""
    given: dict[str, Any] = dict(optimizer=name, decay="cosine", predictive_samples=args.draws, steps=args.steps)
    options = dataclasses.replace(classification.Options(), **given)
    trainer = classification.ClassifierTrainer(
        curvtrain.TrainerConfig(steps=args.steps, batch_size=128, seed=seed, log_every=20, progress=False),
        data=data,
        model=options.model,
        sizes=options.sizes,
        **chosen(options, name, rate, args.steps),
    )
    try:
        found = trainer.fit().metrics
    except curvtrain.trainer.Diverged:
        return dict.fromkeys(SHOWN, float("inf"))
    return {key: found[key] for key in SHOWN}


def shown(found: dict[str, float]) -> str:
    """In one line."""
    return "  ".join(f"{key} {found[key]:.4g}" for key in SHOWN)


if __name__ == "__main__":
    main()
