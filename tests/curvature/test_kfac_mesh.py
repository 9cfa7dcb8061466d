"""K-FAC's stacks on a mesh: who owns what, the same numbers on any mesh, and what it costs each device."""

import collections
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from curvtrain import CurvatureSchedule, losses, optim
from curvtrain.curvature import KFAC, owners, stacks
from curvtrain.curvature.kfac.factors import matrices_of
from curvtrain.curvature.mesh import axes_for
from curvtrain.curvature.owners import layout as static
from curvtrain.objective import Objective
from curvtrain.trainer import Mismatch
from curvtrain.trainer.mesh import sharding
from curvtrain.trainer.watch.report import collectives
from tests.meshes import on
from tests.trainer import tiny

N, D, LAYERS = 16, 6, 16
INVERSES = ("cholesky", "eigh", "ekfac")
MESHES = ({"data": 8}, {"data": 2, "fsdp": 4})
inverses = pytest.mark.parametrize("inverse", INVERSES)

pytestmark = pytest.mark.usefixtures("quick_compile")


class Equal(nnx.Module):
    """Sixteen equal layers."""

    def __init__(self, rngs, width=D):
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.tanh(layer(x))
        return x


class Twelve(Equal):
    """A number of layers that 8 does not divide."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(12)])


class Uneven(nnx.Module):
    """Layers of five sizes, of which some share a side, some are scanned over, one has groups, and a norm."""

    def __init__(self, rngs):
        self.first = nnx.Linear(D, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.scanned = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs))(rngs.split(3))
        self.wide, self.narrow = nnx.Linear(4, 7, rngs=rngs), nnx.Linear(7, 4, use_bias=False, rngs=rngs)
        self.conv = nnx.Conv(4, 4, (2,), feature_group_count=2, rngs=rngs)
        self.square = nnx.List([nnx.Linear(4, 4, use_bias=False, rngs=rngs) for _ in range(2)])
        self.last = nnx.Linear(4, D, rngs=rngs)

    def __call__(self, x):
        step = lambda x, layer: nnx.tanh(layer(x))
        x = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(self.norm(self.first(x)), self.scanned)
        x = self.narrow(nnx.tanh(self.wide(x)))
        x = self.conv(x.reshape(-1, 1, 4)).reshape(-1, 4)
        for layer in self.square:
            x = nnx.tanh(layer(x))
        return self.last(x)


@functools.cache
def build(model, **options):
    predict = lambda model, batch: model(batch["x"])
    return Objective.from_model(model(nnx.Rngs(0), **options), predict, losses.SquaredError("t"))


def batch_of(seed=0, width=D):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(N, width)).astype(np.float32) for name in ("x", "t")}


def mesh_of(axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def compiled(function, mesh, estimator, objective, params, batch, out=None):
    """(the program of function(curvature, params, batch) on a mesh, arguments for it)."""
    curvature = estimator.init(objective, params)
    if mesh is None:
        return jax.jit(function).lower(curvature, params, batch).compile(), (curvature, params, batch)
    put = lambda tree, specs: jax.device_put(tree, sharding.named(mesh, specs))
    split = estimator.partition_specs(curvature, None, mesh)
    arguments = (put(curvature, split), put(params, PartitionSpec()), put(batch, PartitionSpec(mesh.axis_names)))
    outs = None if out is None else sharding.named(mesh, split if out == "curvature" else PartitionSpec())
    with jax.set_mesh(mesh):
        return jax.jit(function, out_shardings=outs).lower(*arguments).compile(), arguments


def life(estimator, objective):
    """A function of (curvature, params, batch) that goes through all that a curvature does."""

    def function(c, params, batch):
        c = estimator.update(c, objective, params, batch, None)
        c = estimator.refresh(c, objective, params, None, None, 0.1)
        c = estimator.update(c, objective, params, jax.tree.map(lambda a: 1.5 * a, batch), None)
        found = [c.solve(params, 0.1), c.solve(params, 0.3), c.matvec(params)]
        c = estimator.refresh(c, objective, params, None, None, 0.2)
        found += [c.solve(params, 0.2), c.power(params, 0.2, -1.0 if c.inverse == "cholesky" else -0.5)]
        return found, c.telemetry(), c

    return function


@functools.cache
def alone(inverse, model):
    estimator, (objective, params) = KFAC("empirical", inverse=inverse, slots=1, stale=0.1), build(model)
    program, arguments = compiled(life(estimator, objective), None, estimator, objective, params, batch_of())
    return jax.device_get(program(*arguments)[:2])


def close(got, want, tolerance):
    def leaf(a, b):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-6), np.abs(a - b).max() / np.abs(b).max()

    jax.tree.map(leaf, got, want)


# -- who owns what -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("model", [Equal, Uneven])
def test_a_matrix_and_its_factors_have_one_owner(model, slots):
    matrices = matrices_of(KFAC().coverage(*build(model)))
    layout, copies = owners.layout_of(matrices, slots), {m.name: m.copies for m in matrices}
    owner = lambda stack, entry: stack.at[entry] // (stack.count // slots)
    for _, stack in [*(where for _, where in layout.factors), *(where for _, where in layout.blocks)]:
        assert stack.count % slots == 0 and len(set(stack.at)) == len(stack.at) and max(stack.at) < stack.count
        assert sum(stack.used) == len(stack.at)
    work = collections.Counter()
    for _, (names, stack) in layout.blocks:
        entry = 0
        for name in names:
            a, i, g, j = dict(layout.at)[name]
            for k in range(copies[name]):
                who = owner(stack, entry)
                assert owner(layout.of_size(a), i + k) == owner(layout.of_size(g), j + k) == who
                work[who] += int(a) ** 3 + int(g) ** 3
                entry += 1
        assert entry == len(stack.at)
    if model is Equal and LAYERS % slots == 0:
        assert len(set(work.values())) == 1 and len(work) == slots
    assert max(work.values()) <= sum(work.values()) / slots + max(2 * int(size) ** 3 for size, _ in layout.factors)
    if slots == 1:
        assert all(stack.at == tuple(range(stack.count)) for _, (_, stack) in layout.factors)


def test_places():
    """Entries come back from their slots; the others are zero."""
    stack = owners.Slots(7, (0, 1, 4, 6, 3))
    parts = [jnp.arange(1.0, 3.0), jnp.arange(3.0, 6.0)]
    np.testing.assert_array_equal(stack.place(parts), [1, 2, 0, 5, 3, 0, 4])
    np.testing.assert_array_equal(stack.take(stack.place(parts)), [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(stack.take(stack.place(parts), 2, 2), [3, 4])


def test_how_many_owners():
    """As many as are almost free, or as the user says."""
    slots = lambda model, **options: jax.eval_shape(KFAC(**options).init, *build(model)).slots
    assert slots(Equal) == 16 and slots(Equal, inverse="ekfac") == 16
    assert slots(Uneven) == 1 and slots(Uneven, slots=8) == 8
    with pytest.raises(ValueError, match=r"KFAC\(slots\)"):
        KFAC(slots=0)


def test_owners_for_a_mesh():
    """What takes the fewest bytes on each device, where the user leaves it open."""
    chosen = lambda model, axes, **options: KFAC(**options).choices(
        *build(model), AbstractMesh(tuple(axes.values()), tuple(axes))
    )
    assert chosen(Equal, WIDE) == {"slots": 16} and chosen(Uneven, WIDE) == chosen(Uneven, BOTH) == {"slots": 8}
    assert chosen(Twelve, WIDE) == {"slots": 8}  # 16 slots, not 12 factors on each device
    assert chosen(Twelve, {"data": 1}) == {"slots": 4}  # of which no more than a tenth is padding
    assert chosen(Twelve, {"data": 3, "fsdp": 2}) == {"slots": 6} and chosen(Equal, {"data": 256}) == {"slots": 256}
    assert chosen(Uneven, WIDE, slots=4) == {}


def test_sizes_share_stacks():
    """Where few factors are of one size: an owner of the autoencoder has little more than its largest layer."""
    sizes = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    counts = collections.Counter((a + 1, b, a + 1, b) for a, b in itertools.pairwise(sizes))
    stacks = static._sizes(counts, 8)
    assert stacks == (31, 251, 785, 1001)
    each = sorted({d for shape in counts for d in shape})
    owned = lambda stacks: static._shares(counts, static._homes(counts, stacks), 8)
    numbers = lambda stacks: sum(D * D * entries.max() for D, entries in owned(stacks)[1].items())
    even = sum(count * (a * a + g * g) for (a, g, *_), count in counts.items()) / 8
    assert numbers(stacks) <= 1.05 * (1001**2 + 784**2)
    assert round(numbers(stacks) / even, 1) == 2.1 and round(numbers(each) / even, 1) == 4.8
    shares, _ = owned(stacks)
    assert all(sum(share) == counts[shape] for shape, share in shares.items())
    assert static._sizes(counts, 1) == tuple(sorted({d for shape in counts for d in shape}))
    assert static._sizes({(5, 7, 5, 7): 16}, 16) == (5, 7)  # nothing to save


def test_smaller_factors_stand_at_the_end_of_their_slots():
    """And are read from there."""
    stack = owners.Slots(3, (2, 0), 3, (2, 3))
    small, large = jnp.arange(1.0, 5.0).reshape(1, 2, 2), jnp.ones((1, 3, 3))
    X = stack.place([small, large])
    np.testing.assert_array_equal(X[2], [[0, 0, 0], [0, 1, 2], [0, 3, 4]])
    np.testing.assert_array_equal(static.inside(stack.take(X, 0, 1), 2), small)
    np.testing.assert_array_equal(stack.outside, [[False] * 3, [False] * 3, [True, False, False]])
    assert owners.Slots(2, (0, 1), 3, (3, 3)).outside is None


def test_axes():
    """All of the mesh where it divides, else the largest part of it that does."""
    wide, both = {"data": 8}, {"data": 2, "fsdp": 4}
    assert axes_for(wide, 16) == ("data",) and axes_for(both, 8) == ("data", "fsdp")
    assert axes_for(both, 4) == ("fsdp",) and axes_for(both, 2) == ("data",)
    assert axes_for(wide, 4) == axes_for({"data": 1}, 8) == axes_for({}, 8) == ()


@inverses
def test_the_overview_says_what_padding_costs(inverse):
    objective, params = build(Uneven)
    for slots in (1, 8):
        estimator = KFAC(inverse=inverse, slots=slots, stale=0.1)
        table = estimator.overview(objective, params)
        arrays = jax.eval_shape(estimator.init, objective, params)
        bookkeeping = [arrays.weight, arrays.scale_weight, arrays.damping]
        bookkeeping += [arrays.updates, arrays.refreshes, arrays.failures, arrays.skipped]
        want = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arrays)) - 4 * len(bookkeeping)
        layers, _, stacks = table.partition("\n\n")
        assert f" {want:,} " in layers.splitlines()[-1]
        assert ("padding for 8 slots" in layers) == (slots == 8)
        each = sum(a.size // slots for a in arrays.factors.values()) * 4
        assert (re.search(rf"^all +{each:,} +\d+\.\d%$", stacks, re.MULTILINE) is not None) == (slots == 8)


# -- the same numbers --------------------------------------------------------------------------------------------------


WIDE, BOTH = MESHES


@pytest.mark.parametrize(
    ("model", "inverse", "slots", "axes"),
    [
        (Equal, "cholesky", None, BOTH),
        (Uneven, "cholesky", 8, WIDE),
        (Uneven, "eigh", 8, BOTH),
        (Uneven, "ekfac", 8, WIDE),
        (Uneven, "ekfac", 8, None),  # padding on one device
        (Uneven, "cholesky", 4, BOTH),  # over one axis
        (Uneven, "ekfac", 1, WIDE),  # replicated: a share of the work, gathered
        (Uneven, "cholesky", 4, WIDE),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else str(x),
)
def test_every_mesh_gives_the_same(model, inverse, slots, axes):
    """As on one device without padding: what is solved, and what is told."""
    estimator, (objective, params) = KFAC("empirical", inverse=inverse, slots=slots, stale=0.1), build(model)
    mesh = None if axes is None else mesh_of(axes)
    program, arguments = compiled(life(estimator, objective), mesh, estimator, objective, params, batch_of())
    got, told, c = jax.device_get(program(*arguments))
    want, expected = alone(inverse, model)
    close(got, want, 1e-5 if inverse == "cholesky" else 1e-3)
    close(told, expected, 1e-5)
    for size, X in c.factors.items():
        assert not np.any(X[~c.layout.of_size(size).used])


# -- what it costs a device --------------------------------------------------------------------------------------------


@inverses
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_bytes_of_a_device(inverse, axes):
    """An eighth of all, of sixteen equal layers."""
    for options in ({}, {"stale": 0.1}):
        estimator, (objective, params) = KFAC(inverse=inverse, **options), build(Equal)
        c, mesh = jax.eval_shape(estimator.init, objective, params), mesh_of(axes)
        shardings = sharding.named(mesh, estimator.partition_specs(c, None, mesh))
        whole = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(c))
        share = jax.tree.map(lambda a, s: math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize, c, shardings)
        assert sum(jax.tree.leaves(share)) <= 1.15 / 8 * whole


def record(monkeypatch):
    """The stacks that are factorised while a program is traced, as each device sees them."""
    seen = []
    inverses, eigh = stacks.inverses, stacks.eigh

    def all_inverses(X, *rest):
        seen.extend(A.shape for A in X.values())
        return inverses(X, *rest)

    def eigenvectors(X, *rest):
        seen.append(X.shape)
        return eigh(X, *rest)

    monkeypatch.setattr(stacks, "inverses", all_inverses)
    monkeypatch.setattr(stacks, "eigh", eigenvectors)
    return seen


def work(shapes):
    return sum(count * d**3 for count, d, _ in shapes)


@inverses
@pytest.mark.parametrize("slots", [None, 1], ids=["split", "replicated"])
def test_work_of_a_device(inverse, slots, monkeypatch):
    """An eighth of the factorisations; where factors are split, no device has all of any stack at any time."""
    seen = record(monkeypatch)
    estimator, (objective, params) = KFAC(inverse=inverse, slots=slots), build(Equal)
    refresh = lambda c, params, batch: estimator.refresh(c, objective, params, None, None, 0.1)
    compiled(refresh, None, estimator, objective, params, batch_of())
    whole = work(seen)
    seen.clear()
    program, _ = compiled(refresh, mesh_of({"data": 8}), estimator, objective, params, batch_of(), "curvature")
    assert work(seen) == whole / 8
    if slots is None:
        for d in (D, D + 1):
            assert f"f32[16,{d},{d}]" not in program.as_text()
            assert f"f32[2,{d},{d}]" in program.as_text()


def test_padding_is_no_work():
    """And the factors of an uneven model are in as even a share as they can be."""
    layout = owners.layout_of(matrices_of(KFAC().coverage(*build(Uneven))), 8)
    done = np.zeros(8)
    for size, (d, stack) in layout.factors:
        due = layout.due(size, jnp.ones(stack.count, bool))
        np.testing.assert_array_equal(due, stack.used)
        done += np.asarray(due).reshape(8, -1).sum(1) * d**3
    largest = max(int(a) ** 3 + int(g) ** 3 for _, (a, _, g, _) in layout.at)
    assert done.max() <= done.sum() / 8 + largest


def sent(program):
    """{kind: bytes of what the collectives of a program give}."""
    return collectives(program.as_text())[1]


def test_collectives_are_read():
    """As XLA writes them."""
    text = """
      %a = f32[2,3]{1,0} all-gather(f32[1,3]{1,0} %x), dimensions={0}
      %b = (f32[4]{0}, bf16[2]{0}) all-reduce(f32[4]{0} %y, bf16[2]{0} %z), to_apply=%sum
      %c = (f32[2]{0}, f32[16]{0}) all-gather-start(f32[2]{0} %x), dimensions={0}
      %d = pred[] all-reduce-start(pred[] %p), to_apply=%or
      %e = (s32[4]{0}, s32[4]{0}, u32[], u32[]) collective-permute-start(s32[4]{0} %q)
      %f = f32[16]{0} all-gather-done((f32[2]{0}, f32[16]{0}) %c)
    """
    counts, sizes = collectives(text)
    assert counts == {"all-reduce": 2, "all-gather": 2, "collective-permute": 1}
    assert sizes == {"all-reduce": 4 * 4 + 2 * 2 + 1, "all-gather": 4 * 6 + 4 * 16, "collective-permute": 4 * 4}


@inverses
def test_collectives(inverse):
    """A solve gathers preconditioned gradients and nothing else; a refresh, of every factor a trace."""
    width = 16
    estimator, (objective, params) = KFAC("empirical", inverse=inverse), build(Equal, width=width)
    batch, mesh = batch_of(width=width), mesh_of(WIDE)
    solve = lambda c, params, batch: c.solve(params, 0.1)
    refresh = lambda c, params, batch: estimator.refresh(c, objective, params, None, None, 0.1)
    size = 4 * sum(a.size for a in jax.tree.leaves(params))
    traces = 4 * 2 * LAYERS
    found = sent(compiled(solve, mesh, estimator, objective, params, batch, "everywhere")[0])
    assert size <= found.pop("all-gather") <= size + traces and not found
    for axes in MESHES:
        found = sent(compiled(refresh, mesh_of(axes), estimator, objective, params, batch, "curvature")[0])
        assert sum(found.values()) <= 2 * traces


@pytest.mark.parametrize("axes", [{"fsdp": 8}, BOTH], ids=str)
def test_collectives_of_split_parameters(axes):
    """Gradients go to the owners and back as pieces: none of the parameters' size is gathered."""
    width = 64
    (objective, params), mesh = build(Equal, width=width), mesh_of(axes)
    estimator = KFAC("empirical", inverse="eigh")
    specs = jax.tree.map(lambda p: PartitionSpec(*[None] * (p.ndim - 1), "fsdp"), params)
    curvature = jax.eval_shape(estimator.init, objective, params)
    where = sharding.named(mesh, (estimator.partition_specs(curvature, specs, mesh), specs))
    abstract = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
    arguments = jax.tree.map(abstract, (curvature, params), where)
    with jax.set_mesh(mesh):
        solve = jax.jit(lambda c, params: c.solve(params, 0.1), out_shardings=where[1])
        found = sent(solve.lower(*arguments).compile())
    size = 4 * sum(a.size for a in jax.tree.leaves(params))
    assert 0.2 * size < sum(found.values()) <= (0.3 if axes == {"fsdp": 8} else 1.0) * size, (found, size)


def test_replicated_factors_need_no_communication():
    """Between two refreshes: memory for communication."""
    estimator, (objective, params) = KFAC("empirical", slots=1), build(Equal)
    solve = lambda c, params, batch: c.solve(params, 0.1)
    program, _ = compiled(solve, mesh_of({"data": 8}), estimator, objective, params, batch_of(), "everywhere")
    # of a solve with another damping than the last refresh's, which is in the same program, the inverses alone
    inverses = 4 * LAYERS * (D**2 + (D + 1) ** 2)
    assert sum(sent(program).values()) <= 1.1 * inverses


# -- in a Trainer ------------------------------------------------------------------------------------------------------


class Model(Uneven):
    """Classes of the Trainer's tests."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.last = nnx.Linear(4, tiny.CLASSES, rngs=rngs)


def train(steps, estimator, **options):
    trainer = tiny.trainer(
        model=Model,
        optimizer=optim.kfac(0.3, 0.9, 0.1),
        curvature=estimator,
        schedule=CurvatureSchedule(update_every=1, refresh_every=2),
        steps=steps,
        log_every=1,
        **options,
    )
    return trainer, trainer.fit()


def test_slots_are_chosen_when_a_run_begins(tmp_path, monkeypatch):
    """For its mesh; a checkpoint keeps the choice, which would be another one on one device."""
    run, _ = train(2, KFAC("empirical"), workdir=tmp_path, mesh=WIDE)
    assert run.state.curvature.slots == 8
    on(1, monkeypatch)
    opened, _ = train(3, KFAC("empirical"), workdir=tmp_path, mesh={"data": -1})
    assert opened.state.curvature.slots == 8 and int(opened.state.curvature.updates) == 3
    with pytest.raises(Mismatch, match=r"curvature/factors"):
        train(3, KFAC("empirical", slots=3), workdir=tmp_path, mesh={"data": -1})
    alone, _ = train(1, KFAC("empirical"), mesh={"data": -1})
    assert alone.state.curvature.slots < 8
