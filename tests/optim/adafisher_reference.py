"""AdaFisher in NumPy, float64, one layer after the other: its networks, its factors and its steps.

Layers keep their raw input h and the cotangent s of their output, of the *sum* of the losses; images are
(N, rows, columns, channels). Written from the formulas, of the paper and of what its code does; knows nothing of JAX.
"""

import numpy as np


class Linear:
    """y = h W + b."""

    def __init__(self, rng, ins, outs):
        self.theta = {"kernel": rng.normal(size=(ins, outs)) / np.sqrt(ins), "bias": 0.1 * rng.normal(size=outs)}

    def forward(self, h):
        self.h = h
        return h @ self.theta["kernel"] + self.theta["bias"]

    def backward(self, s):
        self.s = s
        a, rows = self.rows()
        self.grad = self.like(a.T @ rows)
        return s @ self.theta["kernel"].T

    def rows(self):
        """(rows with the homogeneous 1, cotangents), one for each position."""
        h, s = (z.reshape(-1, z.shape[-1]) for z in (self.h, self.s))
        return np.concatenate([h, np.ones((len(h), 1))], 1), s

    inputs = 1  # what the released code divides H by, besides the rows

    def averages(self, N):
        """What the repaired method averages: the diagonals of the factors."""
        a, s = self.rows()
        return {"A": (a**2).mean(0), "G": (s**2).sum(0) / N}

    def diagonal(self, means):
        return self.like(np.outer(means["A"], means["G"]))

    def raw(self, N):
        """The released code's H and S."""
        a, s = self.rows()
        return {"H": (a**2).mean(0) / self.inputs, "S": ((s / N) ** 2).mean(0)}

    def released(self, c):
        return self.like(np.outer(c["H"], c["S"]))

    def like(self, M):
        """A matrix with the bias as its last row, as kernel and bias."""
        return {"kernel": M[:-1].reshape(self.theta["kernel"].shape), "bias": M[-1]}


class Conv(Linear):
    """A convolution with windows of 2 x 2, without padding, with groups of channels."""

    def __init__(self, rng, ins, outs, groups=1):
        kernel = rng.normal(size=(2, 2, ins // groups, outs)) / np.sqrt(4 * ins)
        self.theta, self.groups = {"kernel": kernel, "bias": 0.1 * rng.normal(size=outs)}, groups
        self.inputs = 4 * ins // groups

    def patches(self, h):
        """(groups, N, rows, columns, 4 channels of a group)."""
        r, c = h.shape[1] - 1, h.shape[2] - 1
        split = h.reshape(*h.shape[:3], self.groups, -1)
        windows = [split[:, i : i + r, j : j + c] for i in (0, 1) for j in (0, 1)]
        return np.moveaxis(np.concatenate(windows, -1), 3, 0)

    def matrices(self):
        """The kernel (groups, inputs, outputs of a group)."""
        return np.moveaxis(self.theta["kernel"].reshape(self.inputs, self.groups, -1), 1, 0)

    def forward(self, h):
        self.h, self.a = h, self.patches(h)
        y = np.einsum("gnrci,gio->nrcgo", self.a, self.matrices())
        return y.reshape(*y.shape[:3], -1) + self.theta["bias"]

    def backward(self, s):
        self.s = s
        split = s.reshape(*s.shape[:3], self.groups, -1)
        kernel = np.einsum("gnrci,nrcgo->igo", self.a, split).reshape(self.theta["kernel"].shape)
        self.grad = {"kernel": kernel, "bias": s.sum((0, 1, 2))}
        back = np.einsum("nrcgo,gio->nrcgi", split, self.matrices())
        r, c, size = s.shape[1], s.shape[2], self.inputs // 4
        dh = np.zeros((*self.h.shape[:3], self.groups, size))
        for k, (i, j) in enumerate((i, j) for i in (0, 1) for j in (0, 1)):
            dh[:, i : i + r, j : j + c] += back[..., k * size : (k + 1) * size]
        return dh.reshape(self.h.shape)

    def group_rows(self, g):
        a = self.a[g].reshape(-1, self.inputs)
        s = self.s.reshape(-1, self.groups, self.s.shape[-1] // self.groups)[:, g]
        return np.concatenate([a, np.ones((len(a), 1))], 1), s

    def averages(self, N):
        all_rows = [self.group_rows(g) for g in range(self.groups)]
        return {
            "A": np.stack([(a**2).mean(0) for a, _ in all_rows]),
            "G": np.stack([(s**2).sum(0) / N for _, s in all_rows]),
        }

    def diagonal(self, means):
        return self.like(np.stack([np.outer(a, g) for a, g in zip(means["A"], means["G"], strict=True)]))

    def raw(self, N):
        all_rows = [self.group_rows(g) for g in range(self.groups)]
        positions = len(all_rows[0][0])
        return {
            "H": sum((a**2).sum(0) for a, _ in all_rows) / positions / self.inputs,
            "S": np.concatenate([((s / N) ** 2).mean(0) for _, s in all_rows]),
        }

    def released(self, c):
        S = c["S"].reshape(self.groups, -1)
        return self.like(np.stack([np.outer(c["H"], s) for s in S]))

    def like(self, M):
        kernel = np.moveaxis(M[:, :-1], 0, 1).reshape(self.theta["kernel"].shape)
        return {"kernel": kernel, "bias": M[:, -1].reshape(-1)}


class Norm:
    """scale * x^ + bias, with x^ normalised over `axes`."""

    def __init__(self, rng, channels, axes, eps):
        self.theta = {"scale": 1 + 0.1 * rng.normal(size=channels), "bias": 0.1 * rng.normal(size=channels)}
        self.axes, self.eps = axes, eps

    def forward(self, h):
        self.h = h
        self.root = np.sqrt(h.var(self.axes, keepdims=True) + self.eps)
        self.x = (h - h.mean(self.axes, keepdims=True)) / self.root
        return self.theta["scale"] * self.x + self.theta["bias"]

    def backward(self, s):
        self.s, rest = s, tuple(range(s.ndim - 1))
        self.grad = {"scale": (s * self.x).sum(rest), "bias": s.sum(rest)}
        d, mean = s * self.theta["scale"], lambda z: z.mean(self.axes, keepdims=True)
        return (d - mean(d) - self.x * mean(d * self.x)) / self.root

    def averages(self, N):
        by_example = lambda z: z.reshape(N, -1, z.shape[-1]).sum(1)
        return {
            "scale": (by_example(self.s * self.x) ** 2).mean(0),
            "bias": (by_example(self.s) ** 2).mean(0),
        }

    def diagonal(self, means):
        return means

    def raw(self, N):
        u, B = self.sums(), len(self.h)
        S = (self.s / N).sum(tuple(range(self.s.ndim - 1))) ** 2 / B
        return {"H": np.array([(u**2).sum(), u.size]) / B**2, "S": S}

    def released(self, c):
        return {"scale": c["H"][0] * c["S"], "bias": c["H"][1] * c["S"]}


class BatchNorm(Norm):
    """Over examples and positions."""

    def __init__(self, rng, channels):
        super().__init__(rng, channels, (0, 1, 2), 1e-5)

    def sums(self):
        return self.h.sum((0, 1, 2)) / (self.h.shape[1] * self.h.shape[2]) ** 2


class LayerNorm(Norm):
    """Over channels."""

    def __init__(self, rng, channels):
        super().__init__(rng, channels, (-1,), 1e-6)

    def sums(self):
        others = [axis for axis in range(self.h.ndim) if axis != 1]
        return self.h.sum(tuple(others)) / np.prod([self.h.shape[axis] for axis in others[1:]]) ** 2


class Tanh:
    """Without parameters."""

    def forward(self, h):
        self.y = np.tanh(h)
        return self.y

    def backward(self, s):
        return s * (1 - self.y**2)


class Flatten:
    """Without parameters."""

    def forward(self, h):
        self.shape = h.shape
        return h.reshape(len(h), -1)

    def backward(self, s):
        return s.reshape(self.shape)


def gradients(net, x, y):
    """Leaves h, s and the gradient of the summed losses 1/2 |f(x) - y|^2 in every layer."""
    h = x
    for layer in net:
        h = layer.forward(h)
    s = h - y
    for layer in reversed(net):
        s = layer.backward(s)


def scaled(x):
    return (x - x.min()) / (x.max() - x.min() + 1e-6)


def train(net, batches, every, *, faithful, rate, kappa=0.0, coupled=True, b1=0.9, tau=0.1, p=1.0, cap=None, ema=0.95):
    """Moves the parameters of a network over the batches; the released method with gamma = 0.8 and Lambda = 1e-3.

    Returns the cosines of the angles between each update, without its decay, and the momentum.
    """
    layers = [layer for layer in net if hasattr(layer, "theta")]
    m = [{k: np.zeros_like(v) for k, v in layer.theta.items()} for layer in layers]
    means, weight, cosines = [None] * len(layers), 0.0, []
    for t, (x, y) in enumerate(batches):
        N = len(x)
        gradients(net, x, y)
        if t % every == 0:
            weight = ema * weight + N
            for i, layer in enumerate(layers):
                if faithful:
                    raw = layer.raw(N)
                    old = {k: np.ones_like(v) for k, v in raw.items()} if means[i] is None else means[i]
                    means[i] = {k: 0.1 * 0.8 * old[k] + 0.01 * 0.8 * scaled(raw[k]) for k in raw}
                else:
                    new = layer.averages(N)
                    old = {k: 0 * v for k, v in new.items()} if means[i] is None else means[i]
                    means[i] = {k: old[k] + N / weight * (new[k] - old[k]) for k in new}
        updates, momenta = [], []
        for i, layer in enumerate(layers):
            F = layer.released(means[i]) if faithful else layer.diagonal(means[i])
            if not faithful:
                F = damped(layer, F, tau, cap, rate, p)
            for k, theta in layer.theta.items():
                g = layer.grad[k] / N + (kappa * theta if coupled else 0)
                m[i][k] = b1 * m[i][k] + (1 - b1) * g
                D = F[k] + 1e-3 if faithful else F[k] ** p
                u = m[i][k] / (1 - b1 ** (t + 1)) / D
                updates.append(u.ravel()), momenta.append(m[i][k].ravel())
                layer.theta[k] = theta - rate * (u + (0 if coupled else kappa * theta))
        u, v = np.concatenate(updates), np.concatenate(momenta)
        cosines.append(u @ v / np.sqrt((u @ u) * (v @ v)))
    return cosines


def damped(layer, F, tau, cap, rate, p):
    """F + lambda_l; of a grouped convolution each group has a lambda_l of its own."""
    floor = 0.0 if cap is None else (rate / cap) ** (1 / p)
    groups = getattr(layer, "groups", 1)
    names = list(F)
    split = lambda a: np.moveaxis(a.reshape(*a.shape[:-1], groups, -1), -2, 0).reshape(groups, -1)
    entries = np.concatenate([split(F[k]) for k in names], axis=1) if groups > 1 else None
    if groups == 1:
        entries = np.concatenate([F[k].ravel() for k in names])[None]
    damping = np.maximum(tau * entries.mean(1), floor)  # (groups,)
    each = lambda a: np.repeat(damping, a.shape[-1] // groups) if groups > 1 else damping
    return {k: F[k] + each(F[k]) for k in names}
