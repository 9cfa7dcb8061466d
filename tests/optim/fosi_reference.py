"""FOSI from the paper in dense float64 numpy, and the quadratic on which it is compared with `optim.fosi`.

The slow, obvious version: flat vectors, explicit eigenvectors as rows of V, no guards. Sivan, Gabel, Schuster (2024),
arXiv 2302.08484, algorithm 2.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from curvtrain.curvature import CurvatureEstimator, Eigenpairs, as_matrix, hvp

N = 100  # parameters of the quadratic
SHAPES = {"a": (5, 16), "b": (20,)}  # ... as a pytree; ravel_pytree puts "a" first
# condition number 1e4: ten large eigenvalues, a bulk, ten small ones
SPECTRUM = np.concatenate([np.logspace(0, -1, 10), np.logspace(-2, -3, 80), np.logspace(-3.5, -4, 10)])


def tree(flat):
    """A flat vector (or rows of vectors) of N numbers as a float32 pytree of SHAPES."""
    flat, tree, start = np.asarray(flat), {}, 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        tree[name] = jnp.asarray(flat[..., start : start + size].reshape(*flat.shape[:-1], *shape), jnp.float32)
        start += size
    return tree


def flat(tree):
    """A pytree as a flat float64 vector."""
    return np.asarray(ravel_pytree(tree)[0].astype(jnp.float32), np.float64)


def quadratic(seed=0, spectrum=SPECTRUM):
    """(Q, x0): a rotated symmetric matrix, exactly representable in float32, and a start, both float64."""
    rng = np.random.default_rng(seed)
    R = np.linalg.qr(rng.normal(size=(N, N)))[0]
    Q = (R * spectrum) @ R.T
    Q = (Q + Q.T) / 2
    return Q.astype(np.float32).astype(np.float64), rng.normal(size=N).astype(np.float32).astype(np.float64)


def loss(params, Q):
    """½ xᵀ Q x. Its Hessian is Q wherever it is taken, so Q can play the batch."""
    x = ravel_pytree(params)[0]
    return 0.5 * x @ (Q @ x)


def extreme_eigenpairs(Q, k, l=0):
    """(values, vectors as rows): the k largest, descending, then the l smallest, ascending."""
    values, vectors = np.linalg.eigh(Q)
    order = np.r_[np.arange(len(values))[::-1][:k], np.arange(l)]
    return values[order], vectors[:, order].T


def eigenpairs(values, V, converged=None):
    """The `Eigenpairs` of a refresh that came out as told; V as rows (k, N), or already a pytree."""
    pairs = len(values)
    return Eigenpairs(
        values=jnp.asarray(values, jnp.float32),
        vectors=V if isinstance(V, dict) else tree(V),
        residuals=jnp.zeros(pairs, jnp.float32),
        converged=jnp.ones(pairs, bool) if converged is None else jnp.asarray(converged),
        refreshes=jnp.int32(1),
        products=jnp.int32(0),
        failures=jnp.int32(0),
    )


@dataclasses.dataclass(frozen=True)
class DenseEigenpairs(CurvatureEstimator[Eigenpairs]):
    """What `Lanczos(k, l)` estimates, from the dense Hessian: exact, and a tenth of the compile time."""

    k: int
    l: int = 0

    def init(self, objective, params):
        pairs = self.k + self.l
        return Eigenpairs(
            values=jnp.zeros(pairs),
            vectors=jax.tree.map(lambda p: jnp.zeros((pairs, *p.shape)), params),
            residuals=jnp.full(pairs, jnp.inf),
            converged=jnp.zeros(pairs, bool),
            refreshes=jnp.int32(0),
            products=jnp.int32(0),
            failures=jnp.int32(0),
        )

    def update(self, curvature, objective, params, batch, key, *, grads=None):
        return curvature

    def refresh(self, curvature, objective, params, batch, key, damping=None):
        values, vectors = jnp.linalg.eigh(as_matrix(lambda v: hvp(objective, params, v, batch), params))
        order = np.r_[np.arange(len(values))[::-1][: self.k], np.arange(self.l)]
        unravel = ravel_pytree(params)[1]
        return dataclasses.replace(
            curvature,
            values=values[order],
            vectors=jax.vmap(unravel)(vectors[:, order].T),
            residuals=jnp.zeros(len(order)),
            converged=jnp.ones(len(order), bool),
            refreshes=curvature.refreshes + 1,
        )

    def partition_specs(self, curvature, param_specs, mesh):
        raise NotImplementedError


def gd(lr):
    return lambda g: -lr * g


def heavy_ball(lr, decay=0.9):
    m = 0.0

    def update(g):
        nonlocal m
        m = g + decay * m
        return -lr * m

    return update


def adam(lr, b1=0.9, b2=0.999, eps=1e-8):
    m, v, t = 0.0, 0.0, 0

    def update(g):
        nonlocal m, v, t
        m, v, t = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g, t + 1
        return -lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)

    return update


MOMENTA = {
    "none": lambda g1, vel, decay: g1,
    "heavy_ball": lambda g1, vel, decay: g1 + decay * vel,
    "ema": lambda g1, vel, decay: (1 - decay) * g1 + decay * vel,
    "nesterov": lambda g1, vel, decay: (1 + decay) * g1 + decay**2 * vel,
}


@dataclasses.dataclass
class Replay:
    """The paper's optimizer: `spectrum(step)` is (values, V) in the order of `extreme_eigenpairs`, or None before W."""

    base: object  # g2 -> u
    momentum: str
    decay: float = 0.9
    alpha: float = 0.1
    clip: float = 1.0
    k: int | None = None  # how many of the pairs are the largest; None: all

    def run(self, gradient, x, steps, spectrum):
        """The iterates x_1 ... x_steps, float64 (steps, N)."""
        vel, iterates = np.zeros_like(x), []
        for step in range(steps):
            values, V = spectrum(step) or (np.ones(1), np.zeros((1, x.size)))
            top = np.abs(values[: self.k])
            s = np.clip(top[0] / top[-1], 1.0, self.clip)
            g = gradient(x)
            g1 = V.T @ (V @ g)
            vel = MOMENTA[self.momentum](g1, vel, self.decay)
            newton = V.T @ ((V @ vel) / np.abs(values))
            u = self.base(g - g1)
            u = u - V.T @ (V @ u)
            x = x + s * u - self.alpha * newton
            iterates.append(x)
        return np.array(iterates)


def drive(tx, x, Q, curvatures, steps):
    """(iterates, last state) of an optax transformation on the quadratic in float32, given `curvatures(step)`."""
    params, Q = tree(x), jnp.asarray(Q, jnp.float32)
    state = tx.init(params)

    @jax.jit
    def step(params, state, curvature):
        updates, state = tx.update(jax.grad(loss)(params, Q), state, params, curvature=curvature)
        return jax.tree.map(jnp.add, params, updates), state

    iterates = []
    for i in range(steps):
        params, state = step(params, state, curvatures(i))
        iterates.append(params)
    return np.array([flat(p) for p in iterates]), state
