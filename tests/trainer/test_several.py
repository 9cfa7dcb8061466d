"""Two processes of two devices each: killed, terminated and refused, as one would be.

They are started by the launcher on `run_small.py`, the parameters of a layer split over the devices.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import grain
import numpy as np
import pytest
import run_small

from curvtrain.trainer import read_jsonl
from curvtrain.trainer.data import ArrayData
from curvtrain.trainer.workdir import claimed

SCRIPT = Path(__file__).with_name("run_small.py")
STEPS = 16
DATA = """
import json, sys
from pathlib import Path
import grain, jax, numpy as np, optax
import curvtrain, run_small

workdir, steps, mesh = json.loads(sys.argv[1])
curvtrain.trainer.distributed.start()  # the dataset below asks which process this is
rows, (process, processes) = run_small.data(), (jax.process_index(), jax.process_count())
source = [{name: a[i] for name, a in rows.items()} for i in range(len(rows["x"]))]
shuffled = grain.MapDataset.source(source).seed(3).shuffle()
shards = 1 if "tensor" in mesh else processes  # along which all processes hold the same rows
piece = shuffled[process % shards :: shards].repeat(reseed_each_epoch=False)
kinds = {"arrays": rows, "grain": piece.batch(16 // shards, drop_remainder=True)}
for kind, data in kinds.items():
    trainer = run_small.make(train_data=data, optimizer=optax.sgd(0.1), estimator=None, workdir=Path(workdir) / kind,
                             steps=steps, mesh=mesh, eval_every=None, ema=None)
    trainer.fit()
"""
pytestmark = pytest.mark.slow


def environment(cache):
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",  # where there is no launcher
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in half the time
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


LAUNCHER = [sys.executable, "-m", "curvtrain.launch", "--processes", "2", "--devices", "2"]


class Job:
    """One start of the run, from the launcher's start to its end."""

    def __init__(self, folder, cache, **options):
        self.run, self.lines = folder / "run", []
        options = {
            "workdir": str(self.run),
            "steps": STEPS,
            "save_every": 3,
            "mesh": {"data": 2, "fsdp": 2},
            "sharding": [["fc1/kernel", [None, "fsdp"]]],
            **options,
        }
        self.process = subprocess.Popen(
            [*LAUNCHER, str(SCRIPT), json.dumps(options)],
            env=environment(cache),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._timer = threading.Timer(240, self.process.kill)
        self._timer.start()

    def read_to(self, step):
        """Reads until process 0 has done a step."""
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line == f"step {step}\n":
                return
        raise AssertionError("\n".join(self.lines))

    def pid(self, index):
        """Of one of the processes, by its environment."""
        for folder in Path("/proc").iterdir():
            try:
                told = (folder / "environ").read_bytes().split(b"\0")
                parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            except (OSError, IndexError):
                continue
            if parent == str(self.process.pid) and f"JAX_PROCESS_ID={index}".encode() in told:
                return int(folder.name)
        raise AssertionError("\n".join(self.lines))

    def wait(self):
        """Reads to the end: the exit status."""
        self.lines += [line.rstrip() for line in self.process.stdout]
        self.process.stdout.close()
        self._timer.cancel()
        return self.process.wait(timeout=60)

    @property
    def text(self):
        return "\n".join(self.lines)

    def last_steps(self):
        """The last steps that processes 0 and 1 did."""
        steps = re.findall(r"^(\[1\] )?step (\d+)$", self.text, re.MULTILINE)
        return [max(int(step) for prefix, step in steps if bool(prefix) == other) for other in (False, True)]


def saved(job):
    return sorted(int(path.name) for path in job.run.iterdir() if path.name.isdigit())


def finish(folder, cache, **options):
    job = Job(folder, cache, out=str(folder / "end.npz"), **options)
    assert job.wait() == 0, job.text


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
    rows = [read_jsonl(path / "run" / "metrics.jsonl") for path in (folder, reference)]
    ours, theirs = ([{k: v for k, v in row.items() if k != "steps_per_second"} for row in run] for run in rows)
    assert ours == theirs and [row["step"] for row in theirs if "train/loss" in row] == list(range(1, STEPS + 1))


def test_one_killed_and_one_terminated(tmp_path, cache, uninterrupted):
    """SIGKILL of one ends both, SIGTERM to one saves one step on both, and the run ends as if undisturbed."""
    job = Job(tmp_path, cache, sleep=0.05)
    job.read_to(8)  # by which the save of step 3 is complete
    killed = job.pid(0)
    os.kill(killed, signal.SIGKILL)
    assert job.wait() == 128 + signal.SIGKILL
    assert f"process 0 of 2 (pid {killed}) was ended by SIGKILL; ending the other one" in job.text
    assert 3 in saved(job) and max(saved(job)) < job.last_steps()[0]

    job = Job(tmp_path, cache, sleep=0.3)
    job.read_to(10)
    os.kill(job.pid(1), signal.SIGTERM)
    assert job.wait() == 0, job.text
    stopped, other = job.last_steps()
    assert stopped == other == saved(job)[-1] < STEPS
    assert not list(job.run.glob("*.orbax-checkpoint-tmp*"))

    finish(tmp_path, cache)
    assert_same_run(tmp_path, uninterrupted)


def test_a_job_whose_workdir_is_taken(tmp_path, cache):
    """Process 0 alone holds the lock, and all are refused."""
    with claimed(tmp_path / "run"):
        job = Job(tmp_path, cache)
        assert job.wait() == 1
    assert job.text.count(f"in use by another job: process {os.getpid()} on {socket.gethostname()}, since") == 2
    assert not (job.run / "metrics.jsonl").exists()


def test_data_goes_on_where_it_stopped_on_another_number_of_processes(tmp_path, cache):
    """On two, on two that hold the same rows, on one: batches are made of the examples that one process would take."""
    script = tmp_path / "script.py"
    script.write_text(DATA)
    for start, steps, mesh in (
        (LAUNCHER, 4, {"data": -1}),
        (LAUNCHER, 8, {"tensor": 4}),
        ([sys.executable], 14, {"data": 4}),
    ):
        command = [*start, str(script), json.dumps([str(tmp_path), steps, mesh])]
        done = subprocess.run(command, env=environment(cache), capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
    rows = run_small.data()
    arrays = ArrayData(rows, 16, seed=0).iterator()
    grains = grain.MapDataset.source(rows["number"]).seed(3).shuffle().repeat(reseed_each_epoch=False).batch(16)
    orders = {
        "arrays": [next(arrays)["number"].mean() for _ in range(14)],
        "grain": [grains[i].mean() for i in range(14)],
    }
    for kind, order in orders.items():
        logged = {
            row["step"]: row["train/order"]
            for row in read_jsonl(tmp_path / kind / "metrics.jsonl")
            if "train/order" in row
        }
        assert list(logged) == list(range(1, 15))
        np.testing.assert_allclose(list(logged.values()), order, rtol=1e-5)


def test_an_error_of_one_process_ends_all_at_once(tmp_path, cache):
    """JAX's own end of process 1 would wait for process 0, which waits for it in a collective."""
    script = tmp_path / "script.py"
    script.write_text(
        "import jax; from jax.experimental import multihost_utils; from curvtrain.trainer import distributed\n"
        "distributed.start()\n"
        "if jax.process_index() == 1: raise ValueError('of one only')\n"
        "multihost_utils.sync_global_devices('never')\n"
    )
    done = subprocess.run([*LAUNCHER, str(script)], env=environment(cache), capture_output=True, text=True, timeout=90)
    assert done.returncode == 1 and "[1] ValueError: of one only" in done.stderr
    assert re.search(r"curvtrain\.launch: process 1 of 2 \(pid \d+\) failed with status 1", done.stderr)
