"""Two processes of two devices each: killed, terminated and refused, as one would be, and what only several can meet.

They are started by the launcher on `run_small.py`, the parameters of a layer split over the devices.
"""

import json
import os
import re
import signal
import socket
import subprocess

import grain
import numpy as np
import pytest
import run_small
from lives import ALONE, KILLED, LAUNCHER, Life, assert_same_run, environment, finish, logged, saved, unfinished

from curvtrain.trainer import read_jsonl
from curvtrain.trainer.data import ArrayData
from curvtrain.trainer.disk.workdir import claimed

STEPS = 16
MESH = {"mesh": {"data": 2, "fsdp": 2}, "sharding": [["fc1/kernel", [None, "fsdp"]]]}
DATA = """
import json, os, sys
from pathlib import Path
import grain, jax, numpy as np, optax
import curvtrain, run_small

workdir, steps, mesh = json.loads(sys.argv[1])
if "JAX_PROCESS_ID" in os.environ:  # a script may do it itself, and has to before the dataset below
    count, index = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
    jax.distributed.initialize(num_processes=count, process_id=index)
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
DIFFERENT = """
import sys
import optax
import jax, run_small
from curvtrain.trainer import distributed

distributed.start()
changes = {
    "seed": dict(seed=1),
    "batch_size": dict(batch_size=32),
    "data": dict(train_data=run_small.data(seed=5)),
    "optimizer": dict(optimizer=run_small.optim.fosi(optax.adam(2e-2))),
    "schedule": dict(schedule=run_small.curvtrain.CurvatureSchedule(refresh_every=4, start=2, batch_size=32)),
    "class": dict(cls=type("Other", (run_small.Small,), {"width": 24})),
}
for name, change in changes.items():
    trainer = run_small.make(workdir=sys.argv[1], **(change if jax.process_index() == 1 else {}))
    try:
        trainer.fit()
    except ValueError as error:
        print(name, "|", " ".join(str(error).split()), flush=True)
"""
pytestmark = pytest.mark.slow


def start(folder, cache, **options):
    return Life(folder, cache, LAUNCHER, steps=STEPS, **MESH, **options)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("uninterrupted")
    job = finish(folder, cache, STEPS, start=LAUNCHER, **MESH)
    first, second = (json.loads(line) for line in re.findall(r"^(?:\[1\] )?end (.*)$", job.text, re.MULTILINE))
    del first["steps_per_second"], second["steps_per_second"]
    assert first == second and "eval/loss" in first
    return folder


def test_two_processes_train_and_evaluate_like_one(tmp_path, cache, uninterrupted):
    finish(tmp_path, cache, STEPS, start=ALONE, devices=4, **MESH)
    ours, theirs = logged(tmp_path), logged(uninterrupted)
    assert list(ours) == list(theirs)
    # measured: equal to the last digit or two; reductions may be ordered differently
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-4)
    with np.load(tmp_path / "end.npz") as ours, np.load(uninterrupted / "end.npz") as theirs:
        np.testing.assert_allclose(ours["curvature/values"], theirs["curvature/values"], rtol=1e-4)
        assert ours["positions"] == theirs["positions"]


def test_one_killed_and_one_terminated(tmp_path, cache, uninterrupted):
    """SIGKILL of one, in a save, ends both; SIGTERM to one saves one step on both; the run ends as if undisturbed."""
    job = start(tmp_path, cache, sleep=0.05, trouble={"0": {"stuck": 9}})
    job.read_to(9)
    assert job.await_save(9)
    killed = job.pid(0)
    os.kill(killed, signal.SIGKILL)
    assert job.wait() == KILLED
    assert f"process 0 of 2 (pid {killed}) was ended by SIGKILL; ending the other one" in job.text
    assert saved(job.workdir)[-1] == 6 and unfinished(job.workdir, 9)

    job = start(tmp_path, cache, sleep=0.3)
    job.read_to(10)
    os.kill(job.pid(1), signal.SIGTERM)
    assert job.wait() == 0, job.text
    stopped, other = job.last_steps()
    assert stopped == other == saved(job.workdir)[-1] < STEPS
    assert not unfinished(job.workdir)

    finish(tmp_path, cache, STEPS, start=LAUNCHER, **MESH)
    assert_same_run(tmp_path, uninterrupted)


def test_a_disk_that_is_full_for_one_of_them(tmp_path, cache, uninterrupted):
    """All drop that save and go on; if it is the last one, all fail. What they saved otherwise is whole."""
    trouble = {"1": {"full": [[7, 10, 300]]}, "0": {"full": [[STEPS, STEPS, 3000]]}}
    job = start(tmp_path, cache, trouble=trouble)
    assert job.wait() == 1
    said = [line for line in job.lines if "Saving step" in line and "Training goes on" in line]
    assert len(said) == 2 and not any(line.startswith("[1]") for line in said), job.text
    assert "Saving step 9 failed" in said[0] and "(process 1 of 2)" in said[0] and "run: [3, 6]" in said[0]
    assert "Saving step 16 failed" in said[1] and "(process 0 of 2)" in said[1]
    assert job.text.count("CheckpointError: The last checkpoint was not written. Saving step 16 failed") == 2
    assert saved(job.workdir)[-2:] == [12, 15] and 9 not in saved(job.workdir)
    assert not unfinished(job.workdir)
    finish(tmp_path, cache, STEPS, start=LAUNCHER, **MESH)
    assert_same_run(tmp_path, uninterrupted)


def test_a_job_whose_workdir_is_taken(tmp_path, cache):
    """Process 0 alone holds the lock, and all are refused."""
    with claimed(tmp_path / "run"):
        job = start(tmp_path, cache)
        assert job.wait() == 1
    assert job.text.count(f"in use by another job: process {os.getpid()} on {socket.gethostname()}, since") == 2
    assert not (job.workdir / "metrics.jsonl").exists()


def test_different_runs_are_refused_by_all(tmp_path, cache):
    """Before anything is written; of nothing it is said that only one of the two hears it."""
    done = launched(tmp_path, cache, DIFFERENT, str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    heard = {line.split(" | ")[0]: line for line in done.stdout.splitlines() if " | " in line}
    assert [f"[1] {line}" for line in heard.values()] == [line for line in done.stderr.splitlines() if " | " in line]
    said = {
        "seed": "TrainerConfig(seed): 0 on process 0, 1 on process 1",
        "batch_size": "TrainerConfig(batch_size): 16 on process 0, 32 on process 1",
        "data": "train_data.checksum: ",
        "optimizer": "model, loss, optimizer or estimator (checksum of train): ",
        "schedule": "CurvatureSchedule (checksum of its steps): ",
        "class": "trainer: Small on process 0, Other on process 1",
    }
    assert list(heard) == list(said)
    assert [name for name in said if said[name] not in heard[name]] == []
    assert not (tmp_path / "run").exists()


def test_data_goes_on_where_it_stopped_on_another_number_of_processes(tmp_path, cache):
    """On two, on two that hold the same rows, on one: batches are made of the examples that one process would take."""
    script = tmp_path / "script.py"
    script.write_text(DATA)
    for start, steps, mesh in (
        (LAUNCHER, 4, {"data": -1}),
        (LAUNCHER, 8, {"tensor": 4}),
        (ALONE, 14, {"data": 4}),
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


def launched(folder, cache, text, *arguments):
    script = folder / "script.py"
    script.write_text(text)
    command = [*LAUNCHER, str(script), *arguments]
    return subprocess.run(command, env=environment(cache), capture_output=True, text=True, timeout=90)


def test_an_error_of_one_process_ends_all_at_once(tmp_path, cache):
    """JAX's own end of process 1 would wait for process 0, which waits for it in a collective."""
    done = launched(
        tmp_path,
        cache,
        "import sys, jax; from jax.experimental import multihost_utils; from curvtrain.trainer import distributed\n"
        "distributed.start()\n"
        "multihost_utils.sync_global_devices('once')\n"
        "if jax.process_index() == 1: raise ValueError('of one only')\n"
        "multihost_utils.sync_global_devices('never')\n",
    )
    assert done.returncode == 1 and "[1] ValueError: of one only" in done.stderr
    assert re.search(r"curvtrain\.launch: process 1 of 2 \(pid \d+\) failed with status 1", done.stderr)


def test_an_exit_while_training_ends_all_at_once(tmp_path, cache):
    job = start(tmp_path, cache, trouble={"1": {"fail": [5, "raise"]}}, estimator="none")
    assert job.wait() == 4
    assert "failed with status 4; ending the other one" in job.text
    assert saved(job.workdir) == [3] and max(job.last_steps()) <= 6


def test_a_good_end_waits_for_the_others(tmp_path, cache):
    """And an exit that was caught is none."""
    done = launched(
        tmp_path,
        cache,
        "import sys, time, jax; from curvtrain.trainer import distributed\n"
        "distributed.start()\n"
        "if jax.process_index() == 0: time.sleep(2); print('done'); sys.exit(0)\n"
        "try: sys.exit(5)\n"
        "except SystemExit: print('caught')\n",
    )
    assert (done.returncode, done.stdout) == (0, "done\n") and "[1] caught" in done.stderr
