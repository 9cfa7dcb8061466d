"""Random keys: each is used for one purpose, and no purpose is an index or another purpose."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import curvtrain
from curvtrain import CurvatureSchedule, Objective, curvature, losses, optim
from curvtrain._keys import Purpose, fold

PACKAGE = Path(curvtrain.__file__).parent
KEY = jax.random.key(5)


def data(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_purposes_are_distinct_and_above_all_indices():
    assert len(Purpose) >= 12 and len({int(purpose) for purpose in Purpose}) == len(Purpose)
    assert all(2**31 <= purpose < 2**32 for purpose in Purpose)
    folded = {data(fold(KEY, purpose)) for purpose in Purpose}
    indexed = {data(jax.random.fold_in(KEY, index)) for index in range(2000)}
    split = {data(key) for key in jax.random.split(KEY, 2000)}
    assert len(folded) == len(Purpose) and split == indexed and not folded & indexed


def test_constants_are_folded_in_by_purpose_alone():
    """`fold_in` with a number in the source, or with a constant of a module, is a purpose that is not on the list."""
    found, purposes = [], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name.endswith("fold_in") and path.name != "_keys.py":
                folded = node.args[1]
                constant = isinstance(folded, ast.Constant) or (isinstance(folded, ast.Name) and folded.id.isupper())
                found += [f"{path.name}: {ast.unparse(node)}"] if constant or "_FIT" in ast.unparse(folded) else []
            elif name == "fold":
                purposes.add(ast.unparse(node.args[1]))
    assert found == []
    assert purposes == {f"Purpose.{purpose.name}" for purpose in Purpose}  # and each is used


class Net(nnx.Module):
    """Dropout, and noise of its own."""

    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
        self.drop, self.noise = nnx.Dropout(0.3, rngs=rngs), nnx.Rngs(noise=1)

    def __call__(self, x):
        h = self.drop(nnx.tanh(self.a(x)))
        return self.b(h + 0.1 * jax.random.normal(self.noise.noise(), h.shape))


class Trainer(curvtrain.Trainer):
    loss = losses.SoftmaxCrossEntropy()

    def build_model(self, rngs):
        return Net(rngs)

    def predict(self, model, batch):
        return model(batch["x"])


def batch(n):
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(n, 3)).astype(np.float32), "label": rng.integers(0, 2, n)}


@pytest.mark.parametrize(
    ("optimizer", "estimator"),
    [
        (lambda: optim.kfac(), curvature.KFAC("sampled")),
        (lambda: optim.psgd(1e-2), curvature.PSGD(fit="hessian", update_probability=0.5)),
        (lambda: optim.natural_gradient(0.1), curvature.DiagonalFisher("sampled")),
        (lambda: optim.vogn(0.1), curvature.DiagonalFisher("sampled")),
    ],
    ids=["KFAC", "PSGD", "DiagonalFisher", "draws"],
)
def test_no_key_is_used_twice_in_a_run(optimizer, estimator, quick_compile):
    """JAX's own checker reads the programs of a run and of its evaluation.

    Not of Lanczos: it multiplies by one Hessian, that under one draw of the model's noise, and its vectors are hashes
    of a key and a number; both use a key again, as they should.
    """
    config = curvtrain.TrainerConfig(steps=2, batch_size=16, accumulate=2, progress=False)
    schedule = CurvatureSchedule(refresh_every=1)
    with jax.debug_key_reuse(True):
        arguments = dict(train_data=batch(32), optimizer=optimizer(), curvature=estimator, schedule=schedule)
        if hasattr(arguments["optimizer"], "sample"):
            arguments |= dict(mc_samples=2, predictive_samples=2)
        trainer = Trainer(config, **arguments)
        trainer.fit()
        trainer.evaluate(batch(20))


def test_the_noise_of_a_model_is_not_that_of_its_targets():
    """A module's second random stream had the key from which targets were drawn."""
    objective, _ = Objective.from_model(Net(nnx.Rngs(0)), lambda m, b: m(b["x"]), losses.SoftmaxCrossEntropy())
    streams = objective._model.random_state(KEY)
    keys = [leaf for leaf in jax.tree.leaves(streams) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    assert len(keys) == 2
    used = {data(key) for key in keys} | {data(jax.random.fold_in(KEY, i)) for i in range(4)}
    assert data(fold(KEY, Purpose.TARGETS)) not in used and len({data(key) for key in keys}) == 2
