"""Loss, gradient and, in some steps, a Hessian-vector product: what the drop-ins of `psgd_dropin.py` fit P to."""

from collections.abc import Callable
from typing import Any, overload

import jax
import jax.numpy as jnp

from curvtrain import _checks

PyTree = Any


@overload
def hessian_helper(
    key: jax.Array,
    train_step: Any,
    loss_fn: Callable[..., Any],
    params: PyTree,
    loss_fn_extra_args: tuple = (),
    has_aux: bool = False,
    preconditioner_update_probability: float = 1.0,
) -> tuple[Any, PyTree, PyTree, PyTree, jax.Array]: ...


@overload
def hessian_helper(
    key: jax.Array,
    loss_fn: Callable[..., Any],
    params: PyTree,
    loss_fn_extra_args: tuple = (),
    has_aux: bool = False,
    preconditioner_update_probability: float = 1.0,
) -> tuple[Any, PyTree, PyTree, PyTree, jax.Array]: ...


def hessian_helper(key, *args, **options):
    """In the place of `jax.value_and_grad`: the product of the Hessian with a random vector too, in some of the steps.

    Called as `hessian_helper(key, train_step, loss_fn, params, ...)`, or, as the original's README has it, without
    `train_step`; then it is by chance alone that the first two steps have a product.

    Args:
      key: a random key.
      train_step: steps so far; the first two have a product whatever the probability.
      loss_fn: `loss_fn(params, *loss_fn_extra_args)`, a scalar, or, with `has_aux`, (a scalar, anything).
      params: at which gradient and Hessian are taken.
      loss_fn_extra_args: passed on.
      has_aux: whether `loss_fn` has a second output.
      preconditioner_update_probability: of a product.

    Returns:
      (what `loss_fn` returns, its gradient, H v, v, whether there is a product): without one H v and v are zero. The
      last three are what `update` takes as `Hvp=`, `vector=` and `update_preconditioner=`.
    """
    steps_come_first = "train_step" in options or (args and not callable(args[0]))
    return (_product_of_step if steps_come_first else _product)(key, *args, **options)


def _product_of_step(key, train_step, loss_fn, *args, **options):
    return _product(key, loss_fn, *args, **options, train_step=train_step)


def _product(
    key,
    loss_fn,
    params,
    loss_fn_extra_args=(),
    has_aux=False,
    preconditioner_update_probability=1.0,
    *,
    train_step=None,
):
    if not callable(loss_fn):
        raise TypeError(f"hessian_helper(loss_fn) should be a function, not {type(loss_fn).__name__}.")
    if not isinstance(preconditioner_update_probability, jax.Array):
        _checks.number_in(
            "hessian_helper(preconditioner_update_probability)", preconditioner_update_probability, 0.0, 1.0
        )
    for_v, for_chance = jax.random.split(key)
    due = jax.random.uniform(for_chance, dtype=jnp.float32) < preconditioner_update_probability
    if train_step is not None:
        due = due | (jnp.asarray(train_step) < 2)

    def gradient(params):
        out, grads = jax.value_and_grad(loss_fn, has_aux=has_aux)(params, *loss_fn_extra_args)
        return grads, out

    def with_product(params):
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(for_v, len(leaves))
        normal = [jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, leaves, strict=True)]
        v = treedef.unflatten(normal)
        grads, Hv, out = jax.jvp(gradient, (params,), (v,), has_aux=True)
        return out, grads, Hv, v

    def without(params):
        grads, out = gradient(params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        return out, grads, zeros, zeros

    if isinstance(due, jax.core.Tracer):
        out, grads, Hv, v = jax.lax.cond(due, with_product, without, params)
    else:  # outside jit, a conditional would be compiled anew every time
        out, grads, Hv, v = (with_product if due else without)(params)
    return out, grads, Hv, v, due
