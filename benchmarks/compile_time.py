"""Compile times, and how they grow with the number of parameters' leaves.

    python benchmarks/compile_time.py                      # prints a table, writes benchmarks/results/compile_time.json
    python benchmarks/compile_time.py --only lanczos

A case is a function () -> {"small": program, "large": program}, a program being what `jax.jit(f).lower(...)` returns.
Reported are the seconds that compiling takes on this machine (the process's CPU time too, which does not count what
other processes do), the number of HLO instructions, and the ratios large / small. To add a case, write such a function
and name it in `CASES`.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing it

import curvtrain
from benchmarks.machine import write
from curvtrain import curvature, losses, optim
from curvtrain.trainer.run.layout import Task
from curvtrain.trainer.run.plan import Plan
from curvtrain.trainer.run.step import Kind
from recipes.common.resnet import ResNet

Programs = dict[str, jax.stages.Lowered]
LEAVES = {"small": 10, "large": 150}


def lanczos_iteration() -> Programs:
    """A refresh of ten eigenpairs over 10 and 150 leaves, for a diagonal map, which costs almost nothing."""

    def program(leaves: int) -> jax.stages.Lowered:
        diagonal = {f"{i}": jnp.ones((8, 8) if i % 2 else 8) for i in range(leaves)}
        estimator = curvature.Lanczos(10)
        run = lambda pairs, diagonal, key: estimator.of_map(
            lambda v: jax.tree.map(jnp.multiply, diagonal, v), pairs, key
        )
        return jax.jit(run).lower(estimator.init(None, diagonal), diagonal, jax.random.key(0))

    return {size: program(leaves) for size, leaves in LEAVES.items()}


def equal_layers(layers: int, width: int = 32) -> dict[str, Any]:
    """Parameters of so many linear layers."""
    return {f"{i}": {"kernel": jnp.ones((width, width)), "bias": jnp.ones(width)} for i in range(layers)}


def optimizer_update(tx: optax.GradientTransformation, estimator: Any) -> Programs:
    """The update of an optimizer over 10 and 150 equal layers, given its curvature."""

    def program(layers: int) -> jax.stages.Lowered:
        params = equal_layers(layers)
        extended = optax.with_extra_args_support(tx)
        given = None if estimator is None else estimator.init(None, params)
        run = jax.jit(lambda g, s, p, c: extended.update(g, s, p, curvature=c))
        return run.lower(params, extended.init(params), params, given)

    return {size: program(layers) for size, layers in LEAVES.items()}


def resnet_steps(optimizer: optax.GradientTransformation, estimator: Any, kind: Kind) -> Programs:
    """ResNet-8 at batch 128: Adam's step, and a step of another kind."""

    def program(optimizer: Any, estimator: Any, kind: Kind) -> jax.stages.Lowered:
        loss = losses.SoftmaxCrossEntropy()
        build = lambda rngs: ResNet(10, 1, 8, rngs=rngs)
        task = Task("ResNet", build, lambda model, batch: model(batch["image"]), loss, loss.metrics)
        data = {"image": np.zeros((128, 8, 8, 1), np.float32), "label": np.zeros(128, np.int32)}
        config = curvtrain.TrainerConfig(steps=1, batch_size=128)
        return Plan(config, task, data, optimizer, estimator, curvtrain.CurvatureSchedule()).programs.lower(kind)

    return {"small": program(optax.adam(1e-3), None, Kind()), "large": program(optimizer, estimator, kind)}


CASES: dict[str, Callable[[], Programs]] = {
    "Lanczos's iteration, 150 leaves / 10": lanczos_iteration,
    "Adam's update, 150 layers / 10": lambda: optimizer_update(optax.adam(1e-3), None),
    "FOSI's update, 150 layers / 10": lambda: optimizer_update(optim.fosi(optax.adam(1e-3)), curvature.Lanczos(10)),
    "ResNet-8, FOSI's step / Adam's": lambda: resnet_steps(optim.fosi(optax.adam(1e-3)), curvature.Lanczos(10), Kind()),
    "ResNet-8, a step with a Lanczos refresh / Adam's": lambda: resnet_steps(
        optim.fosi(optax.adam(1e-3)), curvature.Lanczos(10), Kind(refresh=True)
    ),
}


def measure(lowered: jax.stages.Lowered) -> dict[str, float]:
    """Seconds, CPU seconds and HLO instructions of a program."""
    began, cpu = time.perf_counter(), time.process_time()
    compiled = lowered.compile()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"seconds": seconds, "cpu_s": cpu, "instructions": (compiled.as_text() or "").count(" = ")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "compile_time.json")
    parser.add_argument("--only", default="", help="cases whose name contains this; nothing is written then")
    args = parser.parse_args()
    jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile()  # wakes the compiler up
    results = {}
    for name, case in CASES.items():
        if args.only.lower() not in name.lower():
            continue
        found = {size: measure(lowered) for size, lowered in case().items()}
        ratio = {key: found["large"][key] / found["small"][key] for key in found["large"]}
        results[name] = {f"{size}_{key}": found[size][key] for size, key in itertools.product(found, ratio)}
        results[name] |= {
            "ratio": ratio["seconds"],
            "cpu_ratio": ratio["cpu_s"],
            "instructions_ratio": ratio["instructions"],
        }
        print(
            f"{name:<50} {ratio['seconds']:.2f}   " + ", ".join(f"{k} {v:.4g}" for k, v in results[name].items()),
            flush=True,
        )
    if not args.only:
        write(args.output, results)


if __name__ == "__main__":
    main()
