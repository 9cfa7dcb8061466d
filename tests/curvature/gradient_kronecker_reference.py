"""SOAP, Shampoo and KL-Shampoo in NumPy, float64, one matrix at a time, written from the formulas.

Averages are kept as they are in the papers, without a correction of their start, which is made when they are used.
"""

import numpy as np


class Block:
    """The covariance of the gradients of one matrix (m, n). `left` and `right` say which sides have factors."""

    def __init__(self, shape, fit, eigenvalues, decay, basis="qr", left=True, right=True):
        self.fit, self.eigenvalues, self.decay, self.basis = fit, eigenvalues, decay, basis
        self.left, self.right, self.shape = left, right, shape
        m, n = shape
        self.A, self.B, self.V = np.zeros((m, m)), np.zeros((n, n)), np.zeros(shape)
        self.QA, self.QB = np.eye(m), np.eye(n)
        self.alpha, self.beta = np.zeros(m), np.zeros(n)
        self.t = self.refreshes = 0

    def update(self, G):
        (m, n), b = self.shape, self.decay
        self.t += 1
        self.V = b * self.V + (1 - b) * (self.QA.T @ G @ self.QB) ** 2
        if self.fit == "ema":
            self.A, self.B = b * self.A + (1 - b) * G @ G.T, b * self.B + (1 - b) * G.T @ G
            self.alpha, self.beta = np.diag(self.QA.T @ self.A @ self.QA), np.diag(self.QB.T @ self.B @ self.QB)
            return
        if self.t == 1:
            s = np.mean(G**2) if not (self.left and self.right) else np.sqrt(np.mean(G**2))
            self.A, self.B, self.alpha, self.beta = s * np.eye(m), s * np.eye(n), np.full(m, s), np.full(n, s)
        old_A = self.QA @ np.diag(1 / self.alpha) @ self.QA.T if self.left else np.eye(m)
        old_B = self.QB @ np.diag(1 / self.beta) @ self.QB.T if self.right else np.eye(n)
        self.A = b * self.A + (1 - b) * G @ old_B @ G.T / n
        self.B = b * self.B + (1 - b) * G.T @ old_A @ G / m
        self.alpha, self.beta = np.diag(self.QA.T @ self.A @ self.QA), np.diag(self.QB.T @ self.B @ self.QB)

    def refresh(self):
        new = []
        for X, Q, used in ((self.A, self.QA, self.left), (self.B, self.QB, self.right)):
            if not used:
                new.append(np.eye(len(X)))
            elif self.basis == "eigh" or self.refreshes == 0:
                new.append(np.linalg.eigh(X)[1])
            else:
                order = np.argsort(-np.diag(Q.T @ X @ Q))
                new.append(np.linalg.qr(X @ Q[:, order])[0])
        RA, RB = self.QA.T @ new[0], self.QB.T @ new[1]
        self.V = (RA**2).T @ self.V @ RB**2
        self.QA, self.QB = new
        self.alpha, self.beta = np.diag(self.QA.T @ self.A @ self.QA), np.diag(self.QB.T @ self.B @ self.QB)
        self.refreshes += 1

    def Gamma(self):
        """The eigenvalues (m, n)."""
        (m, n), whole = self.shape, 1 - self.decay**self.t
        if self.eigenvalues == "corrected":
            return self.V / whole
        alpha = self.alpha if self.left else np.ones(m)
        beta = self.beta if self.right else np.ones(n)
        if self.fit == "kl":
            return np.outer(alpha, beta)
        other = np.trace(self.A) if self.left and self.right else n if self.left else m
        return np.outer(alpha, beta) / other / whole

    def step(self, G, refresh):
        self.update(G)
        if refresh:
            self.refresh()

    def times(self, M, function, damping=0.0):
        """f(C + damping tr C / (m n)) M."""
        Gamma = self.Gamma()
        return self.QA @ (function(Gamma + damping * Gamma.mean()) * (self.QA.T @ M @ self.QB)) @ self.QB.T

    def dense(self):
        """C as a matrix (m n, m n), rows first."""
        Q = np.kron(self.QA, self.QB)
        return Q @ np.diag(self.Gamma().ravel()) @ Q.T


class Vector(Block):
    """The diagonal of a vector, or of anything."""

    def __init__(self, shape, decay):
        self.V, self.decay, self.t = np.zeros(shape), decay, 0

    def step(self, g, refresh):
        self.t += 1
        self.V = self.decay * self.V + (1 - self.decay) * g**2

    def times(self, M, function, damping=0.0):
        return function(self.V / (1 - self.decay**self.t)) * M


def run(theta, gradient, steps, every, make, rate, b1, b2, eps, p=0.5, graft="none", damping=0.0, weight_decay=0.0):
    """Parameters after so many steps; `make(name, shape)` gives (a block, the shape in which it sees the parameter)."""
    blocks = {name: make(name, x.shape) for name, x in theta.items()}
    mean = {name: np.zeros_like(x) for name, x in theta.items()}
    square = {name: np.zeros_like(x) for name, x in theta.items()}
    root = lambda Gamma: 1 / (Gamma**p + eps)
    for t in range(1, steps + 1):
        for name, g in gradient(theta, t - 1).items():
            block, shape = blocks[name]
            block.step(g.reshape(shape), (t - 1) % every == 0)
            mean[name] = b1 * mean[name] + (1 - b1) * g
            square[name] = b2 * square[name] + (1 - b2) * g**2
            M = mean[name] / (1 - b1**t)
            U = block.times(M.reshape(shape), root, damping).reshape(g.shape)
            if graft == "adam":
                adam = M / (np.sqrt(square[name] / (1 - b2**t)) + eps)
                U = U * np.linalg.norm(adam) / np.linalg.norm(U)
            theta[name] = theta[name] - rate * (U + weight_decay * theta[name])
    return theta
