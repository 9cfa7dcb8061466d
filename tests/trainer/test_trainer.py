"""`fit` against loops written by hand, and what must not change it."""

import re

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import (
    CLASSES,
    FEATURES,
    Classifier,
    Counting,
    Mlp,
    Noisy,
    assert_trees_close,
    assert_trees_equal,
    examples,
    losses_of,
    trainer,
)

from curvtrain import CurvatureSchedule, losses, optim
from curvtrain.trainer import Call, Diverged
from curvtrain.trainer.data import ArrayData, map_arrays

pytestmark = pytest.mark.usefixtures("quick_compile")


def batches(count, size=16, **arrays):
    iterator = ArrayData(arrays or examples(), size, seed=0).iterator()
    return [next(iterator) for _ in range(count)]


def mean_loss(graph, params, batch):
    logits = nnx.merge(graph, params)(batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def by_hand(tx, steps, *, ema=None):
    """Flax, optax and `jax.jit` alone: (losses, parameters, their average)."""
    graph, params = nnx.split(Mlp(nnx.Rngs(0)))
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, batch):
        value_fn = lambda p: mean_loss(graph, p, batch)
        loss, grads = jax.value_and_grad(value_fn)(params)
        extra = dict(value=loss, grad=grads, value_fn=value_fn)
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return loss, optax.apply_updates(params, updates), opt_state

    history, average = [], params
    for batch in batches(steps):
        loss, params, opt_state = step(params, opt_state, batch)
        history.append(float(loss))
        if ema is not None:
            average = jax.tree.map(lambda a, p: ema * a + (1 - ema) * p, average, params)
    return np.array(history), nnx.to_pure_dict(params), nnx.to_pure_dict(average)


# Eight devices sum a batch in another order than one: rounding (6e-8 of numbers of order 1), amplified by few steps.
ROUNDING = dict(rtol=1e-4, atol=1e-5)


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_fit_is_the_loop_that_one_would_write():
    run = trainer(steps=12, optimizer=optax.adam(1e-2), log_every=1, ema=0.8)
    history, params, average = by_hand(optax.adam(1e-2), 12, ema=0.8)
    result = run.fit()
    np.testing.assert_allclose(losses_of(result), history, **ROUNDING)
    assert_trees_close(run.state.params, params, **ROUNDING)
    assert_trees_close(run.state.ema, average, **ROUNDING)
    assert result.step == int(run.state.step) == 12
    assert result.stopped is None


LINE_SEARCH = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=8))


@pytest.mark.parametrize("tx", [optax.lbfgs(memory_size=3), LINE_SEARCH], ids=["lbfgs", "line search"])
def test_optimizers_that_evaluate_the_loss_run_as_they_are(tx):
    history, params, _ = by_hand(tx, 5)
    run = trainer(steps=5, optimizer=tx, log_every=1)
    np.testing.assert_allclose(losses_of(run.fit()), history, **ROUNDING)
    assert_trees_close(run.state.params, params, **ROUNDING)


def test_accumulation_changes_memory_alone():
    weighted = examples() | {"weights": np.random.default_rng(0).uniform(0.1, 2, 64).astype(np.float32)}
    one, two = (
        trainer(steps=6, optimizer=optax.adam(1e-2), train_data=weighted, log_every=1, accumulate=k) for k in (1, 2)
    )
    np.testing.assert_allclose(losses_of(one.fit()), losses_of(two.fit()), **ROUNDING)
    assert_trees_close(one.state.params, two.state.params, **ROUNDING)


def test_the_model_is_in_evaluation_mode_and_a_copy():
    run = trainer(model=Noisy, steps=2)
    x, before = examples()["x"], run.model
    assert before.drop.deterministic and before.norm.use_running_average
    first = before(x)
    run.fit()
    np.testing.assert_array_equal(before(x), first)  # training donated nothing of it
    assert not np.allclose(run.model(x), first)
    changed = run.model
    changed.outer.bias[...] += 1.0
    assert not np.allclose(changed.outer.bias[...], run.model.outer.bias[...])


def test_evaluate_looks_at_the_current_state_and_its_average():
    batch = examples(20, seed=1)
    run = trainer(steps=20, optimizer=optax.adam(3e-2), ema=0.9, eval_data=batch)
    loss_of = lambda model: float(losses.SoftmaxCrossEntropy().values(model(batch["x"]), batch).mean())
    before = run.evaluate()["loss"]
    np.testing.assert_allclose(before, loss_of(run.model), rtol=1e-5)
    result = run.fit()
    np.testing.assert_allclose(run.evaluate()["loss"], loss_of(run.ema_model), rtol=1e-5)
    assert result.metrics["eval/loss"] == run.evaluate()["loss"] < before
    assert abs(loss_of(run.ema_model) - loss_of(run.model)) > 1e-3


def test_an_average_has_to_be_asked_for():
    with pytest.raises(ValueError, match=r"ema_model needs TrainerConfig\(ema=...\), which is None"):
        _ = trainer().ema_model


def test_evaluate_without_data():
    with pytest.raises(ValueError, match=r"Classifier.evaluate\(data\): there is no data, and no eval_data was given"):
        trainer().evaluate()


def test_a_finished_run_stays_finished(capsys):
    run = trainer(steps=3, eval_data=examples(20))
    first = run.fit()
    params = jax.tree.map(np.asarray, run.state.params)
    second = run.fit()
    assert second.step == first.step == 3
    assert_trees_equal(run.state.params, params)
    evaluated = [name for name in first.metrics if name.startswith("eval/")]
    assert {name: second.metrics[name] for name in evaluated} == {name: first.metrics[name] for name in evaluated}
    assert capsys.readouterr().out == ""  # progress=False


def test_a_run_that_failed_goes_on_where_it_was():
    straight = trainer(steps=8, log_every=1)
    expected = losses_of(straight.fit())
    fail = [True]

    def trip(view):
        if view.step == 5 and fail[0]:
            fail[0] = False
            raise KeyboardInterrupt

    run = trainer(steps=8, log_every=1, hooks=[Call(trip)])
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert int(run.state.step) == 5
    assert losses_of(run.fit()).tolist() == expected[5:].tolist()
    assert_trees_equal(run.state.params, straight.state.params)


# -- programs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scheduled():
    """A run of three programs and an evaluation, and how often `predict` was traced for them."""
    run = trainer(
        model=Noisy,
        steps=12,
        curvature=Counting(),
        schedule=CurvatureSchedule(update_every=2, refresh_every=4, start=2, batch_size=32),
        eval_data=examples(20),
        eval_every=3,
        log_every=1,
        ema=0.9,
    )
    run.traces = 0
    result = run.fit()
    return run, result, run.traces


def test_each_program_is_traced_once(scheduled):
    run, _, traces = scheduled
    assert traces == 3  # train, train + update, train + update + refresh; the evaluation was when it was checked
    run.evaluate()
    run.dry_run()
    run.evaluate(examples(50))
    assert run.traces == traces


def test_the_schedule_shifts_neither_data_nor_dropout(scheduled):
    _, result, _ = scheduled
    alone = trainer(model=Noisy, steps=12, log_every=1, ema=0.9).fit()
    assert losses_of(result).tolist() == losses_of(alone).tolist()  # the optimizer ignores curvature: bit by bit


def live_bytes():
    return sum(array.nbytes for array in jax.live_arrays())


def test_a_dry_run_allocates_nothing():
    before = live_bytes()
    run = trainer(
        model=lambda rngs: Mlp(rngs, width=4096),
        mesh={"data": 2, "fsdp": 4},
        sharding="fsdp",
        optimizer=optax.adam(1e-3),
        curvature=Counting(absorbs=False),
        schedule=CurvatureSchedule(refresh_every=2, start=1),
        eval_data=examples(20),
    )
    report = run.dry_run()
    assert live_bytes() - before < 4096  # far less than the 160 kB of the parameters
    assert [program.name for program in report.programs] == ["train", "train + refresh"]
    assert all(program.flops > 0 and program.argument_bytes > 0 for program in report.programs)
    kernels, biases = (FEATURES + CLASSES) * 4096, 4096
    params, moments = report.state["params"], report.state["opt_state"]
    assert params.whole == 4 * (kernels + biases + CLASSES)
    assert params.per_device == 4 * ((kernels + biases) / 4 + CLASSES)  # a quarter of what "fsdp" splits
    assert (params.replicated, params.largest) == (4 * CLASSES, f"outer/bias ({4 * CLASSES} B)")
    assert moments.per_device == 2 * params.per_device + 4 and report.state["key"].whole == 8
    assert report.state.whole == sum(part.whole for part in report.state.values()) and not report.state.checkpoints
    text = str(report)
    for word in ("mesh {'data': 2, 'fsdp': 4}, batch of 16", "train + refresh", "all-reduce", "KiB"):
        assert word in text


# -- curvature ---------------------------------------------------------------------------------------------------------


def counts_of(schedule, steps, **options):
    run = trainer(steps=steps, curvature=Counting(), schedule=schedule, **options)
    run.fit()
    return run.state.curvature


def test_the_schedule_is_kept(scheduled):
    run, result, _ = scheduled
    curvature = run.state.curvature
    assert (int(curvature.updates), int(curvature.refreshes), int(curvature.examples)) == (5, 3, 32)
    assert [row["curvature/refreshes"] for row in result.history if "train/loss" in row] == [
        0,
        0,
        *[1] * 4,
        *[2] * 4,
        3,
        3,
    ]


def test_a_schedule_of_functions_is_kept():
    annealed = CurvatureSchedule(update_every=lambda t: 1 if t < 4 else 3, refresh_every=lambda t: 2 if t < 5 else 4)
    curvature = counts_of(annealed, steps=10)
    assert (int(curvature.updates), int(curvature.refreshes)) == (6, 4)  # at 0 1 2 3 6 9 and at 0 2 4 8


def test_an_estimator_that_absorbs_nothing_is_not_updated():
    run = trainer(curvature=Counting(absorbs=False))
    result = run.fit()
    assert int(run.state.curvature.updates) == 0
    assert result.metrics["curvature/refreshes"] == 1.0


@pytest.mark.parametrize(("size", "seen"), [(None, 16), (16, 16), (48, 48)])
def test_a_refresh_sees_as_many_examples_as_it_was_given(size, seen):
    assert int(counts_of(CurvatureSchedule(batch_size=size), steps=1, accumulate=2).examples) == seen


@pytest.mark.parametrize(
    ("optimizer", "damping"),
    [
        (optax.chain(optim.scale_by_curvature(0.5), optax.sgd(0.1)), 0.5),
        (optax.inject_hyperparams(optim.scale_by_curvature, "exponent")(damping=lambda t: 0.25), 0.25),
        (optax.sgd(0.1), -1),
    ],
    ids=["constant", "scheduled", "none"],
)
def test_a_refresh_is_told_the_optimizer_s_damping(optimizer, damping):
    assert float(counts_of(CurvatureSchedule(), steps=1, optimizer=optimizer).damping) == damping


def counted(updates, state, params=None, *, curvature, **extra):
    """Plain gradient descent until the first refresh."""
    return jax.tree.map(lambda g: -0.1 * (1 + curvature.refreshes) * g, updates), state


def test_nothing_changes_before_the_first_refresh():
    tx = optax.GradientTransformationExtraArgs(lambda params: (), counted)
    schedule = CurvatureSchedule(refresh_every=100, start=4, batch_size=32)
    found = losses_of(trainer(steps=8, log_every=1, optimizer=tx, curvature=Counting(), schedule=schedule).fit())
    plain = losses_of(trainer(steps=8, log_every=1).fit())
    # Step 4 (from 0) is the first to move further, and its loss is that of before. Another program, other rounding.
    np.testing.assert_allclose(found[:5], plain[:5], rtol=1e-5)
    assert np.all(np.abs(found[5:] - plain[5:]) > 1e-4)


def test_a_batch_may_be_absorbed_after_the_step_that_it_belongs_to():
    """The first step then moves as if nothing had been refreshed, the second as if once."""
    tx = optax.GradientTransformationExtraArgs(lambda params: (), counted)
    first, after = (
        trainer(
            steps=3,
            log_every=1,
            optimizer=tx,
            curvature=Counting(),
            schedule=CurvatureSchedule(refresh_every=100, update_first=update_first),
        )
        for update_first in (True, False)
    )
    plain = losses_of(trainer(steps=3, log_every=1).fit())
    found, late = losses_of(first.fit()), losses_of(after.fit())
    np.testing.assert_allclose(late[:2], plain[:2], rtol=1e-5)  # the loss of a step is that before it
    assert abs(found[1] - plain[1]) > 1e-4 and abs(late[2] - plain[2]) > 1e-4
    for run in (first, after):
        assert int(run.state.curvature.updates) == 3 and int(run.state.curvature.refreshes) == 1


def test_an_estimator_that_factorises_nothing_is_not_refreshed():
    run = trainer(curvature=Counting(factorises=False))
    result = run.fit()
    assert int(run.state.curvature.refreshes) == 0
    assert result.metrics["curvature/updates"] == result.step


def newton(updates, state, params=None, *, curvature, objective, batch, key, value, grad, value_fn):
    """An update that wants every extra argument that there is, and no other."""
    differ = jnp.abs(value_fn(params) - value) + jnp.abs(objective.loss(params, batch, key) - value)
    directions = jax.tree.map(lambda v, g, u: -0.1 * v + (g - u), curvature.solve(updates, 1.0), grad, updates)
    return directions, {"differ": state["differ"] + differ}


@pytest.fixture(scope="module")
def plain():
    return losses_of(trainer(model=Noisy, steps=3, optimizer=optax.sgd(0.05), log_every=1).fit())


@pytest.mark.parametrize("wrap", [optax.chain, lambda tx: optax.MultiSteps(tx, 1)], ids=["chain", "MultiSteps"])
def test_an_optimizer_gets_its_extra_arguments(wrap, plain):
    run = trainer(
        model=Noisy,
        steps=3,
        optimizer=wrap(optax.GradientTransformationExtraArgs(lambda params: {"differ": jnp.float32(0)}, newton)),
        curvature=Counting(absorbs=False),
        schedule=CurvatureSchedule(refresh_every=1),
        log_every=1,
    )
    np.testing.assert_allclose(losses_of(run.fit()), plain, **ROUNDING)  # (I + I)^-1 halves the rate
    assert optax.tree.get(run.state.opt_state, "differ") < 1e-5  # value_fn is the loss, dropout included


# -- models and data ---------------------------------------------------------------------------------------------------


class Sequence(nnx.Module):
    """A recurrence over time, wrapped in containers whose keys are integers."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(FEATURES, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)])
        self.head = nnx.Sequential(nnx.tanh, nnx.Dropout(0.1, rngs=rngs), nnx.Linear(8, CLASSES, rngs=rngs))

    def __call__(self, x):
        scan = lambda h, x: (h := jnp.tanh(self.layers[0](x) + self.layers[1](h)), h)
        _, hs = jax.lax.scan(scan, jnp.zeros((x.shape[0], 8)), jnp.swapaxes(x, 0, 1))
        return self.head(jnp.swapaxes(hs, 0, 1))


def test_a_sequence_model_with_a_mask_and_integer_keys():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 5, FEATURES)).astype(np.float32)
    data = {"x": x, "label": np.argmax(x[..., :CLASSES], -1), "mask": rng.random((64, 5)) < 0.8}
    run = trainer(
        model=Sequence,
        train_data=data,
        eval_data=data,
        steps=40,
        optimizer=optax.adam(3e-2),
        sharding=[("layers/1/kernel", jax.sharding.PartitionSpec("data"))],
    )
    before = run.evaluate()["loss"]
    after = run.fit().metrics["eval/loss"]
    assert after < 0.8 * before
    assert set(run.state.params["layers"]) == {0, 1}
    for tree in (run.state.params, run.state.opt_state[0].mu):
        assert tree["layers"][1]["kernel"].sharding.spec == jax.sharding.PartitionSpec("data")
    assert run.model(x).shape == (64, 5, CLASSES)


class Two(nnx.Module):
    """A layer for each of two views of an example."""

    def __init__(self, rngs):
        self.left, self.right = nnx.Linear(2, 8, rngs=rngs), nnx.Linear(FEATURES - 2, 8, rngs=rngs)
        self.outer = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, view):
        return self.outer(nnx.tanh(self.left(view["left"]) + self.right(view["more"]["right"])))


class Views(Classifier):
    def predict(self, model, batch):
        return model(batch["view"])


def views(arrays):
    x = arrays["x"]
    return {"view": {"left": x[:, :2], "more": {"right": x[:, 2:]}}, "label": arrays["label"]}


@pytest.mark.parametrize("kind", ["arrays", "grain"])
def test_nested_batches(kind):
    data, test = views(examples()), views(examples(20, seed=1))
    if kind == "grain":
        rows = [map_arrays(lambda a, i=i: a[i], data) for i in range(64)]
        data = grain.MapDataset.source(rows).seed(0).shuffle().repeat().batch(16, drop_remainder=True)
    run = trainer(
        Views,
        model=Two,
        steps=30,
        train_data=data,
        eval_data=test,
        optimizer=optax.adam(3e-2),
        curvature=Counting(),
        schedule=CurvatureSchedule(refresh_every=5, batch_size=32),
        accumulate=2,
        log_every=1,
    )
    before = run.evaluate()["loss"]
    result = run.fit()
    assert result.metrics["eval/loss"] < 0.8 * before
    logits = run.model(test["view"])
    right = optax.softmax_cross_entropy_with_integer_labels(logits, test["label"]).mean()
    np.testing.assert_allclose(result.metrics["eval/loss"], right, rtol=1e-5)
    with pytest.raises(ValueError, match=r"one length.*'view/left': 20, 'view/more/right': 3"):
        run.evaluate(test | {"view": {"left": test["view"]["left"], "more": {"right": np.zeros((3, 4))}}})


def test_parameters_in_half_precision():
    run = trainer(
        model=lambda rngs: Mlp(rngs, dtype=jnp.bfloat16), steps=20, optimizer=optax.adam(5e-2), ema=0.999, log_every=1
    )
    start = jax.tree.map(lambda p: np.asarray(p, np.float32), run.state.params)
    history = losses_of(run.fit())
    assert history[-1] < 0.8 * history[0]
    assert {p.dtype for p in jax.tree.leaves(run.state.params)} == {jnp.dtype(jnp.bfloat16)}
    assert {p.dtype for p in jax.tree.leaves(run.state.opt_state[0].mu)} == {jnp.dtype(jnp.bfloat16)}
    # The average is wider than they are: in bfloat16 it would not move at all.
    moved = jax.tree.map(lambda a, p: float(np.abs(np.asarray(a) - p).max()), run.state.ema, start)
    assert {a.dtype for a in jax.tree.leaves(run.state.ema)} == {jnp.dtype(jnp.float32)}
    assert all(0 < distance < 0.1 for distance in jax.tree.leaves(moved))
    assert run.ema_model.inner.kernel.dtype == jnp.bfloat16
    assert np.isfinite(run.evaluate(examples(20))["loss"])


# -- what goes wrong while training ------------------------------------------------------------------------------------


def test_a_divergence_names_its_step():
    data = examples(16 * 12)  # twelve batches: each example once
    poisoned = {row.tobytes() for row in batches(12, **data)[7]["x"]}
    data["x"][[row.tobytes() in poisoned for row in data["x"]]] = np.inf
    run = trainer(train_data=data, steps=12, log_every=5)
    with pytest.raises(Diverged) as error:
        run.fit()
    message = str(error.value)
    assert re.search(r"training loss is nan at step 8 \(seen in steps 6 to 10\)", message)
    assert "There is no checkpoint" in message
    assert "Lower the learning rate" in message


@pytest.mark.parametrize("eval_data", [None, examples(20)], ids=["without evaluation", "with"])
def test_a_run_that_diverged_diverges_again(eval_data):
    run = trainer(optimizer=optax.sgd(lambda count: jnp.where(count == 3, jnp.nan, 0.1)), steps=6, eval_data=eval_data)
    for _ in range(2):
        with pytest.raises(Diverged):
            run.fit()


def test_lines_tell_rate_and_time_left(capsys):
    trainer(steps=8, log_every=2, progress=True, eval_data=examples(20), eval_every=4).fit()
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if re.match(r"step +\d+/8 +train/accuracy", line)]
    assert len(steps) == 4
    assert all(re.search(r"train/loss [\d.]+ .* [\d.]+ steps/s  \d+:\d\d left$", line) for line in steps)
    assert steps[-1].endswith("0:00 left")
    assert len([line for line in lines if re.match(r"step [48]/8  eval/accuracy [\d.e-]+  eval/loss", line)]) == 2
    assert any("inner/kernel" in line for line in lines)  # the table of parameters
    assert any(line == "8 cpu device(s), mesh {'data': 8}; 8 steps of 16 examples" for line in lines)
    assert any(re.match(r"compiled train in [\d.]+ s", line) for line in lines)
