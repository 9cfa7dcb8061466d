"""Layer statistics the slow way: float64, written from the formulas, without any code of `curvtrain.curvature`.

A network is written out by hand, for one example, as `net(tape, p, x) -> outputs`. Wherever it multiplies rows a by a
layer's matrix M it asks the tape, which can add an offset to every product: the Jacobian of the outputs with respect to
the offsets, and the rows, are all there is to know of an example.

| symbol | shape | meaning |
|---|---|---|
| g, N, R | | copies of the matrix (groups, channels of a norm layer), examples, positions |
| a | (N, g, R, d_i) | rows, with the 1 of the bias |
| J | (N, T, C, g, R, d_o) | d outputs / d (a M), T positions of a sequence with C outputs each |
| c | (P, N, T, C) | cotangents: P of them, of which sum_p c c^T is the loss's Hessian, or P = 1 gradient |
| D | (P, N, g, d_i, d_o) | gradients of examples: sum_r a s^T with s = c J |
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np


class Tape:
    """Records rows by layer name; a layer that is used twice has two entries."""

    def __init__(self, offsets=None):
        self.offsets, self.rows, self.products = offsets, {}, {}

    def __call__(self, name, a, M):
        """a M for a (g, R, d_i) and M (g, d_i, d_o)."""
        y = a @ M
        uses = self.rows.setdefault(name, [])
        if self.offsets is not None:
            y = y + self.offsets[name][len(uses)]
        uses.append(a)
        self.products.setdefault(name, []).append(y)
        return y

    def dense(self, name, x, M):
        """x M for rows x (R, d_i) without the bias's 1, which is appended if M has a row for it."""
        if M.shape[0] == x.shape[-1] + 1:
            x = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1))], -1)
        return self(name, x[None], M[None])[0]

    def norm(self, name, x, p):
        """scale * x + bias for every channel of x (R, C), already normalised."""
        scale, bias = p.get("scale"), p.get("bias")
        rows = [v for v, there in ((x, scale), (jnp.ones_like(x), bias)) if there is not None]
        a = jnp.stack(rows, -1).transpose(1, 0, 2)  # (C, R, p)
        M = jnp.stack([v for v in (scale, bias) if v is not None], -1)[..., None]  # (C, p, 1)
        y = self(name, a, M)[..., 0].T
        return y if scale is not None else y + x


def matrix(p):
    """M of a kernel (d_i, d_o) and perhaps a bias."""
    return jnp.concatenate([p["kernel"], p["bias"][None]]) if "bias" in p else p["kernel"]


def float64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def jacobians(net, params, x):
    """(z (N, ...), {name: [a (N, g, R, d_i) for each use]}, {name: [J (N, Z, g, R, d_o) for each use]}), float64."""

    @jax.jit
    def run(p, x):
        def one(x):
            tape = Tape()
            net(tape, p, x)
            zeros = jax.tree.map(jnp.zeros_like, tape.products)

            def outputs(offsets):
                tape = Tape(offsets)
                z = net(tape, p, x)
                return z.ravel(), (z, tape.rows)

            J, (z, rows) = jax.jacrev(outputs, has_aux=True)(zeros)
            return z, rows, J

        return jax.vmap(one)(x)

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, run(float64(params), float64(x)))


# -- cotangents of the outputs -----------------------------------------------------------------------------------------


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def gradient(kind, z, t):
    """d l / d z."""
    if kind == "softmax":
        return softmax(z) - np.eye(z.shape[-1])[t]
    return (sigmoid(z) if kind == "sigmoid" else z) - t


def hessian(kind, z):
    """(..., C, C)."""
    eye = np.eye(z.shape[-1])
    if kind == "softmax":
        p = softmax(z)
        return p[..., None] * eye - p[..., :, None] * p[..., None, :]
    p = sigmoid(z)
    return (p * (1 - p) if kind == "sigmoid" else np.ones_like(z))[..., None] * eye


def cotangents(kind, z, t, w, fisher):
    """c (P, N, T, C) for outputs z (N, T, C), targets t (N, T) or (N, T, C) and weights w (N, T)."""
    if fisher == "exact":
        values, vectors = np.linalg.eigh(hessian(kind, z))
        columns = np.moveaxis(vectors * np.sqrt(np.maximum(values, 0))[..., None, :], -1, 0) * np.sqrt(w)[..., None]
        apart = np.eye(z.shape[1])[:, None, :, None]  # every position is an example of its own
        return (columns[:, None] * apart).reshape(-1, *z.shape)
    return (np.sqrt(w)[..., None] * gradient(kind, z, t))[None]


# -- statistics --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a layer: rows a (N, g, R, d_i), s (P, N, g, R, d_o), row weights w (N, R)."""

    a: np.ndarray
    s: np.ndarray
    w: np.ndarray

    @functools.cached_property
    def D(self):
        return np.einsum("ngri,pngro->pngio", self.a, self.s, optimize=True)

    @functools.cached_property
    def reduced(self):
        total = self.w.sum(1)
        mean = np.einsum("nr,ngri->ngi", self.w, self.a) / np.where(total > 0, total, 1)[:, None, None]
        return Use(mean[:, :, None], self.s.sum(3, keepdims=True), self.w.max(1, keepdims=True))


def uses(rows, J, cots, weights):
    """{name: [Use]}. Weights (N, T) belong to rows if there are T, else an example counts if any position does."""
    found = {}
    for name, all_rows in rows.items():
        found[name] = []
        for a, j in zip(all_rows, J[name], strict=True):
            n, _, r, _ = a.shape
            w = weights if weights.shape[1] == r else weights.max(1, keepdims=True)
            s = np.einsum("pnz,nzgro->pngro", cots.reshape(*cots.shape[:2], -1), j, optimize=True)
            found[name].append(Use(a, s, np.broadcast_to(w, (n, r))))
    return found


def statistics(layer_uses, QA=None, QG=None):
    """Sums over examples: A, rows, G (expand), the same of reduce, D2, S, unit, full; (g, ...) each."""
    expand = [(u.a, u.s, u.w) for u in layer_uses]
    reduce = [(u.reduced.a, u.reduced.s, u.reduced.w) for u in layer_uses]
    found = {}
    for prefix, parts in (("", expand), ("reduce_", reduce)):
        found[prefix + "A"] = sum(np.einsum("nr,ngri,ngrj->gij", w, a, a, optimize=True) for a, _, w in parts)
        found[prefix + "G"] = sum(np.einsum("pngri,pngrj->gij", s, s, optimize=True) for _, s, _ in parts)
        found[prefix + "rows"] = np.asarray(sum(w.sum() for _, _, w in parts))
    Ds = [u.D for u in layer_uses]
    found["D2"] = sum((D**2).sum((0, 1)) for D in Ds)
    found["unit"] = sum(np.einsum("pngio,pngjo->goij", D, D, optimize=True) for D in Ds)
    flat = [D.reshape(*D.shape[:3], -1) for D in Ds]
    found["full"] = sum(np.einsum("pngi,pngj->gij", D, D, optimize=True) for D in flat)
    if QA is not None:
        found["S"] = sum((np.einsum("gij,pngio,gok->pngjk", QA, D, QG, optimize=True) ** 2).sum((0, 1)) for D in Ds)
    return found


# -- curvature ---------------------------------------------------------------------------------------------------------


def pi(A, G):
    a, g = np.trace(A) / len(A), np.trace(G) / len(G)
    return np.sqrt(a / g) if a > 0 and g > 0 else 1.0


def factored_solve(A, G, M, damping):
    """(A + pi sqrt(damping) I)^-1 M (G + sqrt(damping) / pi I)^-1."""
    p, root = pi(A, G), np.sqrt(damping)
    left = np.linalg.solve(A + p * root * np.eye(len(A)), M)
    return np.linalg.solve(G + root / p * np.eye(len(G)), left.T).T
