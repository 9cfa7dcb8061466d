"""Compile times, and how they grow with the number of parameters' leaves.

    python benchmarks/compile_time.py                      # prints a table, writes benchmarks/results/compile_time.json
    python benchmarks/compile_time.py --only lanczos

A case is a function () -> {"small": program, "large": program}, a program being what `jax.jit(f).lower(...)` returns.
Reported are the seconds that compiling takes on this machine (the process's CPU time too, which does not count what
other processes do), the number of HLO instructions, and the ratios large / small. To add a case, write such a function
and name it in `CASES`.
"""

import argparse
import dataclasses
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
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing it

import curvtrain
from benchmarks.machine import write
from curvtrain import curvature, losses, optim
from curvtrain.trainer.run.layout import Task
from curvtrain.trainer.run.plan import Plan
from curvtrain.trainer.run.step import Kind
from recipes.common.autoencoder import Autoencoder
from recipes.common.language import Transformer
from recipes.common.resnet import ResNet

Programs = dict[str, jax.stages.Lowered]
PLAIN, UPDATE, REFRESH = Kind(), Kind(update=True), Kind(update=True, refresh=True)
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


class Layers(nnx.Module):
    """So many equal layers."""

    def __init__(self, layers: int, rngs: nnx.Rngs, width: int = 32):
        self.layers = nnx.List(nnx.Linear(width, width, rngs=rngs) for _ in range(layers))

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = nnx.tanh(layer(x))
        return x


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of a recipe, with a loss and data of the right shapes: `build(rngs)` makes it."""

    build: Callable[[nnx.Rngs], nnx.Module]
    entry: str
    loss: Any
    data: dict[str, np.ndarray]

    def step(self, optimizer: Any, estimator: Any = None, kind: Kind = PLAIN) -> jax.stages.Lowered:
        """The Trainer's step of one kind."""
        task = Task("Trainer", self.build, lambda model, batch: model(batch[self.entry]), self.loss, self.loss.metrics)
        config = curvtrain.TrainerConfig(steps=1, batch_size=len(self.data[self.entry]))
        schedule = curvtrain.CurvatureSchedule()
        return Plan(config, task, self.data, optimizer, estimator, schedule).programs.lower(kind)


def resnet() -> Model:
    """ResNet-8 for the digits, at batch 128."""
    data = {"image": np.zeros((128, 8, 8, 1), np.float32), "label": np.zeros(128, np.int32)}
    return Model(lambda rngs: ResNet(10, 1, 8, rngs=rngs), "image", losses.SoftmaxCrossEntropy(), data)


def autoencoder() -> Model:
    """The digits autoencoder of `recipes/autoencoder_kfac.py`, at batch 128."""
    loss, data = losses.SigmoidCrossEntropy("pixels"), {"pixels": np.zeros((128, 64), np.float32)}
    return Model(lambda rngs: Autoencoder((64, 48, 24, 8), rngs=rngs), "pixels", loss, data)


def transformer() -> Model:
    """The transformer of `recipes/transformer_psgd.py`, at batch 32 and length 64."""
    data = {"tokens": np.zeros((32, 64), np.int32), "label": np.zeros((32, 64), np.int32)}
    return Model(lambda rngs: Transformer(96, 64, rngs=rngs), "tokens", losses.SoftmaxCrossEntropy(), data)


def equal_layers(layers: int) -> Model:
    """So many equal layers, at batch 32."""
    data = {"x": np.zeros((32, 32), np.float32), "target": np.zeros((32, 32), np.float32)}
    return Model(lambda rngs: Layers(layers, rngs), "x", losses.SquaredError(), data)


ADAM = optax.adam(1e-3)
FOSI = optim.fosi(ADAM), curvature.Lanczos(10)
KFAC = optim.kfac(1e-2, 0.9, 1e-2, reject=False), curvature.KFAC()
PSGD = optim.psgd(1e-3), curvature.PSGD(curvature.Kron(), fit="gradient")


def against_adam(model: Model, optimizer: Any, estimator: Any, kind: Kind) -> Programs:
    """A step of one kind, and Adam's."""
    return {"small": model.step(ADAM), "large": model.step(optimizer, estimator, kind)}


def growing(optimizer: Any, estimator: Any = None, kind: Kind = PLAIN) -> Programs:
    """The steps of models of 10 and 150 equal layers."""
    return {size: equal_layers(layers).step(optimizer, estimator, kind) for size, layers in LEAVES.items()}


CASES: dict[str, Callable[[], Programs]] = {
    "Lanczos's iteration, 150 leaves / 10": lanczos_iteration,
    "Adam's step, 150 layers / 10": lambda: growing(ADAM),
    "FOSI's step, 150 layers / 10": lambda: growing(*FOSI),
    "PSGD's step, 150 layers / 10": lambda: growing(*PSGD, UPDATE),
    "K-FAC's step, 150 layers / 10": lambda: growing(*KFAC, UPDATE),
    "K-FAC's step with a refresh, 150 layers / 10": lambda: growing(*KFAC, REFRESH),
    "ResNet-8, FOSI's step / Adam's": lambda: against_adam(resnet(), *FOSI, Kind()),
    "ResNet-8, a step with a Lanczos refresh / Adam's": lambda: against_adam(resnet(), *FOSI, Kind(refresh=True)),
    "transformer, PSGD's step / Adam's": lambda: against_adam(transformer(), *PSGD, UPDATE),
    "autoencoder, PSGD's step / Adam's": lambda: against_adam(autoencoder(), *PSGD, UPDATE),
    "autoencoder, K-FAC's step / Adam's": lambda: against_adam(autoencoder(), *KFAC, UPDATE),
    "autoencoder, K-FAC's step with a refresh / Adam's": lambda: against_adam(autoencoder(), *KFAC, REFRESH),
    "ResNet-8, K-FAC's step / Adam's": lambda: against_adam(resnet(), *KFAC, UPDATE),
    "ResNet-8, K-FAC's step with a refresh / Adam's": lambda: against_adam(resnet(), *KFAC, REFRESH),
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
