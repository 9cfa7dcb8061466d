"""Kron and Affine against the float64 reference, and what they converge to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import psgd_reference as reference
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from curvtrain.curvature import Affine, Elementwise, Kron, LowRank, XMat
from curvtrain.curvature.psgd import kronecker
from curvtrain.curvature.psgd.base import Structure, initial_scale, signs
from curvtrain.curvature.psgd.geometry import GEOMETRIES, procrustes, spectral_bound, triangular_inverse
from curvtrain.curvature.psgd.layout import any_order, block_for, consecutive

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(3)


def norm(A):
    """The bounds of `geometry.py`, for the reference: that of a symmetric matrix, or of an antisymmetric one."""
    if np.allclose(A, -A.T):
        return np.linalg.norm(A) / np.sqrt(2)
    return float(spectral_bound(jnp.asarray(A, jnp.float32)))


def close(ours, theirs, tolerance=3e-6):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(np.abs(theirs).max(), 1e-30))


def spd(n, condition, rng):
    Q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    return Q * np.logspace(0, np.log10(condition), n) @ Q.T


@pytest.fixture
def one_device(monkeypatch):
    """Programs for one device, where factors of one size are stepped together; the tests' processes have eight."""
    monkeypatch.setattr(kronecker, "on_one_device", lambda: True)


@functools.cache
def program(method):
    return jax.jit(method, static_argnums=0)


def fit(family, structure, state, v, h, rate):
    """One update, compiled."""
    return program(family.fit)(structure, state, v, h, KEY, jnp.float32(rate))


def apply(family, structure, state, vector):
    return program(family.apply)(structure, state, vector)


def structure_of(shape, stack=0):
    params = {"w": jnp.zeros(shape)}
    return Structure.of(params, {"w": stack})


def dense_p(family, structure, state):
    shape = structure.shapes[0]
    n = int(np.prod(shape))
    column = lambda e: family.apply(structure, state, {"w": e.reshape(shape)})["w"].ravel()
    return jax.jit(jax.vmap(column))(jnp.eye(n)).T


def factors_of(state, sides):
    """The reference's factors of the first tensor of the only bucket."""
    (bucket,) = state.values()
    found = []
    for i, side in enumerate(sides):
        q = bucket["Q"].get(str(i))
        q = None if q is None else np.asarray(q[0], np.float64)
        found.append(q[0] if side.kind == "dense" and side.count == 1 else q)
    return found


def bounds_of(state, sides):
    (bucket,) = state.values()
    found = []
    for i, side in enumerate(sides):
        bound = bucket["L"].get(str(i))
        single = side.kind != "dense" or side.count == 1
        found.append(bound if bound is None else np.asarray(bound[0], np.float64).squeeze(None if single else ()))
    return found


LAYOUTS = {
    "dense": ((6, 5), {}),
    "dense x diagonal": ((12, 3), {"max_skew": 1.0}),
    "diagonal": ((7,), {}),
    "scalar": ((), {}),
    "blocks": ((8, 6), {"block_size": 3}),
    "padded blocks": ((7, 5), {"block_size": 4}),
    "none": ((12, 3), {"max_skew": 1.0, "beyond": "none"}),
    "merged": ((2, 3, 1, 5), {}),
    "three sides": ((3, 4, 5), {"merge": False}),
}


EVERY = ("dense x diagonal", "padded blocks")  # layouts that all geometries are tested with


@pytest.mark.parametrize("newton", [False, True], ids=["whitening", "newton"])
@pytest.mark.parametrize(
    ("layout", "geometry"),
    [(layout, geometry) for layout in LAYOUTS for geometry in (GEOMETRIES if layout in EVERY else ("PRO", "EQ"))],
)
def test_steps_are_those_of_the_reference(one_device, layout, geometry, newton):
    """Three updates with two probes: the first starts from the initial scale, the others from what came of it."""
    shape, options = LAYOUTS[layout]
    family, structure = Kron(geometry, damping=0.0, **options), structure_of(shape)
    _, sides = family.sides(shape)
    sizes = tuple(side.size for side in sides)
    state, rng = family.init(structure), np.random.default_rng(1)
    for step in range(3):
        h = rng.normal(size=(2, *shape)).astype(np.float32)
        v = rng.normal(size=(2, *shape)).astype(np.float32) if newton else None
        H, V = list(h.reshape(2, *sizes).astype(float)), None if v is None else list(v.reshape(2, *sizes).astype(float))
        if step == 0:
            count = sum(side.kind != "none" for side in sides)
            if newton:
                scale = reference.initial_scale(H, V, count)
            else:
                scale = np.mean(np.stack(H) ** 4) ** (-1 / 8 / count)
            before = [None if q is None else scale * q for q in factors_of(state, sides)]
        else:
            before = factors_of(state, sides)
        expected, bounds = reference.kron_update(
            geometry, before, H, V, rate=0.3, lipschitz=bounds_of(state, sides), norm=norm
        )
        state, failures = fit(family, structure, state, None if v is None else {"w": v}, {"w": h}, 0.3)
        assert failures == 0
        whole = lambda factors: [
            None if q is None else reference.matrix(q, n) for q, n in zip(factors, sizes, strict=True)
        ]
        ours, theirs = whole(factors_of(state, sides)), reference.balance(whole(expected))
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                close(a, b)
        for a, b in zip(bounds_of(state, sides), bounds, strict=True):
            if a is not None:
                close(a, b)
        g = rng.normal(size=shape).astype(np.float32)
        applied = reference.kron_precondition("EQ", theirs, g.reshape(sizes).astype(float))
        out = apply(family, structure, state, {"w": jnp.asarray(g)})["w"]
        close(np.asarray(out).reshape(sizes), applied, 1e-5)


@pytest.mark.parametrize("geometry", ["PRO", "QEP", "EQ"])
@pytest.mark.parametrize("newton", [False, True])
def test_factors_that_are_stepped_together_are_those_that_are_stepped_apart(monkeypatch, geometry, newton):
    """Blocks of one size from several sides and buckets, diagonal sides, and padding."""
    rng, family = np.random.default_rng(0), Kron(geometry, block_size=4, max_skew=1.0)
    params = {
        "a": jnp.zeros((8, 7)),
        "b": jnp.zeros((12, 8)),
        "c": jnp.zeros(7),
        "d": jnp.zeros((3, 8, 7)),
        "e": jnp.zeros(()),
    }
    structure = Structure.of(params, {"a": 0, "b": 0, "c": 0, "d": 1, "e": 0})
    draw = lambda: jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(2, *p.shape)), jnp.float32), params)
    pairs = [(draw() if newton else None, draw()) for _ in range(2)]
    pairs[1][1]["b"] = pairs[1][1]["b"].at[0, 0, 0].set(jnp.nan)  # one tensor is left as it was
    found = []
    for together in (False, True):
        monkeypatch.setattr(kronecker, "on_one_device", lambda together=together: together)
        step = jax.jit(lambda state, pair: family.fit(structure, state, *pair, KEY, jnp.float32(0.3)))
        state = family.init(structure)
        for pair, failed in zip(pairs, (0, 1), strict=True):
            state, failures = step(state, pair)
            assert failures == failed
        found.append(state)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), *found)


def test_a_stack_is_its_members():
    """Leaves of equal shape, and the layers of a scan within one, are fitted as each would be alone."""
    rng, family = np.random.default_rng(0), Kron(damping=0.0, block_size=4)
    params = {"a": jnp.zeros((6, 5)), "b": jnp.zeros((3, 6, 5)), "c": jnp.zeros((5,))}
    structure = Structure.of(params, {"a": 0, "b": 1, "c": 0})
    assert [len(bucket.members) for bucket in family.buckets(structure)] == [2, 1]
    assert family.buckets(structure)[0].count == 4
    state = family.init(structure)
    alone = [family.init(structure_of((6, 5))) for _ in range(4)]
    for _ in range(3):
        h = {n: jnp.asarray(rng.normal(size=(1, *p.shape)), jnp.float32) for n, p in params.items()}
        state, _ = fit(family, structure, state, None, h, 0.3)
        parts = [h["a"], *jnp.moveaxis(h["b"], 1, 0)]
        alone = [
            fit(family, structure_of((6, 5)), s, None, {"w": x}, 0.3)[0] for s, x in zip(alone, parts, strict=True)
        ]
    g = {n: jnp.asarray(rng.normal(size=p.shape), jnp.float32) for n, p in params.items()}
    together = apply(family, structure, state, g)
    for i, (ours, single) in enumerate(zip([together["a"], *together["b"]], alone, strict=True)):
        x = g["a"] if i == 0 else g["b"][i - 1]
        close(ours, apply(family, structure_of((6, 5)), single, {"w": x})["w"])


@pytest.mark.parametrize("family", [Kron(), Kron("EQ"), Kron("QEP", block_size=3), Affine(), Kron(max_skew=0.0)])
def test_apply_and_invert_are_inverse_and_symmetric(family):
    rng, structure = np.random.default_rng(0), structure_of((6, 5))
    state = family.init(structure)
    for _ in range(5):
        state, _ = fit(family, structure, state, None, {"w": rng.normal(size=(1, 6, 5))}, 0.3)
    g = {"w": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)}
    close(family.invert(structure, state, apply(family, structure, state, g))["w"], g["w"], 1e-4)
    P = dense_p(family, structure, state)
    close(P, P.T)
    assert np.linalg.eigvalsh(np.asarray(P, np.float64)).min() > 0


# -- fits --------------------------------------------------------------------------------------------------------------


def errors(family, H, rate, updates, shape=(5, 10), seed=0):
    """Relative errors of P against H^-1 after so many updates with products H v."""
    structure, n = structure_of(shape), len(H)
    H32 = jnp.asarray(H, jnp.float32)

    def step(state, key):
        v = jax.random.normal(key, (1, n))
        pairs = ({"w": x.reshape(1, *shape)} for x in (v, v @ H32))
        return family.fit(structure, state, *pairs, jax.random.fold_in(key, 1), jnp.float32(rate))[0], None

    run = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys)[0])
    state, found, done = family.init(structure), [], 0
    for until in updates:
        state = run(state, jax.random.split(jax.random.key(seed * 10**6 + done), until - done))
        inverse = np.linalg.inv(H)
        found.append(np.linalg.norm(dense_p(family, structure, state) - inverse) / np.linalg.norm(inverse))
        done = until
    return found


@pytest.mark.parametrize("seed", range(3))
def test_kron_finds_the_inverse_of_a_kronecker_product(seed):
    rng = np.random.default_rng(seed)
    H = np.kron(spd(5, 10, rng), spd(10, 10, rng))
    assert errors(Kron(), H, 0.1, [300], seed=seed)[0] < 1e-3
    assert errors(Kron(), H, 0.5, [100], seed=seed)[0] < 1e-5


@pytest.mark.parametrize("geometry", ["QUAD", "QEQ", "QEP"])
def test_other_geometries_find_it_too(geometry):
    rng = np.random.default_rng(0)
    H = np.kron(spd(5, 10, rng), spd(10, 10, rng))
    assert errors(Kron(geometry), H, 0.5, [300])[0] < 1e-4


def test_eq_finds_it_more_slowly():
    rng = np.random.default_rng(0)
    H = np.kron(spd(5, 10, rng), spd(10, 10, rng))
    slow, slower = errors(Kron("EQ"), H, 0.5, [300, 1000])
    assert slow < 1e-2 and slower < 1e-4


def test_a_negative_curvature_is_taken_by_its_size():
    rng = np.random.default_rng(0)
    A, B = spd(5, 4, rng), spd(10, 4, rng)
    H = np.kron(A, B)
    flipped = errors(Kron(), -H, 0.5, [100])  # P ~ |H|^-1, so the error is taken against -H^-1 and must be 2
    np.testing.assert_allclose(flipped, 2.0, rtol=1e-4)


def test_bfloat16_factors_end_near_it():
    rng = np.random.default_rng(0)
    H = np.kron(spd(5, 4, rng), spd(10, 4, rng))
    family = Kron(dtype="bfloat16")
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(family.init(structure_of((5, 10)))["5x10"]["Q"])}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}
    assert errors(family, H, 0.5, [300])[0] < 0.1


def test_h_equal_to_a_multiple_of_v_is_fitted_at_once():
    v = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 5)), jnp.float32)
    family, structure = Kron(), structure_of((6, 5))
    state, _ = fit(family, structure, family.init(structure), {"w": v}, {"w": 4.0 * v}, 0.1)
    close(dense_p(family, structure, state), np.eye(30) / 4, 1e-6)


# -- guards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_observation_that_is_not_finite_changes_only_the_count(bad):
    family, structure = Kron(), Structure.of({"a": jnp.zeros((4, 3)), "b": jnp.zeros((4, 3)), "c": jnp.zeros(2)})
    rng = np.random.default_rng(0)
    h = {"a": rng.normal(size=(1, 4, 3)), "b": rng.normal(size=(1, 4, 3)), "c": rng.normal(size=(1, 2))}
    h = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), h)
    state, failures = fit(family, structure, family.init(structure), None, h, 0.1)
    assert failures == 0
    broken = {**h, "b": h["b"].at[0, 1, 1].set(bad)}
    after, failures = fit(family, structure, state, None, broken, 0.1)
    assert failures == 1
    g = jax.tree.map(lambda a: a[0], h)
    old, new = apply(family, structure, state, g), apply(family, structure, after, g)
    np.testing.assert_array_equal(old["b"], new["b"])
    assert np.any(old["a"] != new["a"]) and np.all(np.isfinite(new["a"]))


def test_zero_observations_wait_for_the_first_that_says_something():
    family, structure = Kron(), structure_of((4, 3))
    zero = {"w": jnp.zeros((1, 4, 3))}
    state = family.init(structure)
    after, failures = fit(family, structure, state, None, zero, 0.1)
    assert failures == 0
    jax.tree.map(np.testing.assert_array_equal, after, state)
    h = {"w": jnp.full((1, 4, 3), 100.0)}
    after, _ = fit(family, structure, after, None, h, 0.1)
    assert 0.005 < apply(family, structure, after, {"w": jnp.full((4, 3), 1.0)})["w"].mean() < 0.02


def test_rows_that_are_always_zero_do_not_blow_up():
    family, structure = Kron(), structure_of((6, 5))
    state, rng = family.init(structure), np.random.default_rng(0)
    for _ in range(300):
        h = rng.normal(size=(1, 6, 5)).astype(np.float32)
        h[:, 2] = 0
        state, failures = fit(family, structure, state, None, {"w": h}, 0.5)
        assert failures == 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
    out = apply(family, structure, state, {"w": jnp.asarray(h[0])})["w"]
    assert 0.2 < np.sqrt(np.mean(np.square(out))) < 5


# -- pieces ------------------------------------------------------------------------------------------------------------


def test_the_spectral_bound_is_one_and_a_good_one():
    rng = np.random.default_rng(0)
    worst = 1.0
    for _ in range(200):
        n = rng.integers(1, 40)
        X = rng.normal(size=(n, rng.integers(1, 60))) * np.exp(rng.normal(size=(n, 1)))
        A = X @ X.T
        ratio = float(spectral_bound(jnp.asarray(A, jnp.float32))) / np.linalg.norm(A, 2)
        assert ratio < 1 + 1e-5
        worst = min(worst, ratio)
    assert worst > 0.8
    assert spectral_bound(jnp.zeros((3, 4, 4))).shape == (3,)
    np.testing.assert_array_equal(spectral_bound(jnp.zeros((3, 4, 4))), 0)


def test_procrustes_rotates_towards_a_symmetric_matrix():
    rng = np.random.default_rng(0)
    S = spd(6, 5, rng)
    angle = rng.normal(size=(6, 6)) * 0.1
    Q = jnp.asarray(
        np.linalg.solve(np.eye(6) + (angle - angle.T) / 2, np.eye(6) - (angle - angle.T) / 2) @ S, jnp.float32
    )
    before = np.abs(Q - Q.T).max()
    for _ in range(60):
        Q = procrustes(Q)
    assert np.abs(Q - Q.T).max() < 1e-2 * before
    close(Q, S, 1e-2)
    np.testing.assert_array_equal(procrustes(jnp.asarray(S, jnp.float32) * 0), 0)


def test_triangular_inverse():
    U = np.triu(np.random.default_rng(0).normal(size=(3, 7, 7))) + 3 * np.eye(7)
    close(triangular_inverse(jnp.asarray(U, jnp.float32)), np.linalg.inv(U), 1e-5)


def test_signs_are_fair_and_independent():
    a, b = (np.asarray(signs(jnp.uint32(seed), (64, 33, 5))) for seed in (1, 2))
    assert set(np.unique(a)) == {-1.0, 1.0}
    for x in (a, a * b, a[1:] * a[:-1], a[:, 1:] * a[:, :-1], a[..., 1:] * a[..., :-1]):
        assert abs(x.mean()) < 4 / np.sqrt(x.size)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_the_initial_scale_neither_overflows_nor_underflows(scale):
    h = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 50)) * scale, jnp.float32)
    expected = np.mean(np.asarray(h[0] / scale, np.float64) ** 4, axis=1) ** -0.25 / scale
    np.testing.assert_allclose(initial_scale(None, h, (0, 2)), expected, rtol=1e-5)


def test_matrices_are_made_of_axes_that_belong_together():
    assert consecutive((3, 3, 16, 32)) == (144, 32)
    assert consecutive((4, 5)) == (4, 5) and consecutive((7,)) == (7,)
    order, sizes = any_order((8, 2, 8, 2))
    assert sizes == (16, 16) and sorted(order) == [0, 1, 2, 3]
    assert (block_for(64, 64), block_for(256, 64), block_for(100, 64), block_for(67, 64), block_for(67, None)) == (
        64,
        64,
        50,
        64,
        67,
    )


def test_affine_permutes_and_comes_back():
    shape = (2, 3, 1, 4)
    family, structure = Affine(), structure_of(shape)
    state, rng = family.init(structure), np.random.default_rng(0)
    for _ in range(3):
        state, _ = fit(family, structure, state, None, {"w": rng.normal(size=(1, *shape))}, 0.2)
    P = np.asarray(dense_p(family, structure, state))
    close(P, P.T)
    order, sizes = any_order((2, 3, 4))
    axes = np.transpose(np.arange(24).reshape(2, 3, 4), order).ravel()
    blocks = P[np.ix_(axes, axes)].reshape(*sizes, *sizes)  # a Kronecker product in that order
    left = np.einsum("abcb->ac", blocks)
    right = np.einsum("abad->bd", blocks)
    close(np.einsum("ac,bd->abcd", left, right) / np.trace(left), blocks, 1e-5)


# -- sharding ----------------------------------------------------------------------------------------------------------


def mesh_of(**axes):
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


def placed(mesh, specs, tree):
    is_spec = lambda s: isinstance(s, PartitionSpec)
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=is_spec)
    return jax.device_put(tree, shardings), shardings


def test_aligned_blocks_are_fitted_and_applied_without_gathering_parameters():
    """Read from the compiled program: no collective moves as many numbers as a parameter has."""
    mesh, family = mesh_of(fsdp=8), Kron(block_size=16, max_skew=4.0)
    params = {f"layer{i}": {"kernel": jnp.zeros((64, 128)), "bias": jnp.zeros(128)} for i in range(3)}
    specs = jax.tree.map(lambda p: PartitionSpec(*[None] * (p.ndim - 1), "fsdp"), params)
    structure = Structure.of(params)
    state_specs = family.partition_specs(structure, family.init(structure), specs, mesh)
    bucket = state_specs["64b16x128b16"]
    assert bucket["Q"]["1"] == PartitionSpec(None, "fsdp") and bucket["Q"]["0"] != PartitionSpec()
    rng = np.random.default_rng(0)
    h = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    state, state_shardings = placed(mesh, state_specs, family.init(structure))
    h_there, shardings = placed(mesh, specs, h)

    @functools.partial(jax.jit, out_shardings=(state_shardings, shardings))
    def step(state, h):
        state, _ = family.fit(structure, state, None, jax.tree.map(lambda a: a[None], h), KEY, jnp.float32(0.3))
        return state, family.apply(structure, state, h)

    compiled = step.lower(state, h_there).compile()
    largest = 0
    for line in compiled.as_text().splitlines():
        if any(
            f" {name}" in line for name in ("all-gather(", "all-gather-start(", "all-to-all(", "collective-permute(")
        ):
            shape = line.split("[", 1)[1].split("]", 1)[0]
            largest = max(largest, int(np.prod([int(n) for n in shape.split(",") if n] or [1])))
    assert largest < 64 * 128 / 2
    new, out = compiled(state, h_there)
    same = lambda a, s: a.sharding.is_equivalent_to(s, a.ndim)
    assert all(jax.tree.leaves(jax.tree.map(same, new, state_shardings)))
    single, _ = fit(family, structure, family.init(structure), None, jax.tree.map(lambda a: a[None], h), 0.3)
    jax.tree.map(close, jax.device_get(out), apply(family, structure, single, h))


def test_factors_are_spread_over_the_mesh_where_that_divides():
    mesh, family = mesh_of(data=2, fsdp=4), Kron(block_size=None)
    params = {f"layer{i}": jnp.zeros((32, 32)) for i in range(8)} | {"odd": jnp.zeros((5, 7))}
    specs = jax.tree.map(lambda p: PartitionSpec(None, "fsdp") if p.shape[1] % 4 == 0 else PartitionSpec(), params)
    structure = Structure.of(params)
    found = family.partition_specs(structure, family.init(structure), specs, mesh)
    assert found["32x32"]["Q"]["0"] == PartitionSpec(("data", "fsdp"))
    assert found["5x7"]["Q"]["0"] == PartitionSpec()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Kron("PROO"), r"Kron\(geometry\) should be one of .* Did you mean 'PRO'"),
        (lambda: Kron(block_size=1), r"Kron\(block_size\) should be at least 2, not 1"),
        (lambda: Kron(max_skew=-1.0), r"Kron\(max_skew\) should be at least 0.0, not -1.0"),
        (lambda: Kron(beyond="dense"), r"Kron\(beyond\) should be one of"),
        (lambda: Kron("EQ", dtype="bfloat16"), r"Kron\(dtype='bfloat16'\) rounds the steps of geometry='EQ' away"),
        (lambda: Kron(order="2nd", lipschitz_decay=0.5), r"Kron\(lipschitz_decay=0.5\) is that of the running bound"),
        (lambda: XMat(lipschitz_decay=0.5), r"XMat\(lipschitz_decay=0.5\) .* order='2nd' has none"),
        (lambda: LowRank(0, seed=1), r"LowRank\(seed=1\) is that of the random V"),
        (lambda: Kron(damping=-1.0), r"Kron\(damping\) should be at least 0.0"),
        (lambda: Affine(lipschitz_decay=1.0), r"Affine\(lipschitz_decay\) should be at least 0.0 and below 1.0"),
        (lambda: Kron(initial_scale=0.0), r"Kron\(initial_scale\) should be above 0.0"),
        (lambda: Kron(precision="best"), r"Kron\(precision\) should be one of"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("family", "option"),
    [
        (Affine, "min_ndim"),
        (Affine, "merge"),
        (Affine, "beyond"),
        (Elementwise, "precision"),
        (XMat, "precision"),
    ],
)
def test_options_of_other_families_are_refused(family, option):
    with pytest.raises(TypeError, match=option):
        family(**{option: 1})


def test_complex_parameters_are_named():
    with pytest.raises(TypeError, match=r"real parameters, and layer.w is complex64"):
        Structure.of({"layer": {"w": jnp.zeros(3, jnp.complex64)}})
