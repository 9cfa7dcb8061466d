"""KFAC's averages, inverses and bookkeeping against float64: statistics themselves are tested in `test_capture.py`."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import kfac_reference as ref
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

from curvtrain import losses
from curvtrain.curvature import KFAC, as_matrix, fvp
from curvtrain.curvature.capture import EmbedLayer, MatrixLayer, NormLayer, PlainParameter
from curvtrain.objective import Objective

N, T, V, D = 6, 3, 5, 4
INVERSES = ("cholesky", "eigh", "ekfac")
inverses = pytest.mark.parametrize("inverse", INVERSES)


class Model(nnx.Module):
    """Blocks of every kind: embedding, plain parameter, norm, dense layers of equal and unequal sizes, groups."""

    def __init__(self, rngs, tied=False):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.position = nnx.Param(jnp.full((T, D), 0.1))
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.a = nnx.Linear(D, D, rngs=rngs)
        self.b = nnx.Linear(D, D, use_bias=False, rngs=rngs)
        self.conv = nnx.Conv(D, D, (2,), feature_group_count=2, rngs=rngs)
        self.head = None if tied else nnx.Linear(D, V, rngs=rngs)

    def __call__(self, x):
        h = self.norm(self.embed(x) + self.position[...])
        h = nnx.tanh(self.conv(nnx.tanh(self.b(nnx.tanh(self.a(h))))))
        return self.embed.attend(h) if self.head is None else self.head(h)


predict = lambda model, batch: model(batch["x"])


@functools.cache
def build(tied=False):
    objective, params = Objective.from_model(Model(nnx.Rngs(0), tied), predict, losses.SoftmaxCrossEntropy("t"))
    rng = np.random.default_rng(0)
    return objective, jax.tree.map(lambda a: (a + 0.3 * rng.normal(size=a.shape)).astype(np.float32), params)


def batch_of(seed=0, n=N):
    rng = np.random.default_rng(seed)
    x, t = rng.integers(0, V - 1, (n, T)), rng.integers(0, V, (n, T))  # one token is never seen
    return {"x": x.astype(np.int32), "t": t.astype(np.int32)}


def vector_of(params, seed=5):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), params)


def kfac(inverse="cholesky", **options):
    return KFAC("empirical", inverse=inverse, plain="position", **options)


@functools.partial(jax.jit, static_argnums=0)
def update(estimator, curvature, objective, params, batch, key=None):
    return estimator.update(curvature, objective, params, batch, key)


@functools.partial(jax.jit, static_argnums=0)
def refresh(estimator, curvature, objective, params, damping=None):
    return estimator.refresh(curvature, objective, params, None, None, damping)


@jax.jit
def solve(curvature, vector, damping):
    return curvature.solve(vector, damping)


matvec = jax.jit(lambda curvature, vector: curvature.matvec(vector))


@functools.cache
def updated(estimator, tied=False, updates=2):
    """The curvature after updates on different batches."""
    objective, params = build(tied)
    curvature = estimator.init(objective, params)
    for seed in range(updates):
        curvature = update(estimator, curvature, objective, params, batch_of(seed))
    return curvature


@functools.cache
def refreshed(inverse, tied=False, damping=0.03):
    """The same after a refresh; for "ekfac", with scales of one more update in the new basis."""
    estimator = kfac(inverse)
    objective, params = build(tied)
    curvature = refresh(estimator, updated(estimator, tied), objective, params, damping)
    if inverse != "ekfac":
        return curvature
    return dataclasses.replace(curvature, scales=update(estimator, curvature, objective, params, batch_of(9)).scales)


@functools.cache
def dense(inverse):
    return np.asarray(jax.jit(lambda c: c.as_matrix())(refreshed(inverse)), np.float64)


def close(got, want, tolerance):
    """Within a tolerance relative to the largest entry."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max(), np.abs(got - want).max() / np.abs(want).max()


def float64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def blocks(curvature):
    """{layer name: dense float64 blocks of C}: (K, d_i d_o, d_i d_o) in row-major order of M, one for each copy."""
    found = {}
    for layer in curvature.coverage.layers:
        name = layer.name
        if isinstance(layer, MatrixLayer):
            pairs = zip(*float64(curvature.pair(curvature.factors, name)), strict=True)
            found[name] = np.stack([np.kron(A, G) for A, G in pairs])
            if curvature.inverse == "ekfac":
                bases = zip(*float64(curvature.pair(curvature.vectors, name)), strict=True)
                Q = np.stack([np.kron(QA, QG) for QA, QG in bases])
                S = float64(curvature.scales[name]).reshape(len(Q), 1, -1)
                found[name] = Q * S @ Q.swapaxes(1, 2)
        elif isinstance(layer, EmbedLayer):
            e = {n: v[0] for n, v in float64(curvature.blocks[layer.block().key]).items()}
            found[name] = (np.kron(np.diag(e["counts"]), e["G"]) + np.kron(np.diag(e["G_head"]), e["A_head"]))[None]
        elif isinstance(layer, NormLayer):
            F = float64(curvature.blocks["2x2"]["F"])
            C = np.zeros((2, D, 2, D))
            for c in range(D):
                C[:, c, :, c] = F[c]
            found[name] = C.reshape(1, 2 * D, 2 * D)
        else:
            assert isinstance(layer, PlainParameter)
            found[name] = np.diag(float64(curvature.blocks[name]["D2"]).ravel())[None]
    return found


def by_block(curvature, vector, function):
    """function(C of a copy) vec(M) for every block, as matrices."""
    found = {}
    for name, M in float64(curvature.coverage.matrices(vector)).items():
        each = [function(C) @ m.ravel() for C, m in zip(blocks(curvature)[name], M, strict=True)]
        found[name] = np.stack(each).reshape(M.shape)
    return found


def compare(curvature, got, want, tolerance):
    got = curvature.coverage.matrices(got)
    assert got.keys() == want.keys()
    for name in want:
        close(got[name], want[name], tolerance)


# -- averages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_moving_averages_are_debiased(ema):
    """After k batches: sum_j ema^(k-j) X_j / sum_j ema^(k-j)."""
    each = []
    objective, params = build()
    for seed in range(3):
        once = kfac(ema=0.0)
        each.append(update(once, once.init(objective, params), objective, params, batch_of(seed)))
    weights = np.array([ema**2, ema, 1]) / (ema**2 + ema + 1)
    after = updated(kfac(ema=ema), updates=3)
    for name in ("factors", "blocks"):
        parts = [float64(getattr(c, name)) for c in each]
        want = jax.tree.map(lambda *X: sum(w * x for w, x in zip(weights, X, strict=True)), *parts)
        jax.tree.map(lambda got, want: close(got, want, 1e-6), getattr(after, name), want)
    assert int(after.updates) == 3


def test_factors_are_statistics_per_example():
    """A of a dense layer on the embeddings is the mean of its rows; G is per token, so is a diagonal."""
    objective, params = Objective.from_model(
        nnx.Linear(D, V, rngs=nnx.Rngs(0)), predict, losses.SoftmaxCrossEntropy("t")
    )
    x = np.random.default_rng(0).normal(size=(N, T, D)).astype(np.float32)
    batch = {"x": x, "t": batch_of()["t"]}
    c = update(KFAC("empirical"), KFAC("empirical").init(objective, params), objective, params, batch)
    rows = np.concatenate([x, np.ones((N, T, 1))], -1).reshape(-1, D + 1).astype(np.float64)
    s = ref.gradient("softmax", rows @ ref.float64(ref.matrix(jax.tree.map(np.asarray, params))), batch["t"].ravel())
    A, G = c.pair(c.factors, "")
    close(A[0], rows.T @ rows / (N * T), 1e-6)
    close(G[0], s.T @ s / (N * T), 1e-6)


def test_equal_sizes_share_a_stack():
    c = updated(kfac())
    shapes = {size: X.shape for size, X in c.factors.items()}
    # a: 5 x 4, b: 4 x 4, conv: two groups of (2 * 2 + 1) x 2, head: 5 x 5
    assert shapes == {"4": (3, 4, 4), "5": (5, 5, 5), "2": (2, 2, 2)}
    seen = [(s, i + k) for _, (a, i, g, j) in c.layout.at for s, i, k in ((a, i, 0), (g, j, 0))]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("microbatch", [2, 4])
def test_pieces(microbatch):
    objective, params = build()
    estimator = kfac()
    pieces = update(
        estimator, estimator.init(objective, params), objective.with_microbatch(microbatch), params, batch_of()
    )
    jax.tree.map(
        lambda a, b: close(a, b, 1e-6) if np.any(b) else None, pieces.factors, updated(estimator, updates=1).factors
    )


# -- C and its inverse -------------------------------------------------------------------------------------------------


@inverses
def test_matvec_and_dense_matrix(inverse):
    c = refreshed(inverse)
    v = vector_of(build()[1])
    Cv, C = matvec(c, v), dense(inverse)
    compare(c, Cv, by_block(c, v, lambda C: C), 1e-6)
    close(C, C.T, 1e-6)
    close(C @ np.asarray(ravel_pytree(v)[0], np.float64), ravel_pytree(Cv)[0], 1e-6)
    assert jax.tree.structure(c.coverage.zeros()) == jax.tree.structure(v)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("damping", [1e-3, 0.03, 1.0])
@pytest.mark.parametrize("inverse", ["eigh", "ekfac"])
def test_eigenbases_solve_for_any_damping(inverse, damping, tied):
    """(C + damping I)^-1 v, as accurate as float32 allows: its accuracy times the condition number."""
    c = refreshed(inverse, tied)
    v = vector_of(build(tied)[1])
    want = by_block(c, v, lambda C: np.linalg.inv(C + damping * np.eye(len(C))))
    largest = max(np.linalg.eigvalsh(C).max() for C in blocks(c).values())
    got, tolerance = solve(c, v, damping), 1e-6 * max(1, largest / damping)
    compare(c, got, want, tolerance)
    if not tied:
        C, right = dense(inverse), np.asarray(ravel_pytree(v)[0], np.float64)
        close(ravel_pytree(got)[0], np.linalg.solve(C + damping * np.eye(len(C)), right), tolerance)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("damping", [0.03, 0.3])  # of the last refresh, and another
def test_cholesky_splits_the_damping(damping, tied):
    c = refreshed("cholesky", tied)
    v = vector_of(build(tied)[1])
    got, matrices = solve(c, v, damping), float64(c.coverage.matrices(v))
    want = by_block(c, v, lambda C: np.linalg.inv(C + damping * np.eye(len(C))))
    exact = dict(want)
    for layer in c.coverage.layers:
        if isinstance(layer, MatrixLayer):
            triples = zip(*float64(c.pair(c.factors, layer.name)), matrices[layer.name], strict=True)
            want[layer.name] = np.stack([ref.factored_solve(A, G, M, damping) for A, G, M in triples])
    compare(c, got, want, 1e-5)
    assert np.abs(want["a"] - exact["a"]).max() > 1e-2 * np.abs(exact["a"]).max()  # it is an approximation


def test_the_cache_is_used(monkeypatch):
    """Solves for the damping of the last refresh read its inverses, others factorise again."""
    c = refreshed("cholesky")
    v = vector_of(build()[1])
    broken = dataclasses.replace(c, inverses=jax.tree.map(jnp.zeros_like, c.inverses))
    assert not np.any(solve(broken, v, 0.03)["a"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, solve(broken, v, 0.2), solve(c, v, 0.2))


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 1.0])
@pytest.mark.parametrize("inverse", ["eigh", "ekfac"])
def test_powers(inverse, exponent):
    c, damping = refreshed(inverse), 0.03
    v = vector_of(build()[1])

    def power(C):
        values, Q = np.linalg.eigh(C + damping * np.eye(len(C)))
        return Q * values**exponent @ Q.T

    compare(c, c.power(v, damping, exponent), by_block(c, v, power), 1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@inverses
def test_diagonal_and_determinant(inverse, tied):
    """Of the matrix C as it is, for any damping; also of a table that `attend` uses too, row by row."""
    c = refreshed(inverse, tied)
    dense = {name: list(C) for name, C in blocks(c).items()}
    ones = jax.tree.map(np.ones_like, c.coverage.zeros())
    diagonal = by_block(c, ones, lambda C: np.diag(np.diag(C)))
    compare(c, jax.jit(lambda c: c.diagonal())(c), diagonal, 1e-6)
    of = jax.jit(lambda c, damping: c.logdet(damping))
    for damping in (1e-3, 0.03, 1.0):
        want = sum(np.linalg.slogdet(C + damping * np.eye(len(C)))[1] for Cs in dense.values() for C in Cs)
        np.testing.assert_allclose(of(c, damping), want, rtol=1e-5)


@pytest.mark.parametrize("inverse", ["eigh", "ekfac"])
def test_powers_of_a_tied_table(inverse):
    c, damping = refreshed(inverse, True), 0.03
    v = vector_of(build(True)[1])

    def root(C):
        values, Q = np.linalg.eigh(C + damping * np.eye(len(C)))
        return Q * values**-0.5 @ Q.T

    compare(c, c.power(v, damping, -0.5), by_block(c, v, root), 1e-5)


def test_no_solve_answers_for_another_damping():
    """A factor without an inverse: at damping 0 the result is not finite, whatever the cache holds."""
    c = refreshed("cholesky", damping=1.0)
    factors = dict(c.factors)
    factors["5"] = factors["5"].at[0].set(jnp.ones((5, 5)))  # of rank one
    c, v = dataclasses.replace(c, factors=factors), vector_of(build()[1])
    cached, exact = solve(c, v, 1.0), solve(c, v, 0.0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(cached))
    broken = [name for name, M in c.coverage.matrices(exact).items() if not np.all(np.isfinite(M))]
    assert "a" in broken and "head" not in broken


def test_cholesky_has_no_powers():
    c = refreshed("cholesky")
    v = vector_of(build()[1])
    jax.tree.map(np.testing.assert_array_equal, c.power(v, 0.03, -1.0), c.solve(v, 0.03))
    with pytest.raises(TypeError, match=r"KFAC\(inverse='cholesky'\) have no power -0.5: build KFAC\(inverse='eigh'\)"):
        c.power(v, 0.03, -0.5)


@inverses
def test_before_any_update_the_curvature_is_zero(inverse):
    objective, params = build()
    estimator = kfac(inverse)
    v = vector_of(params)
    for c in (
        estimator.init(objective, params),
        refresh(estimator, estimator.init(objective, params), objective, params),
    ):
        jax.tree.map(lambda got, v: close(got, v / 0.1, 1e-6), solve(c, v, 0.1), v)


def test_it_is_the_exact_fisher_of_one_example():
    """N = 1, R = 1: every block of the exact Fisher is a Kronecker product, so "eigh" inverts the block itself."""

    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(D, 3, rngs=rngs)
            self.b = nnx.Linear(3, V, rngs=rngs)

        def __call__(self, x):
            return self.b(nnx.tanh(self.a(x)))

    objective, params = Objective.from_model(MLP(nnx.Rngs(0)), predict, losses.SoftmaxCrossEntropy("t"))
    batch = {"x": np.random.default_rng(0).normal(size=(1, D)).astype(np.float32), "t": np.array([1])}
    estimator = KFAC("exact", inverse="eigh")
    c = update(estimator, estimator.init(objective, params), objective, params, batch)
    F = np.array(as_matrix(jax.jit(lambda v: fvp(objective, params, v, batch, None, fisher="exact")), params))
    size = sum(a.size for a in jax.tree.leaves(params["a"]))
    F[:size, size:] = F[size:, :size] = 0
    close(c.as_matrix(), F, 1e-6)


class Stack(nnx.Module):
    """Two layers of equal shape: one by one, or scanned over as one."""

    def __init__(self, rngs, scan):
        one = lambda rngs: nnx.Linear(D, D, rngs=rngs)
        self.scan = scan
        self.blocks = nnx.vmap(one)(rngs.split(2)) if scan else nnx.List([one(rngs), one(rngs)])

    def __call__(self, x):
        step = lambda x, block: nnx.tanh(block(x))
        if self.scan:
            return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        return step(step(x, self.blocks[0]), self.blocks[1])


@inverses
def test_stacked_layers(inverse):
    """Scanned layers are preconditioned as they are one by one."""
    batch = {"x": np.random.default_rng(0).normal(size=(N, D)).astype(np.float32), "t": np.arange(N) % D}
    found = {}
    for scan in (True, False):
        objective, params = Objective.from_model(Stack(nnx.Rngs(0), scan), predict, losses.SoftmaxCrossEntropy("t"))
        if scan:
            stacked = params["blocks"]
        else:
            params = {"blocks": {i: jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(2)}}
        estimator = KFAC("empirical", inverse=inverse)
        c = update(estimator, estimator.init(objective, params), objective, params, batch)
        c = update(estimator, refresh(estimator, c, objective, params, 0.1), objective, params, batch)
        found[scan] = solve(c, params, 0.1)["blocks"]
    one_by_one = jax.tree.map(lambda *a: np.stack(a), found[False][0], found[False][1])
    jax.tree.map(lambda got, want: close(got, want, 2e-6), found[True], one_by_one)


# -- EKFAC -------------------------------------------------------------------------------------------------------------


def test_scales_start_anew_in_every_basis():
    """Seeded with the products of eigenvalues at a refresh, then averaged with the second moments in that basis."""
    estimator = kfac("ekfac", ema=0.5)
    objective, params = build()
    seeded = refresh(estimator, updated(estimator), objective, params)
    for name in ("a", "conv"):
        alpha, gamma = seeded.pair(seeded.values, name)
        np.testing.assert_allclose(seeded.scales[name], alpha[:, :, None] * gamma[:, None, :])
    once = update(estimator, seeded, objective, params, batch_of(3))
    fresh = dataclasses.replace(seeded, scales=jax.tree.map(jnp.zeros_like, seeded.scales), scale_weight=jnp.float32(0))
    S = update(estimator, fresh, objective, params, batch_of(3)).scales
    for name in S:
        close(once.scales[name], (0.5 * float64(seeded.scales[name]) + float64(S[name])) / 1.5, 1e-6)
    np.testing.assert_allclose([seeded.scale_weight, once.scale_weight], [N * T, 1.5 * N * T], rtol=1e-6)
    # the second moments of a basis have the trace of the Fisher, whatever the basis
    identity = updated(kfac("ekfac", ema=0.0), updates=1)
    moved = refresh(kfac("ekfac", ema=0.0), identity, objective, params)
    moved = update(
        kfac("ekfac", ema=0.0), dataclasses.replace(moved, scale_weight=jnp.float32(0)), objective, params, batch_of(0)
    )
    for name in S:
        close(jnp.sum(moved.scales[name], (1, 2)), jnp.sum(identity.scales[name], (1, 2)), 1e-5)
        assert np.abs(np.asarray(moved.scales[name] - identity.scales[name])).max() > 1e-4


def test_scales_are_taken_now_and_then():
    estimator = kfac("ekfac", scale_every=2)
    objective, params = build()
    states = [estimator.init(objective, params)]
    for seed in range(3):
        states.append(update(estimator, states[-1], objective, params, batch_of(seed)))
    changed = [not np.array_equal(a.scales["a"], b.scales["a"]) for a, b in itertools.pairwise(states)]
    assert changed == [True, False, True]
    every = updated(kfac("ekfac"), updates=3)
    jax.tree.map(lambda a, b: close(a, b, 1e-6), states[-1].factors, every.factors)


# -- bookkeeping -------------------------------------------------------------------------------------------------------


@inverses
def test_a_factor_that_is_not_finite_keeps_its_inverse(inverse):
    estimator = kfac(inverse)
    objective, params = build()
    good = refreshed(inverse, damping=0.03)
    bad = dataclasses.replace(good, factors=good.factors | {"2": good.factors["2"].at[1].set(jnp.nan)})
    after = refresh(estimator, bad, objective, params, 0.03)
    assert int(after.failures) == 1 and int(good.failures) == 0
    v = vector_of(params)
    got = solve(after, v, 0.03)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got))
    name = "inverses" if inverse == "cholesky" else "vectors"
    np.testing.assert_array_equal(getattr(after, name)["2"][1], getattr(good, name)["2"][1])
    if inverse == "cholesky":  # where solve has to factorise by itself, nothing hides it: conv's G, no other layer's
        layers = {name: np.all(np.isfinite(M)) for name, M in after.coverage.matrices(solve(after, v, 0.2)).items()}
        assert [name for name, finite in layers.items() if not finite] == ["conv"]


@inverses
def test_an_embedding_that_is_not_finite_keeps_its_basis(inverse):
    objective, params = build()
    good = refreshed(inverse)
    e = {name: dict(arrays) for name, arrays in good.blocks.items()}
    table = f"table {V}x{D}"
    e[table]["G"] = e[table]["G"] * jnp.nan
    after = refresh(kfac(inverse), dataclasses.replace(good, blocks=e), objective, params)
    assert int(after.failures) == 1
    np.testing.assert_array_equal(after.bases[table]["Q"], good.bases[table]["Q"])


@inverses
def test_a_batch_that_says_nothing_is_not_absorbed(inverse):
    """Not a number in the parameters' gradients, or every example masked."""
    estimator = kfac(inverse)
    objective, params = build()
    before = refreshed(inverse)
    broken = jax.tree.map(lambda a: a, params)
    broken["head"]["bias"] = broken["head"]["bias"] * np.nan
    masked = batch_of() | {"mask": np.zeros((N, T), bool)}
    for p, batch in ((broken, batch_of()), (params, masked)):
        after = update(estimator, before, objective, p, batch)
        assert int(after.skipped) == 1 and int(after.updates) == int(before.updates) + 1
        same = dataclasses.replace(after, skipped=before.skipped, updates=before.updates)
        jax.tree.map(np.testing.assert_array_equal, same, before)


@inverses
def test_programs(inverse):
    """One trace for any number of steps, arguments that can be donated, and abstract evaluation."""
    estimator = kfac(inverse)
    objective, params = build()
    traces = []

    @functools.partial(jax.jit, donate_argnums=0)
    def step(c, params, batch, damping):
        traces.append(1)
        c = estimator.refresh(
            estimator.update(c, objective, params, batch, jax.random.key(0)), objective, params, batch, None, damping
        )
        return c, c.solve(params, damping)

    c = jax.jit(lambda p: estimator.init(objective, p))(params)
    like = jax.tree.map(lambda a: (a.shape, a.dtype), c)
    for seed, damping in enumerate((0.1, 0.2, 0.3)):
        donated = jax.tree.leaves(c.factors)[0]
        c, _ = step(c, params, batch_of(seed), damping)
        assert donated.is_deleted()
    assert len(traces) == 1
    assert jax.tree.map(lambda a: (a.shape, a.dtype), c) == like
    assert int(c.updates) == int(c.refreshes) == 3
    abstract = jax.eval_shape(estimator.init, objective, params)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract) == like
    specs = estimator.partition_specs(c, None, None)
    assert jax.tree.structure(specs, is_leaf=lambda s: isinstance(s, PartitionSpec)) == jax.tree.structure(c)


def test_telemetry():
    seen = {name: float(v) for name, v in refreshed("cholesky").telemetry().items()}
    assert seen["refreshes"] == 1 and seen["failures"] == seen["skipped"] == 0
    assert seen["factor_trace_max"] >= seen["factor_trace_mean"] > 0


def test_overview():
    objective, params = build(True)
    lines = kfac("ekfac").overview(objective, params).splitlines()
    cells = {line.split()[0]: line for line in lines}
    assert "Linear" in cells["a"] and "ekfac 5 x 4" in cells["a"] and "Conv" in cells["conv"]
    assert (
        "ekfac 5 x 2 x 2" in cells["conv"]
        and "unit-wise 2 x 2" in cells["norm"]
        and "diagonal x dense" in cells["embed"]
    )
    assert "(3, 4)" in cells["position"] and "diagonal" in cells["position"]
    # a: two factors, their eigenvectors and eigenvalues, and S
    assert f" {4 * (2 * (25 + 16) + 9 + 20)} " in cells["a"]
    size = sum(a.size for a in jax.tree.leaves(params))
    assert f"{size} parameters" in lines[-1] and lines[-1].endswith("100.0%")
    assert len(lines) == 2 + len(kfac().coverage(objective, params).layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(fisher="true"), r"KFAC\(fisher"),
        (dict(weight_sharing="none"), r"KFAC\(weight_sharing"),
        (dict(inverse="lu"), r"KFAC\(inverse"),
        (dict(ema=1.1), r"KFAC\(ema"),
        (dict(damping=-1.0), r"KFAC\(damping"),
        (dict(scale_every=0), r"KFAC\(scale_every"),
        (dict(uncovered="ignore"), r"KFAC\(uncovered"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        KFAC(**options)


def test_objectives_without_a_model():
    objective = Objective.from_loss(lambda p, batch: jnp.sum(p))
    with pytest.raises(TypeError, match=r"KFAC needs the model's outputs"):
        KFAC().init(objective, jnp.ones(3))
    with pytest.raises(TypeError, match=r"init\(\) needs the objective"):
        KFAC().init(None, jnp.ones(3))
