"""Orthogonalised updates: their singular values, their scales, parameters of more axes, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from curvtrain import optim

RNG = np.random.default_rng(0)
BOUNDS = {"standard": (0.65, 1.15), "polar_express": (0.84, 1.15), "exact": (1 - 1e-4, 1 + 1e-4)}


def matrix(rows, columns, smallest=0.02, rng=RNG):
    """With singular values from the norm's hundredth up."""
    U, _, V = np.linalg.svd(rng.normal(size=(rows, columns)), full_matrices=False)
    values = np.geomspace(1, smallest, len(V))
    return jnp.float32((U * values) @ V)


def polar(M):
    U, _, V = np.linalg.svd(np.asarray(M, np.float64), full_matrices=False)
    return U @ V


@pytest.mark.parametrize("preset", BOUNDS)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_singular_values(preset, shape):
    M = matrix(*shape)
    tx = optim.orthogonalize(preset, dtype="float32")
    U, _ = tx.update({"w": M}, tx.init({"w": M}))
    low, high = BOUNDS[preset]
    values = np.linalg.svd(np.asarray(U["w"], np.float64), compute_uv=False)
    assert low <= values.min() and values.max() <= high
    if preset == "exact":
        np.testing.assert_allclose(U["w"], polar(M), atol=1e-4)


def test_scales():
    M = matrix(4, 9)
    of = lambda scale: optim.orthogonalize("exact", scale=scale).update({"w": M}, optax.EmptyState())[0]["w"]
    plain = of("none")
    for scale, factor in {"muon": 1.5, "rms": 0.2 * 3, "spectral": 1.5}.items():
        np.testing.assert_allclose(of(scale), factor * plain, rtol=1e-5)
    M = matrix(9, 4)
    np.testing.assert_allclose(np.linalg.norm(of("muon")), 2, rtol=1e-3)  # narrow ones stay as they are


def test_more_axes_are_matrices_by_patterns():
    """A convolution as it is by default, scanned layers and heads as the patterns say, each by itself."""
    params = {
        "conv": {"kernel": jnp.asarray(RNG.normal(size=(3, 3, 2, 5)), jnp.float32)},
        "scanned": {"kernel": jnp.asarray(RNG.normal(size=(4, 6, 5)), jnp.float32)},
        "query": {"kernel": jnp.asarray(RNG.normal(size=(6, 2, 3)), jnp.float32)},
    }
    patterns = [("scanned", "layer i o -> layer i o"), ("query", "i head o -> head i o")]
    tx = optim.orthogonalize("exact", patterns=patterns)
    found, _ = tx.update(params, tx.init(params))
    np.testing.assert_allclose(
        found["conv"]["kernel"].reshape(18, 5), polar(params["conv"]["kernel"].reshape(18, 5)), atol=1e-4
    )
    for layer in range(4):
        np.testing.assert_allclose(
            found["scanned"]["kernel"][layer], polar(params["scanned"]["kernel"][layer]), atol=1e-4
        )
    for head in range(2):
        np.testing.assert_allclose(
            found["query"]["kernel"][:, head], polar(params["query"]["kernel"][:, head]), atol=1e-4
        )


def test_nothing_is_done_to_nothing():
    params = {"zero": jnp.zeros((3, 4)), "none": jnp.zeros((0, 4))}
    tx = optim.orthogonalize()
    found, _ = tx.update(params, tx.init(params))
    assert not np.any(found["zero"]) and found["none"].shape == (0, 4)


def reference(theta, gradients, rate, b1, decay):
    """Muon's recursion for one matrix, with an exact polar factor."""
    M = np.zeros_like(theta)
    for g in gradients:
        M = b1 * M + (1 - b1) * g
        U = (1 - b1) * g + b1 * M
        theta = (1 - rate * decay) * theta - rate * 0.2 * np.sqrt(max(theta.shape)) * polar(U)
    return theta


def test_muon_replays_its_recursion_and_leaves_the_rest_to_adamw():
    rng = np.random.default_rng(1)
    params = {
        "embed": jnp.float32(rng.normal(size=(7, 4))),
        "layer": {"kernel": jnp.float32(rng.normal(size=(4, 6))), "bias": jnp.zeros(6)},
    }
    gradients = [jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), params) for _ in range(20)]
    options = dict(b1=0.9, weight_decay=0.1, preset="exact")
    tx, adamw = optim.muon(1e-2, **options), optax.adamw(1e-2, 0.9, 0.95, weight_decay=0.1)
    by_muon, by_adamw, state, other = params, params, tx.init(params), adamw.init(params)
    update = jax.jit(tx.update)
    for g in gradients:
        u, state = update(g, state, by_muon)
        by_muon = optax.apply_updates(by_muon, u)
        u, other = adamw.update(g, other, by_adamw)
        by_adamw = optax.apply_updates(by_adamw, u)
    right = reference(np.float64(params["layer"]["kernel"]), [g["layer"]["kernel"] for g in gradients], 1e-2, 0.9, 0.1)
    np.testing.assert_allclose(by_muon["layer"]["kernel"], right, atol=2e-5)
    np.testing.assert_allclose(by_muon["embed"], by_adamw["embed"], rtol=1e-6)
    np.testing.assert_allclose(by_muon["layer"]["bias"], by_adamw["layer"]["bias"], rtol=1e-6)


def test_normuon_evens_rows_out_and_keeps_the_norm():
    U = jnp.asarray(RNG.normal(size=(6, 5)) * np.array([10, 1, 1, 1, 0.1]), jnp.float32)
    tx = optim.normuon(0.9)
    state = tx.init({"w": U})
    for _ in range(3):
        found, state = tx.update({"w": U}, state)
    size = np.sqrt(np.mean(np.square(found["w"]), axis=0))
    np.testing.assert_allclose(size, size.mean(), rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found["w"]), np.linalg.norm(U), rtol=1e-5)


def layers(count=16, width=16):
    rng = np.random.default_rng(2)
    return {f"{i}": {"kernel": jnp.float32(rng.normal(size=(width, width)))} for i in range(count)}


@pytest.mark.parametrize("spec", [P(), P("fsdp")], ids=["replicated", "fsdp"])
def test_each_device_iterates_what_it_owns(spec):
    """An eighth of the work for each of eight devices, and the same numbers."""
    params, tx = layers(), optim.orthogonalize(dtype="float32")
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    alone = jax.jit(lambda u: tx.update(u, optax.EmptyState())[0])
    right, whole = alone(params), alone.lower(params).compile().cost_analysis()["flops"]
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, spec))
        program = jax.jit(functools.partial(lambda u: tx.update(u, optax.EmptyState())[0]))
        found, share = program(placed), program.lower(placed).compile().cost_analysis()["flops"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, right)
    assert share <= 1.3 / 8 * whole


def test_mistakes_are_reported():
    with pytest.raises(ValueError, match=r"orthogonalize is for matrices, and layer/bias has the shape \(3,\)"):
        optim.orthogonalize().init({"layer": {"bias": jnp.ones(3)}})
    with pytest.raises(ValueError, match=r"orthogonalize\(preset\) should be one of 'standard', .* not 'polar'"):
        optim.orthogonalize("polar")
    with pytest.raises(ValueError, match=r"the pattern 'a b -> b a' does not fit w of shape \(2, 3, 4\)"):
        optim.orthogonalize(patterns=[("w", "a b -> b a")]).init({"w": jnp.ones((2, 3, 4))})
    with pytest.raises(ValueError, match=r"makes no matrices of w, but the shape \(6,\)"):
        optim.orthogonalize(patterns=[("w", "a b -> (a b)")]).init({"w": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match=r"orthogonalize\(patterns\) of 'w' should say how axes become"):
        optim.orthogonalize(patterns=[("w", "a b")])
    with pytest.raises(TypeError, match=r"muon\(patterns\) should be a list of .* pairs, not 'w'"):
        optim.muon(patterns="w")
    with pytest.raises(ValueError, match=r"muon finds no hidden matrix among bias \(3,\), embed \(4, 2\)"):
        optim.muon().init({"bias": jnp.ones(3), "embed": jnp.ones((4, 2))})
    with pytest.raises(ValueError, match=r"muon\(normalize\) should be at least 0.0 and below 1.0, not 1.0"):
        optim.muon(normalize=1.0)
    with pytest.raises(ValueError, match=r"muon\(adam_learning_rate\) should be at least 0.0, not -1"):
        optim.muon(adam_learning_rate=-1)
    with pytest.raises(ValueError, match=r"muon\(others\): '\(' is not a regular expression"):
        optim.muon(others="(")
