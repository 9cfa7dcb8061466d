"""All that a loss reads is checked in every batch, in training and evaluation; padding counts in no metric."""

import clu.metrics
import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import CLASSES, FEATURES, Classifier, examples, trainer

from curvtrain import losses

pytestmark = pytest.mark.usefixtures("quick_compile")

CLOSE = dict(rtol=2e-6)  # means of up to a hundred float32 numbers of order one, in another order than NumPy's


def regression(n, seed=0):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(n, FEATURES)).astype(np.float32), "label": rng.random((n, CLASSES), np.float32)}


class Regressor(Classifier):
    loss = losses.SigmoidCrossEntropy()


def batches_with(bad, kind=examples, at=1):
    """A grain dataset of four batches of 16, of which one is changed."""
    elements = [kind(16, seed) for seed in range(4)]
    elements[at] = bad({name: a.copy() for name, a in elements[at].items()})
    return grain.MapDataset.source(elements)


def put(name, value, row=3):
    """A change of one row of an entry."""

    def change(batch):
        entry = batch.get(name, np.ones(16, np.float32))
        entry[row] = value
        return {**batch, name: entry}

    return change


def weighted(n, seed=0):
    return examples(n, seed) | {"weights": np.ones(n, np.float32), "mask": np.ones(n, np.float32)}


# (Trainer, examples, a change, error) of a batch that is not the first
BAD = {
    "negative label": (Classifier, examples, put("label", -1), r"label.*from -1 to 2.*\[0, 2\]"),
    "label too large": (Classifier, examples, put("label", 7), r"label.*from 0 to 7.*\[0, 2\]"),
    "probability too large": (Regressor, regression, put("label", 1.5), r"label.*to 1.5"),
    "target that is not finite": (Regressor, regression, put("label", np.nan), "'label' holds values that are not"),
    "negative weight": (Classifier, weighted, put("weights", -1), r"batch\['weights'\] .*holds -1"),
    "weight that is not finite": (Classifier, weighted, put("weights", np.inf), r"batch\['weights'\] .*holds inf"),
    "additive mask": (Classifier, weighted, put("mask", -1e9), r"batch\['mask'\] .*additive mask"),
    "another dtype": (
        Classifier,
        examples,
        lambda batch: {**batch, "label": batch["label"].astype(np.int8)},
        r"yields 'label' as int8 with rows of shape \(\) after int32",
    ),
    "another shape": (
        Classifier,
        examples,
        lambda batch: {**batch, "x": batch["x"][:, :2]},
        r"yields 'x' as float32 with rows of shape \(2,\) after float32 with rows of shape \(6,\)",
    ),
    "another entry": (
        Classifier,
        examples,
        lambda batch: {**batch, "y": batch["x"]},
        "of the same entries; y is not in all",
    ),
    "a missing entry": (
        Classifier,
        examples,
        lambda batch: {"x": batch["x"]},
        "of the same entries; label is not in all",
    ),
    "ragged": (
        Classifier,
        examples,
        lambda batch: {**batch, "x": batch["x"][:3]},
        r"should have arrays of one length.*\{'x': 3, 'label': 16\}",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_later_batch_that_the_loss_cannot_take(name):
    kind, made, change, message = BAD[name]
    dataset = batches_with(change, made)
    run = trainer(kind, train_data=dataset.repeat())
    with pytest.raises(ValueError, match=message):
        run.fit()
    with pytest.raises(ValueError, match=message):
        run.evaluate(dataset)


@pytest.mark.parametrize("multiple", [1, 2])
def test_a_short_batch_names_the_data_and_the_way_out(multiple):
    rows = grain.MapDataset.range(40).map(lambda i: {name: a[0] for name, a in examples(1, i).items()})
    dataset = rows.batch(16).repeat()  # 16, 16, 8
    run = trainer(train_data=dataset, steps=8)
    message = r"train_data yields a batch of 8 examples after batches of 16: .*\.batch\(16, drop_remainder=True\)"
    with pytest.raises(ValueError, match=message):
        run.fit()


def test_what_stands_under_a_mask_is_not_looked_at():
    def change(batch):
        batch["label"][:4], batch["mask"][:4] = -100, 0
        return batch

    data = batches_with(change, weighted)
    run = trainer(train_data=data.repeat())
    assert np.isfinite(run.fit().metrics["train/loss"]) and np.isfinite(run.evaluate(data)["loss"])


# -- names -------------------------------------------------------------------------------------------------------------


class Pixels(Classifier):
    """Predicts the class of every pixel, which the data calls mask."""

    loss = losses.SoftmaxCrossEntropy("mask")

    def build_model(self, rngs):
        return nnx.Linear(FEATURES, CLASSES, rngs=rngs)


def pixels(n, classes=CLASSES):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 2, 2, FEATURES)).astype(np.float32)
    return {"x": x, "mask": rng.integers(0, classes, (n, 2, 2)).astype(np.int32)}


def scores(z, labels, counted=True):
    """(loss, accuracy) over the labels that count, in float64."""
    z = np.asarray(z, np.float64)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    counted = np.broadcast_to(counted, labels.shape)
    value = -np.take_along_axis(log_p, np.where(counted, labels, 0)[..., None], -1)[..., 0]
    return value[counted].mean(), (z.argmax(-1) == labels)[counted].mean()


@pytest.mark.parametrize("classes", [2, CLASSES])
def test_a_segmentation_target_called_mask(classes):
    """Over 21 images in batches of 16, so that the last one is padded."""
    data = pixels(21, classes)
    run = trainer(Pixels, train_data=pixels(16, classes), optimizer=optax.sgd(0.0), log_every=1, steps=1)
    want = scores(run.model(data["x"]), data["mask"])
    found = run.evaluate(data)
    np.testing.assert_allclose((found["loss"], found["accuracy"]), want, **CLOSE)
    logged = run.fit().metrics
    want = scores(run.model(data["x"][:16]), pixels(16, classes)["mask"])
    np.testing.assert_allclose((logged["train/loss"], logged["train/accuracy"]), want, **CLOSE)


class Padded(Pixels):
    loss = losses.SoftmaxCrossEntropy(ignore_index=-100)


def test_ignored_labels_count_in_no_metric():
    data = pixels(21)
    data["label"] = np.where(data.pop("mask") == 1, -100, 2)
    data["label"][4:6] = -100
    run = trainer(Padded, train_data=data)
    found = run.evaluate(data)
    want = scores(run.model(data["x"]), data["label"], data["label"] >= 0)
    np.testing.assert_allclose((found["loss"], found["accuracy"]), want, **CLOSE)
    assert np.isfinite(run.fit().metrics["train/loss"])


class PerSequence(Padded):
    """A metric of whole images beside a loss of pixels."""

    def metrics(self, outputs, batch):
        return {"largest": jnp.max(outputs, axis=(1, 2, 3))}


def test_a_metric_of_whole_examples_counts_those_of_which_something_counts():
    data = pixels(21)
    data["label"] = data.pop("mask")
    data["label"][:5] = -100
    data["label"][5, 0] = -100
    run = trainer(PerSequence, train_data=data)
    largest = np.asarray(run.model(data["x"])).max((1, 2, 3))[5:].mean()
    np.testing.assert_allclose(run.evaluate(data)["largest"], largest, **CLOSE)


# -- classes of clu ----------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class Rows(clu.metrics.Metric):
    """How many rows it was given."""

    count: jax.Array

    @classmethod
    def empty(cls):
        return cls(jnp.int32(0))

    def merge(self, other):
        return Rows(self.count + other.count)

    def compute(self):
        return self.count


class ByClu(Classifier):
    def metrics(self, outputs, batch):
        right = jnp.argmax(outputs, -1) == batch["label"]
        return {
            "accuracy": clu.metrics.Accuracy.from_model_output(logits=outputs, labels=batch["label"]),
            "mean": clu.metrics.Average.from_model_output(outputs[:, 0]),
            "rows": Rows(jnp.int32(len(outputs))),
            "own": right,
        }


@pytest.mark.parametrize("n", [5, 16, 37, 64])
def test_metrics_of_clu_count_no_padding(n):
    data = examples(n, seed=2)
    run = trainer(ByClu)
    z = np.asarray(run.model(data["x"]), np.float64)
    _, accuracy = scores(z, data["label"])
    found = run.evaluate(data)
    assert found["rows"] == n
    want = dict(accuracy=accuracy, own=accuracy, mean=z[:, 0].mean())
    np.testing.assert_allclose([found[name] for name in want], list(want.values()), rtol=1e-5)  # the mean cancels


@pytest.mark.parametrize("kind", [Classifier, ByClu])
def test_a_padded_batch_takes_a_program_of_its_own_only_for_metrics_that_count_rows(kind):
    run = trainer(kind)
    for n in (32, 37, 37, 5):
        run.evaluate(examples(n))
    assert run._plan.programs.evaluate._cache_size() == (1 if kind is Classifier else 2)
