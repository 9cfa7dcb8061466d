"""Resuming with another program: the one list of what may change is true in both directions, and the new one counts."""

import dataclasses
import inspect
import shutil
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from tiny import Classifier, Counting, Mlp, assert_trees_close, examples, losses_of, trainer

from curvtrain import CurvatureSchedule, Trainer, TrainerConfig, losses, optim
from curvtrain.curvature import KFAC, DiagonalFisher
from curvtrain.trainer import Call, EarlyStopping, Mismatch
from curvtrain.trainer.data import ArrayData
from curvtrain.trainer.disk.changes import CONFIG, OWNERS, SUBCLASS, TRAINER, as_text

pytestmark = pytest.mark.usefixtures("quick_compile")
README = Path(__file__).resolve().parents[2] / "README.md"


# -- the list ----------------------------------------------------------------------------------------------------------


class Relabelled(Classifier):
    """Another loss, prediction and metrics, with the name and the variables of the run."""

    loss = losses.SquaredError(targets="x")

    def predict(self, model, batch):
        return jnp.tile(model(batch["x"]), 2)

    def metrics(self, outputs, batch):
        return {}


Relabelled.__name__ = "Classifier"


class Another(Classifier):
    pass


class Wider(Mlp):
    """Calls of the layers in another way."""

    def __call__(self, x):
        return self.outer(nnx.relu(self.inner(x)))


def last_row(value):
    data = examples()
    order = ArrayData(data, 16, seed=0).first()["x"]
    row = next(i for i, x in enumerate(data["x"]) if not (order == x).all(1).any())
    data["x"][row] = value
    return data


BASE = dict(
    optimizer=optax.adam(1e-2),
    curvature=DiagonalFisher("exact", ema=0.9),
    schedule=CurvatureSchedule(),
    ema=0.9,
    eval_data=examples(20, seed=1),
)


class Sampling(optax.GradientTransformationExtraArgs):
    """An optimizer with a sample, which has the state of another one."""

    def sample(self, opt_state, params, key, curvature=None):
        return params


SAMPLING = Sampling(*optax.with_extra_args_support(optax.adam(1e-2)))
# an example of each change, by (name, whether it may be)
CONFIG_EXAMPLES = {
    ("steps", True): dict(steps=5),
    ("mesh", True): dict(mesh={"data": 2, "fsdp": 4}),
    ("sharding", True): dict(mesh={"data": 4, "tensor": 2}, sharding=[("inner/kernel", P(None, "tensor"))]),
    ("accumulate", True): dict(accumulate=2),
    ("ema", True): dict(ema=0.5),
    ("ema", False): dict(ema=None),
    ("eval_batch_size", True): dict(eval_batch_size=8),
    ("save_every", True): dict(save_every=1),
    ("eval_every", True): dict(eval_every=1),
    ("log_every", True): dict(log_every=1),
    ("keep_latest", True): dict(keep_latest=5),
    ("keep_best", True): dict(keep_best=0),
    ("best_metric", True): dict(best_metric="accuracy"),
    ("best_mode", True): dict(best_mode="max"),
    ("nonfinite", True): dict(nonfinite="skip"),
    ("max_nonfinite", True): dict(max_nonfinite=3),
    ("writers", True): dict(writers=["csv"]),
    ("progress", True): dict(progress=None),
    ("compilation_cache", True): dict(compilation_cache=False),
    ("workdir", True): {},  # each example has a copy of its own
    ("seed", False): dict(seed=1),
    ("batch_size", False): dict(batch_size=32),
}
TRAINER_EXAMPLES = {
    ("optimizer", True): dict(optimizer=optax.adam(optax.cosine_decay_schedule(1e-3, 100), b1=0.5)),
    ("optimizer", False): dict(optimizer=optax.sgd(1e-2, momentum=0.9)),
    ("curvature", True): dict(curvature=DiagonalFisher("empirical", ema=0.5)),
    ("curvature", False): dict(curvature=Counting()),
    ("schedule", True): dict(schedule=CurvatureSchedule(update_every=2, refresh_every=7, start=1)),
    ("train_data", True): dict(train_data=last_row(3.0)),
    ("train_data", False): dict(train_data=examples(72)),
    ("eval_data", True): dict(eval_data=examples(12, seed=2)),
    ("eval_params", True): dict(eval_params=None),
    ("mc_samples", True): dict(optimizer=SAMPLING, mc_samples=2),
    ("predictive_samples", True): dict(optimizer=SAMPLING, predictive_samples=2),
    ("hooks", True): dict(hooks=[Call(lambda run: None), EarlyStopping()]),
    ("trainable", False): dict(trainable=nnx.PathContains("outer"), curvature=None, schedule=None),
}
SUBCLASS_EXAMPLES = {
    ("loss", True): dict(kind=Relabelled),
    ("predict", True): dict(kind=Relabelled),
    ("metrics", True): dict(kind=Relabelled),
    ("build_model", True): dict(model=Wider),
    ("build_model", False): dict(model=lambda rngs: Mlp(rngs, width=12)),
    ("the name of the class", False): dict(kind=Another),
}
EXAMPLES = {"TrainerConfig": CONFIG_EXAMPLES, "Trainer": TRAINER_EXAMPLES, "the Trainer's subclass": SUBCLASS_EXAMPLES}


def test_the_list_has_every_argument_and_an_example_of_each_line():
    names = lambda rules: {name for rule in rules for name in rule.names}
    assert names(CONFIG) == {field.name for field in dataclasses.fields(TrainerConfig)}
    assert names(TRAINER) == set(inspect.signature(Trainer.__init__).parameters) - {"self", "config"}
    meant_for_subclasses = {"loss", "build_model", "predict", "metrics"}
    assert meant_for_subclasses <= names(SUBCLASS)
    for owner, rules in OWNERS.items():
        assert {(name, rule.may_change) for rule in rules for name in rule.names} == EXAMPLES[owner].keys()
    assert as_text() in README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun") / "run"
    trainer(workdir=folder, steps=2, **BASE).fit()
    return folder


@pytest.mark.filterwarnings("ignore:TrainerConfig.best_metric")
@pytest.mark.parametrize(
    ("change", "may"),
    [pytest.param(change, may, id=f"{name}, {may}") for e in EXAMPLES.values() for (name, may), change in e.items()],
)
def test_the_list_is_true(begun, change, may, copied, capsys):
    options = {**BASE, "steps": 4, "workdir": copied(begun), **change}
    if may:
        result = trainer(options.pop("kind", Classifier), **options).fit()
        assert result.step == options["steps"] and np.isfinite(result.metrics["eval/loss"])
    else:
        with pytest.raises(Mismatch, match="belongs to another run"):
            trainer(options.pop("kind", Classifier), **options).fit()


@pytest.fixture
def copied(tmp_path):
    return lambda folder: shutil.copytree(folder, tmp_path / "run")


# -- the new program counts --------------------------------------------------------------------------------------------


def schedule(start, end):
    return lambda count: start + (end - start) * count / 10.0


RATES = {
    "a number": (lambda r: optax.sgd(r, momentum=0.9), 0.1, 0.003),
    "a schedule": (lambda r: optax.sgd(r), schedule(0.2, 0.1), schedule(0.01, 0.02)),
    "a schedule in place of a number": (lambda r: optax.adam(r), 0.1, schedule(0.01, 0.02)),
    "a number in place of a schedule": (lambda r: optax.adam(r), schedule(0.2, 0.1), 0.003),
    "the same, without moments": (lambda r: optax.sgd(r), schedule(0.2, 0.1), 0.003),
    "injected": (lambda r: optax.inject_hyperparams(optax.adam)(learning_rate=r), 0.1, 0.003),
    "injected, from an integer": (lambda r: optax.inject_hyperparams(optax.sgd)(learning_rate=r), 1, 0.003),
    "injected, schedules": (
        lambda r: optax.inject_hyperparams(optax.adam)(learning_rate=r, b1=0.8),
        schedule(0.2, 0.1),
        schedule(0.01, 0.02),
    ),
    "injected, a schedule in place of a number": (
        lambda r: optax.inject_hyperparams(optax.sgd)(learning_rate=r),
        0.1,
        schedule(0.01, 0.02),
    ),
    "injected, a number in place of a schedule": (
        lambda r: optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.adam)(learning_rate=r)),
        schedule(0.2, 0.1),
        0.003,
    ),
    "masked": (
        lambda r: optax.masked(optax.inject_hyperparams(optax.sgd)(learning_rate=r), {"inner": True, "outer": False}),
        0.1,
        0.003,
    ),
}


def by_hand(make, old, new, steps, change_at):
    """Plain optax, whose rate is `old` up to a step, and `new` from then on: the parameters."""
    rate = lambda r, count: r(count) if callable(r) else r
    graph, params = nnx.split(Mlp(nnx.Rngs(0)))
    params = nnx.to_pure_dict(params)
    data, batches = examples(), ArrayData(examples(), 16, seed=0).iterator()
    assert len(data["x"]) == 64

    def loss(p, batch):
        logits = nnx.merge(graph, nnx.State(p))(batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    both = lambda count: jnp.where(count < change_at, rate(old, count), rate(new, count))
    tx = make(both)
    state = tx.init(params)
    step = jax.jit(lambda p, s, b: tx.update(jax.grad(loss)(p, b), s, p))
    for _ in range(steps):
        updates, state = step(params, state, next(batches))
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", RATES)
def test_a_new_rate_counts_from_the_first_step_after_the_resume(name, tmp_path):
    make, old, new = RATES[name]
    right = by_hand(make, old, new, steps=7, change_at=4)
    trainer(optimizer=make(old), steps=4, workdir=tmp_path).fit()
    run = trainer(optimizer=make(new), steps=7, workdir=tmp_path)
    run.fit()
    assert_trees_close(run.state.params, right, rtol=2e-4, atol=2e-5)
    stayed = by_hand(make, old, old, steps=7, change_at=4)
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), run.state.params, stayed)
    assert max(jax.tree.leaves(apart)) > 1e-3


def test_what_changed_is_said(tmp_path, capsys):
    make = lambda rate: optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
    trainer(optimizer=make(0.1), steps=1, workdir=tmp_path).fit()
    trainer(optimizer=make(0.01), steps=2, workdir=tmp_path, progress=True).fit()
    line = "opt_state/hyperparams/learning_rate, which was 0.1, is 0.01 from now on"
    assert line in capsys.readouterr().out.splitlines()


def test_counters_of_a_schedule_begin_at_the_updates_done_not_at_the_step(tmp_path):
    """Of an optimizer that had skipped some: the new schedule counts like its other counters."""
    source = [{name: a[i : i + 16].copy() for name, a in examples().items()} for i in (0, 16, 32)]
    source[1]["x"][:] = np.nan
    data = grain.MapDataset.source(source).repeat()
    options = dict(train_data=data, nonfinite="skip", workdir=tmp_path, log_every=1)
    trainer(optimizer=optax.adam(0.1), steps=5, **options).fit()
    run = trainer(optimizer=optax.adam(schedule(0.1, 0.0)), steps=7, **options)
    run.fit()
    counts = [int(count) for count in (run.state.opt_state[0].count, run.state.opt_state[1].count)]
    assert counts == [5, 5]  # 7 steps, of which 2 and 5 were skipped


DAMPED = {
    "kfac": lambda d: optim.kfac(0.1, 0.9, d),
    "kfac, l2": lambda d: optim.kfac(0.1, 0.9, d, l2=1e-2),
    "natural_gradient": lambda d: optim.natural_gradient(0.1, d),
    "scale_by_curvature": lambda d: optax.chain(optim.scale_by_curvature(d), optax.sgd(0.1)),
}


@pytest.mark.parametrize("dampings", [(10.0, 0.1), (10.0, schedule(0.1, 0.2)), (schedule(10.0, 9.0), 0.1)])
@pytest.mark.parametrize("name", DAMPED)
def test_a_new_damping_counts_from_the_first_step_after_the_resume(name, dampings, tmp_path):
    """The first step after the resume is that of the same optimizer at the new damping, from the same state."""
    make, (old, new) = DAMPED[name], dampings
    options = dict(curvature=KFAC("exact"), schedule=CurvatureSchedule(refresh_every=2), workdir=tmp_path)
    trainer(optimizer=make(old), steps=4, **options).fit()  # the step after it refreshes
    run = trainer(optimizer=make(new), steps=5, **options)
    before = jax.device_get(run.state)
    run.fit()
    moved = jax.tree.map(lambda a, b: a - b, jax.device_get(run.state.params), before.params)
    damping = (new(4) if callable(new) else new) + (1e-2 if "l2" in name else 0.0)
    if not callable(new):
        assert abs(float(run.state.curvature.damping) - damping) < 1e-6  # the refresh was told
    curvature, batches = run.state.curvature, ArrayData(examples(), 16, seed=0).iterator()
    batch = [next(batches) for _ in range(5)][4]
    grads = jax.grad(lambda p: run.objective.loss(p, batch))(before.params)
    if "l2" in name:
        grads = jax.tree.map(lambda g, p: g + 1e-2 * p, grads, before.params)
    right = jax.tree.map(lambda v: -0.1 * v, curvature.solve(grads, damping))
    if "kfac" in name:
        right = jax.tree.map(lambda r, v: r + 0.9 * v, right, before.opt_state.velocity)
    assert_trees_close(moved, jax.device_get(right), rtol=1e-3, atol=1e-6)


def test_a_run_that_is_not_changed_has_the_losses_of_one_that_was_not_stopped(tmp_path):
    make = lambda: optax.inject_hyperparams(optim.kfac)(learning_rate=0.1, momentum=0.9, damping=0.3)
    options = dict(curvature=KFAC("exact"), schedule=CurvatureSchedule(refresh_every=3), log_every=1)
    whole = losses_of(trainer(optimizer=make(), steps=7, **options).fit())
    first = losses_of(trainer(optimizer=make(), steps=4, workdir=tmp_path, **options).fit())
    second = losses_of(trainer(optimizer=make(), steps=7, workdir=tmp_path, **options).fit())
    assert [*first.tolist(), *second.tolist()] == whole.tolist()
