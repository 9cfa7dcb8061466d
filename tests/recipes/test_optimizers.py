"""Every optimizer of the recipes, by its name: it learns the digits at its default rate."""

import dataclasses
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
from meshes import on

import curvtrain

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "recipes"))

import classification
from common import images
from common.optimizers import ADAPTIVE, OptimizerName, chosen

NAMES = typing.get_args(OptimizerName)
STEPS = 200
pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def data():
    return images.load_images("digits")


def train(name, data, **options):
    options = dataclasses.replace(classification.Options(), optimizer=name, steps=STEPS, sizes=(32,), k=4, **options)
    rate = classification.RATES.get(name)
    trainer = classification.ClassifierTrainer(
        curvtrain.TrainerConfig(steps=STEPS, batch_size=128, mesh={"data": 1}, progress=False, log_every=20),
        data=data,
        model=options.model,
        sizes=options.sizes,
        **chosen(options, name, rate, STEPS),
    )
    return trainer.fit()


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_the_digits_at_its_default_rate(name, data, monkeypatch):
    on(1, monkeypatch)
    assert train(name, data).metrics["train/loss"] < 0.5


def test_a_rate_falls_to_zero_along_a_cosine(data):
    tx = chosen(classification.Options(decay="cosine"), "sgd", 0.5, 10)["optimizer"]
    state = tx.init(1.0)
    found = []
    for _ in range(11):
        update, state = tx.update(np.float32(1.0), state)
        found.append(float(update))
    np.testing.assert_allclose(found, -0.25 * (1 + np.cos(np.pi * np.arange(11) / 10)), atol=1e-7)


def test_every_recipe_says_what_it_has_no_rate_for():
    for name in NAMES:
        if name not in ADAPTIVE:
            with pytest.raises(ValueError, match=f"--optimizer {name} needs --learning-rate: this recipe has none"):
                chosen(classification.Options(), name, None, 10)
    with pytest.raises(ValueError, match="--optimizer adamqlr takes its rates from the loss: leave out"):
        chosen(classification.Options(), "adamqlr", 0.1, 10)
