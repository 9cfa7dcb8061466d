"""What every estimator and every optimizer promises, over all of them (see `cases.py`).

In a Trainer: `trainer/test_meshes.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, OPTIMIZERS
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

from curvtrain import Objective, losses, optim
from curvtrain.curvature import KFAC
from curvtrain.curvature.posterior import posteriors

KEY = jax.random.key(1)


class Mixed(nnx.Module):
    """One of everything that users have: an embedding, a convolution, scanned layers, a norm, a plain parameter."""

    def __init__(self, rngs):
        self.table = nnx.Embed(5, 3, rngs=rngs)
        self.conv = nnx.Conv(3, 3, kernel_size=(2,), rngs=rngs)
        make = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: nnx.Linear(3, 3, rngs=rngs), in_axes=0))
        self.blocks = make(rngs)
        self.norm, self.scale = nnx.LayerNorm(3, rngs=rngs), nnx.Param(jnp.linspace(0.5, 1.5, 3))
        self.outer = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, tokens):
        x = nnx.tanh(self.conv(self.table(tokens)))
        x = nnx.scan(lambda x, block: nnx.tanh(block(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        return self.outer(self.scale * self.norm(x).mean(1))


@functools.cache
def build():
    """Eight examples are walked in pieces of three, the last of which is ragged."""
    predict = lambda model, batch: model(batch["tokens"])
    return Objective.from_model(Mixed(nnx.Rngs(0)), predict, losses.SoftmaxCrossEntropy(), microbatch=3)


def batch_for(seed):
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(0, 5, (8, 3)).astype(np.int32),
        "label": rng.integers(0, 3, 8).astype(np.int32),
        "mask": np.arange(8) != 4,
    }


def shapes(tree):
    return jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)


def close(ours, reference, tolerance=1e-6):
    np.testing.assert_allclose(ours, reference, rtol=0, atol=tolerance * np.abs(reference).max())


# -- estimators --------------------------------------------------------------------------------------------------------


class Life:
    """Three updates and refreshes of an estimator in one donating program."""

    def __init__(self, estimator):
        objective, self.params = build()
        self.estimator, self.traces = estimator, 0

        @functools.partial(jax.jit, donate_argnums=0)
        def advance(curvature, params, batch, damping):
            self.traces += 1
            curvature = estimator.update(curvature, objective, params, batch, KEY)
            return estimator.refresh(curvature, objective, params, batch, KEY, damping)

        self.advance = advance
        self.init = lambda: estimator.init(objective, self.params)  # not jitted: no buffer may be in it twice
        self.first = self.init()
        self.curvature = self.live(self.params)

    def live(self, params):
        curvature = self.init()
        for seed in range(3):
            curvature = self.advance(curvature, params, batch_for(seed), jnp.float32(0.1))
            assert shapes(curvature) == shapes(self.first)
        return curvature


def has_one_structure_and_one_trace(life):
    """That of `init` under `eval_shape`: a checkpoint can be restored, and a step carries the state."""
    (objective, params), estimator = build(), life.estimator
    abstract = jax.eval_shape(estimator.init, objective, params)
    assert shapes(abstract) == shapes(life.first) and jax.tree.leaves(abstract)
    assert jax.tree.structure(abstract) == jax.tree.structure(life.first) == jax.tree.structure(life.curvature)
    assert life.traces == 1
    floats = [leaf for leaf in jax.tree.leaves(life.curvature) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert floats and all(leaf.dtype == jnp.float32 and np.all(np.isfinite(leaf)) for leaf in floats)


def is_the_matrix_that_it_says(life, dampings, inexact):
    """matvec = C v, and solve = (C + damping I)^-1 v for any damping, announced to a refresh or not."""
    flat, unravel = ravel_pytree(life.params)
    v = np.random.default_rng(0).normal(size=flat.size).astype(np.float32)

    @jax.jit
    def of(c, v):
        solve = lambda damping: ravel_pytree(c.solve(v, damping))[0]
        more = ravel_pytree(c.diagonal())[0], c.logdet(dampings[-1])
        return c.as_matrix(), ravel_pytree(c.matvec(v))[0], [solve(damping) for damping in dampings], *more

    found = jax.tree.map(lambda a: np.asarray(a, np.float64), of(life.curvature, unravel(jnp.asarray(v))))
    C, product, solved, diagonal, logdet = found
    assert np.abs(C).max() > 0
    close(C, C.T)
    close(product, C @ v)
    close(diagonal, np.diag(C))
    np.testing.assert_allclose(logdet, np.linalg.slogdet(C + dampings[-1] * np.eye(len(C)))[1], rtol=1e-5)
    for damping, ours in zip(dampings, solved, strict=True):
        assert np.all(np.isfinite(ours)) and np.any(ours != 0)
        if not inexact:
            values = np.abs(np.linalg.eigvalsh(C))
            # what float32 makes of the eigenvalues that are smallest with the damping
            relative = np.abs(values).max() / np.abs(values + damping).min()
            close(ours, np.linalg.solve(C + damping * np.eye(len(C)), v), 1e-6 * max(1, relative))


def is_the_preconditioner_that_it_says(life):
    """apply = P v, invert = P^-1 v, for a symmetric positive definite P."""
    flat, unravel = ravel_pytree(life.params)
    v = np.random.default_rng(0).normal(size=flat.size).astype(np.float32)
    of = jax.jit(lambda c, v: (c.as_matrix(), *(ravel_pytree(w)[0] for w in (c.apply(v), c.invert(v)))))
    P, product, inverse = (np.asarray(a, np.float64) for a in of(life.curvature, unravel(jnp.asarray(v))))
    values = np.linalg.eigvalsh(P)
    assert values.min() > 0
    close(P, P.T)
    close(product, P @ v)
    close(inverse, np.linalg.solve(P, v), 1e-6 * values.max() / values.min())
    assert jax.tree.map(jnp.shape, life.curvature.like()) == jax.tree.map(jnp.shape, life.params)


def starts_as_nothing(life, fitted):
    """An optimizer can be called before the first refresh: with C = 0, or, where P is fitted, with P = I."""
    if fitted:
        for got in (life.first.apply(life.params), life.first.invert(life.params)):
            jax.tree.map(lambda g, p: np.testing.assert_allclose(g, p, rtol=1e-6), got, life.params)
        return
    for damping in (0.5, jnp.float32(0.5)):
        got = life.first.solve(life.params, damping)
        jax.tree.map(lambda g, p: np.testing.assert_allclose(g, 2 * p, rtol=1e-6), got, life.params)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), life.first.matvec(life.params))


def tells_scalars(life):
    told = life.curvature.telemetry()
    assert told and told.keys() == life.first.telemetry().keys()
    assert all(isinstance(name, str) and jnp.shape(value) == () for name, value in told.items())
    assert all(np.isfinite(value) for value in told.values())


def has_specs_of_its_structure(life):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = jax.tree.map(lambda p: PartitionSpec(*([None] * (p.ndim - 1)), "fsdp"), life.params)
    found = life.estimator.partition_specs(life.first, specs, mesh)
    is_spec = lambda s: isinstance(s, PartitionSpec)
    assert jax.tree.structure(found, is_leaf=is_spec) == jax.tree.structure(life.first)
    for spec, leaf in zip(jax.tree.leaves(found, is_leaf=is_spec), jax.tree.leaves(life.first), strict=True):
        assert is_spec(spec) and len(spec) <= leaf.ndim


def reads_bfloat16_exactly(life, damping, rounding, fitted):
    """Parameters in bfloat16, here of layers that compute in float32, give what the same numbers in float32 give."""
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), life.params)
    same = jax.tree.map(lambda p: p.astype(jnp.float32), low)
    ours, theirs = life.live(low), life.live(same)
    solve = lambda c: c.apply(low) if fitted else c.solve(low, damping)
    solved = [jax.tree.map(lambda a: np.asarray(a), solve(c)) for c in (ours, theirs)]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(solved))
    close(*(np.asarray(ravel_pytree(s)[0]) for s in solved), rounding)


@pytest.mark.parametrize("name", CASES)
def test_estimator(name):
    case = CASES[name]
    estimator = case.estimator
    if isinstance(estimator, KFAC) and estimator.weight_sharing == "reduce":  # which knows no table of several tokens
        estimator = dataclasses.replace(estimator, plain="table")
    life = Life(estimator)
    has_one_structure_and_one_trace(life)
    if case.fitted:
        is_the_preconditioner_that_it_says(life)
    else:
        is_the_matrix_that_it_says(life, case.dampings, case.inexact)
    starts_as_nothing(life, case.fitted)
    tells_scalars(life)
    has_specs_of_its_structure(life)
    reads_bfloat16_exactly(life, case.dampings[-1], case.rounding, case.fitted)


# -- optimizers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer(name):
    """One structure and one trace over several steps; any extra argument; updates in the parameters' dtypes."""
    make, estimator = OPTIMIZERS[name]
    objective, params = build()
    params = {**params, "conv": jax.tree.map(lambda p: p.astype(jnp.bfloat16), params["conv"])}
    tx, traces = optax.with_extra_args_support(make()), 0
    curvature = estimator.init(objective, params)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, state, batch):
        nonlocal traces
        traces += 1
        look = lambda params, key: objective.value_and_grad(params, batch)[:2]
        (value, grads), draws = look(params, None), {}
        if posteriors(state):  # its gradients are taken at draws
            value, grads, found = optim.at_draws(look, state, params, KEY, samples=2, curvature=curvature)
            draws = {"draws": found}
        extra = dict(objective=objective, batch=batch, key=KEY, value=value, grad=grads, anything="goes", **draws)
        return tx.update(grads, state, params, curvature=curvature, **extra)

    state = tx.init(params)
    first, dtypes = shapes(jax.eval_shape(tx.init, params)), shapes(params)
    assert shapes(state) == first
    for seed in range(3):
        updates, state = step(params, state, batch_for(seed))
        assert shapes(state) == first and shapes(updates) == dtypes
        assert all(np.all(np.isfinite(u.astype(jnp.float32))) for u in jax.tree.leaves(updates))
        params = optax.apply_updates(params, updates)
    assert traces == 1
