"""Metrics against direct means in NumPy."""

import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clu import metrics as clu_metrics
from tiny import CLASSES, FEATURES, Classifier, Noisy, examples, losses_of, trainer

from curvtrain import losses
from curvtrain.trainer.watch.metrics import Mean, compute, measure, merge, reduce_pieces

pytestmark = pytest.mark.usefixtures("quick_compile")

# Means of up to a hundred float32 numbers of order 1, summed in another order than NumPy's float64.
CLOSE = dict(rtol=2e-6)


def cross_entropy(logits, labels):
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    return -np.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]


def expected(run, data):
    """Weighted means of loss and accuracy over all of `data` at once, from the model's outputs."""
    outputs = np.asarray(run.model(jnp.asarray(data["x"])))
    values = cross_entropy(outputs, data["label"])
    weights = np.ones(values.shape)
    for name in ("mask", "weights"):
        entry = np.asarray(data.get(name, np.ones(len(values))), np.float64)
        weights = weights * entry.reshape(entry.shape + (1,) * (weights.ndim - entry.ndim))
    mean = lambda v: np.sum(weights * v) / np.sum(weights)
    return {"loss": mean(values), "accuracy": mean(outputs.argmax(-1) == data["label"])}


def assert_scores(found, wanted):
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([found[name] for name in wanted], list(wanted.values()), **CLOSE)


@pytest.fixture(scope="module")
def run():
    return trainer(model=Noisy, eval_batch_size=24)


@pytest.mark.parametrize("n", [1, 24, 37, 100])
def test_evaluate_is_exact_over_a_ragged_last_batch(run, n):
    data = examples(n, seed=1)
    assert_scores(run.evaluate(data), expected(run, data))


@pytest.mark.parametrize("entries", [("mask",), ("weights",), ("mask", "weights")])
def test_evaluate_honours_the_weights_of_the_data(run, entries):
    rng = np.random.default_rng(0)
    own = {"mask": rng.random(37) < 0.6, "weights": rng.uniform(0.1, 3, 37).astype(np.float32)}
    data = examples(37, seed=1) | {name: own[name] for name in entries}
    assert_scores(run.evaluate(data), expected(run, data))


def test_masked_examples_may_hold_anything(run):
    data = examples(37, seed=1) | {"mask": np.arange(37) % 2 == 0}
    spoilt = {**data, "weights": np.where(data["mask"], 1, np.float32(1e30)).astype(np.float32)}
    assert_scores(run.evaluate(spoilt), expected(run, data))


def test_evaluate_takes_batches_of_any_size(run):
    data = examples(37, seed=1)
    pieces = grain.MapDataset.range(37).map(lambda i: {name: a[i] for name, a in data.items()}).batch(5)
    assert run.evaluate(pieces) == run.evaluate(data)


def test_all_masked_is_zero_as_for_an_objective(run):
    scores = run.evaluate(examples(8) | {"mask": np.zeros(8, bool)})
    assert scores == {"loss": 0.0, "accuracy": 0.0}


# -- sequences ---------------------------------------------------------------------------------------------------------


def sequences(n, time=5):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, time, FEATURES)).astype(np.float32)
    mask = rng.random((n, time)) < 0.7
    return {"x": x, "label": rng.integers(0, CLASSES, (n, time)).astype(np.int32), "mask": mask}


def test_positions_count_one_by_one():
    run = trainer(train_data=sequences(64))
    data = sequences(21)
    assert_scores(run.evaluate(data), expected(run, data))
    by_example = {**data, "mask": np.arange(21) < 9}
    assert_scores(run.evaluate(by_example), expected(run, by_example))


# -- training ----------------------------------------------------------------------------------------------------------


def still(**options):
    """A run whose parameters do not move, so that its metrics can be computed afterwards."""
    return trainer(optimizer=optax.sgd(0.0), steps=4, log_every=4, **options)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logged_metrics_are_means_over_the_window(accumulate):
    data = examples(64)  # four batches: the window is the whole data
    run = still(train_data=data, accumulate=accumulate)
    (row,) = run.fit().history
    assert_scores({name: row[f"train/{name}"] for name in ("loss", "accuracy")}, expected(run, data))


def test_micro_batches_with_different_weights_are_averaged_by_weight():
    data = examples(64) | {"weights": np.arange(64, dtype=np.float32), "mask": np.arange(64) % 3 > 0}
    run = still(train_data=data, accumulate=2)
    (row,) = run.fit().history
    assert_scores({name: row[f"train/{name}"] for name in ("loss", "accuracy")}, expected(run, data))


def test_a_fully_masked_batch_is_not_a_divergence():
    result = trainer(train_data=examples(64) | {"mask": np.arange(64) == 0}, log_every=1).fit()
    assert np.sort(losses_of(result)).tolist()[:3] == [0.0] * 3 and losses_of(result).max() > 0


# -- metrics of a subclass ---------------------------------------------------------------------------------------------


@flax.struct.dataclass
class Largest(clu_metrics.Metric):
    """The largest output: a metric that is not a mean."""

    value: jax.Array

    def merge(self, other):
        return Largest(jnp.maximum(self.value, other.value))

    def compute(self):
        return self.value


class Reporting(Classifier):
    def metrics(self, outputs, batch):
        values = losses.SoftmaxCrossEntropy().metrics(outputs, batch)
        return {"error": 1 - values["accuracy"], "largest": Largest(jnp.max(outputs))}


def test_metrics_are_a_subclass_s_own_beside_the_loss():
    run = trainer(Reporting, accumulate=2)
    data = examples(37, seed=1)
    found, wanted = run.evaluate(data), expected(run, data)
    outputs = run.model(jnp.asarray(data["x"]))
    assert_scores(found, {"loss": wanted["loss"], "error": 1 - wanted["accuracy"], "largest": float(outputs.max())})
    assert {"train/loss", "train/error", "train/largest"} <= run.fit().metrics.keys()


class Misreporting(Classifier):
    def metrics(self, outputs, batch):
        return {"loss": jnp.full(outputs.shape[0], jnp.nan)}


def test_the_loss_is_always_the_loss():
    run = trainer(Misreporting)
    data = examples(37)
    np.testing.assert_allclose(run.evaluate(data)["loss"], expected(run, data)["loss"], **CLOSE)
    run.fit()  # the metric that is not finite is not taken for a divergence


class Doubled(losses.SoftmaxCrossEntropy):
    """A loss that weights its examples by their label."""

    def weights(self, outputs, batch):
        return super().weights(outputs, batch) * batch["label"].astype(jnp.float32)


class Weighted(Classifier):
    loss = Doubled()


def test_the_loss_is_reported_with_its_own_weights():
    run, data = trainer(Weighted), examples(37)
    wanted = expected(run, data | {"weights": data["label"].astype(np.float64)})
    np.testing.assert_allclose(run.evaluate(data)["loss"], wanted["loss"], **CLOSE)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (lambda outputs: [outputs], TypeError, r"Classifier\.metrics should return a dict, not list"),
        (lambda outputs: {"norm": jnp.sum(outputs)}, ValueError, r"Trainer\.metrics\['norm'\] is a scalar; return one"),
        (
            lambda outputs: {"columns": jnp.sum(outputs, axis=0)},
            ValueError,
            r"Trainer\.metrics\['columns'\] has shape \(3,\) for a batch of 16 examples",
        ),
        (
            lambda outputs: {"array": Largest(jnp.max(outputs, axis=0))},
            ValueError,
            r"Trainer\.metrics\['array'\] computes an array of shape \(3,\)",
        ),
    ],
    ids=["list", "scalar", "not per example", "array metric"],
)
def test_metrics_errors(values, error, message, monkeypatch):
    monkeypatch.setattr(Classifier, "metrics", lambda self, outputs, batch: values(outputs))
    with pytest.raises(error, match=message):
        trainer().evaluate(examples(16))


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_measure_merge_and_reduce_agree():
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=(4, 8)).astype(np.float32), rng.random((4, 8)).astype(np.float32)
    pieces = [measure({"v": v}, w) for v, w in zip(values, weights, strict=True)]
    merged = merge(None, pieces[0])
    for piece in pieces[1:]:
        merged = merge(merged, piece)
    reduced = reduce_pieces(jax.tree.map(lambda *a: jnp.stack(a), *pieces))
    wanted = np.average(values, weights=weights)
    np.testing.assert_allclose([compute(merged)["v"], compute(reduced)["v"]], wanted, rtol=1e-5)  # cancellation


def test_a_value_of_weight_zero_may_be_anything():
    mean = Mean.of(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([1.0, 0.0, 3.0]))
    assert float(mean.compute()) == 2.5


def test_measured_values_may_be_in_half_precision():
    mean = measure({"v": jnp.full(16, 0.1, jnp.bfloat16)}, jnp.ones(16))["v"]
    assert mean.total.dtype == jnp.float32


def test_nothing_measured_is_nothing_computed():
    assert compute(None) == {}
