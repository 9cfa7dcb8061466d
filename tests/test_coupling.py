"""Losses of one example that depend on others: they are found, and refused where they would be another loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from curvtrain import losses
from curvtrain.curvature import KFAC, DiagonalFisher, fvp, ggnvp
from curvtrain.objective import Objective

N, D, C = 8, 3, 4


class Two(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(D, C, rngs=rngs), nnx.Linear(D, C, rngs=rngs)


def both(model, batch):
    return model.a(batch["x"]), model.b(batch["x"])


def logits(model, batch):
    return model.a(batch["x"])


def entropy(z, t):
    return -jnp.take_along_axis(jax.nn.log_softmax(z), t[:, None], axis=1)[:, 0]


def contrast(outputs, batch):
    left, right = outputs
    return -jnp.diag(jax.nn.log_softmax(left @ right.T))


def supervised(z, batch):
    """Pairs of one class attract each other, those of different classes repel."""
    same = (batch["t"][:, None] == batch["t"][None]) & ~jnp.eye(len(z), dtype=bool)
    return jnp.sum(jnp.where(same, -1.0, 1.0) * jax.nn.log_sigmoid(z @ z.T), axis=1)


def other_classes(z, batch):
    """Only examples of other classes are looked at."""
    apart = batch["t"][:, None] != batch["t"][None]
    return jnp.sum(jnp.where(apart, z @ z.T, 0.0), axis=1)


def balanced(outputs, batch):
    return entropy(outputs["z"], batch["t"]) + 1e-2 * outputs["load"]


def per_batch(z, batch):
    return entropy(z, batch["t"]) / len(z)


def hardest(z, batch):
    return entropy(z, batch["t"]) + jnp.max(z)


def with_load(model, batch):
    z = model.a(batch["x"])
    return {"z": z, "load": jnp.sum(jnp.mean(jax.nn.softmax(z), axis=0) ** 2)}


def with_size(model, batch):
    return {"z": model.a(batch["x"]), "load": jnp.sum(model.b.kernel[...] ** 2)}


def similarity(model, batch):
    return model.a(batch["x"]) @ model.b(batch["x"]).T


def of_z(values):
    return losses.PerExample(values)


COUPLED = {
    "in-batch negatives": (both, of_z(contrast), r"PerExample\(contrast\)"),
    "classes": (logits, of_z(supervised), r"PerExample\(supervised\)"),
    "other classes alone": (logits, of_z(other_classes), r"PerExample\(other_classes\)"),
    "load balancing": (with_load, of_z(balanced), r"PerExample\(balanced\)"),
    "size of the batch": (logits, of_z(per_batch), "or on their number"),
    "a maximum": (logits, of_z(hardest), r"PerExample\(hardest\)"),
    "similarities": (similarity, losses.SoftmaxCrossEntropy("t"), r"shape \((8, 8|4, 4)\) for a batch of"),
    "similarities, own loss": (similarity, of_z(lambda z, b: -jnp.diag(z)), r"shape \((8, 8|4, 4)\) for a batch of"),
}
APART = {
    "labels": (logits, losses.SoftmaxCrossEntropy("t")),
    "own loss": (logits, of_z(lambda z, batch: entropy(z, batch["t"]))),
    "two outputs": (both, of_z(lambda z, batch: entropy(z[0] + z[1], batch["t"]))),
    "weights": (logits, of_z(lambda z, batch: entropy(z, batch["t"]) * batch["weights"])),
    "a load that is not used": (with_load, of_z(lambda z, batch: entropy(z["z"], batch["t"]))),
    "a penalty among the outputs": (with_size, of_z(balanced)),
    "as many classes as examples": (lambda m, b: jnp.tile(m.a(b["x"]), 2), losses.SoftmaxCrossEntropy("t")),
    "not for these batches": (logits, of_z(lambda z, batch: entropy(z, batch["t"]).reshape(N))),
}


@functools.cache
def built(name):
    predict, loss, *_ = (COUPLED | APART)[name]
    return Objective.from_model(Two(nnx.Rngs(0)), predict, loss)


def batch_of():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, D)).astype(np.float32)
    return {"x": x, "t": rng.integers(0, C, N).astype(np.int32), "weights": np.ones(N, np.float32)}


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_losses_are_refused_in_pieces(name):
    (objective, params), batch = built(name), batch_of()
    assert np.isfinite(objective.loss(params, batch))
    for jitted in (False, True):
        pieces = objective.with_microbatch(N // 2)
        of = jax.jit(pieces.value_and_grad) if jitted else pieces.value_and_grad
        with pytest.raises(ValueError, match=rf"(?s)Objective\(microbatch=4\) would walk.*{COUPLED[name][2]}"):
            of(params, batch)


@pytest.mark.parametrize("name", [name for name in COUPLED if name != "similarities"])
def test_coupled_losses_have_no_statistics_of_single_examples(name):
    (objective, params), batch = built(name), batch_of()
    for estimator in (KFAC("empirical"), DiagonalFisher("empirical")):
        with pytest.raises(ValueError, match=rf"{estimator.name} takes statistics of single examples, but"):
            estimator.update(estimator.init(objective, params), objective, params, batch, None)
    with pytest.raises(ValueError, match=r"fvp\(fisher='empirical'\) takes gradients of single examples, but"):
        fvp(objective, params, params, batch, fisher="empirical")


@pytest.mark.parametrize("name", APART)
def test_other_losses_are_not_taken_for_coupled(name):
    (objective, params), batch = built(name), batch_of()
    assert objective.coupling(params, batch) == ""


def test_products_of_a_coupled_loss_are_those_of_the_whole():
    """H_l is a full matrix over the batch, and ggnvp takes it as it is."""
    (objective, params), batch = built("in-batch negatives"), batch_of()
    z, pull = jax.vjp(lambda p: objective.predict(p, batch), params)
    v = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), params)
    Jv = jax.jvp(lambda p: objective.predict(p, batch), (params,), (v,))[1]
    mean = lambda z: jnp.mean(contrast(z, batch))
    want = pull(jax.jvp(jax.grad(mean), (z,), (Jv,))[1])[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ggnvp(objective, params, v, batch), want)


def test_the_trial_is_made_once():
    (objective, params), batch = built("own loss"), batch_of()
    calls = []

    def counted(z, batch):
        calls.append(len(z))
        return entropy(z, batch["t"])

    objective, params = Objective.from_model(Two(nnx.Rngs(0)), logits, losses.PerExample(counted), microbatch=4)
    assert objective.coupling(params, batch) == objective.coupling(params, batch) == ""
    first = len(calls)
    objective.coupling(params, jax.tree.map(lambda a: a[:6], batch))
    assert len(calls) == first and set(calls) == {2, 4}
