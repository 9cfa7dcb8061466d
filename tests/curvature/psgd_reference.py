"""PSGD's preconditioner updates the slow way: float64, dense matrices, without any code of `curvtrain.curvature`.

Every family fits Q, of which P = QᵀQ preconditions, to the criterion hᵀPh + vᵀP⁻¹v, where h = Hv (Newton) or h is a
gradient and v independent of it (whitening). Functions return new values and change none of their arguments.

| symbol | meaning |
|---|---|
| h, v | observation and probe, of the leaf's shape; for several probes, lists of them |
| N, n_i, p | elements of the leaf, size of its dim i, number of its dims |
| Q_i | factor of dim i: dense (n, n), diagonal (n,), block-diagonal (B, b, b) or None, the identity |
| T1, T2, E | the two sides of a factor's stationarity condition (mean over probes), and T1 - T2 |
| L, ℓ | running bound of the curvature of the fit, its new value ‖T1 + T2‖; a block-diagonal factor has (B,) of them |
| μ, σ | rate, and the step μ / L |

If n is no multiple of b, then the last block is cropped. Its padding belongs to no element: rows and columns without
anything off the diagonal, say of the identity, which updates leave as they are (`balance` scales them).

Geometries are "EQ", "QEP", "QEQ", "PRO" (Q0.5EQ1.5) and "QUAD", and those whose stored factors are P's own, "PRO4P" and
"QUAD4P".

References: X.-L. Li, arXiv 1512.04202, 1809.10232, 2211.04422, 2402.11858, 2402.04553.
"""

import functools

import numpy as np

GEOMETRIES = ("EQ", "QEP", "QEQ", "PRO", "QUAD", "PRO4P", "QUAD4P")
STORED = ("PRO4P", "QUAD4P")  # the stored factor is P_i itself


def spectral_norm(A):
    return np.linalg.norm(A, 2)


def criterion(Q, h, v):
    """hᵀPh + vᵀP⁻¹v for a dense Q (N, N)."""
    return np.sum((Q @ h.ravel()) ** 2) + np.sum(np.linalg.solve(Q.T, v.ravel()) ** 2)


def running_bound(L, l, decay):
    """L of the next step, given the new ℓ; decay 0 forgets: L = ℓ."""
    return np.maximum(decay * L + (1 - decay) * l, l)


def step_size(rate, L):
    """μ / L, or 0 if there is nothing to be fitted."""
    return rate / L if L > 0 else 0.0


def as_list(x):
    return list(x) if isinstance(x, list | tuple) else [x]


def mean(values):
    return sum(values) / len(values)


def initial_scale(h, v=None, parts=1):
    """Scale of Q_0 = scale I, or of each of `parts` factors: with it P = H⁻¹ if H = c I, or 1 / rms(h) without v."""
    h = as_list(h)
    v2 = sum(x.size for x in h) if v is None else sum(np.sum(x**2) for x in as_list(v))
    return (v2 / sum(np.sum(x**2) for x in h)) ** (1 / 4 / parts)


def damp(h, noise, damping=1e-9, eps=2.0**-23):
    """psgd_torch's, with eps of the factors' type; for EQ in whitening the noise is v."""
    return h + (damping + eps * np.abs(h)) * noise


# -- factors of one dim ------------------------------------------------------------------------------------------------


def matrix(Q, n):
    """The dense (n, n) matrix of any kind of factor."""
    if Q is None:
        return np.eye(n)
    if Q.ndim == 1:
        return np.diag(Q)
    if Q.ndim == 2:
        return Q.copy()
    B, b, _ = Q.shape
    assert (B - 1) * b < n <= B * b
    M = np.zeros((B * b, B * b))
    for k in range(B):
        M[k * b : (k + 1) * b, k * b : (k + 1) * b] = Q[k]
    return M[:n, :n]


def restrict(T, Q):
    """What a factor like Q sees of T (n, n): all of it, its diagonal or its blocks, with zeros for the padding."""
    if Q.ndim == 1:
        return np.diag(T).copy()
    if Q.ndim == 2:
        return T.copy()
    B, b, _ = Q.shape
    padded = np.zeros((B * b, B * b))
    padded[: len(T), : len(T)] = T
    return np.stack([padded[k * b : (k + 1) * b, k * b : (k + 1) * b] for k in range(B)])


def factor_norm(T, norm=spectral_norm):
    """ℓ of T1 + T2 as `restrict` returns it: a number, or one for each block."""
    if T.ndim == 1:
        return np.max(np.abs(T))
    return norm(T) if T.ndim == 2 else np.array([norm(block) for block in T])


def procrustes2(Q, norm=spectral_norm):
    """Rotates Q towards a symmetric matrix: exp(a R) Q to second order, with the step a that maximises its trace."""
    R = Q.T - Q
    if not np.any(R):
        return Q.copy()
    R = R / norm(R)
    M1 = R @ Q
    M2 = R @ M1
    t1, t2 = np.trace(M1), np.trace(M2)
    a = min(-t1 / t2, 1 / 8) if t2 < 0 else 1 / 8
    return Q + a * M1 + a**2 / 2 * M2


def procrustes3(Q, norm=spectral_norm):
    """To third order with a³ / 8 instead of a³ / 6, since I + aR + a²R²/2 + a³R³/8 is orthogonal up to a⁶.

    Cancellation leaves half of the digits of a small a; 2 t1 / (sqrt(t2² - 1.5 t1 t3) - t2) is the same without it.
    """
    R = Q.T - Q
    if not np.any(R):
        return Q.copy()
    R = R / norm(R)
    M1 = R @ Q
    M2 = R @ M1
    M3 = R @ M2
    t1, t2, t3 = np.trace(M1), np.trace(M2), np.trace(M3)
    if not (t1 > 0 and t3 < 0):
        return Q.copy()
    a = min((-t2 - np.sqrt(t2**2 - 1.5 * t1 * t3)) / (0.75 * t3), 1 / 3)
    return Q + a * M1 + a**2 / 2 * M2 + a**3 / 8 * M3


def update_factor(geometry, Q, T1, T2, rate, L, norm=spectral_norm):
    """One step σ = rate / L of a factor, with L as it is after `running_bound`; `norm` is for the Procrustes steps."""
    if Q.ndim == 3:
        return np.stack(
            [update_factor(geometry, *parts, rate, l, norm) for *parts, l in zip(Q, T1, T2, L, strict=True)]
        )
    s, E = step_size(rate, L), T1 - T2
    if Q.ndim == 1:
        if geometry == "QUAD":
            return Q * (1 - s / 2 * E) ** 2
        return Q * (1 - s * E) ** (2 if geometry == "QUAD4P" else 1)
    if geometry == "EQ":
        return Q - s * np.triu(E) @ Q
    if geometry == "QEP":
        return Q - s * E @ Q
    if geometry == "QEQ":
        return Q - s * Q @ E
    if geometry == "PRO":
        return procrustes2(Q - s * E @ Q, norm)
    if geometry == "PRO4P":
        X = Q - s * E @ Q
        for _ in range(10):
            X = procrustes3(X, norm)
            if np.max(np.abs(X.T - X)) < 1e-3 * np.max(np.abs(X)):
                break
        return X
    if geometry in ("QUAD", "QUAD4P"):
        s = s / 2 if geometry == "QUAD" else s
        X = Q - s * E @ Q
        X = X - s * X @ E
        return (X + X.T) / 2
    raise ValueError(geometry)


# -- Kronecker products ------------------------------------------------------------------------------------------------


def contract(X, i):
    """(n_i, n_i): sum over all other dims of X[..a..] X[..b..]."""
    rows = np.moveaxis(X, i, 0).reshape(X.shape[i], -1)
    return rows @ rows.T


def kron_apply(factors, X):
    """One factor on each dim of X."""
    for i, Q in enumerate(factors):
        X = np.moveaxis(np.tensordot(matrix(Q, X.shape[i]), X, axes=(1, i)), 0, i)
    return X


def kron_matrix(factors, shape):
    """The dense (N, N) matrix of `kron_apply` on raveled arrays."""
    return functools.reduce(np.kron, [matrix(Q, n) for Q, n in zip(factors, shape, strict=True)], np.eye(1))


def kron_precondition(geometry, factors, G):
    """P G."""
    Qs = [matrix(Q, n) for Q, n in zip(factors, G.shape, strict=True)]
    return kron_apply(Qs if geometry in STORED else [Q.T @ Q for Q in Qs], G)


def balance(factors, shape=None):
    """Scales factors (but None) to the same largest element, and leaves their Kronecker product as it is.

    With the leaf's shape, the padding of blocks does not count.
    """
    sizes = shape or [None if Q is None else Q.size for Q in factors]
    there = [i for i, Q in enumerate(factors) if Q is not None]
    largest = {i: np.max(np.abs(matrix(factors[i], sizes[i]) if shape else factors[i])) for i in there}
    gmean = np.exp(mean([np.log(l) for l in largest.values()])) if there else 1.0
    return [None if Q is None else Q * gmean / largest[i] for i, Q in enumerate(factors)]


def zero_bounds(factors):
    """L_0."""
    return [None if Q is None else np.zeros(len(Q)) if Q.ndim == 3 else 0.0 for Q in factors]


def kron_T1(geometry, Qs, i, h):
    """T1 (n_i, n_i) for one probe and dense factors Qs."""
    if geometry == "EQ":
        return contract(kron_apply(Qs, h), i)
    y = kron_precondition(geometry, Qs, h)
    return contract(kron_apply(only(Qs, i), y) if geometry == "QEP" else y, i)


def kron_T2(geometry, Qs, i, v):
    """T2 (n_i, n_i) for one probe and dense factors Qs."""
    if geometry == "EQ":
        return contract(kron_apply([np.linalg.inv(Q).T for Q in Qs], v), i)
    return contract(kron_apply(only(Qs, i), v) if geometry == "QEP" else v, i)


def kron_expected_T2(geometry, Qs, i):
    """`kron_T2`'s expectation over v ~ N(0, I)."""
    if geometry == "EQ":
        inverses = [np.linalg.inv(Q) for Q in Qs]
        return inverses[i].T @ inverses[i] * np.prod([np.sum(X**2) for j, X in enumerate(inverses) if j != i])
    others = np.prod([len(Q) for j, Q in enumerate(Qs) if j != i])  # N / n_i
    return others * (Qs[i] @ Qs[i].T if geometry == "QEP" else np.eye(len(Qs[i])))


def only(Qs, i):
    return [Q if j == i else None for j, Q in enumerate(Qs)]


def kron_sides(geometry, factors, h, v=None):
    """[(T1, T2), or None for the identity]: what each factor sees of them. Without v it is integrated out."""
    h = as_list(h)
    Qs = [matrix(Q, n) for Q, n in zip(factors, h[0].shape, strict=True)]
    sides = []
    for i, Q in enumerate(factors):
        if Q is None:
            sides.append(None)
            continue
        T1 = mean([kron_T1(geometry, Qs, i, x) for x in h])
        T2 = kron_expected_T2(geometry, Qs, i) if v is None else mean([kron_T2(geometry, Qs, i, x) for x in as_list(v)])
        sides.append((restrict(T1, Q), restrict(T2, Q)))
    return sides


def kron_update(geometry, factors, h, v=None, *, rate, lipschitz, decay=0.9, norm=spectral_norm):
    """(factors, bounds) after one step of all factors, all from the same old ones; decay 0 is psgd_jax's EQ."""
    if geometry == "QEP":
        factors = balance(factors, as_list(h)[0].shape)
    new_factors, new_lipschitz = list(factors), list(lipschitz)
    for i, sides in enumerate(kron_sides(geometry, factors, h, v)):
        if sides is not None:
            new_lipschitz[i] = running_bound(lipschitz[i], factor_norm(sum(sides), norm), decay)
            new_factors[i] = update_factor(geometry, factors[i], *sides, rate, new_lipschitz[i], norm)
    return new_factors, new_lipschitz


# -- one dense Q over the flat vector, Newton --------------------------------------------------------------------------


def dense_sides(geometry, Q, h, v):
    """a, b of T1 = aaᵀ, T2 = bbᵀ."""
    P = Q if geometry in STORED else Q.T @ Q
    if geometry == "EQ":
        return Q @ h, np.linalg.solve(Q.T, v)
    if geometry == "QEP":
        return Q @ P @ h, Q @ v
    return P @ h, v


def dense_update(geometry, Q, h, v, *, rate, L, decay=0.9, norm=spectral_norm):
    """(Q, L) with ℓ = aᵀa + bᵀb, mean over probes; Q (n, n)."""
    sides = [dense_sides(geometry, Q, *probe) for probe in zip(as_list(h), as_list(v), strict=True)]
    T1 = mean([np.outer(a, a) for a, _ in sides])
    T2 = mean([np.outer(b, b) for _, b in sides])
    L = running_bound(L, mean([a @ a + b @ b for a, b in sides]), decay)
    return update_factor(geometry, Q, T1, T2, rate, L, norm), L


# -- affine: EQ for a matrix G (m, n), P G = QlᵀQl G QrᵀQr -------------------------------------------------------------


def affine_integrates(Ql, Qr):
    """Whether whitening integrates v out: both sides are diagonal, or one is, the longer."""
    if Ql.ndim == Qr.ndim:
        return Ql.ndim == 1
    diagonal, dense = (Ql, Qr) if Ql.ndim == 1 else (Qr, Ql)
    return len(diagonal) >= len(dense)


def affine_update(Ql, Qr, G, V=None, *, rate, order="2nd", norm=spectral_norm):
    """(Ql, Qr) after one step; without V it is integrated out."""
    L, R = matrix(Ql, len(Ql)), matrix(Qr, len(Qr))
    L_inv, R_inv = np.linalg.inv(L), np.linalg.inv(R)
    A = L @ G @ R.T
    if V is None:
        BBt = np.trace(R_inv @ R_inv.T) * L_inv.T @ L_inv
        BtB = np.trace(L_inv @ L_inv.T) * R_inv.T @ R_inv
    else:
        B = L_inv.T @ V @ R_inv
        BBt, BtB = B @ B.T, B.T @ B
    new = []
    for Q, T1, T2 in ((Ql, A @ A.T, BBt), (Qr, A.T @ A, BtB)):
        if Q.ndim == 1:
            t1, t2 = np.diag(T1), np.diag(T2)
            size = np.max(t1 + t2) if order == "2nd" else np.max(np.abs(t1 - t2))
            new.append(Q - step_size(rate, size) * (t1 - t2) * Q)
        else:
            E = np.triu(T1 - T2)
            size = norm(T1 + T2) if order == "2nd" else norm(E)
            new.append(Q - step_size(rate, size) * E @ Q)
    return tuple(new)


# -- xmat: Q = diag(a) + antidiag(b) over the flat vector --------------------------------------------------------------


def xmat_matrix(a, b):
    """Q (n, n): row i has a_i in column i and b_i in column n-1-i, the sum of both in the middle of an odd n."""
    return np.diag(a) + np.fliplr(np.diag(b))


def xmat_apply(a, b, g):
    """P g."""
    Q = xmat_matrix(a, b)
    return Q.T @ Q @ g


def xmat_sides(a, b, h, v):
    """p = Qh, q = Q⁻ᵀv."""
    Q = xmat_matrix(a, b)
    return Q @ h, np.linalg.solve(Q.T, v)


def xmat_direction(a, b, h, v):
    """(gA, gB): ppᵀ - qqᵀ on the diagonal and on the antidiagonal, whose middle belongs to the diagonal."""
    p, q = xmat_sides(a, b, h, v)
    E = np.outer(p, p) - np.outer(q, q)
    gA, gB = np.diag(E).copy(), np.diag(np.fliplr(E)).copy()
    if len(a) % 2:
        gB[len(a) // 2] = 0
    return gA, gB


def xmat_update(a, b, h, v, *, rate, order="2nd"):
    """(a, b) after one step."""
    p, q = xmat_sides(a, b, h, v)
    gA, gB = xmat_direction(a, b, h, v)
    size = np.max(p**2 + q**2) if order == "2nd" else np.max(np.abs([gA, gB]))
    s = step_size(rate, size)
    return a - s * (gA * a + gB * b[::-1]), b - s * (gA * b + gB * a[::-1])


# -- low-rank approximation: Q = (I + UVᵀ) diag(d), U and V (n, r), d (n,) ---------------------------------------------


def lra_matrix(U, V, d):
    """Q (n, n)."""
    return (np.eye(len(d)) + U @ V.T) * d


def lra_apply(U, V, d, g):
    """P g."""
    Q = lra_matrix(U, V, d)
    return Q.T @ Q @ g


def lra_sides(U, V, d, h, v):
    """a = Qh, b = Q⁻ᵀv, Ph, w = P⁻¹v."""
    Q = lra_matrix(U, V, d)
    a, b = Q @ h, np.linalg.solve(Q.T, v)
    return a, b, Q.T @ a, np.linalg.solve(Q, b)


def lra_directions(U, V, d, h, v):
    """Descent is d - μ dD, U - μ dU, V - μ dV: all from the same U, V, d."""
    a, b, Ph, w = lra_sides(U, V, d, h, v)
    E = np.outer(a, a) - np.outer(b, b)
    K = np.eye(U.shape[1]) + V.T @ U
    return d * (Ph * h - v * w), E @ V @ K, (np.eye(len(d)) + V @ U.T) @ E @ U


def lra_bounds(U, V, d, h, v):
    """Second-order bounds for U and V, the only ones that both forms share."""
    a, b, _, _ = lra_sides(U, V, d, h, v)
    size = np.linalg.norm
    l_U = size(a) * size(V @ V.T @ a) + size(b) * size(V @ V.T @ b)
    l_V = size(a) * size(U @ U.T @ a) + size(b) * size(U @ U.T @ b)
    return l_U, l_V


def lra_update(U, V, d, h, v, *, rate, which="both", order="2nd"):
    """(U, V, d) after one step of psgd_jax's form; it draws `which`, "U" or "V". Everything is from the old values."""
    a, b, Ph, w = lra_sides(U, V, d, h, v)
    dD, dU, dV = lra_directions(U, V, d, h, v)
    if order == "2nd":
        s_d = rate * np.min((Ph**2 + v**2) ** -0.5 * (h**2 + w**2) ** -0.5)
        l_U, l_V = lra_bounds(U, V, d, h, v)
    else:
        E = np.outer(a, a) - np.outer(b, b)
        s_d = step_size(rate, np.max(np.abs(Ph * h - v * w)))
        l_U, l_V = np.linalg.norm(E @ V @ V.T), np.linalg.norm(U @ U.T @ E)
    new_U = U - step_size(rate, l_U) * dU if which in ("U", "both") else U.copy()
    new_V = V - step_size(rate, l_V) * dV if which in ("V", "both") else V.copy()
    return new_U, new_V, d - s_d * dD


def lra_update_bounded(U, V, d, h, v, *, rate, lipschitz, decay=0.9, which="both"):
    """(U, V, d, (L_d, L_U, L_V)) after one step of psgd_torch's form, without the `lra_balance` that comes first."""
    _, _, Ph, w = lra_sides(U, V, d, h, v)
    dD, dU, dV = lra_directions(U, V, d, h, v)
    l_U, l_V = lra_bounds(U, V, d, h, v)
    L_d, L_U, L_V = lipschitz
    L_d = running_bound(L_d, np.max(np.abs(Ph * h)) + np.max(np.abs(v * w)), decay)
    d = d - step_size(rate, L_d) * dD
    if which in ("U", "both"):
        L_U = running_bound(L_U, l_U, decay)
        U = U - step_size(rate, L_U) * dU
    if which in ("V", "both"):
        L_V = running_bound(L_V, l_V, decay)
        V = V - step_size(rate, L_V) * dV
    return U, V, d, (L_d, L_U, L_V)


def lra_rescale(U, V):
    """psgd_jax's balance: ‖U‖_F = ‖V‖_F, and UVᵀ is as it was."""
    if not U.size:
        return U.copy(), V.copy()
    ratio = np.sqrt(np.linalg.norm(U) / np.linalg.norm(V))
    return U / ratio, V * ratio


def lra_balance(U, V):
    """psgd_torch's: after `lra_rescale` also brings UᵀU and VᵀV closer; UVᵀ is as it was up to S⁴ / 4."""
    U, V = lra_rescale(U, V)
    if not U.size:
        return U, V
    S = 0.1 * (U.T @ U - V.T @ V) / (np.trace(U.T @ U) + np.trace(V.T @ V))
    eye = np.eye(len(S))
    return U @ (eye - S + S @ S / 2), V @ (eye + S + S @ S / 2)


# -- lower bounds of the spectral norm ---------------------------------------------------------------------------------


def norm_bound_old(A):
    """psgd_jax's: one power iteration from the largest column or row."""
    scale = np.max(np.abs(A))
    if scale == 0:
        return 0.0
    B = A / scale
    columns, rows = np.sum(B**2, 0), np.sum(B**2, 1)
    if np.max(columns) <= np.max(rows):
        B, columns = B.T, rows
    x = B[:, np.argmax(columns)]
    y = B.T @ x / np.linalg.norm(B.T @ x)
    return scale * np.linalg.norm(B @ y)


def norm_bound_new(A, Z, skew=False):
    """psgd_torch's: A (n, n) positive semi-definite or skew; noise Z (k, n) ~ N(0, I) around the largest row."""
    scale = np.max(np.abs(A)) if skew else np.max(np.diag(A))
    if scale <= 0:
        return 0.0
    B = A / scale
    row = B[np.argmax(np.sum(B**2, 1))]
    Z = row + np.sign(Z @ row)[:, None] * Z
    for _ in range(2):
        Z = Z @ B
        Z = Z / np.linalg.norm(Z, axis=1, keepdims=True)
        Z = Z @ B
    return scale * np.max(np.linalg.norm(Z, axis=1))
