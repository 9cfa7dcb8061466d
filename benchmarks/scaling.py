"""What one device computes, sends and stores as a run is spread over more of them: read from the compiled programs.

    python benchmarks/scaling.py                # 1, 2, 4, 8 virtual devices; writes benchmarks/results/scaling.json
    python benchmarks/scaling.py --devices 8 --sharding replicated

Nothing is run: every step program is compiled ahead of time for a mesh of virtual CPU devices, and its FLOPs, the bytes
of its collectives by kind, and the bytes of the state on each device are tabulated. The model has 16 equal layers.
"weak" keeps the examples per device, "strong" those of the whole batch. A collective inside a loop is counted once, as
it stands in the program; so are the FLOPs of a loop, and library calls (factorisations) have none.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run from a checkout without installing it

LAYERS, WIDTH, EXAMPLES = 16, 128, 256
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
CALL = re.compile(rf"= (\(?[^=]*?\)?) ({'|'.join(KINDS)})(?:-start)?\(")
SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")


def bytes_of(shapes: str) -> int:
    """Of all arrays in a piece of HLO text."""
    total = 0
    for dtype, dims in SHAPE.findall(shapes):
        size = 1
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        total += size * BYTES.get(dtype, 1)
    return total


def collectives(hlo: str) -> dict[str, int]:
    """Bytes of the results of each kind of collective on one device."""
    found = dict.fromkeys(KINDS, 0)
    for shapes, kind in CALL.findall(hlo):
        found[kind] += bytes_of(shapes)
    return {kind: size for kind, size in found.items() if size}


def measure(devices: int, sharding: str, scaling: str) -> dict[str, Any]:
    """The table of one mesh, in a process that has so many devices."""
    import jax
    import optax

    import curvtrain
    from benchmarks.step_time import MLP, data
    from curvtrain import curvature, losses, optim
    from curvtrain.trainer.plan import Plan, Task

    sizes = [WIDTH] * (LAYERS + 1)
    loss = losses.SoftmaxCrossEntropy()
    task = Task("MLP", lambda rngs: MLP(sizes, rngs), lambda model, batch: model(batch["image"]), loss, loss.metrics)
    batch_size = EXAMPLES * (devices if scaling == "weak" else 1)
    cases: dict[str, tuple[Any, Any]] = {
        "Adam": (optax.adam(1e-3), None),
        "FOSI, Lanczos(10)": (optim.fosi(optax.adam(1e-3)), curvature.Lanczos(k=10)),
        "K-FAC": (optim.kfac(1e-3, 0.9, 1e-2), curvature.KFAC()),
        "PSGD, Kron in blocks": (optim.psgd(1e-3), curvature.PSGD(curvature.Kron(block_size=WIDTH // 8))),
        "PSGD, Kron whole": (optim.psgd(1e-3), curvature.PSGD(curvature.Kron(block_size=None))),
        "PSGD, LowRank(10)": (optim.psgd(1e-3), curvature.PSGD(curvature.LowRank(10))),
    }

    def on_one_device(state, layout):
        size = lambda a, s: int(_product(s.shard_shape(a.shape)) * _itemsize(a))
        return sum(jax.tree.leaves(jax.tree.map(size, state, layout)))

    found = {}
    for name, (optimizer, estimator) in cases.items():
        mesh = {"fsdp": -1} if sharding == "fsdp" else {"data": -1}
        config = curvtrain.TrainerConfig(steps=10, batch_size=batch_size, mesh=mesh, sharding=sharding)
        schedule = curvtrain.CurvatureSchedule(update_every=2, refresh_every=4, start=1)
        train = data(batch_size, WIDTH, WIDTH)
        plan = Plan(config, task, train, optimizer, estimator, schedule)
        state, layout = plan.state, plan.layout
        programs = {}
        for kind in plan.kinds:
            compiled = plan.lower(kind).compile()
            programs[str(kind)] = {
                "flops": compiled.cost_analysis()["flops"],
                "collectives": collectives(compiled.as_text()),
            }
        found[name] = {
            "parameters": on_one_device(state.params, layout.params),
            "optimizer": on_one_device(state.opt_state, layout.opt_state),
            "curvature": on_one_device(state.curvature, layout.curvature),
            "programs": programs,
        }
    return found


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for n in shape:
        result *= n
    return result


def _itemsize(a: Any) -> int:
    import jax

    return 8 if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else a.dtype.itemsize


def show(results: dict[str, Any]) -> None:
    """Prints a table for every optimizer."""
    first = next(iter(results))
    for name in results[first]:
        print(f"\n{name}")
        print("  devices   bytes per device: parameters, optimizer, curvature   program: MFLOP, collectives in kB")
        for devices, table in results.items():
            row = table[name]
            print(f"  {devices:>7}   {row['parameters']:>11,} {row['optimizer']:>11,} {row['curvature']:>11,}")
            for kind, program in row["programs"].items():
                sent = ", ".join(f"{k} {v / 1e3:,.0f}" for k, v in program["collectives"].items()) or "none"
                print(f"  {'':>7}     {kind:<24} {program['flops'] / 1e6:>9,.1f}   {sent}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--sharding", choices=["fsdp", "replicated"], default="fsdp")
    parser.add_argument("--scaling", choices=["weak", "strong"], default="strong")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--child", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(measure(args.child, args.sharding, args.scaling)))
        return
    results = {}
    for devices in args.devices:
        flags = f"--xla_force_host_platform_device_count={devices}"
        command = [sys.executable, __file__, "--child", str(devices)]
        command += ["--sharding", args.sharding, "--scaling", args.scaling]
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        results[str(devices)] = json.loads(done.stdout.splitlines()[-1])
        print(f"compiled for {devices} devices", file=sys.stderr)
    show(results)
    from benchmarks.machine import describe

    output = args.output or Path(__file__).parent / "results" / "scaling.json"
    report = {"command": " ".join(["python", *sys.argv]), "machine": describe(), "results": results}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
