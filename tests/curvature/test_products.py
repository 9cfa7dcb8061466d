"""Matrix-free products against dense matrices, put together in float64 from derivatives by autodiff.

Per example: outputs z_i, J_i = dz_i/dtheta, K_i = d^2 z_i/dtheta^2, r_i = dl/dz_i, H_i = d^2 l/dz_i^2, g_i = J_i^T r_i.

    H = sum_i w_i (J_i^T H_i J_i + r_i K_i) / W,   G = sum_i w_i J_i^T H_i J_i / W,   F = sum_i w_i g_i g_i^T / W
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from curvtrain import losses
from curvtrain.curvature import products, trees
from curvtrain.objective import Objective

N, TIME, D, HIDDEN, OUTPUTS = 6, 3, 3, 4, 3
# Matrices with entries of order 0.1 to 1, sums of N terms in float32: the worst error measured in this file is 2e-7.
CLOSE = dict(rtol=1e-6, atol=1e-6)


class MLP(nnx.Module):
    def __init__(self, rngs, **options):
        self.a = nnx.Linear(D, HIDDEN, rngs=rngs, **options)
        self.b = nnx.Linear(HIDDEN, OUTPUTS, rngs=rngs, **options)

    def __call__(self, x):
        return self.b(nnx.tanh(self.a(x)))


def outputs_of(p, x):
    """`MLP` by hand."""
    return jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"]["kernel"] + p["b"]["bias"]


def softmax_loss(z, t):
    return jnp.log(jnp.sum(jnp.exp(z))) - z[t]


def sigmoid_loss(z, t):
    p = 1 / (1 + jnp.exp(-z))
    return -jnp.sum(t * jnp.log(p) + (1 - t) * jnp.log(1 - p))


def squared_loss(z, t):
    return jnp.sum((z - t) ** 2) / 2


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss, what it is for one example, and whether its examples are positions of a sequence."""

    loss: losses.Loss
    value: object
    sequence: bool = False
    masked: bool = False

    @property
    def shape(self):
        return (N, TIME) if self.sequence else (N,)


CASES = {
    "softmax": Case(losses.SoftmaxCrossEntropy("t"), softmax_loss),
    "softmax, masked": Case(losses.SoftmaxCrossEntropy("t"), softmax_loss, masked=True),
    "softmax, masked sequence": Case(losses.SoftmaxCrossEntropy("t"), softmax_loss, sequence=True, masked=True),
    "sigmoid": Case(losses.SigmoidCrossEntropy("t"), sigmoid_loss),
    "sigmoid, masked sequence": Case(
        losses.SigmoidCrossEntropy("t", sequence=True), sigmoid_loss, sequence=True, masked=True
    ),
    "squared": Case(losses.SquaredError("t"), squared_loss, masked=True),
    "squared, sequence": Case(losses.SquaredError("t", sequence=True), squared_loss, sequence=True),
}
cases = pytest.mark.parametrize("name", CASES)


def targets_for(case, rng):
    if case.value is softmax_loss:
        return rng.integers(0, OUTPUTS, case.shape).astype(np.int32)
    t = rng.random((*case.shape, OUTPUTS)) if case.value is sigmoid_loss else rng.normal(size=(*case.shape, OUTPUTS))
    return t.astype(np.float32)


def batch_for(case):
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(*case.shape, D)).astype(np.float32), "t": targets_for(case, rng)}
    if case.masked:
        batch["mask"] = np.arange(np.prod(case.shape)).reshape(case.shape) % 3 != 1
        batch["weights"] = np.linspace(0.5, 2, N).astype(np.float32)
    return batch


def weights_for(case, batch):
    w = np.ones(case.shape)
    if case.masked:
        w = batch["mask"] * batch["weights"].astype(np.float64).reshape((N,) + (1,) * (len(case.shape) - 1))
    return w.ravel()


@functools.cache
def build(loss, microbatch=None, dtype=jnp.float32):
    model = MLP(nnx.Rngs(0), param_dtype=dtype)
    return Objective.from_model(model, lambda model, batch: model(batch["x"]), loss, microbatch=microbatch)


def in_float64(function, *args):
    with jax.enable_x64(True):
        args = [np.asarray(a, np.float64) if a.dtype.kind == "f" else a for a in args]
        return jax.tree.map(np.asarray, function(*args))


@functools.partial(jax.jit, static_argnums=2)
def derivatives_of_outputs(theta, x, unravel):
    z = lambda theta: outputs_of(unravel(theta), x)
    return z(theta), jax.jacobian(z)(theta), jax.hessian(z)(theta)  # (i, o), (i, o, n), (i, o, n, n)


@functools.partial(jax.jit, static_argnums=2)
def derivatives_of_values(z, t, value):
    return jax.vmap(jax.grad(value))(z, t), jax.vmap(jax.hessian(value))(z, t)  # (i, o), (i, o, p)


unravel = ravel_pytree(jax.tree.map(lambda a: np.zeros(a.shape), build(losses.SquaredError("t"))[1]))[1]


def dense(case, params, batch, targets=None):
    """{"hessian", "ggn", "outer"} in float64: the last is the outer products of the gradients for these targets."""
    t, w = batch["t"] if targets is None else targets, weights_for(case, batch)
    theta = np.concatenate([np.ravel(np.asarray(a, np.float64)) for a in jax.tree.leaves(params)])
    z, J, K = in_float64(lambda theta, x: derivatives_of_outputs(theta, x, unravel), theta, batch["x"].reshape(-1, D))
    t = t.reshape(len(z), *t.shape[len(case.shape) :])
    r, H = in_float64(lambda z, t: derivatives_of_values(z, t, case.value), z, t)
    g = np.einsum("io,ion->in", r, J)
    G = np.einsum("i,iom,iop,ipn->mn", w, J, H, J, optimize=True)
    return {
        "hessian": (G + np.einsum("i,io,iomn->mn", w, r, K)) / np.sum(w),
        "ggn": G / np.sum(w),
        "outer": np.einsum("i,im,in->mn", w, g, g) / np.sum(w),
    }


@dataclasses.dataclass(frozen=True)
class Rigged(losses.Loss):
    """A loss whose samples are an entry of the batch: the reference can use the same ones."""

    inner: losses.Loss

    def values(self, outputs, batch):
        return self.inner.values(outputs, batch)

    def sample_targets(self, outputs, batch, key):
        return {**batch, "t": batch["drawn"]}


fvp = {fisher: functools.partial(products.fvp, fisher=fisher) for fisher in products.FISHERS}
PRODUCTS = {"hessian": products.hvp, "ggn": products.ggnvp, **fvp}


@functools.partial(jax.jit, static_argnums=0)
def matrices_of(names, objective, params, batch, key=None):
    matrix = lambda product: products.as_matrix(lambda v: product(objective, params, v, batch, key), params)
    return {name: matrix(PRODUCTS[name]) for name in names}


@functools.cache
def compared(name):
    """{product: (matrix of the product, dense reference)} for a case."""
    case = CASES[name]
    batch, drawn = batch_for(case), targets_for(case, np.random.default_rng(1))
    (objective, params), (rigged, _) = build(case.loss), build(Rigged(case.loss))
    got = matrices_of(("hessian", "ggn", "exact", "empirical"), objective, params, batch)
    got |= matrices_of(("sampled",), rigged, params, {**batch, "drawn": drawn}, jax.random.key(0))
    want = dense(case, params, batch)
    want = {
        "hessian": want["hessian"],
        "ggn": want["ggn"],
        "exact": want["ggn"],
        "empirical": want["outer"],
        "sampled": dense(case, params, batch, drawn)["outer"],
    }
    return {product: (got[product], want[product]) for product in got}


@pytest.mark.parametrize("product", PRODUCTS)
@cases
def test_products_are_those_of_the_dense_matrix(name, product):
    got, want = compared(name)[product]
    np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize("name", ["softmax, masked", "sigmoid", "squared"])
def test_sampled_fisher_is_exact_in_expectation(name):
    """The mean of F v over many keys, within five of its own standard errors in every component."""
    case = CASES[name]
    (objective, params), batch = build(case.loss), batch_for(case)
    v = jax.tree.map(jnp.ones_like, params)
    many = jax.jit(jax.vmap(lambda key: ravel_pytree(fvp["sampled"](objective, params, v, batch, key))[0]))
    draws = np.asarray(many(jax.random.split(jax.random.key(0), 4000)), np.float64)
    error = draws.std(0) / np.sqrt(len(draws))
    matrices = dense(case, params, batch)
    z_exact, z_empirical = (np.abs(draws.mean(0) - matrices[m].sum(1)) / error for m in ("ggn", "outer"))
    assert np.max(z_exact) < 5
    assert np.max(z_empirical) > 20  # and it would have told the empirical Fisher from it


def test_the_matrices_differ():
    """So that a product that computes another one's matrix would be noticed."""
    wanted = {name: want for name, (_, want) in compared("softmax").items() if name != "exact"}
    for a, b in itertools.combinations(wanted, 2):
        assert np.abs(wanted[a] - wanted[b]).max() > 0.01, (a, b)
    assert np.linalg.eigvalsh(compared("softmax")["ggn"][0]).min() > -1e-6 > np.linalg.eigvalsh(wanted["hessian"]).min()


@pytest.mark.parametrize("microbatch", [2, 4])  # 4 leaves a remainder
def test_pieces(microbatch):
    case = CASES["softmax, masked sequence"]
    (objective, params), batch = build(Rigged(case.loss)), batch_for(case)
    batch["drawn"] = targets_for(case, np.random.default_rng(1))
    v = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), params)
    names = ("hessian", "ggn", "sampled", "empirical")
    run = lambda objective: {name: PRODUCTS[name](objective, params, v, batch, jax.random.key(0)) for name in names}
    for name, got in jax.jit(run)(objective.with_microbatch(microbatch)).items():
        want = compared("softmax, masked sequence")[name][1] @ np.asarray(ravel_pytree(v)[0], np.float64)
        np.testing.assert_allclose(ravel_pytree(got)[0], want, **CLOSE)


def test_pieces_draw_targets_of_their_own():
    """Identical examples in two pieces: equal keys would give equal gradients, hence a matrix of rank one."""
    objective, params = build(losses.SquaredError("t"), microbatch=1)
    batch = jax.tree.map(lambda a: np.repeat(a[:1], 4, axis=0), batch_for(Case(losses.SquaredError("t"), squared_loss)))
    F = matrices_of(("sampled",), objective, params, batch, jax.random.key(0))["sampled"]
    values = np.linalg.eigvalsh(F)[::-1]
    assert values[1] > 1e-2 * values[0]


def test_the_key_fixes_the_draw():
    objective, params = build(losses.SquaredError("t"))
    batch = batch_for(Case(losses.SquaredError("t"), squared_loss))
    matrices = [matrices_of(("sampled",), objective, params, batch, jax.random.key(s))["sampled"] for s in (0, 0, 1)]
    np.testing.assert_array_equal(matrices[0], matrices[1])
    assert not np.array_equal(matrices[0], matrices[2])


def test_matrices_are_in_the_order_of_ravel_pytree():
    """d^2/dtheta^2 of sum_ab (a b)^2 has blocks 2 b^2, 4 a b, 2 a^2, which are all different."""
    params = {"z": jnp.asarray([[1.0, 2.0]]), "a": jnp.float32(3.0), "m": [jnp.asarray([4.0]), jnp.asarray([5.0])]}
    theta = ravel_pytree(params)[0]
    np.testing.assert_array_equal(theta, [3, 4, 5, 1, 2])

    def loss(p, batch):
        return jnp.sum(jnp.triu(jnp.outer(ravel_pytree(p)[0], ravel_pytree(p)[0]) ** 2, 1))

    objective = Objective.from_loss(loss)
    H = products.as_matrix(products.matvec("hessian", objective, params, None), params)
    want = 4 * np.outer(theta, theta)
    want[np.diag_indices(5)] = 2 * (np.sum(theta**2) - theta**2)
    np.testing.assert_allclose(H, want, rtol=1e-6)
    basis = jax.vmap(ravel_pytree(params)[1])(jnp.eye(5))
    np.testing.assert_array_equal(trees.matrix(basis), np.eye(5))


def test_as_matrix_keeps_columns_apart():
    """A map that is not symmetric: column j is the image of unit vector j."""
    A = np.arange(9, dtype=np.float32).reshape(3, 3)
    np.testing.assert_array_equal(products.as_matrix(lambda v: jnp.asarray(A) @ v, jnp.zeros(3)), A)


def test_parameters_of_another_dtype_are_read_exactly():
    """Products are those of the parameters' values in float32, whatever the dtype of parameters and vector."""
    case = CASES["softmax"]
    (objective, params), batch = build(case.loss, dtype=jnp.bfloat16), batch_for(case)
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    want = dense(case, params, batch)
    names = {"hessian": "hessian", "ggn": "ggn", "empirical": "outer"}
    run = lambda params: {name: PRODUCTS[name](objective, params, params, batch) for name in names}
    v = np.asarray(ravel_pytree(params)[0], np.float64)
    for name, got in jax.jit(run)(params).items():
        assert {a.dtype for a in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
        np.testing.assert_allclose(ravel_pytree(got)[0], want[names[name]] @ v, **CLOSE)


def test_a_model_that_computes_in_bfloat16():
    """Outputs, Jacobians and output Hessians in bfloat16, sums and results in float32: 2e-2 relative, at worst 9e-3."""
    case = CASES["softmax, masked"]
    model = MLP(nnx.Rngs(0), dtype=jnp.bfloat16)
    objective, params = Objective.from_model(model, lambda model, batch: model(batch["x"]), case.loss, microbatch=4)
    batch, v = batch_for(case), np.asarray(ravel_pytree(params)[0], np.float64)
    names = {"hessian": "hessian", "ggn": "ggn", "empirical": "outer"}
    run = lambda params: {name: PRODUCTS[name](objective, params, params, batch) for name in names}
    for name, got in jax.jit(run)(params).items():
        want = dense(case, params, batch)[names[name]] @ v
        assert {a.dtype for a in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
        np.testing.assert_allclose(ravel_pytree(got)[0], want, rtol=0, atol=2e-2 * np.abs(want).max())


def test_batch_norm_products_see_the_whole_batch():
    """With batch statistics an output depends on every example, and J with it."""

    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(D, OUTPUTS, rngs=rngs)
            self.norm = nnx.BatchNorm(OUTPUTS, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.a(x))

    predict = lambda model, batch: model(batch["x"])
    objective, params = Objective.from_model(Normed(nnx.Rngs(0)), predict, losses.SquaredError("t"))
    batch = batch_for(Case(losses.SquaredError("t"), squared_loss))
    shapes, unravel = jax.tree.flatten(params)
    ends = np.cumsum([a.size for a in shapes])[:-1]
    theta = np.concatenate([np.ravel(a) for a in shapes])

    def z_of(theta, x):
        p = unravel.unflatten([a.reshape(b.shape) for a, b in zip(jnp.split(theta, ends), shapes, strict=True)])
        a = x @ p["a"]["kernel"] + p["a"]["bias"]
        return (a - a.mean(0)) / jnp.sqrt(a.var(0) + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]

    J = in_float64(jax.jit(jax.jacobian(z_of)), theta, batch["x"]).reshape(-1, len(theta))
    # entries up to 2 after a division by standard deviations: the worst error measured is 1e-6
    got = matrices_of(("ggn",), objective, params, batch)["ggn"]
    np.testing.assert_allclose(got, J.T @ J / N, **CLOSE)


def test_a_loss_of_ones_own():
    """PerExample: Hessian, GGN and empirical Fisher by differentiation, no other Fisher."""
    case = Case(
        losses.PerExample(lambda z, batch: jnp.sum((z - batch["t"]) ** 4, -1)), lambda z, t: jnp.sum((z - t) ** 4)
    )
    (objective, params), batch = build(case.loss), batch_for(case)
    got, want = matrices_of(("hessian", "ggn", "empirical"), objective, params, batch), dense(case, params, batch)
    for product, name in (("hessian", "hessian"), ("ggn", "ggn"), ("empirical", "outer")):
        # fourth powers reach the hundreds: errors relative to the largest entry, 4e-7 at worst
        np.testing.assert_allclose(got[product], want[name], rtol=0, atol=1e-6 * np.abs(want[name]).max())
    with pytest.raises(TypeError, match=r"fisher='exact'\) knows.*not of PerExample. Use ggnvp, or fisher='empirical'"):
        fvp["exact"](objective, params, params, batch)
    with pytest.raises(TypeError, match="PerExample cannot be sampled"):
        fvp["sampled"](objective, params, params, batch, jax.random.key(0))


# -- errors at the edge ----------------------------------------------------------------------------------------------


def test_loss_only_objectives_have_a_hessian_and_nothing_else():
    objective = Objective.from_loss(lambda p, batch: jnp.sum(p**3))
    p = jnp.asarray([1.0, 2.0])
    np.testing.assert_allclose(products.hvp(objective, p, jnp.ones(2), None), [6, 12])
    for product, name in ((products.ggnvp, "ggnvp"), (products.fvp, "fvp"), (fvp["empirical"], "fvp")):
        with pytest.raises(
            TypeError, match=rf"{name} needs the model's outputs.*from_loss.*Use hvp, or Objective.from_model"
        ):
            product(objective, p, p, None)


def test_unknown_names_come_with_a_suggestion():
    objective, params = build(losses.SquaredError("t"))
    with pytest.raises(ValueError, match=r"fvp\(fisher\) should be one of .*'emprical'. Did you mean 'empirical'\?"):
        products.fvp(objective, params, params, {}, fisher="emprical")
    with pytest.raises(
        ValueError, match=r"product should be one of 'hessian', 'ggn', not 'hesian'. Did you mean 'hessian'\?"
    ):
        products.matvec("hesian", objective, params, {})


def test_sampling_needs_a_key():
    case = CASES["squared"]
    objective, params = build(case.loss)
    with pytest.raises(ValueError, match=r"fvp\(fisher='sampled'\) draws targets.*needs a key"):
        products.fvp(objective, params, params, batch_for(case), fisher="sampled")
