"""The recipes' models: shapes, slow references, evaluation views, and Hessian-vector products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recipes.common.autoencoder import Autoencoder
from recipes.common.language import GRU, Transformer
from recipes.common.resnet import ResNet

TRANSFORMER = {"vocabulary": 7, "length": 6, "layers": 1, "width": 4, "heads": 2}
TOKENS = np.random.RandomState(0).randint(0, 7, (3, 5)).astype(np.int32)
IMAGES = np.random.RandomState(0).randn(4, 8, 8, 2).astype(np.float32)
MODELS = {  # name: (build(rngs=..., dtype=...), inputs); everything that training turns on is on
    "resnet": (functools.partial(ResNet, 3, 2, width=2), IMAGES),
    "autoencoder": (functools.partial(Autoencoder, (6, 5, 3)), IMAGES.reshape(4, -1)[:, :6]),
    "transformer": (functools.partial(Transformer, **TRANSFORMER, dropout=0.3), TOKENS),
    "gru": (functools.partial(GRU, 7, layers=2, width=4, dropout=0.3), TOKENS),
}


def jit(function):
    """Tiny shapes spend their time in the compiler, not in what it produces: let it not optimise."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def rngs(params=0):
    return nnx.Rngs(params=params, dropout=1)


def make(build, **options):
    """`build(rngs=..., **options)` in one compiled program, which is much faster than one operation at a time."""
    graphdefs = []

    def init(key):
        graphdef, state = nnx.split(build(rngs=rngs(key), **options))
        graphdefs.append(graphdef)
        return state

    state = jit(init)(jax.random.key(0))
    return nnx.merge(graphdefs[0], state)


@functools.cache
def made(name):
    """One of `MODELS`; shared between the tests, which do not change it."""
    return make(MODELS[name][0])


def runner(model, method=None):
    """A compiled function inputs -> (outputs, the model's state afterwards); the model itself keeps its state."""
    graphdef, state = nnx.split(model)

    def run(state, inputs):
        merged = nnx.merge(graphdef, state)
        outputs = (method or type(merged).__call__)(merged, inputs)
        return outputs, nnx.state(merged)

    return functools.partial(jit(run), state)


def count(model):
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


def plain(state):
    """The leaves as numpy arrays, random keys as their data."""
    is_key = [jnp.issubdtype(a.dtype, jax.dtypes.prng_key) for a in jax.tree.leaves(state)]
    leaves = zip(jax.tree.leaves(state), is_key, strict=True)
    return [np.asarray(jax.random.key_data(a) if key else a) for a, key in leaves]


# ---------------------------------------------------------------------------------------------- Hessian-vector products


def widen(tree):
    wide = lambda a: jnp.asarray(np.asarray(a, np.float64))
    return jax.tree.map(lambda a: wide(a) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def gradient(name, **options):
    """Of a smooth loss in float64 and in training mode, a function of the parameters; and the point to look at.

    Batch statistics and dropout are on; each call draws the same masks, because the state that it merges is the same.
    """
    build, inputs = MODELS[name]
    inputs, params, rest = widen((inputs, *nnx.state(made(name), nnx.Param, ...)))
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(dtype=jnp.float64, rngs=rngs(), **options)))

    def loss(params):
        outputs = nnx.merge(graphdef, params, rest, copy=True)(inputs)
        assert outputs.dtype == jnp.float64
        return jnp.mean(jnp.tanh(outputs) ** 2)

    rng = np.random.RandomState(0)
    return jax.grad(loss), params, widen(jax.tree.map(lambda p: rng.randn(*p.shape), params))


@functools.cache
def difference_quotient(name, eps=1e-6):
    """Central differences of the gradient along the direction, a list of arrays."""
    function, params, v = gradient(name)
    at = jit(lambda step, p, v: jax.tree.leaves(function(jax.tree.map(lambda p, d: p + step * d, p, v))))
    ahead, behind = at(eps, params, v), at(-eps, params, v)
    return [(np.asarray(a) - np.asarray(b)) / (2 * eps) for a, b in zip(ahead, behind, strict=True)]


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in MODELS), ("transformer", {"remat": True})], ids=str
)
def test_hessian_vector_product_is_the_derivative_of_the_gradient(name, options):
    """Forward-over-reverse against central differences; with remat, against those of the model without."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # flax mixes dtypes by itself
        function, params, v = gradient(name, **options)
        hvp = jit(lambda p, v: jax.jvp(function, (p,), (v,))[1])(params, v)
        differences = difference_quotient(name)
    for (path, actual), expected in zip(jax.tree_util.tree_leaves_with_path(hvp), differences, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6, err_msg=jax.tree_util.keystr(path))
    assert max(np.abs(d).max() for d in differences) > 1e-3


# --------------------------------------------------------------------------------------------------- training and view


@pytest.mark.parametrize("name", MODELS)
def test_view_turns_training_off(name):
    inputs = MODELS[name][1]
    model = made(name)
    view = nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)
    before = plain(nnx.state(view))

    evaluate = runner(view)
    outputs, after = evaluate(inputs)
    for old, new in zip(before, plain(after), strict=True):  # no statistics moved, no key was drawn
        np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(outputs, evaluate(inputs)[0])
    others = np.concatenate([inputs[:1], inputs[:0:-1]])
    np.testing.assert_allclose(evaluate(others)[0][0], outputs[0], rtol=1e-5, atol=1e-6)  # examples are independent

    trained, moved = runner(model)(inputs)  # the model itself is still in training
    if name == "autoencoder":  # which has nothing that differs
        np.testing.assert_array_equal(trained, outputs)
        return
    assert not np.allclose(trained, outputs, atol=1e-4)
    kind = nnx.BatchStat if name == "resnet" else nnx.RngCount
    old, new = (plain(nnx.filter_state(state, kind)) for state in (nnx.state(model), moved))
    changed = [not np.array_equal(a, b) for a, b in zip(old, new, strict=True)]
    assert changed and all(changed)


# --------------------------------------------------------------------------------------------------------------- ResNet


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (56, 0.85)])
def test_resnet_has_the_parameters_of_the_paper(depth, millions):
    """He et al. 2015, table 6, for width 16 without the projections, which the paper's option A does not have."""
    model = nnx.eval_shape(lambda: ResNet(10, 3, depth, rngs=rngs()))
    blocks = list(model.blocks)
    projections = sum(count(b.shortcut) + count(b.shortcut_norm) for b in blocks if b.project)
    assert round((count(model) - projections) / 1e6, 2) == millions
    assert 1 + 2 * len(blocks) + 1 == depth and [b.project for b in blocks].count(True) == 2


@pytest.mark.parametrize(("size", "last"), [(8, 2), (32, 8), (15, 4)])
def test_resnet_shapes(size, last):
    model = nnx.eval_shape(lambda: ResNet(5, 1, width=4, rngs=rngs()))
    graphdef, state = nnx.split(model)
    logits = jax.eval_shape(lambda s, x: nnx.merge(graphdef, s)(x), state, jnp.zeros((2, size, size, 1)))
    assert logits.shape == (2, 5) and logits.dtype == jnp.float32
    stage = jax.eval_shape(
        lambda s, x: nnx.merge(graphdef, s).blocks[2](nnx.merge(graphdef, s).blocks[1](x)),
        state,
        jnp.zeros((2, size, size, 4)),
    )
    assert stage.shape == (2, last, last, 16)


def test_resnet_initial_values():
    model = make(functools.partial(ResNet, 3, 2, width=8, zero_init=True))
    kernel = np.asarray(model.blocks[2].conv2.kernel)  # 3x3, 32 -> 32
    np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / (9 * 32)), rtol=0.03)
    for block in model.blocks:
        assert np.all(np.asarray(block.norm1.scale) == 1) and not np.any(np.asarray(block.norm2.scale))
    x = np.maximum(np.random.RandomState(0).randn(2, 4, 4, 8), 0).astype(np.float32)
    np.testing.assert_array_equal(runner(model.blocks[0])(x)[0], x)  # the identity on what a ReLU gives
    assert np.all(np.asarray(made("resnet").blocks[0].norm2.scale) == 1)  # the default


@pytest.mark.parametrize(("depth", "nearest"), [(0, "8"), (7, "8"), (9, "8 or 14"), (18, "14 or 20")])
def test_resnet_depth(depth, nearest):
    with pytest.raises(ValueError, match=rf"ResNet\(depth={depth}\): the depth is 6n \+ 2 .*; nearest: {nearest}\."):
        ResNet(10, 3, depth, rngs=rngs())


# ---------------------------------------------------------------------------------------------------------- Autoencoder


def test_autoencoder_is_the_product_of_its_layers():
    model = make(functools.partial(Autoencoder, (6, 5, 4, 3), activation=nnx.relu))
    assert [tuple(layer.kernel.shape) for layer in (*model.encoder, *model.decoder)] == [
        (6, 5), (5, 4), (4, 3), (3, 4), (4, 5), (5, 6),
    ]  # fmt: skip
    x = MODELS["autoencoder"][1]
    expected = x.astype(np.float64)
    for index, layer in enumerate((*model.encoder, *model.decoder)):
        expected = expected @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
        if index not in (2, 5):  # the code layer and the last one are linear
            expected = np.maximum(expected, 0)
        if index == 2:
            np.testing.assert_allclose(runner(model, Autoencoder.encode)(x)[0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(runner(model)(x)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(), (4,), (4, 0)])
def test_autoencoder_sizes(sizes):
    with pytest.raises(ValueError, match="at least two positive sizes"):
        Autoencoder(sizes, rngs=rngs())


# ------------------------------------------------------------------------------------------------------ language models


@pytest.mark.parametrize("name", ["transformer", "transformer without dropout", "gru"])
def test_logits_depend_on_the_past_only(name):
    # Attention with and without dropout are two programs in flax.
    model = made(name) if name in MODELS else make(functools.partial(Transformer, **TRANSFORMER))
    run = runner(model)  # the same state, so the same dropout masks, in each call
    logits, _ = run(TOKENS)
    assert logits.shape == (3, 5, 7) and logits.dtype == jnp.float32
    for t in range(5):
        changed = TOKENS.copy()
        changed[:, t] = (changed[:, t] + 1) % 7
        other, _ = run(changed)
        np.testing.assert_allclose(other[:, :t], logits[:, :t], rtol=1e-5, atol=1e-6)
        assert not np.allclose(other[:, t:], logits[:, t:], atol=1e-5)


def test_gru_against_a_loop():
    """Equations of `nnx.GRUCell`, two layers, one step at a time."""
    model = nnx.view(made("gru"), deterministic=True)
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    sequence = np.asarray(model.embed.embedding[...], np.float64)[TOKENS]  # (batch, time, width)
    for layer in model.layers:
        wi, b, wh = (
            np.asarray(p[...]) for p in (layer.cell.dense_i.kernel, layer.cell.dense_i.bias, layer.cell.dense_h.kernel)
        )
        h, states = np.zeros((3, 4)), []
        for t in range(5):
            (ir, iz, i_n), (hr, hz, hn) = np.split(sequence[:, t] @ wi + b, 3, -1), np.split(h @ wh, 3, -1)
            r, z = sigmoid(ir + hr), sigmoid(iz + hz)
            h = (1 - z) * np.tanh(i_n + r * hn) + z * h
            states.append(h)
        sequence = np.stack(states, 1)
    expected = sequence @ np.asarray(model.head.kernel[...]) + np.asarray(model.head.bias[...])
    np.testing.assert_allclose(runner(model)(TOKENS)[0], expected, rtol=1e-4, atol=1e-5)


def test_gru_has_no_random_state_but_dropout():
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(made("gru"), nnx.RngState))]
    assert {path[0] for path in paths} == {"dropout"}


@pytest.mark.parametrize("name", MODELS)
def test_computation_in_bfloat16_keeps_parameters_and_outputs_in_float32(name):
    build, inputs = MODELS[name]
    with jax.numpy_dtype_promotion("standard"):  # flax mixes dtypes by itself
        model = nnx.eval_shape(lambda: build(dtype=jnp.bfloat16, rngs=rngs()))
        graphdef, state = nnx.split(model)
        program = jax.make_jaxpr(lambda s, x: nnx.merge(graphdef, s)(x))(state, inputs)
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    assert [a.dtype for a in program.out_avals] == [jnp.float32]
    assert "bf16[" in str(program)


def test_a_scanned_transformer_is_the_unrolled_one():
    """The same outputs and gradients, from the blocks' parameters in a stack."""
    tokens = np.random.RandomState(0).randint(0, 5, (2, 6))
    options = dict(layers=3, width=8, heads=2)
    unrolled = Transformer(5, 6, **options, rngs=rngs())
    scanned = Transformer(5, 6, **options, scan=True, remat=True, rngs=rngs())
    params = nnx.to_pure_dict(nnx.state(unrolled, nnx.Param))
    blocks = params.pop("blocks")
    params["blocks"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(blocks[i] for i in range(3)))
    nnx.update(scanned, nnx.State(params))

    def gradient(model):
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        loss = lambda p: jnp.mean(jnp.square(nnx.merge(graph, p, rest, copy=True)(tokens)))
        value, grads = jit(jax.value_and_grad(loss))(params)
        return value, nnx.to_pure_dict(grads)

    (value, grads), (expected, reference) = gradient(scanned), gradient(unrolled)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    reference["blocks"] = jax.tree.map(lambda *l: jnp.stack(l), *(reference["blocks"][i] for i in range(3)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, reference)


def test_transformer_errors():
    with pytest.raises(ValueError, match=r"Transformer\(width=10, heads=4\): `heads` should divide `width`"):
        Transformer(7, 6, width=10, rngs=rngs())
    model = nnx.eval_shape(lambda: Transformer(**TRANSFORMER, rngs=rngs()))
    with pytest.raises(ValueError, match="7 positions, but it was built with length=6"):
        model(np.zeros((1, 7), np.int32))


@pytest.mark.parametrize("x", [np.zeros((2, 3)), np.zeros(3, np.int32)])
@pytest.mark.parametrize("name", ["transformer", "gru"])
def test_language_models_take_tokens(name, x):
    model = nnx.eval_shape(lambda: MODELS[name][0](rngs=rngs()))
    with pytest.raises(ValueError, match=f"{type(model).__name__} takes integer tokens"):
        model(x)
