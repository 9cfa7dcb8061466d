"""Tiny models, data and an estimator that the Trainer's tests share. All run on eight devices in a second or two."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from curvtrain import Trainer, TrainerConfig, losses
from curvtrain.curvature import Curvature, CurvatureEstimator

FEATURES, CLASSES = 6, 3


def examples(n=64, seed=0):
    """n examples whose label depends on their features."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, FEATURES)).astype(np.float32)
    return {"x": x, "label": np.argmax(x[:, :CLASSES] + 0.1 * rng.normal(size=(n, CLASSES)), axis=-1).astype(np.int32)}


class Mlp(nnx.Module):
    """Two layers, no state."""

    def __init__(self, rngs, width=8, dtype=jnp.float32):
        self.inner = nnx.Linear(FEATURES, width, param_dtype=dtype, rngs=rngs)
        self.outer = nnx.Linear(width, CLASSES, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.outer(nnx.tanh(self.inner(x)))


class Noisy(nnx.Module):
    """Two layers with BatchNorm and Dropout."""

    def __init__(self, rngs, width=8):
        self.inner, self.norm = nnx.Linear(FEATURES, width, rngs=rngs), nnx.BatchNorm(width, rngs=rngs)
        self.drop, self.outer = nnx.Dropout(0.3, rngs=rngs), nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.outer(self.drop(nnx.tanh(self.norm(self.inner(x)))))


class Classifier(Trainer):
    """A Trainer of any of these models. `traces` counts how often `predict` was traced."""

    loss = losses.SoftmaxCrossEntropy(labels="label")

    def __init__(self, config, *, model=Mlp, **options):
        self.model_of, self.traces = model, 0
        super().__init__(config, **options)

    def build_model(self, rngs):
        return self.model_of(rngs)

    def predict(self, model, batch):
        self.traces += 1
        return model(batch["x"])


OPTIONS = (
    "train_data",
    "eval_data",
    "optimizer",
    "curvature",
    "schedule",
    "hooks",
    "eval_params",
    "trainable",
    "mc_samples",
    "predictive_samples",
    "model",
)


def trainer(kind=Classifier, **options):
    """A silent Classifier of 64 examples in batches of 16; options are those of the Trainer and of its config."""
    config = dict(steps=4, batch_size=16, progress=False) | {k: v for k, v in options.items() if k not in OPTIONS}
    rest = dict(train_data=examples(), optimizer=optax.sgd(0.1)) | {k: v for k, v in options.items() if k in OPTIONS}
    return kind(TrainerConfig(**config), **rest)


def losses_of(result):
    """The logged training losses, in order; every step's with log_every=1."""
    return np.array([row["train/loss"] for row in result.history if "train/loss" in row])


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts(Curvature):
    """The identity, and what has happened to it. `damping` is that of the last refresh, -1 if there was none."""

    updates: jax.Array
    refreshes: jax.Array
    examples: jax.Array
    damping: jax.Array

    def matvec(self, vector):
        return vector

    def solve(self, vector, damping):
        return jax.tree.map(lambda v: v / (1.0 + damping), vector)

    def telemetry(self):
        return {"updates": self.updates, "refreshes": self.refreshes}


@dataclasses.dataclass(frozen=True)
class Counting(CurvatureEstimator[Counts]):
    """An estimator that costs nothing to compile and records its calls."""

    absorbs: Any = True
    factorises: Any = True

    def init(self, objective, params):
        return Counts(jnp.int32(0), jnp.int32(0), jnp.int32(0), jnp.float32(-1))

    def update(self, curvature, objective, params, batch, key, *, grads=None):
        return dataclasses.replace(curvature, updates=curvature.updates + 1)

    def refresh(self, curvature, objective, params, batch, key, damping=None):
        return dataclasses.replace(
            curvature,
            refreshes=curvature.refreshes + 1,
            examples=jnp.int32(jax.tree.leaves(batch)[0].shape[0]),
            damping=jnp.float32(-1 if damping is None else damping),
        )

    def partition_specs(self, curvature, param_specs, mesh):
        return jax.tree.map(lambda _: PartitionSpec(), curvature)
