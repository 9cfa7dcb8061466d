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
from curvtrain._keys import Purpose, fold
from curvtrain.curvature import KFAC, DiagonalFisher, FullBlock, KroneckerDiagonal, UnitWise, register_layer
from curvtrain.curvature.capture import (
    EmbedLayer,
    Explicit,
    Layer,
    LayerMeasure,
    NormLayer,
    PlainParameter,
    Statistic,
    UnitBlocks,
    cover,
)
from curvtrain.curvature.capture import layers as known_layers
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

    needs = ("block",)

    def parts(self, layer):
        found = [("", KroneckerStatistic("expand", scales=self.scales)), ("", DiagonalStatistic())]
        if self.blocks:
            found += [("unit_", UnitStatistic()), ("full_", FullStatistic())]
        if self.reduce and layer.block().own is None:
            found += [("reduce_", KroneckerStatistic("reduce"))]
        return found

    def shapes(self, layer):
        return {p + name: shape for p, s in self.parts(layer) for name, shape in s.shapes(layer).items()}

    def given(self, layer):
        return KroneckerStatistic(scales=self.scales).given(layer)

    def __call__(self, layer, backward):
        return {p + name: v for p, part in self.parts(layer) for name, v in part(layer, backward).items()}


def collect(objective, params, batch, key, coverage, statistic, fisher, *, given=None, who="test"):
    """(sums of a statistic over a batch, W)."""
    measure = LayerMeasure.of(objective, params, batch, key, coverage, statistic, fisher, given=given, who=who)
    return objective.measure(params, batch, key, measure)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def run(objective, params, batch, key, coverage, statistic, fisher, given):
    return collect(objective, params, batch, key, coverage, statistic, fisher, given=given, who="test")


def orthogonal(coverage):
    """Some Q_A and Q_G for every matrix, shaped as `collect` wants them."""
    found = {}
    for layer in coverage.known:
        if layer.block().own is None:
            of = lambda d, seed, n=layer.copies: np.linalg.qr(random(n, d, d, seed=seed))[0].astype(np.float32)
            QA, QG = of(layer.d_i, 1), of(layer.d_o, 2)
            lead = (*layer.scan_axes, layer.groups)
            found[layer.name] = {"QA": QA.reshape(*lead, *QA.shape[1:]), "QG": QG.reshape(*lead, *QG.shape[1:])}
    return found


def trace(objective, params, batch, coverage, fisher="exact"):
    """What `collect` raises, without computing anything."""
    of = lambda params, batch: collect(
        objective, params, batch, None, coverage, KroneckerStatistic(), fisher, who="KFAC"
    )
    return jax.eval_shape(of, params, batch)


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
    """A convolution, and the same with its patches written out: an index for every output position and kernel entry."""
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


def by_einsum(equation, groups=""):
    """einsum(equation, x, W) of one example: labels of x that W lacks are positions, those of W alone are outputs."""
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


def reference(net, params, batch, kind="squared", fisher="empirical", targets=None):
    """({name: [Use]}, W, z (N, T, C)) of a batch; weights and mask from it."""
    z, rows, J = ref.jacobians(net, params, batch["x"])
    w = np.ones(z.shape[:2])
    for name in ("mask", "weights"):
        if name in batch:
            w = w * np.asarray(batch[name], np.float64).reshape(len(z), -1)
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
        if layer.block().own is None:
            names = {"unit": "unit_F", "full": "full_F"}
            wanted = {names.get(n, n): v for n, v in want.items()}
            wanted |= {n: wanted[n] for n in ("A", "G")}
        elif isinstance(layer, EmbedLayer):
            wanted = {"counts": np.einsum("gii->gi", want["A"]), "G": want["G"], "rows": want["rows"]}
            wanted |= {"D2": want["D2"], "unit_F": want["unit"], "full_F": want["full"]}
        else:
            assert isinstance(layer, NormLayer)
            flat = [u.D[..., 0].swapaxes(-1, -2).reshape(*u.D.shape[:2], -1) for u in mine]  # (P, N, p C)
            F = want["unit"][:, 0][None]
            full = sum(np.einsum("pni,pnj->ij", f, f) for f in flat)[None]
            wanted = {"F": F, "unit_F": F, "D2": want["D2"][..., 0].T[None], "full_F": full}
        for name in {"rows", "reduce_rows"} & wanted.keys():
            wanted[name] = np.broadcast_to(wanted[name], got.get(name, wanted[name]).shape)
        for name in wanted.keys() & got.keys():
            whole = wanted.get(name.removeprefix("reduce_"), 0.0)  # sums over positions may cancel: a key's bias does
            errors[layer.name, name] = error(got[name], wanted[name], np.abs(whole).max())
        assert got.keys() - wanted.keys() <= {"A_head", "G_head", "head_rows"}, (got.keys(), wanted.keys())
    return errors


def check(objective, params, batch, net, kind="squared", fisher="empirical", statistic=None, key=None, compare=worst):
    coverage = cover(objective, params, "test")
    found, W = statistics(objective, params, batch, fisher, statistic, key)
    targets = None
    if fisher == "sampled":
        z = objective.predict(params, batch, key)
        sampled = objective.loss_of_outputs.sample_targets(z, batch, fold(key, Purpose.TARGETS))
        targets = np.asarray(sampled["t"])
    all_uses, weight, _ = reference(net, params, batch, kind, fisher, targets)
    errors = compare(coverage, found, all_uses, orthogonal(coverage))
    assert {name for name, _ in errors} == {layer.name for layer in coverage.known}
    assert max(errors.values()) < TOLERANCE, errors
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


def test_a_wrong_order_of_patches_would_be_noticed(monkeypatch):
    objective, params, batch, net = one_layer("conv SAME")
    coverage = cover(objective, params, "test")
    right = known_layers.ConvLayer.rows

    def channel_major(self, x, examples):
        a = right(self, x, examples)
        k = int(np.prod(self.window))
        return a.reshape(*a.shape[:-1], k, -1).swapaxes(-1, -2).reshape(a.shape)

    monkeypatch.setattr(known_layers.ConvLayer, "rows", channel_major)
    found, _ = collect(
        objective, params, batch, None, coverage, KroneckerStatistic(diagonal=False), "empirical", who="test"
    )
    all_uses, _, _ = reference(net, params, batch)
    errors = worst(coverage, found, all_uses, {})
    assert errors["layer", "A"] > 0.1
    assert errors["layer", "G"] < TOLERANCE


# -- whole models ------------------------------------------------------------------------------------------------------


class MLP(nnx.Module):
    """Layers over positions (mixed by a running mean), and one over a mean of them."""

    def __init__(self, rngs, **options):
        self.a = nnx.Linear(D, 4, rngs=rngs, **options)
        self.b = nnx.Linear(4, C, rngs=rngs, use_bias=False, **options)
        self.pooled = nnx.Linear(D, C, rngs=rngs, **options)

    def __call__(self, x):
        z = self.b(mixed(nnx.tanh(self.a(x))))
        return z + self.pooled(x.mean(1))[:, None] if x.ndim == 3 else z + self.pooled(x)


def mixed(h):
    if h.ndim < 3:
        return h
    return jnp.cumsum(h, axis=1) / (1 + jnp.arange(h.shape[1], dtype=h.dtype))[:, None]


def mlp(tape, p, x):
    x = jnp.atleast_2d(x)
    h = mixed(jnp.tanh(tape.dense("a", x, ref.matrix(p["a"])))[None])[0]
    return tape.dense("b", h, p["b"]["kernel"]) + tape.dense(
        "pooled", x.mean(0, keepdims=True), ref.matrix(p["pooled"])
    )


def targets(kind, shape, seed=2):
    rng = np.random.default_rng(seed)
    if kind == "softmax":
        return rng.integers(0, C, shape).astype(np.int32)
    return (rng.random((*shape, C)) if kind == "sigmoid" else rng.normal(size=(*shape, C))).astype(np.float32)


@functools.cache
def whole_model(kind, sequence=False, microbatch=None, model=MLP, **options):
    loss = LOSSES[kind]("t") if kind == "softmax" else LOSSES[kind]("t", sequence=sequence)
    predict = lambda model, batch: model(batch["x"])
    objective, params = Objective.from_model(model(nnx.Rngs(0), **options), predict, loss, microbatch=microbatch)
    return objective, randomised(params)


def batch_of(kind, sequence=False, weighted=False, n=N):
    shape = (n, 3) if sequence else (n,)
    batch = {"x": random(*shape, D), "t": targets(kind, shape)}
    if weighted:
        batch["mask"] = np.arange(np.prod(shape)).reshape(shape) % 4 != 1
        batch["weights"] = np.linspace(0.5, 2, n).astype(np.float32)
    return batch


@pytest.mark.parametrize("sequence", [False, True], ids=["examples", "positions"])
@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("kind", LOSSES)
def test_fishers(kind, fisher, sequence):
    """Every kind of Fisher of every loss, masked and weighted; of sequences whose positions see each other."""
    objective, params = whole_model(kind, sequence)
    batch = batch_of(kind, sequence, weighted=True)
    check(objective, params, batch, mlp, kind, fisher, Everything(reduce=fisher != "exact"), jax.random.key(3))


def test_exact_reduce_and_ggn():
    """The exact Fisher's A, averaged over its passes, in "reduce"; and "ggn" is the same number for number."""
    objective, params = whole_model("softmax", True)
    batch = batch_of("softmax", True, weighted=True)
    found, _ = statistics(objective, params, batch, "ggn", KroneckerStatistic("reduce"))
    again, _ = statistics(objective, params, batch, "exact", KroneckerStatistic("reduce"))
    jax.tree.map(np.testing.assert_array_equal, found, again)
    all_uses, _, _ = reference(mlp, params, batch, "softmax", "exact")
    for name, uses in all_uses.items():
        want = ref.statistics(uses)
        want["reduce_rows"] = want["reduce_rows"][None]
        assert max(error(found[name][n], want[f"reduce_{n}"]) for n in ("A", "G", "rows")) < TOLERANCE


class Pixels(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Conv(2, C, (2, 2), rngs=rngs)

    def __call__(self, x):
        return self.a(x)


def test_exact_fisher_of_pixels():
    """Labels (N, H, W) with a mask of that shape: every pixel is an example with columns of its own."""
    objective, params = whole_model("softmax", model=Pixels)
    shape = (N, 2, 3)
    batch = {"x": random(*shape, 2), "t": targets("softmax", shape), "mask": np.arange(N * 6).reshape(shape) % 4 != 1}
    one = conv(2, 2, C, (2, 2))
    net = lambda tape, p, x: one.by_hand(renamed(tape, layer="a"), p["a"], x).reshape(-1, C)
    check(objective, params, batch, net, "softmax", "exact", Everything(reduce=False))


def renamed(tape, **names):
    return lambda name, a, M: tape(names.get(name, name), a, M)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(6, D, rngs=rngs)

    def __call__(self, x):
        return self.embed.attend(jnp.tanh(mixed(self.embed(x))))


def tied(tape, p, x):
    M = p["embed"]["embedding"]
    h = jnp.tanh(mixed(tape("embed", jnp.eye(6)[x][None], M[None])))
    return tape("attend", h, M.T[None])[0]


def worst_of_tied(coverage, found, all_uses, given):
    """The errors of an embedding that is used in both ways: uses add up, those of `attend` transposed."""
    got, into, out = found["embed"], ref.statistics(all_uses["embed"]), ref.statistics(all_uses["attend"])
    D = all_uses["attend"][0].D.swapaxes(-1, -2)
    flat = D.reshape(*D.shape[:3], -1)
    want = {
        "counts": np.einsum("gii->gi", into["A"]),
        "rows": into["rows"][None],
        "G": into["G"],
        "A_head": out["A"],
        "G_head": np.einsum("gii->gi", out["G"]),
        "head_rows": out["rows"][None],
        "D2": into["D2"] + out["D2"].swapaxes(1, 2),
        "unit_F": into["unit"] + np.einsum("pngio,pngjo->goij", D, D),
        "full_F": into["full"] + np.einsum("pngi,pngj->gij", flat, flat),
    }
    assert got.keys() == want.keys()
    return {("embed", name): error(got[name], want[name]) for name in want}


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_tied_embedding(fisher):
    loss = losses.SoftmaxCrossEntropy("t")
    objective, params = Objective.from_model(Tied(nnx.Rngs(0)), lambda model, batch: model(batch["x"]), loss)
    x = np.random.default_rng(0).integers(0, 6, (N, 3)).astype(np.int32)
    batch = {"x": x, "t": (x + 1) % 6, "mask": np.arange(3 * N).reshape(N, 3) % 4 != 1}
    check(objective, params, batch, tied, "softmax", fisher, compare=worst_of_tied)


class Positions(nnx.Module):
    """A parameter of no layer, and a subclass of a layer."""

    def __init__(self, rngs):
        self.position = nnx.Param(jnp.ones((3, D)))
        self.a = nnx.Linear(D, C, rngs=rngs)

    def __call__(self, x):
        return self.a(x + self.position[...])


@dataclasses.dataclass(frozen=True)
class Rigged(losses.Loss):
    """A loss whose samples are an entry of the batch: the reference can use the same ones."""

    inner: losses.Loss

    def values(self, outputs, batch):
        return self.inner.values(outputs, batch)

    def sample_targets(self, outputs, batch, key):
        return {**batch, "t": batch["drawn"]}


@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
def test_plain_parameters_have_the_exact_diagonal(fisher, microbatch):
    loss = losses.SoftmaxCrossEntropy("t") if fisher == "exact" else Rigged(losses.SoftmaxCrossEntropy("t"))
    predict = lambda model, batch: model(batch["x"])
    objective, params = Objective.from_model(Positions(nnx.Rngs(0)), predict, loss, microbatch=microbatch)
    params = randomised(params)
    batch = batch_of("softmax", True, weighted=True)
    batch["drawn"] = targets("softmax", (N, 3), seed=9)
    key = jax.random.key(0)
    found, _ = run(objective, params, batch, key, cover(objective, params, "t", plain=".*"), Everything(), fisher, {})

    def net(tape, p, x):
        position = tape("position", jnp.ones((1, 1, 1)), p["position"].reshape(1, 1, -1)).reshape(3, D)
        kernel = tape("a/kernel", jnp.ones((1, 1, 1)), p["a"]["kernel"].reshape(1, 1, -1)).reshape(D, C)
        return (x + position) @ kernel + tape("a/bias", jnp.ones((1, 1, 1)), p["a"]["bias"].reshape(1, 1, -1))[0]

    all_uses, _, _ = reference(net, params, batch, "softmax", fisher, batch["drawn"] if fisher == "sampled" else None)
    assert found.keys() == all_uses.keys()
    for name, uses in all_uses.items():
        assert error(found[name]["D2"], ref.statistics(uses)["D2"].reshape(1, 1, -1)) < TOLERANCE


# -- exactness ---------------------------------------------------------------------------------------------------------


class Deep(nnx.Module):
    def __init__(self, rngs, linear=True):
        self.layers = nnx.List([nnx.Linear(D, 3, rngs=rngs), nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, C, rngs=rngs)])
        self.linear = linear

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x if self.linear else nnx.tanh(x))
        return x


@pytest.mark.parametrize(("linear", "n", "exact"), [(True, N, True), (False, 1, True), (False, N, False)])
def test_kronecker_blocks_that_are_exact(linear, n, exact):
    """Of a deep linear net with squared error, and of any net and one example: A (x) G is the Fisher's block."""
    objective, params = whole_model("squared", model=Deep, linear=linear)
    found, W = statistics(objective, params, batch_of("squared", n=n), "exact")
    errors = []
    for x in found.values():
        errors.append(error(np.kron(x["A"][0] / x["rows"], x["G"][0] / W), x["full_F"][0] / W))
    assert (max(errors) < TOLERANCE) == exact, errors
    assert exact or max(errors) > 1e-2


# -- what changes nothing ----------------------------------------------------------------------------------------------


def assert_same(a, b, tolerance=TOLERANCE):
    """Two trees of statistics, each array relative to its largest entry."""
    errors = jax.tree.map(error, a, b)
    assert jax.tree.reduce(max, errors) < tolerance, errors


def test_jit_and_eager():
    objective, params = whole_model("softmax", True)
    batch, coverage = batch_of("softmax", True, weighted=True), cover(objective, params, "test")
    args = (objective, params, batch, jax.random.key(0), coverage, KroneckerStatistic(), "sampled")
    assert_same(run(*args, {}), collect(*args, who="test"))


@pytest.mark.parametrize("microbatch", [1, 2])  # 2 leaves a remainder of N = 5
def test_pieces(microbatch):
    batch = batch_of("softmax", True, weighted=True)
    whole, pieces = (
        statistics(*whole_model("softmax", True, microbatch=m), batch, "exact") for m in (None, microbatch)
    )
    assert_same(pieces, whole)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_masked_examples_may_hold_anything(fisher):
    """A batch padded with masked garbage is the batch without it, NaN targets included."""
    objective, params = whole_model("squared", True)
    batch = batch_of("squared", True)
    garbage = {"x": 100 * random(3, 3, D, seed=5), "t": np.full((3, 3, C), np.nan, np.float32)}
    padded = {name: np.concatenate([batch[name], garbage[name]]) for name in batch} | {"mask": np.arange(N + 3) < N}
    assert_same(statistics(objective, params, padded, fisher), statistics(objective, params, batch, fisher))
    none = statistics(objective, params, padded | {"mask": np.zeros(N + 3, bool)}, fisher)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(none))


def test_weights_are_repetitions():
    objective, params = whole_model("softmax")
    batch = batch_of("softmax")
    twice = jax.tree.map(lambda a: np.concatenate([a, a[:2]]), batch)
    weighted = batch | {"weights": np.array([2, 2, 1, 1, 1], np.float32)}
    assert_same(statistics(objective, params, weighted), statistics(objective, params, twice))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.linear = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        return x + nnx.tanh(self.linear(self.norm(x)))


class Stack(nnx.Module):
    """Two blocks: unrolled, in `nnx.scan`, or the same with `nnx.remat`."""

    def __init__(self, rngs, how="unrolled"):
        self.how = how
        if "scan" in how:
            self.blocks = nnx.vmap(Block, in_axes=0, out_axes=0)(rngs.split(2))
        else:
            self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(D, C, rngs=rngs)

    def __call__(self, x):
        step = lambda x, block: block(x)
        if "remat" in self.how:
            step = nnx.remat(step)
        if "scan" in self.how:
            x = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        else:
            for block in self.blocks:
                x = step(x, block)
        return self.head(x)


@functools.cache
def of_stack(how):
    """(found, W) of a Stack, with the parameters of the unrolled one."""
    objective, _ = whole_model("softmax", model=Stack, how=how)
    _, params = whole_model("softmax", model=Stack, how="unrolled")
    if "scan" in how:
        both = jax.tree.map(lambda *leaves: np.stack(leaves), *(params["blocks"][i] for i in range(2)))
        params = params | {"blocks": both}
    return statistics(objective, params, batch_of("softmax", True, weighted=True), "exact", Everything(False))


@pytest.mark.parametrize("how", ["remat", "scan", "scan remat"])
def test_transforms(how):
    """Stacked layers have stacked statistics: those of the layers one by one."""
    unrolled, W = of_stack("unrolled")
    found, weight = of_stack(how)
    np.testing.assert_allclose(weight, W)
    if "scan" not in how:
        assert_same(found, unrolled)
        return
    assert found.keys() == {"blocks/norm", "blocks/linear", "head"}
    assert_same(found["head"], unrolled["head"])
    for name in ("norm", "linear"):
        both = jax.tree.map(lambda *v: np.stack(v), *(unrolled[f"blocks/{i}/{name}"] for i in range(2)))
        assert_same(found[f"blocks/{name}"], both)
    assert_same(found["blocks/linear"]["full_F"][1], unrolled["blocks/1/linear"]["full_F"])


class Twice(nnx.Module):
    """One layer under two names, the second of which comes first in the tree, used three times."""

    def __init__(self, rngs):
        self.z = nnx.Linear(D, D, rngs=rngs)
        self.inner = One(self.z)
        self.head = nnx.Linear(D, C, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.z(nnx.tanh(self.inner(nnx.tanh(self.z(x)))))))


def twice(tape, p, x):
    x = x[None]
    for _ in range(3):
        x = jnp.tanh(tape.dense("inner/layer", x, ref.matrix(p["inner"]["layer"])))
    return tape.dense("head", x, ref.matrix(p["head"]))


def test_a_layer_that_is_used_more_than_once_adds_up():
    objective, params = whole_model("squared", model=Twice)
    check(objective, params, batch_of("squared", weighted=True), twice, "squared", "exact", Everything(reduce=False))


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(D, 2, rngs=rngs))
        self.head = nnx.Linear(2, C, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x)[:, -1])


def recurrent(tape, p, x):
    p, h, head = p["rnn"]["cell"], jnp.zeros((1, 2)), p["head"]
    for i in range(x.shape[0]):
        (xr, xz, xn), (hr, hz, hn) = (
            jnp.split(tape.dense(f"rnn/cell/{name}", v, ref.matrix(p[name])), 3, -1)
            for name, v in (("dense_i", x[i : i + 1]), ("dense_h", h))
        )
        r, z = ref_sigmoid(xr + hr), ref_sigmoid(xz + hz)
        h = (1 - z) * jnp.tanh(xn + r * hn) + z * h
    return tape.dense("head", h, ref.matrix(head))


def ref_sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


def test_recurrent_layer():
    objective, params = whole_model("squared", model=Recurrent)
    batch = {"x": random(N, 3, D), "t": targets("squared", (N,)), "mask": np.arange(N) != 2}
    check(objective, params, batch, recurrent)


@pytest.mark.parametrize("vmap", [jax.vmap, nnx.vmap])
def test_a_model_that_is_mapped_over_examples(vmap):
    objective, params = whole_model("softmax", model=Stack, how="unrolled")
    loss = losses.SoftmaxCrossEntropy("t")

    def predict(model, batch):
        if vmap is jax.vmap:
            return jax.vmap(model)(batch["x"])
        return nnx.vmap(lambda model, x: model(x), in_axes=(None, 0))(model, batch["x"])

    mapped, _ = Objective.from_model(Stack(nnx.Rngs(0)), predict, loss)
    batch = batch_of("softmax", True)
    for fisher in ("exact", "empirical"):
        assert_same(statistics(mapped, params, batch, fisher), statistics(objective, params, batch, fisher))
    with pytest.raises(ValueError, match=r"a mask or weights for \d+ examples, and the model maps over them"):
        trace(mapped, params, batch | {"mask": np.arange(N) > 1}, cover(mapped, params, "KFAC"))


class Convolutional(nnx.Module):
    def __init__(self, rngs, dtype=None):
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs, dtype=dtype)
        self.norm = nnx.GroupNorm(4, num_groups=2, rngs=rngs, dtype=dtype)
        self.head = nnx.Linear(4, C, rngs=rngs, dtype=dtype)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def images(n=8):
    return {"x": random(n, 6, 6, 2), "t": targets("softmax", (n,))}


def test_sharded_batch():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    objective, params = whole_model("softmax", model=Convolutional)
    batch = images(16) | {"mask": np.arange(16) % 5 != 1}
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    replicated = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    found = statistics(objective, replicated, sharded, "exact")
    assert len(found[1].sharding.device_set) == 8
    assert_same(found, statistics(objective, params, batch, "exact"))


def test_bfloat16_compute():
    """Statistics are float32, and within bfloat16's accuracy (2^-8 for each of a few roundings) of float32's."""
    batch = images()
    want, _ = statistics(*whole_model("softmax", model=Convolutional), batch)
    objective, params = whole_model("softmax", model=Convolutional, dtype=jnp.bfloat16)
    found, _ = statistics(objective, params, batch)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
    assert_same(found, want, 0.05)
    assert error(found["head"]["A"], want["head"]["A"]) > 1e-5  # it was not computed in float32 after all


def test_permuted_channels_permute_the_factors():
    objective, params = whole_model("softmax", model=Convolutional)
    found, _ = statistics(objective, params, images())
    order = np.array([1, 0, 3, 2])  # within the groups of the GroupNorm
    p = jax.tree.map(np.asarray, params)
    moved = {
        "conv": {"kernel": p["conv"]["kernel"][..., order], "bias": p["conv"]["bias"][order]},
        "norm": {name: v[order] for name, v in p["norm"].items()},
        "head": {"kernel": p["head"]["kernel"][order], "bias": p["head"]["bias"]},
    }
    again, _ = statistics(objective, moved, images())
    assert_same(again["conv"]["G"], found["conv"]["G"][:, order][:, :, order])
    assert_same(again["conv"]["A"], found["conv"]["A"])
    assert_same(again["norm"]["F"], found["norm"]["F"][:, order])
    with_one = np.append(order, 4)
    assert_same(again["head"]["A"], found["head"]["A"][:, with_one][:, :, with_one])


def test_without_a_key_dropout_is_off():
    class Dropping(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(D, C, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.a(self.dropout(x))

    objective, params = whole_model("softmax", model=Dropping)
    batch = batch_of("softmax")
    coverage = cover(objective, params, "test")
    A = lambda key: run(objective, params, batch, key, coverage, KroneckerStatistic(), "exact", {})[0]["a"]["A"]
    x = np.concatenate([batch["x"], np.ones((N, 1))], 1)
    assert error(A(None)[0], x.T @ x) < TOLERANCE
    assert error(A(jax.random.key(0)), A(None)) > 0.1


# -- coverage ----------------------------------------------------------------------------------------------------------


class Mine(nnx.Linear):
    pass


class Zoo(nnx.Module):
    """Layers of every kind in lists and below, one of them under two names, and a parameter of its own."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs), nnx.Conv(D, D, (2,), rngs=rngs), Block(rngs)])
        self.attention = nnx.MultiHeadAttention(2, D, rngs=rngs, decode=False)
        self.again = self.layers[0]
        self.embed = nnx.Embed(3, D, rngs=rngs)
        self.unused = nnx.Linear(D, 2, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(D))

    def __call__(self, x):
        x = x + self.embed(jnp.zeros(x.shape[:2], jnp.int32)) * self.scale[...]
        for layer in (*self.layers, self.attention, self.again):
            x = layer(x)
        return x[..., :C]


def covered(model, who="KFAC", loss=None, **options):
    objective, params = Objective.from_model(model, lambda m, b: m(b["x"]), loss or losses.SoftmaxCrossEntropy("t"))
    return objective, params, cover(objective, params, who, **options)


def test_every_parameter_is_in_one_block():
    _, params, coverage = covered(Zoo(nnx.Rngs(0)), uncovered="diagonal")
    paths = [(*layer.path, name) for layer in coverage.layers for name, _ in layer.shapes]
    leaves = {tuple(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert len(paths) == len(set(paths)) and set(paths) == leaves
    assert sum(layer.size for layer in coverage.layers) == sum(a.size for a in jax.tree.leaves(params))
    assert [layer.name for layer in coverage.plain] == ["scale"]
    vector = randomised(params)
    back = coverage.vector(coverage.matrices(vector))
    assert jax.tree.structure(back) == jax.tree.structure(vector)
    jax.tree.map(np.testing.assert_array_equal, back, vector)
    assert hash(coverage) == hash(covered(Zoo(nnx.Rngs(1)), uncovered="diagonal")[2])


def test_a_layer_that_is_never_called_has_no_statistics():
    objective, params, coverage = covered(Zoo(nnx.Rngs(0)), uncovered="diagonal")
    found, _ = run(objective, params, batch_of("softmax", True), None, coverage, KroneckerStatistic(), "empirical", {})
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(found["unused"]))
    assert all(np.any(found[name]["A"]) for name in ("again", "layers/1", "attention/out") if name in found)


def test_unknown_parameters_are_an_error():
    with pytest.raises(ValueError, match=r"KFAC: 1 parameters belong to no layer(.|\n)*  position: no layer that is"):
        covered(Positions(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"uncovered='diagonal'(.|\n)*plain=(.|\n)*register_layer"):
        covered(Positions(nnx.Rngs(0)))


def test_plain_names_layers_and_parameters():
    for plain in ("a", "a/kernel", "a/.*"):
        _, _, coverage = covered(Positions(nnx.Rngs(0)), plain=f"position|{plain}")
        assert sorted(layer.name for layer in coverage.plain) == ["a/bias", "a/kernel", "position"]
        assert not coverage.known
    _, _, coverage = covered(Positions(nnx.Rngs(0)), plain="position")
    assert [layer.name for layer in coverage.known] == ["a"]
    with pytest.raises(ValueError, match=r"KFAC\(plain='nothing'\) matches no parameter. Paths are like a/bias, a/"):
        covered(Positions(nnx.Rngs(0)), plain="nothing")
    assert all(isinstance(layer, PlainParameter) for layer in coverage.plain)


def test_subclasses_need_registration(monkeypatch):
    model = One(Mine(D, C, rngs=nnx.Rngs(0)))
    for options in ({}, {"plain": "layer/bias"}):
        with pytest.raises(ValueError, match=r"layer/kernel: Mine is a subclass of Linear: register_layer it"):
            covered(model, **options)
    monkeypatch.setitem(known_layers.LAYERS, Mine, None)  # to be taken back
    register_layer(Mine)
    objective, params, coverage = covered(model)
    found, _ = run(objective, params, batch_of("softmax"), None, coverage, KroneckerStatistic(), "empirical", {})
    linear, params, coverage = covered(One(nnx.Linear(D, C, rngs=nnx.Rngs(0))))
    want, _ = run(linear, params, batch_of("softmax"), None, coverage, KroneckerStatistic(), "empirical", {})
    jax.tree.map(np.testing.assert_array_equal, found, want)
    with pytest.raises(TypeError, match=r"register_layer\(module\) should be a subclass of nnx.Module"):
        register_layer(int)  # pyrefly: ignore
    with pytest.raises(TypeError, match=r"register_layer\(layer\) should be a subclass of curvature.Layer"):
        register_layer(Mine, int)  # pyrefly: ignore


def test_layers_inside_wrappers_are_not_covered():
    rngs = nnx.Rngs(0)
    model = One(nnx.WeightNorm(nnx.Linear(D, C, rngs=rngs), rngs=rngs))
    with pytest.raises(ValueError, match=r"layer/layer_instance/kernel: it is inside a wrapper"):
        covered(model)


class Shared(nnx.Module):
    """Two layers with one kernel: neither's statistics are those of the kernel."""

    def __init__(self, rngs):
        self.a = nnx.Linear(D, D, rngs=rngs)
        self.b = nnx.Linear(D, D, rngs=rngs)
        self.b.kernel = self.a.kernel

    def __call__(self, x):
        return self.b(nnx.tanh(self.a(x)))[..., :C]


def test_layers_that_share_a_parameter_are_not_covered():
    with pytest.raises(ValueError, match=r"a/kernel: b has parameters of this Linear too(.|\n)*b/bias: a has"):
        covered(Shared(nnx.Rngs(0)))
    _, _, coverage = covered(Shared(nnx.Rngs(0)), uncovered="diagonal")
    assert {layer.name for layer in coverage.plain} == {"a/kernel", "a/bias", "b/bias"}


class Outside(nnx.Module):
    """Uses a table without calling its layer, at the top and in a scanned, rematerialised block."""

    def __init__(self, rngs, deep):
        self.embed = nnx.Embed(C, D, rngs=rngs)
        self.blocks = nnx.vmap(Block)(rngs.split(2))
        self.deep = deep

    def __call__(self, x):
        step = lambda x, block: block(x) + (block.linear.bias[...] if self.deep else 0)
        x = nnx.scan(nnx.remat(step), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        return self.embed.attend(x) if self.deep else x @ self.embed.embedding[...].T


@pytest.mark.parametrize(
    ("deep", "name"), [(False, "embedding of Embed 'embed'"), (True, "bias of Linear 'blocks/linear'")]
)
def test_parameters_that_are_used_without_their_layer_are_an_error(deep, name):
    objective, params, coverage = covered(Outside(nnx.Rngs(0), deep))
    with pytest.raises(ValueError, match=f"KFAC: the model uses the {name} without calling the layer"):
        trace(objective, params, batch_of("softmax"), coverage)
    objective, params, coverage = covered(Outside(nnx.Rngs(0), deep), plain="embed|blocks/linear")
    trace(objective, params, batch_of("softmax"), coverage)


class Learned(nnx.Module):
    """A position embedding without the batch's axis."""

    def __init__(self, rngs):
        self.position = nnx.Embed(3, D, rngs=rngs)
        self.a = nnx.Linear(D, C, rngs=rngs)

    def __call__(self, x):
        return self.a(x + self.position(jnp.arange(3)))


class Ensemble(nnx.Module):
    """The mean of two models, mapped over as one."""

    def __init__(self, rngs, member=Learned):
        self.members = nnx.vmap(member, in_axes=0, out_axes=0)(rngs.split(2))

    def __call__(self, x):
        return nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(self.members, x).mean(0)


def test_members_of_an_ensemble_have_statistics_of_their_own():
    """Stacked by `nnx.vmap`: each member's are those of its model alone, but for the outputs' cotangents."""
    objective, params, coverage = covered(Ensemble(nnx.Rngs(0), Block), loss=losses.SquaredError("t"))
    batch = {"x": random(N, D), "t": random(N, D, seed=1), "mask": np.arange(N) != 2}
    found, _ = run(objective, params, batch, None, coverage, Everything(False), "exact", {})
    for i in range(2):
        member = jax.tree.map(lambda a, i=i: a[i], params["members"])
        alone, _, coverage = covered(Block(nnx.Rngs(0)), loss=losses.SquaredError("t"))
        want, _ = run(alone, member, batch, None, coverage, Everything(False), "exact", {})
        for name in ("linear", "norm"):
            got = {n: v[i] for n, v in found[f"members/{name}"].items()}
            of_inputs = ("A", "rows", "reduce_A", "reduce_rows")  # others carry two factors of 1/2, of the mean
            assert_same(got, {n: v if n in of_inputs else v / 4 for n, v in want[name].items()})


@pytest.mark.parametrize("model", [Learned, Ensemble])
def test_a_layer_without_the_axis_of_examples_is_an_error(model):
    objective, params, coverage = covered(model(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"Embed '(members/)?position' is applied to an input of shape \(3,\)"):
        trace(objective, params, batch_of("softmax", True), coverage)
    objective, params, coverage = covered(model(nnx.Rngs(0)), plain=".*position")
    trace(objective, params, batch_of("softmax", True), coverage)


def test_plain_parameters_and_batch_norm():
    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(D, C, rngs=rngs)
            self.norm = nnx.BatchNorm(C, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.a(x))

    objective, params, coverage = covered(Normed(nnx.Rngs(0)), plain="a")
    with pytest.raises(ValueError, match=r"KFAC: the exact diagonal of a/bias, a/kernel needs .* BatchNorm"):
        trace(objective, params, batch_of("softmax"), coverage)
    trace(objective.evaluation(), params, batch_of("softmax"), coverage)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda rngs: nnx.Einsum("nii,io->no", (D, C), rngs=rngs), "repeats a label"),
        (lambda rngs: nnx.Einsum("nti,io->no", (D, C), rngs=rngs), "sums one operand alone"),
        (lambda rngs: nnx.Einsum("ni,io->n", (D, C), rngs=rngs), "sums its kernel alone"),
        (lambda rngs: nnx.Einsum("...rti,io->...tro", (D, C), rngs=rngs), r"reorders positions together with"),
        (lambda rngs: nnx.Einsum("nhi,hio->noh", (2, D, C), (C, 2), rngs=rngs), "its bias is not a row"),
        (lambda rngs: nnx.Conv(D, C, (2,), mask=jnp.ones((2, D, C)), rngs=rngs), "it has a mask"),
        (lambda rngs: nnx.LayerNorm(D, feature_axes=1, rngs=rngs), "its feature_axes are"),
        (lambda rngs: nnx.BatchNorm(D, axis=1, rngs=rngs), "its axis is 1"),
        (lambda rngs: nnx.BatchNorm(D, axis_name="data", rngs=rngs), "it has an axis_name"),
        (lambda rngs: nnx.ConvTranspose(D, C, (2,), rngs=rngs), "no layer that is registered"),
    ],
)
def test_layers_that_are_not_supported_say_why(layer, message):
    with pytest.raises(ValueError, match=message):
        covered(One(layer(nnx.Rngs(0))))


class Calling(One):
    """Calls its layer with these further arguments."""

    def __init__(self, layer, *args, **kwargs):
        super().__init__(layer)
        self.further = (args, tuple(kwargs.items()))

    def __call__(self, x):
        args, kwargs = self.further
        return self.layer(x, *args, **dict(kwargs)) if args or kwargs else self.layer(inputs=x)


def test_arguments_of_calls():
    """The input by name; running averages by position and by name; a norm's mask is refused."""
    of = lambda model: statistics(*covered(model)[:2], batch_of("softmax"), statistic=Everything(False))
    linear = lambda: nnx.Linear(D, C, rngs=nnx.Rngs(0))
    assert_same(of(Calling(linear())), of(One(linear())), 0.1 * TOLERANCE)
    norm = lambda **options: batch_norm(nnx.Rngs(0), **options)
    want = of(One(norm(use_running_average=True)))
    assert_same(of(Calling(norm(), True)), want, 0.1 * TOLERANCE)
    assert_same(of(Calling(norm(), use_running_average=True)), want, 0.1 * TOLERANCE)
    assert error(of(One(norm()))[0]["layer"]["F"], want[0]["layer"]["F"]) > 0.1
    with pytest.raises(ValueError, match=r"statistics of layer \(LayerNorm\) under mask= are not known"):
        of(Calling(nnx.LayerNorm(D, rngs=nnx.Rngs(0)), mask=True))


def test_reduce_of_an_embedding_is_refused():
    objective, params, batch, _ = one_layer("embed")
    with pytest.raises(
        ValueError, match=r"weight_sharing='reduce' needs one token per example, but Embed 'layer' looks up \d+"
    ):
        statistics(objective, params, batch, statistic=KroneckerStatistic("reduce"))


def test_fishers_that_cannot_be():
    objective, params = whole_model("softmax", True)
    coverage = cover(objective, params, "KFAC")
    of = lambda objective, batch, fisher: trace(objective, params, batch, coverage, fisher)
    with pytest.raises(ValueError, match=r"KFAC\(fisher='sampled'\) draws targets from the model and needs a key"):
        of(objective, batch_of("softmax", True), "sampled")
    long = {"x": np.zeros((1, 400, D), np.float32), "t": np.zeros((1, 400), np.int32)}
    with pytest.raises(ValueError, match=r"3 outputs x 400 positions backward passes .* more than 1024"):
        of(objective, long, "exact")
    mine = losses.PerExample(lambda z, batch: jnp.sum(z**2, axis=(1, 2)))
    other, _ = Objective.from_model(MLP(nnx.Rngs(0)), lambda model, batch: model(batch["x"]), mine)
    with pytest.raises(TypeError, match=r"KFAC\(fisher='exact'\) knows the distribution of .* not of PerExample"):
        of(other, batch_of("softmax", True), "exact")


# -- adapters, and layers of which a part is trained -------------------------------------------------------------------


class Adapted(nnx.Module):
    """Two adapters: around a layer of its own, and in the place of one."""

    def __init__(self, rngs):
        self.a = nnx.LoRALinear(D, 6, lora_rank=2, rngs=rngs)
        self.b = nnx.LoRA(6, 3, C, base_module=nnx.Linear(6, C, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.tanh(self.a(x)))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_both_matrices_of_an_adapter_are_layers(fisher):
    predict = lambda model, batch: model(batch["x"])
    loss = losses.SoftmaxCrossEntropy("t")
    objective, params = Objective.from_model(Adapted(nnx.Rngs(0)), predict, loss, wrt=nnx.LoRAParam)
    params, frozen = randomised(params), objective.frozen

    def net(tape, p, x):
        adapter = lambda name, x, p: tape(
            f"{name}/lora_b", tape(f"{name}/lora_a", x[None], p["lora_a"][None]), p["lora_b"][None]
        )[0]
        linear = lambda x, p: x @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"], np.float64)
        h = jnp.tanh(linear(x, frozen["a"]) + adapter("a/lora", x, p["a"]["lora"]))
        return linear(h, frozen["b"]["base_module"]) + adapter("b", h, p["b"])

    batch = batch_of("softmax", True, weighted=True)
    check(objective, params, batch, net, "softmax", fisher, Everything(reduce=fisher != "exact"))
    names = [layer.name for layer in cover(objective, params, "test").layers]
    assert names == ["a/lora/lora_a", "a/lora/lora_b", "b/lora_a", "b/lora_b"]


def test_only_what_is_trained_is_covered():
    """A kernel without its bias, a bias without its kernel, a norm's scale alone: parts of the whole statistics."""
    objective, params = whole_model("softmax", model=Stack, how="unrolled")
    params, batch = randomised(params), batch_of("softmax", True, weighted=True)
    whole, _ = statistics(objective, params, batch, statistic=Everything(False, reduce=False))
    chosen = [("blocks", 0, "linear", "kernel"), ("blocks", 0, "norm", "scale"), ("blocks", 1, "linear", "bias")]
    part, some = objective.select(params, chosen)
    found, _ = statistics(part, some, batch, statistic=Everything(False, reduce=False))
    assert found.keys() == {"blocks/0/linear", "blocks/0/norm", "blocks/1/linear"}
    for name, rows in (("blocks/0/linear", slice(0, D)), ("blocks/1/linear", slice(D, None))):
        want = whole[name]
        assert error(found[name]["A"], want["A"][:, rows, rows]) < TOLERANCE
        assert error(found[name]["G"], want["G"]) < TOLERANCE
        assert error(found[name]["D2"], want["D2"][:, rows]) < TOLERANCE
        assert error(found[name]["unit_F"], want["unit_F"][:, :, rows, rows]) < TOLERANCE
    assert error(found["blocks/0/norm"]["F"], whole["blocks/0/norm"]["F"][:, :, :1, :1]) < TOLERANCE


@pytest.mark.parametrize("entry", ["ndim 1", "ndim 2", "integers", "with a mask"])
def test_float_weights(entry):
    """The empirical Fisher rides on the loss's backward pass with one weight per example, else on one of its own."""
    objective, params = whole_model("softmax", True)
    batch = batch_of("softmax", True)
    w = np.linspace(0, 2, N).astype(np.float32)  # zero is among them
    wide = np.linspace(0, 2, 3 * N).reshape(N, 3).astype(np.float32)
    mask = np.arange(3 * N).reshape(N, 3) % 4 != 1
    more = {
        "ndim 1": {"weights": w},
        "ndim 2": {"weights": wide},
        "integers": {"mask": (w > 0).astype(np.int32)},
        "with a mask": {"weights": w, "mask": mask},
    }
    check(objective, params, batch | more[entry], mlp, "softmax", "empirical")


# -- layers of one's own -----------------------------------------------------------------------------------------------


class Gate(nnx.Module):
    """y = x * gate: a layer that is none of flax's."""

    def __init__(self, rngs):
        self.gate = nnx.Param(jnp.ones(D))

    def __call__(self, x):
        return x * self.gate[...]


@dataclasses.dataclass(frozen=True)
class GateLayer(Layer):
    """M (1, 1, D): the gradient of an example is the sum of its s x."""

    @classmethod
    def from_module(cls, path, module):
        return cls(path, "Gate", (), (("gate", module.gate.get_value().shape),))

    @property
    def d_i(self):
        return 1

    @property
    def d_o(self):
        return self.shapes[0][1][0]

    def matrix(self, parameters):
        return parameters["gate"].reshape(1, 1, self.d_o)

    def parameters(self, matrix):
        return {"gate": matrix.reshape(self.d_o)}

    def gradients(self, backward):
        products = (backward.s * backward.saved).reshape(backward.examples, -1, self.d_o)
        return Explicit(jnp.sum(products, axis=1)[None, :, None])

    def block(self):
        return UnitBlocks(1)


@dataclasses.dataclass(frozen=True)
class HalfGate(GateLayer):
    """The same without a block."""

    block = Layer.block


class Gated(nnx.Module):
    def __init__(self, rngs):
        self.gate, self.a = Gate(rngs), nnx.Linear(D, C, rngs=rngs)

    def __call__(self, x):
        return self.a(nnx.tanh(self.gate(x)))


def estimated(estimator, objective, params, batch):
    c = jax.jit(estimator.update)(estimator.init(objective, params), objective, params, batch, jax.random.key(0))
    return jax.jit(estimator.refresh)(c, objective, params, None, None, 0.1)


@pytest.mark.parametrize("kind", [KFAC, KroneckerDiagonal, DiagonalFisher, UnitWise, FullBlock])
def test_a_layer_of_ones_own_is_given_to_an_estimator(kind):
    """Its diagonal is the exact one, as of a plain parameter; nothing of it is known to other estimators."""
    objective, params = Objective.from_model(
        Gated(nnx.Rngs(0)), lambda m, b: m(b["x"]), losses.SoftmaxCrossEntropy("t")
    )
    batch = batch_of("softmax", True, weighted=True)
    mine = estimated(kind("empirical", layers={Gate: GateLayer}), objective, params, batch)
    plain = estimated(kind("empirical", plain="gate"), objective, params, batch)
    assert [layer.kind for layer in mine.coverage.layers] == ["Linear", "Gate"]
    diagonals = [c.diagonal()["gate"]["gate"] for c in (mine, plain)]
    assert error(*diagonals) < TOLERANCE
    if kind is not DiagonalFisher:
        with pytest.raises(ValueError, match=r"gate/gate: no layer that is registered"):
            kind().init(objective, params)
    if kind in (KFAC, KroneckerDiagonal):
        message = (
            rf"{kind.__name__} needs block\(\) of a layer, and HalfGate, the layer of Gate 'gate', .* HalfGate.block"
        )
        with pytest.raises(TypeError, match=message):
            kind(layers={Gate: HalfGate}).init(objective, params)
    with pytest.raises(TypeError, match=rf"{kind.__name__}\(layers\) should be a subclass of curvature.Layer, not"):
        kind(layers={Gate: int})


def test_registered_for_one_estimator():
    objective, params, _ = covered(One(nnx.Linear(D, C, rngs=nnx.Rngs(0))))
    mine, same, _ = covered(One(Mine(D, C, rngs=nnx.Rngs(0))), layers={Mine: known_layers.DenseLayer})
    estimator = KFAC("empirical", layers={Mine: known_layers.DenseLayer})
    assert hash(estimator) == hash(KFAC("empirical", layers={Mine: known_layers.DenseLayer}))
    got, want = (
        estimated(e, o, p, batch_of("softmax"))
        for e, o, p in ((estimator, mine, same), (KFAC("empirical"), objective, params))
    )
    jax.tree.map(np.testing.assert_array_equal, got.factors, want.factors)
    with pytest.raises(ValueError, match=r"Mine is a subclass of Linear: register_layer it"):
        KFAC().init(mine, same)


# -- parameters without entries, outputs of every kind -----------------------------------------------------------------


class Empty(nnx.Module):
    """Kernels without rows or columns, and a parameter without entries."""

    def __init__(self, rngs):
        zeros = nnx.initializers.zeros
        self.a, self.b = nnx.Linear(0, D, kernel_init=zeros, rngs=rngs), nnx.Linear(D, C, rngs=rngs)
        self.none = nnx.Linear(D, 0, kernel_init=zeros, rngs=rngs)
        self.nothing = nnx.Param(jnp.zeros((0, 2)))

    def __call__(self, x):
        h = self.a(x[..., :0])
        return self.b(nnx.tanh(x + h)) + jnp.sum(self.none(x), axis=-1, keepdims=True)


@pytest.mark.parametrize("kind", [KFAC, KroneckerDiagonal, DiagonalFisher, UnitWise, FullBlock])
def test_parameters_of_no_size(kind):
    objective, params = Objective.from_model(
        Empty(nnx.Rngs(0)), lambda m, b: m(b["x"]), losses.SoftmaxCrossEntropy("t")
    )
    c = estimated(kind("empirical"), objective, params, batch_of("softmax"))
    solved = c.solve(params, 0.1)
    assert jax.tree.map(jnp.shape, solved) == jax.tree.map(jnp.shape, params)
    assert np.any(c.diagonal()["a"]["bias"]) and np.isfinite(c.logdet(0.1))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((solved, c.telemetry())))


class Heads(nnx.Module):
    """A class and a number, with an integer beside them."""

    def __init__(self, rngs):
        self.kind, self.size = nnx.Linear(D, C, rngs=rngs), nnx.Linear(D, 1, rngs=rngs)

    def __call__(self, x):
        return {"kind": self.kind(x), "size": self.size(x)[:, 0], "count": jnp.arange(len(x))}


@dataclasses.dataclass(frozen=True)
class Both(losses.Loss):
    """A class and a number with unit variance; draws both."""

    def values(self, outputs, batch):
        classes = losses.SoftmaxCrossEntropy("t").values(outputs["kind"], batch)
        return classes + 0.5 * jnp.square(outputs["size"] - batch["size"])

    def sample_targets(self, outputs, batch, key):
        return batch | {"t": batch["drawn"], "size": batch["drawn size"]}

    def hessian_columns(self, outputs):
        classes = losses.SoftmaxCrossEntropy("t").hessian_columns(outputs["kind"])
        count = len(classes)
        one = jnp.zeros((1, *outputs["kind"].shape))
        size = jnp.zeros((count + 1, len(outputs["size"]))).at[count].set(1.0)
        return {"kind": jnp.concatenate([classes, one]), "size": size}


@pytest.mark.parametrize("fisher", ["ggn", "sampled", "empirical"])
def test_several_heads(fisher):
    """Heads are linear: the block of each is A (x) G with the cotangents of its own output."""
    objective, params = Objective.from_model(Heads(nnx.Rngs(0)), lambda m, b: m(b["x"]), Both())
    batch = batch_of("softmax") | {"size": random(N, seed=3), "drawn size": random(N, seed=4)}
    batch |= {"drawn": targets("softmax", (N,), seed=9), "weights": np.linspace(0.5, 2, N).astype(np.float32)}
    found, W = statistics(objective, params, batch, fisher, KroneckerStatistic(), jax.random.key(0))
    z = jax.tree.map(lambda a: np.asarray(a, np.float64), objective.predict(params, batch))
    t, size = (batch["drawn"], batch["drawn size"]) if fisher == "sampled" else (batch["t"], batch["size"])
    w = batch["weights"].astype(np.float64)
    kind, number = ref.gradient("softmax", z["kind"], t), (z["size"] - size)[:, None]
    want = {"kind": np.einsum("n,ni,nj->ij", w, kind, kind), "size": np.einsum("n,ni,nj->ij", w, number, number)}
    if fisher == "ggn":
        want = {"kind": np.einsum("n,nij->ij", w, ref.hessian("softmax", z["kind"])), "size": [[w.sum()]]}
    for name in want:
        assert error(found[name]["G"][0], want[name]) < TOLERANCE
    np.testing.assert_allclose(W, w.sum(), rtol=1e-6)


def test_outputs_that_a_loss_cannot_use_are_named():
    mine = losses.PerExample(lambda z, batch: z["size"] ** 2)
    objective, params = Objective.from_model(Heads(nnx.Rngs(0)), lambda m, b: m(b["x"]), mine)
    for fisher in ("exact", "ggn", "sampled"):
        message = rf"KFAC\(fisher='{fisher}'\) .*PerExample.*outputs {{'count'.*'kind'.*Use fisher='.*empirical'"
        with pytest.raises(TypeError, match=message):
            jax.eval_shape(
                lambda p, b, fisher=fisher: collect(
                    objective,
                    p,
                    b,
                    jax.random.key(0),
                    cover(objective, params, "KFAC"),
                    KroneckerStatistic(),
                    fisher,
                    who="KFAC",
                ),
                params,
                batch_of("softmax"),
            )
