"""Which entries of a batch weight its examples, what they may hold, and what is refused or NaN."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from curvtrain import Objective, losses
from curvtrain.curvature import DiagonalFisher, FullBlock, products

N, D, C = 6, 3, 4
rng = np.random.default_rng(0)
X = rng.normal(size=(N, D)).astype(np.float32)
CLOSE = dict(rtol=1e-5, atol=1e-6)  # float32 sums of a dozen products of order one


def linear(loss, outputs=C):
    return Objective.from_model(nnx.Linear(D, outputs, rngs=nnx.Rngs(0)), lambda m, batch: m(batch["x"]), loss)


def z_of(params):
    kernel, bias = (np.asarray(params[name], np.float64) for name in ("kernel", "bias"))
    return X.astype(np.float64) @ kernel + bias


# -- by name -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mask", "weights"])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_target_does_not_weight_itself(name, classes):
    image = rng.normal(size=(2, 3, 3, D)).astype(np.float32)
    batch = {"x": image, name: rng.integers(0, classes, (2, 3, 3)).astype(np.int32)}
    objective, params = linear(losses.SoftmaxCrossEntropy(name), classes)
    z = np.asarray(objective.predict(params, batch), np.float64)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    want = -np.take_along_axis(log_p, batch[name][..., None], -1).mean()
    np.testing.assert_allclose(objective.loss(params, batch), want, **CLOSE)
    squares, params = linear(losses.SquaredError(name), 1)
    batch = {"x": X, name: rng.normal(size=(N, 1)).astype(np.float32)}
    want = np.mean((z_of(params) - batch[name]) ** 2) / 2
    np.testing.assert_allclose(squares.loss(params, batch), want, **CLOSE)


@pytest.mark.parametrize(
    ("weighted_by", "used"), [(None, ["mask"]), ((), []), ("valid", ["valid"]), ("mask", ["mask"])]
)
def test_weighted_by_says_which_entries_weight(weighted_by, used):
    loss = losses.SquaredError("y", weighted_by=weighted_by)
    batch = {"y": np.ones((N, 2)), "mask": np.arange(N) % 2 > 0, "valid": np.linspace(0, 2, N).astype(np.float32)}
    want = np.prod([np.ones(N), *(batch[name] for name in used)], axis=0)
    np.testing.assert_allclose(loss.weights(jnp.zeros((N, 2)), batch), want)


def test_a_loss_of_ones_own_says_it_in_its_class():
    class Own(losses.Loss):
        weighted_by = ("mask", "valid")

        def values(self, outputs, batch):
            return outputs[:, 0]

    batch = {"mask": np.arange(N) > 1, "valid": np.full(N, 2.0, np.float32), "weights": np.full(N, 9.0)}
    np.testing.assert_array_equal(Own().weights(jnp.zeros((N, 1)), batch), 2.0 * (np.arange(N) > 1))


def test_batches_that_carry_no_weights():
    for batch in ({"mask": {"left": np.zeros(N)}, "y": np.ones((N, 2))}, {"y": np.ones((N, 2))}):
        np.testing.assert_array_equal(losses.SquaredError("y").weights(jnp.zeros((N, 2)), batch), np.ones(N))
    first = losses.PerExample(lambda z, batch: z[:, 0] - batch[1])
    np.testing.assert_array_equal(first.weights(jnp.zeros((N, 2)), (X, np.ones(N, np.float32))), np.ones(N))


def test_errors_of_weighted_by():
    with pytest.raises(TypeError, match=r"SoftmaxCrossEntropy\(weighted_by\) should name entries .* it is 3"):
        losses.SoftmaxCrossEntropy(weighted_by=3)
    with pytest.raises(KeyError, match=r"PerExample\(weighted_by\)='valid' is not in the batch, which has \['mask'\]"):
        losses.PerExample(lambda z, b: z, weighted_by="valid").weights(jnp.zeros(N), {"mask": np.ones(N)})


# -- what is not clear -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [False, True])
def test_an_entry_that_the_loss_reads_itself(jit):
    """Through jit, which keeps arguments that it does not use, an entry that is not read is still a weight."""
    reading = lambda z, batch: jnp.sum((z - batch["mask"][:, None]) ** 2, -1)
    other = lambda z, batch: jnp.sum((z - batch["y"][:, None]) ** 2, -1) + 0 * jnp.sum(z) * len(batch["mask"])
    reading, other = (jax.jit(f) if jit else f for f in (reading, other))
    z, batch = jnp.ones((N, 2)), {"y": np.zeros(N), "mask": np.arange(N) % 2}
    with pytest.raises(ValueError, match=r"'mask', and PerExample\(function\) reads it.*weighted_by='mask'.*=\(\)"):
        losses.PerExample(reading).weights(z, batch)
    for said, want in (((), np.ones(N)), ("mask", batch["mask"])):
        np.testing.assert_array_equal(losses.PerExample(reading, weighted_by=said).weights(z, batch), want)
    np.testing.assert_array_equal(losses.PerExample(other).weights(z, batch), batch["mask"])


@pytest.mark.parametrize(
    ("name", "dtype", "clear"),
    [("mask", bool, True), ("mask", np.int32, False), ("mask", np.float32, False), ("weights", np.float32, True)],
)
def test_an_image_of_weights_has_to_be_clear(name, dtype, clear):
    z, image = jnp.zeros((2, 3, 3, C)), rng.integers(0, 2, (2, 3, 3)).astype(dtype)
    batch = {"label": np.zeros((2, 3, 3), int), name: image}
    named = losses.SoftmaxCrossEntropy(weighted_by=name)
    np.testing.assert_array_equal(named.weights(z, batch), image)
    if clear:
        np.testing.assert_array_equal(losses.SoftmaxCrossEntropy().weights(z, batch), image)
        return
    with pytest.raises(ValueError, match=rf"batch\['{name}'\], {np.dtype(dtype)} of shape \(2, 3, 3\), could be.*say"):
        losses.SoftmaxCrossEntropy().weights(z, batch)


@pytest.mark.parametrize("shape", [(), (N, 2), (N, 5, 5), (1,)])
def test_an_entry_of_another_shape_is_refused(shape):
    """An attention mask, or a target of another head."""
    with pytest.raises(ValueError, match=r"batch\['mask'\] has shape .*weighted_by=\(\)"):
        losses.SoftmaxCrossEntropy().weights(jnp.zeros((N, C)), {"label": np.zeros(N, int), "mask": np.ones(shape)})


# -- what they may hold ------------------------------------------------------------------------------------------------

WRONG = [
    ("weights", -1.0, "finite numbers of zero or more"),
    ("weights", np.nan, "finite numbers of zero or more"),
    ("weights", np.inf, "finite numbers of zero or more"),
    ("mask", -1e9, "an additive mask pass mask == 0"),
    ("mask", 2.0, "bool, or 0 and 1"),
    ("mask", np.nan, "bool, or 0 and 1"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_wrong_weights_are_errors_where_they_are_known_and_nan_where_not(name, value, message):
    objective, params = linear(losses.SoftmaxCrossEntropy())
    entry = np.where(np.arange(N) == 2, value, 1.0).astype(np.float32)
    batch = {"x": X, "label": np.arange(N) % C, name: entry}
    with pytest.raises(ValueError, match=rf"batch\['{name}'\] weights the examples and holds .*{message}"):
        objective.loss(params, batch)
    with pytest.raises(ValueError, match=message):
        objective.loss_of_outputs.check_batch(batch, jax.ShapeDtypeStruct((N, C), jnp.float32))
    loss, grads, *_ = jax.jit(objective.value_and_grad)(params, batch)
    assert np.isnan(loss) and all(np.all(np.isnan(g)) for g in jax.tree.leaves(grads))
    assert np.isnan(jax.jit(products.ggnvp)(objective, params, params, batch)["bias"]).all()


def test_weights_that_are_no_numbers():
    with pytest.raises(
        TypeError, match=r"batch\['weights'\] weights the examples and should hold numbers, not complex"
    ):
        losses.SoftmaxCrossEntropy().check_batch({"label": np.zeros(2, int), "weights": np.ones(2, complex)}, None)


class Signed(losses.SoftmaxCrossEntropy):
    """A loss that weights examples by numbers of any sign."""

    def weights(self, outputs, batch):
        return super().weights(outputs, batch) * batch["signed"]


def test_a_total_that_is_not_positive():
    objective, params = linear(Signed())
    loss = jax.jit(objective.loss)
    batch = {"x": X, "label": np.arange(N) % C}
    total = lambda signed: loss(params, batch | {"signed": np.asarray(signed, np.float32)})
    assert total(np.zeros(N)) == 0
    assert np.isnan(total(-np.ones(N))) and np.isnan(total(np.full(N, 3e38)))


# -- single outputs ----------------------------------------------------------------------------------------------------

M = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1]], bool)
T = rng.random((N, C)).astype(np.float32)


def masked_values(np, kind, z):
    """The loss of each example over its outputs that are not masked, from the formulas."""
    t = np.where(M, T, 0.0)
    element = (z - t) ** 2 / 2 if kind == "squared" else np.log(1 + np.exp(z)) - t * z
    return np.sum(np.where(M, element, 0.0), axis=1)


def reference(kind, params):
    """(loss, gradient, Hessian) of a linear model, dense and in float64, in the order of `ravel_pytree`."""
    with jax.enable_x64(True):
        flat, tree = ravel_pytree(jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), params))

        def loss(v):
            p = tree(v)
            z = jnp.asarray(X, jnp.float64) @ p["kernel"] + p["bias"]
            return jnp.sum(masked_values(jnp, kind, z)) / M.any(1).sum()

        return tuple(np.asarray(f(flat)) for f in (loss, jax.grad(loss), jax.hessian(loss)))


@pytest.mark.parametrize("kind", ["squared", "sigmoid"])
@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_a_mask_of_single_outputs(kind, dtype):
    """Targets under it may be anything, and an example of which nothing is left does not count."""
    loss = losses.SquaredError("y") if kind == "squared" else losses.SigmoidCrossEntropy("y")
    objective, params = linear(loss)
    batch = {"x": X, "y": np.where(M, T, np.nan), "mask": M.astype(dtype)}
    objective.loss_of_outputs.check_batch(batch, jax.ShapeDtypeStruct((N, C), jnp.float32))
    value, gradient, H = reference(kind, params)
    got, grads, *_ = jax.jit(objective.value_and_grad)(params, batch)
    np.testing.assert_allclose(got, value, **CLOSE)
    np.testing.assert_allclose(ravel_pytree(grads)[0], gradient, **CLOSE)
    product = functools.partial(products.ggnvp, objective, params, batch=batch)
    np.testing.assert_allclose(products.as_matrix(product, params), H, **CLOSE)
    estimator = FullBlock("exact")
    curvature = estimator.update(estimator.init(objective, params), objective, params, batch, jax.random.key(0))
    np.testing.assert_allclose(curvature.as_matrix(), H, **CLOSE)
    # the score of an output that is left out is zero, also with targets from the model
    draws = DiagonalFisher("sampled").measure(
        DiagonalFisher("sampled").init(objective, params), objective, params, batch, jax.random.key(0)
    )
    sums, W = objective.measure(params, batch, jax.random.key(0), draws)
    assert M.any(1).sum() == W and all(np.all(np.isfinite(a)) for a in jax.tree.leaves(sums))


def test_a_mask_in_the_shape_of_the_outputs_that_the_values_do_not_read():
    class Absolute(losses.SquaredError):
        def values(self, outputs, batch):
            return jnp.sum(jnp.abs(outputs - batch["target"]), axis=-1)

    with pytest.raises(ValueError, match=r"batch\['mask'\] has shape \(6, 4\)"):
        Absolute().weights(jnp.zeros((N, C)), {"target": T, "mask": M})


# -- targets of masked examples ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Masked:
    loss: losses.Loss
    targets: np.ndarray
    bad: float


MASKED = [
    Masked(losses.SoftmaxCrossEntropy("y"), np.arange(N) % C, -100),
    Masked(losses.SoftmaxCrossEntropy("y"), np.eye(C, dtype=np.float32)[np.arange(N) % C], np.nan),
    Masked(losses.SquaredError("y"), T, np.nan),
    Masked(losses.SquaredError("y"), T, np.inf),
    Masked(losses.SigmoidCrossEntropy("y"), T, -1),
]


@pytest.mark.parametrize("case", MASKED)
@pytest.mark.parametrize("weighted", ["mask", "weights"])
def test_checks_take_anything_under_a_mask(case, weighted):
    kept = np.arange(N) % 3 > 0
    spoilt = np.where(kept.reshape(-1, *(1,) * (case.targets.ndim - 1)), case.targets, case.bad)
    spoilt = spoilt.astype(case.targets.dtype)
    outputs = jax.ShapeDtypeStruct((N, C), jnp.float32)
    case.loss.check_batch({"y": spoilt, weighted: kept.astype(np.float32)}, outputs)
    with pytest.raises(ValueError, match="y"):
        case.loss.check_batch({"y": spoilt}, outputs)
    with pytest.raises(ValueError, match="y"):
        case.loss.check_batch({"y": spoilt, weighted: (~kept).astype(np.float32)}, outputs)


# -- mean losses without outputs ---------------------------------------------------------------------------------------


def test_micro_batches_of_a_mean_loss_with_a_target_called_mask():
    loss = lambda p, batch: jnp.mean((p * batch["x"] - batch["mask"].reshape(len(batch["x"]), -1)[:, 0]) ** 2)
    with pytest.raises(ValueError, match=r"batch\['mask'\] has shape \(3, 2, 2\).*another name"):
        Objective.from_loss(loss, microbatch=3).loss(jnp.float32(1), {"x": jnp.ones(N), "mask": jnp.ones((N, 2, 2))})
    with pytest.raises(ValueError, match=r"batch\['mask'\] weights the examples and holds 3.*another name"):
        Objective.from_loss(loss, microbatch=N).loss(jnp.float32(1), {"x": jnp.ones(N), "mask": np.full(N, 3)})
    whole = Objective.from_loss(loss).loss(jnp.float32(1), {"x": jnp.ones(N), "mask": jnp.zeros(N)})
    assert whole == 1  # in one piece its weight cancels: the entry is not looked at


@pytest.mark.parametrize("case", MASKED)
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_statistics_take_anything_under_a_mask(case, fisher):
    kept = np.arange(N) % 3 > 0
    clean = {"x": X, "y": case.targets, "mask": kept}
    spoilt = np.where(kept.reshape(-1, *(1,) * (case.targets.ndim - 1)), case.targets, case.bad)
    objective, params = linear(case.loss)
    estimator = FullBlock(fisher)
    update = functools.partial(estimator.update, estimator.init(objective, params), objective, params)
    spoilt = {**clean, "y": spoilt.astype(case.targets.dtype)}
    want, got = (jax.jit(update)(batch, jax.random.key(0)) for batch in (clean, spoilt))
    assert got.skipped == 0 and np.any(want.as_matrix())
    np.testing.assert_array_equal(got.as_matrix(), want.as_matrix())
