"""SIRF-Shampoo, IF-Shampoo, SINGD and IKFAC in NumPy, float64, one tensor at a time, written from the formulas.

Factors are whole matrices. A structure is a list of matrices that span its algebra, and a direction is taken there by
least squares, as its definition says.
"""

import itertools

import numpy as np


def basis(name, d):
    """Matrices that span the algebra of a structure."""
    unit = lambda i, j: np.outer(np.eye(d)[i], np.eye(d)[j])
    pairs = list(itertools.product(range(d), range(d)))
    if name == "dense":
        return [unit(i, j) for i, j in pairs]
    if name == "diagonal":
        return [unit(i, i) for i in range(d)]
    if name.startswith("block"):
        b = int(name[5 : -len("diagonal")])
        return [unit(i, j) for i, j in pairs if i // b == j // b]
    if name.startswith("hierarchical"):
        first, last = map(int, name[len("hierarchical") :].split("_"))
        part = lambda i: 0 if i < first else 2 if i >= d - last else 1
        kept = {(0, 0), (0, 1), (0, 2), (2, 1), (2, 2)}
        return [unit(i, j) for i, j in pairs if i == j or (part(i), part(j)) in kept]
    toeplitz = [np.eye(d, k=k) for k in range(d)]
    return [X.T for X in toeplitz] if name == "lower_toeplitz" else toeplitz


def project(name, M):
    """The m of the algebra with m + m^T nearest to 2 M; of several, the smallest."""
    spanning = basis(name, len(M))
    columns = np.stack([(X + X.T).ravel() for X in spanning], axis=1)
    lengths = np.array([np.linalg.norm(X) for X in spanning])
    x = np.linalg.lstsq(columns / lengths, 2 * M.ravel(), rcond=None)[0] / lengths
    return np.einsum("k,kij->ij", x, np.stack(spanning))


def unfolded(G, n):
    return np.moveaxis(G, n, 0).reshape(G.shape[n], -1)


def times(G, matrices):
    """G x_1 X_1 ... x_N X_N."""
    for n, X in enumerate(matrices):
        G = np.moveaxis(np.tensordot(X, G, axes=(1, n)), 0, n)
    return G


class Tensor:
    """The factors of one tensor of these sides."""

    def __init__(self, sides, structures="dense", beta=1e-2, alpha=0.5, lam=1e-3, kfac_like=False, limit="norm"):
        self.structures = [structures] * len(sides) if isinstance(structures, str) else structures
        self.sides, self.beta, self.alpha, self.lam, self.kfac_like, self.limit = (
            sides,
            beta,
            alpha,
            lam,
            kfac_like,
            limit,
        )
        self.K = [np.eye(d) for d in sides]
        self.m = [np.zeros((d, d)) for d in sides]

    def others(self, numbers, n):
        return np.prod([x for j, x in enumerate(numbers) if j != n]) if not self.kfac_like else 1.0

    def of_gradient(self, G, B):
        hat, P = times(G, [K.T for K in self.K]), G.size
        self.step([B / (P / d) * unfolded(hat, n) @ unfolded(hat, n).T for n, d in enumerate(self.sides)])

    def of_factors(self, *factors):
        H = [K.T @ A @ K for K, A in zip(self.K, factors, strict=True)]
        traces = [np.trace(h) / d for h, d in zip(H, self.sides, strict=True)]
        self.step([self.others(traces, n) * h for n, h in enumerate(H)])

    def step(self, T):
        taus = [np.trace(K.T @ K) / d for K, d in zip(self.K, self.sides, strict=True)]
        Ks = []
        for n, (K, d) in enumerate(zip(self.K, self.sides, strict=True)):
            M = 0.5 * (T[n] + self.lam * self.others(taus, n) * K.T @ K - np.eye(d))
            share = 1.0 if self.limit == "none" else 1 - self.alpha
            self.m[n] = m = self.alpha * self.m[n] + share * project(self.structures[n], M)
            size = {"none": 0.0, "entry": np.abs(m).max(), "norm": np.linalg.norm(m)}[self.limit]
            Ks.append(K - self.beta / max(1.0, size) * K @ m)
        self.K = Ks

    def apply(self, G):
        return times(G, [K @ K.T for K in self.K])


def momentum_step(theta, name, u, buf, rate, alpha, kappa):
    """theta and buf after buf <- alpha buf + (u + kappa theta), theta <- theta - rate buf."""
    buf[name] = alpha * buf.get(name, 0.0) + u + kappa * theta[name]
    theta[name] = theta[name] - rate * buf[name]
