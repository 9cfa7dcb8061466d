"""Layers that are called several times for one example, against dense Fishers of whole examples, in float64.

Per example n with positions t, weights w_nt, outputs z_nt and J_nt = d z_nt / d theta by automatic differentiation:

    exact:     sum_nt w_nt J_nt^T H_nt J_nt / W
    empirical: sum_n g_n g_n^T / W with g_n = sum_t w_nt^(1/2) J_nt^T dl/dz_nt

which knows nothing of calls. Estimators hold that matrix within their blocks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from curvtrain import losses
from curvtrain.curvature import KFAC, DiagonalFisher, FullBlock, KroneckerDiagonal, UnitWise
from curvtrain.curvature.capture import calls, cover
from curvtrain.objective import Objective

N, TIME, D, C = 5, 3, 3, 3
KEY = jax.random.key(2)
TOLERANCE = 2e-6


class Tied(nnx.Module):
    """A table that is looked up and multiplied by; the mean over the past couples positions."""

    def __init__(self, rngs):
        self.table = nnx.Embed(C, D, rngs=rngs)

    def __call__(self, x):
        h = jnp.tanh(self.table(x))
        return self.table.attend(jnp.cumsum(h, axis=1) / jnp.arange(1, TIME + 1, dtype=h.dtype)[:, None])


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn, self.head = nnx.RNN(nnx.GRUCell(D, 2, rngs=rngs), rngs=rngs), nnx.Linear(2, C, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x))


class Shared(nnx.Module):
    """A layer and a norm, each twice, in a stack of two that is scanned; and a layer that is called once."""

    def __init__(self, rngs):
        self.blocks = nnx.split_rngs(splits=2)(nnx.vmap(Block))(rngs)
        self.head = nnx.Linear(D, C, rngs=rngs)

    def __call__(self, x):
        run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.head(run(x, self.blocks))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(D, D, rngs=rngs), nnx.RMSNorm(D, rngs=rngs)

    def __call__(self, x):
        for _ in range(2):
            x = x + nnx.tanh(self.linear(self.norm(x)))
        return x


class Mapped(nnx.Module):
    """Mapped over examples and, within each, over positions, of which the head sees the mean."""

    def __init__(self, rngs):
        self.a, self.head = nnx.Linear(D, D, rngs=rngs), nnx.Linear(D, C, rngs=rngs)

    def __call__(self, x):
        one = lambda x: self.head(jnp.mean(jax.vmap(lambda row: jnp.tanh(self.a(row)))(x), axis=0))
        return jax.vmap(one)(x)


class Once(Shared):
    """Every layer once: the stack has as many copies as rounds."""

    def __call__(self, x):
        run = nnx.scan(lambda x, b: x + nnx.tanh(b.linear(b.norm(x))), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.head(run(x, self.blocks))


def gru(p, x):
    cell, h, found = p["rnn"]["cell"], jnp.zeros(2), []
    of = lambda name, v: v @ cell[name]["kernel"] + cell[name].get("bias", 0.0)
    for row in x:
        (xr, xz, xn), (hr, hz, hn) = (jnp.split(of(name, v), 3) for name, v in (("dense_i", row), ("dense_h", h)))
        r, z = (1 / (1 + jnp.exp(-v)) for v in (xr + hr, xz + hz))
        h = (1 - z) * jnp.tanh(xn + r * hn) + z * h
        found.append(h)
    return jnp.stack(found) @ p["head"]["kernel"] + p["head"]["bias"]


@dataclasses.dataclass(frozen=True)
class Case:
    model: type
    tokens: bool = False
    sequence: bool = False
    masked: bool = True
    repeated: tuple = ()
    inputs: tuple = (TIME, D)
    by_hand: object = None  # (parameters, x (TIME, D)) -> outputs, for models that compute in float32 alone


CASES = {
    "tied": Case(Tied, tokens=True, sequence=True, repeated=("table",)),
    "recurrent": Case(Recurrent, sequence=True, repeated=("rnn/cell/dense_h", "rnn/cell/dense_i"), by_hand=gru),
    "shared": Case(Shared, repeated=("blocks/linear", "blocks/norm"), inputs=(D,)),
    "mapped": Case(Mapped, masked=False, repeated=("a",)),
    "once": Case(Once, inputs=(D,)),
}


def batch_for(case):
    rng = np.random.default_rng(0)
    shape = (N, TIME) if case.sequence else (N,)
    x = rng.integers(0, C, (N, TIME)).astype(np.int32) if case.tokens else rng.normal(size=(N, *case.inputs))
    batch = {"x": x if case.tokens else x.astype(np.float32), "t": rng.integers(0, C, shape).astype(np.int32)}
    if case.masked:
        batch["mask"] = np.arange(np.prod(shape)).reshape(shape) % 4 != 1
        batch["weights"] = np.linspace(0.5, 2, N).astype(np.float32)
    return batch


@functools.cache
def build(case):
    predict = lambda model, batch: model(batch["x"])
    return Objective.from_model(case.model(nnx.Rngs(0)), predict, losses.SoftmaxCrossEntropy("t"))


@functools.cache
def dense(case, fisher):
    """(the Fisher, J (N, T, C, parameters), z, w), float64."""
    (objective, params), batch = build(case), batch_for(case)
    w = np.ones(batch["t"].shape)
    if case.masked:
        w = batch["mask"] * batch["weights"].reshape(N, *(1,) * (w.ndim - 1)).astype(np.float64)
    with jax.enable_x64(True):
        theta, unravel = ravel_pytree(jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), params))
        x = jnp.asarray(batch["x"]) if case.tokens else jnp.asarray(batch["x"], jnp.float64)
        by_model = lambda p, x: objective.predict(p, {"x": x[None]})[0]
        outputs = lambda theta, x: (case.by_hand or by_model)(unravel(theta), x)
        z, J = jax.jit(jax.vmap(lambda x: (outputs(theta, x), jax.jacobian(outputs)(theta, x))))(x)
        z, J = (np.asarray(a).reshape(N, -1, C, *a.shape[a.ndim - i :]) for i, a in enumerate((z, J)))
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    w, t = w.reshape(N, -1), batch["t"].reshape(N, -1)
    if fisher == "exact":
        H = p[..., None] * np.eye(C) - p[..., :, None] * p[..., None, :]
        return np.einsum("nt,ntop,ntoa,ntpb->ab", w, H, J, J, optimize=True) / w.sum()
    g = np.einsum("nt,nto,ntoa->na", np.sqrt(w), p - np.eye(C)[t], J)
    return g.T @ g / w.sum()


def labels(case, kind):
    """For every parameter, in ravel order, the block that it is in."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(build(case)[1]):
        *module, _ = (k.key for k in path)
        copy = np.zeros(leaf.shape, int)
        if module[0] == "blocks":
            copy += np.arange(2).reshape(2, *(1,) * (leaf.ndim - 1))
        unit = np.broadcast_to(np.arange(leaf.shape[-1]), leaf.shape) if kind == "unit" else copy * 0
        if kind == "diagonal":
            unit, module = np.arange(leaf.size).reshape(leaf.shape), [*module, path[-1].key]
        found += [(*module, c, u) for c, u in zip(copy.ravel().tolist(), unit.ravel().tolist(), strict=True)]
    numbers = {label: i for i, label in enumerate(dict.fromkeys(found))}
    return np.array([numbers[label] for label in found])


def close(got, want, tolerance=TOLERANCE):
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@functools.partial(jax.jit, static_argnums=0)
def updated(estimator, objective, params, batch):
    return estimator.update(estimator.init(objective, params), objective, params, batch, KEY)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_blocks_are_those_of_whole_examples(name, fisher):
    case = CASES[name]
    F = dense(case, fisher)
    for kind, make in {"diagonal": DiagonalFisher, "unit": UnitWise, "full": FullBlock}.items():
        block = labels(case, kind)
        found = updated(make(fisher), *build(case), batch_for(case)).as_matrix()
        close(found, np.where(block[:, None] == block[None, :], F, 0))


@pytest.mark.parametrize("name", CASES)
def test_layers_that_are_called_several_times_are_found(name):
    """In loops of Python, scans, and mapped over positions; not in stacks whose copies are called once each."""
    case = CASES[name]
    (objective, params), batch = build(case), jax.tree.map(jnp.asarray, batch_for(case))
    batch = {"x": batch["x"], "t": batch["t"]}
    found = calls.calls_of(objective, params, batch, None, cover(objective, params, "test"), "test")
    assert found.repeated == set(case.repeated)


def test_pieces_of_a_batch_and_of_its_examples():
    """Micro-batches give the same sums."""
    case = CASES["recurrent"]
    (objective, params), batch = build(case), batch_for(case)
    for estimator in (DiagonalFisher("exact"), UnitWise("empirical")):
        whole = updated(estimator, objective, params, batch).as_matrix()
        close(updated(estimator, objective.with_microbatch(2), params, batch).as_matrix(), whole)


def test_a_sampled_fisher_is_the_exact_one_in_expectation():
    case, estimator = CASES["tied"], DiagonalFisher("sampled")
    (objective, params), batch = build(case), batch_for(case)
    start = estimator.init(objective, params)
    draw = jax.jit(jax.vmap(lambda key: estimator.update(start, objective, params, batch, key).values["table"]))
    found = draw(jax.random.split(KEY, 4000))["embedding"].mean(0)
    want = np.diag(dense(case, "exact")).reshape(C, D)
    np.testing.assert_allclose(found, want, rtol=0, atol=0.05 * want.max())


def test_kfac_counts_calls_as_positions():
    """Expand: A is the mean over all rows of all calls, G the sum over calls of an example; and EKFAC's scales, and
    blocks of norm layers, are those of whole examples."""
    case = CASES["shared"]
    (objective, params), batch = build(case), batch_for(case)
    w = batch["mask"] * batch["weights"].astype(np.float64)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x, rows = batch["x"].astype(np.float64), []
    for copy in range(2):
        rows.append([])
        for _ in range(2):
            a = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["blocks"]["norm"]["scale"][copy]
            rows[-1].append(np.concatenate([a, np.ones((N, 1))], 1))
            x = x + np.tanh(a @ p["blocks"]["linear"]["kernel"][copy] + p["blocks"]["linear"]["bias"][copy])
    A, _ = (c := updated(KFAC("empirical"), objective, params, batch)).pair(c.factors, "blocks/linear")
    want = [sum(np.einsum("n,ni,nj->ij", w, a, a) for a in copy) / (2 * w.sum()) for copy in rows]
    close(A, np.array(want))
    F, block = dense(case, "empirical"), labels(case, "unit")
    norm = np.array([leaf for path, leaf in _indices(params) if path[-2] == "norm"])[0].ravel()
    inside = np.where(block[:, None] == block[None, :], F, 0)[np.ix_(norm, norm)]
    close(np.asarray(c.as_matrix())[np.ix_(norm, norm)], inside)
    S = updated(KFAC("empirical", inverse="ekfac"), objective, params, batch).scales["blocks/linear"]
    kernel, bias = (
        next(leaf for path, leaf in _indices(params) if path[-2:] == ("linear", name)) for name in ("kernel", "bias")
    )
    diagonal = np.diag(F)  # the first basis is that of the parameters
    close(S, np.concatenate([diagonal[kernel], diagonal[bias][:, None]], 1))


def _indices(params):
    """[(path, the places of its entries in ravel order)] of the parameters."""
    flat, unravel = ravel_pytree(params)
    places = unravel(jnp.arange(flat.size, dtype=flat.dtype))
    return [
        (tuple(k.key for k in path), np.asarray(leaf, int))
        for path, leaf in jax.tree_util.tree_leaves_with_path(places)
    ]


@pytest.mark.parametrize("scale_every", [1, 2])
def test_scales_of_several_calls_are_taken_when_they_are_due(scale_every):
    estimator = KFAC("empirical", inverse="ekfac", scale_every=scale_every)
    (objective, params), batch = build(CASES["shared"]), batch_for(CASES["shared"])
    once = updated(estimator, objective, params, batch)
    again = jax.jit(estimator.update)(once, objective, params, {**batch, "x": 2 * batch["x"]}, KEY)
    same = np.array_equal(once.scales["blocks/linear"], again.scales["blocks/linear"])
    assert same == (scale_every == 2)


def test_batch_norm_has_no_gradients_of_single_examples():
    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.a, self.norm = nnx.Linear(D, D, rngs=rngs), nnx.BatchNorm(D, rngs=rngs)

        def __call__(self, x):
            return self.a(self.norm(self.a(x)))

    objective, params = Objective.from_model(
        Normed(nnx.Rngs(0)), lambda m, b: m(b["x"]), losses.SoftmaxCrossEntropy("t")
    )
    with pytest.raises(ValueError, match=r"DiagonalFisher: what is measured of a needs the gradient of one example"):
        updated(DiagonalFisher(), objective, params, batch_for(CASES["once"]))
    updated(KFAC("empirical"), objective, params, batch_for(CASES["once"]))  # its factors count calls


# -- padding -----------------------------------------------------------------------------------------------------------


class Tagger(nnx.Module):
    def __init__(self, rngs, cell, bidirectional=False):
        make = lambda: nnx.RNN(cell(D, 2, rngs=rngs), rngs=rngs)
        self.rnn = nnx.Bidirectional(make(), make(), rngs=rngs) if bidirectional else make()
        self.head = nnx.Linear(4 if bidirectional else 2, C, rngs=rngs)

    def __call__(self, x, lengths):
        return self.head(self.rnn(x, seq_lengths=lengths))


@functools.cache
def tagger(kind):
    cell = {"lstm": nnx.OptimizedLSTMCell, "simple": nnx.SimpleCell}.get(kind, nnx.GRUCell)
    model = Tagger(nnx.Rngs(0), cell, kind == "both ways")
    return Objective.from_model(model, lambda m, b: m(b["x"], b["lengths"]), losses.SoftmaxCrossEntropy("t"))


def padded(fill):
    rng = np.random.default_rng(3)
    lengths = np.array([1, TIME, 2, TIME, 1])
    real = np.arange(TIME)[None] < lengths[:, None]
    x = np.where(real[..., None], rng.normal(size=(N, TIME, D)), fill).astype(np.float32)
    return {"x": x, "t": rng.integers(0, C, (N, TIME)).astype(np.int32), "lengths": lengths, "mask": real}


@pytest.mark.parametrize("kind", ["gru", "lstm", "simple", "both ways"])
@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
def test_padding_changes_no_factor(kind, fisher):
    objective, params = tagger(kind)
    for make in (KFAC, KroneckerDiagonal):
        clean, other = (updated(make(fisher), objective, params, padded(fill)).factors for fill in (0.0, 30.0))
        jax.tree.map(close, other, clean)


def test_the_rows_of_a_cell_are_those_of_real_positions():
    (objective, params), batch = tagger("gru"), padded(5.0)
    c = updated(KFAC("empirical"), objective, params, batch)
    A, _ = c.pair(c.factors, "rnn/cell/dense_i")
    rows = batch["x"][batch["mask"]].astype(np.float64)
    if A.shape[-1] == D + 1:
        rows = np.concatenate([rows, np.ones((len(rows), 1))], 1)
    close(A[0], rows.T @ rows / len(rows))


def test_where_no_gradient_arrives_all_rows_count():
    """A head that starts at zero: whether a row matters cannot be seen, and A is not zero for it."""
    (objective, params), batch = tagger("gru"), padded(5.0)
    params = {**params, "head": jax.tree.map(jnp.zeros_like, params["head"])}
    c = updated(KFAC("empirical"), objective, params, batch)
    A, _ = c.pair(c.factors, "rnn/cell/dense_i")
    rows = batch["x"].reshape(-1, D).astype(np.float64)
    close(A[0][:D, :D], rows.T @ rows / len(rows))
