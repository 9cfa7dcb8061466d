"""The objective as a function of some of its parameters, and outputs that are trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from curvtrain import losses
from curvtrain.curvature import products
from curvtrain.objective import Objective, by_path, nested, path_name

N = 7
RNG = np.random.default_rng(3)
BATCH = {
    "x": jnp.asarray(RNG.normal(size=(N, 3)), jnp.float32),
    "label": jnp.asarray(RNG.integers(0, 4, N), jnp.int32),
    "size": jnp.asarray(RNG.normal(size=N), jnp.float32),
}


class Heads(nnx.Module):
    """Two heads, and a count that is no number to differentiate."""

    def __init__(self, rngs):
        self.body = nnx.Linear(3, 5, rngs=rngs)
        self.kind, self.size = nnx.Linear(5, 4, rngs=rngs), nnx.Linear(5, 1, rngs=rngs)

    def __call__(self, x):
        h = nnx.tanh(self.body(x))
        return {"kind": self.kind(h), "count": jnp.arange(len(x)), "size": (self.size(h)[:, 0],)}


class Both(losses.Loss):
    """Cross-entropy of one head plus half the squared error of the other."""

    def values(self, outputs, batch):
        logp = jax.nn.log_softmax(outputs["kind"])
        error = outputs["size"][0] - batch["size"]
        return 0.5 * error**2 - jnp.take_along_axis(logp, batch["label"][:, None], 1)[:, 0]


def make(**options):
    return Objective.from_model(Heads(nnx.Rngs(0)), lambda model, batch: model(batch["x"]), Both(), **options)


def plain_values(p, batch):
    """The losses of `Heads`, from the formulas."""
    h = jnp.tanh(batch["x"] @ p["body"]["kernel"] + p["body"]["bias"])
    z = h @ p["kind"]["kernel"] + p["kind"]["bias"]
    size = (h @ p["size"]["kernel"] + p["size"]["bias"])[:, 0]
    logp = z - jax.scipy.special.logsumexp(z, axis=1, keepdims=True)
    picked = jnp.sum(logp * (batch["label"][:, None] == jnp.arange(4)), 1)
    return 0.5 * (size - batch["size"]) ** 2 - picked, jnp.concatenate([z, size[:, None]], 1)


def dense(p, batch):
    """(loss, gradient, Hessian, GGN, empirical Fisher) in float64, in the order of `ravel_pytree`."""
    with jax.enable_x64(True):
        wide = lambda t: jax.tree.map(lambda a: np.asarray(a, np.float64) if a.dtype == jnp.float32 else a, t)
        flat, unravel = ravel_pytree(wide(p))
        batch = wide(batch)
        mean = lambda v: jnp.mean(plain_values(unravel(v), batch)[0])
        J = jax.jacobian(lambda v: plain_values(unravel(v), batch)[1])(flat)  # (N, 5, n)
        z = plain_values(unravel(flat), batch)[1]
        prob = jax.nn.softmax(z[:, :4])
        H = jnp.zeros((N, 5, 5)).at[:, 4, 4].set(1.0)
        H = H.at[:, :4, :4].set(jax.vmap(jnp.diag)(prob) - prob[:, :, None] * prob[:, None, :])
        G = jnp.einsum("nci,ncd,ndj->ij", J, H, J) / N
        g = jax.jacobian(lambda v: plain_values(unravel(v), batch)[0])(flat)
        found = mean(flat), jax.grad(mean)(flat), jax.hessian(mean)(flat), G, g.T @ g / N
        return [np.asarray(a) for a in found]


@pytest.mark.parametrize("microbatch", [None, 3])
def test_outputs_of_several_heads_with_integers_among_them(microbatch):
    objective, params = make(microbatch=microbatch)
    loss, gradient, H, G, F = dense(params, BATCH)
    value, grads, _, _ = objective.value_and_grad(params, BATCH)
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    np.testing.assert_allclose(ravel_pytree(grads)[0], gradient, rtol=1e-5, atol=1e-6)
    flat, unravel = ravel_pytree(params)
    v = np.random.default_rng(0).normal(size=flat.size)
    vector = unravel(jnp.asarray(v, jnp.float32))
    fvp = lambda *arguments: products.fvp(*arguments, fisher="empirical")
    for product, matrix in ((products.hvp, H), (products.ggnvp, G), (fvp, F)):
        got = ravel_pytree(product(objective, params, vector, BATCH))[0]
        np.testing.assert_allclose(got, matrix @ v, rtol=1e-4, atol=1e-5)
    gram = products.ggn_gram(objective, params, (vector, params), BATCH)
    both = np.stack([v, np.asarray(flat, np.float64)])
    np.testing.assert_allclose(gram, both @ G @ both.T, rtol=1e-4, atol=1e-5)


def test_what_is_observed_is_the_outputs_as_they_are():
    objective, params = make()
    seen = objective.value_and_grad(params, BATCH, observe=lambda outputs, piece: outputs)[3]
    assert seen["count"].dtype == jnp.int32 and seen["kind"].shape == (1, N, 4)


def test_some_of_the_parameters():
    """Values and derivatives are the whole's, the others stay as they are, and a second selection narrows the first."""
    objective, params = make()
    kernels = [path for path in by_path(params) if path[-1] == "kernel"]
    part, own = objective.select(params, kernels)
    assert list(by_path(own)) == kernels
    np.testing.assert_allclose(part.loss(own, BATCH), objective.loss(params, BATCH), rtol=1e-6)
    whole = by_path(objective.value_and_grad(params, BATCH)[1])
    for path, g in by_path(part.value_and_grad(own, BATCH)[1]).items():
        np.testing.assert_allclose(g, whole[path], rtol=1e-5, atol=1e-7)
    zero = lambda path, leaf: leaf if path[-1] == "kernel" else jnp.zeros_like(leaf)
    vector = nested({path: zero(path, leaf) for path, leaf in by_path(params).items()})
    Hv = by_path(products.hvp(objective, params, vector, BATCH))
    for path, h in by_path(products.hvp(part, own, own, BATCH)).items():
        np.testing.assert_allclose(h, Hv[path], rtol=1e-4, atol=1e-6)
    one, alone = part.select(own, kernels[:1])
    np.testing.assert_allclose(one.loss(alone, BATCH), objective.loss(params, BATCH), rtol=1e-6)
    assert part.module(own).body.bias[...].shape == (5,)
    assert objective.select(params, list(by_path(params))) == (objective, params)


def test_some_of_the_parameters_of_a_plain_loss():
    params = (jnp.ones(2), {"b": jnp.arange(3.0)})
    objective = Objective.from_loss(lambda p, batch: jnp.sum(p[0]) * jnp.sum(p[1]["b"] ** 2) + batch)
    part, own = objective.select(params, [(1, "b")])
    assert own == {1: {"b": params[1]["b"]}}
    np.testing.assert_allclose(part.loss(own, jnp.float32(1)), 2 * 5 + 1)
    np.testing.assert_allclose(part.value_and_grad(own, jnp.float32(1))[1][1]["b"], 4 * params[1]["b"])


def test_other_variables_than_those_that_are_trained_are_frozen():
    objective, params = make(wrt=nnx.All(nnx.Param, nnx.PathContains("kind")))
    assert sorted(map(path_name, by_path(params))) == ["kind/bias", "kind/kernel"]
    assert sorted(map(path_name, by_path(objective.frozen))) == ["body/bias", "body/kernel", "size/bias", "size/kernel"]
    whole, everything = make()
    np.testing.assert_allclose(objective.loss(params, BATCH), whole.loss(everything, BATCH), rtol=1e-6)
    moved = objective.with_frozen(jax.tree.map(lambda a: 0 * a, objective.frozen))
    assert not np.allclose(moved.loss(params, BATCH), whole.loss(everything, BATCH))


def test_vectors_in_other_containers():
    objective, params = make()
    state = nnx.state(Heads(nnx.Rngs(0)), nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, objective.like_parameters(state), params)
    with pytest.raises(ValueError, match=r"other parameters.*kind/bias.*Objective\.select\(params, paths\)"):
        objective.like_parameters({"body": params["body"]})


def test_a_selection_of_nothing_or_of_strangers():
    objective, params = make()
    with pytest.raises(ValueError, match=r"Objective\.select\(paths\) should name parameters.*at least one"):
        objective.select(params, [])
    with pytest.raises(ValueError, match=r"\['head/kernel'\] are none"):
        objective.select(params, [("head", "kernel")])
    with pytest.raises(ValueError, match=r"no trainable variables.*'body/bias'.*are of type nnx\.Param"):
        make(wrt=nnx.LoRAParam)
