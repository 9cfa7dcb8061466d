"""Argument checks whose messages name the argument as the caller wrote it, what came, and what to do."""

import difflib
import math
import numbers
from collections.abc import Iterable


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
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{argument} should be an integer, not {value!r} of type {type(value).__name__}.")
    if value < minimum:
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
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument} should be a number, not {value!r} of type {type(value).__name__}.")
    inside = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
    if not inside:
        start = f"{'above' if open_low else 'at least'} {low}"
        end = "" if high == math.inf else f" and {'below' if open_high else 'at most'} {high}"
        raise ValueError(f"{argument} should be {start}{end}, not {value}.")
