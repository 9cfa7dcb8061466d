"""What every optimizer of the recipes keeps and computes, and what it is for: the README's table.

    python benchmarks/optimizers.py                 # measures, writes results/optimizers.json and the README
    python benchmarks/optimizers.py --table         # writes the README from the results that are there

The model is recipes/classification.py's perceptron 64-256-256-10 with batches of 256. State is what the optimizer and
the curvature keep, in bytes for each parameter; work is XLA's count of the FLOPs of the compiled steps, divided by that
of Adam's step: of the cheapest kind of step, and on average over the first 1,000 steps with the recipe's schedule. XLA
counts the body of a loop once and a library's factorisation as nothing, so inverses, eigenbases and Lanczos iterations
are not in it: their sizes are said in words.
"""

import argparse
import collections
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]  # run from a checkout without installing it

import classification
from benchmarks.machine import write
from common import images
from common.optimizers import ADAPTIVE, chosen

import curvtrain

RESULTS = Path(__file__).parent / "results" / "optimizers.json"
BEGIN, END = "<!-- benchmarks/optimizers.py: begin -->", "<!-- benchmarks/optimizers.py: end -->"
STEPS = 1000

# name -> (its curvature and what a refresh of it does, what it is for, where it fails)
USES = {
    "sgd": ("none", "the least memory", "badly scaled losses"),
    "momentum": ("none", "convolutional networks with a tuned rate and schedule", "transformers"),
    "adam": ("none", "a first try at anything", ""),
    "adamw": ("none", "the baseline of this table", "where curvature pays"),
    "fadam": ("square of the batch's gradient", "Adam's place; clipped steps and decay", "slow in its first steps"),
    "rf_rmsprop": (
        "the same, without its root",
        "convolutional networks; bfloat16 state",
        "larger dampings: it is SGD",
    ),
    "rf_adamw": ("the same", "transformers; bfloat16 state", "few steps: it begins slowly"),
    "adamqlr": ("Gauss-Newton along one direction", "no rate to tune; large batches", "noisy batches; one more pass"),
    "muon": (
        "none; products of small matrices",
        "hidden matrices of transformers",
        "vectors, embeddings: AdamW's",
    ),
    "soap": ("`GradientKronecker`: QR of sides", "most per step for the least tuning", "sides of thousands"),
    "shampoo": ("`GradientKronecker`: roots of sides", "SOAP's place, grafted on Adam", "without grafting, its scale"),
    "kl_shampoo": ("`GradientKronecker(fit='kl')`: QR of sides", "SOAP without second moments", "sides of thousands"),
    "sirfshampoo": ("`InverseFree`: products alone", "bfloat16 factors; no factorisation", "slow from P = I"),
    "if_shampoo": ("`InverseFree`, at growing intervals", "the same at a smaller price", "the same"),
    "singd": ("`InverseFreeKFAC`: products alone", "K-FAC in bfloat16", "losses that are no likelihoods"),
    "adafisher": ("`KroneckerDiagonal`", "curvature at Adam's price", "ahead early, not in the end"),
    "adafisherw": ("`KroneckerDiagonal`", "the same, with decoupled decay", "the same"),
    "kfac": ("`KFAC`: inverses of sides", "full batches; everything adapts", "losses that are no likelihoods"),
    "natural_gradient": ("any; here `KFAC`", "known rates and dampings", "dampings that are too small"),
    "psgd": ("`PSGD(Kron())`: a fit", "any loss, any shape; transformers", "the rate has to fall"),
    "fosi_adam": ("`Lanczos`: 2 (k + 1) Hessian products", "few stiff directions", "noisy Hessians"),
    "ivon": ("its own diagonal Hessian", "a posterior at AdamW's price", "tuning: rate, `hess_init`"),
    "vogn": ("`DiagonalFisher`", "posteriors; uncertainty", "a pass per draw"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.table:
        data = images.load_images("digits")
        found = {}
        for name in USES:
            found[name] = measured(name, data)
            print(f"{name:<17} {found[name]}", flush=True)
        write(RESULTS, found, steps=STEPS)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(with_table(text, json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


def measured(name: str, data: images.ImageData) -> dict[str, float]:
    """Bytes of state per parameter; FLOPs of the cheapest step, and of the average one."""
    options = classification.Options(optimizer=name, sizes=(256, 256), batch_size=256)  # pyrefly: ignore
    rate = None if name in ADAPTIVE else 1e-3
    trainer = classification.ClassifierTrainer(
        curvtrain.TrainerConfig(steps=STEPS, batch_size=options.batch_size, mesh={"data": 1}, progress=False),
        data=data,
        model=options.model,
        sizes=options.sizes,
        **chosen(options, name, rate, STEPS),
    )
    run = trainer.dry_run()
    parameters = run.state["params"].whole / 4
    kept = sum(run.state[part].whole for part in ("opt_state", "curvature") if part in run.state)
    flops = {program.name: program.flops for program in run.programs}
    kinds = collections.Counter(str(trainer._plan.programs.kind(step)) for step in range(STEPS))
    return {
        "bytes per parameter": kept / parameters,
        "flops": min(flops[kind] for kind in kinds),
        "flops on average": sum(flops[kind] * count for kind, count in kinds.items()) / STEPS,
    }


def with_table(readme: str, report: dict[str, Any]) -> str:
    """The README with the table of these results between its marks."""
    found, adam = report["results"], report["results"]["adam"]["flops"]
    head = (
        "optimizer",
        "curvature, and what a refresh takes",
        "state, bytes / parameter",
        "work / Adam's",
        "for",
        "not for",
    )
    rows = [head, ("---",) * len(head)]
    for name, (curvature, good, bad) in USES.items():
        one = found[name]
        least, mean = one["flops"] / adam, one["flops on average"] / adam
        work = f"{mean:.2f}" if f"{least:.2f}" == f"{mean:.2f}" else f"{least:.2f}, {mean:.2f}"
        rows.append((f"`{name}`", curvature, f"{one['bytes per parameter']:.1f}", work, good, bad))
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    main()
