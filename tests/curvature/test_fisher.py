"""Fisher blocks against dense Fishers, put together in float64 from per-example derivatives by autodiff.

Per example n with positions t: outputs z_nt, J_nt = dz_nt/dtheta, H_nt = d^2 l/dz_nt^2, g_n = sum_t w_nt^(1/2) J_nt^T
dl/dz_nt.

    exact: sum_nt w_nt J_nt^T H_nt J_nt / W,    sampled, empirical: sum_n g_n g_n^T / W

Every estimator holds the entries of that matrix whose two parameters are in one block, and zero elsewhere.
"""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import AbstractMesh, PartitionSpec

from curvtrain import losses
from curvtrain._keys import Purpose, fold
from curvtrain.curvature import KFAC, DiagonalFisher, FullBlock, KroneckerDiagonal, UnitWise
from curvtrain.curvature import mesh as curvature_mesh
from curvtrain.curvature.kfac.factors import matrices_of
from curvtrain.curvature.mesh import axes_for, spec_for
from curvtrain.objective import Objective

N, TIME, OUTPUTS = 6, 4, 3
KEY = jax.random.key(5)
ESTIMATORS = {"diagonal": DiagonalFisher, "unit": UnitWise, "full": FullBlock, "kronecker": KroneckerDiagonal}
AVERAGED = {"diagonal": "values", "unit": "blocks", "full": "blocks", "kronecker": "factors"}
FISHERS = ("exact", "sampled", "empirical")


ROUNDING = 4e-6  # of two cases whose error depends on the processor's tanh: up to 2.3e-6 where they were measured


def assert_close(ours, reference, tolerance=1e-6):
    """Within `tolerance` of the reference's largest entry."""
    reference = np.asarray(reference, np.float64)
    assert np.abs(reference).max() > 0
    np.testing.assert_allclose(ours, reference, rtol=0, atol=tolerance * np.abs(reference).max())


# -- models ------------------------------------------------------------------------------------------------------------


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, OUTPUTS, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.tanh(self.a(x)))


class Grouped(nnx.Module):
    """A convolution of two groups, with strides, and one without bias."""

    def __init__(self, rngs):
        self.a = nnx.Conv(4, 6, (2, 3), strides=(2, 1), feature_group_count=2, rngs=rngs)
        self.b = nnx.Conv(6, OUTPUTS, (1, 2), padding="VALID", use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.tanh(self.a(x))).mean((1, 2))


class Normed(nnx.Module):
    """LayerNorm over positions and BatchNorm with running averages."""

    def __init__(self, rngs):
        self.a, self.layer = nnx.Linear(3, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
        self.batch, self.b = nnx.BatchNorm(4, use_running_average=True, rngs=rngs), nnx.Linear(4, OUTPUTS, rngs=rngs)
        for norm in (self.layer, self.batch):
            norm.scale[...] = jnp.linspace(0.5, 1.5, 4)
            norm.bias[...] = jnp.linspace(-0.5, 0.5, 4)
        self.batch.mean[...], self.batch.var[...] = jnp.linspace(-1, 1, 4), jnp.linspace(0.5, 2, 4)

    def __call__(self, x):
        return self.b(nnx.tanh(self.batch(self.layer(self.a(x)))).mean(1))


class Tokens(nnx.Module):
    """Few tokens, so that they repeat within an example; the mean over the past couples the positions."""

    def __init__(self, rngs):
        self.table, self.head = nnx.Embed(4, 3, rngs=rngs), nnx.Linear(3, OUTPUTS, rngs=rngs)

    def __call__(self, x):
        h = jnp.tanh(self.table(x))
        return self.head(jnp.cumsum(h, axis=1) / jnp.arange(1, TIME + 1, dtype=h.dtype)[:, None])


class Plain(nnx.Module):
    """Parameters of the model's own."""

    def __init__(self, rngs):
        self.a, self.scale = nnx.Linear(3, OUTPUTS, rngs=rngs), nnx.Param(jnp.linspace(0.5, 1.5, 3))
        self.mix = nnx.Param(jnp.linspace(-1, 1, 9).reshape(3, 3))

    def __call__(self, x):
        return jnp.tanh(self.a(jnp.sin(x * self.scale[...]))) @ self.mix[...]


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(3, 3, rngs=rngs), nnx.RMSNorm(3, rngs=rngs)

    def __call__(self, x):
        return x + nnx.tanh(self.linear(self.norm(x)))


class Scanned(nnx.Module):
    """Layers stacked by `nnx.vmap`, applied by `nnx.scan`."""

    def __init__(self, rngs):
        stack = nnx.split_rngs(splits=2)(nnx.vmap(Block))
        self.blocks, self.head = stack(rngs), nnx.Linear(3, OUTPUTS, rngs=rngs)

    def __call__(self, x):
        return self.head(
            nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        )


def softmax(z, t):
    return jnp.log(jnp.sum(jnp.exp(z))) - z[t]


def sigmoid(z, t):
    return jnp.sum(jnp.log1p(jnp.exp(z)) - t * z)


def squared(z, t):
    return jnp.sum((z - t) ** 2) / 2


LOSSES = {
    softmax: losses.SoftmaxCrossEntropy("t"),
    sigmoid: losses.SigmoidCrossEntropy("t"),
    squared: losses.SquaredError("t"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, the loss of one example, shapes, groups of the layers of which not all outputs are one group."""

    model: type
    value: types.FunctionType
    inputs: tuple = (3,)
    sequence: bool = False
    masked: bool = False
    groups: int = 1

    @property
    def examples(self):
        return (N, TIME) if self.sequence else (N,)


CASES = {
    "mlp, masked": Case(Mlp, softmax, masked=True),
    "grouped convolution": Case(Grouped, squared, inputs=(4, 3, 4), groups=2),
    "norms": Case(Normed, sigmoid, inputs=(2, 3)),
    "tokens, masked sequence": Case(Tokens, softmax, sequence=True, masked=True),
    "plain parameters, masked": Case(Plain, softmax, masked=True),
    "scanned": Case(Scanned, squared),
}
cases = pytest.mark.parametrize("name", CASES)


def batch_for(case, seed=0):
    rng = np.random.default_rng(seed)
    if case.sequence:
        batch = {"x": rng.integers(0, 4, (N, TIME)).astype(np.int32)}
        assert any(len(set(row)) < TIME for row in batch["x"].tolist())
    else:
        batch = {"x": rng.normal(size=(N, *case.inputs)).astype(np.float32)}
    batch["t"] = {
        softmax: lambda: rng.integers(0, OUTPUTS, case.examples).astype(np.int32),
        sigmoid: lambda: rng.integers(0, 2, (*case.examples, OUTPUTS)).astype(np.float32),
        squared: lambda: rng.normal(size=(*case.examples, OUTPUTS)).astype(np.float32),
    }[case.value]()
    if case.masked:
        batch["mask"] = np.arange(np.prod(case.examples)).reshape(case.examples) % 3 != 1
        batch["weights"] = np.linspace(0.5, 2, N).astype(np.float32)
    return batch


@functools.cache
def build(case, microbatch=None):
    predict = lambda model, batch: model(batch["x"])
    return Objective.from_model(case.model(nnx.Rngs(0)), predict, LOSSES[case.value], microbatch=microbatch)


# -- references --------------------------------------------------------------------------------------------------------


@functools.cache
def derivatives(name, second=False):
    """In float64, per position of every example: z, J = dz/dtheta, and K = d^2 z/dtheta^2 if `second`."""
    case = CASES[name]
    (objective, params), x = build(case), batch_for(case)["x"]
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), params)
        theta, unravel = ravel_pytree(wide)
        x = jnp.asarray(x, jnp.float64) if x.dtype.kind == "f" else x
        outputs = lambda theta, x: objective.predict(unravel(theta), {"x": x[None]})[0]
        ways = [outputs, jax.jacobian(outputs), jax.hessian(outputs)][: 3 if second else 2]
        of = jax.jit(jax.vmap(lambda theta, x: [way(theta, x) for way in ways], (None, 0)))
        found = [np.asarray(a) for a in of(theta, x)]
    assert all(a.dtype == np.float64 for a in found)
    return [a.reshape(N, -1, OUTPUTS, *a.shape[a.ndim - i :]) for i, a in enumerate(found)]


def weights_of(case, batch):
    if not case.masked:
        return np.ones((N, 1))
    w = batch["mask"] * batch["weights"].astype(np.float64).reshape((N,) + (1,) * (len(case.examples) - 1))
    return w.reshape(N, -1)


def sampled_targets(case, batch):
    """(drawn for the batch as a whole, drawn for plain parameters, which see one example at a time)."""
    objective, params = build(case)
    draw = lambda z, batch, key: LOSSES[case.value].sample_targets(z, batch, fold(key, Purpose.TARGETS))["t"]
    z = objective.predict(params, batch, KEY)
    one = lambda z, example, key: draw(z[None], jax.tree.map(lambda a: a[None], example), key)[0]
    return draw(z, batch, KEY), jax.vmap(one)(z, batch, jax.random.split(fold(KEY, Purpose.EXAMPLES), N))


def dense(name, fisher):
    """The whole Fisher, or Hessian, as the module's docstring has it."""
    case, batch = CASES[name], batch_for(CASES[name])
    if fisher != "sampled":
        return matrix_for(name, fisher, batch["t"])
    own = np.array([len(path) == 1 for path, leaf in leaves_of(case) for _ in range(leaf.size)])
    F, one_by_one = (matrix_for(name, fisher, targets) for targets in sampled_targets(case, batch))
    return np.where(own, one_by_one, F)


def matrix_for(name, fisher, targets):
    case = CASES[name]
    w, (z, J, *K) = weights_of(case, batch_for(case)), derivatives(name, fisher == "hessian")
    targets = np.asarray(targets)
    targets = targets.reshape(N, -1) if case.value is softmax else targets.reshape(N, -1, OUTPUTS).astype(np.float64)
    with jax.enable_x64(True):
        over = lambda f: np.asarray(jax.jit(jax.vmap(jax.vmap(f)))(z, targets))
        r, H = over(jax.grad(case.value)), over(jax.hessian(case.value))
    if fisher in ("exact", "hessian"):
        F = np.einsum("nt,ntop,ntoa,ntpb->ab", w, H, J, J, optimize=True)
        F += sum(np.einsum("nt,nto,ntoab->ab", w, r, k) for k in K)
    else:
        g = np.einsum("nt,nto,ntoa->na", np.sqrt(w), r, J)
        F = g.T @ g
    return F / w.sum()


def leaves_of(case):
    """[(path, leaf)] of the parameters, in ravel order."""
    found = jax.tree_util.tree_leaves_with_path(build(case)[1])
    return [(tuple(k.key for k in path), leaf) for path, leaf in found]


def labels(case, kind):
    """For every parameter, in ravel order, the block that it is in."""
    found = []
    for (*module, name), leaf in leaves_of(case):
        stacked = module[:1] == ["blocks"]
        copy = np.zeros(leaf.shape, int)
        if stacked:
            copy += np.arange(2).reshape(2, *(1,) * (leaf.ndim - 1))
        unit = np.broadcast_to(np.arange(leaf.shape[-1]), leaf.shape)
        if not module or kind == "diagonal":  # a parameter of the model's own has a diagonal
            module, unit = [*module, name], np.arange(leaf.size)
        elif kind == "full":
            unit = unit // (leaf.shape[-1] // case.groups) if module == ["a"] else 0 * unit
        found += [(*module, s, u) for s, u in zip(copy.ravel().tolist(), unit.ravel().tolist(), strict=True)]
    numbers = {label: i for i, label in enumerate(dict.fromkeys(found))}
    return np.array([numbers[label] for label in found])


def within(case, kind, F):
    """F inside of the blocks, zero elsewhere."""
    block = labels(case, kind)
    return np.where(block[:, None] == block[None, :], F, 0)


# -- our side ----------------------------------------------------------------------------------------------------------


def estimators(fisher, **options):
    return {kind: make(fisher, uncovered="diagonal", **options) for kind, make in ESTIMATORS.items()}


@functools.partial(jax.jit, static_argnums=0)
def _estimate(estimators, objective, params, batches):
    found = []
    for estimator in estimators:
        curvature = estimator.init(objective, params)
        for batch in batches:
            curvature = estimator.update(curvature, objective, params, batch, KEY)
        curvature = estimator.refresh(curvature, objective, params, batches[-1], KEY)
        found.append((curvature, curvature.as_matrix()))
    return found


def estimate(estimators, case, *, seeds=(0,), microbatch=None):
    """{kind: (curvature after an update for every seed's batch and a refresh, as a matrix)}, in one program."""
    objective, params = build(case, microbatch)
    found = _estimate(tuple(estimators.values()), objective, params, [batch_for(case, seed) for seed in seeds])
    return {kind: (c, np.asarray(C)) for kind, (c, C) in zip(estimators, found, strict=True)}


@jax.jit
def applied(curvatures, vector, dampings):
    """For each: C v, and (C + damping I)^exponent v for exponents -1 (twice) and -1/2 over the dampings."""
    flat = lambda tree: ravel_pytree(tree)[0]

    def of(c):
        ways = (c.solve, lambda v, d: c.power(v, d, -1.0), lambda v, d: c.power(v, d, -0.5))
        return flat(c.matvec(vector)), *(jax.lax.map(lambda d, w=w: flat(w(vector, d)), dampings) for w in ways)

    return {kind: of(c) for kind, c in curvatures.items()}


def normal(name):
    """A random vector like the parameters of a case, as a tree and flat in float64."""
    flat, unravel = ravel_pytree(build(CASES[name])[1])
    v = np.random.default_rng(0).normal(size=flat.size).astype(np.float32)
    return unravel(jnp.asarray(v)), v.astype(np.float64)


# -- against the dense matrices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", FISHERS)
@cases
def test_blocks_of_the_dense_fisher(name, fisher):
    """The factors of `KroneckerDiagonal` are the diagonals of those of K-FAC, which have references of their own."""
    case = CASES[name]
    found = estimate(estimators(fisher) | {"kfac": KFAC(fisher, uncovered="diagonal")}, case)
    F = dense(name, fisher)
    for kind in ("diagonal", "unit", "full"):
        assert_close(found[kind][1], within(case, kind, F), ROUNDING if name == "scanned" else 1e-6)
    (ours, C), (kfac, of_kfac) = found["kronecker"], found["kfac"]
    for layer in matrices_of(ours.coverage):
        A, G = kfac.pair(kfac.factors, layer.name)
        assert_close(ours.factors[layer.name]["A"], np.einsum("kii->ki", A))
        assert_close(ours.factors[layer.name]["G"], np.einsum("kii->ki", G))
    assert_close(C, np.diag(np.diag(of_kfac)))


@pytest.mark.parametrize("name", ["mlp, masked", "grouped convolution", "tokens, masked sequence", "scanned"])
def test_blocks_of_the_dense_hessian(name):
    """Indefinite, and solved for all the same: nothing is clipped, so a damping above it all has powers."""
    case = CASES[name]
    curvature, C = estimate({"full": FullBlock("hessian")}, case)["full"]
    H = within(case, "full", dense(name, "hessian"))
    assert_close(C, H)
    (vector, v), (values, Q) = normal(name), np.linalg.eigh(H)
    assert values.min() < -1e-3
    of_matrix = lambda function: Q @ (function(values) * (Q.T @ v))
    above, below = max(3.0, 3.0 - values.min()), 1e-3 - values.min() / 2  # the second leaves negative eigenvalues
    _, solved, _, root = applied({"full": curvature}, vector, jnp.array([above, below]))["full"]
    for ours, damping in zip(solved, (above, below), strict=True):
        condition = np.abs(values).max() / np.abs(values + damping).min()
        assert_close(ours, of_matrix(lambda x, d=damping: 1 / (x + d)), 1e-6 * max(1.0, condition))
    assert_close(root[0], of_matrix(lambda x: (x + above) ** -0.5), ROUNDING)
    assert not np.all(np.isfinite(root[1]))
    assert_close(curvature.logdet(above), np.log(np.abs(values + above)).sum())
    assert_close(ravel_pytree(curvature.diagonal())[0], np.diag(H))


@pytest.mark.parametrize("fisher", FISHERS)
def test_kronecker_diagonal_of_an_mlp_by_hand(fisher):
    """diag(A) = mean of a^2 over the rows, diag(G) = sum of s^2 over W."""
    name = "mlp, masked"
    case, params = CASES[name], build(CASES[name])[1]
    curvature, _ = estimate({"kronecker": KroneckerDiagonal(fisher)}, case)["kronecker"]
    batch = batch_for(case)
    w, p = weights_of(case, batch)[:, 0], jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = batch["x"].astype(np.float64)
    F = ravel_pytree(params)[1](np.diag(dense(name, fisher)).astype(np.float32))
    for layer, a in (("a", x), ("b", np.tanh(x @ p["a"]["kernel"] + p["a"]["bias"]))):
        assert_close(curvature.factors[layer]["A"][0], w @ np.concatenate([a, np.ones((N, 1))], axis=1) ** 2 / w.sum())
        assert_close(curvature.factors[layer]["G"][0], F[layer]["bias"])  # a is 1 there, so D_n is s


# -- over batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fisher"), [("tokens, masked sequence", "exact"), ("plain parameters, masked", "empirical")]
)
def test_microbatches_give_what_one_piece_gives(name, fisher):
    """Pieces of 4 of 6 examples: a full one and a rest. One update, so the average moves once."""
    pieces = estimate(estimators(fisher), CASES[name], microbatch=4)
    whole = estimate(estimators(fisher), CASES[name])
    for kind in ESTIMATORS:
        assert_close(pieces[kind][1], whole[kind][1])
        W = weights_of(CASES[name], batch_for(CASES[name])).sum()
        np.testing.assert_allclose([pieces[kind][0].weight, whole[kind][0].weight], W, rtol=1e-6)


def test_average_is_debiased():
    """After three batches of one weight: (e^2 C_0 + e C_1 + C_2) / (e^2 + e + 1); each factor by itself."""
    case, e = CASES["mlp, masked"], 0.6
    share, W = np.array([e**2, e, 1]) / (e**2 + e + 1), weights_of(case, batch_for(case)).sum()
    ours = estimate(estimators("empirical", ema=e), case, seeds=(0, 1, 2))
    last = estimate(estimators("empirical", ema=0.0), case, seeds=(0, 2))
    each = [estimate(estimators("empirical"), case, seeds=(seed,)) for seed in (0, 1, 2)]
    for kind, field in AVERAGED.items():
        leaves = lambda found, kind=kind, field=field: jax.tree.leaves(getattr(found[kind][0], field))
        for got, *xs in zip(leaves(ours), *map(leaves, each), strict=True):
            assert_close(got, np.tensordot(share, np.array(xs, np.float64), 1))
        np.testing.assert_allclose(ours[kind][0].weight, W * (e**2 + e + 1), rtol=1e-6)
        assert_close(last[kind][1], each[2][kind][1])


@functools.partial(jax.jit, static_argnums=0)
def updated(estimators, curvatures, objective, params, batch):
    return {k: e.update(curvatures[k], objective, params, batch, KEY) for k, e in estimators}


@functools.partial(jax.jit, static_argnums=0)
def first_update(estimators, objective, params, batch):
    return {k: e.update(e.init(objective, params), objective, params, batch, KEY) for k, e in estimators}


def test_a_pass_over_a_data_set_in_ragged_batches_gives_its_mean():
    """With ema=1: batches of two examples and of four, masked and weighted, are worth what their weights are."""
    case = CASES["mlp, masked"]
    (objective, params), data = build(case), batch_for(case)
    of = tuple((estimators("empirical", ema=1.0) | {"kfac": KFAC("empirical", ema=1.0)}).items())
    whole = first_update(of, objective, params, data)
    cut = lambda some: jax.tree.map(lambda a: a[some], data)
    parts = first_update(of, objective, params, cut(slice(0, 2)))
    parts = updated(of, parts, objective, params, cut(slice(2, None)))
    for kind, field in (AVERAGED | {"kfac": "factors"}).items():
        jax.tree.map(assert_close, getattr(parts[kind], field), getattr(whole[kind], field))
        np.testing.assert_allclose(parts[kind].weight, weights_of(case, data).sum(), rtol=1e-6)


def test_a_batch_that_is_not_finite_or_all_masked_is_skipped_and_counted():
    case, (objective, params) = CASES["mlp, masked"], build(CASES["mlp, masked"])
    of = tuple((estimators("empirical") | {"hessian": FullBlock("hessian")}).items())
    good = updated(of, {k: e.init(objective, params) for k, e in of}, objective, params, batch_for(case))
    nan, empty = batch_for(case, 1), batch_for(case, 1)
    nan["x"][0, 0] = np.nan
    empty["mask"][:] = False
    after = updated(of, updated(of, good, objective, params, nan), objective, params, empty)
    again = updated(of, after, objective, params, batch_for(case, 1))
    for kind, field in (AVERAGED | {"hessian": "blocks"}).items():
        jax.tree.map(np.testing.assert_array_equal, getattr(after[kind], field), getattr(good[kind], field))
        assert (good[kind].skipped, after[kind].skipped, after[kind].weight) == (0, 2, good[kind].weight)
        assert after[kind].telemetry()["skipped"] == 2
        np.testing.assert_allclose(again[kind].weight, 1.95 * weights_of(case, batch_for(case)).sum(), rtol=1e-6)
        assert again[kind].skipped == 2
        new = jax.tree.leaves(getattr(again[kind], field))
        assert all(np.all(np.isfinite(leaf)) for leaf in new)
        assert not np.array_equal(new[0], jax.tree.leaves(getattr(good[kind], field))[0])


def test_blocks_whose_eigenvectors_are_not_finite_keep_the_last_ones():
    estimator, case = UnitWise("empirical"), CASES["mlp, masked"]
    good, _ = estimate({"unit": estimator}, case)["unit"]
    broken = dataclasses.replace(good, blocks=good.blocks | {"a": 2 * good.blocks["a"].at[1].set(jnp.nan)})
    after = jax.jit(estimator.refresh)(broken, None, None, None, None)
    assert (after.failures, after.refreshes) == (1, good.refreshes + 1)
    np.testing.assert_array_equal(after.vectors["a"][1], good.vectors["a"][1])
    np.testing.assert_array_equal(after.values["a"][1], good.values["a"][1])
    np.testing.assert_allclose(after.values["a"][0], 2 * good.values["a"][0], rtol=1e-5, atol=1e-7)


# -- as a matrix -------------------------------------------------------------------------------------------------------


@cases
def test_matvec_solve_and_power_are_those_of_the_matrix(name):
    found, (vector, v) = estimate(estimators("sampled"), CASES[name]), normal(name)
    dampings = (1e-3, 0.1, 10.0)
    results = applied({kind: c for kind, (c, _) in found.items()}, vector, jnp.array(dampings))
    for kind, (_, C) in found.items():
        values, Q = np.linalg.eigh(C.astype(np.float64))
        assert np.abs(C - C.T).max() <= 1e-6 * values.max() and values.min() > -1e-6 * values.max()
        Cv, solved, inverse, root = results[kind]
        assert_close(Cv, C.astype(np.float64) @ v)
        of_matrix = lambda function, Q=Q: Q @ (function * (Q.T @ v))
        for i, damping in enumerate(dampings):
            damped = np.maximum(values, 0) + damping
            # float32 eigenvalues are right to some 1e-7 of the largest, so (value + damping)^-1 to that over damping
            tolerance = 1e-6 * max(1.0, values.max() / damping)
            assert_close(solved[i], of_matrix(1 / damped), tolerance)
            assert_close(inverse[i], solved[i])
            assert_close(root[i], of_matrix(damped**-0.5), tolerance)


def test_specs_are_those_of_the_parameters():
    objective, params = build(CASES["mlp, masked"])
    specs = jax.tree.map(lambda p: PartitionSpec(None, "fsdp") if p.ndim == 2 else PartitionSpec("fsdp"), params)
    mesh = AbstractMesh((2, 3), ("data", "fsdp"))
    found = DiagonalFisher().partition_specs(DiagonalFisher().init(objective, params), specs, mesh)
    assert found.values == specs and found.weight == found.skipped == PartitionSpec()


def test_blocks_are_split_by_their_number_or_their_rows(monkeypatch):
    objective, params = build(CASES["mlp, masked"])
    mesh = AbstractMesh((2, 3), ("data", "fsdp"))
    for estimator in (UnitWise(), FullBlock()):
        curvature = estimator.init(objective, params)
        small = estimator.partition_specs(curvature, None, mesh)
        assert set(jax.tree.leaves(small, is_leaf=lambda s: isinstance(s, PartitionSpec))) == {PartitionSpec()}
    monkeypatch.setattr(curvature_mesh, "SMALLEST", 1)
    for estimator in (UnitWise(), FullBlock()):
        curvature = estimator.init(objective, params)
        found = estimator.partition_specs(curvature, None, mesh)
        for name, F in curvature.blocks.items():
            axes = [axes_for(mesh.shape, n) for n in F.shape]
            position = next((i for i, found in enumerate(axes) if found), None)
            want = PartitionSpec() if position is None else spec_for(axes[position], position)
            assert found.blocks[name] == found.vectors[name] == want
        assert found.weight == found.refreshes == PartitionSpec()
    assert any(spec != PartitionSpec() for spec in found.blocks.values())


# -- errors ------------------------------------------------------------------------------------------------------------


def test_blocks_larger_than_allowed_say_what_to_do():
    objective, params = build(CASES["mlp, masked"])
    with pytest.raises(ValueError, match=r"FullBlock: Linear 'a' would have blocks of 16 x 16, more than FullBlock\("):
        FullBlock(largest=15).init(objective, params)
    assert FullBlock(largest=16).init(objective, params).blocks["a"].shape == (1, 16, 16)
    with pytest.raises(ValueError, match=r"UnitWise: Linear 'b' would have blocks of 5 x 5.*UnitWise\(plain='b'\)"):
        UnitWise(largest=4).init(objective, params)
    assert UnitWise(largest=4, plain="b").init(objective, params).blocks["b/kernel"].shape == (12, 1, 1)


@pytest.mark.parametrize("kind", [DiagonalFisher, KroneckerDiagonal, UnitWise, FullBlock])
def test_bad_options(kind):
    name = kind.__name__
    with pytest.raises(ValueError, match=rf"{name}\(fisher\) should be one of .* not 'exat'. Did you mean 'exact'"):
        kind("exat")
    with pytest.raises(ValueError, match=rf"{name}\(ema\) should be at least 0.0 and at most 1.0, not 1.5"):
        kind(ema=1.5)
    with pytest.raises(ValueError, match=rf"{name}\(uncovered\) should be one of 'error', 'diagonal'"):
        kind(uncovered="skip")
    with pytest.raises(TypeError, match=rf"{name} finds the layers of a model, so init\(\) needs the objective"):
        kind().init(None, {})
    loss_only = Objective.from_loss(lambda params, batch: jnp.sum(params["x"] ** 2))
    with pytest.raises(TypeError, match=rf"{name} needs the model's outputs.*Lanczos\(product='hessian'\)"):
        kind().init(loss_only, {"x": jnp.ones(3)})
    if kind in (UnitWise, FullBlock):
        with pytest.raises(TypeError, match=rf"{name}\(largest\) should be an integer"):
            kind(largest=2.5)
    if kind is not FullBlock:
        with pytest.raises(ValueError, match=rf"{name}\(fisher\) should be one of"):
            kind("hessian")


def test_parameters_of_unknown_layers():
    objective, params = build(CASES["plain parameters, masked"])
    for kind in (KroneckerDiagonal, UnitWise, FullBlock):
        with pytest.raises(ValueError, match=rf"(?s){kind.__name__}: 2 parameters belong to no layer.*mix.*scale"):
            kind().init(objective, params)
    DiagonalFisher().init(objective, params)  # a diagonal is exact for any


class TwoKinds(nnx.Module):
    def __init__(self, rngs):
        self.a, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.a(x))


@pytest.mark.parametrize("estimator", [DiagonalFisher(), KroneckerDiagonal(), UnitWise(), FullBlock()], ids=type)
def test_overview_counts_the_bytes_of_the_curvature(estimator):
    model = TwoKinds(nnx.Rngs(0))
    objective, params = Objective.from_model(model, lambda m, b: m(b["x"]), losses.SoftmaxCrossEntropy())
    table = estimator.overview(objective, params)
    assert re.search(r"^a +Linear .*66\.7%$", table, re.M) and re.search(r"^norm +LayerNorm .*33\.3%$", table, re.M)
    leaves = jax.tree.leaves(estimator.init(objective, params))
    arrays = sum(leaf.nbytes for leaf in leaves if leaf.ndim)  # counters are not worth a line
    assert re.search(rf"^total .* {arrays:,} ", table, re.M), (table, arrays)
