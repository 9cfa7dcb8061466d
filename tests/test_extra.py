"""Extra arguments reach those transformations that take them, whoever wrote them and whatever they are wrapped in."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from curvtrain import optim
from curvtrain._extra import accepting

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.float32(0.5)}
GRADS = {"w": jnp.array([0.5, 0.25]), "b": jnp.float32(-1.0)}
EXTRA = dict(curvature="C", value=jnp.float32(2.0), grad=GRADS, grad_fn=lambda params, i: GRADS)


def double(updates):
    return jax.tree.map(lambda u: 2 * u, updates)


class Recorded:
    """A transformation that is no class of optax's; it returns what it was given as its state."""

    def __init__(self, update):
        self.update = update

    def init(self, params):
        return None


UPDATES = {
    "no parameters": (lambda updates, state: (double(updates), {}), {}),
    "parameters": (lambda updates, state, params: (double(updates), dict(params=params)), dict(params=PARAMS)),
    "parameters by name": (
        lambda updates, state, *, params=None: (double(updates), dict(params=params)),
        dict(params=PARAMS),
    ),
    "one of them": (
        lambda updates, state, params=None, *, value: (double(updates), dict(value=value)),
        dict(value=2.0),
    ),
    "by position": (lambda updates, state, params, value=None: (double(updates), dict(value=value)), dict(value=2.0)),
    "all of them": (
        lambda updates, state, params=None, **extra: (double(updates), dict(names=sorted(extra))),
        dict(names=sorted(EXTRA)),
    ),
}


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize(
    "wrap", [Recorded, lambda update: optax.GradientTransformationExtraArgs(lambda p: None, update)]
)
def test_an_update_is_given_what_its_signature_names(name, wrap):
    update, expected = UPDATES[name]
    updates, got = accepting(wrap(update)).update(GRADS, None, PARAMS, **EXTRA)
    assert got.keys() == expected.keys()
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b) if not isinstance(a, str) else a == b, got, expected)
    np.testing.assert_array_equal(updates["w"], [1.0, 0.5])


def strict(updates, state, params=None, *, value=None):
    """As `optax.contrib.sam`, it says that it takes extra arguments and refuses most of them."""
    return jax.tree.map(lambda u: u * value, updates), state


STRICT = optax.GradientTransformationExtraArgs(lambda params: (), strict)


@pytest.mark.parametrize(
    "tx",
    [
        STRICT,
        optax.chain(optax.clip(10.0), STRICT),
        optax.masked(STRICT, {"w": True, "b": True}),
        optax.apply_if_finite(optax.chain(STRICT), 3),
        optim.route([("w", STRICT), ("b", STRICT)]),
        optax.MultiSteps(STRICT, 1),
    ],
    ids=["alone", "chain", "masked", "apply_if_finite", "route", "MultiSteps"],
)
def test_a_link_that_refuses_some_is_given_the_others(tx):
    tx = accepting(tx)
    step = jax.jit(
        lambda state: tx.update(GRADS, state, PARAMS, **{k: v for k, v in EXTRA.items() if k != "curvature"})
    )
    updates, _ = step(tx.init(PARAMS))
    np.testing.assert_array_equal(updates["w"], [1.0, 0.5])


def test_a_link_that_needs_what_another_refuses_says_what_to_do():
    kfac = optim.kfac(0.1, 0.9, 0.1)
    tx = accepting(optax.chain(STRICT, kfac))
    message = (
        r"refuses the extra argument 'curvature', .*kfac.update\(\) needs a curvature.*GradientTransformation\(part"
    )
    with pytest.raises(TypeError, match=message):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, **EXTRA)


def test_errors_of_the_transformation_are_its_own():
    inner: Any = lambda x: x

    def broken(updates, state, params=None, **extra):
        return dict(nothing=2) | inner(nothing=2)

    with pytest.raises(TypeError, match="nothing"):
        accepting(Recorded(broken)).update(GRADS, None, PARAMS, **EXTRA)


def test_sam_takes_its_two_kinds_of_step():
    """By hand: the transparent one moves up and back in two updates, the opaque one asks for the gradient itself."""
    loss = lambda p: jnp.sum(p["w"] ** 4) + p["b"] ** 2
    inner, up = optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    grads = jax.grad(loss)(PARAMS)
    g_norm = optax.tree.norm(grads)
    there = jax.tree.map(lambda p, g: p + 0.05 * g / g_norm, PARAMS, grads)
    right = jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, jax.grad(loss)(there))
    opaque = accepting(optax.contrib.sam(inner, up, opaque_mode=True))
    extra = EXTRA | dict(grad_fn=lambda p, i: jax.grad(loss)(p))
    updates, _ = opaque.update(grads, opaque.init(PARAMS), PARAMS, **extra)
    jax.tree.map(lambda p, u, r: np.testing.assert_allclose(p + u, r, rtol=1e-6), PARAMS, updates, right)
    params, clear = PARAMS, accepting(optax.contrib.sam(inner, up))
    state = clear.init(params)
    for _ in range(2):
        updates, state = clear.update(jax.grad(loss)(params), state, params, **EXTRA)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda p, r: np.testing.assert_allclose(p, r, rtol=1e-6), params, right)
