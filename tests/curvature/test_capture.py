"""Statistics of layers against `kfac_reference`, and what should leave them unchanged: symbols there.

Parameters and statistics are float32; the bound is relative to the largest entry of the float64 reference.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kfac_reference as ref
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from curvtrain import losses
from curvtrain.curvature import register_layer
from curvtrain.curvature.capture import EmbedLayer, NormLayer, PlainParameter, Statistic, collect, cover
from curvtrain.curvature.capture import layers as known_layers
from curvtrain.curvature.capture.layers import MatrixLayer
from curvtrain.curvature.capture.statistics import (
    DiagonalStatistic,
    FullStatistic,
    KroneckerStatistic,
    UnitStatistic,
)
from curvtrain.objective import Objective

N, D, C = 5, 4, 3
TOLERANCE = 1e-6
LOSSES = {"softmax": losses.SoftmaxCrossEntropy, "squared": losses.SquaredError, "sigmoid": losses.SigmoidCrossEntropy}


def error(got, want, floor=0.0):
    """The largest difference, relative to the largest entry, or to `floor`."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    scale = max(np.abs(want).max(), floor)
    return np.abs(got - want).max() / scale if scale else np.abs(got).max()


def random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def randomised(params, seed=0):
    """The same tree with random entries: flax starts biases at zero and scales at one."""
    leaves, tree = jax.tree.flatten(params)
    return tree.unflatten([random(*a.shape, seed=seed + i).astype(a.dtype) / 2 for i, a in enumerate(leaves)])


@dataclasses.dataclass(frozen=True)
class Everything(Statistic):
    """All statistics in one backward pass: those of KroneckerStatistic under their names, others with a prefix."""

    scales: bool = True
    blocks: bool = True
    reduce: bool = True

    def parts(self, layer):
        found = [("", KroneckerStatistic("expand", scales=self.scales)), ("", DiagonalStatistic())]
        if self.blocks:
            found += [("unit_", UnitStatistic()), ("full_", FullStatistic())]
        if self.reduce and isinstance(layer, MatrixLayer):
            found += [("reduce_", KroneckerStatistic("reduce"))]
        return found

    def shapes(self, layer):
        return {p + name: shape for p, s in self.parts(layer) for name, shape in s.shapes(layer).items()}

    def given(self, layer):
        return KroneckerStatistic(scales=self.scales).given(layer)

    def __call__(self, call, saved, s, given):
        parts = self.parts(call.layer)
        return {p + name: v for p, part in parts for name, v in part(call, saved, s, given).items()}


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def run(objective, params, batch, key, coverage, statistic, fisher, given):
    return collect(objective, params, batch, key, coverage, statistic, fisher, given=given, who="test")


def orthogonal(coverage):
    """Some Q_A and Q_G for every matrix, shaped as `collect` wants them."""
    found = {}
    for layer in coverage.known:
        if isinstance(layer, MatrixLayer):
            of = lambda d, seed, n=layer.copies: np.linalg.qr(random(n, d, d, seed=seed))[0].astype(np.float32)
            QA, QG = of(layer.d_i, 1), of(layer.d_o, 2)
            lead = (*layer.stack, layer.groups)
            found[layer.name] = {"QA": QA.reshape(*lead, *QA.shape[1:]), "QG": QG.reshape(*lead, *QG.shape[1:])}
    return found


def statistics(objective, params, batch, fisher="empirical", statistic=None, key=None, coverage=None):
    statistic = Everything() if statistic is None else statistic
    coverage = cover(objective, params, "test") if coverage is None else coverage
    given = orthogonal(coverage) if getattr(statistic, "scales", False) else {}
    return run(objective, params, batch, key, coverage, statistic, fisher, given)


# -- cases: one layer each ---------------------------------------------------------------------------------------------


class One(nnx.Module):
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)


class Swapped(One):
    """The layer sees its examples along its second axis."""

    def __call__(self, x):
        return jnp.swapaxes(self.layer(jnp.swapaxes(x, 0, 1)), 0, 1)


def projected(y):
    """Outputs (N, C) of a layer's whole output for each example: a fixed random projection."""
    y = jnp.tanh(y.reshape(y.shape[0], -1))
    return y @ random(y.shape[1], C, seed=7).astype(y.dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, its input x (N, ...), and what it computes of one example, by hand."""

    make: object
    x: object
    by_hand: object  # (tape, params of the layer, x (...)) -> y
    model: type[One] = One


CASES: dict[str, Case] = {}


def sizes(x, window, strides, padding, dilation):
    """(padding, positions) for each axis, from the definition of each kind of padding."""
    found = []
    for n, k, stride, d in zip(x.shape[:-1], window, strides, dilation, strict=True):
        reach = (k - 1) * d + 1
        if padding == "SAME":
            total = max((-(-n // stride) - 1) * stride + reach - n, 0)
            pad = (total // 2, total - total // 2)
        elif padding in ("CIRCULAR", "REFLECT"):
            pad = ((reach - 1) // 2, reach // 2)
        else:
            pad = {"VALID": (0, 0), "CAUSAL": (reach - 1, 0)}.get(padding, padding)
        found.append((pad, (n + sum(pad) - reach) // stride + 1))
    return found


def conv(rank, c_in, c_out, window, *, strides=1, padding="SAME", dilation=1, groups=1, spread=1, bias=True, side=5):
    """A convolution, and the same with its patches written out: one index for every output position and kernel entry."""
    many = lambda v: v if isinstance(v, tuple) else (v,) * rank
    strides, dilation = many(strides), many(dilation)
    shape = tuple(side - i for i in range(rank))

    def by_hand(tape, p, x):
        if spread > 1:  # input dilation: zeros between the entries
            wide = jnp.zeros((*(spread * (n - 1) + 1 for n in x.shape[:-1]), c_in), x.dtype)
            x = wide.at[tuple(slice(None, None, spread) for _ in range(rank))].set(x)
        pads, positions = zip(*sizes(x, window, strides, padding, dilation), strict=True)
        mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}.get(padding if isinstance(padding, str) else "", "constant")
        x = jnp.pad(x, (*pads, (0, 0)), mode=mode)
        at = lambda o, k: [o[i] * strides[i] + k[i] * dilation[i] for i in range(rank)]
        index = np.array([[at(o, k) for k in np.ndindex(*window)] for o in np.ndindex(*positions)])
        patches = x[tuple(index[..., i] for i in range(rank))]  # (R, k, c_in)
        a, M, i, o = [], [], c_in // groups, c_out // groups
        for j in range(groups):
            a.append(patches[..., j * i : (j + 1) * i].reshape(len(index), -1))
            M.append(p["kernel"][..., j * o : (j + 1) * o].reshape(-1, o))
            if bias:
                a[-1] = jnp.concatenate([a[-1], jnp.ones((len(index), 1))], -1)
                M[-1] = jnp.concatenate([M[-1], p["bias"][None, j * o : (j + 1) * o]])
        y = tape("layer", jnp.stack(a), jnp.stack(M))  # (groups, R, o)
        return jnp.moveaxis(y, 0, 1).reshape(*positions, c_out)

    given = padding if isinstance(padding, str) else (padding,) * rank
    make = lambda rngs: nnx.Conv(
        c_in,
        c_out,
        window,
        strides=strides,
        padding=given,
        input_dilation=spread,
        kernel_dilation=dilation,
        feature_group_count=groups,
        use_bias=bias,
        rngs=rngs,
    )
    return Case(make, random(N, *shape, c_in), by_hand)


CASES |= {
    "conv SAME": conv(2, 2, 3, (3, 2)),
    "conv SAME, strides": conv(2, 2, 3, (2, 3), strides=(2, 1)),
    "conv VALID, no bias": conv(2, 3, 2, (2, 2), padding="VALID", bias=False),
    "conv VALID, strides, dilation": conv(2, 2, 2, (2, 2), padding="VALID", strides=2, dilation=(1, 2)),
    "conv pads": conv(2, 2, 2, (3, 2), padding=(2, 1)),
    "conv groups": conv(2, 4, 6, (2, 2), groups=2),
    "conv depthwise": conv(2, 3, 6, (3, 3), groups=3, side=4),
    "conv input dilation": conv(2, 2, 2, (2, 3), spread=2, padding=(1, 0), side=4),
    "conv 1-D dilated": conv(1, 3, 4, (3,), dilation=2, side=7),
    "conv CAUSAL": conv(1, 3, 4, (3,), padding="CAUSAL", dilation=2, side=6),
    "conv CIRCULAR": conv(2, 2, 3, (3, 2), padding="CIRCULAR"),
    "conv REFLECT": conv(1, 2, 3, (4,), padding="REFLECT", side=6),
    "conv 3-D": conv(3, 2, 2, (2, 2, 1), strides=(1, 2, 1), side=4),
}


def by_einsum(equation, groups="", bias=None):
    """A layer y = einsum(equation, x, W) of one example: labels of x that W lacks are positions, W's own are outputs."""
    x_labels, rest = equation.split(",")
    w_labels, y_labels = rest.split("->")
    ins = [label for label in w_labels if label in x_labels and label not in y_labels]
    outs = [label for label in w_labels if label not in x_labels]
    positions = [label for label in x_labels if label not in w_labels]
    order = lambda labels: "".join(labels)

    def by_hand(tape, p, x):
        W = p["kernel"]
        size = dict(zip(x_labels, x.shape, strict=True)) | dict(zip(w_labels, W.shape, strict=True))
        of = lambda labels: int(np.prod([size[label] for label in labels]))
        a = jnp.einsum(f"{x_labels}->{groups}{order(positions)}{order(ins)}", x)
        a = a.reshape(of(groups), of(positions), of(ins))
        M = jnp.einsum(f"{w_labels}->{groups}{order(ins)}{order(outs)}", W).reshape(of(groups), of(ins), of(outs))
        if "bias" in p:
            a = jnp.concatenate([a, jnp.ones((*a.shape[:2], 1))], -1)
            M = jnp.concatenate([M, p["bias"].reshape(of(groups), 1, of(outs))], 1)
        y = tape("layer", a, M).reshape([size[label] for label in (*groups, *positions, *outs)])
        return jnp.einsum(f"{groups}{order(positions)}{order(outs)}->{y_labels}", y)

    return by_hand


def einsum(equation, x, kernel, by_hand, bias=None):
    return Case(lambda rngs: nnx.Einsum(equation, kernel, bias, rngs=rngs), random(N, *x), by_hand)


CASES |= {
    "linear": Case(lambda rngs: nnx.Linear(D, 3, rngs=rngs), random(N, D), by_einsum("i,io->o")),
    "linear, positions": Case(
        lambda rngs: nnx.Linear(D, 3, use_bias=False, rngs=rngs), random(N, 2, 3, D), by_einsum("rti,io->rto")
    ),
    "general, two axes": Case(
        lambda rngs: nnx.LinearGeneral((2, 3), (3, 2), axis=(-2, -1), rngs=rngs),
        random(N, 4, 2, 3),
        by_einsum("tij,ijop->top"),
    ),
    "general, axes out of order": Case(
        lambda rngs: nnx.LinearGeneral((3, 3), 4, axis=(-1, 1), rngs=rngs),  # flax sorts them
        random(N, 3, 4, 3),
        by_einsum("jti,jio->to"),
    ),
    "general, batch axis": Case(
        lambda rngs: nnx.LinearGeneral(D, 2, batch_axis={0: 3}, rngs=rngs),
        random(N, 3, 2, D),
        by_einsum("hti,hio->hto", "h"),
        Swapped,
    ),
    "einsum": einsum("nti,iho->ntho", (3, D), (D, 2, 3), by_einsum("ti,iho->tho"), bias=(2, 3)),
    "einsum, shared label": einsum("nthi,hio->ntho", (3, 2, D), (2, D, 3), by_einsum("thi,hio->tho", "h"), bias=(2, 3)),
    "einsum, permuted kernel": einsum("ntij,ojih->ntho", (3, 2, D), (3, D, 2, 2), by_einsum("tij,ojih->tho")),
    "einsum, moved positions": einsum("nrti,iho->nhtro", (3, 2, D), (D, 2, 3), by_einsum("rti,iho->htro")),
    "einsum, ellipsis": einsum("...i,io->...o", (3, 2, D), (D, 3), by_einsum("rti,io->rto"), bias=(3,)),
    "einsum, groups without inputs": einsum(
        "nthi,hi->nthi", (3, 2, D), (2, D), by_einsum("thi,hi->thi", "hi"), bias=(2, D)
    ),
}


def embed(tape, p, x):
    M = p["embedding"]
    return tape("layer", jnp.eye(len(M))[x][None], M[None])[0]


CASES["embed"] = Case(
    lambda rngs: nnx.Embed(6, D, rngs=rngs), np.random.default_rng(0).integers(0, 5, (N, 4)).astype(np.int32), embed
)

NORM_X = random(N, 3, 2, D) * np.float32(2) + np.float32(0.5)
RUNNING = {"mean": random(D, seed=3), "var": np.abs(random(D, seed=4)) + 1}


def normalised(mean, var, epsilon=1e-6):
    """A norm layer of one example from functions of it."""

    def by_hand(tape, p, x):
        y = (x - mean(x)) / jnp.sqrt(var(x) + epsilon)
        return tape.norm("layer", y.reshape(-1, D), p).reshape(x.shape)

    return by_hand


def grouped(x, function):
    """A function of every group of two channels over all positions, as an array like x."""
    groups = [x[..., i : i + 2] for i in range(0, D, 2)]
    return jnp.concatenate([jnp.broadcast_to(function(g), g.shape) for g in groups], -1)


def batch_norm(rngs, **options):
    layer = nnx.BatchNorm(D, rngs=rngs, **options)
    layer.mean[...], layer.var[...] = RUNNING["mean"], RUNNING["var"]
    return layer


layer_normed = normalised(lambda x: x.mean(-1, keepdims=True), lambda x: x.var(-1, keepdims=True))
whole = np.asarray(NORM_X, np.float64)
CASES |= {
    "LayerNorm": Case(lambda rngs: nnx.LayerNorm(D, rngs=rngs), NORM_X, layer_normed),
    "LayerNorm, bias alone": Case(lambda rngs: nnx.LayerNorm(D, use_scale=False, rngs=rngs), NORM_X, layer_normed),
    "RMSNorm": Case(
        lambda rngs: nnx.RMSNorm(D, rngs=rngs),
        NORM_X,
        normalised(lambda x: 0.0, lambda x: (x**2).mean(-1, keepdims=True)),
    ),
    "GroupNorm": Case(
        lambda rngs: nnx.GroupNorm(D, num_groups=2, rngs=rngs),
        NORM_X,
        normalised(lambda x: grouped(x, jnp.mean), lambda x: grouped(x, jnp.var)),
    ),
    "BatchNorm, running averages": Case(
        functools.partial(batch_norm, use_running_average=True),
        NORM_X,
        normalised(lambda x: RUNNING["mean"].astype(np.float64), lambda x: RUNNING["var"].astype(np.float64), 1e-5),
    ),
    "BatchNorm, the batch's": Case(
        batch_norm, NORM_X, normalised(lambda x: whole.mean((0, 1, 2)), lambda x: whole.var((0, 1, 2)), 1e-5)
    ),
}


def heads(tape, name, p, x):
    """A projection (T, D) -> (T, heads, size)."""
    D, h, k = p["kernel"].shape
    M = jnp.concatenate([p["kernel"].reshape(D, h * k), p["bias"].reshape(1, h * k)])
    return tape.dense(name, x, M).reshape(len(x), h, k)


def attention(tape, p, x):
    q, k, v = (heads(tape, f"layer/{name}", p[name], x) for name in ("query", "key", "value"))
    score = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    e = jnp.exp(score)
    mixed = jnp.einsum("hqk,khd->qhd", e / e.sum(-1, keepdims=True), v)
    M = jnp.concatenate([p["out"]["kernel"].reshape(-1, D), p["out"]["bias"][None]])
    return tape.dense("layer/out", mixed.reshape(len(x), -1), M)


CASES["attention"] = Case(
    lambda rngs: nnx.MultiHeadAttention(2, D, 6, decode=False, rngs=rngs), random(N, 3, D), attention
)


@functools.cache
def one_layer(name):
    """(objective, params, batch, net) of a case."""
    case = CASES[name]
    rngs = nnx.Rngs(0)
    model = case.model(case.make(rngs))
    loss = losses.SquaredError("t")
    objective, params = Objective.from_model(model, lambda model, batch: projected(model(batch["x"])), loss)
    params = randomised(params)
    if isinstance(case.make(rngs), nnx.LayerNorm | nnx.RMSNorm | nnx.GroupNorm | nnx.BatchNorm) and (
        "scale" in params["layer"]
    ):
        params["layer"]["scale"][1] = 0.0  # a channel that is switched off, as residual branches start
    net = lambda tape, p, x: projected(case.by_hand(tape, p["layer"], x)[None])
    return objective, params, {"x": case.x, "t": random(N, C, seed=1)}, net


def reference(net, params, batch, kind="squared", fisher="empirical", targets=None, drop=()):
    """({name: [Use]}, W, z (N, T, C)) of a batch; weights and mask from it."""
    z, rows, J = ref.jacobians(net, params, {n: v for n, v in batch.items() if n == "x"}["x"])
    w = np.ones(z.shape[:2])
    for name in ("mask", "weights"):
        if name in batch:
            entry = np.asarray(batch[name], np.float64)
            w = w * entry.reshape(*entry.shape, *(1,) * (2 - entry.ndim))
    t = batch["t"] if targets is None else targets
    t = np.asarray(t).reshape(z.shape[:2] if kind == "softmax" else z.shape)
    return ref.uses(rows, J, ref.cotangents(kind, z, t, w, fisher), w), w.sum(), z


def worst(coverage, found, all_uses, given):
    """{(layer, statistic): error} of everything that was collected."""
    errors = {}
    for layer in coverage.known:
        got, mine = dict(found[layer.name]), all_uses[layer.name]
        Q = given.get(layer.name, {})
        want = ref.statistics(mine, Q.get("QA"), Q.get("QG"))
        if isinstance(layer, MatrixLayer):
            names = {"unit": "unit_F", "full": "full_F"}
            wanted = {names.get(n, n): v for n, v in want.items()}
            wanted |= {n: wanted[n] for n in ("A", "G")}
        elif isinstance(layer, EmbedLayer):
            wanted = {"counts": np.einsum("gii->i", want["A"]), "G": want["G"][0], "rows": want["rows"]}
            wanted |= {"D2": want["D2"][0], "unit_F": want["unit"], "full_F": want["full"]}
        else:
            assert isinstance(layer, NormLayer)
            flat = [u.D[..., 0].swapaxes(-1, -2).reshape(*u.D.shape[:2], -1) for u in mine]  # (P, N, p C)
            F = np.moveaxis(want["unit"][:, 0], 0, -1)
            full = sum(np.einsum("pni,pnj->ij", f, f) for f in flat)[None]
            wanted = {"F": F, "unit_F": F, "D2": want["D2"][..., 0].T, "full_F": full}
        for name in wanted.keys() & got.keys():
            whole = wanted.get(name.removeprefix("reduce_"), 0.0)  # sums over positions may cancel: a key's bias does
            errors[layer.name, name] = error(got[name], wanted[name], np.abs(whole).max())
        assert got.keys() - wanted.keys() <= {"A_head", "G_head", "head_rows"}, (got.keys(), wanted.keys())
    return errors


def check(objective, params, batch, net, kind="squared", fisher="empirical", statistic=None, key=None, tolerance=TOLERANCE):
    coverage = cover(objective, params, "test")
    found, W = statistics(objective, params, batch, fisher, statistic, key)
    targets = None
    if fisher == "sampled":
        z = objective.predict(params, batch, key)
        sampled = objective.loss_of_outputs.sample_targets(z, batch, jax.random.fold_in(key, 1))
        targets = np.asarray(sampled["t"])
    all_uses, weight, _ = reference(net, params, batch, kind, fisher, targets)
    assert all_uses.keys() == {layer.name for layer in coverage.known}
    errors = worst(coverage, found, all_uses, orthogonal(coverage))
    assert max(errors.values()) < tolerance, errors
    np.testing.assert_allclose(W, weight, rtol=1e-6)
    return errors


@pytest.mark.parametrize("name", CASES)
def test_layers(name):
    objective, params, batch, net = one_layer(name)
    check(objective, params, batch, net)


@pytest.mark.parametrize("name", CASES)
def test_matrices_are_those_that_multiply_the_rows(name):
    """y = a M with the rows of the reference, hence M's layout; and the way back."""
    objective, params, batch, net = one_layer(name)
    coverage = cover(objective, params, "test")
    matrices = coverage.matrices(params)
    jax.tree.map(np.testing.assert_array_equal, coverage.vector(matrices), params)
    tape = ref.Tape()
    with jax.enable_x64(True):
        net(tape, ref.float64(params), ref.float64(batch["x"])[0])
        for layer in coverage.known:
            a, y = (np.asarray(v[layer.name][0]) for v in (tape.rows, tape.products))
            M = np.asarray(matrices[layer.name], np.float64)
            if isinstance(layer, NormLayer):
                M = M[0].T[..., None]
            np.testing.assert_allclose(a @ M, y, atol=1e-12)
