"""The run of every estimator that `test_meshes.py` repeats on many meshes; as a program, on several processes.

BatchNorm, LayerNorm and dropout; no parameter on which the loss does not depend: of those before a BatchNorm or a
softmax there are directions whose gradient is rounding alone, which an estimator that whitens gradients makes as large
as any other.
"""

import contextlib
import dataclasses
import json
import pickle
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding

import curvtrain
from curvtrain import losses, optim
from curvtrain.curvature import Lanczos
from curvtrain.curvature import mesh as curvature_mesh
from curvtrain.trainer.data import CURVATURE, TRAIN, ArrayData, own_positions
from curvtrain.trainer.disk.checkpoint import Checkpoints
from curvtrain.trainer.mesh import distributed, sharding
from curvtrain.trainer.mesh.sharding import path_name

sys.path.append(str(Path(__file__).parents[1]))  # as a program
from cases import CASES

FEATURES, WIDTH, OUTPUTS = 4, 8, 4
BATCH, STEPS = 32, 50
SAVED, ON = 25, 3  # steps until a checkpoint moves, and after it

# Every pair counts, and every refresh takes all of its products: no threshold for rounding to fall on either side of.
# Enough products for the pairs to converge: the vectors of unconverged ones amplify rounding.
LANCZOS = Lanczos(k=3, l=1, m=32, tol=1e9, stop=0.0)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.inner, self.batch = nnx.Linear(FEATURES, WIDTH, use_bias=False, rngs=rngs), nnx.BatchNorm(WIDTH, rngs=rngs)
        self.drop, self.layer = nnx.Dropout(0.2, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.outer = nnx.Linear(WIDTH, OUTPUTS, rngs=rngs)

    def __call__(self, x):
        return self.outer(self.layer(self.drop(nnx.tanh(self.batch(self.inner(x))))))


class Run(curvtrain.Trainer):
    loss = losses.SigmoidCrossEntropy(labels="label")

    def build_model(self, rngs):
        return Net(rngs)

    def predict(self, model, batch):
        return model(batch["x"])

    def metrics(self, outputs, batch):
        return {"order": batch["number"]}  # tells which examples were in a batch


def data(examples=256):
    """`number` squares spread, so that their mean tells batches apart."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, FEATURES)).astype(np.float32)
    label = (x @ rng.normal(size=(FEATURES, OUTPUTS)) > 0).astype(np.float32)
    return {"x": x, "label": label, "number": (np.arange(examples, dtype=np.float32) / 16) ** 2}


def make(name, hooks=(), **config):
    """The trainer of a case. Refreshes draw batches of their own."""
    case, own, schedule = CASES[name], {}, {"update_every": 1, "refresh_every": 2}
    if name == "Lanczos":
        own = {"curvature": LANCZOS, "optimizer": optim.fosi(optax.sgd(0.05, momentum=0.5))}
        schedule = {"refresh_every": 5}
    elif name == "FullBlock, hessian":
        schedule = {"update_every": 2, "refresh_every": 2}
    elif name == "GradientKronecker":  # of a factor without full rank a basis is arbitrary: rounding would choose it
        own = {"curvature": dataclasses.replace(case.estimator, max_size=4)}
    options = {"steps": STEPS, "batch_size": BATCH, "log_every": 1, "ema": 0.9, "progress": False}
    return Run(
        curvtrain.TrainerConfig(**{**options, **config}),
        train_data=data(),
        schedule=curvtrain.CurvatureSchedule(**schedule, batch_size=2 * BATCH),
        hooks=hooks,
        **{"curvature": case.estimator, "optimizer": case.optimizer(), **own},
    )


@contextlib.contextmanager
def split_all():
    """Small arrays are split over the mesh too."""
    modules = (sharding, curvature_mesh)
    before = [module.SMALLEST for module in modules]
    for module in modules:
        module.SMALLEST = 1
    yield
    for module, smallest in zip(modules, before, strict=True):
        module.SMALLEST = smallest


def history(result):
    """Rows of every step: (its number, its loss, the mean that identifies its batch)."""
    return np.array([(row["step"], row["train/loss"], row["train/order"]) for row in result.history])


def shards(state):
    """[(path, index, values)] of all that the devices of this process hold of a state."""
    raw = lambda a: jax.random.key_data(a) if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else a
    found = [(path_name(path), raw(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]
    return [(path, shard.index, np.asarray(shard.data)) for path, a in found for shard in a.addressable_shards]


def assert_same_bits(pieces, whole):
    """Shards are what arrays have in their places."""
    assert {path for path, *_ in pieces} == set(whole)
    same = lambda path, index, values: whole[path][index].tobytes() == values.tobytes()
    assert [path for path, *rest in pieces if not same(path, *rest)] == []


def assert_planned(trainer, state):
    """Every leaf is where the trainer's plan has it."""
    there = lambda a, s: isinstance(a.sharding, NamedSharding) and a.sharding.is_equivalent_to(s, a.ndim)
    assert all(jax.tree.leaves(jax.tree.map(there, state, trainer._plan.layout.shardings)))


def assert_opens(trainer, whole):
    """The checkpoint in the workdir is, bit by bit, these arrays, and the next batches are those that were due."""
    plan = trainer._plan
    with Checkpoints(trainer.config) as checkpoints:
        state, meta = checkpoints.restore(plan.layout.state, plan.description())
    assert_planned(trainer, state)
    assert_same_bits(shards(state), whole)
    shard, count = sharding.process_rows(plan.mesh)
    positions, due = own_positions(meta["positions"]), ArrayData(data(), BATCH, plan.config.seed)
    refreshed = sum(plan.programs.kind(step).refresh for step in range(SAVED))
    for stream, kind, drawn, multiple in ((TRAIN, "train", SAVED, 1), (CURVATURE, "curvature", refreshed, 2)):
        here, there = plan.data.iterator(stream, multiple), due.iterator(stream, multiple)
        here.set_state(positions[kind])
        for _ in range(drawn):
            next(there)
        np.testing.assert_array_equal(next(here)["number"], np.split(next(there)["number"], count)[shard])
    return state


def main(folder, steps):
    """Trains each case from the start for its number of steps, and opens the checkpoint in its folder on another mesh.

    Of those that take all steps, ON more from that checkpoint.
    """
    distributed.start()  # optimizers are made before their trainers
    for name, count in steps.items():
        case = Path(folder) / name
        fresh = make(name, workdir=case / "two", steps=count, mesh={"data": 2, "tensor": 4})
        told = {"fresh": history(fresh.fit())}
        (case / f"{jax.process_index()}.shards").write_bytes(pickle.dumps(shards(fresh.state)))

        with split_all():
            moved = make(name, workdir=case / "moved", steps=SAVED + ON, mesh={"fsdp": 8}, sharding="fsdp")
            with np.load(case / "saved.npz") as saved:
                assert_opens(moved, dict(saved))
            if count == STEPS:
                told["moved"] = history(moved.fit())
        if jax.process_index() == 0:
            np.savez(case / "told.npz", **told)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
