"""Labels of classes: some that are ignored, probabilities, and labels that no class has."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from curvtrain import Objective, losses
from curvtrain.curvature import KFAC, FullBlock, products

N, TIME, D, C = 5, 3, 3, 4
rng = np.random.default_rng(1)
X = rng.normal(size=(N, TIME, D)).astype(np.float32)
LABELS = rng.permutation(np.arange(N * TIME) % C).reshape(N, TIME).astype(np.int32)
KEY = jax.random.key(0)
CLOSE = dict(rtol=1e-5, atol=1e-6)  # float32 sums of a dozen products of order one


def linear(loss, microbatch=None):
    model = nnx.Linear(D, C, rngs=nnx.Rngs(0))
    return Objective.from_model(model, lambda m, batch: m(batch["x"]), loss, microbatch=microbatch)


def everything(loss, batch, microbatch=None):
    """Losses, gradients, products and curvatures of a linear model, by name."""
    objective, params = linear(loss, microbatch)
    run = lambda f, *args, **kw: jax.jit(lambda p: f(objective, p, *args, **kw))(params)
    found = {"loss": objective.loss(params, batch), "grads": run(Objective.value_and_grad, batch)[1]}
    for name, product in (("hvp", products.hvp), ("ggnvp", products.ggnvp)):
        found[name] = run(product, params, batch)
    for fisher in products.FISHERS:
        found[fisher] = run(products.fvp, params, batch, KEY, fisher=fisher)
        estimator = KFAC(fisher=fisher)
        kfac = estimator.update(estimator.init(objective, params), objective, params, batch, KEY)
        found[f"kfac {fisher}"] = kfac.as_matrix()
    return found


# -- ignored labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "microbatch"), [(-100, None), (-1, 2), (255, None), (0, None), (2, None)])
def test_an_ignored_label_is_a_mask(index, microbatch):
    """Also one that is a class of the model: padding is often class 0."""
    ignored = LABELS == 1
    assert np.any(ignored)
    labels = np.where(ignored, index, np.where(index == LABELS, (index + 1) % C, LABELS)).astype(np.int16)
    ours = {"x": X, "label": labels}
    masked = {"x": X, "label": np.where(ignored, 0, labels), "mask": ~ignored}
    got = everything(losses.SoftmaxCrossEntropy(ignore_index=index), ours, microbatch)
    want = everything(losses.SoftmaxCrossEntropy(), masked, microbatch)
    # the same sums, in programs that are not quite the same
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, want)
    assert np.isfinite(got["loss"]) and np.any(got["kfac sampled"])


def test_ignored_labels_and_a_mask_multiply():
    loss = losses.SoftmaxCrossEntropy(ignore_index=-1)
    labels = np.where(LABELS == 0, -1, LABELS)
    weights = np.linspace(0.5, 2, N).astype(np.float32)
    batch = {"label": labels, "mask": np.arange(N) > 0, "weights": weights}
    want = (labels >= 0) * ((np.arange(N) > 0) * weights)[:, None]
    np.testing.assert_allclose(loss.weights(jnp.zeros((N, TIME, C)), batch), want)


def test_what_is_ignored_has_no_value_and_stays_ignored_when_targets_are_drawn():
    loss, z = losses.SoftmaxCrossEntropy(ignore_index=-100), jnp.zeros((N, TIME, C))
    batch = {"label": np.where(LABELS == 0, -100, LABELS)}
    np.testing.assert_allclose(loss.values(z, batch), np.where(LABELS == 0, 0.0, np.log(C)), rtol=1e-6)
    drawn = loss.sample_targets(z, batch, KEY)
    np.testing.assert_array_equal(drawn["label"] == -100, LABELS == 0)


@pytest.mark.parametrize("index", [1.0, "pad", True])
def test_an_index_that_is_no_label(index):
    with pytest.raises(TypeError, match=r"SoftmaxCrossEntropy\(ignore_index\) should be an integer label or None, not"):
        losses.SoftmaxCrossEntropy(ignore_index=index)


# -- labels of no class ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [-1, -100, C, 10**6])
def test_a_label_of_no_class_shows_in_the_loss_and_its_gradient(label):
    objective, params = linear(losses.SoftmaxCrossEntropy())
    batch = {"x": X, "label": np.where(LABELS == 1, label, LABELS)}
    loss, grads, *_ = jax.jit(objective.value_and_grad)(params, batch)
    assert np.isnan(loss) and all(np.all(np.isnan(g)) for g in jax.tree.leaves(grads))


def test_checks_name_labels_of_no_class_and_what_to_do():
    outputs = jax.ShapeDtypeStruct((N, C), jnp.float32)
    with pytest.raises(ValueError, match=r"from -100 to 3, .* 4 outputs.*\[0, 3\].*ignore_index=-100, or mask it"):
        losses.SoftmaxCrossEntropy().check({"label": np.array([3, -100])}, outputs)
    with pytest.raises(ValueError, match=r"from 0 to 255, .*ignore_index=255"):
        losses.SoftmaxCrossEntropy().check({"label": np.array([0, 255], np.uint8)}, outputs)
    losses.SoftmaxCrossEntropy(ignore_index=255).check({"label": np.array([0, 255], np.uint8)}, outputs)
    with pytest.raises(ValueError, match=r"from -1 to 3"):
        losses.SoftmaxCrossEntropy(ignore_index=-100).check({"label": np.array([3, -1, -100])}, outputs)


def test_labels_that_are_no_integers():
    with pytest.raises(TypeError, match=r"integer class labels, not float32.*argmax.*SigmoidCrossEntropy"):
        losses.SoftmaxCrossEntropy().values(jnp.zeros((N, C)), {"label": np.zeros(N, np.float32)})


# -- probabilities -----------------------------------------------------------------------------------------------------

P = rng.dirichlet(np.ones(C), (N, TIME)).astype(np.float32)


def test_probabilities_as_labels():
    """Value, derivatives and the exact Fisher against float64; one-hot rows are the same as integers."""
    objective, params = linear(losses.SoftmaxCrossEntropy())
    batch = {"x": X, "label": P}
    with jax.enable_x64(True):
        flat, tree = ravel_pytree(jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), params))

        def mean(v):
            z = jnp.asarray(X, jnp.float64) @ tree(v)["kernel"] + tree(v)["bias"]
            return -jnp.mean(jnp.sum(jnp.asarray(P, jnp.float64) * jax.nn.log_softmax(z), -1))

        want, gradient, H = (np.asarray(f(flat)) for f in (mean, jax.grad(mean), jax.hessian(mean)))
    loss, grads, *_ = objective.value_and_grad(params, batch)
    np.testing.assert_allclose(loss, want, **CLOSE)
    np.testing.assert_allclose(ravel_pytree(grads)[0], gradient, **CLOSE)
    as_matrix = lambda product: products.as_matrix(lambda v: product(objective, params, v, batch), params)
    for product in (products.hvp, products.ggnvp, products.fvp):
        np.testing.assert_allclose(as_matrix(product), H, rtol=1e-4, atol=1e-6)
    one_hot = {"x": X, "label": np.eye(C, dtype=np.float32)[LABELS]}
    ours, theirs = (everything(losses.SoftmaxCrossEntropy(), b) for b in (one_hot, {"x": X, "label": LABELS}))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), ours, theirs)


def test_a_class_that_the_model_rules_out_costs_nothing_where_it_is_not_expected():
    z = jnp.asarray([[0.0, 0.0, -jnp.inf]])
    t = np.array([[0.5, 0.5, 0.0]], np.float32)
    value = lambda z: losses.SoftmaxCrossEntropy().values(z, {"label": t})[0]
    np.testing.assert_allclose(value(z), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(value)(z), [[0, 0, 0]], atol=1e-7)


def test_accuracy_of_probabilities_is_that_of_the_likeliest_class():
    z = jnp.asarray(rng.normal(size=(N, TIME, C)), jnp.float32)
    accuracy = losses.SoftmaxCrossEntropy().metrics(z, {"label": P})["accuracy"]
    np.testing.assert_array_equal(accuracy, np.argmax(z, -1) == P.argmax(-1))


@pytest.mark.parametrize("bad", [np.full(C, 0.5), np.array([1.5, -0.5, 0, 0]), np.full(C, np.nan)])
def test_labels_that_are_no_probabilities(bad):
    labels = np.where(np.arange(N)[:, None] == 1, bad, np.full((N, C), 0.25)).astype(np.float32)
    loss, outputs = losses.SoftmaxCrossEntropy(), jax.ShapeDtypeStruct((N, C), jnp.float32)
    assert np.isnan(loss.values(jnp.zeros((N, C)), {"label": labels})).tolist() == [False, True, False, False, False]
    with pytest.raises(ValueError, match=r"labels in the shape of the outputs are probabilities.*add up to 1"):
        loss.check({"label": labels}, outputs)
    loss.check({"label": labels, "mask": np.arange(N) != 1}, outputs)
    half = jnp.asarray(rng.dirichlet(np.ones(C), N), jnp.bfloat16)
    loss.check({"label": np.asarray(half)}, outputs)
    assert np.all(np.isfinite(loss.values(jnp.zeros((N, C)), {"label": half})))


# -- another loss in the place of one ----------------------------------------------------------------------------------


class Tempered(losses.SoftmaxCrossEntropy):
    """Other values, so another Hessian."""

    def values(self, outputs, batch):
        return super().values(outputs / 2.0, batch)


class Mixin:
    """Values that come from a class beside the loss."""

    def values(self, outputs, batch):
        return 2.0 * super().values(outputs, batch)


class Doubled(Mixin, losses.SoftmaxCrossEntropy):
    pass


class Renamed(Tempered):
    """A subclass of such a loss."""


class Restated(losses.SoftmaxCrossEntropy):
    """The same values in other words."""

    def values(self, outputs, batch):
        return super().values(outputs, batch)

    hessian_columns = losses.SoftmaxCrossEntropy.hessian_columns
    sample_targets = losses.SoftmaxCrossEntropy.sample_targets
    hessian_is_fisher = True


class Reported(losses.SoftmaxCrossEntropy):
    """Other metrics and weights, and the same values."""

    def metrics(self, outputs, batch):
        return {}

    def weights(self, outputs, batch):
        return 2.0 * super().weights(outputs, batch)


@dataclasses.dataclass(frozen=True)
class Scaled(losses.SquaredError):
    """A field of a name that a loss could have a method of."""

    factor: float = 3.0

    def values(self, outputs, batch):
        return self.factor * super().values(outputs, batch)

    def hessian_columns(self, outputs):
        return jnp.sqrt(self.factor) * super().hessian_columns(outputs)


ALL = ("exact", "ggn", "sampled", "empirical")


@pytest.mark.parametrize(
    ("loss", "fishers"),
    [
        (losses.SoftmaxCrossEntropy(), ALL),
        (losses.SquaredError(), ALL),
        (losses.SigmoidCrossEntropy(), ALL),
        (Reported(), ALL),
        (Restated(), ALL),
        (Tempered(), ("empirical",)),
        (Doubled(), ("empirical",)),
        (Renamed(), ("empirical",)),
        (Scaled(), ("ggn", "empirical")),
        (losses.PerExample(lambda z, b: z), ("empirical",)),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, losses.Loss) else "",
)
def test_a_loss_says_what_it_can(loss, fishers):
    assert loss.fishers == fishers
    assert loss.weights_are_known == (type(loss) is not Reported)


@pytest.mark.parametrize("loss", [Tempered(), Doubled(), Renamed()])
def test_what_belongs_to_other_values_is_refused(loss):
    name = type(loss).__name__
    objective, params = linear(loss)
    batch, z = {"x": X, "label": LABELS}, jnp.zeros((N, TIME, C))
    for call in (lambda: loss.hessian_columns(z), lambda: loss.sample_targets(z, batch, KEY)):
        with pytest.raises(TypeError, match=rf"{name} overrides the values of SoftmaxCrossEntropy and inherits its"):
            call()
    for fisher in ("exact", "ggn", "sampled"):
        estimator = FullBlock(fisher=fisher)
        start = estimator.init(objective, params)
        with pytest.raises(TypeError, match=rf"{name}.*Use fisher='empirical'"):
            estimator.update(start, objective, params, batch, KEY)
    for fisher in ("exact", "sampled"):
        with pytest.raises(TypeError, match=rf"{name}.*Use ggnvp,? or fisher='empirical'"):
            products.fvp(objective, params, params, batch, KEY, fisher=fisher)
    # what is differentiated is that of the values as they are
    hessian = jax.hessian(lambda z: jnp.sum(loss.values(z, batch)))(z)
    v = jnp.asarray(rng.normal(size=z.shape), jnp.float32)
    np.testing.assert_allclose(
        loss.hessian_product(z, batch, v), jnp.einsum("abcdef,def->abc", hessian, v), rtol=1e-5, atol=1e-6
    )


def test_a_loss_with_columns_of_its_own_has_the_blocks_that_belong_to_it():
    objective, params = linear(Scaled())
    batch = {"x": X[:, 0], "target": np.zeros((N, C), np.float32)}
    estimator = FullBlock(fisher="ggn")
    got = estimator.update(estimator.init(objective, params), objective, params, batch, KEY).as_matrix()
    want = products.as_matrix(lambda v: products.ggnvp(objective, params, v, batch), params)
    np.testing.assert_allclose(got, want, **CLOSE)
    u = np.concatenate([np.ones((N, 1)), X[:, 0]], axis=1).astype(np.float64)
    np.testing.assert_allclose(want, 3 * np.kron(u.T @ u / N, np.eye(C)), **CLOSE)


# -- values that are none per example ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda z, b: jnp.mean(z**2), ValueError, r"PerExample\(function\) should return one value per example.*\(\)"),
        (lambda z, b: jnp.mean(z**2, keepdims=True)[0], ValueError, r"not one for all of them, shape \(1,\)"),
        (lambda z, b: {"a": z}, TypeError, r"PerExample\(function\) should return an array, not dict"),
    ],
    ids=["scalar", "one", "dict"],
)
def test_values_that_are_not_one_per_example(function, error, message):
    objective, params = linear(losses.PerExample(function))
    with pytest.raises(error, match=message):
        objective.loss(params, {"x": X[:, 0]})

    class Mine(losses.Loss):
        def values(self, outputs, batch):
            return function(outputs, batch)

    with pytest.raises(error, match=message.replace(r"PerExample\(function\)", "Mine.values")):
        linear(Mine())[0].value_and_grad(params, {"x": X[:, 0]})


def test_outputs_that_a_loss_cannot_take():
    for loss in (losses.SoftmaxCrossEntropy("y"), losses.SquaredError("y"), losses.SigmoidCrossEntropy("y")):
        with pytest.raises(TypeError, match=rf"{type(loss).__name__} takes one array of outputs, not dict.*PerExample"):
            loss.values({"a": jnp.zeros((N, C))}, {"y": np.zeros((N, C))})
    with pytest.raises(TypeError, match=r"PerExample\(function\) should be a function, not int"):
        losses.PerExample(3)
