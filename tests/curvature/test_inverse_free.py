"""InverseFree and InverseFreeKFAC: structures, fixed points, the number of examples, bfloat16, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from inverse_free_reference import basis, project
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

from curvtrain import Objective, losses, optim
from curvtrain.curvature import KFAC, DiagonalFisher, InverseFree, InverseFreeKFAC, Warmed
from curvtrain.curvature import mesh as curvature_mesh
from curvtrain.curvature.inverse_free.step import rounded
from curvtrain.curvature.inverse_free.structures import structure

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)

# -- structures --------------------------------------------------------------------------------------------------------

STRUCTURES = [
    ("dense", 5),
    ("diagonal", 5),
    ("block2diagonal", 6),
    ("block3diagonal", 7),
    ("block9diagonal", 4),
    ("hierarchical2_1", 6),
    ("hierarchical2_3", 5),
    ("lower_toeplitz", 5),
    ("upper_toeplitz", 1),
    ("upper_toeplitz", 5),
]


def inside(name, X):
    """How far a matrix is from the span of the structure."""
    columns = np.stack([B.ravel() for B in basis(name, len(X))], axis=1)
    return np.abs(columns @ np.linalg.lstsq(columns, X.ravel(), rcond=None)[0] - X.ravel()).max()


def whole(s, stored, d):
    X = np.asarray(s.matrix(stored, d))
    return np.stack([np.diag(x) for x in X]) if s.is_vector else X


def as_given(s, X):
    return jnp.asarray(np.diagonal(X, axis1=-2, axis2=-1) if s.is_vector else X)


@pytest.mark.parametrize(("name", "d"), STRUCTURES)
def test_a_structure_is_a_group_and_its_projection_is_the_nearest(name, d):
    with jax.enable_x64(True):
        s = structure("structure", name)
        M = RNG.normal(size=(2, d, d))
        M = M + np.swapaxes(M, 1, 2)
        stored = s.project(as_given(s, M))
        m = whole(s, stored, d)
        for ours, given in zip(m, M, strict=True):
            np.testing.assert_allclose(ours, project(name, given), atol=1e-12)
        product = m[0] @ m[1]
        assert max(inside(name, X) for X in (*m, product, np.eye(d))) < 1e-12
        again = s.read(as_given(s, np.stack([product, np.eye(d)])))
        np.testing.assert_allclose(whole(s, again, d), np.stack([product, np.eye(d)]), atol=1e-12)
        if name not in ("dense", "block9diagonal") and d > 1:
            assert sum(leaf.size for leaf in jax.tree.leaves(stored)) < 2 * d * d


# -- fixed points ------------------------------------------------------------------------------------------------------


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.table, self.first = nnx.Embed(5, 3, rngs=rngs), nnx.Linear(3, 4, rngs=rngs)
        self.norm, self.last = nnx.LayerNorm(4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, tokens):
        return self.last(self.norm(nnx.tanh(self.first(self.table(tokens)))))


def test_ikfac_comes_to_rest_at_the_damped_inverse():
    """K K^T = (A + lambda I)^-1, and 1 / (D + lambda) where K-FAC has no factors."""
    batch = {"x": RNG.integers(0, 5, 16), "label": RNG.integers(0, 3, 16), "mask": np.arange(16) != 3}
    lam, predict = 0.05, lambda m, b: m(b["x"])
    with jax.enable_x64(True):
        objective, params = Objective.from_model(Normed(nnx.Rngs(0)), predict, losses.SoftmaxCrossEntropy())
        params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
        of = lambda estimator: estimator.update(estimator.init(objective, params), objective, params, batch, KEY)
        factors, diagonal = of(KFAC("empirical", ema=0.0)), of(DiagonalFisher("empirical", ema=0.0)).values
        estimator = InverseFreeKFAC(rate=0.9, damping=lam, kfac_like=True)
        c = jax.jit(
            lambda c: jax.lax.fori_loop(0, 200, lambda i, c: estimator.update(c, objective, params, batch, KEY), c)
        )(estimator.init(objective, params))
        for stack in c.stacks:
            K = [np.asarray(k) for k in stack.matrices(c.factors[stack.name], jnp.float64)]
            for at, tensor in enumerate(stack.tensors):
                if len(K) == 2:
                    for k, A in zip(K, factors.pair(factors.factors, tensor.name), strict=True):
                        P = np.linalg.inv(np.asarray(A[0]) + lam * np.eye(A.shape[-1]))
                        np.testing.assert_allclose(k[at] @ k[at].T, P, rtol=1e-6, atol=1e-6)
        norm = c.apply(params)["norm"]  # of ones and zeros: P's diagonal for the scale
        np.testing.assert_allclose(norm["scale"], 1 / (diagonal["norm"]["scale"] + lam), rtol=1e-6)
        assert {len(stack.sides) for stack in c.stacks} == {1, 2}


# -- the number of examples --------------------------------------------------------------------------------------------


def regression(microbatch=None):
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    return Objective.from_model(model, lambda m, b: m(b["x"]), losses.SquaredError("y"), microbatch=microbatch)


def data(count=12, **more):
    rng = np.random.default_rng(3)
    return {
        "x": rng.normal(size=(count, 3)).astype(np.float32),
        "y": rng.normal(size=(count, 2)).astype(np.float32),
    } | more


def updated(estimator, objective, params, batch, times=3):
    step = jax.jit(lambda c, batch: estimator.update(c, objective, params, batch, KEY))
    c = estimator.init(objective, params)
    for _ in range(times):
        c = step(c, batch)
    return c


def close(ours, theirs, tolerance=2e-5):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    assert max(float(jnp.abs(a - b).max()) for a, b in pairs) < tolerance


@pytest.mark.parametrize("make", [InverseFree, InverseFreeKFAC])
def test_examples_are_counted_in_pieces_and_under_masks(make):
    """Pieces and padding are no matter: the same factors as of the plain batch of those examples."""
    estimator = make(rate=0.5)
    right = updated(estimator, *regression(), data())
    close(updated(estimator, *regression(microbatch=5), data()).factors, right.factors)
    mask = np.arange(12) < 8
    few = {name: a[:8] for name, a in data().items()}
    first = updated(estimator, *regression(), few)
    for microbatch in (None, 5):
        close(updated(estimator, *regression(microbatch), data(mask=mask)).factors, first.factors)
    assert any(float(jnp.abs(a - jnp.eye(a.shape[-1])).max()) > 0.1 for a in jax.tree.leaves(right.factors))


def test_examples_of_a_loss_alone():
    loss = lambda params, batch: jnp.mean((batch["x"] @ params["w"]) ** 2)
    params = {"w": jnp.ones((3, 2))}
    whole = updated(InverseFree(rate=0.5), Objective.from_loss(loss), params, data())
    pieces = updated(InverseFree(rate=0.5), Objective.from_loss(loss, microbatch=5), params, data())
    given = updated(InverseFree(rate=0.5, batch_size=12), Objective.from_loss(loss), params, data())
    other = updated(InverseFree(rate=0.5, batch_size=120), Objective.from_loss(loss), params, data())
    close(pieces.factors, whole.factors)
    close(given.factors, whole.factors)
    with pytest.raises(AssertionError):
        close(other.factors, whole.factors)
    with pytest.raises(ValueError, match=r"this batch does not say it. Give InverseFree\(batch_size=...\)"):
        updated(InverseFree(), Objective.from_loss(loss), params, data() | {"step": np.float32(1)})
    with pytest.raises(
        TypeError, match=r"Pass update\(\) the objective and the batch, or give InverseFree\(batch_size"
    ):
        InverseFree().update(InverseFree().init(None, params), None, params, None, KEY, grads=params)


@pytest.mark.parametrize("make", [InverseFree, InverseFreeKFAC])
def test_what_is_not_finite_or_masked_moves_nothing(make):
    objective, params = regression()
    estimator = make(rate=0.5)
    first = updated(estimator, objective, params, data())
    bad = data()
    bad["x"][2, 1] = np.inf
    for batch in (bad, data(mask=np.zeros(12, bool))):
        after = estimator.update(first, objective, params, batch, KEY)
        jax.tree.map(np.testing.assert_array_equal, after.factors, first.factors)
        assert int(after.skipped) == 1 and int(after.updates) == 4 and int(after.failures) == 0


def test_counting_examples_takes_no_forward_pass():
    """The step has the gradient already; of the loss only the weights are left in the program."""
    objective, params = regression(microbatch=5)
    estimator = InverseFree()
    update = lambda c, grads, batch: estimator.update(c, objective, params, batch, KEY, grads=grads)
    given = estimator.init(objective, params), params, data(mask=np.arange(12) < 8)
    assert "tanh" not in jax.jit(update).lower(*given).compile().as_text()
    whole = lambda c, batch: estimator.update(c, objective, params, batch, KEY)
    assert "tanh" in jax.jit(whole).lower(given[0], given[2]).compile().as_text()


# -- on a mesh ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [InverseFree, InverseFreeKFAC])
def test_eight_devices_are_one(make, monkeypatch):
    """Factors are split over the mesh, the batch over its examples, and all numbers are those of one device."""
    monkeypatch.setattr(curvature_mesh, "SMALLEST", 1)
    model = nnx.Sequential(*(nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(8)))
    objective, params = Objective.from_model(model, lambda m, b: m(b["x"]), losses.SquaredError("y"))
    rng = np.random.default_rng(4)
    batch = {name: rng.normal(size=(16, 8)).astype(np.float32) for name in "xy"}
    estimator, tx = make(rate=0.3), (optim.sirfshampoo if make is InverseFree else optim.singd)(0.05, 0.3)
    if make is InverseFreeKFAC:
        tx = optim.singd(0.05, lr_cov=0.3)

    def step(state, batch):
        params, opt_state, c = state
        grads = objective.value_and_grad(params, batch, KEY)[1]
        c = estimator.update(c, objective, params, batch, KEY, grads=grads)
        updates, opt_state = tx.update(grads, opt_state, params, curvature=c)
        return optax.apply_updates(params, updates), opt_state, c

    begin = lambda: (params, tx.init(params), estimator.init(objective, params))
    alone = begin()
    for _ in range(3):
        alone = jax.jit(step)(alone, batch)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        state = begin()
        own = jax.tree.map(lambda p: PartitionSpec(*[None] * (p.ndim - 1), "fsdp"), params)
        specs = jax.tree.map(lambda _: PartitionSpec(), state)
        specs = (own, specs[1], estimator.partition_specs(state[2], own, mesh))
        homes = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
        state = jax.device_put(state, homes)
        split = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("fsdp")))
        several = jax.jit(step, out_shardings=homes)
        for _ in range(3):
            state = several(state, split)
    leaf = max(jax.tree.leaves(state[2].factors), key=lambda a: a.size)
    assert leaf.addressable_shards[0].data.size == leaf.size // 8
    close(state[2].factors, alone[2].factors, 1e-5)
    close(state[0], alone[0], 1e-5)


# -- bfloat16 ----------------------------------------------------------------------------------------------------------


def test_rounding_by_chance_is_right_in_the_mean():
    x = jnp.asarray(RNG.normal(size=200), jnp.float32)
    draws = jax.vmap(lambda key: rounded(x, jnp.bfloat16, key).astype(jnp.float32))(jax.random.split(KEY, 4000))
    assert rounded(x, jnp.bfloat16, KEY).dtype == jnp.bfloat16
    step = np.abs(np.asarray(x)) * 2.0**-7
    assert np.all(np.abs(draws - x).max(axis=0) <= step)
    assert np.all(np.abs(draws.mean(axis=0) - x) < 0.05 * step + 1e-7)
    same = x.astype(jnp.bfloat16)
    np.testing.assert_array_equal(rounded(same.astype(jnp.float32), jnp.bfloat16, KEY), same)


@functools.cache
def trained(make, dtype, structure="dense", steps=200):
    """(the loss after so many steps on a classification of blobs, the factors' dtypes)."""
    rng = np.random.default_rng(5)
    label = rng.integers(0, 4, 256)
    x = (np.eye(4)[label] @ rng.normal(size=(4, 16)) + 1.0 * rng.normal(size=(256, 16))).astype(np.float32)
    batch = {"x": x, "label": label}
    model = nnx.Sequential(nnx.Linear(16, 32, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(32, 4, rngs=nnx.Rngs(1)))
    objective, params = Objective.from_model(model, lambda m, b: m(b["x"]), losses.SoftmaxCrossEntropy())
    estimator = make(structure=structure, dtype=dtype)
    tx = optim.sirfshampoo(1e-3) if make is InverseFree else optim.singd(1e-3)

    def step(state, t):
        params, opt_state, c = state
        at = jax.random.randint(jax.random.fold_in(KEY, t), (64,), 0, 256, jnp.int32)
        piece = jax.tree.map(lambda a: jnp.asarray(a)[at], batch)
        key = jax.random.fold_in(KEY, t)
        grads = objective.value_and_grad(params, piece, key)[1]
        c = estimator.update(c, objective, params, piece, key, grads=grads)
        updates, opt_state = tx.update(grads, opt_state, params, curvature=c)
        return (optax.apply_updates(params, updates), opt_state, c), None

    state = (params, tx.init(params), estimator.init(objective, params))
    (params, _, c), _ = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(steps)))(state)
    assert int(c.failures) == int(c.skipped) == 0
    return float(objective.loss(params, batch)), {leaf.dtype for leaf in jax.tree.leaves((c.factors, c.momenta))}


@pytest.mark.parametrize(
    ("make", "structure"), [(InverseFree, "dense"), (InverseFree, "block8diagonal"), (InverseFreeKFAC, "dense")]
)
def test_factors_in_bfloat16_train_as_well(make, structure):
    first = trained(make, "float32", structure, steps=0)[0]
    full, _ = trained(make, "float32", structure)
    half, dtypes = trained(make, "bfloat16", structure)
    assert dtypes == {jnp.dtype(jnp.bfloat16)}
    assert full < 0.5 * first
    assert abs(half - full) < 0.05 * first


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_a_diagonal_side_takes_no_square():
    """Sides above `max_size` are diagonal, and nothing of their square is in the program."""
    params = {"w": jnp.ones((300, 4)), "b": jnp.ones(300)}
    estimator = InverseFree(max_size=64, batch_size=8)
    c = estimator.init(None, params)
    text = str(jax.make_jaxpr(lambda c: estimator.update(c, None, params, None, KEY, grads=params).apply(params))(c))
    assert "300,300" not in text
    assert set(c.factors) == {"300_diagonalx4", "300_diagonal"}
    shown = estimator.overview(None, params)
    assert "diagonal, dense" in shown and f"{2 * 4 * (300 + 16):,}" in shown


def test_the_table_of_layers_counts_what_is_stored():
    objective, params = regression()
    for dtype, size in ((None, 4), ("bfloat16", 2)):
        estimator = InverseFreeKFAC(
            structure=[("layers/0", "block2diagonal"), (".*", ("dense", "diagonal"))], dtype=dtype
        )
        c = jax.eval_shape(estimator.init, objective, params)
        stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((c.factors, c.momenta)))
        blocks, rest = 2 * (2 * 4 + 2 * 4), 2 * (25 + 2)
        assert stored == size * (blocks + rest)
        shown = estimator.overview(objective, params)
        assert f"{size * blocks:,}" in shown and "dense, diagonal" in shown and "block2diagonal" in shown


def test_copies_of_a_scan_are_tensors_of_their_own():
    """An axis of layers is no side: a layer's factors are those that it has alone."""
    make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs), in_axes=0))

    class Deep(nnx.Module):
        def __init__(self, rngs):
            self.layers = make(rngs)

        def __call__(self, x):
            return nnx.scan(lambda x, layer: nnx.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.layers
            )

    objective, params = Objective.from_model(Deep(nnx.Rngs(0)), lambda m, b: m(b["x"]), losses.SquaredError("y"))
    rng = np.random.default_rng(6)
    batch = {name: rng.normal(size=(8, 4)).astype(np.float32) for name in "xy"}
    grads = objective.value_and_grad(params, batch)[1]
    estimator = InverseFree(rate=0.5, batch_size=8)
    c = estimator.update(estimator.init(objective, params), objective, params, batch, KEY, grads=grads)
    assert {stack.count for stack in c.stacks} == {3}
    together = c.apply(grads)
    one = jax.tree.map(lambda g: g[1], grads)
    alone = estimator.update(estimator.init(None, one), None, one, None, KEY, grads=one).apply(one)
    close(jax.tree.map(lambda g: g[1], together), alone, 1e-6)


def test_the_period_grows():
    period = Warmed(3)
    steps = [0, 14, 15, 62, 63, 254, 255, 5000]
    assert [period(t) for t in steps] == [1, 1, 2, 2, 3, 3, 3, 3]
    assert [int(period(jnp.int32(t))) for t in steps] == [1, 1, 2, 2, 3, 3, 3, 3]
    assert Warmed(1)(10**6) == 1 and Warmed(40)(2**31 - 2) == 15


def test_apply_and_invert_are_inverse():
    objective, params = regression()
    for estimator in (InverseFree("lower_toeplitz", rate=0.5), InverseFreeKFAC(rate=0.5)):
        c = updated(estimator, objective, params, data(), 5)
        flat = lambda tree: np.asarray(ravel_pytree(tree)[0])
        np.testing.assert_allclose(flat(c.invert(c.apply(params))), flat(params), atol=1e-4)
