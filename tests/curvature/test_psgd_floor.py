"""What is at rounding level stays where it is: the floor of PSGD's fit.

Two orders of summation give gradients that differ by rounding. Where that is all there is of a gradient, whitening it
gives steps of full size that differ from one order to the other.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from curvtrain import Objective, losses, optim
from curvtrain.curvature import PSGD, Kron, XMat
from curvtrain.curvature.psgd import Elementwise
from curvtrain.curvature.psgd.base import Structure

RATE, STEPS = 0.01, 10


class Net(nnx.Module):
    """The first bias is dead: a batch normalisation takes it out again."""

    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(6, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.norm(self.first(x))))


def examples():
    x = np.random.default_rng(0).normal(size=(256, 6)).astype(np.float32)
    return {"x": x, "label": np.abs(x[:, :4]).argmax(1).astype(np.int32)}


def trained(family, orders):
    """Parameters after ten steps on the same batch, for each way in which it comes; and those before."""
    predict = lambda model, batch: model(batch["x"])
    objective, params = Objective.from_model(Net(nnx.Rngs(0)), predict, losses.SoftmaxCrossEntropy())
    estimator, tx = PSGD(family), optim.psgd(RATE)

    @jax.jit
    def step(state, batch, key):
        params, curvature, opt_state = state
        grads = objective.value_and_grad(params, batch, key)[1]
        curvature = estimator.update(curvature, objective, params, batch, key, grads=grads)
        updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)
        return optax.apply_updates(params, updates), curvature, opt_state

    found = []
    for order in orders:
        state = params, estimator.init(objective, params), tx.init(params)
        for seed in range(STEPS):
            state = step(state, order(seed, examples()), jax.random.key(seed))
        found.append(jax.tree.map(np.asarray, state[0]))
    return found, params


def as_it_is(seed, batch):
    return batch


def permuted(seed, batch):
    rows = np.random.default_rng(seed).permutation(256)
    return jax.tree.map(lambda a: a[rows], batch)


def on_eight_devices(seed, batch):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def apart(a, b):
    """The largest difference of two arrays, in learning rates."""
    return float(np.abs(a - b).max()) / RATE


@pytest.mark.parametrize("family", [Kron(), Elementwise(), XMat()], ids=lambda f: type(f).__name__)
def test_a_dead_parameter_stays_where_it_is(family):
    """To a tenth of one step in ten, while the others move by as much as they always did."""
    orders = [as_it_is, permuted] + ([on_eight_devices] if isinstance(family, Elementwise) else [])
    (plain, *others), before = trained(family, orders)
    assert apart(plain["first"]["bias"], np.asarray(before["first"]["bias"])) < 0.1
    assert apart(plain["first"]["kernel"], np.asarray(before["first"]["kernel"])) > 5
    for other in others:
        assert apart(plain["first"]["bias"], other["first"]["bias"]) < 0.1
        assert apart(plain["first"]["kernel"], other["first"]["kernel"]) < 1e-3


def test_without_the_floor_it_does_not():
    """What the test above would see: steps of full size in directions that the order of summation decides on."""
    (plain, other), _ = trained(Elementwise(relative_damping=0.0), [as_it_is, permuted])
    assert apart(plain["first"]["bias"], other["first"]["bias"]) > 1


# -- one fit ---------------------------------------------------------------------------------------------------------

WHOLE = np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)
SUMLESS = WHOLE - WHOLE.mean(1, keepdims=True)  # no row sums to anything but rounding


def fitted(family, mix, size=1.0, dead=1e-8):
    """P's updates after 400 gradients of a head's kernel, of noise in the sums of its rows, and of a dead bias."""
    structure = Structure.of({"kernel": jnp.zeros((6, 4)), "bias": jnp.zeros(4)})

    def gradient(key):
        draw = lambda i, shape: jax.random.normal(jax.random.fold_in(key, i), shape)
        kernel = draw(0, (6, 4)) @ mix + dead * draw(1, (6, 1))
        return {"kernel": size * kernel, "bias": dead * size * draw(2, (4,))}

    def one(state, i):
        h = jax.tree.map(lambda a: a[None], gradient(jax.random.fold_in(jax.random.key(0), i)))
        rate = jnp.maximum(0.5 * jnp.exp(-0.01 * i), 0.02).astype(jnp.float32)
        return family.fit(structure, state, None, h, jax.random.fold_in(jax.random.key(1), i), rate)[0], None

    state = jax.jit(lambda: jax.lax.scan(one, family.init(structure), jnp.arange(400))[0])()
    updates = [family.apply(structure, state, gradient(jax.random.fold_in(jax.random.key(2), i))) for i in range(20)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *updates)


@pytest.mark.parametrize("size", [1.0, 1e12])
def test_dead_directions_are_not_whitened(size):
    """Whatever the gradient's size: the floor is relative to it. What is live has steps of unit size."""
    updates = fitted(Kron(), SUMLESS, size)
    assert 0.7 < np.sqrt(np.square(updates["kernel"]).mean()) < 1.2
    assert np.abs(updates["bias"]).max() < 1e-2
    # 0.03; if noise under the observations were drawn, in the place of what it adds to the fit on average, 3.7
    assert np.abs(updates["kernel"].sum(-1)).max() < 0.05


def test_without_the_floor_they_are():
    updates = fitted(Kron(relative_damping=0.0), SUMLESS, 1e4)
    assert np.abs(updates["bias"]).max() > 0.5


def test_live_directions_are_whitened_as_before():
    """Here of sizes from 1 to 1/100, and of a bias of a tenth of the kernel's."""
    mix = WHOLE * np.float32([[1.0], [0.3], [0.1], [0.01]])
    after, before = (fitted(family, mix, dead=0.1) for family in (Kron(), Kron(relative_damping=0.0)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max()), after, before)


def test_the_floor_is_that_of_the_finest_dtype():
    shares = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        structure = Structure.of({"w": jnp.zeros(3, dtype)})
        shares[dtype] = Kron().share(structure, True), Kron().share(structure, False)
    eps = 2.0**-23
    assert shares[jnp.float32] == (1000 * eps, 100 * eps) and shares[jnp.bfloat16] == (1e-3, 1e-3)
    mixed = Structure.of({"w": jnp.zeros(3, jnp.bfloat16), "v": jnp.zeros(3)})
    assert Kron().share(mixed, True) == 1000 * eps
    assert Kron(damping=0.0).share(mixed, True) == 0 and Kron(relative_damping=0.5).share(mixed, True) == 0.5
    with pytest.raises(ValueError, match=r"Kron\(relative_damping\) should be at least 0.0, not -1"):
        Kron(relative_damping=-1.0)


def test_a_typical_size_is_not_that_of_an_outlier():
    """Nor of what is not finite; scanned layers count one by one."""
    h = {
        "a": [1.0, -3.0],
        "b": [jnp.inf, 1.0],
        "c": [jnp.nan, 1.0],
        "d": [1e30, 1.0],
        "e": [0.0, 0.0],
        "f": [[4.0], [5.0]],
    }
    h = {name: jnp.asarray([values]) for name, values in h.items()}
    structure = Structure.of({name: jnp.zeros(a.shape[1:]) for name, a in h.items()}, [0, 0, 0, 0, 0, 1])
    floors = Kron(relative_damping=1.0).floors(structure, h, whitens=True)
    np.testing.assert_allclose(floors[0], 5.0)  # of 2, 4, 5 and 5e29, the upper of the two in the middle
    np.testing.assert_allclose(floors[4], 5.0)
    np.testing.assert_allclose(floors[5], [5.0, 5.0])
    np.testing.assert_allclose(floors[3], 5e29)
