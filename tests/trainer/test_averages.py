"""What is evaluated where it is not the parameters of the last step: averages, and what an optimizer says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import FEATURES, Classifier, Noisy, assert_trees_close, examples, trainer

from curvtrain import losses
from curvtrain.trainer import Call

pytestmark = pytest.mark.usefixtures("quick_compile")
TEST = examples(20, seed=1)


def averages_by_hand(states, decay):
    """The moving average of (parameters, model state) over the states of all steps, in float64."""
    wide = lambda state: jax.tree.map(lambda a: np.asarray(a, np.float64), (state.params, state.model_state))
    average = wide(states[0])
    for state in states[1:]:
        average = jax.tree.map(lambda a, n: decay * a + (1 - decay) * n, average, wide(state))
    return average


def loss_by_hand(params, statistics, data):
    """The loss of `Noisy` as it is evaluated, in float64."""
    h = data["x"].astype(np.float64) @ params["inner"]["kernel"] + params["inner"]["bias"]
    z = (h - statistics["norm"]["mean"]) / np.sqrt(statistics["norm"]["var"] + 1e-5)
    z = (
        np.tanh(z * params["norm"]["scale"] + params["norm"]["bias"]) @ params["outer"]["kernel"]
        + params["outer"]["bias"]
    )
    z -= z.max(1, keepdims=True)
    return float(np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), data["label"]]))


def test_averaged_weights_are_evaluated_with_averaged_statistics(tmp_path):
    states = []
    run = trainer(
        model=Noisy,
        steps=30,
        ema=0.8,
        optimizer=optax.adam(3e-2),
        eval_data=TEST,
        workdir=tmp_path,
        hooks=[Call(lambda view: states.append(view.state))],
    )
    states.append(run.state)
    result = run.fit()
    params, statistics = averages_by_hand(states, 0.8)
    assert_trees_close(run.state.ema, params, rtol=1e-4, atol=1e-5)
    assert_trees_close(run.state.ema_model_state, statistics, rtol=1e-4, atol=1e-5)
    right, wrong = (loss_by_hand(params, s, TEST) for s in (statistics, averages_by_hand(states[-1:], 0.8)[1]))
    assert abs(right - wrong) > 1e-3
    assert abs(run.evaluate(TEST)["loss"] - right) < 1e-4 and abs(result.metrics["eval/loss"] - right) < 1e-4
    for model in (run.ema_model, trainer(model=Noisy, ema=0.8).load_model(tmp_path)):
        np.testing.assert_allclose(model.norm.mean[...], statistics["norm"]["mean"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(run.model.norm.mean[...], run.state.model_state["norm"]["mean"])


class Counter(nnx.Module):
    """State that is no floating-point number, and some in half precision."""

    def __init__(self, rngs):
        self.out = nnx.Linear(FEATURES, 3, rngs=rngs)
        self.calls, self.size = nnx.Variable(jnp.int32(0)), nnx.BatchStat(jnp.zeros((), jnp.bfloat16))

    def __call__(self, x):
        self.calls[...] += 1
        self.size[...] = jnp.mean(jnp.abs(x)).astype(jnp.bfloat16)
        return self.out(x)


def test_counts_are_not_averaged_and_narrow_numbers_are_in_float32():
    run = trainer(model=Counter, steps=4, ema=0.999)
    run.fit()
    average = run.state.ema_model_state
    assert int(average["calls"]) == int(run.state.model_state["calls"]) == 4
    assert average["size"].dtype == jnp.float32 and 0 < float(average["size"]) < 0.01
    assert run.ema_model.size[...].dtype == jnp.bfloat16 and run.ema_model.calls[...] == 4
    assert np.isfinite(run.evaluate(TEST)["loss"])


def test_without_such_state_there_is_no_average_of_it():
    assert trainer(ema=0.9).state.ema_model_state is None
    assert trainer(model=Noisy).state.ema_model_state is None


# -- what the optimizer says -------------------------------------------------------------------------------------------


def test_eval_params_is_what_is_evaluated_and_exported(tmp_path):
    x_of = optax.contrib.schedule_free_eval_params
    options = dict(optimizer=optax.contrib.schedule_free_sgd(0.5), eval_params=x_of, eval_data=TEST, workdir=tmp_path)
    seen = []
    look = Call(lambda view: seen.append((run.evaluate(TEST)["loss"], loss_at(view.state))), every=2)
    run = trainer(steps=6, hooks=[look], eval_every=2, **options)

    def loss_at(state):
        return float(run.objective.evaluation().loss(x_of(state.opt_state, state.params), TEST))

    result = run.fit()
    assert len(seen) == 3 and all(abs(got - right) < 1e-5 for got, right in seen)
    at_y = float(run.objective.evaluation().loss(run.state.params, TEST))
    assert abs(result.metrics["eval/loss"] - seen[-1][1]) < 1e-5 < abs(at_y - seen[-1][1])
    expected = x_of(run.state.opt_state, run.state.params)["inner"]["kernel"]
    for model in (run.model, trainer(**options | dict(workdir=None)).load_model(tmp_path)):
        np.testing.assert_allclose(model.inner.kernel[...], expected, rtol=1e-6)
    chained = options | dict(
        optimizer=optax.chain(optax.clip(1.0), options["optimizer"]),
        eval_params=lambda opt_state, params: x_of(opt_state[1], params),
        workdir=None,
    )
    assert np.isfinite(trainer(**chained).fit().metrics["eval/loss"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            dict(eval_params=3),
            TypeError,
            r"Classifier\(eval_params\) should be a function of \(opt_state, params\), not int",
        ),
        (
            dict(eval_params=optax.contrib.schedule_free_eval_params),
            TypeError,
            r"Classifier\(eval_params\) does not take this optimizer's state, tuple: .*'b1'.*lambda opt_state, params",
        ),
        (
            dict(eval_params=lambda opt_state, params: params["inner"]),
            ValueError,
            r"Classifier\(eval_params\) should give parameters like those that it is given, .*inner/kernel",
        ),
        (dict(eval_params=lambda s, p: p, ema=0.9), ValueError, r"eval_params\) and TrainerConfig\(ema\) both say"),
    ],
)
def test_eval_params_is_checked(options, error, message):
    with pytest.raises(error, match=message):
        trainer(**options)


# -- random numbers in evaluation --------------------------------------------------------------------------------------


class Noise(nnx.Module):
    def __init__(self, rngs):
        self.scale, self.rngs = nnx.Param(jnp.ones(())), nnx.Rngs(noise=0)

    def __call__(self, x):
        return self.scale * jax.random.normal(self.rngs.noise(), x.shape)


class Drawn(Classifier):
    loss = losses.SquaredError(targets="x")

    def metrics(self, outputs, batch):
        return {"first": outputs[:, 0], "square": outputs[:, 0] ** 2}


def test_every_batch_of_an_evaluation_has_noise_of_its_own():
    """Repeated noise has a mean far from 0, and its square one far from 1."""
    zeros = {"x": np.zeros((4096, FEATURES), np.float32)}
    for size in (8, 64, 4096):
        run = trainer(Drawn, model=Noise, train_data=zeros, eval_batch_size=size, optimizer=optax.sgd(0.0))
        scores = run.evaluate(zeros)
        assert abs(scores["first"]) < 0.06 and abs(scores["square"] - 1) < 0.1 and scores == run.evaluate(zeros)
        run.fit()
        assert run.evaluate(zeros) == scores  # the same numbers at every step: only the parameters make a difference
