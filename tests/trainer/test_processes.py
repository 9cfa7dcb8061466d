"""One script under one process or two: the same run, the same checkpoints."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

SCRIPT = """
import json, sys
import jax

rank, port, processes, workdir = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
if processes > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=processes, process_id=rank)

import numpy as np
import optax
from flax import nnx

import curvtrain
from curvtrain import curvature, losses, optim


class Net(nnx.Module):
    def __init__(self, rngs):
        self.a, self.norm = nnx.Linear(8, 32, rngs=rngs), nnx.BatchNorm(32, rngs=rngs)
        self.drop, self.b = nnx.Dropout(0.2, rngs=rngs), nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        return self.b(self.drop(nnx.tanh(self.norm(self.a(x)))))


class Trainer(curvtrain.Trainer):
    loss = losses.SoftmaxCrossEntropy()

    def build_model(self, rngs):
        return Net(rngs)

    def predict(self, model, batch):
        return model(batch["x"])


rng = np.random.default_rng(0)
x = rng.standard_normal((203, 8), np.float32)
data = {"x": x, "label": (x[:, :4].argmax(1)).astype(np.int32)}
config = curvtrain.TrainerConfig(
    steps=int(sys.argv[5]), batch_size=32, workdir=workdir, save_every=5, log_every=5, progress=False,
    mesh={"data": 2, "fsdp": 2}, sharding=[("kernel", jax.sharding.PartitionSpec("fsdp"))],
)
schedule = curvtrain.CurvatureSchedule(refresh_every=4, batch_size=64)
trainer = Trainer(config, train_data=data, eval_data=data, optimizer=optim.fosi(optax.adam(1e-2)),
                  curvature=curvature.Lanczos(k=3), schedule=schedule)
result = trainer.fit()
values = np.asarray(trainer.state.curvature.values).tolist()
print("RESULT" + json.dumps({**result.metrics, "values": values}))
"""


def run(folder: Path, processes: int, steps: int) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = f"--xla_force_host_platform_device_count={4 // processes} --xla_backend_optimization_level=0"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    start = lambda rank: subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(rank), port, str(processes), str(folder), str(steps)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    outputs = [(p.communicate(timeout=300), p.returncode) for p in [start(rank) for rank in range(processes)]]
    assert all(code == 0 for _, code in outputs), outputs
    return [json.loads(out.split("RESULT", 1)[1]) for (out, _), _ in outputs]


def test_two_processes_train_resume_and_evaluate_like_one(tmp_path):
    (one,) = run(tmp_path / "one", 1, 15)
    run(tmp_path / "two", 2, 10)
    first, second = run(tmp_path / "two", 2, 15)  # resumed after step 10
    assert {k: v for k, v in first.items() if "per_second" not in k} == {
        k: v for k, v in second.items() if "per_second" not in k
    }
    # measured: equal to the last digit or two; reductions may be ordered differently
    for name in ("train/loss", "eval/loss", "eval/accuracy"):
        np.testing.assert_allclose(first[name], one[name], rtol=1e-5)
    np.testing.assert_allclose(first["values"], one["values"], rtol=1e-4)
    logged = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if "train/loss" in row] == [5, 10, 15]
