"""A penalty of the parameters is a part of the loss in every value, gradient, product and curvature, once.

The reference is float64: derivatives of the penalty by automatic differentiation, those of the mean loss from an
objective without it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from curvtrain import losses
from curvtrain.curvature import KFAC, DiagonalFisher, FullBlock, KroneckerDiagonal, Lanczos, UnitWise, fvp, ggnvp, hvp
from curvtrain.curvature.products import as_matrix, ggn_gram
from curvtrain.objective import Objective

N, D, C = 7, 3, 2
KEY = jax.random.key(1)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.a, self.norm = nnx.Linear(D, 3, rngs=rngs), nnx.LayerNorm(3, rngs=rngs)
        self.b = nnx.Linear(3, C, use_bias=False, rngs=rngs)
        self.shift = nnx.Param(jnp.linspace(-1, 1, D))

    def __call__(self, x):
        return self.b(self.norm(jnp.tanh(self.a(x + self.shift[...]))))


def separable(params):
    """Another coefficient for each array, and not quadratic: its Hessian is diagonal."""
    leaves = jax.tree.leaves(params)
    return sum((i + 1) * 0.1 * jnp.sum(p**2 + 0.1 * jnp.cos(p)) for i, p in enumerate(leaves))


def entangled(params):
    """Its Hessian has entries between all parameters."""
    return separable(params) + 0.05 * sum(jnp.sum(p) for p in jax.tree.leaves(params)) ** 2


@functools.cache
def build(regulariser=None, microbatch=None):
    objective, params = Objective.from_model(
        Model(nnx.Rngs(0)),
        lambda m, b: m(b["x"]),
        losses.SoftmaxCrossEntropy("t"),
        microbatch=microbatch,
        regulariser=regulariser,
    )
    rng = np.random.default_rng(3)
    return objective, jax.tree.map(lambda a: (a + 0.3 * rng.normal(size=a.shape)).astype(np.float32), params)


def batch_of():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, D)).astype(np.float32)
    return {"x": x, "t": rng.integers(0, C, N).astype(np.int32), "mask": np.arange(N) % 4 != 1}


@functools.cache
def penalty(regulariser):
    """(value, gradient, Hessian) at the parameters, float64, in ravel order."""
    with jax.enable_x64(True):
        theta, unravel = ravel_pytree(jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), build()[1]))
        of = lambda theta: regulariser(unravel(theta))
        return tuple(np.asarray(f(theta)) for f in (of, jax.grad(of), jax.hessian(of)))


def close(got, want, tolerance=2e-6):
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


flat = lambda tree: np.asarray(ravel_pytree(tree)[0], np.float64)


@pytest.mark.parametrize("microbatch", [None, 3, 1])
def test_values_gradients_and_products(microbatch):
    """Added once, however many pieces there are and whatever they weigh."""
    (plain, params), (objective, _) = build(microbatch=microbatch), build(entangled, microbatch)
    batch, (value, gradient, H) = batch_of(), penalty(entangled)
    loss, grads, *_ = plain.value_and_grad(params, batch)
    close(objective.loss(params, batch), loss + value)
    close(objective.penalty(params), value)
    got, of, *_ = jax.jit(objective.value_and_grad)(params, batch)
    close(got, loss + value)
    close(flat(of), flat(grads) + gradient)
    close(flat(jax.grad(objective.loss)(params, batch)), flat(grads) + gradient)
    ways = {"hvp": hvp, "ggnvp": ggnvp}
    ways |= {fisher: functools.partial(fvp, fisher=fisher) for fisher in ("exact", "sampled", "empirical")}
    for product in ways.values():
        dense = lambda o, product=product: jax.jit(
            lambda o: as_matrix(lambda v: product(o, params, v, batch, KEY), params)
        )(o)
        close(dense(objective), np.asarray(dense(plain), np.float64) + H)


def test_the_gram_matrix_of_the_quadratic_model():
    (plain, params), (objective, _), batch = build(), build(entangled, 3), batch_of()
    rng = np.random.default_rng(5)
    V = [jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), params) for _ in range(2)]
    rows = np.stack([flat(v) for v in V])
    want = np.asarray(ggn_gram(plain, params, V, batch), np.float64) + rows @ penalty(entangled)[2] @ rows.T
    close(ggn_gram(objective, params, V, batch), want)


def test_without_any_example_the_penalty_is_left():
    (objective, params), batch = build(separable), batch_of()
    loss, grads, *_ = objective.value_and_grad(params, {**batch, "mask": np.zeros(N, bool)})
    close(loss, penalty(separable)[0])
    close(flat(grads), penalty(separable)[1])


def test_a_part_of_the_parameters():
    """The value is that of all; derivatives are with respect to the part."""
    (objective, params), batch = build(entangled), batch_of()
    part, some = objective.select(params, [("a", "kernel"), ("shift",)])
    close(part.loss(some, batch), objective.loss(params, batch))
    chosen = flat(jax.tree.map(jnp.zeros_like, params) | {"a": {"bias": jnp.zeros(3), "kernel": jnp.ones((D, 3))}}) > 0
    shift = flat(jax.tree.map(jnp.zeros_like, params) | {"shift": jnp.ones(D)}) > 0
    H = as_matrix(lambda v: hvp(objective, params, v, batch), params)
    close(as_matrix(lambda v: hvp(part, some, v, batch), some), np.asarray(H)[np.ix_(chosen | shift, chosen | shift)])


def test_frozen_parameters_are_not_penalised():
    seen = []

    def regulariser(params):
        seen.append(jax.tree.map(jnp.shape, params))
        return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

    objective, params = Objective.from_model(
        Model(nnx.Rngs(0)),
        lambda m, b: m(b["x"]),
        losses.SoftmaxCrossEntropy("t"),
        wrt=nnx.PathContains("a"),
        regulariser=regulariser,
    )
    objective.loss(params, batch_of())
    assert all(shapes == {"a": {"bias": (3,), "kernel": (D, 3)}} for shapes in seen)


@pytest.mark.parametrize("microbatch", [None, 3])
def test_loss_only_objectives(microbatch):
    mean = lambda p, batch: jnp.mean((batch @ p["w"]) ** 2)
    plain = Objective.from_loss(mean)
    objective = Objective.from_loss(mean, microbatch=microbatch, regulariser=lambda p: jnp.sum(p["w"] ** 4))
    params, batch = {"w": jnp.array([1.0, -2.0, 0.5])}, batch_of()["x"]
    close(objective.loss(params, batch), plain.loss(params, batch) + np.sum(np.array(params["w"]) ** 4))
    H = as_matrix(lambda v: hvp(plain, params, v, batch), params)
    want = np.asarray(H) + np.diag(12 * np.array(params["w"]) ** 2)
    close(as_matrix(lambda v: hvp(objective, params, v, batch), params), want)


# -- estimators --------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def updated(estimator, objective, params, batch):
    return estimator.update(estimator.init(objective, params), objective, params, batch, KEY)


@pytest.mark.parametrize("microbatch", [None, 3])
@pytest.mark.parametrize("make", [DiagonalFisher, UnitWise, FullBlock])
def test_blocks_that_are_kept_as_they_are_have_its_hessian(make, microbatch):
    estimator = make("empirical", uncovered="diagonal")
    plain = updated(estimator, *build(), batch_of()).as_matrix()
    found = updated(estimator, *build(separable, microbatch), batch_of()).as_matrix()
    close(found, np.asarray(plain, np.float64) + penalty(separable)[2])


def test_the_diagonal_of_an_entangled_penalty_is_right_on_average():
    (objective, params), estimator = build(entangled), DiagonalFisher("empirical")
    start = estimator.init(objective, params)
    draw = jax.jit(jax.vmap(lambda key: estimator.update(start, objective, params, batch_of(), key).diagonal()))
    found = flat(jax.tree.map(lambda a: a.mean(0), draw(jax.random.split(KEY, 3000))))
    want = flat(updated(estimator, *build(), batch_of()).diagonal()) + np.diag(penalty(entangled)[2])
    np.testing.assert_allclose(found, want, rtol=0, atol=0.05 * want.max())


def test_blocks_of_the_hessian_have_all_of_it():
    estimator = FullBlock("hessian", uncovered="diagonal")
    found = np.asarray(updated(estimator, *build(entangled), batch_of()).blocks["a"][0])
    plain = np.asarray(updated(estimator, *build(), batch_of()).blocks["a"][0], np.float64)
    order = _places("a")
    close(found, plain + penalty(entangled)[2][np.ix_(order, order)])


@pytest.mark.parametrize("make", [KFAC, KroneckerDiagonal])
def test_kronecker_factors_leave_it_out(make):
    """Norm layers and parameters without a layer have it."""
    estimator = make("empirical", uncovered="diagonal")
    plain, found = (updated(estimator, *build(r), batch_of()) for r in (None, separable))
    for name in ("a", "b"):
        if make is KFAC:
            jax.tree.map(close, *(c.pair(c.factors, name) for c in (found, plain)))
        else:
            jax.tree.map(close, found.factors[name], plain.factors[name])
    more = flat(jax.tree.map(lambda a, b: a - b, found.diagonal(), plain.diagonal()))
    places = np.concatenate([_places("norm"), _places("shift")])
    close(more[places], np.diag(penalty(separable)[2])[places], 1e-5)


def test_eigenpairs_are_those_of_the_penalised_loss():
    (objective, params), batch = build(entangled), batch_of()
    H = as_matrix(lambda v: hvp(build()[0], params, v, batch), params)
    want = np.linalg.eigvalsh(np.asarray(H, np.float64) + penalty(entangled)[2])[::-1][:2]
    lanczos = Lanczos(k=2, m=len(H))
    found = lanczos.refresh(lanczos.init(objective, params), objective, params, batch, KEY)
    np.testing.assert_allclose(found.values, want, rtol=1e-4)


def _places(module):
    """Where the parameters of a module are in ravel order; of a layer in the order of its matrix, bias last."""
    theta, unravel = ravel_pytree(build()[1])
    places = jax.tree.map(lambda a: np.asarray(a, int), unravel(jnp.arange(theta.size, dtype=theta.dtype)))[module]
    if not isinstance(places, dict):
        return places
    return np.concatenate([places[name].ravel() for name in sorted(places, key=lambda name: name == "bias")])


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("regulariser", "error"),
    [
        (1e-4, r"regulariser\) should be a function of the parameters, such as lambda params: .*, not float"),
        (lambda p: p["shift"], r"regulariser\(params\) should return a scalar.*, not float32 of shape \(3,\)"),
        (lambda p: None, r"regulariser\(params\) should return a scalar.*, not a NoneType"),
        (lambda p: jnp.int32(3), r"regulariser\(params\) should return a scalar.*, not int32 of shape \(\)"),
        (lambda p: p, r"regulariser\(params\) should return a scalar.*, not a dict"),
    ],
)
def test_what_is_no_penalty(regulariser, error):
    with pytest.raises(TypeError, match=error):
        Objective.from_model(
            Model(nnx.Rngs(0)), lambda m, b: m(b["x"]), losses.SoftmaxCrossEntropy("t"), regulariser=regulariser
        )
    if not callable(regulariser):
        with pytest.raises(TypeError, match=r"Objective.from_loss\(regulariser\) should be a function"):
            Objective.from_loss(lambda p, b: 0.0, regulariser=regulariser)
