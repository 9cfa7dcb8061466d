"""Dtypes: curvature is float32, and float64 where parameters are, under either setting of `jax_enable_x64`.

What stays of one dtype is seen in abstract runs of every estimator and optimizer; values are compared with plain JAX in
float64. In a Trainer: `trainer/test_float64.py`.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, OPTIMIZERS
from flax import nnx
from jax.flatten_util import ravel_pytree

from curvtrain import CurvatureSchedule, Objective, losses, optim
from curvtrain.curvature import (
    KFAC,
    PSGD,
    DiagonalFisher,
    FullBlock,
    Kron,
    Lanczos,
    LowRank,
    UnitWise,
    XMat,
    products,
)
from curvtrain.curvature.posterior import posteriors
from curvtrain.curvature.psgd import Elementwise

# (the flag, dtype of the parameters); without the flag, float32 and bfloat16 are those of `test_contract.py`
SETTINGS = [(False, "float16"), (True, "float32"), (True, "float64")]
settings = pytest.mark.parametrize(("x64", "dtype"), SETTINGS, ids=[f"x64={flag}, {name}" for flag, name in SETTINGS])
WIDTH = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}

OTHERS = {  # beyond those in `cases.py`: options that are schedules, and optimizers that carry their curvature
    "scale_by_curvature": (lambda: optim.scale_by_curvature(SCHEDULE, -0.5), DiagonalFisher()),
    "kfac": (lambda: optim.kfac(SCHEDULE, 0.9, SCHEDULE, l2=1e-3), KFAC(uncovered="diagonal")),
    "natural_gradient": (
        lambda: optim.natural_gradient(
            SCHEDULE, SCHEDULE, momentum=0.9, momentum_correction=True, gradient_decay=0.9, rescale="fan_out"
        ),
        DiagonalFisher(),
    ),
    "fosi": (lambda: optim.fosi(optax.sgd(0.1), SCHEDULE, momentum="nesterov", learning_rate_clip=3.0), Lanczos(2, 1)),
    "psgd, injected": (lambda: optax.inject_hyperparams(optim.psgd)(learning_rate=0.1, nesterov=True), PSGD()),
    "xmat": (optim.xmat, None),
    "low_rank_approximation": (optim.low_rank_approximation, None),
    "affine": (optim.affine, None),
    "kron": (optim.kron, None),
    "self_contained": (
        lambda: optim.self_contained(optim.kfac(), PLAIN, CurvatureSchedule(), OBJECTIVE.value),
        None,
    ),
}
SCHEDULE = optax.linear_schedule(0.1, 0.01, 10)
PLAIN = KFAC(uncovered="diagonal")


class Net(nnx.Module):
    """A table, a convolution, a norm, a product and a parameter of no layer."""

    def __init__(self, dtype):
        kwargs = dict(param_dtype=dtype, rngs=nnx.Rngs(0))
        self.table, self.conv = nnx.Embed(5, 3, **kwargs), nnx.Conv(3, 3, kernel_size=(2,), **kwargs)
        self.norm, self.scale = nnx.LayerNorm(3, **kwargs), nnx.Param(jnp.linspace(0.5, 1.5, 3, dtype=dtype))
        self.head = nnx.Linear(3, 3, **kwargs)

    def __call__(self, tokens):
        return self.head(self.scale * self.norm(nnx.tanh(self.conv(self.table(tokens)))).mean(1))


BATCH = {
    "tokens": np.array([[0, 1, 2], [3, 4, 0], [1, 1, 2]], np.int32),
    "label": np.array([0, 1, 2], np.int32),
    "weights": np.array([1.0, 0.5, 0.0], np.float32),
}


@dataclasses.dataclass
class Held:
    value: Objective | None = None


OBJECTIVE = Held()


def build(dtype):
    predict = lambda model, batch: model(batch["tokens"])
    made = Objective.from_model(Net(jnp.dtype(dtype)), predict, losses.SoftmaxCrossEntropy(), microbatch=2)
    OBJECTIVE.value = made[0]
    return made


def dtypes(tree):
    return jax.tree.map(lambda a: str(a.dtype), tree)


def floats(tree):
    leaves = jax.tree.leaves(tree)
    return {str(leaf.dtype) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)}


def own_float64(jaxpr) -> Iterator[str]:
    """Primitives with results in float64, other than those of optax and those whose dtype yields to any other."""
    for eqn in jaxpr.eqns:
        made_by = str(eqn.source_info.traceback)
        for var in eqn.outvars:
            wide = getattr(var.aval, "dtype", None) == np.float64 and not var.aval.weak_type
            if wide and "optax" not in made_by:
                yield eqn.primitive.name
        for param in jax.tree.leaves(eqn.params, is_leaf=is_program):
            if is_program(param):
                yield from own_float64(getattr(param, "jaxpr", param))


def is_program(node):
    return isinstance(node, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)


@settings
@pytest.mark.parametrize("name", CASES)
def test_estimator(name, x64, dtype):
    """A state keeps its dtypes, and a program for narrower parameters has no float64, with the flag or without."""
    case = CASES[name]
    estimator = case.estimator
    if isinstance(estimator, KFAC) and estimator.weight_sharing == "reduce":  # which knows no table of several tokens
        estimator = dataclasses.replace(estimator, plain="table")
    with jax.enable_x64(x64):
        objective, params = build(dtype)
        key, first = jax.random.key(0), jax.eval_shape(estimator.init, objective, params)

        def advance(curvature, params, batch):
            curvature = estimator.update(curvature, objective, params, batch, key)
            curvature = estimator.refresh(curvature, objective, params, batch, key, 0.1)
            solved = curvature.apply(params) if case.fitted else curvature.solve(params, 0.1)
            return curvature, solved, curvature.telemetry()

        program, (after, solved, told) = jax.make_jaxpr(advance, return_shape=True)(first, params, BATCH)
        assert dtypes(after) == dtypes(first)
        assert floats((after, solved)) == {WIDTH[dtype]}
        assert not any(leaf.dtype in (jnp.int64, jnp.float64) for leaf in told.values()) or dtype == "float64"
        assert dtype == "float64" or not list(own_float64(program.jaxpr))


@settings
@pytest.mark.parametrize("name", [*OPTIMIZERS, *(f"more: {name}" for name in OTHERS)])
def test_optimizer(name, x64, dtype):
    """A state keeps its dtypes, and updates have those of the parameters."""
    with jax.enable_x64(x64):
        objective, params = build(dtype)
        make, estimator = OTHERS[name[6:]] if name.startswith("more: ") else OPTIMIZERS[name]
        tx = optax.with_extra_args_support(make())
        state = jax.eval_shape(tx.init, params)
        curvature = None if estimator is None else jax.eval_shape(estimator.init, objective, params)

        def step(curvature, state, params, batch):
            look = lambda params, key: objective.value_and_grad(params, batch)[:2]
            value, grads = look(params, None)
            extra = {} if curvature is None else dict(curvature=curvature)
            if posteriors(state):
                key = jax.random.key(1)
                value, grads, extra["draws"] = optim.at_draws(look, state, params, key, samples=2, curvature=curvature)
            extra |= dict(objective=objective, batch=batch, key=jax.random.key(0), value=value, grad=grads)
            return *tx.update(grads, state, params, **extra), value

        program, (updates, after, value) = jax.make_jaxpr(step, return_shape=True)(curvature, state, params, BATCH)
        assert dtypes(after) == dtypes(state)
        assert dtypes(updates) == dtypes(params) and value.dtype == WIDTH[dtype]
        assert floats(after) <= {WIDTH[dtype], dtype}
        assert dtype == "float64" or not list(own_float64(program.jaxpr))


# -- values in float64 -------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
DATA = {
    "x": RNG.normal(size=(12, 3)),
    "label": RNG.integers(0, 4, 12).astype(np.int32),
    "weights": RNG.uniform(0.2, 2.0, 12),
}
CLOSE = dict(rtol=1e-10, atol=1e-12)


class Line(nnx.Module):
    def __init__(self):
        self.head = nnx.Linear(3, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.head(x)


def plain_values(params, data):
    z = data["x"] @ params["head"]["kernel"] + params["head"]["bias"]
    return jax.nn.logsumexp(z, axis=-1) - jnp.take_along_axis(z, data["label"][:, None], -1)[:, 0]


def plain_loss(params, data):
    w = data["weights"]
    return jnp.sum(w * plain_values(params, data)) / jnp.sum(w)


@dataclasses.dataclass
class Reference:
    """The loss, its gradient and Hessian (= GGN = Fisher: the model is linear), and gradients of each (example, class).

    All dense, in float64, by plain JAX; parameters are raveled, bias first.
    """

    loss: jax.Array
    gradient: jax.Array
    H: jax.Array
    each: jax.Array  # (examples, classes, n)
    p: jax.Array  # (examples, classes)


@pytest.fixture(scope="module")
def linear():
    """(objective, parameters, data, reference), made with the flag on."""
    with jax.enable_x64(True):
        predict = lambda model, batch: model(batch["x"])
        objective, params = Objective.from_model(Line(), predict, losses.SoftmaxCrossEntropy(), microbatch=5)
        data, (flat, unravel) = jax.tree.map(jnp.asarray, DATA), ravel_pytree(params)
        loss = lambda theta: plain_loss(unravel(theta), data)
        z = lambda theta: data["x"] @ unravel(theta)["head"]["kernel"] + unravel(theta)["head"]["bias"]
        log_p = lambda theta: jax.nn.log_softmax(z(theta))
        value, gradient = jax.value_and_grad(loss)(flat)
        H, each = jax.hessian(loss)(flat), -jax.jacobian(log_p)(flat)
        return objective, params, data, Reference(value, gradient, H, each, jnp.exp(log_p(flat)))


def raveled(tree):
    return ravel_pytree(tree)[0]


def test_losses_gradients_and_products(linear):
    objective, params, data, reference = linear
    with jax.enable_x64(True):
        value, grads, _, _ = jax.jit(objective.value_and_grad)(params, data)
        assert value.dtype == jnp.float64 and floats(grads) == {"float64"}
        np.testing.assert_allclose(value, reference.loss, **CLOSE)
        np.testing.assert_allclose(objective.loss(params, data), reference.loss, **CLOSE)
        np.testing.assert_allclose(raveled(grads), reference.gradient, **CLOSE)
        whole = objective.with_microbatch(None)
        for here in (objective, whole):
            np.testing.assert_allclose(raveled(here.value_and_grad(params, data)[1]), reference.gradient, **CLOSE)
            for product in (products.hvp, products.ggnvp, products.fvp):
                Hv = jax.jit(product)(here, params, params, data)
                np.testing.assert_allclose(raveled(Hv), reference.H @ raveled(params), **CLOSE)


def estimated(linear, estimator):
    objective, params, data, _ = linear

    @jax.jit
    def run(params, data):
        key = jax.random.key(0)
        curvature = estimator.update(estimator.init(objective, params), objective, params, data, key)
        return estimator.refresh(curvature, objective, params, data, key)

    return run(params, data)


def solved_by(curvature, params, damping=0.1):
    """Under jit, as in a training step."""
    return raveled(jax.jit(lambda c, v: c.solve(v, damping))(curvature, params))


def test_diagonals_and_blocks(linear):
    """Dampings are as they were written, not rounded to float32."""
    _, params, data, r = linear
    with jax.enable_x64(True):
        w, theta = data["weights"] / jnp.sum(data["weights"]), raveled(params)
        F = jnp.einsum("i,ic,icm,icn->mn", w, r.p, r.each, r.each)
        np.testing.assert_allclose(F, r.H, **CLOSE)
        diagonal = estimated(linear, DiagonalFisher("exact"))
        np.testing.assert_allclose(raveled(diagonal.values), jnp.diag(F), **CLOSE)
        np.testing.assert_allclose(solved_by(diagonal, params), theta / (jnp.diag(F) + 0.1), **CLOSE)
        block = estimated(linear, FullBlock("exact"))
        np.testing.assert_allclose(solved_by(block, params), jnp.linalg.solve(F + 0.1 * jnp.eye(16), theta), **CLOSE)
        unit = np.arange(16) % 4  # parameters are the bias, then the rows of the kernel
        same = jnp.where(unit[:, None] == unit[None], F, 0.0)
        expected = jnp.linalg.solve(same + 0.1 * jnp.eye(16), theta)
        np.testing.assert_allclose(solved_by(estimated(linear, UnitWise("exact")), params), expected, **CLOSE)


@pytest.mark.parametrize("inverse", ["eigh", "cholesky"])
def test_kronecker_factors(linear, inverse):
    _, params, data, r = linear
    with jax.enable_x64(True):
        w = data["weights"] / jnp.sum(data["weights"])
        a = jnp.concatenate([data["x"], jnp.ones((12, 1))], 1)
        A, G = jnp.einsum("i,ij,ik->jk", w, a, a), jnp.einsum("i,icd->cd", w, r.p[:, :, None] * jnp.eye(4))
        G = G - jnp.einsum("i,ic,id->cd", w, r.p, r.p)
        M = jnp.concatenate([params["head"]["kernel"], params["head"]["bias"][None]])
        if inverse == "eigh":
            C = jnp.kron(A, G) + 0.1 * jnp.eye(16)
            expected = jnp.linalg.solve(C, M.ravel()).reshape(4, 4)
        else:
            pi, root = jnp.sqrt(jnp.trace(A) / jnp.trace(G)), jnp.sqrt(0.1)
            left = jnp.linalg.solve(A + pi * root * jnp.eye(4), M)
            expected = jnp.linalg.solve(G + root / pi * jnp.eye(4), left.T).T
        got = jax.jit(lambda c, v: c.solve(v, 0.1))(estimated(linear, KFAC("exact", inverse=inverse)), params)["head"]
        np.testing.assert_allclose(jnp.concatenate([got["kernel"], got["bias"][None]]), expected, **CLOSE)


def test_eigenpairs(linear):
    _, _, _, r = linear
    with jax.enable_x64(True):
        pairs = estimated(linear, Lanczos(3, 1, m=16, stop=1e-12))
        values = jnp.linalg.eigvalsh(r.H)
        np.testing.assert_allclose(pairs.values[:3], values[::-1][:3], rtol=1e-10)
        np.testing.assert_allclose(pairs.values[3], values[0], atol=1e-12)
        assert jnp.all(pairs.residuals[:3] < 1e-10)


@pytest.mark.parametrize("family", [Kron(), Kron("EQ"), XMat(), LowRank(2), Elementwise()], ids=repr)
def test_fitted_preconditioners(linear, family):
    """P and its inverse undo each other to float64's accuracy."""
    _, params, _, _ = linear
    with jax.enable_x64(True):
        P = estimated(linear, PSGD(family))
        back = jax.jit(lambda P, v: P.invert(P.apply(v)))(P, params)
        np.testing.assert_allclose(raveled(back), raveled(params), **CLOSE)


def test_steps_of_optimizers(linear):
    """Rates and dampings are as they were written, not rounded to float32."""
    objective, params, data, r = linear
    with jax.enable_x64(True):
        curvature, theta = estimated(linear, FullBlock("exact")), raveled(params)
        grads = objective.value_and_grad(params, data)[1]
        natural = jnp.linalg.solve(r.H + 0.1 * jnp.eye(16), r.gradient)
        with_decay = jnp.linalg.solve(r.H + 0.3 * jnp.eye(16), r.gradient + 0.2 * theta)
        for tx, expected in (
            (optim.scale_by_curvature(0.1), natural),
            (optim.natural_gradient(0.7, 0.1, l2=0.2), -0.7 * with_decay),
            (optim.kfac(0.7, 0.9, 0.1, l2=0.2, reject=False), -0.7 * with_decay),
        ):
            updates, _ = tx.update(grads, tx.init(params), params, curvature=curvature)
            np.testing.assert_allclose(raveled(updates), expected, **CLOSE)


# -- float16, complex numbers and mixtures -----------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch", [None, 3000])
@pytest.mark.parametrize("estimator", [None, KFAC("empirical")], ids=["alone", "with statistics"])
def test_gradients_in_float16_are_those_of_the_mean(microbatch, estimator):
    """The sum over these 8,000 examples is beyond 65,504, the mean is not."""
    x = np.random.default_rng(0).uniform(10, 20, (8000, 2)).astype(np.float16)
    batch, linear = {"x": x, "target": np.zeros((8000, 1), np.float16)}, dict(dtype=jnp.float16, rngs=nnx.Rngs(0))
    model = nnx.Linear(2, 1, param_dtype=jnp.float16, **linear)
    predict = lambda model, batch: model(batch["x"])
    objective, params = Objective.from_model(model, predict, losses.SquaredError(), microbatch=microbatch)

    @jax.jit
    def run(params, batch):
        measure = None
        if estimator is not None:
            curvature = estimator.init(objective, params)
            measure = estimator.measure(curvature, objective, params, batch, None)
        return objective.value_grad_and_measure(params, batch, None, measure)

    loss, grads, _, _, measured = run(params, batch)
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, batch))
    z = wide[1]["x"] @ wide[0]["kernel"] + wide[0]["bias"]
    assert np.abs((wide[1]["x"] * z).sum(0)).min() > 65504
    np.testing.assert_allclose(loss, 0.5 * np.mean(np.square(z)), rtol=1e-2)
    np.testing.assert_allclose(grads["kernel"][:, 0], (wide[1]["x"] * z).mean(0), rtol=1e-2)
    assert grads["kernel"].dtype == jnp.float16
    if estimator is not None:
        (statistics,) = measured[0].values()
        np.testing.assert_allclose(statistics["G"][0, 0, 0], np.square(z).sum(), rtol=1e-2)


def test_loss_functions_in_float16():
    loss = lambda params, batch: 0.5 * jnp.mean(jnp.square(batch["x"] * params["w"]))
    objective, params = Objective.from_loss(loss), {"w": jnp.float16(1.5)}
    batch = {"x": np.full(4000, 8.0, np.float16)}
    np.testing.assert_allclose(objective.value_and_grad(params, batch)[1]["w"], 96.0, rtol=1e-2)


COMPLEX = {"w": jnp.ones(3), "v": jnp.ones(3, jnp.complex64)}
LOSS = Objective.from_loss(lambda params, batch: jnp.sum(jnp.abs(params["v"]) ** 2 + params["w"]))


@pytest.mark.parametrize(
    "use",
    [
        lambda: LOSS.value_and_grad(COMPLEX, {"x": np.ones(3)}),
        lambda: products.hvp(LOSS, COMPLEX, COMPLEX, {"x": np.ones(3)}),
        lambda: Lanczos(1).init(LOSS, COMPLEX),
        lambda: PSGD().init(LOSS, COMPLEX),
        lambda: optim.fosi(optax.sgd(0.1)).init(COMPLEX),
        lambda: optim.kfac(0.1, 0.9, 0.1).init(COMPLEX),
        lambda: optim.scale_by_curvature(0.1).init(COMPLEX),
    ],
    ids=["gradient", "product", "Lanczos", "PSGD", "fosi", "kfac", "scale_by_curvature"],
)
def test_complex_parameters_are_refused(use):
    with pytest.raises(TypeError, match=r"(real|v is complex64).*(imaginary)"):
        use()


def test_complex_losses_and_outputs_are_refused():
    params, batch = {"w": jnp.ones(3)}, {"x": np.ones(3, np.float32)}
    with pytest.raises(TypeError, match=r"from_loss should return a real number, not complex64"):
        Objective.from_loss(lambda p, b: jnp.sum(p["w"] * 1j)).value_and_grad(params, batch)
    predict = lambda model, batch: model(batch["x"][:, None]) * 1j
    model, targets = nnx.Linear(1, 1, rngs=nnx.Rngs(0)), {**batch, "target": np.ones((3, 1), np.float32)}
    objective, params = Objective.from_model(model, predict, losses.SquaredError())
    with pytest.raises(TypeError, match="Complex numbers have no place here"):
        objective.loss(params, targets)


def test_float64_data_changes_nothing_for_float32_parameters():
    """With the flag, NumPy's own floats are float64: states, losses and gradients stay in float32."""
    with jax.enable_x64(True):
        make = lambda rngs: nnx.Linear(3, 4, rngs=rngs)
        predict = lambda model, batch: model(batch["x"])
        objective, params = Objective.from_model(make(nnx.Rngs(0)), predict, losses.SoftmaxCrossEntropy())
        estimator, key = KFAC("empirical"), jax.random.key(0)
        first = jax.eval_shape(estimator.init, objective, params)
        after = jax.eval_shape(lambda c, p: estimator.update(c, objective, p, DATA, key), first, params)
        assert dtypes(after) == dtypes(first)
        value, grads, _, _ = jax.eval_shape(objective.value_and_grad, params, DATA)
        assert value.dtype == jnp.float32 and floats(grads) == {"float32"}
