"""Step times as ratios of medians, measured side by side in one process.

    python benchmarks/step_time.py                      # prints a table, writes benchmarks/results/step_time.json

Questions, each answered by alternating the two things compared, chunk by chunk, so that whatever else the machine
does hits both:

1. *Trainer*: a `Trainer.fit` step against a hand-written `jax.jit` loop of the same model, optimizer, data and metrics;
   at steps of about 10 ms, and, for the host's share, at 100 parameter leaves of almost no arithmetic.
2. *FOSI*: T steps with one warm refresh of 22 products, against T steps of its base optimizer Adam, on an MLP of 85k
   parameters at batch 256, k = 10, T = 300 and 100.
3. *Refresh*: one warm refresh against as many Hessian-vector products in a compiled loop of nothing else.
4. *K-FAC*: steps with statistics in every one and inverses in every fifth, against Adam's, on the same MLP, for the
   sampled and for the empirical Fisher, at given learning rate, momentum and damping.
5. *PSGD*: steps with Kronecker-factored whitening, fitted in every step and in every 33rd, against Adam's.
6. *Matrix methods*: SOAP and KL-Shampoo with new bases in every tenth step, and Muon, against Adam, on the transformer
   of recipes/char_lm.py.
7. *Compilation*: of the PSGD step of a transformer of 24 scanned blocks against one of 6.
"""

import argparse
import functools
import itertools
import statistics
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
from recipes.common.language import Transformer
from curvtrain import curvature, hooks, losses, optim
from curvtrain.curvature import trees
from curvtrain.trainer.run.layout import Task
from curvtrain.trainer.run.plan import Plan
from curvtrain.trainer.run.step import Kind


class MLP(nnx.Module):
    def __init__(self, sizes: list[int], rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.tanh(layer(x))
        return self.layers[-1](x)


class MLPTrainer(curvtrain.Trainer):
    loss = losses.SoftmaxCrossEntropy()

    def __init__(self, sizes: list[int], *args, **kwargs):
        self.sizes = sizes
        super().__init__(*args, **kwargs)

    def build_model(self, rngs):
        return MLP(self.sizes, rngs)

    def predict(self, model, batch):
        return model(batch["image"])


def data(examples: int, features: int, classes: int = 10) -> dict[str, np.ndarray]:
    """Random images and labels: step time does not depend on what is learned."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((examples, features), np.float32)
    return {"image": image, "label": rng.integers(0, classes, examples, np.int32)}


def hand_written_loop(sizes: list[int], train: dict[str, np.ndarray], batch_size: int) -> Callable[[int], None]:
    """What one would write without a framework: runs so many steps, shuffled, with loss and accuracy kept."""
    graph, params = nnx.split(MLP(sizes, nnx.Rngs(0)), nnx.Param)
    params, tx = nnx.to_pure_dict(params), optax.adam(1e-3)

    def loss_fn(params, batch):
        logits = nnx.merge(graph, params)(batch["image"])
        values = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return values.mean(), (jnp.argmax(logits, -1) == batch["label"]).mean()

    def step(params, opt_state, batch):
        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {"loss": loss, "accuracy": accuracy}

    jitted = jax.jit(step, donate_argnums=(0, 1))
    box = {"params": params, "opt_state": jax.jit(tx.init)(params)}
    rng, n = np.random.default_rng(0), len(train["label"])
    order = {"rows": rng.permutation(n), "at": 0}

    def run(steps: int) -> None:
        kept = []
        for _ in range(steps):
            if order["at"] + batch_size > n:
                order.update(rows=rng.permutation(n), at=0)
            rows = order["rows"][order["at"] : order["at"] + batch_size]
            order["at"] += batch_size
            batch = {name: a[rows] for name, a in train.items()}
            box["params"], box["opt_state"], metrics = jitted(box["params"], box["opt_state"], batch)
            kept.append(metrics)
        jax.block_until_ready(box["params"])
        jax.device_get(kept)

    return run


class Alternate(hooks.Hook):
    """Times chunks of `every` Trainer steps, and after each chunk as many steps of another loop."""

    def __init__(self, every: int, other: Callable[[int], None]):
        self.every, self._other = every, other
        self.trainer: list[float] = []
        self.loop: list[float] = []
        self._began: float | None = None

    def __call__(self, run):
        jax.block_until_ready(run.state)
        now = time.perf_counter()
        if self._began is not None and not run.last:
            self.trainer.append((now - self._began) / self.every)
            self._other(self.every)
            self.loop.append((time.perf_counter() - now) / self.every)
        self._began = time.perf_counter()


def trainer_against_loop(sizes: list[int], batch_size: int, every: int, chunks: int) -> dict[str, float]:
    """Medians in ms of a Trainer step and of a hand-written one."""
    train = data(max(8 * batch_size, 1024), sizes[0])
    loop = hand_written_loop(sizes, train, batch_size)
    loop(every)  # compiles
    hook = Alternate(every, loop)
    config = curvtrain.TrainerConfig(
        steps=every * (chunks + 1), batch_size=batch_size, log_every=every, mesh={"data": -1}, progress=False
    )
    MLPTrainer(sizes, config, train_data=train, optimizer=optax.adam(1e-3), hooks=[hook]).fit()
    trainer, hand = statistics.median(hook.trainer[1:]), statistics.median(hook.loop[1:])
    return {"trainer_ms": 1e3 * trainer, "hand_written_ms": 1e3 * hand, "ratio": trainer / hand}


def plan_of_mlp(sizes: list[int], batch_size: int, optimizer: Any, estimator: Any = None) -> Plan:
    """The compiled programs of a run, without its loop."""
    task = Task(
        "MLP",
        lambda rngs: MLP(sizes, rngs),
        lambda model, batch: model(batch["image"]),
        losses.SoftmaxCrossEntropy(),
        losses.SoftmaxCrossEntropy().metrics,
    )
    config = curvtrain.TrainerConfig(steps=1, batch_size=batch_size)
    train = data(8 * batch_size, sizes[0])
    return Plan(config, task, train, optimizer, estimator, curvtrain.CurvatureSchedule())


def plan_of_transformer(optimizer: Any, estimator: Any = None) -> Plan:
    """Of the transformer of recipes/char_lm.py, with the recipe's sizes and a vocabulary of 128."""
    task = Task(
        "transformer",
        lambda rngs: Transformer(128, 64, layers=2, width=64, heads=4, rngs=rngs),
        lambda model, batch: model(batch["tokens"]),
        losses.SoftmaxCrossEntropy(),
        losses.SoftmaxCrossEntropy().metrics,
    )
    tokens = np.random.default_rng(0).integers(0, 128, (64, 64), np.int32)
    config = curvtrain.TrainerConfig(steps=1, batch_size=32)
    train = {"tokens": tokens, "label": tokens}
    return Plan(config, task, train, optimizer, estimator, curvtrain.CurvatureSchedule())


class Stepper:
    """Runs compiled steps of a plan on a fixed batch."""

    def __init__(self, plan: Plan):
        self.plan, self.state, self.batch = plan, plan.layout.initial_state(), plan.batches.put(plan.data.first())

    def __call__(self, kind: Kind, steps: int = 1) -> float:
        """Seconds for so many steps of a kind."""
        program = self.plan.programs.step(kind)
        began, seen = time.perf_counter(), None
        for _ in range(steps):
            self.state, seen = program(self.state, self.batch, None)
        jax.block_until_ready((self.state, seen))
        return time.perf_counter() - began


def against_adam(
    plan_of: Callable[..., Plan], rounds: int, optimizer: Any, estimator: Any, plain: Kind, dear: Kind, period: int
) -> dict[str, float]:
    """Medians in ms of an optimizer's step, one of `period` of the dear kind; of this one alone; and of Adam's."""
    adam, other = Stepper(plan_of(optax.adam(1e-3))), Stepper(plan_of(optimizer, estimator))
    adam(Kind(), 20), other(dear, 2), other(plain, 20)  # compile; a first refresh of eigenpairs costs more than others
    cycles = max(1, 50 // period)
    times: dict[str, list[float]] = {"other": [], "adam": [], "dear": []}
    for _ in range(rounds):
        seconds = [(other(dear), other(plain, period - 1)) for _ in range(cycles)]
        times["dear"] += [once for once, _ in seconds]
        times["other"].append(sum(map(sum, seconds)))
        times["adam"].append(adam(Kind(), cycles * period))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "step_ms": 1e3 * medians["other"] / (cycles * period),
        "adam_step_ms": 1e3 * medians["adam"] / (cycles * period),
        "dear_step_ms": 1e3 * medians["dear"],
        "ratio": medians["other"] / medians["adam"],
    }


def fosi(period: int) -> tuple[Any, ...]:
    """Arguments of `against_adam`: Newton steps over Adam, a refresh in one step of `period`."""
    return optim.fosi(optax.adam(1e-3)), curvature.Lanczos(k=10), Kind(), Kind(refresh=True), period


def kfac(fisher: str, period: int) -> tuple[Any, ...]:
    """Statistics in every step, inverses in one of `period`."""
    kinds = Kind(update=True), Kind(update=True, refresh=True)
    return optim.kfac(1e-3, 0.9, 1e-2), curvature.KFAC(fisher), *kinds, period


def psgd(period: int) -> tuple[Any, ...]:
    """A fit in one step of `period`."""
    return optim.psgd(1e-3), curvature.PSGD(curvature.Kron()), Kind(), Kind(update=True), period


def whitening(optimizer: Any, estimator: Any, period: int) -> tuple[Any, ...]:
    """The covariance moves in every step, its bases in one of `period`."""
    return optimizer, estimator, Kind(update=True), Kind(update=True, refresh=True), period


def compile_times(layers: tuple[int, int], rounds: int) -> dict[str, float]:
    """Medians in s of compiling a step with a fit of a transformer with scanned blocks, for two numbers of blocks."""
    tokens = np.zeros((8, 16), np.int32)
    batch = {"tokens": tokens, "label": tokens}
    times: dict[int, list[float]] = {n: [] for n in layers}
    for _ in range(rounds):
        for n in layers:
            task = Task(
                "transformer",
                lambda rngs, n=n: Transformer(32, 16, layers=n, width=32, scan=True, rngs=rngs),
                lambda model, batch: model(batch["tokens"]),
                losses.SoftmaxCrossEntropy(),
                losses.SoftmaxCrossEntropy().metrics,
            )
            config = curvtrain.TrainerConfig(steps=1, batch_size=8)
            plan = Plan(config, task, batch, optim.psgd(1e-3), curvature.PSGD(), curvtrain.CurvatureSchedule())
            jax.clear_caches()
            began = time.perf_counter()
            plan.programs.step(Kind(update=True))
            times[n].append(time.perf_counter() - began)
    few, many = (statistics.median(times[n]) for n in layers)
    return {f"{layers[0]}_blocks_s": few, f"{layers[1]}_blocks_s": many, "ratio": many / few}


def refresh_against_hvps(sizes: list[int], batch_size: int, rounds: int) -> dict[str, float]:
    """Medians in ms of a warm refresh, and of as many Hessian-vector products in a loop."""
    plan = plan_of_mlp(sizes, batch_size, optax.adam(1e-3))
    objective, params = plan.layout.objective, plan.layout.initial_state().params
    batch = plan.batches.put(plan.data.first())
    estimator, key = curvature.Lanczos(k=10), jax.random.key(0)
    refresh = jax.jit(lambda c, p: estimator.refresh(c, objective.with_state({}), p, batch, key))
    pairs = refresh(estimator.init(objective, params), params)
    pairs = refresh(pairs, params)
    products = int(pairs.products)

    @jax.jit
    def hvps(params, vector):
        def body(v, _):
            w = curvature.hvp(objective.with_state({}), params, v, batch)
            return trees.scale(1.0 / trees.norm(w), w), None

        return jax.lax.scan(body, vector, None, length=products)[0]

    vector = trees.random(key, params)
    jax.block_until_ready(hvps(params, vector))
    times: dict[str, list[float]] = {"refresh": [], "hvps": []}
    for _ in range(rounds):
        for name, run in (("refresh", lambda: refresh(pairs, params)), ("hvps", lambda: hvps(params, vector))):
            began = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "refresh_ms": 1e3 * medians["refresh"],
        "one_hvp_ms": 1e3 * medians["hvps"] / products,
        "products": products,
        "refresh_in_hvps": medians["refresh"] / (medians["hvps"] / products),
        "ratio": medians["refresh"] / medians["hvps"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="alternations of each comparison")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "step_time.json")
    parser.add_argument("--only", default="", help="cases whose name contains this; nothing is written then")
    args = parser.parse_args()
    mlp = [64, 256, 256, 10]
    versus_adam = functools.partial(against_adam, functools.partial(plan_of_mlp, mlp, 256), args.rounds)
    in_transformer = functools.partial(against_adam, plan_of_transformer, args.rounds)
    covariance = curvature.GradientKronecker
    cases: dict[str, Callable[[], dict[str, float]]] = {
        "Trainer / hand-written loop, ~10 ms steps": lambda: trainer_against_loop(
            [256, 1024, 1024, 10], 384, 50, args.rounds
        ),
        "Trainer / hand-written loop, 100 leaves": lambda: trainer_against_loop([8] * 50 + [10], 8, 200, args.rounds),
        "FOSI / Adam, refresh every 300": lambda: versus_adam(*fosi(300)),
        "FOSI / Adam, refresh every 100": lambda: versus_adam(*fosi(100)),
        "refresh / its products": lambda: refresh_against_hvps(mlp, 256, 2 * args.rounds),
        "K-FAC (sampled) / Adam, inverses every 5": lambda: versus_adam(*kfac("sampled", 5)),
        "K-FAC (empirical) / Adam, inverses every 5": lambda: versus_adam(*kfac("empirical", 5)),
        "PSGD / Adam, a fit in every step": lambda: versus_adam(*psgd(1)),
        "PSGD / Adam, a fit every 33": lambda: versus_adam(*psgd(33)),
        "SOAP / Adam, transformer, bases every 10": lambda: in_transformer(
            *whitening(optim.soap(1e-3), covariance(), 10)
        ),
        "KL-Shampoo / Adam, transformer, bases every 10": lambda: in_transformer(
            *whitening(optim.kl_shampoo(1e-3), covariance("kl", decay=0.98), 10)
        ),
        "Muon / Adam, transformer": lambda: in_transformer(optim.muon(1e-3), None, Kind(), Kind(), 1),
        "PSGD: compiling 24 scanned blocks / 6": lambda: compile_times((6, 24), 3),
    }
    if args.only:
        cases = {name: measure for name, measure in cases.items() if args.only.lower() in name.lower()}
    results = {}
    for name, measure in cases.items():
        results[name] = measure()
        details = ", ".join(f"{key} {value:.4g}" for key, value in results[name].items() if key != "ratio")
        print(f"{name:<45} {results[name]['ratio']:.3f}   {details}", flush=True)
    if args.only:
        return
    write(args.output, results)


if __name__ == "__main__":
    main()
