"""Packed vectors against the trees that they are made of, and programs that do not grow with the number of leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from curvtrain.curvature import Lanczos, trees
from curvtrain.curvature.packing import Packing

SHAPES = {"a": (2, 3), "b": (4,), "c": (2, 3), "e": (0, 5), "s": ()}
MESH = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
LAYOUTS = {"raveled": None, "stacked": MESH}


def tree(seed, lead=(), dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=lead + shape), dtype) for name, shape in SHAPES.items()}


def layout(name, basis, largest=None):
    """The packing of a basis in one of the two layouts."""
    with jax.set_mesh(MESH) if LAYOUTS[name] else jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return Packing.of_basis(basis, largest)


@pytest.mark.parametrize("largest", [None, 4, -1])
@pytest.mark.parametrize("name", LAYOUTS)
def test_unpacking_gives_back_what_was_packed(name, largest):
    basis, vector = tree(0, (3,)), tree(1, dtype=jnp.bfloat16)
    packing = layout(name, basis, largest)
    unpack = packing.unpacker(jnp.int32(0))
    jax.tree.map(np.testing.assert_array_equal, unpack(packing.pack(basis)), basis)
    jax.tree.map(np.testing.assert_array_equal, unpack(packing.pack(vector)), trees.wide(vector))
    found = trees.coefficients(packing.pack(basis), packing.pack(vector))
    np.testing.assert_allclose(found, trees.coefficients(basis, trees.wide(vector)), rtol=1e-5)
    draw = unpack(packing.random(jax.random.key(3), 7))
    jax.tree.map(np.testing.assert_array_equal, draw, trees.random(jax.random.key(3), vector, 7))


def test_layouts():
    shapes = lambda packing, basis: [array.shape for array in packing.pack(basis)]
    basis = tree(0, (3,))
    assert shapes(layout("raveled", basis), basis) == [(3, 17)]
    assert shapes(layout("stacked", basis), basis) == [(3, 2, 2, 3), (3, 1, 4), (3, 1, 0, 5), (3, 1)]
    assert shapes(layout("raveled", basis, 4), basis) == [(3, 1, 2, 3), (3, 5), (3, 1, 2, 3)]
    # an array that lies on a mesh is enough, without an ambient one
    spread = jax.device_put(basis, NamedSharding(MESH, PartitionSpec()))
    assert len(Packing.of_basis(spread).groups) == 4
    assert jax.eval_shape(lambda b: jnp.zeros(len(Packing.of_basis(b).groups)), basis).shape == (1,)


def instructions(leaves, mesh=None):
    """Operations in the program of a refresh over so many leaves, for a map that costs one per leaf."""
    like = {f"{i}": jnp.ones((8, 8) if i % 2 else 8) for i in range(leaves)}
    estimator = Lanczos(4)
    pairs = estimator.init(None, like)
    run = lambda pairs, like, key: estimator.of_map(lambda v: jax.tree.map(jnp.multiply, like, v), pairs, key)
    if mesh:
        pairs, like = jax.device_put((pairs, like), NamedSharding(mesh, PartitionSpec()))
    lowered = jax.jit(run).lower(pairs, like, jax.random.key(0))
    return sum(" = " in line for line in lowered.as_text().splitlines())


@pytest.mark.parametrize("mesh", [None, MESH], ids=["one device", "a mesh"])
def test_the_program_of_a_refresh_hardly_grows_with_the_leaves(mesh):
    """A leaf costs its product, packing and unpacking, the iteration is there once.

    Measured: 1,007 operations for 10 leaves and 2,147 for 150, 8 per leaf; on a mesh, with two shapes and so two
    arrays, 1,387 and 3,227. When every leaf had an iteration of its own, 3,051 and 32,311.
    """
    few, many = instructions(10, mesh), instructions(150, mesh)
    assert few <= 1500 and (many - few) / 140 <= 14, (few, many)


@pytest.mark.parametrize(
    "specs",
    [
        {"w": PartitionSpec("fsdp"), "u": PartitionSpec(None, "fsdp"), "b": PartitionSpec(), "x": PartitionSpec()},
        {"w": PartitionSpec(), "u": PartitionSpec(), "b": PartitionSpec(), "x": PartitionSpec()},
    ],
    ids=["split along different axes", "replicated"],
)
def test_a_sharded_refresh_is_that_of_one_device(specs):
    """Equal shapes that are split along different axes among them; the same random numbers, sums in another order."""
    shapes = {"w": (8, 8), "u": (8, 8), "b": (8,), "x": (3, 5)}
    rng = np.random.default_rng(0)
    diagonal = {name: jnp.asarray(rng.uniform(0.1, 3, size=shape), jnp.float32) for name, shape in shapes.items()}
    estimator = Lanczos(3, 1, m=40)

    @functools.partial(jax.jit, static_argnames="rounds")
    def run(diagonal, key, rounds=2):
        def matvec(v):  # a diagonal and something that mixes all leaves
            mean = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(v)) / 151
            return jax.tree.map(lambda d, v: d * v + mean, diagonal, v)

        pairs = estimator.init(None, diagonal)
        for i in range(rounds):
            pairs = estimator.of_map(matvec, pairs, jax.random.fold_in(key, i))
        return pairs

    one = run(diagonal, jax.random.key(0))
    spread = {name: jax.device_put(leaf, NamedSharding(MESH, specs[name])) for name, leaf in diagonal.items()}
    with jax.set_mesh(MESH):
        many = run(spread, jax.random.key(0))
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(diagonal)]).astype(np.float64)
    want = np.linalg.eigvalsh(np.diag(flat) + 1 / 151)
    for pairs in (one, many):
        np.testing.assert_allclose(pairs.values, [*want[::-1][:3], want[0]], atol=1e-5)
    np.testing.assert_allclose(many.values, one.values, atol=1e-5)
    vectors = lambda pairs: trees.matrix(jax.device_get(pairs.vectors))
    np.testing.assert_allclose(np.abs(np.sum(vectors(one) * vectors(many), axis=1)), 1.0, atol=1e-4)
