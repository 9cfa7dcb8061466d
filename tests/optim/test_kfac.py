"""K-FAC's step against the algorithm in dense numpy, in float64, and as a citizen of optax.

Every step of a run is replayed from where the run was, so errors do not add up; the run itself is checked by its loss.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

from curvtrain import CurvatureSchedule, Objective, losses, optim
from curvtrain.curvature import KFAC, Diagonal, products

N = 12
KEY = jax.random.key(3)


class Mlp(nnx.Module):
    def __init__(self, sizes, rngs):
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.tanh(layer(x))
        return self.layers[-1](x)


@functools.cache
def build(microbatch=None):
    predict = lambda model, batch: model(batch["x"])
    loss = losses.SoftmaxCrossEntropy("t")
    return Objective.from_model(Mlp([3, 4, 3], nnx.Rngs(0)), predict, loss, microbatch=microbatch)


def batch_for(seed=0, masked=False):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, 3)).astype(np.float32)
    batch = {"x": x, "t": np.argmax(x + 0.5 * rng.normal(size=x.shape), -1).astype(np.int32)}
    if masked:
        batch |= {"mask": np.arange(N) % 4 != 1, "weights": np.linspace(0.5, 2, N).astype(np.float32)}
    return batch


OBJECTIVE, PARAMS = build()
BATCH = batch_for()


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


# -- the algorithm -----------------------------------------------------------------------------------------------------


@functools.cache
def wide():
    """(theta, batch) -> (L, gradient, GGN) of the data's loss in float64, compiled once."""
    unravel = ravel_pytree(jax.tree.map(lambda a: np.asarray(a, np.float64), PARAMS))[1]

    def of(theta, batch):
        outputs = lambda theta: OBJECTIVE.predict(unravel(theta), {"x": batch["x"]})
        entropy = lambda z: jax.nn.logsumexp(z, axis=-1) - jnp.take_along_axis(z, batch["t"][:, None], -1)[:, 0]
        w = batch.get("weights", jnp.ones(N)) * batch.get("mask", jnp.ones(N))
        value, gradient = jax.value_and_grad(lambda theta: jnp.sum(w * entropy(outputs(theta))) / jnp.sum(w))(theta)
        z, J = outputs(theta), jax.jacobian(outputs)(theta)
        p = jax.nn.softmax(z)
        H = jnp.einsum("ni,ij->nij", p, jnp.eye(3)) - jnp.einsum("ni,nj->nij", p, p)
        return value, gradient, jnp.einsum("n,nia,nij,njb->ab", w, J, H, J) / jnp.sum(w)

    return jax.jit(of)


def exactly(theta, batch=BATCH):
    with jax.enable_x64(True):
        batch = {k: np.asarray(v, np.float64) if v.dtype.kind != "i" else v for k, v in batch.items()}
        found = [np.asarray(a) for a in wide()(theta, batch)]
        assert found[2].dtype == np.float64
        return found


def replay(theta, v, lam, C, *, rate, momentum, l2, constraint):
    """(delta, w, rho, whether L fell) of one step; None for what is adaptive."""
    _, g, B = exactly(theta)
    g = g + l2 * theta
    U = np.linalg.solve(C + (lam + l2) * np.eye(len(C)), g)
    if constraint is not None:
        U *= min(1, np.sqrt(constraint / (rate**2 * (U @ g))))
    V = np.stack([-U, v])
    M, b = V @ (B + (lam + l2) * np.eye(len(B))) @ V.T, V @ g
    w = np.array([rate, momentum], object)
    if not v.any() and momentum is None:
        w[1], M[1, 1] = 0.0, 1.0
    free = [i for i in (0, 1) if w[i] is None]
    fixed = [i for i in (0, 1) if w[i] is not None]
    w[free] = np.linalg.solve(
        M[np.ix_(free, free)], -b[free] - M[np.ix_(free, fixed)].astype(float) @ w[fixed].astype(float)
    )
    w = w.astype(float)
    delta = w @ V
    q = delta @ (B + l2 * np.eye(len(B))) @ delta / 2 + delta @ g
    L = lambda theta: exactly(theta)[0] + l2 / 2 * theta @ theta
    change = L(theta + delta) - L(theta)
    return delta, w, change / q, change <= 0


@functools.lru_cache(1)
def curvatures():
    """(update and refresh, compiled once; the first curvature)."""
    estimator = KFAC("exact", inverse="eigh")
    absorb = lambda c, params: estimator.refresh(
        estimator.update(c, OBJECTIVE, params, BATCH, KEY), OBJECTIVE, params, BATCH, KEY
    )
    return jax.jit(absorb), estimator.init(OBJECTIVE, PARAMS)


def stepper(tx, objective=OBJECTIVE):
    @jax.jit
    def step(params, state, curvature, batch):
        value, grads, _, _ = objective.value_and_grad(params, batch, KEY)
        extra = dict(curvature=curvature, objective=objective, batch=batch, key=KEY, value=value)
        return tx.update(grads, state, params, **extra)

    return step


@functools.lru_cache(1)
def gradient():
    return jax.jit(lambda: OBJECTIVE.value_and_grad(PARAMS, BATCH)[1])()


as_matrix = jax.jit(lambda c: c.as_matrix())
DECAY = lambda count: 0.3 * 0.9**count

# What differs from the defaults, and how many steps; every option is adaptive, a number and a schedule somewhere.
RUNS = {
    "all adaptive": dict(l2=0.01),
    "not often": dict(damping_every=3, damping_decay=0.8, initial_damping=0.1, reject=False),
    "bounded": dict(damping_every=1, initial_damping=0.5, min_damping=0.3, l2=0.1),
    "fixed rate": dict(learning_rate=0.3, damping=0.05, l2=0.02),
    "fixed momentum": dict(momentum=0.5, damping=lambda count: 0.5 * 0.8**count),
    "scheduled rate and momentum": dict(learning_rate=DECAY, momentum=lambda count: 1 - 0.9 / (1 + count)),
    "all fixed, with norm constraint": dict(learning_rate=0.5, momentum=0.9, damping=0.1, norm_constraint=0.05),
    "norm constraint, adaptive momentum": dict(learning_rate=DECAY, norm_constraint=1e-2, initial_damping=0.01),
}


@pytest.mark.parametrize("name", RUNS)
def test_steps_are_those_of_the_algorithm(name):
    options = RUNS[name]
    tx = optim.kfac(**options)
    absorb, curvature = curvatures()
    params, state, step = PARAMS, tx.init(PARAMS), stepper(tx)
    at = lambda option, count: None if option == "adaptive" else option(count) if callable(option) else option
    get = lambda key, default="adaptive": options.get(key, default)
    every, omega = get("damping_every", 5), get("damping_decay", 0.9)
    low, l2 = get("min_damping", 1e-8), get("l2", 0.0)
    adaptive = get("damping") == "adaptive"
    lam = get("initial_damping", 1.0) if adaptive else at(options["damping"], 0)
    value = exactly(flat(params))[0]
    for count in range(11):
        if count % 4 == 0:
            curvature = absorb(curvature, params)
            C = np.asarray(as_matrix(curvature), np.float64)
        np.testing.assert_allclose(state.damping, lam + l2, rtol=1e-6)
        delta, w, rho, fell = replay(
            flat(params),
            flat(state.velocity),
            float(state.damping) - l2,
            C,
            rate=at(get("learning_rate"), count),
            momentum=at(get("momentum"), count),
            l2=l2,
            constraint=get("norm_constraint", None),
        )
        updates, state = step(params, state, curvature, BATCH)
        assert fell
        scale = np.abs(delta).max()  # measured 2e-5 of it, and 3e-5 in w: d and v are almost parallel at times
        np.testing.assert_allclose(flat(updates), delta, rtol=0, atol=1e-4 * scale)
        np.testing.assert_allclose([state.learning_rate, state.momentum], w, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(flat(state.velocity), flat(updates))
        due = (count + 1) % every == 0
        if adaptive and (due or get("reject", None) is None):
            np.testing.assert_allclose(state.reduction_ratio, rho, rtol=5e-4)  # measured 3e-5
        if adaptive and due:
            assert min(abs(rho - 0.75), abs(rho - 0.25)) > 0.01  # or the test would hang on rounding
            lam = max(lam * omega**every if rho > 0.75 else lam / omega**every if rho < 0.25 else lam, low)
        elif not adaptive:
            lam = at(options["damping"], count + 1)
        params = optax.apply_updates(params, updates)
    assert (state.count, state.rejected) == (11, 0)
    assert exactly(flat(params))[0] < 0.9 * value
    assert adaptive == bool(np.isfinite(state.reduction_ratio))


@pytest.mark.parametrize(("constraint", "active"), [(1e-4, True), (1e4, False)])
def test_norm_constraint(constraint, active):
    """rate^2 U^T g is at most c."""
    absorb, curvature = curvatures()
    curvature = absorb(curvature, PARAMS)
    make = lambda c: optim.kfac(0.5, 0.0, 0.1, norm_constraint=c)
    grads = gradient()
    free, bound = (
        make(c).update(grads, make(c).init(PARAMS), PARAMS, curvature=curvature)[0] for c in (None, constraint)
    )
    size = lambda delta: -0.5 * flat(delta) @ flat(grads)
    if active:
        np.testing.assert_allclose(size(bound), np.sqrt(constraint * size(free)), rtol=1e-5)
        assert size(free) > 10 * constraint
    else:
        np.testing.assert_array_equal(flat(bound), flat(free))


# -- rejection ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [1e3, np.nan, np.inf], ids=["increases", "NaN", "infinite"])
@pytest.mark.parametrize("damping", ["adaptive", 0.1])
def test_a_rejected_step_leaves_everything_but_the_damping(bad, damping):
    rate = lambda count: jnp.where(count == 2, bad, 0.1)
    tx = optim.kfac(rate, 0.5, damping, initial_damping=0.1, reject=True, l2=0.01)
    absorb, curvature = curvatures()
    curvature = absorb(curvature, PARAMS)
    params, state, step = PARAMS, tx.init(PARAMS), stepper(tx)
    for count in range(5):
        updates, after = step(params, state, curvature, BATCH)
        if count == 2:
            np.testing.assert_array_equal(flat(updates), 0)
            np.testing.assert_array_equal(flat(after.velocity), flat(state.velocity))
            lam = 0.1 / 0.9**5 if damping == "adaptive" else 0.1
            np.testing.assert_allclose(after.damping, lam + 0.01, rtol=1e-5)
        else:
            assert np.all(np.isfinite(flat(updates))) and np.any(flat(updates) != 0)
        assert after.rejected == (count >= 2) and np.any(flat(after.velocity) != 0)
        params, state = optax.apply_updates(params, updates), after
    assert OBJECTIVE.loss(params, BATCH) < OBJECTIVE.loss(PARAMS, BATCH)


def test_a_batch_or_a_curvature_that_is_not_finite_is_rejected():
    tx = optim.kfac()
    absorb, curvature = curvatures()
    curvature = absorb(curvature, PARAMS)
    params, state, step = PARAMS, tx.init(PARAMS), stepper(tx)
    updates, state = step(params, state, curvature, BATCH)
    broken = dataclasses.replace(curvature, values=jax.tree.map(lambda a: a * jnp.nan, curvature.values))
    batch = {**BATCH, "x": BATCH["x"] * np.nan}
    for c, b in ((broken, BATCH), (curvature, batch)):
        updates, after = step(params, state, c, b)
        np.testing.assert_array_equal(flat(updates), 0)
        np.testing.assert_array_equal(flat(after.velocity), flat(state.velocity))
        np.testing.assert_allclose(after.damping, state.damping / 0.9**5, rtol=1e-6)
        updates, after = step(params, after, curvature, BATCH)
        assert after.rejected == 1 and np.all(np.isfinite(flat(updates))) and np.any(flat(updates) != 0)


def test_without_rejection_a_bad_step_is_made():
    tx = optim.kfac(1e3, 0.0, 0.1)
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, curvature=_identity())
    np.testing.assert_allclose(flat(updates), -1e3 / 1.1 * flat(PARAMS), rtol=1e-5)
    assert state.rejected == 0 and np.isnan(state.reduction_ratio)


def _identity():
    return Diagonal(jax.tree.map(jnp.ones_like, PARAMS))


# -- the quadratic model's products ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("microbatch", "masked"), [(None, False), (None, True), (5, True)])
def test_gram_is_that_of_the_dense_ggn(microbatch, masked):
    (objective, params), batch = build(microbatch), batch_for(1, masked)
    rng, unravel = np.random.default_rng(0), ravel_pytree(params)[1]
    V = rng.normal(size=(3, flat(params).size)).astype(np.float32)
    gram = jax.jit(lambda p, vs: products.ggn_gram(objective, p, vs, batch))(
        params, [unravel(jnp.asarray(v)) for v in V]
    )
    expected = V @ exactly(flat(params), batch)[2] @ V.T.astype(np.float64)
    np.testing.assert_allclose(gram, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_gram_needs_outputs():
    with pytest.raises(TypeError, match="ggn_gram needs the model's outputs"):
        products.ggn_gram(Objective.from_loss(lambda p, b: 0.0), PARAMS, [PARAMS], BATCH)


# -- the cached inverse ------------------------------------------------------------------------------------------------


def test_a_cached_inverse_is_used_where_it_is_of_the_damping_and_only_there():
    estimator, tx = KFAC("exact"), optim.kfac(0.5, 0.0, 0.1)
    c = jax.jit(estimator.update)(estimator.init(OBJECTIVE, PARAMS), OBJECTIVE, PARAMS, BATCH, KEY)
    state, step = tx.init(PARAMS), stepper(tx)
    refresh = jax.jit(lambda damping: estimator.refresh(c, OBJECTIVE, PARAMS, BATCH, KEY, damping))
    cached, other = refresh(state.damping), refresh(3.0)
    assert cached.damping == state.damping
    doubled = lambda c: dataclasses.replace(c, inverses=jax.tree.map(lambda x: 2 * x, c.inverses))
    u = {name: flat(step(PARAMS, state, c, BATCH)[0]) for name, c in dict(
        cached=cached, other=other, twice=doubled(cached), not_used=doubled(other)
    ).items()}  # fmt: skip
    np.testing.assert_allclose(u["other"], u["cached"], rtol=0, atol=1e-6 * np.abs(u["cached"]).max())
    np.testing.assert_allclose(u["twice"], 4 * u["cached"], rtol=1e-6)  # of both sides
    np.testing.assert_array_equal(u["not_used"], u["other"])


# -- where it is used --------------------------------------------------------------------------------------------------


def test_in_a_chain():
    """After clipping: the step of the clipped gradient. Other arguments pass by."""
    absorb, curvature = curvatures()
    curvature = absorb(curvature, PARAMS)
    kfac = optim.kfac(0.5, 0.0, 0.1)
    grads = gradient()
    clip = optax.clip_by_global_norm(0.01)
    clipped, _ = clip.update(grads, clip.init(PARAMS), PARAMS)
    alone, _ = kfac.update(clipped, kfac.init(PARAMS), PARAMS, curvature=curvature)
    chain = optax.chain(clip, kfac)
    together, _ = chain.update(grads, chain.init(PARAMS), PARAMS, curvature=curvature, grad=grads, anything=1)
    np.testing.assert_array_equal(flat(together), flat(alone))


def test_in_multi_steps():
    """Two equal micro-steps are one step; the estimator still finds the damping."""
    from curvtrain.curvature.request import requested_damping, requests

    absorb, curvature = curvatures()
    curvature = absorb(curvature, PARAMS)
    alone, _ = stepper(optim.kfac())(PARAMS, optim.kfac().init(PARAMS), curvature, BATCH)
    tx = optax.MultiSteps(optim.kfac(), every_k_schedule=2)
    state, step = tx.init(PARAMS), stepper(tx)
    assert requested_damping(requests(state)) == 1.0
    first, state = step(PARAMS, state, curvature, BATCH)
    second, state = step(PARAMS, state, curvature, BATCH)
    np.testing.assert_array_equal(flat(first), 0)
    np.testing.assert_allclose(flat(second), flat(alone), rtol=0, atol=1e-6 * np.abs(flat(alone)).max())
    assert state.inner_opt_state.count == 1


def test_by_injected_hyperparameters():
    absorb, curvature = curvatures()
    curvature = absorb(curvature, PARAMS)
    options = ("initial_damping", "l2", "damping_every", "damping_decay", "min_damping", "max_damping")
    tx = optax.inject_hyperparams(optim.kfac, static_args=options)(optax.constant_schedule(0.5), 0.0, 0.1)
    plain = optim.kfac(0.5, 0.0, 0.1)
    grads = gradient()
    ours, _ = tx.update(grads, tx.init(PARAMS), PARAMS, curvature=curvature)
    alone, _ = plain.update(grads, plain.init(PARAMS), PARAMS, curvature=curvature)
    np.testing.assert_allclose(flat(ours), flat(alone), rtol=1e-6)


def test_training_loss_of_digits():
    """1,024 digits in one batch, a 64-32-10 tanh network, everything adaptive, inside `self_contained`."""
    digits = load_digits()
    batch = {"x": (digits.data[:1024] / 16).astype(np.float32), "t": digits.target[:1024].astype(np.int32)}
    predict = lambda model, batch: model(batch["x"])
    loss = losses.SoftmaxCrossEntropy("t")
    objective, params = Objective.from_model(Mlp([64, 32, 10], nnx.Rngs(0)), predict, loss)
    schedule = CurvatureSchedule(update_every=1, refresh_every=lambda step: jnp.where(step < 10, 1, 5))
    tx = optim.self_contained(optim.kfac(l2=1e-5), KFAC("exact"), schedule, objective, batch=batch)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        value, grads, _, _ = objective.value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state, value

    params = jax.tree.map(jnp.copy, params)  # donated
    state, values = tx.init(params), []
    for count in range(101):
        asked = float(state.inner.damping)
        params, state, value = step(params, state)
        values.append(float(value))
        if schedule.refreshes(count):
            assert state.curvature.damping == np.float32(asked)  # the hint is what was asked for
    reached = [values[i] for i in (10, 50, 100)]
    assert np.all(np.array(reached) <= [0.69, 0.0098, 0.0030]), reached
    assert state.inner.rejected == 0 and state.inner.damping < 1e-2


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(learning_rate="adaptve"), ValueError, r"kfac\(learning_rate\).*'adaptive', not 'adaptve'. Did you mean"),
        (dict(momentum=-0.1), ValueError, r"kfac\(momentum\) should be at least 0.0, not -0.1"),
        (dict(damping=None), TypeError, r"kfac\(damping\) should be a number, not None"),
        (dict(initial_damping="1"), TypeError, r"kfac\(initial_damping\) should be a number"),
        (dict(l2=-1.0), ValueError, r"kfac\(l2\) should be at least 0.0"),
        (dict(damping_every=0), ValueError, r"kfac\(damping_every\) should be at least 1"),
        (dict(damping_decay=1.5), ValueError, r"kfac\(damping_decay\) should be above 0.0 and at most 1.0"),
        (dict(damping_decay=0.0), ValueError, r"kfac\(damping_decay\) should be above 0.0 .*, not 0.0"),
        (dict(min_damping=-1.0), ValueError, r"kfac\(min_damping\)"),
        (dict(min_damping=1.0, max_damping=0.5), ValueError, r"kfac\(max_damping\) should be at least 1.0, not 0.5"),
        (dict(norm_constraint=-1.0, learning_rate=0.1), ValueError, r"kfac\(norm_constraint\) should be at least 0"),
        (dict(norm_constraint=1e-3), ValueError, r"kfac\(norm_constraint\) bounds a given learning rate"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        optim.kfac(**options)


def test_what_an_update_needs():
    tx, fixed = optim.kfac(), optim.kfac(0.1, 0.9, 0.1)
    state, curvature = tx.init(PARAMS), _identity()
    update = functools.partial(tx.update, PARAMS, state)
    with pytest.raises(ValueError, match="kfac needs the parameters"):
        update(curvature=curvature, objective=OBJECTIVE, batch=BATCH)
    with pytest.raises(TypeError, match=r"kfac.update\(\) needs a curvature.*curvature=curvature.KFAC\(\)"):
        update(PARAMS, objective=OBJECTIVE, batch=BATCH)
    with pytest.raises(TypeError, match=r"kfac.update\(curvature=\) should be Curvature, not dict"):
        update(PARAMS, curvature={}, objective=OBJECTIVE, batch=BATCH)
    with pytest.raises(TypeError, match=r"update\(\) needs objective="):
        update(PARAMS, curvature=curvature, batch=BATCH)
    with pytest.raises(TypeError, match=r"update\(\) needs batch=.*numbers or schedules for all three, and reject=F"):
        update(PARAMS, curvature=curvature, objective=OBJECTIVE)
    loss_only = Objective.from_loss(lambda params, batch: 0.0)
    with pytest.raises(TypeError, match="kfac with adaptive coefficients needs the model's outputs"):
        update(PARAMS, curvature=curvature, objective=loss_only, batch=BATCH)
    with pytest.raises(TypeError, match="needs objective="):
        optim.kfac(0.1, 0.9, 0.1, reject=True).update(PARAMS, state, PARAMS, curvature=curvature)
    fixed.update(PARAMS, fixed.init(PARAMS), PARAMS, curvature=curvature)  # needs neither
