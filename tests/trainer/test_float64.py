"""A Trainer under `jax_enable_x64`, in a process of its own: the flag is global, and a Trainer's threads read it."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
import curvtrain
from curvtrain import curvature, losses, optim

assert jax.config.jax_enable_x64
DTYPE = jnp.float64

class Line(curvtrain.Trainer):
    loss = losses.SquaredError()

    def build_model(self, rngs):
        return nnx.Linear(4, 1, dtype=DTYPE, param_dtype=DTYPE, rngs=rngs)

    def predict(self, model, batch):
        return model(batch["x"])

rng = np.random.default_rng(6)
x, w = rng.standard_normal((40, 4)), rng.standard_normal((4, 1))
data = {"x": x, "target": x @ w}
mean = lambda p: jnp.mean(0.5 * jnp.sum((x @ p["kernel"] + p["bias"] - data["target"]) ** 2, -1))
config = curvtrain.TrainerConfig(steps=20, batch_size=40, accumulate=2, ema=0.9, progress=False)
trainer = Line(config, train_data=data, eval_data=data, optimizer=optax.sgd(0.3))
params = average = jax.tree.map(jnp.array, trainer.state.params)
trainer.fit()
for _ in range(20):
    params = jax.tree.map(lambda p, g: p - 0.3 * g, params, jax.grad(mean)(params))
    average = jax.tree.map(lambda a, p: 0.9 * a + (1.0 - 0.9) * p, average, params)
for got, right in ((trainer.state.params, params), (trainer.state.ema, average)):
    for name in right:
        assert got[name].dtype == DTYPE
        np.testing.assert_allclose(got[name], right[name], rtol=1e-12, atol=1e-13)
np.testing.assert_allclose(trainer.evaluate(data)["loss"], mean(average), rtol=1e-12)

# one natural-gradient step is Newton's for this model: from anywhere to the solution
config = curvtrain.TrainerConfig(steps=1, batch_size=40, progress=False)
natural = optim.natural_gradient(1.0, 1e-13)
trainer = Line(config, train_data=data, optimizer=natural, curvature=curvature.FullBlock("exact"))
trainer.fit()
np.testing.assert_allclose(trainer.state.params["kernel"], w, rtol=1e-10)

# parameters in float32 stay so, with NumPy's own float64 as data
DTYPE = jnp.float32
config = curvtrain.TrainerConfig(steps=3, batch_size=40, ema=0.9, progress=False)
trainer = Line(config, train_data=data, optimizer=optim.psgd(0.1), curvature=curvature.PSGD())
trainer.fit()
leaves = jax.tree.leaves(trainer.state)
assert not any(leaf.dtype in (jnp.float64, jnp.int64) for leaf in leaves), [leaf.dtype for leaf in leaves]
"""


def test_a_trainer_in_float64():
    environment = {**os.environ, "JAX_ENABLE_X64": "1", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
