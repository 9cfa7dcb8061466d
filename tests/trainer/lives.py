"""Runs of `run_small.py` in processes of their own, to be killed and started again, and how they are compared."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from curvtrain.trainer import read_jsonl

SCRIPT = Path(__file__).with_name("run_small.py")
ALONE = (sys.executable,)
LAUNCHER = (sys.executable, "-m", "curvtrain.launch", "--processes", "2", "--devices", "2")


def environment(cache, devices=4):
    """The environment of processes that start and compile fast; `devices` where there is no launcher."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}" if devices > 1 else "",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in half the time
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


class Life:
    """One start of the run in `folder / "run"`, by `start`, from its start to its end."""

    def __init__(self, folder, cache, start=ALONE, devices=1, **options):
        self.workdir, self.step, self.lines = folder / "run", 0, []
        self.process = subprocess.Popen(
            [*start, str(SCRIPT), json.dumps({"workdir": str(self.workdir), "save_every": 3, **options})],
            env=environment(cache, devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._timer = threading.Timer(240, self.process.kill)
        self._timer.start()

    @property
    def text(self):
        return "\n".join(self.lines)

    def read(self, steps=None):
        """Reads on for a number of steps (of process 0), or to the end; returns whether the run goes on."""
        left = steps
        while left is None or left > 0:
            line = self.process.stdout.readline()
            if not line:
                return False
            self.lines.append(line.rstrip())
            if line.startswith("step "):
                self.step, left = int(line.split()[1]), None if left is None else left - 1
        return True

    def await_save(self, step="*"):
        """Waits until a checkpoint is being written; whether one was."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self.process.poll() is None:
            if unfinished(self.workdir, step):
                return True
        return False

    def read_to(self, step):
        while self.step < step:
            assert self.read(1), self.text

    def pid(self, index):
        """The process number of one of the launcher's processes, found by its environment."""
        for folder in Path("/proc").iterdir():
            try:
                told = (folder / "environ").read_bytes().split(b"\0")
                parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            except (OSError, IndexError):
                continue
            if parent == str(self.process.pid) and f"JAX_PROCESS_ID={index}".encode() in told:
                return int(folder.name)
        raise AssertionError(self.text)

    def end(self, number):
        """Sends a signal and waits for the end: the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self):
        """Reads to the end: the exit status."""
        self.read()
        self.process.stdout.close()
        self._timer.cancel()
        return self.process.wait(timeout=60)

    def last_steps(self):
        """The last steps that processes 0 and 1 did."""
        steps = re.findall(r"^(\[1\] )?step (\d+)$", self.text, re.MULTILINE)
        return [max(int(step) for prefix, step in steps if bool(prefix) == other) for other in (False, True)]


def finish(folder, cache, steps, **options):
    """Runs to the end, and writes the state there."""
    life = Life(folder, cache, steps=steps, out=str(folder / "end.npz"), **options)
    assert life.wait() == 0 and life.step == steps, life.text
    return life


def unfinished(workdir, step="*"):
    return list(workdir.glob(f"{step}.orbax-checkpoint-tmp*"))


def saved(workdir):
    return sorted(int(path.name) for path in workdir.iterdir() if path.name.isdigit())


def assert_same_run(folder, reference):
    """Every leaf of the state, the positions of the data, what hooks remember, and every logged number but the rate."""
    with np.load(folder / "end.npz") as ours, np.load(reference / "end.npz") as theirs:
        assert sorted(ours) == sorted(theirs)
        assert [name for name in theirs if ours[name].tobytes() != theirs[name].tobytes()] == []
        steps = int(theirs["step"])
    ours, theirs = logged(folder), logged(reference)
    assert ours == theirs and {step for step, _ in theirs} == set(range(1, steps + 1))


def logged(folder):
    """{(step, name): value} without the rate; asserts that nothing was logged twice."""
    rows = read_jsonl(folder / "run" / "metrics.jsonl")
    entries = [((row["step"], name), value) for row in rows for name, value in row.items()]
    entries = [(key, value) for key, value in entries if key[1] not in ("step", "steps_per_second")]
    assert len(dict(entries)) == len(entries) and [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    return dict(entries)


KILLED = 128 + signal.SIGKILL  # the launcher's status
