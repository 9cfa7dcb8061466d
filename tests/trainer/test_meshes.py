"""Every estimator's run on one device, eight, and two processes: the same losses; and its checkpoint moves among them.

What the tests of this file need of one another is trained once, whichever of pytest's processes comes first: it is kept
in a folder that they share.
"""

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import run_meshes
from cases import CASES
from jax.sharding import PartitionSpec
from lives import environment
from meshes import on
from run_meshes import ON, SAVED, STEPS, assert_opens, assert_planned, assert_same_bits, history, make, shards
from run_small import leaves

from curvtrain.curvature import Eigenpairs, KroneckerFactors
from curvtrain.curvature.request import requested_damping, requests
from curvtrain.trainer import Call
from curvtrain.trainer.disk.checkpoint import Checkpoints

CLOSE = dict(rtol=2e-5)  # sums in another order, and 50 steps that amplify their rounding: measured, 3e-6 at most
RULES = [("inner/kernel", PartitionSpec(None, "tensor")), ("outer/kernel", PartitionSpec("tensor"))]
MESHES = {  # name -> (devices, options)
    "1": (1, {"mesh": {"data": 1}}),
    "8": (8, {"mesh": {"data": 8}}),
    "2 x 4": (8, {"mesh": {"data": 2, "fsdp": 4}, "sharding": "fsdp"}),
    "2": (2, {"mesh": {"data": 2}}),
    "4": (4, {"mesh": {"fsdp": 4}, "sharding": "fsdp"}),
    "4 x 2": (8, {"mesh": {"data": 4, "fsdp": 2}, "sharding": "fsdp"}),
    "tensor": (8, {"mesh": {"data": 2, "tensor": 4}, "sharding": RULES}),
}
FEW, LONG = 6, ("DiagonalFisher", "KFAC, stale")  # of two processes
pytestmark = pytest.mark.usefixtures("quick_compile")
cases = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "meshes"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def build(monkeypatch):
    """Makes the trainer of a case on one of the meshes."""

    def function(name, mesh, workdir, **config):
        devices, options = MESHES[mesh]
        on(devices, monkeypatch)
        return make(name, workdir=workdir, **options, **config)

    with run_meshes.split_all():
        yield function


@pytest.fixture
def trained(build, shared, tmp_path):
    """The folder of a case that was trained on a mesh: what it told, checkpoints and, at their steps, the leaves."""

    def function(name, mesh):
        folder, new = shared / f"{name} on {mesh}", tmp_path / f"trained on {mesh}"
        if not folder.exists():
            keep = Call(lambda run: np.savez(new / str(run.step), **leaves(run.state)), every=SAVED)
            trainer = build(name, mesh, new / "run", save_every=SAVED, hooks=[keep])
            np.save(new / "told", history(trainer.fit()))
            with contextlib.suppress(OSError):  # another one was faster
                new.rename(folder)
        return folder

    return function


def move(source, workdir):
    """The checkpoint of half of a run."""
    shutil.copytree(source / "run" / str(SAVED), workdir / str(SAVED))
    return workdir


def assert_goes_on(told, whole):
    """The same batches, and losses that are close."""
    np.testing.assert_array_equal(told[:, 0], SAVED + 1 + np.arange(len(told)))
    np.testing.assert_allclose(told, whole[SAVED : SAVED + len(told)], **CLOSE)


@cases
def test_the_same_losses(name, trained):
    one, eight, split = (np.load(trained(name, mesh) / "told.npy") for mesh in ("1", "8", "2 x 4"))
    np.testing.assert_array_equal(one[:, 0], 1 + np.arange(STEPS))
    assert one[-5:, 1].mean() < 0.7 * one[:5, 1].mean()
    np.testing.assert_allclose(eight, one, **CLOSE)
    np.testing.assert_allclose(split, one, **CLOSE)


@cases
def test_a_checkpoint_moves(name, trained, build, tmp_path):
    """To other meshes, bit by bit; on one device training goes on as it would have, and on the same mesh to the bit."""
    source = trained(name, "2 x 4")
    saved, whole = dict(np.load(source / f"{SAVED}.npz")), np.load(source / "told.npy")
    columns = {"4": 2, "4 x 2": 4, "tensor": 2}  # of eight, that a device has
    for mesh in ("1", "2", "4", "4 x 2", "tensor"):
        trainer = build(name, mesh, move(source, tmp_path / mesh), steps=SAVED + ON)
        state = assert_opens(trainer, saved)
        for tree in (state.params, state.ema):
            assert tree["inner"]["kernel"].addressable_shards[0].data.shape[1] == columns.get(mesh, 8)
        if isinstance(state.curvature, KroneckerFactors) and state.curvature.slots == 8:
            for X in state.curvature.factors.values():
                assert X.addressable_shards[0].data.shape[0] == len(X) // MESHES[mesh][0]
        if mesh == "1":
            assert_goes_on(history(trainer.fit()), whole)

    again = build(name, "2 x 4", move(source, tmp_path / "2 x 4"))
    result, state = again.fit(), again.state
    np.testing.assert_array_equal(history(result), whole[SAVED:])
    assert_same_bits(shards(state), dict(np.load(source / f"{STEPS}.npz")))
    assert_planned(again, state)
    told = {n for row in result.history for n in row if n.startswith("curvature/")}
    assert told == {f"curvature/{n}" for n in state.curvature.telemetry()}
    if isinstance(state.curvature, KroneckerFactors):
        assert requested_damping(requests(state.opt_state)) is not None and np.isfinite(state.curvature.damping)
    if isinstance(state.curvature, Eigenpairs):
        assert np.any(state.curvature.converged)


def test_two_processes(trained, build, shared, tmp_path):
    """Two processes of four devices have the same losses, and checkpoints move there and back.

    Collectives of eight threads on two cores are slow: all 50 steps are those of some cases, in others a few tell.
    """
    steps = {name: STEPS if name in LONG else FEW for name in CASES}
    for name in CASES:
        source = trained(name, "2 x 4")
        move(source, tmp_path / name / "moved")
        shutil.copy(source / f"{SAVED}.npz", tmp_path / name / "saved.npz")
    launcher = [sys.executable, "-m", "curvtrain.launch", "--processes", "2", "--devices", "4"]
    done = subprocess.run(
        [*launcher, run_meshes.__file__, json.dumps([str(tmp_path), steps])],
        env={**environment(shared / "cache"), "XLA_FLAGS": os.environ["XLA_FLAGS"]},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name, count in steps.items():
        whole, told = np.load(trained(name, "2 x 4") / "told.npy"), dict(np.load(tmp_path / name / "told.npz"))
        np.testing.assert_allclose(told["fresh"], whole[:count], **CLOSE)
        if count == STEPS:
            assert_goes_on(told["moved"], whole)
        trainer = build(name, "2 x 4", tmp_path / name / "two")
        with Checkpoints(trainer.config) as checkpoints:
            state, _ = checkpoints.restore(trainer._plan.layout.state, trainer._plan.description())
        for process in (0, 1):
            assert_same_bits(pickle.loads((tmp_path / name / f"{process}.shards").read_bytes()), leaves(state))
