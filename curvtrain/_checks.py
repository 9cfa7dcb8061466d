"""Argument checks whose messages name the argument as the caller wrote it, what came, and what to do.

Numbers may be Python's, NumPy's or JAX's scalars. What is traced by JAX (`optax.inject_hyperparams` makes arrays of all
numeric options) has a type but no value yet: its type is checked alone.
"""

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def one_of(argument: str, value: object, options: Iterable[str]) -> None:
    """Raises ValueError, with a suggestion, unless `value` is one of `options`."""
    options = list(options)
    if value in options:
        return
    close = difflib.get_close_matches(str(value), options, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{argument} should be one of {', '.join(map(repr, options))}, not {value!r}.{hint}")


def positive_int(argument: str, value: object, *, minimum: int = 1) -> None:
    """Raises TypeError unless `value` is an integer, ValueError if it is below `minimum`."""
    if not _is_number(value, numbers.Integral, jnp.integer):
        raise TypeError(f"{argument} should be an integer, not {value!r} of type {type(value).__name__}.")
    known = _known(value)
    if known is not None and known < minimum:
        raise ValueError(f"{argument} should be at least {minimum}, not {value}.")


def number_in(
    argument: str,
    value: object,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raises TypeError unless `value` is a real number, ValueError unless low <= value <= high (< where it is open)."""
    if not _is_number(value, numbers.Real, jnp.integer, jnp.floating):
        raise TypeError(f"{argument} should be a number, not {value!r} of type {type(value).__name__}.")
    known = _known(value)
    if known is None:
        return
    inside = (low < known if open_low else low <= known) and (known < high if open_high else known <= high)
    if not inside:
        start = f"{'above' if open_low else 'at least'} {low}"
        end = "" if high == math.inf else f" and {'below' if open_high else 'at most'} {high}"
        raise ValueError(f"{argument} should be {start}{end}, not {value}.")


def is_off(value: object) -> bool:
    """Says whether an option is a plain number that is zero.

    An array of JAX is never off, whatever it holds: its value may change while the structure of a state may not.
    """
    return not isinstance(value, jax.Array) and bool(value == 0)


def _is_number(value: Any, kind: type, *dtypes: Any) -> bool:
    if isinstance(value, jax.Array | np.ndarray):
        return value.ndim == 0 and any(jnp.issubdtype(value.dtype, dtype) for dtype in dtypes)
    return isinstance(value, kind) and not isinstance(value, bool | np.bool_)


def _known(value: Any) -> Any:
    """The value of a number as Python's; None while it is traced."""
    try:
        return value.item() if isinstance(value, jax.Array | np.ndarray | np.generic) else value
    except jax.errors.ConcretizationTypeError:
        return None
