"""Every optimizer with every estimator: each pair goes together or is refused, as the README says."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from curvtrain import CurvatureSchedule, Objective, losses, optim
from curvtrain.curvature import (
    KFAC,
    PSGD,
    DiagonalFisher,
    FullBlock,
    GradientKronecker,
    InverseFree,
    InverseFreeKFAC,
    KroneckerDiagonal,
    Lanczos,
    UnitWise,
)

README = Path(__file__).resolve().parents[2] / "README.md"
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
BATCH = {"x": jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32), "label": jnp.asarray(RNG.integers(0, 4, 8))}

OPTIMIZERS = {
    "fosi(base)": lambda: optim.fosi(optax.sgd(0.1)),
    "kfac()": lambda: optim.kfac(),
    "natural_gradient(rate)": lambda: optim.natural_gradient(0.1),
    "scale_by_curvature(damping)": lambda: optim.scale_by_curvature(0.1),
    "scale_by_curvature(damping, -0.5)": lambda: optim.scale_by_curvature(0.1, -0.5),
    "vogn(rate)": lambda: optim.vogn(0.1, 50.0),
    "log_vogn(rate)": lambda: optim.log_vogn(0.1, 50.0),
    "psgd(rate)": lambda: optim.psgd(0.1),
    "adafisher(rate)": lambda: optim.adafisher(0.1),
    "adafisherw(rate)": lambda: optim.adafisherw(0.1),
    "adafisher(rate, faithful=True)": lambda: optim.adafisher(0.1, faithful=True),
    "soap(rate)": lambda: optim.soap(0.1),
    "shampoo(rate)": lambda: optim.shampoo(0.1),
    "kl_shampoo(rate)": lambda: optim.kl_shampoo(0.1),
    "sirfshampoo(rate)": lambda: optim.sirfshampoo(0.1),
    "if_shampoo(rate)": lambda: optim.if_shampoo(0.1),
    "singd(rate)": lambda: optim.singd(0.1),
}
ESTIMATORS = {
    "Lanczos": Lanczos(k=2),
    "KFAC": KFAC(),
    'KFAC(inverse="eigh")': KFAC(inverse="eigh"),
    "DiagonalFisher": DiagonalFisher(),
    "KroneckerDiagonal": KroneckerDiagonal(),
    "KroneckerDiagonal(faithful=True)": KroneckerDiagonal(faithful=True),
    "UnitWise": UnitWise(),
    "FullBlock": FullBlock(),
    "GradientKronecker": GradientKronecker(),
    "InverseFree": InverseFree(),
    "InverseFreeKFAC": InverseFreeKFAC(),
    "PSGD": PSGD(),
}
REFUSALS = re.compile(r"takes|draws with the root|has no power -0\.5|kfac|natural_gradient")


def promised():
    """{(optimizer, estimator): whether they go together}, from the table in the README."""
    lines = [line.strip() for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    start = next(i for i, line in enumerate(lines) if line.startswith("| optimizer |"))
    cells = lambda line: [cell.strip().strip("`") for cell in line.strip("|").split("|")]
    _, *estimators = cells(lines[start])
    found = {}
    for line in lines[start + 2 :]:
        name, *marks = cells(line)
        if len(marks) != len(estimators):
            break
        found |= {(name, estimator): mark == "yes" for estimator, mark in zip(estimators, marks, strict=True)}
    return found


TABLE = promised()


def test_the_table_has_every_pair():
    assert TABLE.keys() == {(optimizer, estimator) for optimizer in OPTIMIZERS for estimator in ESTIMATORS}


@pytest.mark.parametrize(("optimizer", "estimator"), TABLE)
def test_each_pair_goes_together_or_is_refused(optimizer, estimator):
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    objective, params = Objective.from_model(model, lambda m, b: m(b["x"]), losses.SoftmaxCrossEntropy())
    tx = optim.self_contained(OPTIMIZERS[optimizer](), ESTIMATORS[estimator], CurvatureSchedule(), objective)

    def step(params):  # traced and never compiled
        state = tx.init(params)
        value, grads, _, _ = objective.value_and_grad(params, BATCH, KEY)
        return tx.update(grads, state, params, batch=BATCH, key=KEY, value=value, grad=grads)[0]

    if TABLE[optimizer, estimator]:
        updates = jax.eval_shape(step, params)
        assert jax.tree.map(lambda u: u.shape, updates) == jax.tree.map(lambda p: p.shape, params)
    else:
        with pytest.raises(TypeError, match=REFUSALS):
            jax.eval_shape(step, params)
