"""The drop-ins: what a user of psgd_jax writes does the same here, with only the imports changed."""

import functools
import inspect
import runpy
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from curvtrain import optim
from curvtrain.curvature.psgd.geometry import direction_bound, spectral_bound
from curvtrain.optim.psgd_families import KronOfAxes
from tests.curvature import psgd_reference as ref

NAMES = ("xmat", "low_rank_approximation", "affine", "kron")
OLDER = NAMES[:3]
KEY = jax.random.PRNGKey(0)
ROUNDING = 5e-6  # of updates, relative to the largest entry: the worst measured is 5e-7
SHAPES = {"b": (5,), "s": (), "w": (3, 4)}
PARAMS = {name: jnp.full(shape, 0.5) for name, shape in SHAPES.items()}

pytestmark = pytest.mark.usefixtures("quick_compile")  # few steps of tiny models
named = pytest.mark.parametrize("name", NAMES)


def vectors(seed, scale=1.0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def flat(tree):
    return np.concatenate([np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(tree)])


def build(name, learning_rate=1.0, **options):
    return getattr(optim, name)(learning_rate, **options)


def inside(state):
    """The drop-in's own part of a chain's state."""
    return state[0]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --------------------------------------------------------------------------------------------------------- signatures

START = [("learning_rate", 0.01), ("preconditioner_update_probability", 1.0), ("b1", 0.9), ("nesterov", False)]
START += [("weight_decay", 0.0), ("mask", None)]
END = [("precond_lr", 0.1), ("precond_init_scale", None), ("update_global_norm_clip", None)]
END += [("step_normalizer_order", "2nd"), ("seed", None), ("mu_dtype", None), ("precision", "tensorfloat32")]
SIGNATURES = {
    "xmat": START + END,
    "low_rank_approximation": [*START, ("uvd_rank_of_approximation", 10), *END],
    "affine": [*START, ("max_size_triangular", 4096), ("max_skew_triangular", 128), *END],
    "precond_update_prob_schedule": [("max_prob", 1.0), ("min_prob", 0.03), ("decay", 0.001), ("flat_start", 500)],
    "kron": [
        ("learning_rate", 0.001),
        ("b1", 0.9),
        ("weight_decay", 0.0),
        ("weight_decay_mask", None),
        ("preconditioner_update_probability", "the schedule"),
        ("max_size_triangular", 8192),
        ("min_ndim_triangular", 2),
        ("memory_save_mode", None),
        ("momentum_into_precond_update", True),
        ("preconditioner_lr", 0.1),
        ("preconditioner_init_scale", 1.0),
        ("mu_dtype", None),
        ("precond_dtype", None),
        ("precond_update_precision", "tensorfloat32"),
        ("precond_grads_precision", None),
        ("scanned_layers", None),
        ("lax_map_scanned_layers", False),
        ("lax_map_batch_size", 8),
    ],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_the_original_one(name):
    parameters = inspect.signature(getattr(optim, name)).parameters.values()
    default = lambda p: "the schedule" if callable(p.default) else p.default
    assert [(p.name, default(p)) for p in parameters] == SIGNATURES[name]
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_schedule():
    p = optim.precond_update_prob_schedule()
    np.testing.assert_allclose([p(0), p(500), p(1500), p(10_000)], [1, 1, np.exp(-1), 0.03], rtol=1e-6)
    p = optim.precond_update_prob_schedule(max_prob=0.5, min_prob=0.1, decay=0.01, flat_start=10)
    np.testing.assert_allclose([p(jnp.int32(10)), p(20), p(1000)], [0.5, 0.5 * np.exp(-0.1), 0.1], rtol=1e-6)
    assert p is not optim.precond_update_prob_schedule(0.5, 0.1, 0.01, 10)


# --------------------------------------------------------------------------------------------- whole programs of a user

WHITENING = """
    import jax
    import jax.numpy as jnp
    import optax
    from curvtrain.optim import {name} as method  # the line that changed


    def loss_fn(params, x):
        return jnp.sum((params - x) ** 2)


    params, x = jnp.array([1.0, 2.0, 3.0]), jnp.zeros(3)
    opt = method(learning_rate=1.0, b1=0.0, preconditioner_update_probability=1.0, seed=jax.random.PRNGKey({seed}))
    opt_state = opt.init(params)


    def step(params, x, opt_state):
        loss_val, grad = jax.value_and_grad(loss_fn)(params, x)
        updates, opt_state = opt.update(grad, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss_val


    losses = []
    while len(losses) < 100:
        params, opt_state, loss_val = step(params, x, opt_state)
        losses.append(float(loss_val))
        if loss_val < 1e-4:
            break
"""

HESSIAN = """
    import jax
    import jax.numpy as jnp
    import optax
    from curvtrain.optim import {name} as method, hessian_helper  # the line that changed


    def loss_fn(params, x):
        return jnp.sum((params - x) ** 2)


    params, x = jnp.array([1.0, 2.0, 3.0]), jnp.zeros(3)
    opt = method(learning_rate=1.0{options})
    opt_state = opt.init(params)
    key = jax.random.PRNGKey({seed})
    losses = []
    for i in range(2):
        key, subkey = jax.random.split(key)
        loss_val, grad, hvp, vector, update_precond = hessian_helper(
            subkey,{step}
            loss_fn,
            params,
            loss_fn_extra_args=(x,),
            has_aux=False,
            preconditioner_update_probability=1.0,
        )
        updates, opt_state = opt.update(
            grad, opt_state, Hvp=hvp, vector=vector, update_preconditioner=update_precond
        )
        params = optax.apply_updates(params, updates)
        losses.append(float(loss_val))
"""


def run(tmp_path, program, **filled):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(program).format(**filled))
    return runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("seed", range(5))
def test_readme_whitening(seed, tmp_path):
    """From 14 below 1e-4 within 11 evaluations. Measured: 8, whatever the seed; in the original 8 to 10."""
    losses = run(tmp_path, WHITENING, name="xmat", seed=seed)["losses"]
    assert losses[0] == 14.0 and len(losses) <= 11 and losses[-1] < 1e-4


@pytest.mark.parametrize("name", ["low_rank_approximation", "affine"])
def test_readme_whitening_of_the_others(name, tmp_path):
    """Measured: 9 to 11 and 8 evaluations. (The updates of `kron` have an RMS of 1, and this rate is too large.)"""
    assert len(run(tmp_path, WHITENING, name=name, seed=0)["losses"]) <= 11


@named
@pytest.mark.parametrize("options", [", b1=0.0", ""], ids=["plain", "momentum"])
@pytest.mark.parametrize("step", ["", " i,"], ids=["readme", "package"])
def test_readme_hessian(name, options, step, tmp_path):
    """From 14 to rounding in one step, as H = 2 I. Measured: at most 2.3e-13, and 8.5e-14 without momentum."""
    losses = run(tmp_path, HESSIAN, name=name, options=options, step=step, seed=len(name + options + step))["losses"]
    assert losses[0] == 14.0 and losses[1] < 1e-12


MLP = """
    import functools
    import jax
    import jax.numpy as jnp
    import optax
    from curvtrain.optim import kron, precond_update_prob_schedule  # the line that changed

    k1, k2, k3, k4 = jax.random.split(jax.random.PRNGKey(0), 4)
    params = {{
        "hidden": {{"kernel": 0.5 * jax.random.normal(k1, (4, 16)), "bias": jnp.zeros(16)}},
        "out": {{"kernel": 0.25 * jax.random.normal(k2, (16, 1)), "bias": jnp.zeros(1)}},
        "scale": jnp.ones(()),
    }}
    x = jax.random.normal(k3, (64, 4))
    y = jnp.sin(x @ jax.random.normal(k4, (4, 1)))


    def loss_fn(params, x, y):
        h = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        out = h @ params["out"]["kernel"] + params["out"]["bias"]
        return jnp.mean((params["scale"] * out - y) ** 2)


    optimizer = kron(
        learning_rate=optax.cosine_decay_schedule(0.01, 200),
        b1=0.9,
        weight_decay=0.01,
        weight_decay_mask=jax.tree.map(lambda p: p.ndim > 1, params),
        preconditioner_update_probability=precond_update_prob_schedule(min_prob=0.1, flat_start=50, decay=0.05),
        mu_dtype="bfloat16",
        precond_dtype=jnp.float32,
        memory_save_mode={saving!r},
        scanned_layers=jax.tree.map(lambda _: False, params),
    )
    opt_state = optimizer.init(params)


    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss


    first = loss_fn(params, x, y)
    for _ in range(200):
        params, opt_state, loss = train_step(params, opt_state)
    compiled = train_step._cache_size()
"""


@pytest.mark.parametrize("saving", [None, "one_diag", "all_diag"])
def test_program_with_kron(saving, tmp_path):
    """Jitted steps that donate their state. Measured: the loss falls from 1.34 to 0.025, 0.008 and 0.008."""
    after = run(tmp_path, MLP, saving=saving)
    assert after["compiled"] == 1
    assert after["loss"] < 0.05 * after["first"]
    state = inside(after["opt_state"])
    assert state.count == 200 and state.failures == 0
    assert {m.dtype for m in jax.tree.leaves(state.mu)} == {jnp.dtype(jnp.bfloat16)}
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(after["opt_state"]))


@named
def test_program_over_rosenbrock(name):
    """A `lax.scan` over steps with `hessian_helper`; products in half of the steps, has_aux, two leaves.

    Measured over 5 seeds: from 13.5 to at most 3e-10, 1e-7, 1e-7, and to 8e-3 with `xmat`, whose P is no full 2 x 2."""
    loss_fn = lambda p, c: ((1 - p["xy"][0]) ** 2 + c * (p["xy"][1] - p["xy"][0] ** 2) ** 2 + p["s"] ** 2, p["s"])
    params = {"s": jnp.float32(-1.0), "xy": jnp.array([-1.0, 1.5])}
    opt = build(name, 0.5, b1=0.0, **(dict(min_ndim_triangular=1) if name == "kron" else {}))

    def step(carry, key):
        i, params, state = carry
        (value, s), grads, *products = optim.hessian_helper(
            key, i, loss_fn, params, (10.0,), has_aux=True, preconditioner_update_probability=0.5
        )
        hvp, vector, due = products
        updates, state = opt.update(grads, state, params, Hvp=hvp, vector=vector, update_preconditioner=due)
        return (i + 1, optax.apply_updates(params, updates), state), (value, s, due)

    start = (jnp.int32(0), params, opt.init(params))
    (_, params, state), (values, seen, due) = jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(KEY, 300)))(
        start
    )
    assert seen[0] == -1.0 and due[:2].all() and 100 < due.sum() < 200
    assert values[-1] < (3e-3 if name == "xmat" else 1e-6) * values[0]
    assert inside(state).failures == 0


class Net(nnx.Module):
    def __init__(self, rngs):
        self.inner, self.norm = nnx.Linear(3, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.outer = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.outer(self.norm(nnx.tanh(self.inner(x))))


def test_in_an_nnx_optimizer():
    """Whitening, then products with the Hessian, which `nnx.Optimizer.update` passes on."""
    x = jax.random.normal(KEY, (32, 3))
    y = jnp.stack([x[:, 0] * x[:, 1], x[:, 2]], 1)
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, build("kron", 0.02), wrt=nnx.Param)
    graph, params = nnx.split(model)
    squares = lambda model: jnp.mean((model(x) - y) ** 2)

    @nnx.jit(static_argnames="products")
    def step(model, optimizer, key, products):
        value, grads = nnx.value_and_grad(squares)(model)
        extra = {}
        if products:
            loss = lambda params: squares(nnx.merge(graph, params))
            _, _, hvp, vector, due = optim.hessian_helper(key, loss, nnx.state(model))
            extra = dict(Hvp=hvp, vector=vector, update_preconditioner=due)
        optimizer.update(model, grads, **extra)
        return value

    values = [float(step(model, optimizer, jax.random.key(i), i >= 40)) for i in range(60)]
    assert np.all(np.isfinite(values)) and values[39] < 0.5 * values[0] and values[-1] < values[0]
    assert jax.tree.structure(params) == jax.tree.structure(nnx.split(model)[1])


# -------------------------------------------------------------------------- updates against the float64 reference


def bound(A):
    """Our bound of a spectral norm, which is from below: the reference's step is to be the same."""
    return float(spectral_bound(jnp.asarray(A, jnp.float32)))


class Shaped:
    """EQ over a tree: a list of factors for every leaf, one for each of its axes."""

    def __init__(self, h, v, dense=lambda shape, axis: True, order="2nd"):
        self.factors, self.order = {}, order
        for name, leaf in h.items():
            shape = tuple(n for n in leaf.shape if n != 1) or (1,)
            scale = ref.initial_scale(np.asarray(leaf, np.float64), np.asarray(v[name], np.float64), len(shape))
            eye = lambda n, axis, shape=shape: np.eye(n) if n > 1 and dense(shape, axis) else np.ones(n)
            self.factors[name] = [scale * eye(n, axis) for axis, n in enumerate(shape)]

    def fit(self, h, v, rate):
        for name, Q in self.factors.items():
            shape = [len(q) for q in Q]
            pair = [np.asarray(a[name], np.float64).reshape(shape) for a in (h, v)]
            sides = ref.kron_sides("EQ", Q, *pair)
            self.factors[name] = [
                ref.update_factor("EQ", q, T1, T2, rate, self.size(T1, T2))
                for q, (T1, T2) in zip(Q, sides, strict=True)
            ]

    def size(self, T1, T2):
        if self.order == "2nd":
            return ref.factor_norm(T1 + T2, bound)
        E = T1 - T2
        return np.abs(E).max() if E.ndim == 1 else float(direction_bound(jnp.asarray(np.triu(E), jnp.float32)))

    def apply(self, g):
        P = {}
        for name, Q in self.factors.items():
            G = np.asarray(g[name], np.float64)
            P[name] = ref.kron_precondition("EQ", Q, G.reshape([len(q) for q in Q])).reshape(G.shape)
        return P


class Crossed:
    """`xmat_update` over the flat vector."""

    def __init__(self, h, v, order="2nd"):
        self.order, n = order, flat(h).size
        self.a, self.b = np.full(n, ref.initial_scale(flat(h), flat(v))), np.zeros(n)

    def fit(self, h, v, rate):
        self.a, self.b = ref.xmat_update(self.a, self.b, flat(h), flat(v), rate=rate, order=self.order)

    def apply(self, g):
        return unflatten(ref.xmat_apply(self.a, self.b, flat(g)), g)


def unflatten(vector, like):
    leaves, treedef = jax.tree.flatten(like)
    parts = np.split(vector, np.cumsum([a.size for a in leaves])[:-1])
    return treedef.unflatten([part.reshape(a.shape) for part, a in zip(parts, leaves, strict=True)])


def replay(make, steps, b1, nesterov, rate, clip, decay, masked, learning_rate):
    """Updates of a whole optimizer, flat, in float64: a fit of P, momentum, P, clip, decay, rate."""
    P, mu, out = None, 0.0, []
    params = flat({name: PARAMS[name] * m for name, m in masked.items()})
    for t, (g, h, v, due) in enumerate(steps, 1):
        if due:
            P = P or make(h, v)
            P.fit(h, v, rate(t))
        mu = b1 * mu + (1 - b1) * flat(g)
        averaged = mu / (1 - b1**t)
        if nesterov:
            averaged = b1 / (1 - b1 ** (t + 1)) * mu + (1 - b1) / (1 - b1**t) * flat(g)
        u = flat(P.apply(unflatten(averaged, g)))
        u = u / max(1.0, np.linalg.norm(u) / clip) + decay * params
        out.append(-learning_rate(t - 1) * u)
    return out


@pytest.mark.parametrize("order", ["2nd", "1st"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", ["xmat", "affine"])
def test_updates_are_the_references(name, nesterov, order):
    """Five steps, one of them without a fit, with every option of the chain.

    No scalar: its first observation is fitted to the last bit, and the sign of what is left decides a step of "1st".
    """
    masked, shapes = {"b": False, "w": True}, {name: SHAPES[name] for name in ("b", "w")}
    params = {name: PARAMS[name] for name in shapes}
    rate, learning_rate = (lambda t: 0.4 / t), optax.linear_schedule(0.5, 0.1, 4)
    opt = build(
        name,
        learning_rate,
        b1=0.8,
        nesterov=nesterov,
        weight_decay=0.1,
        mask=masked,
        precond_lr=rate,
        update_global_norm_clip=2.0,
        step_normalizer_order=order,
        precision="float32",
    )
    draw = functools.partial(vectors, shapes=shapes)
    steps = [(draw(i), draw(9 + i, 3.0), draw(19 + i), i != 2) for i in range(5)]
    make = functools.partial(Crossed if name == "xmat" else Shaped, order=order)
    expected = replay(make, steps, 0.8, nesterov, rate, 2.0, 0.1, masked, learning_rate)
    state, update = opt.init(params), jax.jit(opt.update)
    for (g, h, v, due), exact in zip(steps, expected, strict=True):
        updates, state = update(g, state, params, Hvp=h, vector=v, update_preconditioner=jnp.bool_(due))
        np.testing.assert_allclose(flat(updates), exact, atol=ROUNDING * np.abs(exact).max())


def test_kron_updates_are_the_references():
    """In Hessian mode, five steps; a third-order tensor, and one axis that is too long."""
    shapes = SHAPES | {"t": (2, 3, 4), "long": (2, 7)}
    opt = build(
        "kron", b1=0.0, max_size_triangular=6, precond_update_precision="float32", precond_grads_precision="float32"
    )
    params = vectors(7, shapes=shapes)
    state, update, P = opt.init(params), jax.jit(opt.update), None
    for i in range(5):
        g, h, v = vectors(i, shapes=shapes), vectors(9 + i, 3.0, shapes), vectors(19 + i, shapes=shapes)
        P = P or Shaped(h, v, lambda shape, axis: len(shape) > 1 and shape[axis] <= 6)
        P.fit(h, v, 0.1)
        updates, state = update(g, state, params, Hvp=h, vector=v, update_preconditioner=True)
        expected = -flat(P.apply(g))
        np.testing.assert_allclose(flat(updates), expected, atol=ROUNDING * np.abs(expected).max())


@pytest.mark.parametrize("order", ["2nd", "1st"])
def test_low_rank_updates_are_the_references(order):
    """Of d, and of U or V, which is by chance, and both happen."""
    opt = build("low_rank_approximation", b1=0.0, uvd_rank_of_approximation=3, step_normalizer_order=order,
                precision="float32")  # fmt: skip
    state, update, drawn = opt.init(PARAMS), jax.jit(opt.update), []
    for i in range(8):
        g, h, v = vectors(i), vectors(9 + i, 3.0), vectors(19 + i)
        before = inside(state).preconditioner
        U, V = (np.stack([flat(jax.tree.map(lambda a, r=r: a[r], before[x])) for r in range(3)], 1) for x in "UV")
        d = flat(before["d"]) if before["seen"] else np.full(18, ref.initial_scale(flat(h), flat(v)))
        updates, state = update(g, state, PARAMS, Hvp=h, vector=v, update_preconditioner=True)
        if i == 0:
            continue  # U = 0: a step of V has no direction yet
        candidates = {
            which: -ref.lra_apply(
                *ref.lra_update(U, V, d, flat(h), flat(v), rate=0.1, which=which, order=order), flat(g)
            )
            for which in "UV"
        }
        errors = {which: np.abs(flat(updates) - u).max() / np.abs(u).max() for which, u in candidates.items()}
        drawn.append(min(errors, key=errors.get))
        assert errors[drawn[-1]] < 2e-5
    assert set(drawn) == {"U", "V"}


@pytest.mark.parametrize("into", [True, False])
def test_kron_whitens_the_moving_average_or_the_gradient(into):
    """Three steps, up to noise of 3e-4. Measured: errors of 4e-4."""
    params = {"w": PARAMS["w"]}
    opt = build(
        "kron", b1=0.9, momentum_into_precond_update=into, preconditioner_lr=0.5, precond_update_precision="float32"
    )
    state, Q, mu = opt.init(params), [np.eye(3), np.eye(4)], 0.0
    for t, seed in enumerate((1, 2, 3), 1):
        g = {"w": vectors(seed)["w"]}
        mu = 0.9 * mu + 0.1 * np.asarray(g["w"], np.float64)
        averaged = mu / (1 - 0.9**t)
        h = averaged if into else np.asarray(g["w"], np.float64)
        Q, _ = ref.kron_update("EQ", Q, h, rate=0.5, lipschitz=[0.0, 0.0], decay=0.0, norm=bound)
        updates, state = opt.update(g, state, params)
        u = ref.kron_precondition("EQ", Q, averaged)
        expected = -u / max(1.0, np.sqrt(np.mean(u**2)) / 1.1)
        np.testing.assert_allclose(updates["w"], expected, atol=2e-3 * np.abs(expected).max())


# ------------------------------------------------------------------------------------------------ when P is fitted


def fits(opt, grads, steps, **options):
    """The steps, counted from 0, that change P."""
    state, update, found = opt.init(PARAMS), jax.jit(opt.update), []
    for i in range(steps):
        old = state
        _, state = update(grads(i), state, PARAMS, **options)
        before, after = (jax.tree.leaves(inside(s).preconditioner) for s in (old, state))
        changed = [bool(jnp.any(a != b)) for a, b in zip(before, after, strict=True)]
        if any(changed):
            found.append(i)
            assert inside(state).waited == 0
        else:
            assert inside(state).waited == inside(old).waited + 1
    return found


@pytest.mark.parametrize(
    ("probability", "expected"),
    [
        (1.0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (0.5, [0, 2, 4, 6, 8]),
        (0.3, [0, 4, 8]),
        (0.1, [0]),
        (0.0, [0]),
        (optim.precond_update_prob_schedule(1.0, 0.3, 100.0, 4), [0, 1, 2, 3, 7]),
    ],
)
def test_kron_counts(probability, expected):
    assert fits(build("kron", preconditioner_update_probability=probability), vectors, 10) == expected


@pytest.mark.parametrize("name", OLDER)
def test_the_others_are_fitted_by_chance_but_for_the_first_two_steps(name):
    assert fits(build(name, preconditioner_update_probability=0.0), vectors, 6) == [0, 1]
    found = fits(build(name, preconditioner_update_probability=0.5), vectors, 40)
    assert found[:2] == [0, 1] and 10 < len(found) < 32
    if name == "xmat":
        other = build(name, preconditioner_update_probability=0.5, seed=jax.random.PRNGKey(7))
        assert fits(other, vectors, 40) != found


@named
@pytest.mark.parametrize("due", [True, np.bool_(False)])
def test_with_products_the_caller_decides(name, due):
    opt = build(name, preconditioner_update_probability=0.0)
    found = fits(opt, vectors, 3, Hvp=vectors(5), vector=vectors(6), update_preconditioner=due)
    assert found == ([0, 1, 2] if due else [])


# --------------------------------------------------------------------------------------------------------- arguments


@named
def test_initial_scale(name):
    """Of Q, so that P starts as its square; None: a multiple of I that fits the first observation."""
    key = "preconditioner_init_scale" if name == "kron" else "precond_init_scale"
    rate = dict(preconditioner_lr=0.0) if name == "kron" else dict(precond_lr=0.0)
    g = vectors(1, 1e-3)
    for scale, mode in (
        (3.0, {}),
        (None, dict(Hvp=jax.tree.map(lambda a: 4 * a, g), vector=g, update_preconditioner=True)),
    ):
        opt = build(name, b1=0.0, **{key: scale}, **rate)
        updates, _ = opt.update(g, opt.init(PARAMS), PARAMS, **mode)
        np.testing.assert_allclose(flat(updates), -flat(g) * (9.0 if scale else 0.25), rtol=1e-5)
    opt = build(name, b1=0.0, **{key: None}, **rate)
    updates, _ = opt.update(g, opt.init(PARAMS), PARAMS)
    if name in ("affine", "kron"):
        for leaf, u in zip(jax.tree.leaves(g), jax.tree.leaves(updates), strict=True):
            np.testing.assert_allclose(u, -leaf / np.mean(np.asarray(leaf) ** 4) ** 0.25, rtol=2e-3)
    else:
        np.testing.assert_allclose(flat(updates), -flat(g) / np.mean(flat(g) ** 4) ** 0.25, rtol=1e-5)


def test_kron_clips_whitened_leaves_only():
    g = {"w": 100.0 * vectors(1)["w"], "b": 1e-3 * vectors(1)["b"]}
    opt = build("kron", b1=0.0, preconditioner_lr=0.0)
    rms = lambda a: float(jnp.sqrt(jnp.mean(a**2)))
    updates, _ = opt.update(g, opt.init(g), g)
    np.testing.assert_allclose(rms(updates["w"]), 1.1, rtol=1e-5)
    np.testing.assert_allclose(updates["b"], -g["b"], rtol=1e-5)
    updates, _ = opt.update(g, opt.init(g), g, Hvp=g, vector=g, update_preconditioner=False)
    np.testing.assert_allclose(flat(updates), -flat(g), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"2x2x3", "1d", "20", "5d", "4x4"}),
        (dict(memory_save_mode="one_diag"), {"2x2x3d", "1d", "20d", "5d", "4x4d"}),
        (dict(memory_save_mode="all_diag"), {"2dx2dx3d", "1d", "20d", "5d", "4dx4d"}),
        (dict(max_size_triangular=4), {"2x2x3", "1d", "20d", "5d", "4x4"}),
        (dict(min_ndim_triangular=3), {"2x2x3", "1d", "20d", "5d", "4dx4d"}),
        (dict(min_ndim_triangular=0), {"2x2x3", "1d", "20", "5", "4x4"}),
    ],
)
def test_kron_layout(options, expected):
    """One factor for every axis that is not of length 1: triangular, or diagonal (d) where the original's are."""
    shapes = [(2, 2, 3), (1, 1), (20, 1), (5,), (4, 4)]
    state = inside(build("kron", **options).init([jnp.zeros(shape) for shape in shapes])).preconditioner
    assert set(state) == expected
    for name, bucket in state.items():
        for part, q in zip(name.split("x"), bucket["Q"].values(), strict=True):
            n = int(part.rstrip("d"))
            assert q.shape == ((1, n) if part.endswith("d") else (1, 1, n, n))


def test_affine_layout():
    shapes = {"a": (2, 3, 4), "b": (9,), "w": (3, 400)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    names = lambda **options: set(inside(build("affine", **options).init(params)).preconditioner)
    assert names() == {"4x6", "9", "3x400d"}
    assert names(max_skew_triangular=200) == {"4x6", "9", "3x400"}
    assert names(max_size_triangular=5, max_skew_triangular=8) == {"4x6d", "9d", "3x400d"}


def test_kron_noise():
    """3e-4 of the mean size of each copy's gradients, which bounds the P of rows without any; none with products."""
    h = jnp.array([[[1.0, 2.0, 0.0], [100.0, 200.0, 0.0]]])  # (k, L, n)
    noise = KronOfAxes().noisy(KEY, h) - h
    np.testing.assert_allclose(np.abs(noise), [[[3.45e-4] * 3, [3.45e-2] * 3]], rtol=0.05)
    np.testing.assert_allclose(KronOfAxes(whitens=False).noisy(KEY, h), h, rtol=1e-6, atol=1e-8)


def test_scanned_layers():
    """A stack of layers gets what its layers get alone."""
    alone = {str(i): vectors(i)["w"] for i in range(3)}
    stack = lambda tree: {"w": jnp.stack([tree[str(i)] for i in range(3)]), "b": vectors(0)["b"]}
    options = dict(b1=0.5, precond_update_precision="float32", precond_grads_precision="float32")
    scanned = build(
        "kron", scanned_layers={"w": True, "b": False}, lax_map_scanned_layers=True, lax_map_batch_size=2, **options
    )
    single = build("kron", **options)
    state, other = scanned.init(stack(alone)), single.init(alone)
    assert set(inside(state).preconditioner) == {"3x4", "5d"}
    for i in range(3):
        draw = lambda seed, i=i: {str(j): vectors(10 * i + 3 * j + seed)["w"] for j in range(3)}
        g, h, v = draw(0), draw(50), draw(90)
        extra = lambda h, v: dict(Hvp=h, vector=v, update_preconditioner=True)
        updates, state = scanned.update(stack(g), state, **extra(stack(h), stack(v)))
        expected, other = single.update(g, other, **extra(h, v))
        np.testing.assert_allclose(updates["w"], stack(expected)["w"], atol=1e-5)
    updates, _ = scanned.update(stack(g), state)  # and whitening
    assert np.all(np.isfinite(updates["w"]))


@named
def test_dtypes(name):
    """bfloat16 parameters and gradients: so are updates, and the average; but P is float32, unless it is told."""
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    opt = build(name, 0.1, weight_decay=0.1)
    state, update = opt.init(low), jax.jit(opt.update)
    for i in range(4):
        updates, state = update(jax.tree.map(lambda a: a.astype(jnp.bfloat16), vectors(i)), state, low)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert {m.dtype for m in jax.tree.leaves(inside(state).mu)} == {jnp.dtype(jnp.bfloat16)}
    floats = [a for a in jax.tree.leaves(inside(state).preconditioner) if a.dtype != bool]
    assert {a.dtype for a in floats} == {jnp.dtype(jnp.float32)}
    assert np.all(np.isfinite(flat(updates)))
    full = build(name, mu_dtype=jnp.float32).init(low)
    assert {m.dtype for m in jax.tree.leaves(inside(full).mu)} == {jnp.dtype(jnp.float32)}
    assert inside(build(name, b1=0.0).init(low)).mu == {}


def test_precond_dtype():
    opt = build("kron", 0.1, precond_dtype="bfloat16", preconditioner_lr=0.5)
    state, update = opt.init(PARAMS), jax.jit(opt.update)
    for i in range(4):
        updates, state = update(vectors(i), state, PARAMS)
    floats = [a for a in jax.tree.leaves(inside(state).preconditioner) if a.dtype != bool]
    assert {a.dtype for a in floats} == {jnp.dtype(jnp.bfloat16)}
    assert np.all(np.isfinite(flat(updates))) and {u.dtype for u in jax.tree.leaves(updates)} == {
        jnp.dtype(jnp.float32)
    }


def test_seeds():
    """A key, new or old, or an int: of U and V, and of noise. The default is the original's."""
    V = lambda **options: flat(inside(build("low_rank_approximation", **options).init(PARAMS)).preconditioner["V"])
    np.testing.assert_array_equal(V(), V(seed=jax.random.PRNGKey(36)))
    np.testing.assert_array_equal(V(seed=3), V(seed=jax.random.PRNGKey(3)))
    assert np.any(V(seed=jax.random.key(3)) != V())
    seed = jax.random.PRNGKey(5)
    opt = build("xmat", seed=seed)
    jax.jit(lambda s: s, donate_argnums=0)(opt.init(PARAMS))
    opt.init(PARAMS)  # the seed was not donated with the first state


def test_precisions():
    """The fit's precision and the gradients' are two; None is what JAX is set to."""
    g = {"w": vectors(1)["w"]}
    opt = build("kron", precond_update_precision="bfloat16", precond_grads_precision="float32")
    program = str(jax.make_jaxpr(opt.update)(g, opt.init(g)))
    assert "BF16_BF16_F32" in program or "Precision.DEFAULT" in program
    opt = build("affine", precision=None)
    for ambient, expected in (("float32", "HIGHEST"), ("tensorfloat32", "HIGH")):
        with jax.default_matmul_precision(ambient):
            assert expected in str(jax.make_jaxpr(opt.update)(g, opt.init(g)))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "xmat",
            dict(preconditioner_update_probability=1.5),
            ValueError,
            r"xmat\(preconditioner_update_probability\) .*1.5",
        ),
        (
            "kron",
            dict(preconditioner_update_probability=-0.1),
            ValueError,
            r"kron\(preconditioner_update_probability\)",
        ),
        ("affine", dict(learning_rate=-1.0), ValueError, r"affine\(learning_rate\) should be at least 0.0, not -1.0"),
        ("xmat", dict(precond_lr=-0.1), ValueError, r"xmat\(precond_lr\)"),
        ("kron", dict(preconditioner_lr=1.5), ValueError, r"kron\(preconditioner_lr\)"),
        (
            "kron",
            dict(preconditioner_init_scale=0.0),
            ValueError,
            r"kron\(preconditioner_init_scale\) should be above 0",
        ),
        ("xmat", dict(precond_init_scale="auto"), TypeError, r"xmat\(precond_init_scale\) should be a number"),
        ("xmat", dict(b1=1.0), ValueError, r"xmat\(b1\)"),
        ("xmat", dict(weight_decay=-0.1), ValueError, r"xmat\(weight_decay\)"),
        (
            "affine",
            dict(update_global_norm_clip=0.0),
            ValueError,
            r"affine\(update_global_norm_clip\) should be above 0",
        ),
        (
            "affine",
            dict(step_normalizer_order="3rd"),
            ValueError,
            r"affine\(step_normalizer_order\) should be one of '2nd', '1st'",
        ),
        ("xmat", dict(precision="tensorfloat"), ValueError, r"xmat\(precision\) .* Did you mean 'tensorfloat32'"),
        ("kron", dict(precond_grads_precision="f32"), ValueError, r"kron\(precond_grads_precision\)"),
        ("kron", dict(memory_save_mode="one-diag"), ValueError, r"kron\(memory_save_mode\) .* Did you mean 'one_diag'"),
        ("kron", dict(min_ndim_triangular=1.5), TypeError, r"kron\(min_ndim_triangular\) should be an integer"),
        ("kron", dict(max_size_triangular=-1), ValueError, r"kron\(max_size_triangular\)"),
        ("kron", dict(precond_dtype="int32"), TypeError, r"kron\(precond_dtype\) should be a floating dtype"),
        ("kron", dict(lax_map_batch_size="8"), TypeError, r"kron\(lax_map_batch_size\)"),
        ("low_rank_approximation", dict(uvd_rank_of_approximation=-1), ValueError, r"\(uvd_rank_of_approximation\)"),
        ("precond_update_prob_schedule", dict(max_prob=2.0), ValueError, r"precond_update_prob_schedule\(max_prob\)"),
    ],
)
def test_bad_arguments(name, options, error, message):
    with pytest.raises(error, match=message):
        getattr(optim, name)(**options)


def test_bad_parameters():
    lra = functools.partial(build, "low_rank_approximation")
    message = r"low_rank_approximation\(uvd_rank_of_approximation=19\) exceeds the number of parameters, 18\. Use"
    with pytest.raises(ValueError, match=message):
        lra(uvd_rank_of_approximation=19).init(PARAMS)
    assert inside(lra(uvd_rank_of_approximation=18).init(PARAMS)).preconditioner["U"]["w"].shape == (18, 3, 4)
    assert inside(lra().init(jnp.zeros(3))).preconditioner["U"].shape == (3, 3)  # the default is lowered
    assert set(inside(lra(uvd_rank_of_approximation=0).init(PARAMS)).preconditioner) == {"d", "L", "seen"}
    for name in NAMES:
        with pytest.raises(TypeError, match="real parameters, and w is complex64"):
            build(name).init({"w": jnp.zeros(3, jnp.complex64)})
    with pytest.raises(ValueError, match=r"kron\(scanned_layers\) should be a tree .* with 3 leaves, not 1"):
        build("kron", scanned_layers={"w": True}).init(PARAMS)
    with pytest.raises(ValueError, match=r"kron\(scanned_layers\) is True for a scalar"):
        build("kron", scanned_layers={"b": False, "s": True, "w": False}).init(PARAMS)


@named
def test_products_come_with_a_vector_and_a_decision(name):
    opt = build(name)
    state, g = opt.init(PARAMS), vectors(1)
    for given, missing in [
        (dict(Hvp=g), "vector= and update_preconditioner="),
        (dict(Hvp=g, vector=g), "without update_preconditioner="),
        (dict(Hvp=g, update_preconditioner=True), "without vector="),
        (dict(vector=g, update_preconditioner=True), "without Hvp="),
    ]:
        with pytest.raises(ValueError, match=rf"{name}\.update\(\) was given .*{missing}.* hessian_helper"):
            opt.update(g, state, PARAMS, **given)
    plain, _ = opt.update(g, state, PARAMS)
    none = dict(Hvp=None, vector=None, update_preconditioner=None)
    same(opt.update(g, state, PARAMS, **none, value=1.0, batch={"x": "anything"}, curvature=None)[0], plain)


# -------------------------------------------------------------------------------------------------------- the state


@named
def test_one_trace_and_one_structure(name):
    """In both modes; donated; and outside jit it is compiled once."""
    traces = 0

    def rate(step):
        nonlocal traces
        traces += 1
        return 0.1

    key = "preconditioner_lr" if name == "kron" else "precond_lr"
    opt = build(name, preconditioner_update_probability=0.5, **{key: rate})
    state = opt.init(PARAMS)
    describe = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), tree)
    first = describe(state)
    assert first == describe(jax.eval_shape(opt.init, PARAMS))
    update = jax.jit(lambda g, s, **extra: opt.update(g, s, PARAMS, **extra), donate_argnums=1)
    for i in range(4):
        _, state = update(vectors(i), state)
        assert describe(state) == first
    assert traces == 1
    for i in range(4):
        _, state = update(vectors(i), state, Hvp=vectors(i), vector=vectors(i), update_preconditioner=jnp.bool_(i % 2))
        assert describe(state) == first
    assert traces == 2
    for i in range(4):
        _, state = opt.update(vectors(i), state, PARAMS)
    assert traces <= 3 and inside(state).count == 12


@named
def test_state_survives_a_checkpoint(name, tmp_path):
    opt = build(name, 0.1)
    state, update = opt.init(PARAMS), jax.jit(opt.update)
    for i in range(3):
        _, state = update(vectors(i), state, PARAMS)
    leaves, treedef = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "state", jax.eval_shape(opt.init, PARAMS))
    same(jax.tree.leaves(restored), leaves)
    assert jax.tree.structure(restored) == treedef
    for i in range(3, 6):
        ours, state = update(vectors(i), state, PARAMS)
        theirs, restored = update(vectors(i), restored, PARAMS)
        same(ours, theirs)


@named
def test_zero_gradients_at_first(name):
    """Nothing moves, nothing breaks; the initial scale waits for the first observation."""
    key = "preconditioner_init_scale" if name == "kron" else "precond_init_scale"
    opt = build(name, b1=0.0, **{key: None})
    state, update = opt.init(PARAMS), jax.jit(opt.update)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    for _ in range(2):
        updates, state = update(zeros, state, PARAMS)
        np.testing.assert_array_equal(flat(updates), 0)
    fresh = opt.init(PARAMS)
    same(inside(state).preconditioner, inside(fresh).preconditioner)
    g = vectors(3, 1e-4)
    updates, state = update(g, state, PARAMS)
    assert 0.3 < np.sqrt(np.mean(flat(updates) ** 2)) < 3.0
    assert inside(state).failures == 0


@named
def test_leaf_whose_gradient_is_always_zero(name):
    opt = build(name, b1=0.0)
    state, update = opt.init(PARAMS), jax.jit(opt.update)
    for i in range(30):
        updates, state = update(vectors(i) | {"s": jnp.float32(0)}, state, PARAMS)
    assert np.all(np.isfinite(flat(updates))) and inside(state).failures == 0
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(inside(state).preconditioner))


@named
@pytest.mark.parametrize(("mode", "bad"), [("whitening", np.inf), ("hessian", np.nan)])
def test_what_is_not_finite_leaves_P(name, mode, bad):
    opt = build(name, b1=0.0)
    state, update = opt.init(PARAMS), jax.jit(opt.update)
    for i in range(3):
        _, state = update(vectors(i), state, PARAMS)
    broken = jax.tree.map(lambda a: a.at[(0,) * a.ndim].set(bad), vectors(5))
    g = broken if mode == "whitening" else vectors(5)
    extra = {} if mode == "whitening" else dict(Hvp=broken, vector=vectors(6), update_preconditioner=jnp.bool_(True))
    updates, after = update(g, state, PARAMS, **extra)
    same(inside(after).preconditioner, inside(state).preconditioner)
    assert inside(after).failures > 0
    assert np.all(np.isfinite(flat(updates))) == (mode == "hessian")
    updates, _ = update(vectors(6), after, PARAMS)
    assert np.all(np.isfinite(flat(updates)))


def test_beside_other_transformations():
    """In a chain, over two groups of parameters, inside MultiSteps, and with a learning rate that is injected."""
    name = "kron"
    chain = optax.chain(optax.clip_by_global_norm(1.0), build(name, 0.1), optax.scale(0.5))
    updates, _ = chain.update(vectors(1), chain.init(PARAMS), PARAMS, value=1.0)
    assert np.all(np.isfinite(flat(updates)))
    groups = optax.partition(
        {"ours": build(name, 0.1), "theirs": optax.adam(0.1)}, {"b": "theirs", "s": "theirs", "w": "ours"}
    )
    updates, _ = groups.update(vectors(1), groups.init(PARAMS), PARAMS)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS) and np.all(np.isfinite(flat(updates)))
    several = optax.MultiSteps(build(name, 0.1), 2)
    state = several.init(PARAMS)
    for i in range(2):
        updates, state = several.update(vectors(i), state, PARAMS)
    assert np.any(flat(updates) != 0)
    tx = optax.inject_hyperparams(lambda learning_rate: build(name, learning_rate))(learning_rate=0.1)
    updates, _ = tx.update(vectors(1), tx.init(PARAMS), PARAMS)
    assert np.all(np.isfinite(flat(updates)))


def test_nothing_is_printed_and_nothing_is_switched(capsys):
    before = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision
    opt = build("kron")
    opt.update(vectors(1), opt.init(PARAMS), PARAMS)
    assert capsys.readouterr() == ("", "")
    assert (jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision) == before


INJECTED_PARAMS = {"a": jnp.ones((3, 4)), "b": jnp.ones(4), "none": jnp.zeros((0, 4))}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (optim.kron, dict(max_size_triangular=3)),
        (optim.xmat, dict(precond_init_scale=2.0)),
        (optim.affine, dict(max_skew_triangular=1)),
        (optim.low_rank_approximation, dict(uvd_rank_of_approximation=3)),
    ],
)
def test_hyperparameters_are_injected(make, options):
    """Options that shapes depend on are fixed by `init`; all others may change, and are traced."""
    options = dict(learning_rate=1e-2, preconditioner_update_probability=1.0, weight_decay=0.1, **options)
    found = []
    for tx in (optax.inject_hyperparams(make)(**options), make(**options)):
        updates, _ = jax.jit(tx.update)(INJECTED_PARAMS, tx.init(INJECTED_PARAMS), INJECTED_PARAMS)
        assert updates["none"].shape == (0, 4)
        found.append(updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *found)


def test_a_shape_that_is_traced_is_named():
    tx = optax.inject_hyperparams(optim.affine)(learning_rate=1e-2, max_size_triangular=3)
    with pytest.raises(TypeError, match=r"affine\(max_size_triangular\) decides on the shapes .* static_args="):
        jax.jit(tx.init)(INJECTED_PARAMS)
    jax.eval_shape(optax.inject_hyperparams(optim.affine)(learning_rate=1e-2).init, INJECTED_PARAMS)
