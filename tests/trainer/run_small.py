"""A small run with everything random in it, as a program: `python run_small.py '{"workdir": ..., "steps": ...}'`.

Dropout, BatchNorm, shuffling, an average of the parameters, FOSI, and Lanczos on a curvature batch of its own; with
`"estimator": "kfac"`, K-FAC's optimizer on sampled Kronecker factors instead, with "psgd" whitened momentum, with
"none" SGD. With `"train_data": "grain"` a grain pipeline makes its batches. It prints a line after every step, and at
the end writes every leaf of the state and the positions of the data to `out`. One of several processes says which one
it is and prints its last metrics, and process 0 writes. The tests import it for the same run in their own process.
"""

import json
import resource
import sys
import time
from pathlib import Path

import grain
import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

import curvtrain
from curvtrain import curvature, losses, optim
from curvtrain.trainer import Hook, distributed
from curvtrain.trainer.disk import saving

BATCH = 16


class Net(nnx.Module):
    def __init__(self, rngs, width=16, dtype=np.float32):
        # no bias before BatchNorm: its gradient is rounding alone, which Adam makes as large as any other
        self.fc1 = nnx.Linear(8, width, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.fc2 = nnx.Linear(width, 4, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.fc2(self.drop(nnx.relu(self.norm(self.fc1(x)))))


class Small(curvtrain.Trainer):
    loss = losses.SoftmaxCrossEntropy(labels="label")
    width, dtype = 16, np.float32

    def build_model(self, rngs):
        return Net(rngs, self.width, self.dtype)

    def predict(self, model, batch):
        return model(batch["x"])

    def metrics(self, outputs, batch):
        return {"order": batch["number"]}  # tells which examples were in a batch


def say(*words):
    """A line at once: of an unbuffered print the pieces may come among those of other processes."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


class Remember(Hook):
    """Prints every step, sleeps, and remembers over restarts at which steps it was called."""

    def __init__(self, sleep=0.0, quiet=False):
        self.steps, self._sleep, self._quiet = [], sleep, quiet

    def __call__(self, run):
        self.steps.append(run.step)
        if not self._quiet:
            say("step", run.step)
        time.sleep(self._sleep)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def data(examples=200, seed=0):
    """Arrays of a task with four classes; `number` squares spread, so that their mean tells batches apart."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, 8)).astype(np.float32)
    label = (x @ rng.normal(size=(8, 4))).argmax(-1).astype(np.int32)
    return {"x": x, "label": label, "number": (np.arange(examples, dtype=np.float32) / 16) ** 2}


def pipeline(rows):
    """The same examples one by one, shuffled, repeated and batched by grain, read ahead by its threads."""
    source = [{name: array[i] for name, array in rows.items()} for i in range(len(rows["x"]))]
    return grain.MapDataset.source(source).seed(3).shuffle().repeat().batch(BATCH, drop_remainder=True)


def make(cls=Small, hooks=(), train_data=None, optimizer=None, estimator="lanczos", schedule=None, **config):
    """The run's trainer; every argument can be given another value."""
    options = {"steps": 20, "batch_size": BATCH, "save_every": 4, "eval_every": 8, "log_every": 1, "ema": 0.9}
    if estimator == "lanczos":
        estimator = curvature.Lanczos(k=2, m=6)
        schedule = schedule or curvtrain.CurvatureSchedule(refresh_every=3, start=2, batch_size=2 * BATCH)
    elif estimator == "kfac":
        estimator, optimizer = curvature.KFAC("sampled"), optimizer or optim.kfac(l2=1e-3, damping_every=3)
        schedule = schedule or curvtrain.CurvatureSchedule(refresh_every=3)
    elif estimator == "psgd":
        estimator = curvature.PSGD(curvature.Kron(block_size=4), momentum=0.9, update_probability=0.4)
        optimizer, schedule = optimizer or optim.psgd(1e-2), schedule or curvtrain.CurvatureSchedule()
    elif estimator == "none":
        estimator, optimizer = None, optimizer or optax.sgd(1e-2)
    return cls(
        curvtrain.TrainerConfig(**{**options, "progress": False, **config}),
        train_data=pipeline(data()) if isinstance(train_data, str) else data() if train_data is None else train_data,
        eval_data=data(50, seed=1),
        optimizer=optim.fosi(optax.adam(1e-2)) if optimizer is None else optimizer,
        curvature=estimator,
        schedule=schedule,
        hooks=hooks,
    )


def leaves(state):
    """Every leaf of a state by its path, as numpy arrays that can be compared bit by bit."""
    data = lambda a: jax.random.key_data(a) if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else a
    raw = lambda a: data(a) if a.is_fully_replicated else multihost_utils.process_allgather(data(a), tiled=True)
    found = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(raw(leaf)) for path, leaf in found}


class Trouble(Hook):
    """Makes something go wrong in this process.

    Args:
      workdir: of the run.
      fail: [step, "exit" | "raise" | "error"]: ends the process after a step.
      full: [[first step, last step, size], ...]: files cannot grow beyond a size then.
      stuck: a step whose save never ends.
    """

    def __init__(self, workdir, fail=None, full=(), stuck=None):
        self._workdir, self._fail, self._full = Path(workdir), fail, full
        self._unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        if stuck is not None:
            write = saving.Save._write

            def stick(save):
                if save.step == stuck:
                    save._is_copied.set()
                    time.sleep(600)
                write(save)

            saving.Save._write = stick

    def __call__(self, run):
        for first, last, size in self._full:
            while run.step == first and any(self._workdir.glob("*.orbax-checkpoint-tmp*")):
                time.sleep(0.01)  # the save before is not to be hit
            if run.step in (first, last + 1):
                limit = size if run.step == first else self._unlimited
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, self._unlimited))
        if self._fail is not None and run.step == self._fail[0]:
            if self._fail[1] == "exit":
                sys.exit(3)
            if self._fail[1] == "raise":
                raise SystemExit(4)
            raise OSError("failed on purpose")


def main(workdir, out=None, sleep=0.0, fail=None, trouble=None, **config):
    """`trouble` is {process: arguments of Trouble}; `fail` that of all."""
    if "sharding" in config:  # [[regex, axes], ...]
        config["sharding"] = [(pattern, PartitionSpec(*axes)) for pattern, axes in config["sharding"]]
    distributed.start()
    own = {"fail": fail, **(trouble or {}).get(str(jax.process_index()), {})}
    hooks = [Remember(sleep), Trouble(workdir, **own)]
    trainer = make(hooks=hooks, workdir=workdir, **config)
    say("ready", *([jax.process_index()] if jax.process_count() > 1 else []))
    result = trainer.fit()
    if jax.process_count() > 1:
        say("end", json.dumps(result.metrics))
    if out is not None:
        end = leaves(trainer.state)
        rest = {"positions": json.dumps(trainer._run.streams.positions), "steps": np.array(hooks[0].steps)}
        if jax.process_index() == 0:
            np.savez(out, **end, **rest)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
