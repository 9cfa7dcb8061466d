"""The reference of PSGD against definitions: dense matrices, numeric derivatives of the criterion, fixed points."""

import numpy as np
import psgd_reference as ref
import pytest
from psgd_reference import GEOMETRIES, STORED

SHAPE = (4, 3, 5)
KINDS = {
    "dense": (4, 3, 5),
    "diagonal": ("diagonal",) * 3,
    "mixed": (4, "diagonal", None),
    "blocks": (("blocks", 2, 2), 3, ("blocks", 2, 3)),  # 5 = 3 + 2: the last block is cropped
}


def rng(seed=0):
    return np.random.default_rng(seed)


def positive(random, n, condition=5.0):
    """Symmetric, with eigenvalues from 1 to `condition`."""
    W = np.linalg.qr(random.normal(size=(n, n)))[0]
    return W * np.geomspace(1, condition, n) @ W.T


def factor(random, n, kind, geometry):
    """A factor as the geometry keeps it: triangular, general or symmetric."""
    if kind is None:
        return None
    if kind == "diagonal":
        return random.uniform(0.5, 2, n)
    if isinstance(kind, tuple):
        _, B, b = kind
        Q = np.stack([factor(random, b, b, geometry) for _ in range(B)])
        size = n - (B - 1) * b  # of the last block
        Q[-1] = np.where(np.arange(b)[:, None] < size, Q[-1], 0) * (np.arange(b) < size) + np.diag(np.arange(b) >= size)
        return Q
    if geometry == "EQ":
        return np.triu(random.normal(size=(n, n)), 1) * 0.3 + np.diag(random.uniform(0.5, 2, n))
    Q = positive(random, n) / 2
    return Q + 0.2 * random.normal(size=(n, n)) if geometry in ("QEP", "QEQ") else Q


def make(geometry="EQ", kinds="dense", seed=0):
    random = rng(seed)
    return [factor(random, n, kind, geometry) for n, kind in zip(SHAPE, KINDS[kinds], strict=True)]


def probe(seed=1, shape=SHAPE):
    return rng(seed).normal(size=(2, *shape))


def basis(shape):
    return list(np.eye(int(np.prod(shape))).reshape(-1, *shape))


def inverse_magnitude(P, seed=2):
    """Symmetric, indefinite H with |H| = P⁻¹."""
    values, W = np.linalg.eigh(P)
    return W * (rng(seed).choice([-1.0, 1.0], len(P)) / values) @ W.T


def precondition_matrix(geometry, factors, shape):
    Q = ref.kron_matrix(factors, shape)
    return Q if geometry in STORED else Q.T @ Q


def partial_trace(M, i, shape):
    """(n_i, n_i): the trace of M (N, N) over all other dims."""
    p, n, others = len(shape), shape[i], len(M) // shape[i]
    M = np.moveaxis(M.reshape(*shape, *shape), (i, p + i), (0, p))
    return np.einsum("aobo->ab", M.reshape(n, others, n, others))


def derivative(f, eps=1e-5):
    return (f(eps) - f(-eps)) / (2 * eps)


def along(matrix, X, h, v):
    """Derivative of the criterion along Q <- (I + eps X) Q, for dense Q and X."""
    eye = np.eye(len(X))
    return derivative(lambda e: ref.criterion((eye + e * X) @ matrix, h, v))


def close(a, b, rtol=1e-10, atol=1e-12):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def all_close(factors, others, rtol=1e-10, atol=1e-12):
    for a, b in zip(factors, others, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b, rtol, atol)


# -- Kronecker products ------------------------------------------------------------------------------------------------


def test_contract_is_the_partial_trace_of_the_outer_product():
    X, _ = probe()
    for i in range(3):
        close(ref.contract(X, i), partial_trace(np.outer(X, X), i, SHAPE))


@pytest.mark.parametrize("kinds", KINDS)
def test_applying_factors_is_multiplying_by_their_kronecker_product(kinds):
    factors, (X, _) = make("QEQ", kinds), probe()
    Q = ref.kron_matrix(factors, SHAPE)
    close(ref.kron_apply(factors, X).ravel(), Q @ X.ravel())
    close(ref.kron_precondition("QEQ", factors, X).ravel(), Q.T @ Q @ X.ravel())
    close(ref.kron_precondition("PRO4P", factors, X).ravel(), Q @ X.ravel())


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_both_sides_are_partial_traces_of_their_dense_definition(geometry, kinds):
    factors, (h, v) = make(geometry, kinds), probe()
    Q, P = ref.kron_matrix(factors, SHAPE), precondition_matrix(geometry, factors, SHAPE)
    for i, sides in enumerate(ref.kron_sides(geometry, factors, h, v)):
        if sides is None:
            continue
        if geometry == "EQ":
            a, b = Q @ h.ravel(), np.linalg.inv(Q).T @ v.ravel()
        else:
            a, b = P @ h.ravel(), v.ravel()
        if geometry == "QEP":
            Qi = ref.kron_matrix(ref.only(factors, i), SHAPE)
            a, b = Qi @ a, Qi @ b
        for T, x in zip(sides, (a, b), strict=True):
            close(T, ref.restrict(partial_trace(np.outer(x, x), i, SHAPE), factors[i]))


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_integrating_v_out_is_the_sum_over_a_basis(geometry, kinds):
    factors, (h, _) = make(geometry, kinds), probe()
    whitening = ref.kron_sides(geometry, factors, h)
    newton = ref.kron_sides(geometry, factors, h, [np.sqrt(h.size) * e for e in basis(SHAPE)])
    for some, others in zip(whitening, newton, strict=True):
        assert (some is None) == (others is None)
        if some is not None:
            close(some[1], others[1])


@pytest.mark.parametrize("whitening", [False, True])
@pytest.mark.parametrize("kinds", KINDS)
def test_eq_is_the_gradient_of_the_criterion_on_its_group(kinds, whitening):
    factors, (h, v) = make("EQ", kinds), probe()
    random, (d, shape) = rng(3), (h.size, SHAPE)
    for i, sides in enumerate(ref.kron_sides("EQ", factors, h, None if whitening else v)):
        if sides is None:
            continue
        X = random.normal(size=(SHAPE[i], SHAPE[i]))
        X = np.triu(ref.matrix(ref.restrict(X, factors[i]), SHAPE[i]))  # the algebra: triangular, in blocks or diagonal
        E = ref.matrix(sides[0] - sides[1], SHAPE[i])
        full = ref.kron_matrix([X if j == i else None for j in range(3)], shape)
        Q = ref.kron_matrix(factors, shape)
        if whitening:
            f = lambda e, Q=Q, full=full: sum(
                ref.criterion((np.eye(d) + e * full) @ Q, h if k == 0 else 0 * h, w) for k, w in enumerate(basis((d,)))
            )
            slope = derivative(f)
        else:
            slope = along(Q, full, h, v)
        close(slope, 2 * np.sum(X * E), rtol=1e-6)


def predicted_slope(geometry, Q, E):
    """Derivative of the criterion along the update of one dense factor, by hand: a negative square in each case."""
    S = np.linalg.inv(Q)
    if geometry == "EQ":
        return -2 * np.sum(np.triu(E) ** 2)
    if geometry == "QEP":
        M = np.linalg.inv(Q @ Q.T)
        return -2 * np.trace(E @ M @ E @ M)
    if geometry == "QEQ":
        return -2 * np.trace(S @ S.T @ E @ E)
    if geometry == "PRO":
        return -2 * np.trace(E @ S @ E @ S)
    if geometry == "QUAD":
        return -np.trace(E @ E @ S @ S) - np.trace(E @ S @ E @ S)
    return -2 * np.trace(E @ E @ S)  # QUAD4P


@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES if g != "PRO4P"])
def test_each_geometry_descends_as_its_metric_says(geometry):
    Q, (h, v) = factor(rng(), 6, 6, geometry), probe(shape=(6,))
    ((T1, T2),) = ref.kron_sides(geometry, [Q], h, v)

    def f(rate):
        X = ref.update_factor(geometry, Q, T1, T2, rate, 1.0)
        return ref.criterion(np.linalg.cholesky(X).T if geometry in STORED else X, h, v)

    slope = derivative(f, 1e-6)
    assert slope < 0
    close(slope, predicted_slope(geometry, Q, T1 - T2), rtol=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_each_geometry_descends_on_diagonal_factors(geometry):
    q, (h, v) = factor(rng(), 6, "diagonal", geometry), probe(shape=(6,))
    ((T1, T2),) = ref.kron_sides(geometry, [q], h, v)

    def f(rate):
        x = ref.update_factor(geometry, q, T1, T2, rate, 1.0)
        p = x if geometry in STORED else x**2
        return np.sum(p * h**2 + v**2 / p)

    assert derivative(f, 1e-6) < 0
    power = {"PRO4P": 1, "QUAD4P": 2}.get(geometry, 2)  # p changes by a factor (1 - power σ E)
    p = q if geometry in STORED else q**2
    close(derivative(f, 1e-6), -power * np.sum((T1 - T2) * (p * h**2 - v**2 / p)), rtol=1e-6)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_inverse_magnitude_of_the_hessian_is_a_fixed_point(geometry, kinds):
    factors = make(geometry, kinds)
    if geometry == "QEP":
        factors = ref.balance(factors, SHAPE)
    H = inverse_magnitude(precondition_matrix(geometry, factors, SHAPE))
    v = basis(SHAPE)
    h = [(H @ e.ravel()).reshape(SHAPE) for e in v]
    for sides in ref.kron_sides(geometry, factors, h, v):
        if sides is not None:
            close(*sides, atol=1e-9)
    new, _ = ref.kron_update(geometry, factors, h, v, rate=0.5, lipschitz=ref.zero_bounds(factors))
    all_close(new, factors, atol=1e-9)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_inverse_root_of_the_gradients_covariance_is_a_fixed_point(geometry, kinds):
    factors = make(geometry, kinds)
    root = np.linalg.inv(precondition_matrix(geometry, factors, SHAPE))  # E[ggᵀ]^(1/2) = P⁻¹
    g = [np.sqrt(len(root)) * column.reshape(SHAPE) for column in root.T]
    for sides in ref.kron_sides(geometry, factors, g):
        if sides is not None:
            close(*sides, atol=1e-9)


@pytest.mark.parametrize("kinds", ["dense", "diagonal", "blocks"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_initial_scale_solves_a_multiple_of_the_identity(geometry, kinds):
    _, v = probe()
    c = 70.0
    scale = ref.initial_scale(c * v, v, parts=3) ** (2 if geometry in STORED else 1)
    eye = {"dense": np.eye, "diagonal": np.ones}
    blocks = [np.stack([np.eye(b)] * B) for B, b in ((2, 2), (1, 3), (2, 3))]
    factors = [scale * Q for Q in (blocks if kinds == "blocks" else [eye[kinds](n) for n in SHAPE])]
    close(ref.kron_precondition(geometry, factors, c * v), v)
    new, _ = ref.kron_update(geometry, factors, c * v, v, rate=0.5, lipschitz=ref.zero_bounds(factors))
    all_close(new, factors)


def test_the_initial_scale_of_whitening_gives_unit_rms():
    h, _ = probe()
    scale = ref.initial_scale(h, parts=3)
    out = ref.kron_precondition("QUAD", [scale * np.ones(n) for n in SHAPE], h)
    close(np.mean(out**2), 1)
    close(ref.initial_scale([h, h]), ref.initial_scale(h))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_kronecker_hessian_is_fitted(geometry):
    random, shape = rng(), (4, 3)
    H = np.kron(positive(random, 4), positive(random, 3))
    factors = [np.eye(n) for n in shape]
    bounds = ref.zero_bounds(factors)
    for _ in range(600 if geometry == "EQ" else 300):
        v = random.normal(size=shape)
        h = (H @ v.ravel()).reshape(shape)
        factors, bounds = ref.kron_update(geometry, factors, h, v, rate=0.3, lipschitz=bounds)
    P = precondition_matrix(geometry, factors, shape)
    assert np.linalg.norm(P @ H - np.eye(12)) < 0.03 * np.sqrt(12)


@pytest.mark.parametrize("whitening", [False, True])
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_small_steps_lower_the_expected_criterion(geometry, kinds, whitening):
    factors = make(geometry, kinds)
    random = rng(5)
    H = ref.kron_matrix([positive(random, n) for n in SHAPE], SHAPE)
    v = basis(SHAPE)
    h = [(H @ e.ravel()).reshape(SHAPE) for e in v]
    bounds = ref.zero_bounds(factors)
    values = []
    for _ in range(6):
        P = precondition_matrix(geometry, factors, SHAPE)
        values.append(np.trace(H @ P @ H) + np.trace(np.linalg.inv(P)))
        scaled = [np.sqrt(len(v)) * x for x in h] if whitening else h
        factors, bounds = ref.kron_update(
            geometry, factors, scaled, None if whitening else v, rate=0.02, lipschitz=bounds
        )
    assert np.all(np.diff(values) < 0)


@pytest.mark.parametrize("whitening", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_blocks_of_a_vector_are_leaves_of_their_own(geometry, whitening):
    Q, (h, v) = factor(rng(), 5, ("blocks", 2, 3), geometry), probe(shape=(5,))
    v = None if whitening else v
    (new,), (L,) = ref.kron_update(geometry, [Q], h, v, rate=0.3, lipschitz=[np.array([0.0, 9.0])])
    for k, part in enumerate((slice(0, 3), slice(3, 5))):
        block = Q[k][: part.stop - part.start, : part.stop - part.start]
        (alone,), (l,) = ref.kron_update(
            geometry, [block], h[part], None if whitening else v[part], rate=0.3, lipschitz=[9.0 * k]
        )
        size = len(alone)
        if geometry != "PRO4P":  # its loop ends on the largest element, be it padding
            close(new[k][:size, :size], alone)
        close(L[k], l)


def test_several_probes_are_averaged():
    factors = make("QUAD")
    (h, v), (g, w) = probe(1), probe(2)
    for (T1, T2), one, two in zip(
        ref.kron_sides("QUAD", factors, [h, g], [v, w]),
        ref.kron_sides("QUAD", factors, h, v),
        ref.kron_sides("QUAD", factors, g, w),
        strict=True,
    ):
        close(T1, (one[0] + two[0]) / 2)
        close(T2, (one[1] + two[1]) / 2)


def test_bounds_rise_at_once_and_fall_slowly():
    factors, (h, v) = make("QUAD", "blocks"), probe()
    _, first = ref.kron_update("QUAD", factors, h, v, rate=0.1, lipschitz=ref.zero_bounds(factors))
    for L, (T1, T2) in zip(first, ref.kron_sides("QUAD", factors, h, v), strict=True):
        close(L, ref.factor_norm(T1 + T2))
    _, second = ref.kron_update("QUAD", factors, 0 * h, 0 * v, rate=0.1, lipschitz=first)
    all_close(second, [0.9 * L for L in first])
    assert ref.running_bound(1.0, 5.0, 0.9) == 5.0


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_nothing_is_mutated_and_structure_stays(geometry, kinds):
    factors, (h, v) = make(geometry, kinds), probe()
    before = [None if Q is None else Q.copy() for Q in factors]
    bounds = ref.zero_bounds(factors)
    new, new_bounds = ref.kron_update(geometry, factors, h, v, rate=0.3, lipschitz=bounds)
    all_close(factors, before, rtol=0, atol=0)
    all_close(bounds, ref.zero_bounds(factors), rtol=0, atol=0)
    for Q, R, L, M in zip(factors, new, bounds, new_bounds, strict=True):
        assert np.shape(Q) == np.shape(R) and np.shape(L) == np.shape(M)
        if geometry == "EQ" and Q is not None and Q.ndim > 1:
            close(R, np.triu(R))


def test_balancing_leaves_the_product():
    for kinds in KINDS:
        factors = [None if Q is None else Q * 10.0**i for i, Q in enumerate(make("QEQ", kinds))]
        new = ref.balance(factors, SHAPE)
        close(ref.kron_matrix(new, SHAPE), ref.kron_matrix(factors, SHAPE))
        largest = [np.max(np.abs(ref.matrix(Q, n))) for Q, n in zip(new, SHAPE, strict=True) if Q is not None]
        close(largest, largest[0])


def test_qep_balances_its_factors_first():
    factors, (h, v) = make("QEP"), probe()
    scaled = [Q * c for Q, c in zip(factors, (10.0, 1.0, 0.1), strict=True)]
    some, _ = ref.kron_update("QEP", factors, h, v, rate=0.3, lipschitz=[0.0] * 3)
    others, _ = ref.kron_update("QEP", scaled, h, v, rate=0.3, lipschitz=[0.0] * 3)
    all_close(some, others)


def test_pro_is_rotated_towards_symmetry():
    Q, (h, v) = factor(rng(), 6, 6, "PRO"), probe(shape=(6,))
    ((T1, T2),) = ref.kron_sides("PRO", [Q], h, v)
    L = ref.factor_norm(T1 + T2)
    moved = Q - 0.3 / L * (T1 - T2) @ Q
    new = ref.update_factor("PRO", Q, T1, T2, 0.3, L)
    assert np.linalg.norm(new - new.T) < 0.5 * np.linalg.norm(moved - moved.T)
    close(new.T @ new, moved.T @ moved, atol=1e-3)


# -- Procrustes steps and norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotate", [ref.procrustes2, ref.procrustes3])
def test_procrustes_steps_rotate_to_the_symmetric_polar_factor(rotate):
    random = rng()
    S = positive(random, 5)
    skew = random.normal(size=(5, 5))
    Q = np.linalg.qr(np.eye(5) + 0.1 * (skew - skew.T))[0]
    Q = Q * np.sign(np.diag(Q)) @ S
    X = rotate(Q)
    assert np.trace(X) > np.trace(Q)
    close(X.T @ X, Q.T @ Q, atol=3e-3)
    for _ in range(100):
        Q = rotate(Q)
    close(Q, Q.T, atol=1e-6)
    close(Q, S, atol=2e-2)
    close(rotate(S), S, rtol=0, atol=1e-14)


def test_the_procrustes_step_maximises_the_trace():
    Q = positive(rng(), 4) + 0.05 * rng(1).normal(size=(4, 4))
    R = (Q.T - Q) / ref.spectral_norm(Q.T - Q)
    for rotate, third in ((ref.procrustes2, 0), (ref.procrustes3, 1 / 8)):
        step = lambda a, third=third: (np.eye(4) + a * R + a**2 / 2 * R @ R + third * a**3 * R @ R @ R) @ Q
        best = max(np.linspace(0, 1 / 8, 20001), key=lambda a: np.trace(step(a)))
        assert 0 < best < 1 / 8
        close(rotate(Q), step(best), atol=1e-4)


def test_norm_bounds_are_close_from_below():
    random = rng()
    for _ in range(20):
        A = random.normal(size=(7, 7)) * np.geomspace(1, 30, 7)
        for B in (A, A.T, A @ A.T):
            assert ref.spectral_norm(B) / 1.5 < ref.norm_bound_old(B) <= ref.spectral_norm(B) * (1 + 1e-12)
        for B, skew in ((A @ A.T, False), (A - A.T, True)):
            bound = ref.norm_bound_new(B, random.normal(size=(32, 7)), skew)
            assert ref.spectral_norm(B) / 1.1 < bound <= ref.spectral_norm(B) * (1 + 1e-12)
    A = np.zeros((5, 2))
    A[:4, 0], A[4, 1] = 1, 1.2  # the largest column is larger than the largest row, and is not seen from there
    close([ref.norm_bound_old(A), ref.norm_bound_old(A.T)], 2)
    u, w = random.normal(size=(2, 5))
    close(ref.norm_bound_old(np.outer(u, w)), np.linalg.norm(u) * np.linalg.norm(w))
    assert ref.norm_bound_old(np.zeros((3, 3))) == ref.norm_bound_new(np.zeros((3, 3)), np.ones((2, 3))) == 0


# -- dense and affine --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_dense_newton_is_one_factor_of_a_vector_with_a_bound_by_the_trace(geometry):
    Q, (h, v) = factor(rng(), 6, 6, geometry), probe(shape=(6,))
    ((T1, T2),) = ref.kron_sides(geometry, [Q], h, v)
    new, L = ref.dense_update(geometry, Q, h, v, rate=0.3, L=0.0)
    close(L, np.trace(T1 + T2))
    close(new, ref.update_factor(geometry, Q, T1, T2, 0.3, L))
    close(ref.dense_update(geometry, Q, [h, h], [v, v], rate=0.3, L=0.0)[0], new)


SIDES = {"dense": (4, 3), "left": ("diagonal", 3), "right": (4, "diagonal"), "diagonal": ("diagonal", "diagonal")}


@pytest.mark.parametrize("integrated", [False, True])
@pytest.mark.parametrize("kinds", SIDES)
def test_affine_is_eq_without_memory(kinds, integrated):
    random = rng()
    Ql, Qr = (factor(random, n, kind, "EQ") for n, kind in zip((4, 3), SIDES[kinds], strict=True))
    G, V = probe(shape=(4, 3))
    V = None if integrated else V
    new = ref.affine_update(Ql, Qr, G, V, rate=0.3, norm=ref.norm_bound_old)
    others, _ = ref.kron_update("EQ", [Ql, Qr], G, V, rate=0.3, lipschitz=[0.0, 0.0], decay=0, norm=ref.norm_bound_old)
    all_close(new, others)
    first = ref.affine_update(Ql, Qr, G, V, rate=0.3, order="1st")
    for Q, one, two in zip((Ql, Qr), first, new, strict=True):  # another step along the same line
        moved, along_it = one - Q, two - Q
        close(moved / np.linalg.norm(moved), along_it / np.linalg.norm(along_it))
        E = moved / Q if Q.ndim == 1 else moved @ np.linalg.inv(Q)
        close(ref.factor_norm(E), 0.3)


def test_affine_integrates_the_probe_out_if_the_longer_side_is_diagonal():
    dense, long, short = np.eye(4), np.ones(4), np.ones(3)
    assert ref.affine_integrates(long, short) and ref.affine_integrates(dense, long)
    assert not ref.affine_integrates(dense, short) and not ref.affine_integrates(dense, dense)


# -- xmat --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [6, 7])
def test_xmat_formulas_are_those_of_its_dense_matrix(n):
    random = rng()
    a, b, h, v = random.uniform(2, 3, n), random.normal(size=n), *random.normal(size=(2, n))
    if n % 2:
        b[n // 2] = 0
    A, B = a[::-1], b[::-1]
    p, q = ref.xmat_sides(a, b, h, v)
    close(p, a * h + b * h[::-1])
    close(q, (A * v - B * v[::-1]) / (a * A - b * B))
    close(ref.xmat_apply(a, b, h), (a**2 + B**2) * h + (a * b + A * B) * h[::-1])
    gA, gB = ref.xmat_direction(a, b, h, v)
    close(gA, p**2 - q**2)
    expected = p * p[::-1] - q * q[::-1]
    if n % 2:
        expected[n // 2] = 0
    close(gB, expected)


@pytest.mark.parametrize("n", [6, 7])
def test_xmat_moves_along_the_gradient_in_its_group(n):
    random = rng()
    a, b, h, v = random.uniform(2, 3, n), random.normal(size=n), *random.normal(size=(2, n))
    x, y = random.normal(size=(2, n))
    if n % 2:
        b[n // 2] = y[n // 2] = 0
    Q, X = ref.xmat_matrix(a, b), ref.xmat_matrix(x, y)
    gA, gB = ref.xmat_direction(a, b, h, v)
    close(along(Q, X, h, v), 2 * np.sum(x * gA + y * gB), rtol=1e-6)
    p, q = ref.xmat_sides(a, b, h, v)
    for order, size in (("2nd", np.max(p**2 + q**2)), ("1st", np.max(np.abs([gA, gB])))):
        new = ref.xmat_update(a, b, h, v, rate=0.3, order=order)
        close(ref.xmat_matrix(*new), Q - 0.3 / size * ref.xmat_matrix(gA, gB) @ Q)
    assert ref.criterion(ref.xmat_matrix(*ref.xmat_update(a, b, h, v, rate=1e-3)), h, v) < ref.criterion(Q, h, v)


@pytest.mark.parametrize("n", [6, 7])
def test_xmat_rests_at_the_inverse_magnitude_of_the_hessian(n):
    random = rng()
    a, b = random.uniform(2, 3, n), random.normal(size=n)
    Q = ref.xmat_matrix(a, b)
    H = inverse_magnitude(Q.T @ Q)
    close(ref.mean([np.stack(ref.xmat_direction(a, b, H @ v, v)) for v in np.eye(n)]), 0)
    scale, v = ref.initial_scale(70 * a, a), random.normal(size=n)
    a, b = scale * np.ones(n), np.zeros(n)
    all_close(ref.xmat_update(a, b, 70 * v, v, rate=0.3), (a, b))
    close(ref.xmat_apply(a, b, 70 * v), v)


# -- low-rank approximation --------------------------------------------------------------------------------------------


def low_rank(n=6, r=2, seed=0):
    random = rng(seed)
    return *random.normal(size=(2, n, r)) / 2, random.uniform(0.5, 2, n), *random.normal(size=(2, n))


def test_low_rank_solves_are_those_of_small_systems():
    U, V, d, h, v = low_rank()
    K = np.eye(2) + V.T @ U
    a, b, Ph, w = ref.lra_sides(U, V, d, h, v)
    close(a, d * h + U @ (V.T @ (d * h)))
    x = v / d
    close(b, x - V @ np.linalg.solve(K.T, U.T @ x))
    close(Ph, d * (a + V @ (U.T @ a)))
    close(w, (b - U @ np.linalg.solve(K, V.T @ b)) / d)
    close(ref.lra_apply(U, V, d, h), Ph)


def test_low_rank_directions_are_gradients_in_their_groups():
    U, V, d, h, v = low_rank()
    dD, dU, dV = ref.lra_directions(U, V, d, h, v)
    a, b, _, _ = ref.lra_sides(U, V, d, h, v)
    E = np.outer(a, a) - np.outer(b, b)
    Q, eye = ref.lra_matrix(U, V, d), np.eye(6)
    # d <- d (1 + eps x), that is Q <- Q (I + eps diag(x)).
    x = rng(1).normal(size=6)
    close(derivative(lambda e: ref.criterion(Q * (1 + e * x), h, v)), 2 * np.sum(x * dD / d), rtol=1e-6)
    # Q <- (I + eps A Vᵀ) Q moves U by A K, and the gradient with respect to A is E V; likewise V with U Aᵀ.
    A = rng(2).normal(size=(6, 2))
    close(along(Q, A @ V.T, h, v), 2 * np.sum(A * (E @ V)), rtol=1e-6)
    close((eye - 0.1 * E @ V @ V.T) @ Q, ref.lra_matrix(U - 0.1 * dU, V, d))
    close(along(Q, U @ A.T, h, v), 2 * np.sum(A * (E @ U)), rtol=1e-6)
    close((eye - 0.1 * U @ (E @ U).T) @ Q, ref.lra_matrix(U, V - 0.1 * dV, d))


@pytest.mark.parametrize("order", ["2nd", "1st"])
@pytest.mark.parametrize("which", ["U", "V", "both"])
def test_low_rank_steps_lower_the_criterion_and_have_the_stated_length(which, order):
    U, V, d, h, v = low_rank()
    before = ref.criterion(ref.lra_matrix(U, V, d), h, v)
    new = ref.lra_update(U, V, d, h, v, rate=1e-3, which=which, order=order)
    assert ref.criterion(ref.lra_matrix(*new), h, v) < before
    moved = [not np.array_equal(x, y) for x, y in zip(new, (U, V, d), strict=True)]
    assert moved == [which != "V", which != "U", True]
    # The change of I + UVᵀ, undone on the right, is A Vᵀ if U moves and U Aᵀ if V does.
    A_U = (new[0] - U) @ np.linalg.inv(np.eye(2) + V.T @ U)
    A_V = np.linalg.solve(np.eye(6) + V @ U.T, new[1] - V)
    lengths = np.max(np.abs(new[2] / d - 1)), np.linalg.norm(A_U @ V.T), np.linalg.norm(U @ A_V.T)
    a, b, Ph, w = ref.lra_sides(U, V, d, h, v)
    E, size = np.outer(a, a) - np.outer(b, b), np.linalg.norm
    relative = np.ones(3)
    if order == "2nd":
        relative[0] = np.max(np.abs(Ph * h - v * w)) / np.max(np.sqrt((Ph**2 + v**2) * (h**2 + w**2)))
        for k, M in enumerate((V @ V.T, U @ U.T), 1):
            relative[k] = size(E @ M) / (size(a) * size(M @ a) + size(b) * size(M @ b))
        assert np.all(relative <= 1)
    close(lengths, 1e-3 * relative * [True, *moved[:2]], atol=1e-12)


@pytest.mark.parametrize("which", ["U", "V", "both"])
def test_low_rank_with_bounds_takes_the_same_directions(which):
    U, V, d, h, v = low_rank()
    zero = (0.0, 0.0, 0.0)
    newU, newV, new_d, L = ref.lra_update_bounded(U, V, d, h, v, rate=0.1, lipschitz=zero, which=which)
    oldU, oldV, _ = ref.lra_update(U, V, d, h, v, rate=0.1, which=which)
    close(newU, oldU)
    close(newV, oldV)
    dD, _, _ = ref.lra_directions(U, V, d, h, v)
    close(new_d, d - 0.1 / L[0] * dD)
    assert [l > 0 for l in L] == [True, which != "V", which != "U"]
    larger = tuple(2 * l + 1 for l in L)
    *_, L2 = ref.lra_update_bounded(U, V, d, h, v, rate=0.1, lipschitz=larger, which=which)
    close(L2, [0.9 * m + 0.1 * l if l else m for l, m in zip(L, larger, strict=True)])


def test_low_rank_rests_at_the_inverse_magnitude_of_the_hessian():
    U, V, d, _, v = low_rank()
    Q = ref.lra_matrix(U, V, d)
    H = inverse_magnitude(Q.T @ Q)
    for parts in zip(*(ref.lra_directions(U, V, d, H @ e, e) for e in np.eye(6)), strict=True):
        close(ref.mean(parts), 0)
    d = ref.initial_scale(70 * v, v) * np.ones(6)
    none = np.zeros((6, 0))
    for rank in (0 * U, 0 * V, d), (none, none, d):
        all_close(ref.lra_update(*rank, 70 * v, v, rate=0.3), rank)
        *new, _ = ref.lra_update_bounded(*rank, 70 * v, v, rate=0.3, lipschitz=(0.0, 0.0, 0.0))
        all_close(new, rank)


def test_low_rank_balancing_leaves_the_product():
    U, V, *_ = low_rank()
    U, V = 5 * U, V / 3
    newU, newV = ref.lra_rescale(U, V)
    close(newU @ newV.T, U @ V.T)
    close(np.linalg.norm(newU), np.linalg.norm(newV))
    gap = lambda U, V: np.linalg.norm(U.T @ U - V.T @ V)
    for _ in range(50):
        before, (U, V) = (U @ V.T, gap(*ref.lra_rescale(U, V))), ref.lra_balance(U, V)
        close(U @ V.T, before[0], atol=1e-4)
        assert gap(U, V) <= before[1]
    assert gap(U, V) < 0.1 * gap(newU, newV)


def test_updates_write_into_none_of_their_arguments():
    def frozen(*arrays):
        for array in arrays:
            array.setflags(write=False)
        return arrays

    U, V, d, h, v = frozen(*low_rank())
    Q, T, Ql, Qr = frozen(np.eye(6) + 0.1 * np.outer(h, v), np.eye(6), np.diag(d[:2]), d[:3].copy())
    G = frozen(np.outer(h[:2], v[:3]))[0]
    for order in ("2nd", "1st"):
        ref.xmat_update(d, 0 * d, h, v, rate=0.1, order=order)
        ref.lra_update(U, V, d, h, v, rate=0.1, order=order)
        ref.affine_update(Ql, Qr, G, rate=0.1, order=order)
    ref.lra_update_bounded(U, V, d, h, v, rate=0.1, lipschitz=(0.0, 0.0, 0.0))
    ref.lra_balance(U, V)
    for geometry in GEOMETRIES:
        ref.dense_update(geometry, Q, h, v, rate=0.1, L=0.0)
        ref.update_factor(geometry, Q, T, Q, 0.1, 1.0)
    for step in (ref.procrustes2, ref.procrustes3, ref.norm_bound_old):
        step(Q)
