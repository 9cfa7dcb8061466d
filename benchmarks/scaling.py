"""What one device computes, sends and stores as a run is spread over more of them: read from the compiled programs.

    python benchmarks/scaling.py                       # prints tables, writes benchmarks/results/scaling.{json,png}
    python benchmarks/scaling.py --devices 1 8 --only K-FAC --sharding replicated --scaling strong

Nothing is run: every step program is compiled ahead of time for a mesh of virtual CPU devices, in a process of its own
for each size. Tabulated are, per device:

* bytes of parameters, optimizer state and curvature, and of the latter two how many times an even share of what one
  device alone would have;
* of every program its FLOPs (loop bodies counted once, branches as if they were taken; of factorisations, what are
  matrix products);
* d^3 of the matrices that a refresh factorises, those of padding too;
* bytes of the results of its collectives, by kind, counted likewise, and how many more these are than Adam's.

"strong" keeps the examples of a batch, "weak" those of a device. Models: 16 equal layers of 128 units; and, for the
families with Kronecker factors, the autoencoder 784-1000-500-250-30-250-500-1000-784, no two of whose layers are alike.
The latter, and "weak", are compiled for 1 and 8 devices only.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run from a checkout without installing it

MODELS = {"equal": [128] * 17, "autoencoder": [784, 1000, 500, 250, 30, 250, 500, 1000, 784]}
EXAMPLES = 512  # of a batch; of a device at "weak", an eighth of it
FLAGS = "--xla_backend_optimization_level=0"  # of the code, not of the program: collectives and FLOPs are the same


def cases() -> dict[str, tuple[Any, Any]]:
    """(optimizer, estimator) by name."""
    import optax

    from curvtrain import curvature, optim

    psgd = lambda family: (optim.psgd(1e-3), curvature.PSGD(family))
    return {
        "Adam": (optax.adam(1e-3), None),
        "FOSI, Lanczos(10)": (optim.fosi(optax.adam(1e-3)), curvature.Lanczos(k=10)),
        "K-FAC": (optim.kfac(1e-3, 0.9, 1e-2), curvature.KFAC()),
        "K-FAC, eigh": (optim.kfac(1e-3, 0.9, 1e-2), curvature.KFAC(inverse="eigh")),
        "K-FAC, slots=1": (optim.kfac(1e-3, 0.9, 1e-2), curvature.KFAC(slots=1)),
        "PSGD, Kron in blocks of 64": psgd(curvature.Kron()),
        "PSGD, Kron whole": psgd(curvature.Kron(block_size=None)),
        "PSGD, LowRank(10)": psgd(curvature.LowRank(10)),
    }


def measure(devices: int, model: str, sharding: str, scaling: str, names: list[str]) -> dict[str, Any]:
    """The tables of one mesh, in a process that has so many devices."""
    import numpy as np

    import curvtrain
    from benchmarks.step_time import MLP
    from curvtrain import losses
    from curvtrain.curvature import stacks
    from curvtrain.trainer.run.layout import Task
    from curvtrain.trainer.run.plan import Plan
    from curvtrain.trainer.watch.report import ProgramReport

    factorised = []

    def count(name):
        original = getattr(stacks, name)

        def counted(X, *rest):
            factorised.append(len(X) * X.shape[-1] ** 3)
            return original(X, *rest)

        setattr(stacks, name, counted)

    count("inverse")
    count("eigh")
    sizes = MODELS[model]
    loss = losses.SquaredError()
    task = Task("MLP", lambda rngs: MLP(sizes, rngs), lambda model, batch: model(batch["x"]), loss, loss.metrics)
    batch_size = EXAMPLES // 8 * devices if scaling == "weak" else EXAMPLES
    data = {"x": np.zeros((batch_size, sizes[0]), np.float32), "target": np.zeros((batch_size, sizes[-1]), np.float32)}
    config = curvtrain.TrainerConfig(
        steps=10,
        batch_size=batch_size,
        mesh={"fsdp": -1} if sharding == "fsdp" else {"data": -1},
        sharding=sharding,
    )
    schedule = curvtrain.CurvatureSchedule(update_every=2, refresh_every=4, start=1)
    found = {}
    for name, (optimizer, estimator) in cases().items():
        if name not in names:
            continue
        plan = Plan(config, task, data, optimizer, estimator, schedule)
        state = plan.state_report()
        programs = {}
        for kind in plan.programs.kinds:
            factorised.clear()
            lowered = plan.programs.lower(kind)
            work = sum(factorised) if kind.refresh else 0
            program = ProgramReport.of(str(kind), lowered.compile())
            programs[str(kind)] = {"flops": program.flops, "factorised": work, "sent": program.sent}
        parts = {part: (state[part].whole, state[part].per_device) for part in state if part not in ("step", "key")}
        choices = plan.layout.choices
        found[name] = row = {"state": parts, "choices": choices, "programs": programs}
        if (settled := plan.layout.estimator) is not None:
            row["overview"] = settled.overview(*plan.layout.measured)
    return found


def show(title: str, results: dict[str, Any]) -> None:
    """Prints a table for every optimizer."""
    from curvtrain._text import human_bytes, table

    print(f"\n== {title}")
    alone = results.get("1", {})
    for name in next(iter(results.values())):
        rows: list[tuple[str, ...]] = [("devices", "parameters", "optimizer", "curvature", "/ even share", "program", "MFLOP", "d^3", "sent")]
        for devices, found in results.items():
            state, plain = found[name]["state"], found["Adam"]["programs"]["train"]["sent"] if "Adam" in found else {}
            each = [state.get(part, (0, 0)) for part in ("params", "opt_state", "curvature")]
            mine = sum(part[1] for part in each[1:])
            whole = (
                sum(alone[name]["state"].get(part, (0, 0))[0] for part in ("opt_state", "curvature")) if alone else 0
            )
            share = f"{mine * int(devices) / whole:.3f}" if whole else ""
            for i, (kind, program) in enumerate(found[name]["programs"].items()):
                sent = ", ".join(f"{k} {human_bytes(n)}" for k, n in program["sent"].items()) or "none"
                more = sum(program["sent"].values()) - sum(plain.values())
                beyond = f" (Adam's and {human_bytes(max(more, 0))})" if kind == "train" and name != "Adam" else ""
                first = (devices, *(human_bytes(part[1]) for part in each), share) if i == 0 else ("",) * 5
                work = f"{program['factorised'] / 1e6:,.1f} M" if program["factorised"] else ""
                rows.append((*first, kind, f"{program['flops'] / 1e6:,.1f}", work, sent + beyond))
        print(f"\n{name}\n{table(rows)}")


def draw(output: Path, results: dict[str, Any]) -> None:
    """Bytes of optimizer and curvature on a device, and d^3 of a refresh, as shares of what one device alone has."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    title, by_devices = max(results.items(), key=lambda item: len(item[1]))
    devices, tables = [int(n) for n in by_devices], list(by_devices.values())
    bytes_of = lambda found: sum(found["state"].get(part, (0, 0))[1] for part in ("opt_state", "curvature"))
    work_of = lambda found: max(program["factorised"] for program in found["programs"].values())
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    panels = ((bytes_of, "bytes of optimizer and curvature"), (work_of, "factorised, d³"))
    for axis, (number, label) in zip(axes, panels, strict=True):
        for i, name in enumerate(tables[0]):
            values = [number(found[name]) for found in tables]
            if any(values):
                shares = [value / values[0] for value in values]
                axis.plot(devices, shares, "os^vD*PX"[i % 8] + "-", color=f"C{i}", label=name, alpha=0.8)
        axis.plot(devices, [devices[0] / n for n in devices], "k:", label="even share")
        axis.set(xscale="log", yscale="log", xlabel="devices", title=f"{label}: {title}")
        axis.set_xticks(devices, [str(n) for n in devices])
        axis.minorticks_off()
        axis.legend(fontsize=8)
    axes[0].set_ylabel("on one device, of what one alone has")
    figure.tight_layout()
    figure.savefig(output, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8, 64])
    parser.add_argument("--sharding", choices=["fsdp", "replicated"], default="fsdp")
    parser.add_argument("--scaling", choices=["weak", "strong"], nargs="+", default=["strong", "weak"])
    parser.add_argument("--models", choices=list(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--only", nargs="+", choices=list(cases()), default=list(cases()))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "scaling.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(measure(**json.loads(args.child))))
        return
    results: dict[str, Any] = {}
    for model in args.models:
        kronecker = [name for name in args.only if model == "equal" or "K" in name or name == "Adam"]
        for scaling in args.scaling if model == "equal" else args.scaling[:1]:
            title = f"{model}, {args.sharding}, {scaling}"
            few = scaling == "weak" or model != "equal"
            for devices in [n for n in args.devices if n in (1, 8)] if few else args.devices:
                child = dict(devices=devices, model=model, sharding=args.sharding, scaling=scaling, names=kronecker)
                flags = f"{FLAGS} --xla_force_host_platform_device_count={devices}"
                done = subprocess.run(
                    [sys.executable, __file__, "--child", json.dumps(child)],
                    env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    sys.exit(done.stderr)
                results.setdefault(title, {})[str(devices)] = json.loads(done.stdout.splitlines()[-1])
                print(f"{title}: compiled for {devices} devices", file=sys.stderr)
            show(title, results[title])
    from benchmarks.machine import write

    write(args.output, results, examples=EXAMPLES)
    draw(args.output.with_suffix(".png"), results)
    print(f"picture: {args.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
