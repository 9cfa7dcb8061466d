"""adafisher and adafisherw: replays of a reference in NumPy, what each form promises, what is refused."""

import functools

import adafisher_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from curvtrain import CurvatureSchedule, Objective, losses, optim
from curvtrain.curvature import DiagonalFactors, DiagonalFisher, KroneckerDiagonal, ReleasedFactors
from curvtrain.optim import self_contained

KEY = jax.random.key(0)
STEPS, N = 20, 8

# -- networks, in NumPy and in NNX -------------------------------------------------------------------------------------


def mlp(rng):
    return [reference.Linear(rng, 3, 5), reference.Tanh(), reference.Linear(rng, 5, 2)], (3,)


def images(rng):
    """A convolution in two groups, both norms, on images; LayerNorm keeps their rows."""
    net = [reference.Conv(rng, 2, 4, groups=2), reference.BatchNorm(rng, 4), reference.Tanh()]
    net += [reference.LayerNorm(rng, 4), reference.Flatten(), reference.Linear(rng, 24, 2)]
    return net, (4, 3, 2)


def sequences(rng):
    """A linear layer and a LayerNorm over the positions of sequences, of which the latter keeps the positions."""
    net = [reference.Linear(rng, 3, 4), reference.LayerNorm(rng, 4), reference.Tanh()]
    return [*net, reference.Flatten(), reference.Linear(rng, 12, 2)], (3, 3)


NETS = {"mlp": mlp, "images": images, "sequences": sequences}


def module_of(layer):
    """The NNX layer of a reference's, in float64."""
    options, theta = dict(rngs=nnx.Rngs(0), param_dtype=jnp.float64), getattr(layer, "theta", {})
    if isinstance(layer, reference.Conv):
        *window, ins, outs = theta["kernel"].shape
        options |= dict(padding="VALID", feature_group_count=layer.groups)
        module = nnx.Conv(ins * layer.groups, outs, tuple(window), **options)
    elif isinstance(layer, reference.Linear):
        module = nnx.Linear(*theta["kernel"].shape, **options)
    elif isinstance(layer, reference.BatchNorm):
        module = nnx.BatchNorm(len(theta["scale"]), **options)
        for running in (module.mean, module.var):
            running.set_value(running.get_value().astype(jnp.float64))
    elif isinstance(layer, reference.LayerNorm):
        module = nnx.LayerNorm(len(theta["scale"]), **options)
    else:
        return nnx.tanh if isinstance(layer, reference.Tanh) else lambda h: h.reshape(len(h), -1)
    for name, value in theta.items():
        getattr(module, name).set_value(jnp.asarray(value))
    return module


def predict(model, batch):
    return model(batch["x"])


def objective_of(net, **options):
    return Objective.from_model(nnx.Sequential(*map(module_of, net)), predict, losses.SquaredError(), **options)


def batches(shape, count=STEPS, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, N, *shape))
    flat = x.reshape(count, N, -1)
    y = np.stack([np.sin(flat[..., 0] + flat[..., 1]), flat[..., 2] ** 2], -1)
    return [(x[t], y[t]) for t in range(count)]


def train(objective, params, tx, estimator, data, every=1):
    """(parameters, cosines between update and momentum, the last curvature) after a loop over the batches."""
    c, state = estimator.init(objective, params), tx.init(params)

    @functools.partial(jax.jit, static_argnums=4)
    def step(params, state, c, batch, update):
        measure = estimator.measure(c, objective, params, batch, KEY) if update else None
        _, grads, _, _, measured = objective.value_grad_and_measure(params, batch, KEY, measure)
        c = estimator.absorb(c, measured, KEY) if update else c
        updates, state = tx.update(grads, state, params, curvature=c)
        return optax.apply_updates(params, updates), state, c, optim.adafisher_telemetry(state, c)

    cosines = []
    for t, (x, y) in enumerate(data):
        params, state, c, told = step(params, state, c, {"x": x, "target": y}, t % every == 0)
        cosines.append(float(told["cosine"]))
    return params, cosines, c


# name -> (optimizer, options of the reference)
REPAIRED = {
    "adafisher": (optim.adafisher(0.02), dict(rate=0.02, cap=10.0)),
    "decay": (optim.adafisher(0.02, weight_decay=0.1), dict(rate=0.02, cap=10.0, kappa=0.1)),
    "adafisherw": (optim.adafisherw(0.02, weight_decay=0.1), dict(rate=0.02, cap=10.0, kappa=0.1, coupled=False)),
    "root": (optim.adafisher(0.02, b1=0.5, exponent=0.5, damping=0.3), dict(rate=0.02, b1=0.5, p=0.5, tau=0.3)),
    "capped": (optim.adafisher(0.02, trust_cap=0.05), dict(rate=0.02, cap=0.05)),
}
RELEASED = {
    "adafisher": (optim.adafisher(1e-4, faithful=True), dict(rate=1e-4)),
    "decay": (optim.adafisher(None, True, 0.1), dict(rate=1e-3, kappa=0.1)),
    "adafisherw": (optim.adafisherw(1e-4, True, 0.1), dict(rate=1e-4, kappa=0.1, coupled=False)),
}


@pytest.mark.parametrize("every", [1, 10, 100])
@pytest.mark.parametrize(
    ("net", "faithful", "name"),
    [(net, False, name) for net, name in [*(("mlp", name) for name in REPAIRED), ("images", "adafisher")]]
    + [("images", False, "adafisherw"), ("sequences", False, "decay"), ("mlp", True, "decay")]
    + [(net, True, name) for net in ("images", "sequences") for name in ("adafisher", "adafisherw")],
)
def test_replays_the_reference(net, faithful, name, every):
    tx, options = (RELEASED if faithful else REPAIRED)[name]
    layers, shape = NETS[net](np.random.default_rng(0))
    with jax.enable_x64(True):
        objective, params = objective_of(layers)
        estimator = KroneckerDiagonal("empirical", faithful=faithful)
        params, cosines, c = train(objective, params, tx, estimator, batches(shape), every)
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves((params, c.factors)))
    expected = reference.train(layers, batches(shape), every, faithful=faithful, **options)
    for i, layer in enumerate(layers):
        for key, right in getattr(layer, "theta", {}).items():
            ours = np.asarray(params["layers"][i][key])
            assert np.abs(ours - right).max() <= 1e-6 * np.abs(right).max()
    np.testing.assert_allclose(cosines, expected, rtol=1e-9)
    if faithful:  # what is left once the factors have forgotten that they began at 1
        assert min(cosines[2 * every :], default=1) > 0.9995
    else:
        assert min(cosines) < 0.99
