"""PSGD as an estimator: what it fits to, when, and what it refuses."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from curvtrain import Objective, losses
from curvtrain.curvature import (
    PSGD,
    Affine,
    Annealed,
    Curvature,
    CurvatureSchedule,
    Dense,
    Elementwise,
    FittedPreconditioner,
    Kron,
    KroneckerDiagonal,
    LowRank,
    XMat,
)
from curvtrain.curvature.base import Estimate
from curvtrain.curvature.psgd import estimator as module

KEY = jax.random.key(0)


def quadratic(H):
    """loss = x^T H x / 2 + b^T x over a parameter (5, 10), b the mean of the batch."""
    H = jnp.asarray(H, jnp.float32)

    def loss(params, batch):
        x = params["x"].ravel()
        return 0.5 * x @ H @ x + jnp.mean(batch["b"] @ x)

    return Objective.from_loss(loss), {"x": jnp.zeros((5, 10))}


def spd(n, condition, rng):
    Q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    return Q * np.logspace(0, np.log10(condition), n) @ Q.T


def run(estimator, objective, params, batches):
    update = jax.jit(lambda c, batch, key: estimator.update(c, objective, params, batch, key), donate_argnums=0)
    c = estimator.init(objective, params)
    for i, batch in enumerate(batches):
        c = update(c, batch, jax.random.fold_in(KEY, i))
    return c


NOTHING = {"b": np.zeros((2, 50), np.float32)}


@pytest.mark.parametrize("probes", [1, 4])
def test_the_hessian_of_a_quadratic_is_inverted(probes):
    rng = np.random.default_rng(0)
    H = np.kron(spd(5, 5, rng), spd(10, 5, rng))
    objective, params = quadratic(H)
    c = run(PSGD(Kron(), "hessian", 0.5, probes=probes), objective, params, [NOTHING] * 100)
    P = np.asarray(jax.jit(FittedPreconditioner.as_matrix)(c), np.float64)
    np.testing.assert_allclose(np.linalg.inv(P), H, atol=1e-4 * np.abs(H).max())
    assert int(c.fits) == 100 and not c.whitens


def test_the_ggn_is_inverted():
    """Of a linear model with squared error it is the Hessian, diagonal here."""
    x = np.diag(np.arange(1.0, 5.0)).astype(np.float32)
    model = nnx.Linear(4, 3, use_bias=False, rngs=nnx.Rngs(0))
    objective, params = Objective.from_model(model, lambda m, b: m(b["x"]), losses.SquaredError())
    batch = {"x": x, "target": np.zeros((4, 3), np.float32)}
    c = run(PSGD(Kron(), "ggn", 0.5), objective, params, [batch] * 200)
    v = {"kernel": jnp.ones((4, 3))}
    H = {"kernel": np.arange(1.0, 5.0)[:, None] ** 2 * np.ones((1, 3)) / 4}
    scale = c.invert(v)["kernel"] / H["kernel"]  # the loss's own factor of 1 or 2
    np.testing.assert_allclose(scale, np.full((4, 3), float(scale[0, 0])), rtol=1e-3)
    gradient = jax.jvp(jax.grad(lambda p: objective.loss(p, batch)), (params,), (v,))[1]
    np.testing.assert_allclose(c.invert(v)["kernel"], gradient["kernel"], rtol=1e-3)


def test_gradients_are_whitened():
    """P approaches (E g g^T)^(-1/2), which makes the expected update the identity."""
    rng = np.random.default_rng(0)
    A, B = spd(5, 4, rng), spd(10, 4, rng)
    batches = [{"b": ((A @ rng.normal(size=(5, 10)) @ B).ravel()[None]).astype(np.float32)} for _ in range(800)]
    objective, params = quadratic(np.zeros((50, 50)))
    rate = lambda fits: jnp.where(fits < 200, 0.5, 0.02)
    c = run(PSGD(Kron(), "gradient", rate), objective, params, batches)
    expected = np.linalg.inv(np.kron(A, B))  # (E g g^T)^(-1/2) for g = A Z B
    P = np.asarray(jax.jit(FittedPreconditioner.as_matrix)(c), np.float64)
    assert np.linalg.norm(P - expected) / np.linalg.norm(expected) < 0.15
    assert c.whitens


def test_a_moving_average_is_whitened_and_kept_finite():
    objective, params = quadratic(np.zeros((50, 50)))
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(6, 1, 50)).astype(np.float32)
    c = run(PSGD(Kron(), momentum=0.9), objective, params, [{"b": row} for row in rows])
    mean = np.zeros((5, 10))
    for t, row in enumerate(rows):
        beta = min(t / (t + 1), 0.9)
        mean = beta * mean + (1 - beta) * row.reshape(5, 10)
    np.testing.assert_allclose(c.mean["x"], mean, rtol=1e-5, atol=1e-6)
    bad = run(PSGD(Kron(), momentum=0.9), objective, params, [{"b": rows[0]}, {"b": rows[0] * np.nan}])
    np.testing.assert_allclose(bad.mean["x"], rows[0].reshape(5, 10), rtol=1e-6)
    assert np.all(np.isfinite(bad.apply({"x": jnp.ones((5, 10))})["x"]))


# -- when --------------------------------------------------------------------------------------------------------------


def fits_of(probability, rule, calls):
    objective, params = quadratic(np.eye(50))
    estimator = PSGD(Kron(), "hessian", update_probability=probability, rule=rule)
    update = jax.jit(lambda c, key: estimator.update(c, objective, params, NOTHING, key))
    c, at = estimator.init(objective, params), []
    for i in range(calls):
        before = int(c.fits)
        c = update(c, jax.random.fold_in(KEY, i))
        if int(c.fits) > before:
            at.append(i)
    assert int(c.calls) == calls
    return at


def test_fits_come_at_a_steady_pace():
    assert fits_of(0.25, "deterministic", 13) == [0, 4, 8, 12]
    assert fits_of(0.4, "deterministic", 10) == [0, 3, 6, 9]  # a fit waits until 1 / 0.4 = 2.5 calls have passed
    assert fits_of(lambda calls: jnp.where(calls < 4, 1.0, 0.5), "deterministic", 10) == [0, 1, 2, 3, 5, 7, 9]


def test_without_any_probability_there_is_only_the_first_fit():
    assert fits_of(0.0, "deterministic", 5) == [0]


def test_fits_come_by_chance():
    at = fits_of(0.3, "bernoulli", 200)
    assert at[:2] == [0, 1] and 40 < len(at) < 85
    assert len({b - a for a, b in itertools.pairwise(at)}) > 3


def test_annealing_goes_from_often_to_rarely():
    p = Annealed()
    assert p(0) == p(500) == 1.0 and p.period(0) == p.period(500) == 1
    np.testing.assert_allclose(p(1500), np.exp(-1), rtol=1e-6)
    assert p.period(1500) == 3
    np.testing.assert_allclose(p(10**6), 0.03, rtol=1e-6)
    assert p.period(10**6) == 33
    schedule = CurvatureSchedule(update_every=p.period)
    done = [step for step in range(6000) if schedule.updates(step)]
    assert done[:501] == list(range(501)) and 25 < len([s for s in done if s >= 5000]) < 36
    assert all(b - a == p.period(a) for a, b in itertools.pairwise(done))


def test_a_period_is_the_same_for_a_traced_step():
    p, steps = Annealed(), np.arange(0, 6000, 7)
    traced = jax.jit(jax.vmap(p.period))(steps)
    assert traced.dtype == jnp.int32
    assert np.count_nonzero(np.asarray(traced) != [p.period(int(step)) for step in steps]) <= 2  # rounding of x.5


@pytest.mark.parametrize("fit", ["gradient", "hessian"])
@pytest.mark.parametrize("family", [Kron(), Affine(), Elementwise(), XMat(), XMat("flat"), LowRank(2), Dense()])
def test_parameters_without_entries_are_left_alone(family, fit):
    params = {"a": jnp.full((2, 3), 2.0), "none": jnp.zeros((0, 4))}
    objective = Objective.from_loss(lambda p, batch: sum(jnp.sum(x**2) for x in jax.tree.leaves(p)))
    c = run(PSGD(family, fit), objective, params, [{"b": np.zeros((1,), np.float32)}])
    assert (int(c.fits), int(c.failures)) == (1, 0)
    out = jax.jit(lambda c, v: c.invert(c.apply(v)))(c, params)
    assert out["none"].shape == (0, 4)
    np.testing.assert_allclose(out["a"], params["a"], rtol=1e-4)


# -- layers of a scan --------------------------------------------------------------------------------------------------


class Scanned(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs):
            return nnx.Linear(4, 4, rngs=rngs)

        self.layers = stack(rngs)

    def __call__(self, x):
        return nnx.scan(lambda x, layer: nnx.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_layers_of_a_scan_are_found_from_a_part_of_their_parameters():
    objective, params = Objective.from_model(Scanned(nnx.Rngs(0)), lambda m, b: m(b["x"]), losses.SquaredError())
    c = PSGD().init(*objective.select(params, {("layers", "kernel")}))
    assert set(c.state) == {"4x4"} and c.state["4x4"]["Q"]["0"].shape == (3, 1, 4, 4)


def test_layers_of_a_scan_get_a_preconditioner_each():
    objective, params = Objective.from_model(Scanned(nnx.Rngs(0)), lambda m, b: m(b["x"]), losses.SquaredError())
    c = PSGD().init(objective, params)
    assert set(c.state) == {"4x4", "4d"}
    assert c.state["4x4"]["Q"]["0"].shape == (3, 1, 4, 4) and c.state["4d"]["Q"]["0"].shape == (3, 4)


# -- what it says and refuses ------------------------------------------------------------------------------------------


def test_the_table_counts_the_bytes_of_the_state():
    objective, params = quadratic(np.eye(50))
    table = PSGD().overview(objective, params)
    state = PSGD().init(objective, params).state
    total = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    assert (
        f"{total:,}" in table
        and "PRO 5x10" in table
        and table.splitlines()[0].split()
        == [
            "parameters",
            "preconditioner",
            "bytes",
        ]
    )


def test_more_memory_than_there_is_is_refused_before_anything_is_allocated(monkeypatch):
    params = {"big": jax.ShapeDtypeStruct((8192, 8192), jnp.float32), "small": jax.ShapeDtypeStruct((3,), jnp.float32)}
    estimator = PSGD(Kron(block_size=None))
    with pytest.raises(ValueError, match=r"PSGD\(Kron\(\)\) would take 1,073,7\d\d,\d\d\d bytes, and there are 1,000"):
        jax.eval_shape(dataclasses.replace(estimator, memory_limit=1000).init, None, params)
    monkeypatch.setattr(module, "device_memory", lambda: 10**6)
    with pytest.raises(ValueError, match=r"PRO 8192x8192 for big. Lower max_size"):
        jax.eval_shape(estimator.init, None, params)
    monkeypatch.undo()
    assert module.device_memory() > 10**8


@pytest.mark.parametrize(
    ("family", "together"),
    [
        (Kron(), False),
        (Affine(), False),
        (Elementwise(), False),
        (XMat(), False),
        (XMat("flat"), True),
        (LowRank(2), True),
        (Dense(), True),
    ],
)
def test_it_multiplies_and_says_what_it_mixes(family, together):
    params = {"a": {"w": jnp.ones((3, 4))}, "b": jnp.ones(5)}
    c = PSGD(family).init(None, params)
    assert isinstance(c, Estimate) and not isinstance(c, Curvature)
    assert c.groups() == ((("a", "w"), ("b",)),) if together else ((("a", "w"),), (("b",),))
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6)
    jax.tree.map(same, c.apply(params), params)  # P = I
    jax.tree.map(same, c.invert(params), params)
    np.testing.assert_allclose(c.as_matrix(), np.eye(17), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(preconditioner="kron"), TypeError, r"PSGD\(preconditioner\) should be Kron\(\), .* not 'kron'"),
        (dict(preconditioner=KroneckerDiagonal()), TypeError, r"not KroneckerDiagonal"),
        (dict(fit="hesian"), ValueError, r"Did you mean 'hessian'"),
        (dict(rate=0.0), ValueError, r"PSGD\(rate\) should be above 0.0 and at most 1.0, not 0.0"),
        (dict(rate=1.5), ValueError, r"not 1.5"),
        (dict(probes=0, fit="hessian"), ValueError, r"PSGD\(probes\) should be at least 1"),
        (dict(probes=2), ValueError, r"PSGD\(probes\) counts Hessian products, and fit='gradient' takes none"),
        (dict(momentum=0.9, fit="ggn"), ValueError, r"PSGD\(momentum\) is that of gradients"),
        (dict(momentum=1.0), ValueError, r"PSGD\(momentum\) should be at least 0.0 and below 1.0"),
        (
            dict(update_probability=1.2),
            ValueError,
            r"PSGD\(update_probability\) should be at least 0.0 and at most 1.0",
        ),
        (dict(update_probability=-0.1), ValueError, r"not -0.1"),
        (dict(rule="chance"), ValueError, r"PSGD\(rule\) should be one of 'deterministic', 'bernoulli'"),
        (dict(rule="bernoulli"), ValueError, r"PSGD\(rule='bernoulli'\) chooses among calls"),
        (dict(memory_limit=0), ValueError, r"PSGD\(memory_limit\) should be at least 1"),
        (dict(preconditioner=Kron(dtype="bfloat16"), rate=0.01), ValueError, r"below the resolution of factors"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        PSGD(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(high=1.5), r"Annealed\(high\) should be above 0.0 and at most 1.0"),
        (dict(low=0.0), r"Annealed\(low\)"),
        (dict(high=0.1, low=0.5), r"Annealed\(low\) should be above 0.0 and at most 0.1, not 0.5"),
        (dict(decay=-1.0), r"Annealed\(decay\)"),
    ],
)
def test_bad_annealing_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Annealed(**options)
