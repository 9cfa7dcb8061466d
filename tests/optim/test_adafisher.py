"""adafisher and adafisherw: replays of a reference in NumPy, what each form promises, what is refused."""

import functools

import adafisher_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import curvtrain
from curvtrain import CurvatureSchedule, Objective, losses, optim
from curvtrain.curvature import KFAC, DiagonalFisher, KroneckerDiagonal
from curvtrain.optim import self_contained
from curvtrain.trainer import Call

KEY = jax.random.key(0)
STEPS, N = 20, 8

# -- networks, in NumPy and in NNX -------------------------------------------------------------------------------------


def mlp(rng):
    return [reference.Linear(rng, 3, 5), reference.Tanh(), reference.Linear(rng, 5, 2)], (3,)


def images(rng):
    """A convolution in two groups, both norms, on images; LayerNorm keeps their rows."""
    net = [reference.Conv(rng, 2, 4, groups=2), reference.BatchNorm(rng, 4), reference.Tanh()]
    net += [reference.LayerNorm(rng, 4), reference.Flatten(), reference.Linear(rng, 24, 2)]
    return net, (4, 3, 2)


def sequences(rng):
    """A linear layer and a LayerNorm over the positions of sequences, of which the latter keeps the positions."""
    net = [reference.Linear(rng, 3, 4), reference.LayerNorm(rng, 4), reference.Tanh()]
    return [*net, reference.Flatten(), reference.Linear(rng, 12, 2)], (3, 3)


NETS = {"mlp": mlp, "images": images, "sequences": sequences}


def module_of(layer):
    """The NNX layer of a reference's, in float64."""
    options, theta = dict(rngs=nnx.Rngs(0), param_dtype=jnp.float64), getattr(layer, "theta", {})
    if isinstance(layer, reference.Conv):
        *window, ins, outs = theta["kernel"].shape
        options |= dict(padding="VALID", feature_group_count=layer.groups)
        module = nnx.Conv(ins * layer.groups, outs, tuple(window), **options)
    elif isinstance(layer, reference.Linear):
        module = nnx.Linear(*theta["kernel"].shape, **options)
    elif isinstance(layer, reference.BatchNorm):
        module = nnx.BatchNorm(len(theta["scale"]), **options)
        for running in (module.mean, module.var):
            running.set_value(running.get_value().astype(jnp.float64))
    elif isinstance(layer, reference.LayerNorm):
        module = nnx.LayerNorm(len(theta["scale"]), **options)
    else:
        return nnx.tanh if isinstance(layer, reference.Tanh) else lambda h: h.reshape(len(h), -1)
    for name, value in theta.items():
        getattr(module, name).set_value(jnp.asarray(value))
    return module


def predict(model, batch):
    return model(batch["x"])


def objective_of(net, **options):
    return Objective.from_model(nnx.Sequential(*map(module_of, net)), predict, losses.SquaredError(), **options)


def batches(shape, count=STEPS, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, N, *shape))
    flat = x.reshape(count, N, -1)
    y = np.stack([np.sin(flat[..., 0] + flat[..., 1]), flat[..., 2] ** 2], -1)
    return [(x[t], y[t]) for t in range(count)]


def train(objective, params, tx, estimator, data, every=1):
    """(parameters, cosines between update and momentum, the last curvature) after a loop over the batches."""
    c, state = estimator.init(objective, params), tx.init(params)

    @functools.partial(jax.jit, static_argnums=4)
    def step(params, state, c, batch, update):
        measure = estimator.measure(c, objective, params, batch, KEY) if update else None
        _, grads, _, _, measured = objective.value_grad_and_measure(params, batch, KEY, measure)
        c = estimator.absorb(c, measured, KEY) if update else c
        updates, state = tx.update(grads, state, params, curvature=c)
        return optax.apply_updates(params, updates), state, c, optim.adafisher_telemetry(state, c)

    cosines = []
    for t, (x, y) in enumerate(data):
        params, state, c, told = step(params, state, c, {"x": x, "target": y}, t % every == 0)
        cosines.append(float(told["cosine"]))
    return params, cosines, c


# name -> (optimizer, options of the reference)
REPAIRED = {
    "adafisher": (optim.adafisher(0.02), dict(rate=0.02, cap=2.0)),
    "decay": (optim.adafisher(0.02, weight_decay=0.1), dict(rate=0.02, cap=2.0, kappa=0.1)),
    "adafisherw": (optim.adafisherw(0.02, weight_decay=0.1), dict(rate=0.02, cap=2.0, kappa=0.1, coupled=False)),
    "root": (optim.adafisher(0.02, b1=0.5, exponent=0.5, damping=0.3), dict(rate=0.02, b1=0.5, p=0.5, tau=0.3)),
    "capped": (optim.adafisher(0.02, trust_cap=0.05), dict(rate=0.02, cap=0.05)),
}
RELEASED = {
    "adafisher": (optim.adafisher(1e-4, faithful=True), dict(rate=1e-4)),
    "decay": (optim.adafisher(None, True, 0.1), dict(rate=1e-3, kappa=0.1)),
    "adafisherw": (optim.adafisherw(1e-4, True, 0.1), dict(rate=1e-4, kappa=0.1, coupled=False)),
}


@pytest.mark.parametrize("every", [1, 10, 100])
@pytest.mark.parametrize(
    ("net", "faithful", "name"),
    [(net, False, name) for net, name in [*(("mlp", name) for name in REPAIRED), ("images", "adafisher")]]
    + [("images", False, "adafisherw"), ("sequences", False, "decay"), ("mlp", True, "decay")]
    + [(net, True, name) for net in ("images", "sequences") for name in ("adafisher", "adafisherw")],
)
def test_replays_the_reference(net, faithful, name, every):
    tx, options = (RELEASED if faithful else REPAIRED)[name]
    layers, shape = NETS[net](np.random.default_rng(0))
    with jax.enable_x64(True):
        objective, params = objective_of(layers)
        estimator = KroneckerDiagonal("empirical", faithful=faithful)
        params, cosines, c = train(objective, params, tx, estimator, batches(shape), every)
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves((params, c.factors)))
    expected = reference.train(layers, batches(shape), every, faithful=faithful, **options)
    for i, layer in enumerate(layers):
        for key, right in getattr(layer, "theta", {}).items():
            ours = np.asarray(params["layers"][i][key])
            assert np.abs(ours - right).max() <= 1e-6 * np.abs(right).max()
    np.testing.assert_allclose(cosines, expected, rtol=1e-9)
    if faithful:  # what is left once the factors have forgotten that they began at 1
        assert min(cosines[2 * every :], default=1) > 0.999  # of a few weights; digits are below
    else:
        assert min(cosines) < 0.99


# -- what both forms promise -------------------------------------------------------------------------------------------

both = pytest.mark.parametrize("faithful", [False, True], ids=["repaired", "released"])
RNG = np.random.default_rng(0)
BATCH = {"x": jnp.asarray(RNG.normal(size=(N, 3, 4)), jnp.float32), "label": jnp.asarray(RNG.integers(0, 3, N))}


class Net(nnx.Module):
    """Sequences, with a linear layer and a LayerNorm over positions; perhaps a parameter that nobody uses."""

    def __init__(self, unused=False):
        rngs = nnx.Rngs(0)
        self.a, self.norm = nnx.Linear(4, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.b = nnx.Linear(8, 3, rngs=rngs)
        if unused:
            self.Aunused = nnx.Param(jnp.ones(5))

    def __call__(self, x):
        return self.b(nnx.tanh(self.norm(self.a(x))).mean(1))


def build(model=None, loss=None, **options):
    return Objective.from_model(model or Net(), predict, loss or losses.SoftmaxCrossEntropy(), **options)


def estimator_for(faithful, **options):
    return KroneckerDiagonal("empirical", faithful=faithful, **options)


def updates_of(objective, params, estimator, tx, batch=BATCH, steps=2):
    """The updates of the last of so many steps at one point, and the curvature."""

    @jax.jit
    def run(params):
        c, state = estimator.init(objective, params), tx.init(params)
        for _ in range(steps):
            grads = objective.value_and_grad(params, batch, KEY)[1]
            c = estimator.update(c, objective, params, batch, KEY)
            updates, state = tx.update(grads, state, params, curvature=c)
        return updates, c

    return run(params)


def assert_close(ours, theirs, rtol=1e-5):
    flat = lambda tree: np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)]).astype(np.float64)
    a, b = flat(ours), flat(theirs)
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


@both
def test_a_parameter_that_nobody_uses_changes_no_other_update(faithful):
    tx = optim.adafisher(0.01, faithful)
    with_it = estimator_for(faithful, uncovered="one" if faithful else "diagonal")
    more, _ = updates_of(*build(Net(unused=True)), with_it, tx)
    np.testing.assert_array_equal(more.pop("Aunused"), 0)
    assert_close(more, updates_of(*build(), estimator_for(faithful), tx)[0])


@both
@pytest.mark.parametrize("size", [2, 3])
def test_micro_batches_are_one_batch(faithful, size):
    """The average moves once for all pieces, of which the last may be smaller."""
    tx, estimator = optim.adafisher(0.01, faithful), estimator_for(faithful)
    whole, pieces = (updates_of(*build(microbatch=m), estimator, tx) for m in (None, size))
    assert_close(pieces[0], whole[0])
    for name, factors in whole[1].factors.items():
        for factor, right in factors.items():
            assert_close(pieces[1].factors[name][factor], right)


@both
def test_masked_examples_are_none(faithful):
    tx, estimator = optim.adafisher(0.01, faithful), estimator_for(faithful)
    mask = jnp.asarray([1, 1, 0, 1, 0, 1, 1, 1], jnp.float32)
    masked, _ = updates_of(*build(), estimator, tx, BATCH | {"mask": mask})
    assert_close(masked, updates_of(*build(), estimator, tx, jax.tree.map(lambda a: a[mask > 0], BATCH))[0])


def test_released_cotangents_are_those_of_the_weighted_loss():
    """An example of weight 2 counts as two in the mean, so its cotangent is twice as large, not sqrt(2) times."""
    w, estimator = jnp.asarray([2, 1, 1, 1, 0.5, 1, 1, 1.5], jnp.float32), estimator_for(True)
    objective, params = build()
    batch = BATCH | {"weights": w}
    sums, W = objective.measure(
        params, batch, KEY, estimator.measure(estimator.init(objective, params), objective, params, batch, KEY)
    )
    grad = objective.value_and_grad(params, batch, KEY)[1]
    s = jax.grad(lambda z: objective.loss_of_outputs.values(z, batch).sum())(objective.predict(params, batch))
    assert_close(sums["b"]["G"], jnp.sum(jnp.square(w[:, None] * s), 0))
    assert_close(sums["norm"]["V"] / W, grad["norm"]["bias"])


def test_half_precision_takes_the_released_statistics_in_a_pass_of_their_own():
    """In float16 the step differentiates the mean; the factors are those of the same numbers in float32, but for it."""
    estimator, tx = estimator_for(True), optim.adafisher(0.01, True)
    objective, params = build()
    batch = BATCH | {"weights": jnp.asarray([2, 1, 1, 1, 0.5, 1, 1, 1.5], jnp.float32)}
    half = jax.tree.map(lambda p: p.astype(jnp.float16), params)
    whole = jax.tree.map(lambda p: p.astype(jnp.float32), half)
    (u, c), (right, d) = (updates_of(objective, p, estimator, tx, batch) for p in (half, whole))
    assert all(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(u))
    assert_close(c.factors, d.factors, 1e-2)
    assert_close(u, right, 1e-2)


def test_masks_over_time_leave_out_positions():
    """What a masked position holds changes nothing."""

    class Positions(Net):
        def __call__(self, x):
            return self.b(nnx.tanh(self.norm(self.a(x))))

    objective, params = build(Positions())
    mask = jnp.asarray(RNG.integers(0, 2, (N, 3)), jnp.float32).at[:, 0].set(1)
    batch = dict(x=BATCH["x"], label=jnp.asarray(RNG.integers(0, 3, (N, 3))), mask=mask)
    other = batch | {"x": jnp.where(mask[..., None] > 0, batch["x"], 7.0)}
    for faithful in (False, True):
        tx, estimator = optim.adafisher(0.01, faithful), estimator_for(faithful)
        ours, theirs = (updates_of(objective, params, estimator, tx, b) for b in (batch, other))
        assert_close(ours[0], theirs[0])
        assert_close(ours[1].factors, theirs[1].factors)


@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_a_loss_times_a_constant_leaves_the_direction(exponent):
    def updates(c):
        values = lambda z, batch: c * losses.SoftmaxCrossEntropy().values(z, batch)
        tx = optim.adafisher(1.0, exponent=exponent, trust_cap=None)
        return updates_of(*build(loss=losses.PerExample(values)), estimator_for(False), tx)[0]

    one, large = updates(1.0), updates(1024.0)
    assert_close(jax.tree.map(lambda u: u * 1024.0 ** (2 * exponent - 1), large), one)


@both
def test_sharded_is_a_single_device(faithful):
    """Parameters and batch split over 8 devices."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    objective, params = build()
    tx, estimator = optim.adafisher(0.01, faithful), estimator_for(faithful)
    one = updates_of(objective, params, estimator, tx)

    def place(a):
        spec = jax.sharding.PartitionSpec("fsdp" if a.shape[0] % 8 == 0 else None)
        return jax.device_put(a, jax.NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        many = updates_of(objective, jax.tree.map(place, params), estimator, tx, jax.tree.map(place, BATCH))
    assert_close(many[0], one[0])
    assert_close(many[1].factors, one[1].factors)


@both
def test_a_part_of_the_parameters_is_measured_alone(faithful):
    """Biases have another optimizer; kernels have the factors of their own rows."""
    objective, params = build()
    routed = optim.route([("(a|b)/kernel", optim.adafisher(0.01, faithful)), (".*", optax.sgd(0.1))])
    tx = self_contained(routed, estimator_for(faithful), CurvatureSchedule(), objective)
    state = tx.init(params)
    assert {name: next(iter(f.values())).shape[-1] for name, f in state.curvature.factors.items()} == {"a": 4, "b": 8}
    grads = objective.value_and_grad(params, BATCH, KEY)[1]
    updates, _ = jax.jit(lambda s: tx.update(grads, s, params, batch=BATCH, key=KEY))(state)
    assert_close(updates["norm"], jax.tree.map(lambda g: -0.1 * g, grads["norm"]))
    assert np.all(np.isfinite(updates["a"]["kernel"])) and np.any(updates["a"]["kernel"])


def test_the_product_of_factors_is_never_written_out():
    """Of a matrix of 2,048 x 1,024: what an update holds besides its arguments and results."""
    objective, params = build(nnx.Linear(2048, 1024, use_bias=False, rngs=nnx.Rngs(0)))
    for faithful in (False, True):
        tx = optim.adafisher(0.01, faithful, b1=0.0)
        c = jax.eval_shape(estimator_for(faithful).init, objective, params)
        state = jax.eval_shape(tx.init, params)
        update = jax.jit(lambda g, s, c, tx=tx: tx.update(g, s, curvature=c)).lower(params, state, c)
        assert update.compile().memory_analysis().temp_size_in_bytes < 2048 * 1024  # a quarter of the matrix


def test_scanned_layers_and_embeddings():
    """Each copy of a scanned layer is scaled by itself, and is what a layer of its own would be."""

    class Scanned(nnx.Module):
        def __init__(self):
            make = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs), in_axes=0))
            self.table, self.blocks = nnx.Embed(5, 4, rngs=nnx.Rngs(0)), make(nnx.Rngs(1))
            self.out = nnx.Linear(4, 3, rngs=nnx.Rngs(2))

        def __call__(self, tokens):
            step = lambda x, block: nnx.tanh(block(x))
            x = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(self.table(tokens), self.blocks)
            return self.out(x.mean(1))

    class Apart(Scanned):
        def __init__(self):
            super().__init__()
            self.first, self.second = nnx.Linear(4, 4, rngs=nnx.Rngs(3)), nnx.Linear(4, 4, rngs=nnx.Rngs(3))
            for k, layer in enumerate((self.first, self.second)):
                layer.kernel.set_value(self.blocks.kernel.get_value()[k])
                layer.bias.set_value(self.blocks.bias.get_value()[k])
            del self.blocks

        def __call__(self, tokens):
            return self.out(nnx.tanh(self.second(nnx.tanh(self.first(self.table(tokens))))).mean(1))

    batch = {"x": jnp.asarray(RNG.integers(0, 5, (N, 3))), "label": BATCH["label"]}
    for faithful in (False, True):
        tx, uncovered = optim.adafisher(0.01, faithful), "one" if faithful else "error"
        estimator = estimator_for(faithful, uncovered=uncovered)
        scanned, apart = (updates_of(*build(m), estimator, tx, batch)[0] for m in (Scanned(), Apart()))
        pair = jax.tree.map(lambda *a: jnp.stack(a), apart["first"], apart["second"])
        assert_close(scanned["blocks"], pair)
        assert_close([scanned["out"], scanned["table"]], [apart["out"], apart["table"]])
    objective, params = build(Apart())
    grads = objective.value_and_grad(params, batch, KEY)[1]
    assert_close(apart["table"], jax.tree.map(lambda g: -0.01 * g, grads["table"]))  # as released: divided by 1


# -- in a Trainer, on digits -------------------------------------------------------------------------------------------


class Digits(curvtrain.Trainer):
    """A perceptron 64-32-10."""

    loss = losses.SoftmaxCrossEntropy()

    def build_model(self, rngs):
        return nnx.Sequential(nnx.Linear(64, 32, rngs=rngs), nnx.tanh, nnx.Linear(32, 10, rngs=rngs))

    def predict(self, model, batch):
        return model(batch["x"])


def digits():
    images, labels = load_digits(return_X_y=True)
    return {"x": (images / 16).astype(np.float32), "label": labels.astype(np.int32)}


def fit(tx, estimator, steps, schedule=None, every=20):
    """(the trainer after a run, the telemetry of the optimizer now and then)."""
    told = []
    note = lambda run: told.append(optim.adafisher_telemetry(run.state.opt_state, run.state.curvature))
    trainer = Digits(
        curvtrain.TrainerConfig(steps=steps, batch_size=128, progress=False),
        train_data=digits(),
        optimizer=tx,
        curvature=estimator,
        schedule=schedule,
        hooks=(Call(note, every=every),),
    )
    trainer.fit()
    return trainer, told


@pytest.mark.parametrize("make", [optim.adafisher, optim.adafisherw])
@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_the_defaults_train_without_a_schedule(make, fisher):
    trainer, told = fit(make(), KroneckerDiagonal(fisher), 200)
    assert trainer.evaluate(digits())["loss"] < 0.5
    assert min(float(t["cosine"]) for t in told) < 0.99  # it is no gradient descent
    assert all(0 <= t["share_min"] < t["share_median"] < t["share_max"] < 0.99 for t in told)


@pytest.mark.parametrize("every", [1, 10, None])
def test_the_released_code_is_gradient_descent_with_momentum(every):
    """Without a schedule the factors move every 100 steps."""
    schedule = None if every is None else CurvatureSchedule(update_every=every)
    tx, estimator = optim.adafisher(faithful=True), KroneckerDiagonal(faithful=True)
    trainer, told = fit(tx, estimator, 120, schedule, every=5)
    assert ("update every 100 steps, as optim.adafisher asks" in trainer._plan.schedule_note) == (every is None)
    assert min(float(t["cosine"]) for t in told) > 0.9995
    assert trainer.state.curvature.updates == (120 / every if every else 2)
    assert told[-1]["share_median"] < (0.1 if every else told[0]["share_median"])


# -- what is refused ---------------------------------------------------------------------------------------------------


def init(tx, estimator, model=None):
    objective, params = build(model)
    return self_contained(tx, estimator, CurvatureSchedule(), objective).init(params)


@pytest.mark.parametrize("make", [optim.adafisher, optim.adafisherw])
@pytest.mark.parametrize(
    ("faithful", "estimator", "message"),
    [
        (True, KroneckerDiagonal(), r"takes ReleasedFactors, .*KroneckerDiagonal\(faithful=True\), and"),
        (False, KroneckerDiagonal(faithful=True), r"takes DiagonalFactors, .*KroneckerDiagonal\(\), and"),
        (False, DiagonalFisher(), r"takes DiagonalFactors, .* estimates Diagonal\."),
        (True, KFAC(), r"takes ReleasedFactors, .* estimates KroneckerFactors\."),
    ],
)
def test_other_curvatures_are_refused(make, faithful, estimator, message):
    with pytest.raises(TypeError, match=message):
        init(make(0.1, faithful), estimator)
    objective, params = build()
    tx, c = make(0.1, faithful), estimator.init(objective, params)
    with pytest.raises(TypeError, match=r"update\(curvature=\) should be (Released|Diagonal)Factors, not"):
        tx.update(params, tx.init(params), params, curvature=c)


class Other(nnx.Module):
    """A layer that the released code knows, and one that it does not."""

    def __init__(self):
        self.a, self.conv = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Conv(4, 3, (2,), rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.conv(self.a(x)).mean(1)


class Twice(nnx.Module):
    """A layer that is called twice."""

    def __init__(self):
        self.a, self.b = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.b(self.a(self.a(x)).mean(1))


def test_layers_without_factors_are_refused_unless_they_are_chosen():
    tx, estimator = optim.adafisher(faithful=True), KroneckerDiagonal(faithful=True)
    with pytest.raises(ValueError, match=r"has no factors for\n  conv: Conv\nand (.|\n)*uncovered='one'"):
        init(tx, estimator, Other())
    with pytest.raises(ValueError, match=r"no layer of this model is a Linear"):
        init(tx, KroneckerDiagonal(faithful=True, uncovered="one"), nnx.Embed(3, 3, rngs=nnx.Rngs(0)))
    for chosen in (dict(uncovered="one"), dict(plain="conv")):
        state = init(tx, KroneckerDiagonal(faithful=True, **chosen), Other())
        assert state.curvature.factors.keys() == {"a"}
    shown = KroneckerDiagonal(faithful=True, uncovered="one").overview(*build(Other()))
    assert "as released" in shown and "divided by 1" in shown
    objective, params = build(Twice())
    with pytest.raises(ValueError, match=r"a is called several times for a batch"):
        jax.eval_shape(lambda p: estimator.update(estimator.init(objective, p), objective, p, BATCH, KEY), params)


def test_telemetry_needs_one_state_with_momentum():
    objective, params = build()
    c = KroneckerDiagonal().init(objective, params)
    for tx, what in ((optax.sgd(0.1), "not 0 of these"), (optim.adafisher(b1=0.0), "not one without momentum")):
        with pytest.raises(ValueError, match=what):
            optim.adafisher_telemetry(tx.init(params), c)
    told = optim.adafisher_telemetry(optim.adafisher().init(params), c)
    assert told["cosine"] == 0 and told["share_max"] == 0
