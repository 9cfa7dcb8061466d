"""Argument checks that the drop-in optimizers of `psgd_dropin.py` share."""

import math
from typing import Any

import jax.numpy as jnp

from curvtrain import _checks
from curvtrain.curvature.psgd.base import PRECISIONS

_ORDERS = ("2nd", "1st")


def check_common(name, b1, rate, scale, probability, mu_dtype, prefix: str = "precond") -> None:
    _checks.number_in(f"{name}(b1)", b1, 0.0, 1.0, open_high=True)
    check_number(f"{name}({prefix}_lr)", rate, 1.0)
    if scale is not None:
        _checks.number_in(f"{name}({prefix}_init_scale)", scale, 0.0, open_low=True)
    check_number(f"{name}(preconditioner_update_probability)", probability, 1.0)
    check_dtype(f"{name}(mu_dtype)", mu_dtype)


def check_older(name, clip_norm, order, precision) -> None:
    if clip_norm is not None:
        _checks.number_in(f"{name}(update_global_norm_clip)", clip_norm, 0.0, open_low=True)
    _checks.one_of(f"{name}(step_normalizer_order)", order, _ORDERS)
    check_precision(f"{name}(precision)", precision)


def check_number(argument: str, value: Any, high: float = math.inf) -> None:
    """Raises unless the value is a number from 0 to `high`, or a function, which is not looked into."""
    if not callable(value):
        _checks.number_in(argument, value, 0.0, high)


def check_precision(argument: str, value: str | None) -> None:
    if value is not None:
        _checks.one_of(argument, value, PRECISIONS)


def check_dtype(argument: str, value: Any) -> None:
    if value is not None and not jnp.issubdtype(jnp.dtype(value), jnp.floating):
        raise TypeError(f"{argument} should be a floating dtype, not {value!r}.")


def check_products(name: str, Hvp: Any, vector: Any, update_preconditioner: Any) -> None:
    given = {"Hvp": Hvp, "vector": vector, "update_preconditioner": update_preconditioner}
    missing = [f"{key}=" for key, value in given.items() if value is None]
    if missing and (Hvp is not None or vector is not None):
        present = [f"{key}=" for key, value in given.items() if value is not None]
        raise ValueError(
            f"{name}.update() was given {' and '.join(present)} without {' and '.join(missing)}. To fit P to the "
            f"Hessian, pass all three, as hessian_helper(...) returns them; to whiten gradients, none."
        )
