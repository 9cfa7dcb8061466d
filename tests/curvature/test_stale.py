"""The rule for stale factors against a slow reference, and what a refresh makes of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from curvtrain import losses
from curvtrain.curvature import KFAC, owners
from curvtrain.curvature.kfac.stale import Staleness
from curvtrain.objective import Objective

N, D, C = 12, 3, 4
INVERSES = ("cholesky", "eigh", "ekfac")
inverses = pytest.mark.parametrize("inverse", INVERSES)


class Reference:
    """Osawa et al. (2020), algorithm for one factor, in numpy; with what `stale.py` adds to it."""

    def __init__(self):
        self.X1 = self.X2 = None
        self.D1 = self.D2 = 1
        self.wait = 0

    def refresh(self, X, alpha, forced):
        """Whether the factor is due."""
        if self.wait > 0:
            self.wait -= 1
            if forced and np.all(np.isfinite(X)):
                self.X1, self.wait = X, self.D1 - 1
            elif forced:
                self.wait = 0
            return forced
        if not np.all(np.isfinite(X)):
            return True
        like = lambda Y: Y is not None and np.linalg.norm(X - Y) < alpha * np.linalg.norm(Y)
        if not like(self.X1):
            interval = max(1, self.D1 // 2)
        elif not like(self.X2):
            interval = self.D1
        else:
            interval = self.D1 + self.D2
        self.X1, self.X2, self.D1, self.D2 = X, self.X1, interval, self.D1
        self.wait = interval - 1
        return True


def test_the_rule():
    """Factors that change at different rates, some of them for a while only, one that is broken for a while."""
    alpha, rng = 0.1, np.random.default_rng(0)
    step = jax.jit(lambda s, X, ok, forced: s.refresh(forced).refreshed({"3": X}, {"3": ok}, alpha), donate_argnums=0)
    X = rng.normal(size=(5, 3, 3))
    state, slow = Staleness.begin({"3": jnp.asarray(X, jnp.float32)}, {}), [Reference() for _ in X]
    intervals = set()
    for i in range(60):
        rate = np.array([0.0, 1e-2, 5e-2, 0.5, 0.5 if 20 < i < 30 else 1e-3])
        X = (X + rate[:, None, None] * rng.normal(size=X.shape)).astype(np.float32)
        seen, forced = X.copy(), i in (0, 13, 41)
        if i in (8, 9, 10, 11, 12, 13):
            seen[1, 0, 0] = np.nan
        state = step(state, seen, np.isfinite(seen).all((1, 2)), forced)
        due = [r.refresh(x, alpha, forced) for r, x in zip(slow, seen, strict=True)]
        assert list(state.due["3"]) == due
        assert list(state.intervals["3"]) == [r.D1 for r in slow]
        assert list(state.intervals_before["3"]) == [r.D2 for r in slow]
        assert list(state.wait["3"]) == [r.wait for r in slow]
        for name, field in (("X1", "last"), ("X2", "before")):
            want = [np.zeros((3, 3)) if getattr(r, name) is None else getattr(r, name) for r in slow]
            np.testing.assert_array_equal(getattr(state, field)["3"], want)
        assert float(state.share()) == pytest.approx(np.mean(due))
        intervals |= {r.D1 for r in slow}
    assert {1, 2, 3, 5, 8} <= intervals and slow[3].D1 == 1


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(D, D, rngs=rngs)
        self.b = nnx.Linear(D, C, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.tanh(self.a(x)))


@functools.cache
def build():
    predict = lambda model, batch: model(batch["x"])
    return Objective.from_model(MLP(nnx.Rngs(0)), predict, losses.SoftmaxCrossEntropy("t"))


def batch_of(seed):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(N, D)).astype(np.float32), "t": rng.integers(0, C, N).astype(np.int32)}


@functools.partial(jax.jit, static_argnums=0)
def update(estimator, curvature, seed):
    objective, params = build()
    return estimator.update(curvature, objective, params, seed, None)


@functools.partial(jax.jit, static_argnums=0)
def refresh(estimator, curvature, damping):
    return estimator.refresh(curvature, *build(), None, None, damping)


def kfac(inverse="cholesky", stale: float | None = 0.1):
    return KFAC("empirical", inverse=inverse, stale=stale)


def begun(estimator):
    return update(estimator, jax.jit(lambda p: estimator.init(build()[0], p))(build()[1]), batch_of(0))


def moved(curvature, size, slot, factor):
    """The curvature with one factor scaled."""
    factors = curvature.factors | {size: curvature.factors[size].at[slot].multiply(factor)}
    return dataclasses.replace(curvature, factors=factors)


def factorised(curvature):
    return curvature.inverses if curvature.inverse == "cholesky" else curvature.vectors | curvature.values


@inverses
def test_constant_factors_wait_ever_longer(inverse):
    estimator = kfac(inverse)
    c, due = begun(estimator), []
    for i in range(13):
        c = refresh(estimator, c, 0.1)
        due += [i] * bool(c.stale.share())
        assert float(c.stale.share()) in (0.0, 1.0)
    assert due == [0, 1, 2, 4, 7, 12]
    assert int(c.refreshes) == 13 and float(c.telemetry()["refreshed_share"]) == 1.0


@inverses
def test_only_what_is_due_is_factorised(inverse):
    """A factor that changes a lot is factorised every time; the others keep what they have, to the bit."""
    estimator, everything = kfac(inverse), kfac(inverse, stale=None)
    c = begun(estimator)
    assert {size: len(X) for size, X in c.factors.items()} == {"3": 2, "4": 2}
    made = lambda x, size: (x.inverses if inverse == "cholesky" else x.values)[size]
    for _ in range(3):
        c = refresh(estimator, c, 0.1)  # the next refresh finds none due
    for i in range(4):
        before, c = c, moved(moved(c, "3", 0, 1.5 + i), "4", 1, 1.01)
        wait = {"3": jnp.array([0, 9]), "4": jnp.array([9, 9])}
        c = refresh(estimator, dataclasses.replace(c, stale=dataclasses.replace(c.stale, wait=wait)), 0.1)
        assert list(c.stale.due["3"]) == [True, False] and int(c.stale.intervals["3"][0]) == 1
        new = refresh(everything, dataclasses.replace(c, stale=begun(everything).stale), 0.1)
        np.testing.assert_array_equal(made(c, "4"), made(before, "4"))
        np.testing.assert_array_equal(made(c, "3")[1], made(before, "3")[1])
        np.testing.assert_allclose(made(c, "3")[0], made(new, "3")[0], rtol=1e-6)
        for size, slot in (("3", 0), ("4", 1)):
            assert np.abs(made(new, size)[slot] - made(before, size)[slot]).max() > 1e-4 * made(new, size)[slot].max()


def test_another_damping_makes_all_due():
    """And begins every interval anew without changing it."""
    estimator = kfac()
    c = begun(estimator)
    for _ in range(6):
        c = refresh(estimator, c, 0.1)
    assert not c.stale.share()
    other = refresh(estimator, c, 0.2)
    assert float(other.stale.share()) == 1.0
    jax.tree.map(np.testing.assert_array_equal, other.stale.intervals, c.stale.intervals)
    np.testing.assert_array_equal(other.stale.wait["3"], c.stale.intervals["3"] - 1)
    fresh = refresh(kfac(stale=None), dataclasses.replace(c, stale=begun(kfac(stale=None)).stale), 0.2)
    jax.tree.map(np.testing.assert_array_equal, other.inverses, fresh.inverses)
    assert not refresh(estimator, other, 0.2).stale.share()
    c = begun(kfac("eigh"))
    for damping in (0.1, 0.1, 0.1, 0.2):  # eigenbases are for any damping
        c = refresh(kfac("eigh"), c, damping)
    assert not c.stale.share()


@inverses
def test_what_is_not_finite_is_tried_again(inverse):
    estimator = kfac(inverse)
    c = begun(estimator)
    for _ in range(3):
        c = refresh(estimator, c, 0.1)
    intervals = c.stale.intervals["4"]
    now = {size: jnp.zeros(2, jnp.int32) for size in c.factors}
    broken = dataclasses.replace(moved(c, "4", 1, jnp.nan), stale=dataclasses.replace(c.stale, wait=now))
    for i in range(2):
        broken = refresh(estimator, broken, 0.1)
        assert int(broken.failures) == i + 1 and bool(broken.stale.due["4"][1])
    assert int(broken.stale.intervals["4"][1]) == int(intervals[1])
    jax.tree.map(lambda got, want: np.testing.assert_array_equal(got[1], want[1]), broken.stale.last, c.stale.last)
    healed = refresh(estimator, dataclasses.replace(broken, factors=c.factors), 0.1)
    assert bool(healed.stale.due["4"][1]) and int(healed.failures) == 2


def test_scales_of_a_basis_that_stays_go_on():
    """EKFAC's second moments of a matrix begin anew only with one of its bases, and then have a weight of their own."""
    estimator = kfac("ekfac")
    c = begun(estimator)
    for _ in range(3):
        c = refresh(estimator, c, 0.1)
    c = update(estimator, c, batch_of(1))
    wait = {"3": jnp.array([9, 9]), "4": jnp.array([0, 9])}  # A of layer a alone is due
    after = refresh(estimator, dataclasses.replace(c, stale=dataclasses.replace(c.stale, wait=wait)), 0.1)
    np.testing.assert_array_equal(after.scales["b"], c.scales["b"])
    alpha, gamma = after.pair(after.values, "a")
    np.testing.assert_allclose(after.scales["a"], alpha[:, :, None] * gamma[:, None, :], rtol=1e-6)
    weights = owners.Blocks(after.stale.scale_weights, after.layout)
    of_a_batch = float(weights["a"][0])
    assert of_a_batch == pytest.approx(float(c.weight) / 1.95) and float(weights["b"][0]) == pytest.approx(
        1.95 * of_a_batch
    )
    last = update(estimator, after, batch_of(2))
    S = update(estimator, dataclasses.replace(after, scales=jax.tree.map(jnp.zeros_like, after.scales)), batch_of(2))
    for name, weight in (("a", 1.95), ("b", 0.95 * 1.95 + 1)):
        want = after.scales[name] + (weight * S.scales[name] - after.scales[name]) / weight
        np.testing.assert_allclose(last.scales[name], want, rtol=1e-4, atol=1e-7)


@inverses
def test_one_program(inverse):
    """Whatever is due, nothing is traced again, and the state keeps its structure."""
    estimator, traces = kfac(inverse), []

    @functools.partial(jax.jit, donate_argnums=0)
    def step(c, batch, damping):
        traces.append(1)
        c = estimator.update(c, *build(), batch, None)
        return estimator.refresh(c, *build(), batch, None, damping)

    c = jax.jit(lambda p: estimator.init(build()[0], p))(build()[1])
    like = jax.tree.map(lambda a: (a.shape, a.dtype), c)
    for i in range(6):
        c = step(c, batch_of(0), 0.1 if i < 4 else 0.2)
    assert len(traces) == 1
    assert jax.tree.map(lambda a: (a.shape, a.dtype), c) == like
    abstract = jax.eval_shape(estimator.init, *build())
    assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract) == like


@inverses
def test_without_the_rule_there_is_nothing_to_remember(inverse):
    c = begun(kfac(inverse, stale=None))
    assert not jax.tree.leaves(c.stale)
    assert "refreshed_share" not in c.telemetry()


@inverses
def test_overview_counts_it(inverse):
    """Bytes of matrices are what their arrays take."""
    for stale in (None, 0.1):
        c = begun(kfac(inverse, stale=stale))
        kept = (c.factors, c.inverses, c.vectors, c.values, c.scales, c.stale)
        want = sum(a.nbytes for a in jax.tree.leaves(kept))
        lines = kfac(inverse, stale=stale).overview(*build()).partition("\n\n")[0].splitlines()
        cells = [line.split() for line in lines if line.split()[0] in ("a", "b")]
        assert len(cells) == 2
        assert sum(max(int(cell) for cell in row if cell.isdigit()) for row in cells) == want


@pytest.mark.parametrize("stale", [0.0, 1.0, -0.1, True, "auto"])
def test_the_threshold_is_checked(stale):
    with pytest.raises((TypeError, ValueError), match=r"KFAC\(stale\) should be"):
        KFAC(stale=stale)
    with pytest.raises(TypeError):
        KFAC("empirical", "expand", "cholesky", 0.1)
