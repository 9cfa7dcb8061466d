"""What PSGD's families and geometries can fit, and how they train: three tables.

    python benchmarks/preconditioners.py                # prints, writes benchmarks/results/preconditioners.json

1. *Kronecker*: H is a Kronecker product of random matrices (5 and 10, each of condition number 10). Relative error
   of P against H^-1 after 100, 300, 1,000 and 3,000 updates with one product H v each, for two rates; medians of three
   seeds.
2. *Quadratic*: H is a random matrix of 50 dimensions and condition number 1,000. Condition number of P H after 300,
   1,000 and 3,000 updates, at the estimator's default rate, which falls from 0.5 to 0.1, and at one that falls to 0.05;
   medians of three seeds.
3. *Digits*: an MLP 64-64-32-10 on scikit-learn's digits, batches of 128, 200 steps, learning rates that fall to zero
   along a cosine. Every family whitens gradients; seven learning rates each, for Adam too, on seed 0, and then the best
   of them on three further seeds: training loss over all examples, after 50, 100 and 200 steps.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing it

from benchmarks.machine import write
from benchmarks.step_time import MLP
from curvtrain import Objective, losses, optim
from curvtrain.curvature import PSGD, Affine, Dense, Elementwise, Kron, LowRank, XMat
from curvtrain.curvature.psgd.base import Structure
from curvtrain.curvature.psgd.geometry import GEOMETRIES

FAMILIES: dict[str, Any] = {
    **{f"Kron {geometry}": Kron(geometry) for geometry in GEOMETRIES},
    "Affine (EQ)": Affine(),
    **{f"Dense {geometry}": Dense(geometry) for geometry in GEOMETRIES},
    "LowRank(10)": LowRank(10),
    "XMat": XMat(),
    "Diagonal": Elementwise(),
}
RATES: dict[str, Any] = {"default": PSGD.rate, "0.5 to 0.05": lambda t: 0.5 * 10 ** -(t / 3000), "0.5": 0.5, "0.1": 0.1}
Run = Callable[[float, int], list[float]]
TRAINED = ("Kron PRO", "Kron QUAD", "Kron EQ", "Affine (EQ)", "LowRank(10)", "XMat", "Diagonal")


def random_spd(n: int, condition: float, rng: np.random.Generator) -> np.ndarray:
    """A random symmetric matrix with eigenvalues from 1 to the condition number, evenly in logarithms."""
    Q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    return Q * np.logspace(0, np.log10(condition), n) @ Q.T


def fits(family: Any, H: np.ndarray, shape: tuple[int, ...], rate: Any, updates: list[int], seed: int) -> list[Any]:
    """P (n, n) after so many updates with products H v."""
    structure, n = Structure.of({"w": jnp.zeros(shape)}), len(H)
    wide = jnp.asarray(H, jnp.float32)

    def step(state, t):
        key = jax.random.fold_in(jax.random.key(seed), t)
        v = jax.random.normal(key, (1, n))
        pair = ({"w": x.reshape(1, *shape)} for x in (v, v @ wide))
        mu = jnp.float32(rate(t) if callable(rate) else rate)
        return family.fit(structure, state, *pair, jax.random.fold_in(key, 1), mu)[0], None

    @functools.partial(jax.jit, static_argnums=1)
    def run(state, steps, first):
        return jax.lax.scan(step, state, first + jnp.arange(steps))[0]

    @jax.jit
    def matrix(state):
        column = lambda e: family.apply(structure, state, {"w": e.reshape(shape)})["w"].ravel()
        return jax.vmap(column)(jnp.eye(n)).T

    state, found, done = family.init(structure), [], 0
    for until in updates:
        state, done = run(state, until - done, jnp.int32(done)), until
        found.append(np.asarray(matrix(state), np.float64))
    return found


def kronecker(family: Any, rate: Any, updates: list[int]) -> list[float]:
    """Medians over seeds of |P - H^-1| / |H^-1|."""
    errors = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        H = np.kron(random_spd(5, 10, rng), random_spd(10, 10, rng))
        inverse = np.linalg.inv(H)
        found = fits(family, H, (5, 10), rate, updates, seed)
        errors.append([np.linalg.norm(P - inverse) / np.linalg.norm(inverse) for P in found])
    return [float(statistics.median(column)) for column in zip(*errors, strict=True)]


def quadratic(family: Any, rate: Any, updates: list[int]) -> list[float]:
    """Medians over seeds of the condition number of P H."""
    conditions = []
    for seed in range(3):
        H = random_spd(50, 1000, np.random.default_rng(seed))
        root = np.linalg.cholesky(H)
        values = [np.linalg.eigvalsh(root.T @ P @ root) for P in fits(family, H, (50,), rate, updates, seed)]
        conditions.append([v[-1] / max(v[0], 1e-12) for v in values])
    return [float(statistics.median(column)) for column in zip(*conditions, strict=True)]


def digits() -> dict[str, jax.Array]:
    """All images in [0, 1], and their labels."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    return {"image": jnp.asarray(found.data / 16, jnp.float32), "label": jnp.asarray(found.target, jnp.int32)}


def trainer(data: dict[str, jax.Array], family: Any, steps: int = 200, size: int = 128) -> Run:
    """A function (learning rate, seed) -> training loss after 50, 100 and 200 steps; compiled once. No family: Adam."""
    estimator = None if family is None else PSGD(family)
    examples = len(data["label"])

    @jax.jit
    def run(params, rate, seed):
        schedule = lambda count: 0.5 * rate * (1 + jnp.cos(jnp.pi * count / steps))
        tx = optax.adam(schedule) if estimator is None else optim.psgd(schedule)
        curvature = None if estimator is None else estimator.init(None, params)

        def step(carry, t):
            params, state, curvature = carry
            key = jax.random.fold_in(jax.random.key(seed), t)
            rows = jax.random.choice(key, examples, (size,), replace=False)
            batch = {name: a[rows] for name, a in data.items()}
            grads = objective.value_and_grad(params, batch, key)[1]
            extra = {}
            if estimator is not None:
                curvature = estimator.update(curvature, objective, params, batch, key)
                extra = {"curvature": curvature}
            updates, state = tx.update(grads, state, params, **extra)
            params = optax.apply_updates(params, updates)
            seen = jnp.isin(t + 1, jnp.array([50, 100, steps]))
            loss = jax.lax.cond(seen, lambda p: objective.loss(p, data), lambda p: jnp.float32(0), params)
            return (params, state, curvature), loss

        return jax.lax.scan(step, (params, tx.init(params), curvature), jnp.arange(steps))[1]

    def made(seed):
        return Objective.from_model(
            MLP([64, 64, 32, 10], nnx.Rngs(seed)), lambda m, b: m(b["image"]), losses.SoftmaxCrossEntropy()
        )

    objective, _ = made(0)

    def losses_of(rate: float, seed: int) -> list[float]:
        values = np.asarray(run(made(seed)[1], jnp.float32(rate), seed))
        return [float(values[t - 1]) for t in (50, 100, steps)]

    return losses_of


def trained(data: dict[str, jax.Array], family: Any) -> dict[str, Any]:
    """The best of seven learning rates on seed 0, and its losses on three further seeds."""
    run = trainer(data, family)
    center = 1e-2 if family is None else 5e-3
    grid = {float(f"{center * 10 ** (i / 3):.2g}"): None for i in range(-3, 4)}
    found = {rate: run(rate, 0) for rate in grid}
    finite = lambda loss: loss if np.isfinite(loss) else np.inf
    best = min(found, key=lambda rate: finite(found[rate][-1]))
    seeds = [run(best, seed) for seed in (1, 2, 3)]
    means = [statistics.mean(column) for column in zip(*seeds, strict=True)]
    return {"learning_rate": best, "grid": {f"{r:g}": v for r, v in found.items()}, "seeds": seeds, "mean": means}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "preconditioners.json")
    args = parser.parse_args()
    results: dict[str, Any] = {"kronecker": {}, "quadratic": {}, "digits": {}}
    show = lambda values: "  ".join(f"{value:8.1e}" for value in values)

    print("Kronecker: relative error of P after 100, 300, 1000, 3000 updates")
    for name, family in FAMILIES.items():
        for rate in ("0.1", "0.5"):
            found = kronecker(family, RATES[rate], [100, 300, 1000, 3000])
            results["kronecker"][f"{name}, rate {rate}"] = found
            print(f"  {name:<12} rate {rate:<12} {show(found)}", flush=True)
    print("Quadratic: condition number of P H after 300, 1000, 3000 updates")
    for name, family in FAMILIES.items():
        if name.startswith("Kron") or name.startswith("Affine"):
            continue  # of one side: a diagonal
        for rate in ("default", "0.5 to 0.05"):
            found = results["quadratic"][f"{name}, rate {rate}"] = quadratic(family, RATES[rate], [300, 1000, 3000])
            print(f"  {name:<12} rate {rate:<12} {show(found)}", flush=True)
    print("Digits: training loss after 50, 100, 200 steps, means of three seeds")
    data = digits()
    for name in ("Adam", *TRAINED):
        found = results["digits"][name] = trained(data, FAMILIES.get(name))
        print(f"  {name:<12} rate {found['learning_rate']:<12g} {show(found['mean'])}", flush=True)
    write(args.output, results)


if __name__ == "__main__":
    main()
