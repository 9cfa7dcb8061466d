"""The placement of arrays on eight devices; `test_meshes.py` shows that it changes no result."""

import collections

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from tiny import CLASSES, FEATURES, Mlp, trainer

from curvtrain import optim
from curvtrain.curvature import Lanczos
from curvtrain.trainer.mesh import sharding

pytestmark = pytest.mark.usefixtures("quick_compile")

BOTH = {"data": 2, "fsdp": 4}
WIDE = 192  # units: then the first kernel is large enough for "fsdp" to split it


def spec(array):
    return array.sharding.spec


# -- the mesh ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "sizes"),
    [
        ({"data": -1}, {"data": 8}),
        ({"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 4}),
        ({"data": 2, "fsdp": -1, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}),
        ({"data": 8, "fsdp": -1}, {"data": 8, "fsdp": 1}),
    ],
)
def test_mesh(axes, sizes):
    assert dict(sharding.make_mesh(axes).shape) == sizes


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            {"dat": -1},
            r"TrainerConfig\(mesh\) axis should be one of 'data', 'fsdp', 'tensor', 'mc', not 'dat'.*mean 'data'",
        ),
        ({"data": 3}, r"mesh=\{'data': 3\}\) should multiply to the 8 devices.*Use -1 for the rest"),
        ({"data": 3, "fsdp": -1}, r"8 devices of this run, and 3 does not divide them"),
        ({"data": 16, "fsdp": -1}, r"8 devices of this run, and 16 does not divide them"),
        ({"data": -1, "fsdp": -1}, r"only one axis can be -1"),
        ({"data": 0}, r"TrainerConfig\(mesh\['data'\]\) should be at least 1, not 0"),
        ({}, r"TrainerConfig\(mesh\) should name at least one axis"),
    ],
)
def test_mesh_errors(axes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(axes)


def test_one_process_holds_whole_batches():
    for axes in ({"data": 8}, {"data": 2, "fsdp": 4}, {"tensor": 8}, {"data": 2, "tensor": 4}):
        assert sharding.process_rows(sharding.make_mesh(axes)) == (0, 1)


@pytest.mark.parametrize(
    ("held", "process"),
    [
        ([[0, 1], [2, 3]], None),
        ([[0, 2], [1, 3]], 0),  # no stretch
        ([[0, 1], [1], [0, 1]], 1),  # another number of them
        ([[0, 1, 2], [3]], 0),  # four are not a multiple of three
    ],
)
def test_pieces_of_a_batch_are_stretches(held, process, monkeypatch):
    """As several processes would have them; all of them raise."""
    Device = collections.namedtuple("Device", ["process_index", "number"])
    pieces = 2 if len(held) == 3 else 4

    class Split:
        def __init__(self, *_):
            pass

        def devices_indices_map(self, shape):
            assert shape == (pieces,)
            return {Device(p, i): (slice(i, i + 1),) for p, own in enumerate(held) for i in own}

    monkeypatch.setattr(sharding, "NamedSharding", Split)
    mesh = sharding.make_mesh({"data": pieces, "tensor": -1})
    if process is None:
        assert sharding.process_rows(mesh) == (0, 2)
        return
    with pytest.raises(ValueError, match=rf"process {process} of {len(held)} has pieces .* of the {pieces} of a batch"):
        sharding.process_rows(mesh)


def test_batches_are_split_over_data_and_fsdp():
    assert sharding.batch_shards(sharding.make_mesh({"tensor": 8})) == 1
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert sharding.batch_shards(mesh) == 4
    assert sharding.batch_spec(mesh) == P(("data", "fsdp"))


# -- parameters --------------------------------------------------------------------------------------------------------


def shapes(**named):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in named.items()}


def specs(tree, rule, annotated=None, mesh=None):
    mesh = sharding.make_mesh(BOTH if mesh is None else mesh)
    return sharding.param_specs(tree, annotated or jax.tree.map(lambda _: P(), tree), rule, mesh)


def test_fsdp_splits_the_largest_axis_that_divides():
    tree = shapes(tall=(512, 64), wide=(64, 512), odd=(510, 64), prime=(511, 63), small=(16, 16), vector=(2048,))
    tree |= shapes(square=(64, 64))
    assert specs(tree, "fsdp") == {
        "tall": P("fsdp", None),
        "wide": P(None, "fsdp"),
        "odd": P(None, "fsdp"),  # 510 is not divisible by 4
        "prime": P(),
        "small": P(),
        "vector": P("fsdp"),
        "square": P(None, "fsdp"),  # the axis that its bias has
    }
    assert set(specs(tree, "replicated").values()) == {P()}


def test_the_first_rule_that_matches_counts():
    tree = {
        "encoder": [shapes(kernel=(8, 16), bias=(16,)), shapes(kernel=(16, 8), bias=(8,))],
        "head": shapes(w=(8, 4)),
    }
    rules = [("encoder/1/kernel", P("fsdp")), ("kernel$", P(None, ("data", "fsdp"))), ("bias", P("data"))]
    assert specs(tree, rules) == {
        "encoder": [{"kernel": P(None, ("data", "fsdp")), "bias": P("data")}, {"kernel": P("fsdp"), "bias": P("data")}],
        "head": {"w": P()},
    }


def test_rules_may_leave_the_rest_to_fsdp():
    tree = shapes(head=(64, 8), kernel=(512, 64), scale=(2048,), small=(16,))
    rules = [("head", P("data")), ("scale", "replicated"), (".*", "fsdp")]
    assert specs(tree, rules) == {"head": P("data"), "kernel": P("fsdp", None), "scale": P(), "small": P()}
    with pytest.raises(ValueError, match=r"sharding\): 'fsdp' needs an 'fsdp' axis in the mesh, which has"):
        specs(tree, rules, mesh={"data": 8})


def test_an_annotation_comes_before_everything():
    tree = shapes(kernel=(512, 64), bias=(64,))
    for rule in ("replicated", "fsdp", [(".*", P("fsdp"))]):
        assert specs(tree, rule, {"kernel": P(None, "data"), "bias": P()})["kernel"] == P(None, "data")


@pytest.mark.parametrize(
    ("rule", "mesh", "message"),
    [
        (
            [("krenel", P("fsdp"))],
            BOTH,
            r"rules \['krenel'\] match no parameter.*'dense/bias', 'dense/kernel'.*regular",
        ),
        ([("kernel", P("fsdp"))], BOTH, r"Sharding of dense/kernel: .* splits an axis of length 6 into 4"),
        ([("kernel", P(None, ("data", "fsdp")))], BOTH, r"axis of length 4 into 8 pieces"),
        ([("bias", P(None, "fsdp"))], BOTH, r"dense/bias: .* has more axes than the parameter's shape \(4,\)"),
        (
            [("bias", P("tensor"))],
            BOTH,
            r"mesh axis 'tensor', but the mesh has \{.*\}. Add it to TrainerConfig\(mesh\)",
        ),
        ("fsdp", {"data": 8}, r"sharding\): 'fsdp' needs an 'fsdp' axis in the mesh, which has \{'data': 8\}"),
    ],
)
def test_sharding_errors(rule, mesh, message):
    with pytest.raises(ValueError, match=message):
        specs({"dense": shapes(kernel=(6, 4), bias=(4,))}, rule, mesh=mesh)


# -- copies of the parameters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1e-3),
        optim.fosi(optax.adam(1e-3)),
        optax.lbfgs(memory_size=3),
        optax.MultiSteps(optax.adam(1e-3), 2),
    ],
    ids=["adamw", "fosi", "lbfgs", "MultiSteps"],
)
def test_moments_are_laid_out_like_their_parameters(optimizer):
    params = shapes(kernel=(512, 64), bias=(64,))
    layout = specs(params, "fsdp")
    state = jax.eval_shape(optimizer.init, params)
    found = sharding.like_params(state, params, layout, sharding.make_mesh(BOTH))
    for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(found, is_leaf=sharding.is_spec), strict=True):
        like = {(512, 64): P("fsdp", None), (3, 512, 64): P(None, "fsdp", None), (3, 64): P(None)}
        assert where == like.get(leaf.shape, P())


def test_parameters_of_equal_names_are_told_apart_by_their_paths():
    params = {"a": shapes(kernel=(64, 64)), "b": {"a": shapes(kernel=(64, 64))}}
    layout = {"a": {"kernel": P("fsdp")}, "b": {"a": {"kernel": P(None, "fsdp")}}}
    state = jax.eval_shape(optax.sgd(0.1, momentum=0.9).init, params)
    assert sharding.like_params(state, params, layout, sharding.make_mesh(BOTH))[0].trace == layout


def test_the_rest_of_an_optimizer_is_split_too():
    """Adafactor's rows and columns, and what is no copy of anything: nothing large is on every device."""
    params, mesh = shapes(kernel=(256, 512), square=(256, 256), bias=(64,)), sharding.make_mesh(BOTH)
    layout = specs(params, "fsdp")
    assert layout == {"kernel": P(None, "fsdp"), "square": P(None, "fsdp"), "bias": P()}
    state = jax.eval_shape(optax.adafactor(1e-3).init, params)
    (factored,) = [s for s in state if hasattr(s, "v_row")]
    (found,) = [s for s in sharding.like_params(state, params, layout, mesh) if hasattr(s, "v_row")]
    assert {factored.v_row["kernel"].shape, factored.v_col["kernel"].shape} == {(256,), (512,)}
    split = {512: P("fsdp"), 256: P(None)}
    assert found.v_row["kernel"] == split[factored.v_row["kernel"].shape[0]]
    assert found.v_col["kernel"] == split[factored.v_col["kernel"].shape[0]]
    assert found.v_row["square"] == found.v_col["square"] == P("fsdp")
    other = {"left": shapes(kernel=(6, 256, 256)), "flat": jax.ShapeDtypeStruct((4096,), jnp.float32)}
    assert sharding.like_params(other, params, layout, mesh) == {
        "left": {"kernel": P(None, None, "fsdp")},
        "flat": P("fsdp"),
    }
    alone = sharding.like_params(other, params, specs(params, "replicated"), mesh)
    assert set(jax.tree.leaves(alone, is_leaf=sharding.is_spec)) == {P()}


def annotated(rngs):
    """An Mlp whose outer kernel says where it lives."""
    model = Mlp(rngs, width=WIDE)
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", None))
    model.outer = nnx.Linear(WIDE, CLASSES, kernel_init=init, rngs=rngs)
    return model


def test_state_is_born_in_its_layout():
    run = trainer(
        model=annotated,
        mesh=BOTH,
        sharding="fsdp",
        ema=0.9,
        optimizer=optim.fosi(optax.adam(1e-2)),
        curvature=Lanczos(k=2),
    )
    state = run.state
    copies = [state.params, state.ema, state.opt_state.base[0].mu, state.opt_state.base[0].nu, state.opt_state.velocity]
    for tree in copies:
        assert spec(tree["inner"]["kernel"]) == P(None, "fsdp")
        assert spec(tree["outer"]["kernel"]) == P("data", None)
        assert tree["inner"]["bias"].sharding.is_fully_replicated  # too small to split
    assert spec(state.curvature.vectors["inner"]["kernel"]) == P(None, None, "fsdp")
    assert spec(state.curvature.vectors["outer"]["kernel"]) == P(None, "data", None)
    assert state.curvature.values.sharding.is_fully_replicated
    shard = state.curvature.vectors["inner"]["kernel"].addressable_shards[0].data
    assert shard.shape == (2, FEATURES, WIDE // 4)


def test_an_annotated_model_needs_its_axes():
    with pytest.raises(ValueError, match=r"outer/kernel.*mesh axis 'data', but the mesh has \{'fsdp': 8\}. Add it to"):
        trainer(model=annotated, mesh={"fsdp": 8})


@pytest.mark.parametrize("options", [dict(batch_size=20), dict(eval_batch_size=12)])
def test_a_batch_is_divisible_over_the_mesh(options):
    ((name, size),) = options.items()
    message = rf"TrainerConfig\({name}={size}\) should be divisible over the mesh \{{'data': 8\}}.*into 8"
    with pytest.raises(ValueError, match=message):
        trainer(**options)
    trainer(mesh={"data": 4, "tensor": 2}, **options)
