"""Every loss against a float64 reference written from its formula, and the references' derivatives by autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvtrain import losses

SHAPES = {"one piece": (5, 3), "image": (5, 2, 3), "sequence": (4, 3, 2)}
# Float32 values of order 1 with a handful of operations: the worst error measured in this file is 2e-7.
CLOSE = dict(rtol=5e-7, atol=5e-7)


def softmax_reference(np, z, t):
    """-log p_t, one example: z (classes,), t an integer."""
    return np.log(np.sum(np.exp(z))) - z[t]


def sigmoid_reference(np, z, t):
    p = 1 / (1 + np.exp(-z))
    return -np.sum(t * np.log(p) + (1 - t) * np.log(1 - p))


def squared_reference(np, z, t):
    return np.sum((z - t) ** 2) / 2


REFERENCES = {"softmax": softmax_reference, "sigmoid": sigmoid_reference, "squared": squared_reference}


def build(kind, shape, sequence=False):
    """(loss, outputs, batch, number of leading axes that count examples)."""
    rng = np.random.default_rng(sum(shape))
    z = rng.normal(size=shape).astype(np.float32)
    if kind == "softmax":
        labels = rng.integers(0, shape[-1], shape[:-1]).astype(np.int32)
        return losses.SoftmaxCrossEntropy(labels="y"), z, {"y": labels}, len(shape) - 1
    if kind == "sigmoid":
        loss = losses.SigmoidCrossEntropy(labels="y", sequence=sequence)
        return loss, z, {"y": rng.random(shape).astype(np.float32)}, 2 if sequence else 1
    loss = losses.SquaredError(targets="y", sequence=sequence)
    return loss, z, {"y": rng.normal(size=shape).astype(np.float32)}, 2 if sequence else 1


CASES = [
    ("softmax", "one piece", False),
    ("softmax", "sequence", False),
    *[(kind, shape, shape == "sequence") for kind in ("sigmoid", "squared") for shape in SHAPES],
]
cases = pytest.mark.parametrize(("kind", "shape", "sequence"), CASES)


def reference_values(kind, z, batch, lead):
    """The formula applied to every example in a Python loop, in float64: an array of the leading shape."""
    values = [REFERENCES[kind](np, z[i].astype(np.float64), batch["y"][i]) for i in np.ndindex(z.shape[:lead])]
    return np.reshape(values, z.shape[:lead])


@functools.cache
def dense_hessians(kind, shape, sequence):
    """(examples..., features, features): the output-space Hessian of every example, by autodiff in float64."""
    _, z, batch, lead = build(kind, SHAPES[shape], sequence)
    features = int(np.prod(z.shape[lead:]))
    with jax.enable_x64(True):
        flat = lambda a, kept: jnp.asarray(a, jnp.float64 if a.dtype.kind == "f" else None).reshape(-1, *a.shape[kept:])
        hessian = jax.hessian(lambda z, t: REFERENCES[kind](jnp, z, t))
        H = np.asarray(jax.jit(jax.vmap(hessian))(flat(z, lead), flat(batch["y"], lead)))
    return H.reshape(*z.shape[:lead], features, features)


def mask_for(shape):
    mask = np.ones(shape, bool)
    mask.flat[1::3] = False
    return mask


# -- values and weights ----------------------------------------------------------------------------------------------


@cases
def test_values(kind, shape, sequence):
    loss, z, batch, lead = build(kind, SHAPES[shape], sequence)
    values = jax.jit(loss.values)(z, batch)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, reference_values(kind, z, batch, lead), **CLOSE)


@cases
def test_values_of_bfloat16_outputs_are_float32(kind, shape, sequence):
    loss, z, batch, lead = build(kind, SHAPES[shape], sequence)
    z16 = jnp.asarray(z, jnp.bfloat16)
    values = jax.jit(loss.values)(z16, batch)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, reference_values(kind, np.asarray(z16, np.float64), batch, lead), **CLOSE)


@pytest.mark.parametrize("scale", [30.0, 3e4])
def test_saturated_outputs_stay_finite(scale):
    z = jnp.asarray([[scale, -scale, 0.0]])
    softmax = losses.SoftmaxCrossEntropy()
    sigmoid = losses.SigmoidCrossEntropy()
    np.testing.assert_allclose(softmax.values(z, {"label": np.array([1])}), [2 * scale], rtol=1e-6)
    wrong = {"label": np.array([[0.0, 1.0, 1.0]])}
    np.testing.assert_allclose(sigmoid.values(z, wrong), [2 * scale + np.log(2)], rtol=1e-6)
    for loss, batch in ((softmax, {"label": np.array([1])}), (sigmoid, wrong)):
        assert np.all(np.isfinite(jax.jit(loss.hessian_product)(z, batch, z)))
        assert np.all(np.isfinite(loss.hessian_columns(z)))


def test_labels_outside_the_classes_show_in_the_loss():
    values = losses.SoftmaxCrossEntropy().values(jnp.zeros((2, 3)), {"label": np.array([0, 3])})
    assert np.isfinite(values[0]) and np.isnan(values[1])


def test_weights_default_to_one():
    loss, z, batch, _ = build("squared", (5, 3))
    np.testing.assert_array_equal(loss.weights(z, batch), np.ones(5))


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32])
def test_weights_multiply_mask_and_weights(dtype):
    """(batch,) entries are spread over time; entries of the shape of the values are taken as they are."""
    _, z, batch, _ = build("squared", (4, 3, 2))
    loss = losses.SquaredError(targets="y", sequence=True)
    rng = np.random.default_rng(0)
    mask, weights = mask_for((4, 3)), rng.random(4).astype(np.float32)
    got = loss.weights(z, {**batch, "mask": mask.astype(dtype), "weights": weights})
    np.testing.assert_array_equal(got, mask * weights[:, None])
    assert got.dtype == jnp.float32


def test_weights_of_one_value_per_example():
    loss, z, batch, _ = build("sigmoid", (5, 2, 3))
    weights = np.arange(5, dtype=np.float32)
    np.testing.assert_array_equal(loss.weights(z, {**batch, "weights": weights, "mask": weights < 3}), [0, 1, 2, 0, 0])


def test_a_mask_over_time_needs_values_over_time():
    loss, z, batch, _ = build("squared", (4, 3, 2))
    with pytest.raises(ValueError, match=r"batch\['mask'\] has shape \(4, 3\).*\(4,\).*sequence=True"):
        loss.weights(z, {**batch, "mask": mask_for((4, 3))})


def test_a_weight_of_the_wrong_length():
    loss, z, batch, _ = build("softmax", (5, 3))
    with pytest.raises(ValueError, match=r"batch\['weights'\] has shape \(4,\)"):
        loss.weights(z, {**batch, "weights": np.ones(4)})


# -- curvature in output space ---------------------------------------------------------------------------------------


@cases
def test_hessian_product(kind, shape, sequence):
    """Without weights, and with a mask and weights."""
    loss, z, batch, lead = build(kind, SHAPES[shape], sequence)
    v = np.random.default_rng(1).normal(size=z.shape).astype(np.float32)
    Hv = np.einsum("...ij,...j->...i", dense_hessians(kind, shape, sequence), v.reshape(*z.shape[:lead], -1))
    product = jax.jit(loss.hessian_product)
    np.testing.assert_allclose(product(z, batch, v), Hv.reshape(z.shape), **CLOSE)
    mask, scale = mask_for(z.shape[:lead]), np.linspace(0.5, 2, len(z))
    weights = mask * scale.reshape((-1,) + (1,) * (lead - 1))
    got = product(z, {**batch, "mask": mask, "weights": scale.astype(np.float32)}, v)
    np.testing.assert_allclose(got, (weights[..., None] * Hv).reshape(z.shape), **CLOSE)


@cases
def test_hessian_columns(kind, shape, sequence):
    """sum_c S_c S_c^T is the dense Hessian of every example."""
    loss, z, _, lead = build(kind, SHAPES[shape], sequence)
    S = np.asarray(jax.jit(loss.hessian_columns)(z), np.float64)
    assert S.shape[1:] == z.shape
    S = S.reshape(len(S), *z.shape[:lead], -1)
    got = np.einsum("c...i,c...j->...ij", S, S)
    np.testing.assert_allclose(got, dense_hessians(kind, shape, sequence), **CLOSE)


few_cases = pytest.mark.parametrize(
    ("kind", "shape", "sequence"),
    [("softmax", "sequence", False), ("sigmoid", "sequence", True), ("squared", "image", False)],
)


@few_cases
def test_masked_examples_are_cut_out_of_derivatives(kind, shape, sequence):
    """NaN in what a masked example holds reaches neither the product nor its neighbours."""
    loss, z, batch, lead = build(kind, SHAPES[shape], sequence)
    mask = mask_for(z.shape[:lead])
    clean = {**batch, "mask": mask}
    v = jnp.ones(z.shape)
    product = jax.jit(loss.hessian_product)
    want = product(z, clean, v)
    spoilt = np.where(mask.reshape(mask.shape + (1,) * (z.ndim - lead)), z, np.float32(np.inf))
    targets = batch["y"].copy()
    targets[~mask] = -(10**6) if kind == "softmax" else np.nan
    got = product(spoilt, {"y": targets, "mask": mask}, v)
    np.testing.assert_array_equal(got, want)


# -- the model's own distribution ------------------------------------------------------------------------------------

DRAWS = 20_000
SIGMAS = 5.0  # two-sided probability 6e-7 per number for a Gaussian; some dozens of numbers per test, and fixed keys


def draw(loss, z, batch):
    """DRAWS independent target sets, float64 (DRAWS, ...)."""
    many = np.broadcast_to(z, (DRAWS, *z.shape))
    return np.asarray(jax.jit(loss.sample_targets)(many, batch, jax.random.key(0))["y"], np.float64)


def test_softmax_targets_follow_their_probabilities():
    loss, z, batch, _ = build("softmax", (5, 3))
    drawn = draw(loss, z, batch)
    p = np.exp(z.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    frequency = np.stack([(drawn == c).mean(0) for c in range(3)], axis=-1)
    assert np.all(np.abs(frequency - p) < SIGMAS * np.sqrt(p * (1 - p) / DRAWS))
    # the bound is sharp enough to tell the model's distribution from the uniform one
    assert np.any(np.abs(frequency - 1 / 3) > 10 * SIGMAS * np.sqrt(p * (1 - p) / DRAWS))


def test_sigmoid_targets_follow_their_probabilities_independently():
    loss, z, batch, _ = build("sigmoid", (5, 3))
    drawn = draw(loss, z, batch)
    p = 1 / (1 + np.exp(-z.astype(np.float64)))
    assert set(np.unique(drawn)) == {0.0, 1.0}
    assert np.all(np.abs(drawn.mean(0) - p) < SIGMAS * np.sqrt(p * (1 - p) / DRAWS))
    centred = (drawn - p) / np.sqrt(p * (1 - p))
    off = np.einsum("dni,dnj->nij", centred, centred) / DRAWS
    assert np.all(np.abs(off[:, ~np.eye(3, dtype=bool)]) < SIGMAS / np.sqrt(DRAWS))


def test_squared_error_targets_are_unit_gaussians_around_the_outputs():
    loss, z, batch, _ = build("squared", (5, 3))
    noise = draw(loss, z, batch) - z
    assert np.all(np.abs(noise.mean(0)) < SIGMAS / np.sqrt(DRAWS))
    assert np.all(np.abs((noise**2).mean(0) - 1) < SIGMAS * np.sqrt(2 / DRAWS))  # var of a squared normal is 2
    assert np.all(np.abs((noise**4).mean(0) - 3) < SIGMAS * np.sqrt(96 / DRAWS))  # and of its square 105 - 9


@few_cases
def test_expected_outer_product_of_the_score_is_the_hessian(kind, shape, sequence):
    """E_t[dl dl^T] = H_l: why the GGN is the Fisher information."""
    loss, z, batch, lead = build(kind, SHAPES[shape], sequence)
    keys = jax.random.split(jax.random.key(1), 2000)

    def score(key):
        drawn = loss.sample_targets(jnp.asarray(z), batch, key)
        return jax.grad(lambda z: loss.values(z, drawn).sum())(jnp.asarray(z))

    r = np.asarray(jax.jit(jax.vmap(score))(keys), np.float64).reshape(2000, *z.shape[:lead], -1)
    outer = np.einsum("d...i,d...j->d...ij", r, r)
    error = outer.std(0) / np.sqrt(2000)
    H = dense_hessians(kind, shape, sequence)
    assert np.all(np.abs(outer.mean(0) - H) < SIGMAS * error + 1e-6)


@pytest.mark.parametrize("kind", REFERENCES)
def test_sampled_batches_keep_their_other_entries(kind):
    loss, z, batch, _ = build(kind, (5, 3))
    batch = {**batch, "mask": mask_for((5,)), "x": np.ones(5)}
    drawn = loss.sample_targets(jnp.asarray(z), batch, jax.random.key(0))
    assert set(drawn) == set(batch)
    assert drawn["mask"] is batch["mask"] and drawn["x"] is batch["x"]
    assert drawn["y"].shape == batch["y"].shape
    again = loss.sample_targets(jnp.asarray(z), batch, jax.random.key(0))
    other = loss.sample_targets(jnp.asarray(z), batch, jax.random.key(1))
    np.testing.assert_array_equal(drawn["y"], again["y"])
    assert not np.array_equal(drawn["y"], other["y"])


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_softmax_metrics_are_one_value_per_label():
    loss, z, batch, _ = build("softmax", (4, 3, 2))
    metrics = loss.metrics(jnp.asarray(z), batch)
    assert set(metrics) == {"loss", "accuracy"}
    np.testing.assert_array_equal(metrics["accuracy"], (z.argmax(-1) == batch["y"]).astype(np.float32))
    np.testing.assert_array_equal(metrics["loss"], loss.values(jnp.asarray(z), batch))


# -- checks on the host ----------------------------------------------------------------------------------------------


def outputs_like(shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize("labels", [[0, 1, 3], [-1, 0, 2]])
def test_check_of_labels_outside_the_classes(labels):
    low, high = min(labels), max(labels)
    with pytest.raises(ValueError, match=rf"from {low} to {high}.*3 outputs.*\[0, 2\]"):
        losses.SoftmaxCrossEntropy().check({"label": np.array(labels)}, outputs_like((3, 3)))


def test_check_of_float_labels():
    with pytest.raises(TypeError, match=r"integer class labels, not float32.*argmax.*SigmoidCrossEntropy"):
        losses.SoftmaxCrossEntropy().check({"label": np.ones(3, np.float32)}, outputs_like((3, 3)))


@pytest.mark.parametrize("labels", [[0.0, 1.5], [-0.5, 1.0]])
def test_check_of_probabilities(labels):
    with pytest.raises(ValueError, match=r"probabilities and should lie in \[0, 1\]"):
        losses.SigmoidCrossEntropy().check({"label": np.array([labels])}, outputs_like((1, 2)))


@pytest.mark.parametrize("loss", [losses.SigmoidCrossEntropy("y"), losses.SquaredError("y")])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_check_of_targets_that_are_not_finite(loss, bad):
    with pytest.raises(ValueError, match=r"'y' holds values that are not finite"):
        loss.check({"y": np.array([[0.5, bad]])}, outputs_like((1, 2)))


@pytest.mark.parametrize("loss", [losses.SigmoidCrossEntropy("y"), losses.SquaredError("y")])
@pytest.mark.parametrize("targets", [np.array([["a"]]), np.array([[1j]])])
def test_check_of_targets_that_are_not_real(loss, targets):
    with pytest.raises(TypeError, match="'y' should hold real numbers, not"):
        loss.check({"y": targets}, outputs_like((1, 1)))


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, np.float16, jnp.bfloat16, np.float64])
def test_check_accepts_every_real_dtype(dtype):
    batch = {"y": np.array([[0, 1]]).astype(dtype)}
    losses.SigmoidCrossEntropy("y").check(batch, outputs_like((1, 2)))
    losses.SquaredError("y").check(batch, outputs_like((1, 2)))
    z = jnp.zeros((1, 2))
    np.testing.assert_allclose(losses.SquaredError("y").values(z, batch), [0.5])


def test_check_passes_good_targets():
    losses.SoftmaxCrossEntropy().check({"label": np.array([0, 2])}, outputs_like((2, 3)))
    losses.SoftmaxCrossEntropy().check({"label": np.zeros(0, np.int32)}, outputs_like((0, 3)))
    losses.PerExample(lambda z, batch: z).check({}, outputs_like((2,)))


# -- errors at the edge ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "option"),
    [
        (losses.SoftmaxCrossEntropy("y"), "SoftmaxCrossEntropy(labels)"),
        (losses.SigmoidCrossEntropy("y"), "SigmoidCrossEntropy(labels)"),
        (losses.SquaredError("y"), "SquaredError(targets)"),
    ],
)
def test_a_missing_entry_names_the_option_and_what_there_is(loss, option):
    for call in (lambda batch: loss.values(jnp.zeros((2, 3)), batch), lambda batch: loss.check(batch, None)):
        with pytest.raises(KeyError) as error:
            call({"x": np.zeros(2), "label": np.zeros(2)})
        assert f"{option}='y' is not in the batch, which has ['label', 'x']" in str(error.value)
        with pytest.raises(KeyError, match="which has tuple"):
            call((np.zeros(2), np.zeros(2)))


def test_softmax_labels_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"needs labels of shape \(2,\) for outputs of shape \(2, 3\), not \(2, 3\)"):
        losses.SoftmaxCrossEntropy().values(jnp.zeros((2, 3)), {"label": np.zeros((2, 3), int)})


@pytest.mark.parametrize("loss", [losses.SigmoidCrossEntropy("y"), losses.SquaredError("y")])
def test_targets_of_the_wrong_shape_do_not_broadcast(loss):
    with pytest.raises(ValueError, match=r"='y' has shape \(2,\), but the outputs have \(2, 1\)"):
        loss.values(jnp.zeros((2, 1)), {"y": np.zeros(2)})


@pytest.mark.parametrize("kind", [losses.SigmoidCrossEntropy, losses.SquaredError])
def test_a_sequence_needs_a_time_axis(kind):
    with pytest.raises(ValueError, match=r"sequence=True needs outputs \(batch, time, ...\), not shape \(2,\)"):
        kind("y", sequence=True).values(jnp.zeros(2), {"y": np.zeros(2)})


# -- PerExample ------------------------------------------------------------------------------------------------------


def huber(outputs, batch):
    d = jnp.abs(outputs - batch["y"])
    return jnp.sum(jnp.where(d < 1, d**2 / 2, d - 0.5), axis=-1)


def test_per_example_values_weights_and_product():
    loss, z, batch, _ = losses.PerExample(huber), *build("squared", (5, 3))[1:]
    d = np.abs(z.astype(np.float64) - batch["y"])
    np.testing.assert_allclose(loss.values(z, batch), np.where(d < 1, d**2 / 2, d - 0.5).sum(-1), **CLOSE)
    assert 0 < (d < 1).sum() < d.size  # both branches are met
    mask = mask_for((5,))
    product = jax.jit(loss.hessian_product)(z, {**batch, "mask": mask}, jnp.full(z.shape, 2.0))
    np.testing.assert_allclose(product, 2.0 * (d < 1) * mask[:, None], **CLOSE)


def test_per_example_takes_any_structure_of_outputs():
    """Outputs (z, s): s (2,) is not per example and is left as it is."""

    def function(outputs, batch):
        z, s = outputs
        return jnp.sum(s * z**2, axis=-1) * batch["y"]

    loss = losses.PerExample(function)
    z, s, batch = jnp.ones((3, 2)), jnp.asarray([1.0, 2.0]), {"y": np.ones(3), "mask": np.array([1, 0, 1])}
    Hz, Hs = jax.jit(loss.hessian_product)((z, s), batch, (jnp.ones((3, 2)), jnp.ones(2)))
    # d/dz_i sum_i w_i s z_i^2 = 2 w s z: its tangent is 2 w (s dz + z ds); for s: sum_i w_i 2 z_i dz_i
    np.testing.assert_allclose(Hz, [[4, 6], [0, 0], [4, 6]])
    np.testing.assert_allclose(Hs, [4, 4])


def test_per_example_has_no_distribution_and_no_columns():
    loss = losses.PerExample(huber)
    assert loss.fishers == ("empirical",)
    with pytest.raises(TypeError, match=r"PerExample cannot be sampled: it defines no distribution"):
        loss.sample_targets(jnp.zeros((2, 3)), {}, jax.random.key(0))
    with pytest.raises(TypeError, match="PerExample has no closed factor"):
        loss.hessian_columns(jnp.zeros((2, 3)))
    assert list(loss.metrics(jnp.zeros((2, 3)), {"y": np.zeros((2, 3))})) == ["loss"]
