"""The gradient's covariance: its matrix, its fits, its bases, and where its arrays lie."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gradient_kronecker_reference import Block
from jax.sharding import PartitionSpec

from curvtrain import Objective, losses
from curvtrain.curvature import GradientKronecker
from curvtrain.curvature.gradient_kronecker import fits
from curvtrain.curvature.gradient_kronecker.views import Views

KEY = jax.random.key(0)


def advance(estimator, c, params, grads, refresh=True):
    c = estimator.update(c, None, params, None, KEY, grads=grads)
    return estimator.refresh(c, None, params, None, KEY) if refresh else c


# -- as a matrix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["qr", "eigh"])
@pytest.mark.parametrize("fit", ["ema", "kl"])
@pytest.mark.parametrize("eigenvalues", ["product", "corrected"])
def test_the_matrix_of_the_reference(fit, eigenvalues, basis):
    """A matrix, one whose long side has no factor, and one that is a row: after seven gradients, three refreshes."""
    shapes = {"full": (3, 4), "long": (7, 3), "row": (1, 4)}
    with jax.enable_x64(True):
        params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
        estimator = GradientKronecker(fit, eigenvalues, 0.9, basis=basis, max_size=4)
        blocks = {
            name: Block(shape, fit, eigenvalues, 0.9, basis, left=shape[0] <= 4) for name, shape in shapes.items()
        }
        c = estimator.init(None, params)
        step = jax.jit(functools.partial(advance, estimator), static_argnums=3)
        for t in range(7):
            # three gradients before the first refresh: of a matrix without full rank a basis is arbitrary
            grads = {n: np.random.default_rng([t, len(n)]).normal(size=s) for n, s in shapes.items()}
            for name, block in blocks.items():
                block.step(grads[name], t % 2 == 0 and t > 1)
            c = step(c, params, grads, t % 2 == 0 and t > 1)
        C, start = np.array(c.as_matrix()), 0
        for name, (m, n) in shapes.items():
            own = slice(start, start := start + m * n)
            np.testing.assert_allclose(C[own, own], blocks[name].dense(), rtol=0, atol=1e-10 * np.abs(C).max())
            C[own, own] = 0
        assert not C.any()


def test_blocks_are_matrices_of_their_own():
    """Of an (8, 6) matrix in blocks of at most 4, and of the same blocks as parameters: the same covariance."""
    G = np.random.default_rng(0).normal(size=(5, 8, 6)).astype(np.float32)
    cut = lambda M: {f"{i}{j}": M[4 * i : 4 * i + 4, 3 * j : 3 * j + 3] for i in range(2) for j in range(2)}
    whole, parts = {"w": jnp.zeros((8, 6))}, jax.tree.map(jnp.asarray, cut(np.zeros((8, 6), np.float32)))
    blocked, plain = GradientKronecker(block_size=4), GradientKronecker()
    c, d = blocked.init(None, whole), plain.init(None, parts)
    for t, M in enumerate(G):
        c = advance(blocked, c, whole, {"w": jnp.asarray(M)}, t > 1)
        d = advance(plain, d, parts, jax.tree.map(jnp.asarray, cut(M)), t > 1)
    found, want = c.solve({"w": G[0]}, 0.1)["w"], d.solve(cut(G[0]), 0.1)
    for name, block in cut(np.asarray(found)).items():
        np.testing.assert_allclose(block, want[name], rtol=1e-4, atol=1e-5)
    assert "4 x 4 x 3" in blocked.overview(None, whole)


@pytest.mark.parametrize(("side", "blocks"), [(4, 1), (8, 2), (7, 1), (9, 3), (10, 5), (12, 3), (13, 1), (6, 2)])
def test_sides_are_cut_into_equal_blocks(side, blocks):
    """The longest of at most 4 that divide them; a prime number of rows stays whole."""
    view = GradientKronecker(block_size=4).views(None, {"w": jnp.zeros((side, 3))}).matrices[0][0]
    assert view.blocks == (blocks, 1) and view.sides == (side // blocks, 3)
    x = np.arange(3.0 * side).reshape(side, 3)
    np.testing.assert_array_equal(view.write(view.read(x)), x)


def test_layers_of_a_scan_are_matrices_of_their_own():
    class Scanned(nnx.Module):
        def __init__(self, rngs):
            make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs), in_axes=0))
            self.blocks, self.conv = make(rngs), nnx.Conv(2, 3, kernel_size=(3, 3), rngs=rngs)

        def __call__(self, x):
            step = nnx.scan(lambda x, b: nnx.tanh(b(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return step(self.conv(x).mean((1, 2))[:, :1] * jnp.ones((1, 4)), self.blocks)

    objective, params = Objective.from_model(
        Scanned(nnx.Rngs(0)), lambda model, batch: model(batch["x"]), losses.SquaredError(targets="y")
    )
    estimator = GradientKronecker(slots=4)
    c = estimator.init(objective, params)
    seen = {m.name: (m.copies, m.d_i, m.d_o) for m in c.layout.matrices}
    assert seen == {"blocks/kernel": (3, 4, 4), "conv/kernel": (1, 9, 6)}
    assert {name: v.shape for name, v in c.diagonals.items()} == {"blocks/bias": (3, 4), "conv/bias": (3,)}
    assert "blocks/kernel" in (shown := estimator.overview(objective, params)) and "3 x 4 x 4" in shown

    rng = np.random.default_rng(0)
    grads = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params) for _ in range(3)]
    alone = GradientKronecker()
    singles = [alone.init(None, {"w": jnp.zeros((4, 4))}) for _ in range(3)]
    for g in grads:
        c = advance(estimator, c, params, g)
        ks = g["blocks"]["kernel"]
        singles = [advance(alone, s, {"w": ks[i]}, {"w": ks[i]}) for i, s in enumerate(singles)]
    ours = c.power(grads[0], 0.0, -0.5)["blocks"]["kernel"]
    for i, single in enumerate(singles):
        right = single.power({"w": grads[0]["blocks"]["kernel"][i]}, 0.0, -0.5)["w"]
        np.testing.assert_allclose(ours[i], right, rtol=2e-4, atol=2e-4)


def test_what_is_seen_as_a_matrix():
    shapes = {
        "attention/kernel": (16, 4, 4),
        "conv/kernel": (3, 3, 8, 5),
        "embedding": (50, 6),
        "huge": (50, 60),
        "one": (7, 1),
        "empty": (0, 3),
        "scalar": (),
        "vector": (9,),
    }
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}

    def sides(patterns=(), one_sided=False, max_size=45):
        views = Views.of(params, (0,) * len(shapes), patterns, max_size, None, one_sided)
        return {m.name: (m.copies, m.d_i, m.d_o, m.factored) for m in views.factored}

    both = (True, True)
    assert sides(max_size=80) == {
        "attention/kernel": (1, 16, 16, both),
        "conv/kernel": (1, 9, 40, both),
        "embedding": (1, 50, 6, both),
        "huge": (1, 50, 60, both),
        "one": (1, 7, 1, both),
    }
    assert sides() == {
        "attention/kernel": (1, 16, 16, both),
        "conv/kernel": (1, 9, 40, both),
        "embedding": (1, 50, 6, (False, True)),
        "one": (1, 7, 1, both),
    }
    assert sides(one_sided=True, max_size=80) == {
        "attention/kernel": (1, 16, 16, (True, False)),
        "conv/kernel": (1, 9, 40, (True, False)),
        "embedding": (1, 50, 6, (False, True)),
        "huge": (1, 50, 60, (True, False)),
    }
    heads = [("attention", "i head o -> head i o")]
    assert sides(heads)["attention/kernel"] == (4, 16, 4, both)
    assert sides([("conv", "h w i o -> (h w i) o")])["conv/kernel"] == (1, 72, 5, (False, True))
    with pytest.raises(ValueError, match=r"GradientKronecker: the pattern .* does not fit conv/kernel of shape"):
        sides([("conv", "i o -> i o")])


# -- fits --------------------------------------------------------------------------------------------------------------


def test_kl_finds_the_factors_of_a_matrix_gaussian():
    """With their size, for which the other fit needs the trace."""
    rng = np.random.default_rng(0)
    roots = [rng.normal(size=(d, d)) / np.sqrt(d) + 0.5 * np.eye(d) for d in (4, 3)]
    true = np.kron(*(root @ root.T for root in roots))
    Z = jnp.asarray(rng.normal(size=(8000, 4, 3)), jnp.float32)
    G = jnp.einsum("ij,tjk,lk->til", jnp.asarray(roots[0], jnp.float32), Z, jnp.asarray(roots[1], jnp.float32))
    params = {"w": jnp.zeros((4, 3))}

    @functools.partial(jax.jit, static_argnums=0)
    def fitted(estimator):
        step = lambda c, g: (advance(estimator, c, params, {"w": g}), None)
        return jax.lax.scan(step, estimator.init(None, params), G)[0]

    error = lambda c: np.linalg.norm(np.asarray(c.as_matrix()) - true) / np.linalg.norm(true)
    assert error(fitted(GradientKronecker("kl", "product", 0.999))) < 0.05
    assert error(fitted(GradientKronecker("kl", "product", 0.999, basis="eigh"))) < 0.05
    assert error(fitted(GradientKronecker("kl", "corrected", 0.999))) < 0.05
    assert error(fitted(GradientKronecker("ema", "product", 0.999))) < 0.05


def test_a_direction_that_had_no_gradient_does_not_blow_the_other_factor_up():
    params = {"w": jnp.zeros((4, 3))}
    estimator = GradientKronecker("kl", decay=0.5)
    step = jax.jit(functools.partial(advance, estimator))
    c = estimator.init(None, params)
    rng = np.random.default_rng(0)
    for t in range(200):
        g = rng.normal(size=(4, 3)).astype(np.float32)
        g[:, 2] = 0 if t < 199 else g[:, 2]  # the prior has decayed to 1e-60
        c = step(c, params, {"w": g})
    assert np.all(np.isfinite(c.as_matrix())) and float(c.telemetry()["factor_trace_max"]) < 1e8


@pytest.mark.parametrize("first", [0.0, 1e-6])
def test_a_parameter_whose_first_gradient_is_zero(first):
    params = {"w": jnp.zeros((4, 3))}
    rng = np.random.default_rng(0)
    for options in ({"fit": "kl"}, {"fit": "kl", "max_size": 3}, {}, {"eigenvalues": "product"}):
        estimator = GradientKronecker(**options)
        c = advance(estimator, estimator.init(None, params), params, {"w": jnp.full((4, 3), first)})
        for _ in range(3):
            g = {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
            c = advance(estimator, c, params, g)
        u = c.map(g, lambda Gamma: 1 / (jnp.sqrt(Gamma) + 1e-8), 1e-3)["w"]
        assert np.all(np.isfinite(u)) and 0.1 < np.abs(u).max() < 100


# -- bases -------------------------------------------------------------------------------------------------------------


def test_second_moments_are_carried_exactly_where_they_are_uncorrelated():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        QA, QB, RA, RB = (np.linalg.qr(rng.normal(size=(2, d, d)))[0] for d in (4, 3, 4, 3))
        V = rng.uniform(size=(2, 4, 3))
        ours = fits.carried(*map(jnp.asarray, (QA, QB, RA, RB, V)))
        for k in range(2):
            old, new = np.kron(QA[k], QB[k]), np.kron(RA[k], RB[k])
            C = old @ np.diag(V[k].ravel()) @ old.T
            np.testing.assert_allclose(np.asarray(ours[k]).ravel(), np.diag(new.T @ C @ new), rtol=1e-12)
        np.testing.assert_allclose(ours.sum((1, 2)), V.sum((1, 2)), rtol=1e-12)


@pytest.mark.parametrize("basis", ["qr", "eigh"])
def test_the_last_good_basis_stays(basis):
    params = {"a": jnp.zeros((4, 3)), "b": jnp.zeros((3, 5)), "v": jnp.zeros(2)}
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    estimator = GradientKronecker(basis=basis, slots=1)
    c = advance(estimator, estimator.init(None, params), params, grads)
    bad = dataclasses.replace(c, factors=c.factors | {"4": jnp.full_like(c.factors["4"], jnp.nan)})
    after = estimator.refresh(bad, None, params, None, KEY)
    assert int(after.failures) == 1 and int(c.failures) == 0 and int(after.refreshes) == 2
    np.testing.assert_array_equal(after.vectors["4"], c.vectors["4"])
    assert all(np.all(np.isfinite(X)) for X in jax.tree.leaves((after.vectors, after.scales.by_shape)))
    # the next one that is good is taken
    again = estimator.refresh(dataclasses.replace(after, factors=c.factors), None, params, None, KEY)
    assert int(again.failures) == 1 and np.any(np.asarray(again.values["4"]) > 0)


def test_a_gradient_that_is_not_finite_is_not_absorbed():
    params = {"a": jnp.zeros((4, 3)), "v": jnp.zeros(2)}
    estimator = GradientKronecker("kl", "corrected")
    good = {"a": jnp.ones((4, 3)), "v": jnp.ones(2)}
    c = advance(estimator, estimator.init(None, params), params, good)
    bad = estimator.update(c, None, params, None, KEY, grads=good | {"v": jnp.array([1.0, jnp.inf])})
    assert int(bad.skipped) == 1 and int(bad.updates) == 1
    same = dataclasses.replace(bad, skipped=c.skipped)
    jax.tree.map(np.testing.assert_array_equal, same, c)


def test_qr_follows_the_eigenvectors():
    """A step of the iteration for every refresh: with a covariance that stays, the basis gets that of eigh."""
    params = {"w": jnp.zeros((5, 4))}
    estimator = GradientKronecker(decay=0.99, eigenvalues="product")
    rng = np.random.default_rng(0)
    scale = np.diag([3.0, 2.0, 1.0, 0.5, 0.2])
    c = estimator.init(None, params)
    step = jax.jit(functools.partial(advance, estimator))
    for _ in range(300):
        c = step(c, params, {"w": jnp.asarray(scale @ rng.normal(size=(5, 4)), jnp.float32)})
    X, Q = np.asarray(c.factors["5"][0]), np.asarray(c.vectors["5"][0])
    inside = Q.T @ X @ Q
    np.testing.assert_allclose(Q.T @ Q, np.eye(5), atol=1e-5)
    assert np.abs(inside - np.diag(np.diag(inside))).max() < 0.02 * inside.max()
    np.testing.assert_allclose(np.diag(inside), c.values["5"][0], rtol=1e-3)


# -- where it lies -----------------------------------------------------------------------------------------------------


def test_each_device_has_its_share():
    """Sixteen equal layers on eight devices: an eighth, but for the diagonals, which lie as their parameters do."""
    params = {f"{i:02}": jnp.zeros((64, 32)) for i in range(16)}
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    estimator = GradientKronecker()
    estimator = dataclasses.replace(estimator, **estimator.choices(None, params, mesh))
    c = jax.eval_shape(lambda: estimator.init(None, params))
    specs = estimator.partition_specs(c, jax.tree.map(lambda _: PartitionSpec("fsdp"), params), mesh)
    shard = lambda a, spec: int(np.prod(jax.sharding.NamedSharding(mesh, spec).shard_shape(a.shape)))
    own = sum(jax.tree.leaves(jax.tree.map(shard, c, specs)))
    assert own <= 1.15 / 8 * sum(leaf.size for leaf in jax.tree.leaves(c))


@pytest.mark.parametrize("fit", ["ema", "kl"])
def test_owners_of_a_mesh_make_what_one_device_makes(fit):
    """Sizes that share arrays, owners with nothing but padding, a side without a factor, scanned layers."""
    shapes = {"a": (6, 4), "b": (6, 4), "c": (5, 4), "d": (9, 3), "e": (3, 2), "v": (4,)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    rng = np.random.default_rng(0)
    grads = [{n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()} for _ in range(3)]
    estimator = GradientKronecker(fit, "corrected", slots=8, max_size=6, basis="eigh")
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def live(step):
        c = estimator.init(None, params)
        for t, g in enumerate(grads):
            c = step(c, params, g, t == 2)  # of a factor without full rank a basis is arbitrary
        return c, jax.jit(lambda c, v: c.power(v, 1e-3, -0.5))(c, grads[0])

    step = lambda: jax.jit(functools.partial(advance, estimator), static_argnums=3)
    one, right = live(step())
    with jax.set_mesh(mesh):
        eight, ours = live(step())
    for name in ("factors", "values"):
        for size, X in getattr(one, name).items():
            np.testing.assert_allclose(getattr(eight, name)[size], X, rtol=0, atol=1e-5 * np.abs(X).max())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max()), ours, right)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (dict(fit="emma"), ValueError, r"GradientKronecker\(fit\) should be one of 'ema', 'kl'.* Did you mean 'ema'"),
        (dict(eigenvalues="corect"), ValueError, r"GradientKronecker\(eigenvalues\) .* Did you mean 'corrected'"),
        (dict(decay=1.0), ValueError, r"GradientKronecker\(decay\) should be at least 0.0 and below 1.0, not 1.0"),
        (dict(factor_decay=-0.1), ValueError, r"GradientKronecker\(factor_decay\) should be at least 0.0"),
        (dict(basis="svd"), ValueError, r"GradientKronecker\(basis\) should be one of 'qr', 'eigh', not 'svd'"),
        (dict(max_size=0), ValueError, r"GradientKronecker\(max_size\) should be at least 1, not 0"),
        (dict(one_sided="yes"), TypeError, r"GradientKronecker\(one_sided\) should be True or False, not 'yes'"),
        (dict(patterns="i o -> i o"), TypeError, r"GradientKronecker\(patterns\) should be a list of"),
        (dict(slots=0), ValueError, r"GradientKronecker\(slots\) should be at least 1, not 0"),
    ],
)
def test_bad_options(options, kind, message):
    with pytest.raises(kind, match=message):
        GradientKronecker(**options)


def test_complex_parameters_are_refused():
    with pytest.raises(TypeError, match=r"GradientKronecker .*real floating-point numbers, and w is complex64. Split"):
        GradientKronecker().init(None, {"w": jnp.zeros((2, 2), jnp.complex64)})
