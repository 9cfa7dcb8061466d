"""Training that is killed again and again ends bit-identical to training that is left alone."""

import random
import signal
import time

import numpy as np
import pytest
from lives import Life, assert_same_run, finish, saved, unfinished

STEPS = 80
pytestmark = pytest.mark.slow


def start(folder, cache, **options):
    return Life(folder, cache, steps=STEPS, sleep=0.02, **options)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(folder, cache, STEPS)
    return folder


def test_killed_ten_times(tmp_path, cache, uninterrupted):
    chance = random.Random(0)
    in_save = lost = 0
    for kill in range(10):
        life = start(tmp_path, cache)
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
    finish(tmp_path, cache, STEPS)
    assert not unfinished(tmp_path / "run")
    assert_same_run(tmp_path, uninterrupted)


def end_of_three_kills(tmp_path, cache, estimator):
    """The file at the end of an uninterrupted run, to which one with three kills, one in a save, is bit-identical."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(whole, cache, STEPS, estimator=estimator)
    for kill, steps in enumerate((8, 2, 7)):
        life = start(parts, cache, estimator=estimator)
        assert life.read(steps) and (kill != 1 or life.await_save())
        assert life.end(signal.SIGKILL) == -signal.SIGKILL
    assert len(saved(parts / "run")) >= 1
    finish(parts, cache, STEPS, estimator=estimator)
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
        assert np.all(np.isfinite(end["opt_state/request/damping"])) and np.any(
            end["opt_state/velocity/fc1/kernel"] != 0
        )


def test_terminated_five_times(tmp_path, cache, uninterrupted):
    chance = random.Random(1)
    for _ in range(5):
        life = start(tmp_path, cache)
        assert life.read(chance.randint(1, 8))
        time.sleep(chance.uniform(0.0, 0.05))
        life.process.send_signal(signal.SIGTERM)
        time.sleep(chance.uniform(0.0, 0.05))
        assert life.end(signal.SIGTERM) == 0  # a second one does not cut short the save
        assert saved(tmp_path / "run")[-1] == life.step
        assert not unfinished(tmp_path / "run")
    finish(tmp_path, cache, STEPS)
    assert_same_run(tmp_path, uninterrupted)
