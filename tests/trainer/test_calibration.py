"""Metrics of probabilities against NumPy over all examples at once."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CLASSES, Classifier, examples, trainer

from curvtrain.trainer import calibration

pytestmark = pytest.mark.usefixtures("quick_compile")


def expected(outputs, labels, weights=None):
    """The four metrics, in float64."""
    z = np.asarray(outputs, np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True)).reshape(-1, z.shape[-1])
    labels = labels.ravel()
    w = np.ones(len(labels)) if weights is None else weights.ravel().astype(np.float64)
    mean = lambda v: np.sum(w * v) / np.sum(w)
    confidence, right = p.max(1), p.argmax(1) == labels
    ece = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        ece += abs(np.sum(w[inside] * right[inside]) - np.sum(w[inside] * confidence[inside])) / np.sum(w)
    return {
        "nll": mean(-np.log(p[np.arange(len(p)), labels])),
        "brier": mean(((p - np.eye(p.shape[1])[labels]) ** 2).sum(1)),
        "entropy": mean(-(p * np.log(p)).sum(1)),
        "ece": ece,
    }


def found(outputs, labels, weights=None):
    """Those of the package, per example or as a metric."""
    return {
        "nll": calibration.negative_log_likelihood(outputs, labels),
        "brier": calibration.brier_score(outputs, labels),
        "entropy": calibration.predictive_entropy(outputs),
        "ece": calibration.CalibrationError.of(outputs, labels, weights),
    }


class Calibrated(Classifier):
    """A Trainer that reports them."""

    def metrics(self, outputs, batch):
        return found(5 * outputs, batch["label"], batch.get("mask"))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [24, 37, 100])
def test_exact_over_ragged_and_masked_batches(n, masked):
    data = examples(n, seed=1) | ({"mask": np.arange(n) % 3 != 1} if masked else {})
    run = trainer(
        Calibrated, eval_batch_size=24, train_data=examples() | ({"mask": np.ones(64, bool)} if masked else {})
    )
    scores = run.evaluate(data)
    wanted = expected(5 * run.model(jnp.asarray(data["x"])), data["label"], data.get("mask"))
    assert wanted["ece"] > 0.01
    for name, value in wanted.items():
        np.testing.assert_allclose(scores[name], value, rtol=5e-6, err_msg=name)


def test_in_training_and_in_micro_batches():
    """Reported for steps as well; pieces of a batch add up."""
    whole, pieces = (trainer(Calibrated, steps=1, accumulate=n, mesh={"data": 2, "tensor": 4}).fit() for n in (1, 2))
    for name in ("nll", "brier", "entropy", "ece"):
        np.testing.assert_allclose(whole.metrics[f"train/{name}"], pieces.metrics[f"train/{name}"], rtol=1e-5)


def test_sequences_and_extremes():
    rng = np.random.default_rng(0)
    z, labels = rng.normal(size=(4, 5, CLASSES)) * 3, rng.integers(0, CLASSES, (4, 5))
    weights = rng.uniform(size=(4, 5))
    got, wanted = found(jnp.asarray(z, jnp.float32), jnp.asarray(labels), weights), expected(z, labels, weights)
    np.testing.assert_allclose(got["ece"].compute(), wanted["ece"], rtol=1e-5)
    mean = lambda v: np.sum(weights * v) / np.sum(weights)
    for name in ("nll", "brier", "entropy"):
        np.testing.assert_allclose(mean(np.asarray(got[name])), wanted[name], rtol=1e-5)
    sure = found(jnp.asarray([[0.0, -jnp.inf, -jnp.inf]]), jnp.asarray([0]))
    assert sure["entropy"] == 0 and sure["brier"] == 0 and sure["ece"].compute() == 0
    nothing = calibration.CalibrationError.empty()
    assert nothing.compute() == 0 and nothing.merge(got["ece"]).compute() == got["ece"].compute()
