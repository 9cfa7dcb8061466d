"""LowRank, XMat, Dense and Elementwise: single steps against float64, exact cases, fits, guards, devices."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import psgd_reference as ref
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from curvtrain.curvature import trees
from curvtrain.curvature.psgd.base import Structure, accept, choose, initial_scale, initial_scale_of_all
from curvtrain.curvature.psgd.dense import Dense
from curvtrain.curvature.psgd.elementwise import Elementwise
from curvtrain.curvature.psgd.geometry import GEOMETRIES
from curvtrain.curvature.psgd.low_rank import LowRank
from curvtrain.curvature.psgd.xmat import XMat

# Float32 rounding of one update, relative to the largest entry. The worst that was measured is 2e-7.
ROUNDING = 2e-6

SHAPES = {"b": (5,), "s": (), "w": (3, 4)}  # n = 18, with leaves of odd and even length
PARAMS = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
STRUCTURE = Structure.of(PARAMS)
N = STRUCTURE.size
KEY = jax.random.key(0)

pytestmark = pytest.mark.usefixtures("quick_compile")

FAMILIES = {
    "low_rank": LowRank(3),
    "low_rank_2nd": LowRank(3, "2nd"),
    "low_rank_1st": LowRank(3, "1st"),
    "rank_0": LowRank(0),
    "xmat": XMat(),
    "xmat_flat": XMat("flat"),
    "xmat_bounded": XMat(order="bounded"),
    "xmat_1st": XMat(order="1st"),
    "dense": Dense(),
    "diagonal": Elementwise(),
} | {f"dense_{geometry}": Dense(geometry) for geometry in GEOMETRIES if geometry != "PRO"}
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
ALIKE = ("low_rank_2nd", "xmat_bounded", "dense_QEQ", "dense_QEP")  # guards do not depend on what sets these apart
GUARDED = {name: family for name, family in FAMILIES.items() if name not in ALIKE}
guarded = pytest.mark.parametrize("family", GUARDED.values(), ids=GUARDED)
geometries = pytest.mark.parametrize("geometry", GEOMETRIES)
probes = pytest.mark.parametrize("k", [1, 3])


@functools.partial(jax.jit, static_argnums=(0, 1))
def fit(family, structure, state, v, h, key, rate):
    return family.fit(structure, state, v, h, key, jnp.float32(rate))


@functools.partial(jax.jit, static_argnums=(0, 1))
def matrix_of(family, structure, state):
    """P as a dense matrix."""
    rows = jax.vmap(lambda e: structure.ravel(family.apply(structure, state, structure.unravel(e))))
    return rows(jnp.eye(structure.size))


@functools.partial(jax.jit, static_argnums=(0, 1))
def round_trip(family, structure, state, vector):
    return family.invert(structure, state, family.apply(structure, state, vector))


def vectors(k, seed=0, structure=STRUCTURE, scale=1.0):
    """k normal vectors like the parameters."""
    rng = np.random.default_rng(seed)
    draw = [(scale * rng.normal(size=(k, *shape))).astype(np.float32) for shape in structure.shapes]
    return structure.treedef.unflatten(draw)


def flat(tree):
    """(m, n) float64 of a tree of stacks of vectors."""
    return np.asarray(trees.matrix(jax.tree.map(jnp.asarray, tree)), np.float64)


def flat_one(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def close(found, expected, tolerance=ROUNDING):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def started(family, seed=0, structure=STRUCTURE):
    """A state in the middle of a fit: near the first one, seen, with bounds of a usual size."""
    rng = np.random.default_rng(seed)
    state = family.init(structure)
    near = lambda a: a + (0.2 * rng.normal(size=a.shape)).astype(np.float32)
    out = {}
    for name, tree in state.items():
        if name == "seen":
            out[name] = jax.tree.map(jnp.ones_like, tree)
        elif name == "L":
            out[name] = jax.tree.map(lambda a: jnp.full_like(a, 5.0), tree)
        elif name == "Q" and family.geometry == "EQ":
            out[name] = jnp.triu(near(tree))
        elif name == "Q" and family.geometry == "QUAD":
            out[name] = 0.5 * (near(tree) + near(tree).T)
        else:
            out[name] = jax.tree.map(near, tree)
    if isinstance(family, XMat):  # an entry that is its own partner has no b
        middle = lambda a: (np.arange(a.size) == (a.size - 1) / 2).reshape(a.shape)
        out["b"] = jax.tree.map(lambda b: jnp.where(middle(b), 0, b), out["b"])
    return out


# -- one update against the reference ----------------------------------------------------------------------------------


def lra(state):
    """U, V (n, r), d (n,)."""
    return flat(state["U"]).T, flat(state["V"]).T, flat_one(state["d"])


def which_moved(state, new, balance):
    """ "U" or "V": what a step left as the balance made it is not it."""
    V = balance(*lra(state)[:2])[1]
    return "U" if np.abs(lra(new)[1] - V).max() < 1e-6 else "V"


@pytest.mark.parametrize("order", ["bounded", "2nd", "1st"])
def test_low_rank(order):
    family, moved = LowRank(3, order, damping=0.0), set()
    state = started(family)
    balance = ref.lra_balance if order == "bounded" else lambda U, V: (U, V)
    for i in range(8, 13):  # both are drawn
        v, h = vectors(1, 2 * i + 1), vectors(1, 2 * i + 2)
        new, failures = fit(family, STRUCTURE, state, v, h, jax.random.key(i), 0.3)
        which = which_moved(state, new, balance)
        moved.add(which)
        U, V, d = lra(state)
        args = (*balance(U, V), d, flat(h)[0], flat(v)[0])
        if order == "bounded":
            *expected, L = ref.lra_update_bounded(*args, rate=0.3, lipschitz=(5.0, 5.0, 5.0), which=which)
            np.testing.assert_allclose(new["L"], L, rtol=ROUNDING)
        else:
            expected = ref.lra_update(*args, rate=0.3, which=which, order=order)
        for found, reference in zip(lra(new), expected, strict=True):
            close(found, reference)
        assert failures == 0
    assert moved == {"U", "V"}


def test_low_rank_means_over_probes():
    family = LowRank(3, damping=0.0)
    state, v, h = started(family), vectors(4, 1), vectors(4, 2)
    moved = set()
    for i in range(8, 13):
        new, _ = fit(family, STRUCTURE, state, v, h, jax.random.key(i), 0.3)
        which = which_moved(state, new, ref.lra_balance)
        moved.add(which)
        U, V, d = lra(state)
        U, V = ref.lra_balance(U, V)
        pairs = list(zip(flat(h), flat(v), strict=True))
        directions = [ref.lra_directions(U, V, d, *pair) for pair in pairs]
        dD, dU, dV = (ref.mean(parts) for parts in zip(*directions, strict=True))
        sides = [ref.lra_sides(U, V, d, *pair) for pair in pairs]
        t1 = ref.mean([y * h for (_, _, y, _), (h, _) in zip(sides, pairs, strict=True)])
        t2 = ref.mean([w * v for (_, _, _, w), (_, v) in zip(sides, pairs, strict=True)])
        L_d = ref.running_bound(5.0, np.abs(t1).max() + np.abs(t2).max(), 0.9)
        X = V if which == "U" else U
        l = sum(np.linalg.norm(ref.mean([np.outer(s[j], X @ (X.T @ s[j])) for s in sides])) for j in (0, 1))
        L = ref.running_bound(5.0, l, 0.9)
        np.testing.assert_allclose(new["L"][:2] if which == "U" else new["L"][::2], [L_d, L], rtol=ROUNDING)
        U, V = (U - 0.3 / L * dU, V) if which == "U" else (U, V - 0.3 / L * dV)
        for found, expected in zip(lra(new), (U, V, d - 0.3 / L_d * dD), strict=True):
            close(found, expected)
    assert moved == {"U", "V"}


def test_rank_0_is_a_diagonal():
    family = LowRank(0, damping=0.0)
    state, v, h = started(family), vectors(1, 1), vectors(1, 2)
    assert set(state) == {"d", "L", "seen"}
    new, _ = fit(family, STRUCTURE, state, v, h, KEY, 0.3)
    none = np.zeros((N, 0))
    _, _, d, L = ref.lra_update_bounded(
        none, none, flat_one(state["d"]), flat(h)[0], flat(v)[0], rate=0.3, lipschitz=(5.0, 5.0, 5.0)
    )
    close(flat_one(new["d"]), d)
    np.testing.assert_allclose(new["L"][0], L[0], rtol=ROUNDING)


def test_low_rank_starts_small():
    state = LowRank(4).init(STRUCTURE)
    np.testing.assert_array_equal(flat(state["U"]), 0)
    np.testing.assert_allclose(np.linalg.norm(flat(state["V"])), np.sqrt(0.1), rtol=1e-5)
    old = flat(LowRank(4, "2nd").init(STRUCTURE)["V"])
    np.testing.assert_allclose(np.std(old), 1 / np.sqrt(N * 14), rtol=0.2)
    again, other = LowRank(4).init(STRUCTURE), LowRank(4, seed=1).init(STRUCTURE)
    same(again, state)
    assert np.abs(flat(other["V"]) - flat(state["V"])).max() > 0.01


def xmat_reference(a, b, h, v, rate, order, L=5.0):
    """(a, b, L) of one array after a step, from lists of probes; v of None is integrated out."""
    directions = [ref.xmat_direction(a, b, x, 0 * x) for x in h]
    sizes = [ref.xmat_sides(a, b, x, x)[0] ** 2 for x in h]
    probes = [np.sqrt(len(a)) * e for e in np.eye(len(a))] if v is None else v
    minus = [ref.xmat_direction(a, b, 0 * x, x) for x in probes]
    sizes = ref.mean(sizes) + ref.mean([ref.xmat_sides(a, b, x, x)[1] ** 2 for x in probes])
    gA, gB = (ref.mean([pair[j] for pair in directions]) + ref.mean([pair[j] for pair in minus]) for j in (0, 1))
    L = ref.running_bound(L, sizes.max(), 0.9)
    s = rate / {"2nd": sizes.max(), "1st": max(np.abs(gA).max(), np.abs(gB).max()), "bounded": L}[order]
    return a - s * (gA * a + gB * b[::-1]), b - s * (gA * b + gB * a[::-1]), L


def test_the_test_s_own_xmat_reference():
    rng = np.random.default_rng(0)
    for n, order in ((5, "2nd"), (6, "1st")):
        a, b, h, v = rng.normal(size=(4, n))
        b[n // 2] *= n % 2 == 0
        expected = ref.xmat_update(a, b, h, v, rate=0.3, order=order)
        for found, reference in zip(xmat_reference(a, b, [h], [v], 0.3, order), expected, strict=False):
            np.testing.assert_allclose(found, reference, rtol=1e-10)


@probes
@pytest.mark.parametrize("mode", ["newton", "whitening"])
@pytest.mark.parametrize("pairing", ["leaf", "flat"])
@pytest.mark.parametrize("order", ["2nd", "bounded", "1st"])
def test_xmat(order, pairing, mode, k):
    family = XMat(pairing, order, damping=0.0)
    state, h = started(family), vectors(k, 2)
    v = vectors(k, 1) if mode == "newton" else None
    new, failures = fit(family, STRUCTURE, state, v, h, KEY, 0.3)
    cut = lambda tree: (
        [flat(tree)] if pairing == "flat" else [np.asarray(a, float).reshape(k, -1) for a in tree.values()]
    )
    vs = [None] * len(cut(h)) if v is None else cut(v)
    leaves = lambda name, state: [np.asarray(a, float).ravel() for a in jax.tree.leaves(state[name])]
    for i, (h_, v_) in enumerate(zip(cut(h), vs, strict=True)):
        expected = xmat_reference(leaves("a", state)[i], leaves("b", state)[i], h_, v_, 0.3, order)
        close(leaves("a", new)[i], expected[0])
        np.testing.assert_allclose(leaves("b", new)[i], expected[1], atol=ROUNDING * np.abs(expected[0]).max())
        np.testing.assert_allclose(leaves("L", new)[i], expected[2], rtol=ROUNDING)
    assert failures == 0


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_xmat_s_matrix(n):
    structure, family = Structure.of(np.zeros(n, np.float32)), XMat()
    state = started(family, structure=structure)
    Q = ref.xmat_matrix(flat_one(state["a"]), flat_one(state["b"]))
    close(matrix_of(family, structure, state), Q.T @ Q)
    for i in range(20):
        state, _ = fit(family, structure, state, vectors(1, i, structure), vectors(1, 99 + i, structure), KEY, 0.5)
    if n % 2:
        assert state["b"][n // 2] == 0


def test_the_middle_of_an_array_of_odd_length():
    structure, family = Structure.of(np.zeros((3, 5), np.float32)), XMat()
    state = family.init(structure)
    for i in range(5):
        state, _ = fit(family, structure, state, vectors(1, i, structure), vectors(1, 99 + i, structure), KEY, 0.5)
    np.testing.assert_array_equal(np.argwhere(np.asarray(state["b"]) == 0), [[1, 2]])


@geometries
@probes
@pytest.mark.parametrize("mode", ["newton", "whitening"])
def test_dense(geometry, mode, k):
    family = Dense(geometry, damping=0.0)
    state, h = started(family), vectors(k, 2)
    v = vectors(k, 1) if mode == "newton" else None
    new, failures = fit(family, STRUCTURE, state, v, h, KEY, 0.3)
    Q = np.asarray(state["Q"], np.float64)
    probes = [np.sqrt(N) * e for e in np.eye(N)] if v is None else flat(v)
    T1 = ref.mean([np.outer(a, a) for a in (ref.dense_sides(geometry, Q, x, x)[0] for x in flat(h))])
    T2 = ref.mean([np.outer(b, b) for b in (ref.dense_sides(geometry, Q, x, x)[1] for x in probes)])
    largest = max(5.0, np.linalg.norm(T1 + T2, 2))
    assert 0.8 * largest <= new["L"] <= largest * (1 + ROUNDING)
    norm = lambda R: np.linalg.norm(R) / np.sqrt(2)  # the bound of the rotation's size
    close(new["Q"], ref.update_factor(geometry, Q, T1, T2, 0.3, float(new["L"]), norm))
    assert failures == 0
    if v is not None and k == 1:  # the sides are those of the reference's own update, whose bound is another one
        expected, _ = ref.dense_update(geometry, Q, flat(h)[0], flat(v)[0], rate=0.3, L=5.0, norm=norm)
        if geometry in ("EQ", "QEP", "QEQ"):  # linear in the step
            l = np.trace(T1 + T2)
            close((np.asarray(new["Q"]) - Q) * float(new["L"]), (expected - Q) * max(5.0, l), 2e-5)


@probes
@pytest.mark.parametrize("mode", ["newton", "whitening"])
def test_diagonal(mode, k):
    family = Elementwise(damping=0.0)
    state, h = started(family), vectors(k, 2)
    v = vectors(k, 1) if mode == "newton" else None
    new, failures = fit(family, STRUCTURE, state, v, h, KEY, 0.3)
    for name in SHAPES:
        q = np.asarray(state["q"][name], np.float64)
        T1 = np.mean((q**2 * h[name]) ** 2, axis=0)
        T2 = np.ones_like(q) if v is None else np.mean(np.square(v[name], dtype=np.float64), axis=0)
        L = ref.running_bound(5.0, np.max(T1 + T2), 0.9)
        close(new["q"][name].ravel(), ref.update_factor("PRO", q.ravel(), T1.ravel(), T2.ravel(), 0.3, L))
        np.testing.assert_allclose(new["L"][name], L, rtol=ROUNDING)
    assert failures == 0


@pytest.mark.parametrize("family", [XMat(), Elementwise()], ids=["xmat", "diagonal"])
@pytest.mark.parametrize("mode", ["newton", "whitening"])
def test_a_stack_of_layers_is_so_many_leaves(family, mode):
    stacked, single = Structure.of(np.zeros((4, 3, 5), np.float32), 1), Structure.of(np.zeros((3, 5), np.float32))
    state, states = family.init(stacked), [family.init(single)] * 4
    layer = lambda tree, i: jax.tree.map(lambda a: a[:, i], tree)
    for step in range(3):
        h = vectors(2, step, stacked) * np.array([1, 10, 0, 0.1], np.float32).reshape(4, 1, 1)
        h[:, 3, 0, 0] = np.nan if step == 1 else 1
        v = vectors(2, 50 + step, stacked) if mode == "newton" else None
        noiseless = type(family)(damping=0.0)
        state, failures = fit(noiseless, stacked, state, v, h, KEY, 0.3)
        found = [fit(noiseless, single, s, layer(v, i), layer(h, i), KEY, 0.3) for i, s in enumerate(states)]
        states = [new for new, _ in found]
        assert failures == sum(count for _, count in found) == (step == 1)
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *states)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), state, expected)


# -- scales and exact cases --------------------------------------------------------------------------------------------


@families
def test_a_multiple_of_the_identity_is_found_at_once(family):
    v, c = vectors(2, 1), 37.0
    state, failures = fit(family, STRUCTURE, family.init(STRUCTURE), v, trees.scale(c, v), KEY, 0.1)
    P = np.asarray(matrix_of(family, STRUCTURE, state))
    assert failures == 0
    if getattr(family, "order", "") == "1st":
        return  # normalises what rounding left of the direction
    np.testing.assert_allclose(P, np.eye(N) / c, atol=2e-6 / c)


@families
def test_the_start(family):
    """A multiple of the identity: of I, of the initial scale that is given."""
    for scale in (None, 4.0):
        scaled = type(family)(**{**vars(family), "initial_scale": scale})
        P = np.asarray(matrix_of(scaled, STRUCTURE, scaled.init(STRUCTURE))) / (scale or 1.0)
        np.testing.assert_allclose(P, np.eye(N), atol=1e-6)


@pytest.mark.parametrize(
    "family", [LowRank(0), XMat(), Dense(), Elementwise()], ids=["rank_0", "xmat", "dense", "diagonal"]
)
def test_a_scale_that_is_given_stays(family):
    """With T1 = T2 a step changes nothing, and no other scale is chosen."""
    family, v = type(family)(**{**vars(family), "initial_scale": 4.0}), vectors(2, 1)
    state, _ = fit(family, STRUCTURE, family.init(STRUCTURE), v, trees.scale(0.25, v), KEY, 0.1)
    np.testing.assert_allclose(matrix_of(family, STRUCTURE, state), 4 * np.eye(N), atol=1e-5)


@pytest.mark.parametrize("mode", ["newton", "whitening"])
def test_the_scale_of_a_tree_is_that_of_the_vector(mode):
    h, v = vectors(3, 1, scale=1e-12), vectors(3, 2) if mode == "newton" else None
    raveled = None if v is None else jnp.asarray(flat(v), jnp.float32)
    expected = initial_scale(raveled, jnp.asarray(flat(h), jnp.float32))
    np.testing.assert_allclose(initial_scale_of_all(v, h), expected, rtol=1e-5)
    np.testing.assert_allclose(expected, 1e12, rtol=0.5)
    assert initial_scale_of_all(v, jax.tree.map(np.zeros_like, h)) == 1
    assert initial_scale_of_all(v, jax.tree.map(lambda a: a * np.nan, h)) == 1


@families
def test_inverse(family):
    state = started(family)
    for i in range(4):
        state, failures = fit(family, STRUCTURE, state, vectors(2, i), vectors(2, 9 + i), jax.random.key(i), 0.3)
        assert failures == 0
    P, x = np.asarray(matrix_of(family, STRUCTURE, state), np.float64), vectors(1, 7)
    np.testing.assert_allclose(P, P.T, atol=1e-5 * np.abs(P).max())
    one = jax.tree.map(lambda a: a[0], x)
    error = flat_one(round_trip(family, STRUCTURE, state, one)) - flat_one(one)
    assert np.abs(error).max() < 1e-6 * np.linalg.cond(P)
    assert np.linalg.eigvalsh(P).min() > 0


# -- fits of whole problems --------------------------------------------------------------------------------------------

SIZE = 50
VECTOR = Structure.of(np.zeros(SIZE, np.float32))


def rotated(values, seed=0):
    U = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values),) * 2))[0]
    return (U * values) @ U.T


@functools.partial(jax.jit, static_argnums=(0, 1, 3, 5))
def run(family, mode, matrix, steps, rates, k):
    """P after `steps` updates with rates that fall geometrically; h = H v, or, whitening, h = C^(1/2) z."""

    def body(i, carry):
        state, failures = carry
        key = jax.random.fold_in(KEY, i)
        v = jax.random.normal(key, (k, SIZE))
        with trees.exact():
            h = v @ matrix
        rate = rates[0] * (rates[1] / rates[0]) ** (i / steps)
        pair = (v, h) if mode == "newton" else (None, h)
        state, failed = family.fit(VECTOR, state, *pair, jax.random.fold_in(key, 1), rate)
        return state, failures + failed

    state, failures = jax.lax.fori_loop(0, steps, body, (family.init(VECTOR), jnp.int32(0)))
    return matrix_of(family, VECTOR, state), failures


def conditioned(family, H, steps, rates, k=1, mode="newton"):
    """The condition number of P H after a fit."""
    P, failures = run(family, mode, jnp.asarray(H, jnp.float32), steps, jnp.float32(rates), k)
    assert failures == 0
    values = np.linalg.eigvals(np.asarray(P, np.float64) @ H).real
    return values.max() / values.min() if values.min() > 0 else np.inf


def x_shaped(values, seed=0):
    """A matrix with these eigenvalues, of which entries i and n - 1 - i share two and a random rotation."""
    rng, n, H = np.random.default_rng(seed), len(values), np.zeros((len(values),) * 2)
    for i in range(n // 2):
        c, s = np.cos(angle := rng.uniform(0, np.pi)), np.sin(angle)
        R, pair = np.array([[c, -s], [s, c]]), [i, n - 1 - i]
        H[np.ix_(pair, pair)] = (R * values[pair]) @ R.T
    return H


VALUES = np.geomspace(1e-3, 1, SIZE)
SPIKES = np.concatenate([np.ones(SIZE - 5), np.geomspace(10, 1000, 5)])


@pytest.mark.parametrize(
    ("family", "H", "steps", "rates", "k", "at_most"),
    [
        (Dense(), rotated(VALUES), 2000, (0.5, 0.05), 1, 3.0),
        (Dense(), rotated(VALUES), 500, (0.5, 0.05), 10, 3.0),
        (Dense("QUAD"), rotated(VALUES), 2000, (0.5, 0.05), 1, 10.0),
        (Elementwise(), np.diag(VALUES), 300, (0.5, 0.5), 1, 1.05),
        (XMat(), x_shaped(VALUES), 1500, (0.5, 0.5), 1, 3.0),
        (LowRank(0), np.diag(VALUES), 1000, (0.5, 0.5), 1, 20.0),
        (LowRank(5), rotated(SPIKES), 3000, (0.1, 0.1), 10, 40.0),
        (LowRank(5, "2nd"), rotated(SPIKES), 3000, (0.1, 0.1), 1, 40.0),
    ],
    ids=["PRO", "PRO_10_probes", "QUAD", "diagonal", "xmat", "rank_0", "low_rank", "low_rank_2nd"],
)
def test_quadratic(family, H, steps, rates, k, at_most):
    """The condition number of P H, from 1000."""
    assert conditioned(family, H, steps, rates, k) < at_most


@pytest.mark.parametrize(
    ("family", "H", "at_most"),
    [
        (Dense(), rotated(VALUES**0.5), 4.0),
        (Elementwise(), np.diag(VALUES**0.5), 2.0),
        (XMat(order="bounded"), x_shaped(VALUES**0.5), 4.0),
        (LowRank(5), np.diag(VALUES**0.5), 10.0),
    ],
    ids=["dense", "diagonal", "xmat", "low_rank"],
)
def test_whitening(family, H, at_most):
    """Gradients H z with normal z: P is fitted to |H|^-1, whose condition number is 32."""
    assert conditioned(family, H, 1000, (0.3, 0.03), 4, "whitening") < at_most


# -- what is not an observation ----------------------------------------------------------------------------------------


def parts_of(family):
    """Into how many parts a family divides the parameters."""
    return 3 if isinstance(family, Elementwise) or (isinstance(family, XMat) and family.pairing == "leaf") else 1


@guarded
@pytest.mark.parametrize("mode", ["newton", "whitening"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_what_is_not_finite_changes_nothing(family, mode, bad):
    state = started(family)
    h, v = jax.tree.map(np.copy, vectors(2, 2)), vectors(2, 1) if mode == "newton" else None
    h["w"][1, 2, 3] = bad
    new, failures = fit(family, STRUCTURE, state, v, h, KEY, 0.3)
    assert failures == 1
    if parts_of(family) == 1:
        same(new, state)
        return
    for name in state:
        same(new[name]["w"], state[name]["w"])
        assert name == "seen" or np.any(np.asarray(new[name]["b"]) != np.asarray(state[name]["b"]))
    h = jax.tree.map(lambda a: a * np.nan, h)
    new, failures = fit(family, STRUCTURE, state, v, h, KEY, 0.3)
    assert failures == 3
    same(new, state)


@guarded
def test_a_first_observation_that_is_not_finite_is_none(family):
    state, v = family.init(STRUCTURE), vectors(2, 1)
    bad = jax.tree.map(lambda a: a * np.nan, v)
    new, failures = fit(family, STRUCTURE, state, v, bad, KEY, 0.1)
    assert failures == parts_of(family)
    same(new, state)


@guarded
def test_zero_changes_nothing(family):
    v = vectors(2, 1)
    for state in (started(family), family.init(STRUCTURE)):
        new, failures = fit(family, STRUCTURE, state, v, jax.tree.map(np.zeros_like, v), KEY, 0.3)
        assert failures == 0
        same(new, state)


@guarded
@pytest.mark.parametrize("mode", ["newton", "whitening"])
def test_rows_that_are_always_zero(family, mode):
    """As of the unused rows of an embedding: P of the rest is fitted, and P of those stays finite and bounded."""
    state = family.init(STRUCTURE)
    for i in range(60):
        v, h = vectors(2, i), jax.tree.map(np.copy, vectors(2, 99 + i, scale=0.1))
        h["w"][:, 1] = 0
        state, failures = fit(family, STRUCTURE, state, v if mode == "newton" else None, h, jax.random.key(i), 0.3)
        assert failures == 0
    P = np.asarray(matrix_of(family, STRUCTURE, state))
    assert np.all(np.isfinite(P))


@pytest.mark.parametrize("name", ["rank_0", "low_rank_1st", "xmat", "dense", "diagonal"])
def test_the_largest_step_leads_back(name):
    """At a rate of 1, and h so large that v is lost in rounding, a whole step would take Q to zero."""
    family = dataclasses.replace(FAMILIES[name], initial_scale=1.0, damping=0.0)
    state = family.init(STRUCTURE)
    for i in range(4):
        h = jax.tree.map(lambda a: 2.0**20 * np.sign(a), vectors(1, 20 + i))
        state, failures = fit(family, STRUCTURE, state, None, h, jax.random.key(i), 1.0)
        assert failures == 0
    x = jax.tree.map(lambda a: a[0], vectors(1, 7))
    assert np.all(np.isfinite(flat_one(round_trip(family, STRUCTURE, state, x))))


def test_accept_and_choose():
    h = jnp.array([[[0.0, 0.0], [0.0, 1.0], [np.nan, 0.0], [1.0, 1.0]]])  # (k, lead, n)
    new = {"a": jnp.array([[1.0], [1.0], [1.0], [np.inf]]), "seen": jnp.ones(4, bool)}
    accepted, failed = accept(h, new, 1)
    np.testing.assert_array_equal(accepted, [False, True, False, False])
    np.testing.assert_array_equal(failed, [False, False, True, True])
    old = {"a": jnp.zeros((4, 1)), "seen": jnp.zeros(4, bool)}
    same(choose(accepted, new, old), {"a": [[0.0], [1.0], [0.0], [0.0]], "seen": [False, True, False, False]})
    same(accept(h, new), (False, True))


# -- arguments, shapes, devices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(-1), r"LowRank\(rank\) should be at least 0, not -1"),
        (lambda: LowRank(order="3rd"), r"LowRank\(order\) should be one of .*'1st', not '3rd'"),
        (lambda: LowRank(19).init(STRUCTURE), r"LowRank\(rank=19\) exceeds the number of parameters, 18\. Use"),
        (lambda: XMat("flt"), r"XMat\(pairing\) should be .* Did you mean 'flat'"),
        (lambda: XMat(order="bound"), r"XMat\(order\) should be .* Did you mean 'bounded'"),
        (lambda: Dense("PR0"), r"Dense\(geometry\) should be .* Did you mean 'PRO'"),
        (lambda: Dense(max_size=0), r"Dense\(max_size\) should be at least 1"),
        (lambda: Dense(max_size=17).init(STRUCTURE), r"18 parameters would be 18 x 18, 1,296 bytes.* Use Kron\(\)"),
        (lambda: Elementwise(damping=-1.0), r"Elementwise\(damping\) should be at least 0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    assert LowRank(18).init(STRUCTURE)["U"]["w"].shape == (18, 3, 4)


@families
def test_the_state_keeps_its_structure(family):
    state = family.init(STRUCTURE)
    assert all(not a.weak_type for a in jax.tree.leaves(state))
    shapes = jax.eval_shape(lambda: family.init(STRUCTURE))
    step = lambda state, v: family.fit(STRUCTURE, state, v, vectors(2), KEY, jnp.float32(0.1))
    describe = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    for v in (None, vectors(2, 1)):
        new, failures = jax.eval_shape(step, state, v)
        assert describe(new) == describe(shapes) == describe(state)
        assert failures.shape == () and failures.dtype == jnp.int32
    rows = family.blocks(STRUCTURE)
    assert sum(size for _, _, size in rows) == sum(a.nbytes for a in jax.tree.leaves(state))


def is_spec(leaf):
    return isinstance(leaf, PartitionSpec)


def gathered(program):
    """Elements of the result of every all-gather (and all-to-all) in a compiled program."""
    found = re.findall(r"= (.*?) (?:all-gather|all-to-all)(?:-start)?\(", program.as_text())
    sizes = [re.findall(r"\w+\[([\d,]*)\]", shapes) for shapes in found]
    return sorted(int(np.prod([int(d) for d in dims.split(",") if d])) for shapes in sizes for dims in shapes)


@pytest.mark.parametrize("name", ["low_rank", "rank_0", "xmat", "xmat_flat", "dense", "dense_EQ", "diagonal"])
def test_sharded(name):
    """The same numbers; the state keeps its layout; and but for Dense and flat pairs nothing is gathered."""
    family = FAMILIES[name]
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    structure = Structure.of({"b": np.zeros(16, np.float32), "w": np.zeros((6, 16, 3), np.float32)})
    specs = {"b": PartitionSpec("fsdp"), "w": PartitionSpec(None, "fsdp")}
    lead = jax.tree.map(lambda spec: PartitionSpec(None, *spec), specs, is_leaf=is_spec)
    state = family.init(structure)
    state_specs = family.partition_specs(structure, state, specs, mesh)
    shard = lambda tree: jax.tree.map(lambda spec: NamedSharding(mesh, spec), tree, is_leaf=is_spec)

    def step(state, v, h, key):
        state, failures = family.fit(structure, state, v, h, key, jnp.float32(0.2))
        return state, failures, family.apply(structure, state, jax.tree.map(lambda a: a[0], h))

    plain = jax.jit(step)
    sharded = jax.jit(step, out_shardings=(shard(state_specs), NamedSharding(mesh, PartitionSpec()), shard(specs)))
    other, program = jax.device_put(state, shard(state_specs)), None
    for i in range(3):
        v, h, key = vectors(2, i, structure), vectors(2, 9 + i, structure), jax.random.key(7 + 2 * i)
        args = other, jax.device_put(v, shard(lead)), jax.device_put(h, shard(lead)), key
        program = program or sharded.lower(*args).compile()
        state, _, applied = plain(state, v, h, key)
        other, failures, applied_other = program(*args)
        assert failures == 0
    assert program is not None and (name in ("xmat_flat", "dense", "dense_EQ") or gathered(program) == [])
    kept = jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), other, shard(state_specs))
    assert all(jax.tree.leaves(kept))
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max())
    jax.tree.map(near, other, state)
    jax.tree.map(near, applied_other, applied)


def test_partition_specs():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    specs = {"b": PartitionSpec(), "s": PartitionSpec(), "w": PartitionSpec(None, "fsdp")}
    of = lambda family, structure=STRUCTURE: family.partition_specs(structure, family.init(structure), specs, mesh)
    stacked = {"b": PartitionSpec(None), "s": PartitionSpec(None), "w": PartitionSpec(None, None, "fsdp")}
    alone = PartitionSpec()
    assert of(LowRank(2)) == {"U": stacked, "V": stacked, "d": specs, "L": alone, "seen": alone}
    assert of(LowRank(0)) == {"d": specs, "L": alone, "seen": alone}
    none = dict.fromkeys(specs, alone)
    assert of(XMat()) == {"a": specs, "b": specs, "L": none, "seen": none}
    assert of(XMat("flat")) == dict.fromkeys(("a", "b", "L", "seen"), alone)
    assert of(Elementwise()) == {"q": specs, "L": none, "seen": none}
    assert of(Dense())["Q"] == PartitionSpec("fsdp")  # 18 rows
    assert of(Dense(), Structure.of(np.zeros(16, np.float32)))["Q"] == PartitionSpec(("data", "fsdp"))
