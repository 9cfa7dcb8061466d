"""Runs that are killed again and again, at random moments, end bit-identical to runs that are left alone.

    python benchmarks/kills.py --kills 100 --runs kfac --output benchmarks/results/kills_kfac.json

FOSI, K-FAC and PSGD, each with dropout, BatchNorm, an average of the weights and a grain pipeline: the run of
`tests/trainer/run_small.py`, in processes of its own. A third of the kills (SIGKILL) fall into a start, a third into a
save, a third anywhere. Whatever is killed, the next process goes on; the last one is left to end. Then every leaf of
the state, the positions of the data, what hooks remember and every logged number are those of a run without a kill.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "trainer")]  # run from a checkout without installing it

from benchmarks.machine import write
from lives import Life, assert_same_run, finish, saved, unfinished

RUNS = {"fosi": "lanczos", "kfac": "kfac", "psgd": "psgd"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of each run")
    parser.add_argument("--steps", type=int, default=400, help="of each run; it must not end before its kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.runs:
            results[name] = killed(Path(folder) / name, name, options)
            print(f"{name}: {results[name]}", flush=True)
    if options.output is not None:
        write(options.output, results)


def killed(folder: Path, name: str, options: argparse.Namespace) -> dict[str, float]:
    """Kills a run and compares its end with that of one that is left alone. Raises AssertionError if they differ."""
    arguments = dict(estimator=RUNS[name], train_data="grain", save_every=3, keep_best=0)
    cache, whole, parts = folder / "cache", folder / "whole", folder / "parts"
    began = time.monotonic()
    finish(whole, cache, options.steps, **arguments)
    chance, moments = random.Random(f"{options.seed} {name}"), {"start": 0, "save": 0, "anywhere": 0}
    in_save = lost = 0
    start = 8.0  # seconds, as long as the last start took
    for _ in range(options.kills):
        moment = chance.choice(list(moments))
        life, started = Life(parts, cache, steps=options.steps, sleep=0.02, **arguments), time.monotonic()
        if moment == "start":  # imports, restores, the first save
            time.sleep(chance.uniform(0.1, 1.0) * start)
        else:
            assert life.read(1), f"the run ended before its kills, choose more steps:\n{life.text}"
            start = time.monotonic() - started
            assert life.read(chance.randint(0, 3)), f"the run ended before its kills, choose more steps:\n{life.text}"
            if moment == "save":
                life.await_save("[0-9]*")
            time.sleep(chance.uniform(0.0, 0.05))
        assert life.end(signal.SIGKILL) == -signal.SIGKILL, life.text
        moments[moment] += 1
        in_save += bool((parts / "run").exists() and unfinished(parts / "run", "[0-9]*"))
        lost += bool(life.step and life.step not in saved(parts / "run"))
    finish(parts, cache, options.steps, **arguments)
    assert_same_run(parts, whole)
    return {"kills": options.kills, **moments, "left a save unfinished": in_save, "lost steps": lost} | {
        "steps": options.steps,
        "bit-identical": True,
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


if __name__ == "__main__":
    main()
