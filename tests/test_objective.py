"""The objective as a pure function: float64 references, every kind of module, one piece or several, masks, devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from curvtrain import losses
from curvtrain.curvature import products
from curvtrain.objective import Objective, batch_size

N, D, HIDDEN, CLASSES = 10, 3, 4, 3
# float32 sums of tens of terms of order 1; the worst error measured in this file is 4e-7
CLOSE = dict(rtol=1e-6, atol=1e-6)


class MLP(nnx.Module):
    def __init__(self, rngs, inputs=D, hidden=HIDDEN, classes=CLASSES, **options):
        self.a = nnx.Linear(inputs, hidden, rngs=rngs, **options)
        self.b = nnx.Linear(hidden, classes, rngs=rngs, **options)

    def __call__(self, x):
        return self.b(nnx.tanh(self.a(x)))


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(D, HIDDEN, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, momentum=0.9, rngs=rngs)
        self.b = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.tanh(self.norm(self.a(x))))


class Dropped(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(D, HIDDEN, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.b = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.b(self.drop(nnx.tanh(self.a(x))))


def forward(model, batch):
    return model(batch["x"])


def make(model_class=MLP, loss=None, predict=forward, **options):
    """(objective, params)."""
    loss = loss or losses.SoftmaxCrossEntropy(labels="y")
    return Objective.from_model(model_class(nnx.Rngs(0)), predict, loss, **options)


def data(n=N, seed=0, shape=()):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(n, *shape, D)).astype(np.float32),
        "y": rng.integers(0, CLASSES, (n, *shape)).astype(np.int32),
    }


def mlp_loss(p, batch):
    """The weighted mean of -log p_y for `MLP`, from the formulas, in the dtype of its arguments."""
    h = jnp.tanh(batch["x"] @ p["a"]["kernel"] + p["a"]["bias"])
    z = h @ p["b"]["kernel"] + p["b"]["bias"]
    log_p = z - jnp.log(jnp.sum(jnp.exp(z), axis=-1, keepdims=True))
    values = -jnp.sum(log_p * (batch["y"][..., None] == jnp.arange(CLASSES)), axis=-1)
    w = batch.get("w", jnp.ones(values.shape))
    return jnp.sum(w * values) / jnp.sum(w)


def float64(tree):
    """numpy float64 copies of the floating leaves: JAX arrays of that dtype inside `jax.enable_x64`."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


@functools.partial(jax.jit, static_argnums=0)
def _reference(loss_fn, p, batch):
    return loss_fn(p, batch), *jax.jvp(lambda p: jax.grad(loss_fn)(p, batch), (p,), (p,))


def reference(loss_fn, p, batch):
    """(loss, gradient, H p) of a plain function in float64."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, _reference(loss_fn, float64(p), float64(batch)))


@jax.jit
def derivatives(objective, params, batch, key=None):
    """((loss, gradient, H params), model state) of an objective."""
    loss, grads, state, _ = objective.value_and_grad(params, batch, key)
    return (loss, grads, products.hvp(objective, params, params, batch, key)), state


@jax.jit
def loss_of(objective, params, batch, key=None):
    return objective.loss(params, batch, key)


def assert_close(got, want, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or CLOSE)), got, want)


# -- values and derivatives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_gradient_and_hvp_of_an_mlp(weighted):
    objective, params = make()
    batch = data()
    plain = dict(batch)
    if weighted:
        mask, weights = np.arange(N) % 3 != 0, np.linspace(0.1, 3, N).astype(np.float32)
        batch |= {"mask": mask, "weights": weights}
        plain |= {"w": mask * weights.astype(np.float64)}
    want = reference(mlp_loss, params, plain)
    got, state = derivatives(objective, params, batch)
    assert_close(got, want)
    assert got[0].dtype == jnp.float32 and state == {}
    np.testing.assert_allclose(loss_of(objective, params, batch), want[0], **CLOSE)


def test_params_keep_the_structure_of_the_module():
    _, params = make()
    assert jax.tree.map(jnp.shape, params) == {
        "a": {"kernel": (D, HIDDEN), "bias": (HIDDEN,)},
        "b": {"kernel": (HIDDEN, CLASSES), "bias": (CLASSES,)},
    }


def test_sequences_average_over_unmasked_tokens():
    objective, params = make()
    batch = data(4, shape=(5,))
    mask = np.random.default_rng(1).random((4, 5)) < 0.6
    want = reference(mlp_loss, params, {**batch, "w": mask.astype(np.float64)})
    assert_close(derivatives(objective, params, {**batch, "mask": mask})[0], want)
    # a weight per sequence counts for all its tokens
    weights = np.array([1, 0, 2, 0.5], np.float32)
    want = reference(mlp_loss, params, {**batch, "w": np.repeat(weights[:, None], 5, 1).astype(np.float64)})
    np.testing.assert_allclose(loss_of(objective, params, {**batch, "weights": weights}), want[0], **CLOSE)


def test_bfloat16_parameters_get_bfloat16_gradients():
    model = lambda rngs: MLP(rngs, param_dtype=jnp.bfloat16)
    objective, params = make(model, microbatch=4)
    (loss, grads, Hv), _ = derivatives(objective, params, data())
    assert loss.dtype == jnp.float32
    assert jax.tree.map(jnp.dtype, grads) == jax.tree.map(jnp.dtype, params)
    want = reference(mlp_loss, params, data())
    # bfloat16 keeps 8 bits: gradients of order 0.3 are rounded by 6e-4, the worst error measured
    assert_close((loss, float64(grads)), want[:2], rtol=0, atol=2e-3)
    assert_close(Hv, want[2])  # but products are taken in float32


def test_tied_parameters_are_one_leaf():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(D, D, use_bias=False, rngs=rngs)
            self.b = nnx.Linear(D, D, use_bias=False, rngs=rngs)
            self.b.kernel = self.a.kernel

        def __call__(self, x):
            return self.b(nnx.tanh(self.a(x)))

    objective, params = make(Tied, losses.SquaredError("t"))
    assert len(jax.tree.leaves(params)) == 1
    batch = {"x": data()["x"], "t": np.ones((N, D), np.float32)}

    def plain(p, batch):
        (W,) = jax.tree.leaves(p)
        return 0.5 * jnp.sum((jnp.tanh(batch["x"] @ W) @ W - batch["t"]) ** 2) / N

    assert_close(derivatives(objective, params, batch)[0], reference(plain, params, batch))


# -- model state -----------------------------------------------------------------------------------------------------


def normed_loss(p, batch, statistics=None):
    """`Normed` by hand: batch statistics, or the given (mean, var)."""
    a = batch["x"] @ p["a"]["kernel"] + p["a"]["bias"]
    mean, var = statistics or (jnp.mean(a, 0), jnp.var(a, 0))
    h = (a - mean) / jnp.sqrt(var + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
    z = jnp.tanh(h) @ p["b"]["kernel"] + p["b"]["bias"]
    log_p = z - jnp.log(jnp.sum(jnp.exp(z), axis=-1, keepdims=True))
    return -jnp.mean(jnp.sum(log_p * (batch["y"][:, None] == jnp.arange(CLASSES)), axis=-1))


def statistics_of(params, x):
    p = float64(params)
    a = x.astype(np.float64) @ p["a"]["kernel"] + p["a"]["bias"]
    return a.mean(0), a.var(0)


def test_batch_norm_state_threads_through_and_derivatives_see_batch_statistics():
    objective, params = make(Normed)
    batch = data()
    got, state = derivatives(objective, params, batch)
    assert_close(got, reference(normed_loss, params, batch))
    mean, var = statistics_of(params, batch["x"])
    assert_close(state, {"norm": {"mean": 0.1 * mean, "var": 0.9 + 0.1 * var}})
    # nothing was changed in place
    assert_close(objective.model_state, {"norm": {"mean": np.zeros(HIDDEN), "var": np.ones(HIDDEN)}}, atol=0)


def test_evaluation_uses_running_averages():
    objective, params = make(Normed)
    batch = data()
    state = {"norm": {"mean": jnp.linspace(-0.5, 0.5, HIDDEN), "var": jnp.linspace(0.5, 2, HIDDEN)}}
    evaluated = objective.with_state(state).evaluation()
    fixed = tuple(float64(state)["norm"].values())
    want = reference(lambda p, b: normed_loss(p, b, fixed), params, batch)
    got, after = derivatives(evaluated, params, batch)
    assert_close(got, want)
    assert_close(after, state, atol=0)
    assert evaluated.module(params).norm.use_running_average is True


def test_the_model_is_read_not_changed():
    model = Normed(nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    objective, params = Objective.from_model(model, forward, losses.SoftmaxCrossEntropy("y"))
    params = jax.tree.map(lambda a: a + 1, params)
    derivatives(objective, params, data())
    after = nnx.to_pure_dict(nnx.state(model))
    assert_close(after, before, atol=0)
    assert model.norm.use_running_average is False


def test_the_module_comes_back_with_given_parameters():
    objective, params = make(Normed)
    doubled = jax.tree.map(lambda a: 2 * a, params)
    module = objective.module(doubled)
    assert isinstance(module, Normed)
    assert_close(nnx.to_pure_dict(nnx.state(module, nnx.Param)), doubled, atol=0)
    np.testing.assert_allclose(module(data()["x"]), objective.predict(doubled, data()), **CLOSE)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_sown_values_are_not_state():
    class Sowing(MLP):
        def __call__(self, x):
            h = nnx.tanh(self.a(x))
            self.sow(nnx.Intermediate, "hidden", h)
            return self.b(h)

    objective, params = make(Sowing, microbatch=4)
    loss, _, state, _ = jax.jit(objective.value_and_grad)(params, data())
    assert state == {}
    np.testing.assert_allclose(loss, reference(mlp_loss, params, data())[0], **CLOSE)


def test_state_that_is_counted_not_averaged():
    """Any variable that a forward pass writes comes back, once per piece."""

    class Count(nnx.Variable):
        pass

    class Counting(MLP):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.calls = Count(jnp.int32(0))

        def __call__(self, x):
            self.calls[...] += 1
            return super().__call__(x)

    objective, params = make(Counting, microbatch=4)
    state = jax.jit(objective.value_and_grad)(params, data(10))[2]
    assert state["calls"] == 3


# -- randomness ------------------------------------------------------------------------------------------------------


def test_dropout_follows_the_key():
    objective, params = make(Dropped)
    batch = data()
    off = loss_of(objective, params, batch)
    np.testing.assert_allclose(off, reference(mlp_loss, params, batch)[0], **CLOSE)
    first, again, other = (loss_of(objective, params, batch, jax.random.key(s)) for s in (0, 0, 1))
    assert first == again
    assert len({float(off), float(first), float(other)}) == 3
    assert loss_of(objective.evaluation(), params, batch, jax.random.key(0)) == off


def test_dropout_masks_have_the_right_rate_and_differ_between_examples():
    class Only(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Param(jnp.ones(()))
            self.drop = nnx.Dropout(0.25, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.scale * x)

    objective, params = make(Only, losses.SquaredError("t"))
    kept = np.asarray(objective.predict(params, {"x": jnp.ones((100, 100))}, jax.random.key(0)))
    np.testing.assert_allclose(np.unique(kept), [0, 1 / 0.75], rtol=1e-6)
    assert abs(np.mean(kept > 0) - 0.75) < 5 * np.sqrt(0.25 * 0.75 / kept.size)
    assert len(np.unique(kept > 0, axis=0)) == 100


def test_random_streams_of_a_module_are_independent():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Param(jnp.ones(()))
            self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            return jnp.stack([drop(self.scale * x) for drop in self.drops], axis=1)

    objective, params = make(Two, losses.SquaredError("t"))
    kept = np.asarray(objective.predict(params, {"x": jnp.ones((1, 10_000))}, jax.random.key(0)))[0] > 0
    assert abs(np.mean(kept[0] == kept[1]) - 0.5) < 5 * 0.5 / np.sqrt(10_000)


def test_the_hessian_with_dropout_is_that_of_one_mask():
    objective, params = make(Dropped)
    batch, key = data(), jax.random.key(3)
    # the mask, read off a forward pass: outputs are linear in the hidden units
    hidden = lambda m, b: m.drop(nnx.tanh(m.a(b["x"]))) / nnx.tanh(m.a(b["x"]))
    mask = make(Dropped, predict=hidden)[0].predict(params, batch, key)
    assert set(np.unique(np.round(mask, 5))) == {0.0, 2.0}

    def plain(p, batch):
        h = jnp.tanh(batch["x"] @ p["a"]["kernel"] + p["a"]["bias"]) * batch["m"]
        z = h @ p["b"]["kernel"] + p["b"]["bias"]
        log_p = z - jnp.log(jnp.sum(jnp.exp(z), axis=-1, keepdims=True))
        return -jnp.mean(jnp.sum(log_p * (batch["y"][:, None] == jnp.arange(CLASSES)), axis=-1))

    want = reference(plain, params, {**batch, "m": np.round(mask, 5)})
    assert_close(derivatives(objective, params, batch, key)[0], want)


def test_pieces_have_dropout_masks_of_their_own():
    objective, params = make(Dropped, microbatch=5)
    same = jax.tree.map(lambda a: np.repeat(a[:1], 10, axis=0), data())
    outputs = jax.jit(functools.partial(objective.value_and_grad, observe=lambda z, piece: z))(
        params, same, jax.random.key(0)
    )[3]
    assert outputs.shape == (2, 5, CLASSES)
    assert not np.array_equal(outputs[0], outputs[1])


# -- transformed modules ---------------------------------------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.linear = nnx.Linear(D, D, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.drop(nnx.tanh(self.linear(x)))


class Stacked(nnx.Module):
    """Three blocks made by vmap and run by scan."""

    def __init__(self, rngs, rate=0.0):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(rngs):
            return Block(rngs, rate)

        self.blocks = blocks(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return block(x)

        return run(x, self.blocks)


class Remat(nnx.Module):
    def __init__(self, rngs):
        self.mlp = MLP(rngs)

    def __call__(self, x):
        return nnx.remat(lambda mlp, x: mlp(x))(self.mlp, x)


def test_remat():
    objective, params = make(Remat)
    want = reference(lambda p, b: mlp_loss(p["mlp"], b), params, data())
    assert_close(derivatives(objective, params, data())[0], want)


def stacked_loss(p, batch):
    x = batch["x"]
    for i in range(3):
        x = jnp.tanh(x @ p["blocks"]["linear"]["kernel"][i] + p["blocks"]["linear"]["bias"][i])
        x = x * batch["m"][:, i] if "m" in batch else x
    log_p = x - jnp.log(jnp.sum(jnp.exp(x), axis=-1, keepdims=True))
    return -jnp.mean(jnp.sum(log_p * (batch["y"][:, None] == jnp.arange(D)), axis=-1))


def test_scanned_layers():
    objective, params = make(Stacked)
    assert_close(derivatives(objective, params, data())[0], reference(stacked_loss, params, data()))


def test_scanned_layers_with_dropout_have_a_mask_each():
    dropped = lambda rngs: Stacked(rngs, rate=0.5)
    objective, params = make(dropped)
    key = jax.random.key(5)
    np.testing.assert_allclose(loss_of(objective, params, data()), reference(stacked_loss, params, data())[0], **CLOSE)

    # Zero kernels and unit biases: a layer's output is its mask times tanh(1), whatever came before.
    def masks(model, batch):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def run(x, block):
            return x, block(x) / jnp.tanh(1.0)

        return jnp.moveaxis(run(batch["x"], model.blocks)[1], 0, 1)

    ones = {"blocks": {"linear": {"kernel": jnp.zeros((3, D, D)), "bias": jnp.ones((3, D))}}}
    m = np.round(make(dropped, predict=masks)[0].predict(ones, data(), key), 5)
    assert set(np.unique(m)) == {0.0, 2.0}
    assert not np.array_equal(m[:, 0], m[:, 1]) and not np.array_equal(m[:, 1], m[:, 2])
    want = reference(stacked_loss, params, {**data(), "m": m})
    (first, *_), _ = got = derivatives(objective, params, data(), key)
    assert_close(got[0], want)
    assert first == derivatives(objective, params, data(), key)[0][0]
    assert first != derivatives(objective, params, data(), jax.random.key(6))[0][0]


# -- masked examples -------------------------------------------------------------------------------------------------


@jax.jit
def quantities(objective, params, batch):
    """Everything that is a function of the batch: loss, gradient and products."""
    return {
        "loss and gradient": objective.value_and_grad(params, batch)[:2],
        "hvp": products.hvp(objective, params, params, batch),
        "ggnvp": products.ggnvp(objective, params, params, batch),
        "empirical": products.fvp(objective, params, params, batch, fisher="empirical"),
        "sampled": products.fvp(objective, params, params, batch, jax.random.key(0), fisher="sampled"),
    }


def regression(n=N):
    batch = data(n)
    return {"x": batch["x"], "t": np.random.default_rng(2).normal(size=(n, CLASSES)).astype(np.float32)}


@pytest.mark.parametrize("microbatch", [None, 4])
def test_a_fully_masked_batch_is_zero_and_has_zero_derivatives(microbatch):
    objective, params = make(loss=losses.SquaredError("t"), microbatch=microbatch)
    got = quantities(objective, params, {**regression(), "mask": np.zeros(N)})
    assert_close(got, jax.tree.map(np.zeros_like, got), atol=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_targets_of_masked_examples_may_be_anything(bad):
    objective, params = make(loss=losses.SquaredError("t"))
    mask = np.arange(N) % 3 != 0
    clean = {**regression(), "mask": mask}
    spoilt = {**clean, "t": np.where(mask[:, None], clean["t"], np.float32(bad))}
    assert_close(quantities(objective, params, spoilt), quantities(objective, params, clean), atol=0)


def test_labels_of_masked_examples_may_be_anything():
    objective, params = make()
    mask = np.arange(N) % 3 != 0
    clean = {**data(), "mask": mask}
    spoilt = {**clean, "y": np.where(mask, clean["y"], -100)}
    assert_close(derivatives(objective, params, spoilt), derivatives(objective, params, clean), atol=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_inputs_of_masked_examples_must_be_finite_for_derivatives_only(bad):
    """The loss does not see them; a model's backward pass multiplies them by zero, so a gradient is visibly NaN."""
    objective, params = make()
    mask = np.arange(N) % 3 != 0
    clean = {**data(), "mask": mask}
    spoilt = {**clean, "x": np.where(mask[:, None], clean["x"], np.float32(bad))}
    (loss, grads, _), _ = derivatives(objective, params, spoilt)
    assert loss == derivatives(objective, params, clean)[0][0]
    assert np.all(np.isnan(grads["a"]["kernel"]))


def test_outputs_of_masked_examples_may_overflow():
    """Infinite outputs of finite inputs: the chain is cut between model and loss."""
    shifted = lambda model, batch: model(batch["x"]) + batch["shift"][:, None] + batch["shift"][:, None]
    objective, params = make(predict=shifted, loss=losses.SquaredError("t"))
    mask = np.arange(N) % 3 != 0
    clean = {**regression(), "mask": mask, "shift": np.zeros(N, np.float32)}
    spoilt = {**clean, "shift": np.where(mask, np.float32(0), np.float32(3e38))}
    assert np.array_equal(np.all(np.isfinite(objective.predict(params, spoilt)), axis=1), mask)
    assert_close(derivatives(objective, params, spoilt), derivatives(objective, params, clean), atol=0)


# -- micro-batches ---------------------------------------------------------------------------------------------------


class Rigged(losses.SoftmaxCrossEntropy):
    """Its samples are an entry of the batch, so that they do not depend on how the batch is cut."""

    def sample_targets(self, outputs, batch, key):
        return {**batch, self.labels: batch["drawn"]}


def rigged(n=N):
    rng = np.random.default_rng(4)
    drawn = rng.integers(0, CLASSES, n).astype(np.int32)
    return {**data(n), "drawn": drawn, "weights": rng.random(n).astype(np.float32), "mask": np.arange(n) % 4 != 1}


@pytest.mark.parametrize("microbatch", [5, 4])  # 4 leaves a remainder of 10
def test_pieces_add_up_to_the_whole(microbatch):
    objective, params = make(loss=Rigged("y"))
    want = quantities(objective, params, rigged())
    assert_close(quantities(objective.with_microbatch(microbatch), params, rigged()), want)


@pytest.mark.parametrize("microbatch", [1, N, N + 1])
def test_pieces_of_one_example_and_of_all(microbatch):
    objective, params = make(microbatch=microbatch)
    want = reference(mlp_loss, params, data())[0]
    np.testing.assert_allclose(loss_of(objective, params, data()), want, **CLOSE)


@pytest.mark.parametrize("microbatch", [3, 5])
def test_weights_of_pieces_are_summed_not_averaged(microbatch):
    """Whole numbers small enough for float32 to add exactly: the sums are exactly those of the whole batch."""

    class Sum(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jnp.zeros(()))

        def __call__(self, x):
            return self.w + x

    objective, params = make(Sum, losses.PerExample(lambda z, batch: z), microbatch=microbatch)
    x, weights = np.arange(1.0, 11, dtype=np.float32), np.array([1, 0, 0, 0, 0, 8, 0, 0, 2, 3], np.float32)
    total = lambda piece, key: objective.total(params, piece, key)
    assert objective.accumulate(total, {"x": x, "weights": weights}, None) == (np.dot(x, weights), 14)
    loss, grads, _, _ = objective.value_and_grad(params, {"x": x, "weights": weights})
    assert loss == np.float32(np.dot(x, weights) / 14) and grads["w"] == 1


def test_a_masked_piece_counts_for_nothing():
    objective, params = make(microbatch=5)
    batch = data()
    even = np.arange(N) % 2 == 0  # piece 0 holds the even rows: see below
    want = reference(mlp_loss, params, {**batch, "w": even.astype(np.float64)})[:2]
    assert_close(derivatives(objective, params, {**batch, "mask": even})[0][:2], want)


def test_observations_are_stacked_in_the_order_of_the_pieces():
    """Piece j holds rows j, j + pieces, ...; what is left over comes last."""
    objective, params = make(microbatch=2)
    batch = {**data(8), "row": np.arange(8)}
    observe = lambda outputs, piece: (piece["row"], outputs)
    run = jax.jit(lambda objective, batch: objective.value_and_grad(params, batch, observe=observe)[3])
    rows, outputs = run(objective, batch)
    np.testing.assert_array_equal(rows, [[0, 4], [1, 5], [2, 6], [3, 7]])
    np.testing.assert_allclose(outputs, np.asarray(objective.predict(params, batch))[rows], **CLOSE)
    np.testing.assert_array_equal(run(objective.with_microbatch(None), batch)[0], [np.arange(8)])
    total = lambda batch: objective.value_and_grad(params, batch, observe=lambda _, piece: jnp.sum(piece["row"]))[3]
    ragged = {**data(7), "row": np.arange(7)}
    np.testing.assert_array_equal(jax.jit(total)(ragged), [0 + 3, 1 + 4, 2 + 5, 6])


@pytest.mark.parametrize("n", [8, 10])
def test_batch_norm_sees_a_piece_at_a_time(n):
    """Loss, gradient and running averages by hand, piece by piece in order."""
    objective, params = make(Normed, microbatch=4)
    batch = data(n)
    (loss, grads, _), state = derivatives(objective, params, batch)
    rows = [[0, 2, 4, 6], [1, 3, 5, 7], [8, 9]][: -(-n // 4)]
    pieces = [jax.tree.map(lambda a, r=r: a[r], batch) for r in rows]
    parts = [reference(normed_loss, params, piece)[:2] for piece in pieces]
    mean = lambda *leaves: sum(len(r) * leaf for r, leaf in zip(rows, leaves, strict=True)) / n
    assert_close((loss, grads), jax.tree.map(mean, *parts))
    running_mean, running_var = np.zeros(HIDDEN), np.ones(HIDDEN)
    for piece in pieces:
        m, v = statistics_of(params, piece["x"])
        running_mean, running_var = 0.9 * running_mean + 0.1 * m, 0.9 * running_var + 0.1 * v
    assert_close(state, {"norm": {"mean": running_mean, "var": running_var}})


# -- jit -------------------------------------------------------------------------------------------------------------


def test_an_objective_is_an_argument_of_jit_and_does_not_retrace():
    traces = []

    def predict(model, batch):
        traces.append(1)
        return model(batch["x"])

    objective, params = make(Normed, predict=predict)

    @jax.jit
    def step(objective, params, batch, key):
        loss, grads, state, _ = objective.value_and_grad(params, batch, key)
        return objective.with_state(state), jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

    objective, params, first = step(objective, params, data(), jax.random.key(0))
    count = len(traces)
    for seed in range(1, 3):
        objective, params, loss = step(objective, params, data(seed=seed), jax.random.key(seed))
    assert len(traces) == count > 0
    assert loss != first
    assert np.all(objective.model_state["norm"]["var"] != 1)
    step(objective.evaluation(), params, data(), jax.random.key(0))  # another mode is another program
    assert len(traces) > count


# -- loss-only objectives --------------------------------------------------------------------------------------------


def linear_mean(params, batch):
    x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
    w = batch.get("mask", jnp.ones(x.shape[0])) if isinstance(batch, dict) else jnp.ones(x.shape[0])
    return jnp.sum(w * (x @ params[0] + params[1] - y) ** 2) / jnp.sum(w)


@pytest.mark.parametrize(("kind", "microbatch"), [("dict", None), ("masked", 4), ("masked", 5), ("tuple", 4)])
def test_loss_only_objectives(kind, microbatch):
    objective = Objective.from_loss(linear_mean, microbatch=microbatch)
    assert not objective.has_outputs
    batch = data()
    batch = {"x": batch["x"], "y": batch["y"].astype(np.float32)}
    if kind == "masked":
        batch["mask"] = (np.arange(N) % 4 != 1).astype(np.float32)
    if kind == "tuple":
        batch = (batch["x"], batch["y"])
    params = (np.array([0.5, -1, 2], np.float32), np.float32(0.3))
    want = reference(linear_mean, params, batch)
    got, state = derivatives(objective, params, batch, jax.random.key(0))
    assert_close(got, want)
    assert state == {}


def test_loss_only_pieces_are_weighted_by_a_mask_over_time():
    """A mean over tokens: a piece counts for its unmasked tokens."""
    token_mean = lambda p, batch: jnp.sum(batch["mask"] * batch["x"] * p) / jnp.sum(batch["mask"])
    rng = np.random.default_rng(0)
    batch = {"x": rng.random((6, 5)), "mask": rng.random((6, 5)) < np.linspace(0.2, 1, 6)[:, None]}
    batch = {"x": batch["x"].astype(np.float32), "mask": batch["mask"].astype(np.float32)}
    want = np.sum(batch["mask"] * batch["x"].astype(np.float64)) / batch["mask"].sum()
    for microbatch in (None, 2, 4):
        got = Objective.from_loss(token_mean, microbatch=microbatch).loss(jnp.float32(1), batch)
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_loss_only_objectives_take_batches_that_are_not_examples():
    objective = Objective.from_loss(lambda p, A: 0.5 * p @ A["matrix"] @ p + A["offset"])
    A = {"matrix": jnp.diag(jnp.arange(1.0, 4)), "offset": jnp.float32(1)}
    (loss, grads, Hv), _ = derivatives(objective, jnp.ones(3), A)
    assert loss == 4
    np.testing.assert_allclose((grads, Hv), [[1, 2, 3]] * 2)
    assert Objective.from_loss(lambda p, batch: 0.25).loss(jnp.ones(3), None) == 0.25


# -- errors at the edge ----------------------------------------------------------------------------------------------


def test_errors_of_from_model():
    loss = losses.SoftmaxCrossEntropy("y")
    with pytest.raises(TypeError, match=r"from_model\(model\) should be an nnx.Module, not function"):
        Objective.from_model(forward, forward, loss)
    with pytest.raises(TypeError, match=r"from_model\(loss\) should be a curvtrain.losses.Loss.*losses.PerExample"):
        make(loss=lambda outputs, batch: 0.0)
    with pytest.raises(ValueError, match=r"from_model\(microbatch\) should be at least 1, not 0"):
        make(microbatch=0)
    with pytest.raises(TypeError, match=r"from_model\(microbatch\) should be an integer, not 2.5"):
        make(microbatch=2.5)


def test_parameters_must_be_real_floating_numbers():
    class Integer(MLP):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.a.table = nnx.Param(jnp.arange(3))

    with pytest.raises(TypeError, match=r"Parameter a.table is int32.*wrt="):
        make(Integer)
    _, params = make(Integer, wrt=lambda path, value: value[...].dtype == jnp.float32)
    assert set(params["a"]) == {"kernel", "bias"}
    with pytest.raises(ValueError, match="no trainable variables"):
        make(lambda rngs: nnx.Dropout(0.5, rngs=rngs))


def test_errors_of_from_loss():
    with pytest.raises(TypeError, match=r"from_loss\(loss_fn\) should be a function, not int"):
        Objective.from_loss(3)
    with pytest.raises(ValueError, match=r"from_loss\(microbatch\) should be at least 1"):
        Objective.from_loss(linear_mean, microbatch=-1)
    vector = Objective.from_loss(lambda params, batch: params * batch["x"])
    with pytest.raises(ValueError, match=r"should return a scalar, not shape \(3,\)"):
        vector.loss(jnp.ones(3), {"x": jnp.ones(3)})


def test_loss_only_objectives_have_no_outputs():
    objective = Objective.from_loss(linear_mean)
    for call in (lambda: objective.predict({}, {}), lambda: objective.module({}), lambda: objective.loss_of_outputs):
        with pytest.raises(TypeError, match=r"made with Objective.from_loss.*from_model\(model, predict, loss\)"):
            call()


@pytest.mark.parametrize(
    ("batch", "lengths"),
    [({"x": np.ones((4, 2)), "y": np.ones(3)}, "{'x': 4, 'y': 3}"), ({"x": np.ones(4), "s": 1.0}, "'s': 'a scalar'")],
)
def test_a_ragged_batch(batch, lengths):
    with pytest.raises(ValueError, match=re.escape(lengths)):
        batch_size(batch)
    objective, params = make(microbatch=2)
    with pytest.raises(ValueError, match="one common length"):
        objective.loss(params, batch)


# -- a sharded batch -------------------------------------------------------------------------------------------------

COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)(?:-start)?\(")


def collectives(compiled):
    """(operation, its largest result, in elements) for every collective of a compiled program."""
    found = []
    for shapes, operation in COLLECTIVE.findall(compiled.as_text()):
        sizes = [np.prod([int(d) for d in dims.split(",") if d]) for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]
        found.append((operation, int(max(sizes))))
    return found


def test_pieces_of_a_sharded_batch_need_no_communication():
    """Only sums over the batch cross devices: losses, gradients and products, none larger than the parameters."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    model = lambda rngs: MLP(rngs, inputs=D, hidden=8)
    objective, params = make(model, microbatch=16)
    batch = data(64)
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    replicated = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

    compiled = derivatives.lower(objective, replicated, sharded).compile()
    found = collectives(compiled)
    assert {operation for operation, _ in found} == {"all-reduce"}
    assert max(size for _, size in found) <= max(leaf.size for leaf in jax.tree.leaves(params)) < batch["x"].size
    assert_close(derivatives(objective, replicated, sharded)[0], reference(mlp_loss, params, batch))
