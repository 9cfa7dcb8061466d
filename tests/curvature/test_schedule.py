"""When curvature is updated and refreshed, as lists of steps."""

import numpy as np
import pytest

from curvtrain import CurvatureSchedule
from curvtrain.curvature import Curvature, Request


def steps(due, until=12):
    return [step for step in range(until) if due(step)]


def test_periods_count_from_the_start():
    schedule = CurvatureSchedule(update_every=3, refresh_every=5, start=2)
    assert steps(schedule.updates) == [2, 5, 8, 11]
    assert steps(schedule.refreshes) == [2, 7]
    assert steps(CurvatureSchedule().updates) == list(range(12))
    assert steps(CurvatureSchedule().refreshes, 201) == [0, 100, 200]


def test_what_is_left_open_is_as_the_optimizers_ask():
    asking = lambda **periods: Request.of("x", Curvature, {}, **periods)
    settled = CurvatureSchedule().settled([asking(update_every=100), asking(update_every=7, damping_every=5)])
    assert (settled.update_every, settled.refresh_every) == (7, 5)
    settled = CurvatureSchedule().settled([asking(update_every=100), asking()])  # who asks for nothing wants every step
    assert (settled.update_every, settled.refresh_every) == (1, 100)
    settled = CurvatureSchedule(update_every=3, refresh_every=4).settled([asking(update_every=100)])
    assert (settled.update_every, settled.refresh_every) == (3, 4)


@pytest.mark.parametrize("integer", [int, np.int32])
def test_a_period_may_depend_on_the_step(integer):
    schedule = CurvatureSchedule(refresh_every=lambda step: integer(1 if step < 4 else 4))
    assert steps(schedule.refreshes) == [0, 1, 2, 3, 4, 8]
    counted = CurvatureSchedule(update_every=lambda step: integer(3 if step < 6 else 5))
    assert steps(counted.updates, 20) == [0, 3, 6, 11, 16]  # from the last time, not from the start
    assert [step for step in reversed(range(20)) if counted.updates(step)] == [16, 11, 6, 3, 0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(update_every=0), ValueError, r"CurvatureSchedule\(update_every\) should be at least 1, not 0"),
        (dict(refresh_every=2.5), TypeError, r"CurvatureSchedule\(refresh_every\) should be an integer, not 2.5"),
        (dict(start=-1), ValueError, r"CurvatureSchedule\(start\) should be at least 0"),
        (dict(batch_size=0), ValueError, r"CurvatureSchedule\(batch_size\) should be at least 1"),
    ],
)
def test_bad_options_are_refused_when_built(options, error, message):
    with pytest.raises(error, match=message):
        CurvatureSchedule(**options)


def test_bad_periods_are_refused_when_they_come():
    with pytest.raises(ValueError, match="at least 1 step, not 0 at step 7"):
        CurvatureSchedule(refresh_every=lambda step: 7 - step).refreshes(8)
    with pytest.raises(TypeError, match=r"should be an integer, not 2\.5 at step 0"):
        CurvatureSchedule(update_every=lambda step: 2.5).updates(3)
