"""`nnx.Optimizer` around every estimator: parameters as a State of variables move as dicts do in a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES
from flax import nnx

from curvtrain import CurvatureSchedule, Objective, losses, optim

RNG = np.random.default_rng(7)
BATCH = {"x": jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32), "label": jnp.asarray(RNG.integers(0, 3, 6))}
LOSS = losses.SoftmaxCrossEntropy()


def build():
    return nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(4, 3, rngs=nnx.Rngs(1)))


@pytest.mark.parametrize("name", CASES)
def test_a_state_of_variables(name, quick_compile):
    case, model = CASES[name], build()
    objective, params = Objective.from_model(model, lambda m, b: m(b["x"]), LOSS)
    schedule = CurvatureSchedule(refresh_every=2)
    whole = optim.self_contained(case.optimizer(), case.estimator, schedule, objective)
    optimizer = nnx.Optimizer(model, whole, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda m: jnp.mean(LOSS.values(m(BATCH["x"]), BATCH)))(model)
        optimizer.update(model, grads, batch=BATCH, value=value)

    @jax.jit
    def plain(params, state):
        value, grads, *_ = objective.value_and_grad(params, BATCH)
        updates, state = whole.update(grads, state, params, batch=BATCH, value=value)
        return optax.apply_updates(params, updates), state

    state = whole.init(params)
    for _ in range(2):
        step(model, optimizer)
        params, state = plain(params, state)
    moved = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), moved, params)
