"""One live object: while a run is going on, the Trainer and its hooks look at the step that was just done."""

import numpy as np
import optax
import pytest
from tiny import Counting, examples, losses_of, trainer

from curvtrain import CurvatureSchedule, optim
from curvtrain.curvature import KFAC, Lanczos
from curvtrain.trainer import Call, EarlyStopping

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("looked_at_before", [False, True])
@pytest.mark.parametrize("ema", [None, 0.5])
def test_hooks_see_what_the_trainer_sees(looked_at_before, ema):
    test, seen = examples(20, seed=1), []

    def look(view):
        assert view.state is run.state and int(view.state.step) == view.step
        np.testing.assert_array_equal(run.model.inner.kernel[...], view.state.params["inner"]["kernel"])
        model = run.model if ema is None else run.ema_model
        logits = model(test["x"])
        right = optax.softmax_cross_entropy_with_integer_labels(logits, test["label"]).mean()
        np.testing.assert_allclose(run.evaluate(test)["loss"], right, rtol=1e-5)
        np.testing.assert_allclose(
            run.objective.loss(view.state.params, test), run.objective.loss(run.state.params, test)
        )
        seen.append((view.step, float(right)))

    run = trainer(steps=6, optimizer=optax.adam(0.1), hooks=[Call(look, every=2)], ema=ema)
    assert not looked_at_before or int(run.state.step) == 0
    run.fit()
    assert [step for step, _ in seen] == [2, 4, 6] and len(set(seen)) == 3
    assert int(run.state.step) == 6


def test_a_run_that_failed_keeps_what_was_logged():
    """The next call of fit goes on with it: without a workdir too, hooks see the metrics of before."""
    fail, seen = [True], []

    def trip(view):
        seen.append((view.step, view.logged_at.get("eval/loss")))
        if view.step == 3 and fail[0]:
            fail[0] = False
            raise KeyboardInterrupt

    options = dict(steps=6, eval_data=examples(20), eval_every=2, log_every=1)
    run = trainer(hooks=[Call(trip), EarlyStopping()], **options)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    result = run.fit()
    assert seen == [(1, None), (2, 2), (3, 2), (4, 4), (5, 4), (6, 6)]
    assert losses_of(result).tolist() == losses_of(trainer(**options).fit())[3:].tolist()


def test_a_checkpoint_s_metrics_replace_those_of_later_steps(tmp_path):
    """A failed run goes on from its last checkpoint, and hooks do not see what came after it."""
    fail, seen = [True], []

    def trip(view):
        if fail[0] and view.step == 5:
            fail[0] = False
            raise KeyboardInterrupt
        if not fail[0]:
            seen.append((view.step, view.logged_at["eval/loss"]))

    options = dict(steps=6, eval_data=examples(20), eval_every=2, save_every=3, workdir=tmp_path)
    run = trainer(hooks=[Call(trip)], **options)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert run.fit().step == 6
    assert seen == [(4, 4), (5, 4), (6, 6)]


# -- the default schedule ----------------------------------------------------------------------------------------------


def refreshes(**options):
    """The steps that are refreshed, of 20."""
    programs = trainer(steps=20, **options)._plan.programs
    return [step for step in range(20) if programs.kind(step).refresh]


@pytest.mark.parametrize(
    ("options", "steps", "line"),
    [
        (
            dict(optimizer=optim.kfac(), curvature=KFAC()),
            [0, 5, 10, 15],
            "refresh every 5 steps, as optim.kfac adapts its damping",
        ),
        (
            dict(optimizer=optim.kfac(damping_every=7), curvature=KFAC(), schedule=CurvatureSchedule(update_every=2)),
            [0, 7, 14],
            "refresh every 7 steps, as optim.kfac adapts its damping",
        ),
        (
            dict(optimizer=optim.kfac(), curvature=KFAC(), schedule=CurvatureSchedule(refresh_every=10)),
            [0, 10],
            None,
        ),
        (dict(optimizer=optim.kfac(0.1, 0.9, 0.1), curvature=KFAC()), [0], "refresh every 100 steps"),
        (dict(optimizer=optim.fosi(optax.sgd(0.1)), curvature=Lanczos(k=2)), [0], "refresh every 100 steps"),
        (dict(curvature=Counting(factorises=False)), [], None),
        ({}, [], None),
    ],
    ids=["adaptive", "own period", "said", "constant", "Lanczos", "no refresh", "no curvature"],
)
def test_without_a_period_the_optimizer_says_how_often_its_curvature_is_refreshed(options, steps, line):
    assert refreshes(**options) == steps
    assert trainer(**options)._plan.schedule_note == (line or "")


def test_the_period_is_printed(capsys):
    trainer(steps=1, optimizer=optim.kfac(), curvature=KFAC(), progress=True).fit()
    assert "refresh every 5 steps, as optim.kfac adapts its damping" in capsys.readouterr().out.splitlines()
