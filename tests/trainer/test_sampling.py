"""A Trainer with an optimizer that samples: expectations over draws, averaged predictions, no noise that is kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import Noisy, assert_trees_close, assert_trees_equal, examples, losses_of, trainer

from curvtrain import CurvatureSchedule, losses, optim
from curvtrain._keys import Purpose, fold
from curvtrain.curvature import KFAC, Diagonal, DiagonalFisher
from curvtrain.trainer.run.resuming import with_new_constants

pytestmark = pytest.mark.usefixtures("quick_compile")
TEST = examples(20, seed=1)


def ivon():
    return optim.ivon(0.2, hess_init=0.5, b2=0.9)


def vogn(**options):
    """Of Kronecker factors, which are absorbed and factorised every step."""
    estimator = KFAC("empirical", ema=0.5, inverse="eigh")
    schedule = CurvatureSchedule(update_every=1, refresh_every=1)
    tx = optim.vogn(0.05, prior_precision=5.0, init_precision=1.0, momentum=0.5)
    return dict(optimizer=tx, curvature=estimator, schedule=schedule, **options)


RUNS = {
    "ivon": dict(model=Noisy, optimizer=ivon(), mc_samples=4),
    "ivon, in pieces": dict(optimizer=optax.chain(optax.clip(1.0), ivon()), mc_samples=2, accumulate=2),
    "vogn": vogn(mc_samples=2),
}


@pytest.mark.parametrize("name", RUNS)
def test_draws_over_a_mesh_axis_are_those_of_the_loop(name):
    """Losses, and all of the state: what batches do to the model's state, too, is averaged over the draws."""
    options = dict(sharding="fsdp", log_every=1, **RUNS[name])
    loop = trainer(mesh={"data": 2, "fsdp": 4}, **options)
    axis = trainer(mesh={"data": 2, "fsdp": 2, "mc": 2}, **options)
    np.testing.assert_allclose(losses_of(loop.fit()), losses_of(axis.fit()), rtol=1e-5)
    for part in ("params", "model_state", "opt_state"):
        assert_trees_close(getattr(loop.state, part), getattr(axis.state, part), rtol=1e-4, atol=2e-5)


def by_hand(run, data, step, samples):
    """One step's loss, gradient and statistics of draws, from the state before it, with nothing of the Trainer."""
    state, objective = run.state, run.objective
    key = fold(jax.random.fold_in(state.key, step), Purpose.DRAWS)
    look = lambda theta, k: objective.value_and_grad(theta, data, k)[:2]
    return optim.at_draws(look, state.opt_state, state.params, key, samples=samples, curvature=state.curvature)


def test_a_step_is_one_of_a_loop_of_ones_own():
    """The gradient, its statistics, and what the estimator absorbs are means over the draws."""
    estimator = DiagonalFisher("empirical", ema=0.0)
    data = examples(16)
    options = dict(optimizer=ivon(), curvature=estimator, mc_samples=3, train_data=data, steps=1, log_every=1)
    run = trainer(schedule=CurvatureSchedule(update_every=1), **options)
    before = run.state
    value, grads, draws = by_hand(run, jax.tree.map(jnp.asarray, data), 0, 3)
    updates, opt_state = ivon().update(grads, before.opt_state, before.params, draws=draws)
    key = fold(jax.random.fold_in(before.key, 0), Purpose.DRAWS)
    fishers = []
    for draw in range(3):
        at = jax.random.fold_in(key, draw)
        theta = optim.sample_params(before.opt_state, before.params, fold(at, Purpose.SAMPLE))
        one = estimator.update(before.curvature, run.objective, theta, data, fold(at, Purpose.NOISE))
        fishers.append(one.values)
    wanted = jax.tree.map(lambda *a: sum(a) / 3, *fishers)
    result = run.fit()
    np.testing.assert_allclose(result.metrics["train/loss"], value, rtol=1e-5)
    assert_trees_close(run.state.params, optax.apply_updates(before.params, updates), rtol=1e-5, atol=1e-6)
    assert_trees_close(run.state.opt_state, opt_state, rtol=1e-4, atol=1e-6)
    assert_trees_close(run.state.curvature.values, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["ivon", "vogn"])
def test_resumes_bit_by_bit_noise_included(name, tmp_path):
    options = dict(save_every=2, **RUNS[name])
    whole = trainer(steps=5, workdir=tmp_path / "whole", **options)
    whole.fit()
    trainer(steps=2, workdir=tmp_path / "parts", **options).fit()
    rest = trainer(steps=5, workdir=tmp_path / "parts", **options)
    rest.fit()
    data = lambda tree: jax.tree.map(lambda a: jax.random.key_data(a) if a.dtype == rest.state.key.dtype else a, tree)
    assert_trees_equal(data(whole.state), data(rest.state))


@pytest.mark.parametrize("options", [dict(optimizer=ivon()), vogn()], ids=["ivon", "vogn"])
def test_predictions_are_averaged_over_the_same_draws_in_every_evaluation(options):
    """The mean of the probabilities at draws from the optimizer's state and its curvature."""
    run = trainer(predictive_samples=5, eval_batch_size=8, eval_data=TEST, **options)
    logged = run.fit().metrics["eval/loss"]
    scores = run.evaluate(TEST)
    assert scores == run.evaluate(TEST) and scores["loss"] == logged
    state, p = run.state, []
    for draw in range(5):
        key = jax.random.fold_in(fold(state.key, Purpose.PREDICTIVE), draw)
        theta = optim.sample_params(state.opt_state, state.params, key, state.curvature)
        p.append(jax.nn.softmax(run.objective.predict(theta, TEST)))
    mean = np.mean(np.asarray(p, np.float64), axis=0)
    np.testing.assert_allclose(scores["loss"], -np.mean(np.log(mean[np.arange(20), TEST["label"]])), rtol=1e-5)
    np.testing.assert_allclose(scores["accuracy"], np.mean(mean.argmax(-1) == TEST["label"]))
    at_the_mean = jax.nn.log_softmax(run.objective.predict(state.params, TEST))
    assert abs(scores["loss"] + np.mean(at_the_mean[np.arange(20), TEST["label"]])) > 1e-4


def test_the_number_of_examples_is_that_of_the_loss(tmp_path):
    """Rows that do not weigh zero, and of sequences their positions; a number that was said stays."""
    size = lambda run: float(run.state.opt_state[0].ess)
    assert trainer(**vogn()).state.opt_state.data_size == 64
    assert size(trainer(optimizer=ivon())) == 64
    assert size(trainer(optimizer=optim.ivon(0.1, ess=7.0))) == 7
    assert size(trainer(optimizer=ivon(), train_data=examples() | {"mask": np.arange(64) % 4 != 0})) == 48
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 5, 6)).astype(np.float32)
    sequences = {"x": x, "label": rng.integers(0, 3, (32, 5)).astype(np.int32)}
    assert size(trainer(optimizer=ivon(), train_data=sequences)) == 160
    mask = np.arange(5) < rng.integers(1, 6, (32, 1))
    assert size(trainer(optimizer=ivon(), train_data=sequences | {"mask": mask})) == mask.sum()
    inside = optax.chain(optax.clip(1.0), optim.route([("inner", ivon()), (".*", optax.sgd(0.1))]))
    trainer(optimizer=inside, steps=1).fit()


PRESETS = {  # name -> (N, rates at the beginning, after 10 and after 70 epochs of 4 steps)
    "lenet": (64, 0.01, 0.01 * 0.9**10, 0.01 * 0.9**70),
    "lenet_kfac": (64, 4e-3, 4e-3, 4e-3),
    "resnet18_cifar10": (640, 1e-4, 1e-4, 1e-4),
    "resnet18_imagenet": (320, 0.0, 1.6e-3, 1.6e-5),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_train(name):
    """Their draws are as many as they say; rates are read off a step of a known gradient."""
    preset = optim.vogn_preset(name, 64, 4)
    tx, params = preset["optimizer"], {"a": jnp.ones(2)}
    size, *rates = PRESETS[name]
    state = tx.init(params)
    assert state.data_size == size
    for epochs, rate in zip((0, 10, 70), rates, strict=True):
        at = dataclasses.replace(state, inner=state.inner._replace(count=jnp.int32(4 * epochs)))
        step = lambda g, at=at: tx.update({"a": jnp.full(2, g)}, at, params, curvature=Diagonal({"a": jnp.ones(2)}))[0]
        share = 1 if at.inner.average is None else 0.1 / (1 - 0.9 ** (4 * epochs + 1))
        moved = (step(1.0)["a"] - step(0.0)["a"]) * (1 + state.inner.damping) / share
        np.testing.assert_allclose(moved, -rate, rtol=1e-4, atol=1e-9)
    if preset["mc_samples"] <= 10:
        result = trainer(eval_data=TEST, **preset).fit()
        assert np.isfinite(result.metrics["eval/loss"])


def test_a_resumed_run_takes_the_numbers_of_the_new_program():
    """Those that make the posterior: given, and counted by the Trainer."""
    old = trainer(model=Noisy, optimizer=optim.ivon(0.1, 7.0, weight_decay=0.2)).state
    for tx, ess in ((optim.ivon(0.1, 9.0), 9.0), (optim.ivon(0.1), 64.0)):
        state, changed = with_new_constants(trainer(model=Noisy, optimizer=tx)._plan, old)
        assert state.opt_state[0].ess == ess and changed["opt_state/0/ess"] == (7.0, ess)
        np.testing.assert_allclose(state.opt_state[0].weight_decay, 1e-4)
    state, _ = with_new_constants(trainer(**vogn())._plan, trainer(**vogn()).state)
    assert state.opt_state.data_size == 64 and state.opt_state.prior_precision == 5


class Asked:
    """An optimizer of somebody's own: SGD that looks ahead of itself by noise."""

    def init(self, params):
        return optax.sgd(0.1).init(params)

    def update(self, updates, state, params=None):
        return optax.sgd(0.1).update(updates, state, params)

    def sample(self, opt_state, params, key, curvature=None):
        return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key, p.shape, p.dtype), params)


def test_anybodys_optimizer_may_sample():
    run = trainer(optimizer=Asked(), mc_samples=2, predictive_samples=2, log_every=1)
    plain = trainer(optimizer=optax.sgd(0.1), log_every=1)
    assert np.all(losses_of(run.fit()) != losses_of(plain.fit()))
    assert run.evaluate(TEST) == run.evaluate(TEST)


@pytest.mark.parametrize("loss", [losses.SoftmaxCrossEntropy(), losses.SigmoidCrossEntropy(), losses.SquaredError()])
def test_averages_of_predictions(loss):
    z = np.random.default_rng(0).normal(size=(7, 4, 3)) * 3
    softmax = lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    p = {"Soft": softmax, "Sigm": lambda z: 1 / (1 + np.exp(-z)), "Squa": lambda z: z}[type(loss).__name__[:4]]
    with jax.enable_x64(True):
        found = loss.average(jnp.asarray(z))
    assert found.shape == (4, 3)
    np.testing.assert_allclose(p(np.asarray(found)), p(z).mean(0), rtol=1e-12)


def test_an_average_belongs_to_the_values_of_its_loss():
    class Other(losses.SoftmaxCrossEntropy):
        def values(self, outputs, batch):
            return super().values(outputs, batch) ** 2

    class Same(Other):
        average = losses.SoftmaxCrossEntropy.average

    assert losses.SoftmaxCrossEntropy.can_average and Same.can_average
    assert not Other.can_average and not losses.PerExample.can_average
    with pytest.raises(TypeError, match="Other overrides the values of SoftmaxCrossEntropy and inherits its average"):
        Other().average(jnp.zeros((2, 3, 4)))


def test_a_run_that_does_not_sample_has_its_program():
    """The compiled step of another optimizer does not draw: it is traced as often, and has no loop."""
    run = trainer(optimizer=optax.adam(1e-2), mesh={"data": 8})
    (kind,) = run._plan.programs.kinds
    text = run._plan.programs.lower(kind).as_text()
    assert "while" not in text and "erf_inv" not in text and run.traces <= 3
    (kind,) = (sampled := trainer(optimizer=ivon(), mc_samples=2))._plan.programs.kinds
    assert "erf_inv" in sampled._plan.programs.lower(kind).as_text()
