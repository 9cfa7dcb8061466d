"""Training that is killed again and again ends bit-identical to training that is left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from curvtrain.trainer import read_jsonl

SCRIPT = Path(__file__).with_name("run_small.py")
STEPS = 80
pytestmark = pytest.mark.slow


class Life:
    """One process of the run, from its start to its end."""

    def __init__(self, folder, cache, **options):
        self.workdir, self.step = folder, 0
        environment = {
            **os.environ,
            "XLA_FLAGS": "",  # one device: starts faster
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in half the time
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        options = {"workdir": str(folder), "steps": STEPS, "save_every": 3, "sleep": 0.02, **options}
        command = [sys.executable, str(SCRIPT), json.dumps(options)]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    def read(self, steps=None):
        """Reads on for a number of steps, or to the end; returns whether the run goes on."""
        left = steps
        while left is None or left > 0:
            line = self.process.stdout.readline()
            if not line:
                return False
            if line.startswith("step "):
                self.step, left = int(line.split()[1]), None if left is None else left - 1
        return True

    def await_save(self):
        """Waits until a checkpoint is being written; whether one was."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self.process.poll() is None:
            if unfinished(self.workdir):
                return True
        return False

    def end(self, number):
        """Sends a signal and waits for the end: the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self):
        """Reads to the end: the exit status."""
        self.read()
        self.process.stdout.close()
        return self.process.wait(timeout=60)


def unfinished(workdir):
    return list(workdir.glob("*.orbax-checkpoint-tmp*"))


def saved(workdir):
    return sorted(int(path.name) for path in workdir.iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(folder, cache)
    return folder


def assert_same_run(folder, reference):
    """Every leaf of the state, the positions of the data, what hooks remember, and every logged number but the rate."""
    with np.load(folder / "end.npz") as ours, np.load(reference / "end.npz") as theirs:
        assert sorted(ours) == sorted(theirs)
        assert [name for name in theirs if ours[name].tobytes() != theirs[name].tobytes()] == []
    assert logged(folder) == logged(reference)


def logged(folder):
    """{(step, name): value}; asserts that nothing was logged twice."""
    rows = read_jsonl(folder / "run" / "metrics.jsonl")
    entries = [((row["step"], name), value) for row in rows for name, value in row.items()]
    entries = [(key, value) for key, value in entries if key[1] not in ("step", "steps_per_second")]
    assert len(dict(entries)) == len(entries)
    assert {step for step, _ in dict(entries)} == set(range(1, STEPS + 1))
    return dict(entries)


def finish(folder, cache, **options):
    life = Life(folder / "run", cache, out=str(folder / "end.npz"), sleep=0, **options)
    assert life.wait() == 0 and life.step == STEPS


def test_killed_ten_times(tmp_path, cache, uninterrupted):
    chance = random.Random(0)
    in_save = lost = 0
    for kill in range(10):
        life = Life(tmp_path / "run", cache)
        if kill in (3, 6):  # while it starts: imports, restores
            time.sleep(chance.uniform(0.5, 4.0))
        elif kill % 2:  # while it saves
            assert life.read(chance.randint(1, 3)) and life.await_save()
        else:  # anywhere between and within steps
            assert life.read(chance.randint(1, 8))
            time.sleep(chance.uniform(0.0, 0.05))
        assert life.end(signal.SIGKILL) == -signal.SIGKILL
        in_save += bool(unfinished(tmp_path / "run"))
        lost += life.step not in (0, *saved(tmp_path / "run"))
    assert in_save >= 1, "no kill fell into a save"
    assert lost >= 1, "no kill lost a step, so nothing was tested"
    finish(tmp_path, cache)
    assert not unfinished(tmp_path / "run")
    assert_same_run(tmp_path, uninterrupted)


def end_of_three_kills(tmp_path, cache, estimator):
    """The file at the end of an uninterrupted run, to which one with three kills, one in a save, is bit-identical."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(whole, cache, estimator=estimator)
    for kill, steps in enumerate((8, 2, 7)):
        life = Life(parts / "run", cache, estimator=estimator)
        assert life.read(steps) and (kill != 1 or life.await_save())
        assert life.end(signal.SIGKILL) == -signal.SIGKILL
    assert len(saved(parts / "run")) >= 1
    finish(parts, cache, estimator=estimator)
    assert_same_run(parts, whole)
    return whole / "end.npz"


def test_killed_with_psgd(tmp_path, cache):
    """Factors, their bounds and counters, and two moving averages."""
    with np.load(end_of_three_kills(tmp_path, cache, "psgd")) as end:
        assert end["curvature/fits"] == 27 and end["curvature/calls"] == STEPS and end["curvature/failures"] == 0
        moved = [name for name in end if name.startswith("curvature/state") and "/Q/" in name]
        assert moved and all(np.std(end[name]) > 0 for name in moved)


def test_killed_with_kfac(tmp_path, cache):
    """Kronecker factors, cached inverses, damping and velocity."""
    with np.load(end_of_three_kills(tmp_path, cache, "kfac")) as end:
        assert end["curvature/refreshes"] >= STEPS // 3 and end["opt_state/rejected"] < STEPS // 4
        assert np.all(np.isfinite(end["opt_state/damping"])) and np.any(end["opt_state/velocity/fc1/kernel"] != 0)


def test_terminated_five_times(tmp_path, cache, uninterrupted):
    chance = random.Random(1)
    for _ in range(5):
        life = Life(tmp_path / "run", cache)
        assert life.read(chance.randint(1, 8))
        time.sleep(chance.uniform(0.0, 0.05))
        life.process.send_signal(signal.SIGTERM)
        time.sleep(chance.uniform(0.0, 0.05))
        assert life.end(signal.SIGTERM) == 0  # a second one does not cut short the save
        assert saved(tmp_path / "run")[-1] == life.step
        assert not unfinished(tmp_path / "run")
    finish(tmp_path, cache)
    assert_same_run(tmp_path, uninterrupted)
