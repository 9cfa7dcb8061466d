"""`hessian_helper` in the two forms in which psgd_jax documents it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvtrain.optim import hessian_helper

KEY = jax.random.PRNGKey(0)
PARAMS = {name: jnp.full(shape, 0.5) for name, shape in {"b": (5,), "s": (), "w": (3, 4)}.items()}

pytestmark = pytest.mark.usefixtures("quick_compile")


def flat(tree):
    return np.concatenate([np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(tree)])


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def quartic(params, scale):
    return scale * jnp.sum(params["w"] ** 4) / 12 + params["s"] ** 2 * jnp.sum(params["b"])


def test_helper_in_both_forms():
    """Loss, gradient, H v and v of one function; the two forms agree, in and out of jit, by position and by name."""
    forms = {
        "package": lambda key: hessian_helper(key, 5, quartic, PARAMS, (3.0,), False, 1.0),
        "package, names": lambda key: hessian_helper(
            key=key, train_step=jnp.int32(5), loss_fn=quartic, params=PARAMS, loss_fn_extra_args=(3.0,)
        ),
        "readme": lambda key: hessian_helper(key, quartic, PARAMS, (3.0,), False, 1.0),
        "readme, names": lambda key: hessian_helper(
            key, loss_fn=quartic, params=PARAMS, loss_fn_extra_args=(3.0,), preconditioner_update_probability=1.0
        ),
    }
    found = {name: form(KEY) for name, form in forms.items()} | {
        f"{name}, jit": jax.jit(forms[name])(KEY) for name in ("package", "readme")
    }
    loss, grads, hvp, v, due = found["package"]
    assert due.dtype == bool and due
    np.testing.assert_allclose(loss, quartic(PARAMS, 3.0), rtol=1e-6)
    same(jax.tree.map(jnp.shape, v), jax.tree.map(jnp.shape, PARAMS))
    expected = jax.jvp(jax.grad(quartic), (PARAMS, 3.0), (v, 0.0))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), (grads, hvp), expected)
    assert abs(np.mean(flat(v))) < 1.0 and 0.5 < np.std(flat(v)) < 1.6
    for other in found.values():
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), other, found["package"])
    assert np.any(flat(forms["readme"](jax.random.PRNGKey(1))[3]) != flat(v))


def test_helper_with_aux_and_without_a_product():
    aux = lambda params: (quartic(params, 1.0), {"out": params["b"]})
    helper = lambda key, step: hessian_helper(
        key, step, aux, PARAMS, has_aux=True, preconditioner_update_probability=0.0
    )
    for call in (helper, jax.jit(helper)):
        for step, expected in ((0, True), (1, True), (2, False), (50, False)):
            (_, out), grads, hvp, v, due = call(KEY, step)
            assert bool(due) == expected
            same(out, {"out": PARAMS["b"]})
            assert np.any(flat(grads) != 0) and np.any(flat(v) != 0) == np.any(flat(hvp) != 0) == expected
    readme = lambda key: hessian_helper(key, aux, PARAMS, has_aux=True, preconditioner_update_probability=0.3)[-1]
    share = np.mean(jax.jit(jax.vmap(readme))(jax.random.split(KEY, 400)))
    assert 0.22 < share < 0.38


def test_helper_makes_one_conditional():
    helper = lambda key: hessian_helper(key, 9, quartic, PARAMS, (1.0,), preconditioner_update_probability=0.5)
    assert str(jax.make_jaxpr(helper)(KEY)).count("cond[") == 1


def test_helper_with_bfloat16():
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    out = jax.jit(lambda key: hessian_helper(key, 9, quartic, low, (1.0,), preconditioner_update_probability=0.5))(KEY)
    assert {a.dtype for a in jax.tree.leaves(out[1:4])} == {jnp.dtype(jnp.bfloat16)}


def test_helper_says_what_is_wrong():
    with pytest.raises(TypeError, match=r"hessian_helper\(loss_fn\) should be a function, not dict"):
        hessian_helper(KEY, 3, PARAMS, quartic)
    with pytest.raises(ValueError, match=r"hessian_helper\(preconditioner_update_probability\)"):
        hessian_helper(KEY, quartic, PARAMS, (1.0,), preconditioner_update_probability=1.1)
