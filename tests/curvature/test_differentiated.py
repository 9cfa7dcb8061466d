"""Models whose outputs are derivatives of their layers, and batches of groups of unequal length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from curvtrain import Objective, losses
from curvtrain.curvature import KFAC, PSGD, DiagonalFisher, FullBlock, Lanczos, UnitWise, products

N = 8
x = np.linspace(-1, 1, N, dtype=np.float32)[:, None]
BATCH = {"x": x, "target": np.sin(3 * x)}
KEY = jax.random.key(0)


class Field(nnx.Module):
    """A scalar field u(x) of two layers."""

    def __init__(self, rngs):
        self.hidden, self.readout = nnx.Linear(1, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.readout(jnp.tanh(self.hidden(x)))


def by_hessian(model, batch):
    return jax.vmap(jax.hessian(lambda x: model(x[None])[0, 0]))(batch["x"])[:, 0]


def by_gradient(model, batch):
    return jax.grad(lambda x: jnp.sum(model(x)))(batch["x"])


def by_nnx(model, batch):
    return nnx.grad(lambda m, x: jnp.sum(m(x)), argnums=1)(model, batch["x"])


def by_jvp(model, batch):
    return jax.jvp(model, (batch["x"],), (jnp.ones_like(batch["x"]),))[1]


def by_remat(model, batch):
    return jax.grad(jax.checkpoint(lambda x: jnp.sum(model(x))))(batch["x"])


def by_scan(model, batch):
    slope = lambda carry, x: (carry, jax.grad(lambda x: model(x[None])[0, 0])(x))
    return jax.lax.scan(slope, 0.0, batch["x"])[1]


def with_the_field(model, batch):
    return model(batch["x"]) + by_gradient(model, batch)


PREDICTIONS = [by_hessian, by_gradient, by_nnx, by_jvp, by_remat, by_scan, with_the_field]


def field(predict):
    return Objective.from_model(Field(nnx.Rngs(0)), predict, losses.SquaredError())


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("kind", [KFAC, UnitWise])
def test_layers_that_are_differentiated_are_named(predict, kind):
    objective, params = field(predict)
    estimator = kind("empirical")
    start = estimator.init(objective, params)
    message = rf"{kind.__name__}: .*derivatives of hidden, readout, .*Lanczos .*PSGD .*plain='hidden\|readout'"
    with pytest.raises(ValueError, match=message):
        estimator.update(start, objective, params, BATCH, KEY)


def test_the_layers_that_are_left_are_added_to_those_that_are_plain():
    objective, params = field(by_gradient)
    estimator = KFAC("exact", plain="hidden")
    start = estimator.init(objective, params)
    with pytest.raises(ValueError, match=r"derivatives of readout, .*plain='hidden/bias\|hidden/kernel\|readout'"):
        estimator.update(start, objective, params, BATCH, KEY)


class Branched(nnx.Module):
    """A field, and a layer beside it that is not differentiated."""

    def __init__(self, rngs):
        self.field, self.beside = Field(rngs), nnx.Linear(1, 1, rngs=rngs)


def test_a_layer_that_is_not_differentiated_keeps_its_block():
    predict = lambda model, batch: by_gradient(model.field, batch) + model.beside(batch["x"])
    objective, params = Objective.from_model(Branched(nnx.Rngs(0)), predict, losses.SquaredError())
    estimator = KFAC("exact", plain="field")
    found = estimator.update(estimator.init(objective, params), objective, params, BATCH, KEY)
    u = np.concatenate([np.ones((N, 1)), x], axis=1).astype(np.float64)
    got = np.asarray(found.as_matrix())[:2, :2]  # "beside" comes before "field"
    np.testing.assert_allclose(got, u.T @ u / N, rtol=1e-5, atol=1e-7)  # the mean of x is zero, up to rounding
    with pytest.raises(ValueError, match="derivatives of field/hidden, field/readout, as"):
        KFAC("exact").update(KFAC("exact").init(objective, params), objective, params, BATCH, KEY)


def reference(predict, params):
    """(the Jacobian of the outputs, the Hessian of the loss), dense and in float64, in the order of `ravel_pytree`."""
    with jax.enable_x64(True):
        double = lambda tree: jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), tree)
        flat, tree = ravel_pytree(double(params))
        batch = double(BATCH)

        def net(p):
            return lambda x: (
                jnp.tanh(x @ p["hidden"]["kernel"] + p["hidden"]["bias"]) @ p["readout"]["kernel"]
                + (p["readout"]["bias"])
            )

        outputs = lambda v: predict(net(tree(v)), batch)[:, 0]
        loss = lambda v: 0.5 * jnp.mean((outputs(v) - batch["target"][:, 0]) ** 2)
        return np.asarray(jax.jacfwd(outputs)(flat)), np.asarray(jax.hessian(loss)(flat))


@pytest.mark.parametrize("predict", [by_hessian, by_gradient, by_jvp])
def test_what_the_error_names_works(predict):
    """Products, Lanczos and the exact diagonal of per-example gradients, against dense float64."""
    objective, params = field(predict)
    J, H = reference(predict, params)
    scale = np.abs(H).max()
    for product, want in ((products.hvp, H), (products.ggnvp, J.T @ J / N)):
        got = products.as_matrix(lambda v, product=product: product(objective, params, v, BATCH), params)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * scale)
    lanczos = Lanczos(k=2, m=len(H))
    values = lanczos.refresh(lanczos.init(objective, params), objective, params, BATCH, KEY).values
    np.testing.assert_allclose(values, np.linalg.eigvalsh(H)[::-1][:2], rtol=1e-3)
    diagonal = DiagonalFisher("exact", plain=".*")
    found = diagonal.update(diagonal.init(objective, params), objective, params, BATCH, KEY)
    got = ravel_pytree(found.diagonal())[0]
    np.testing.assert_allclose(got, np.mean(J**2, axis=0), rtol=1e-4, atol=1e-6 * scale)


# -- groups of unequal length ------------------------------------------------------------------------------------------

INTERIOR, BOUNDARY = x, np.array([[-1.0], [1.0], [0.5]], np.float32)
GROUPS = {"interior": {"x": INTERIOR}, "boundary": {"x": BOUNDARY}}


def of_groups(model, batch):
    """u'' inside, and u at the boundary."""
    return {"interior": by_hessian(model, batch["interior"])[:, 0], "boundary": model(batch["boundary"]["x"])[:, 0]}


def residuals(outputs, batch):
    return jnp.concatenate([0.5 * outputs["interior"] ** 2, 2.0 * outputs["boundary"] ** 2])


def groups(microbatch=None):
    return Objective.from_model(Field(nnx.Rngs(0)), of_groups, losses.PerExample(residuals), microbatch=microbatch)


def test_groups_of_unequal_length_go_through_products_and_lanczos():
    objective, params = groups()
    with jax.enable_x64(True):
        double = lambda tree: jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), tree)
        flat, tree = ravel_pytree(double(params))
        batch = double(GROUPS)

        def outputs(v):
            p = tree(v)
            net = lambda x: (
                jnp.tanh(x @ p["hidden"]["kernel"] + p["hidden"]["bias"]) @ p["readout"]["kernel"]
                + (p["readout"]["bias"])
            )
            return of_groups(net, batch)

        mean = lambda v: jnp.mean(residuals(outputs(v), batch))
        value, H = np.asarray(mean(flat)), np.asarray(jax.hessian(mean)(flat))
        J = jax.tree.map(np.asarray, jax.jacfwd(outputs)(flat))
    total = N + len(BOUNDARY)
    G = (J["interior"].T @ J["interior"] + 4 * J["boundary"].T @ J["boundary"]) / total
    np.testing.assert_allclose(objective.loss(params, GROUPS), value, rtol=1e-5)
    for product, want in ((products.hvp, H), (products.ggnvp, G)):
        got = products.as_matrix(lambda v, product=product: product(objective, params, v, GROUPS), params)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(H).max())
    loss_only = Objective.from_loss(lambda p, batch: objective.loss(p, batch))
    for these in (objective, loss_only):
        lanczos = Lanczos(k=2, m=len(H))
        values = lanczos.refresh(lanczos.init(these, params), these, params, GROUPS, KEY).values
        np.testing.assert_allclose(values, np.linalg.eigvalsh(H)[::-1][:2], rtol=1e-3)
    psgd = PSGD()
    fitted = psgd.update(psgd.init(objective, params), objective, params, GROUPS, KEY)
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(fitted.apply(params)))


def test_what_needs_examples_refuses_groups_of_unequal_length():
    objective, params = groups()
    message = (
        r"should have one common length.*'boundary.x': 3, 'interior.x': 8.*Lanczos or PSGD.*rows of the same arrays"
    )
    for kind in (KFAC, DiagonalFisher, FullBlock):
        estimator = kind("empirical")
        start = estimator.init(objective, params)
        with pytest.raises(ValueError, match=message):
            estimator.update(start, objective, params, GROUPS, KEY)
    with pytest.raises(ValueError, match=message):
        groups(microbatch=4)[0].loss(params, GROUPS)
    with pytest.raises(
        TypeError, match=r"fvp\(fisher='empirical'\) needs outputs that begin with the shape \(11,\).*ggnvp"
    ):
        products.fvp(objective, params, params, GROUPS, fisher="empirical")
