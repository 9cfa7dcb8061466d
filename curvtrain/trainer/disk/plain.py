"""Positions of data iterators and memories of hooks as plain JSON, and back, NumPy's numbers and arrays included."""

import base64
from typing import Any

import jax
import numpy as np

_KIND = "__curvtrain__"  # the entry of a dict that stands for something JSON does not know


def to_plain(value: Any, name: str) -> Any:
    """Nested dicts, lists and tuples of numbers, strings, bytes, None, and NumPy's or JAX's arrays as plain JSON.

    Raises:
      TypeError: `name`, with its path in `value`, holds something else.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{name} is a random key, which does not go into a checkpoint's metadata: keep its seed.")
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        if array.dtype.kind in "biufcSUMm":
            data = base64.b64encode(array.tobytes()).decode()
            kind = "array" if isinstance(value, np.ndarray | jax.Array) else "scalar"
            return {_KIND: kind, "dtype": array.dtype.str, "shape": list(array.shape), "data": data}
    if isinstance(value, bytes):
        return {_KIND: "bytes", "data": base64.b64encode(value).decode()}
    if isinstance(value, tuple) and type(value) is tuple:
        return {_KIND: "tuple", "items": [to_plain(item, f"{name}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [to_plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        items = [(key, to_plain(item, f"{name}[{key!r}]")) for key, item in value.items()]
        if all(type(key) is str for key, _ in items) and _KIND not in value:
            return dict(items)
        return {_KIND: "dict", "items": [[to_plain(key, f"{name}: a key"), item] for key, item in items]}
    if isinstance(value, bool | int | float | str):  # a subclass, such as an IntEnum
        return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))
    raise TypeError(
        f"{name} is {value!r} of type {type(value).__name__}, which does not go into a checkpoint's metadata: keep "
        f"numbers, strings, arrays, and lists, tuples and dicts of them."
    )


def from_plain(value: Any) -> Any:
    """The value that `to_plain` was given."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_KIND)
    if kind in ("array", "scalar"):
        array = np.frombuffer(base64.b64decode(value["data"]), value["dtype"]).reshape(value["shape"])
        return array[()] if kind == "scalar" else array.copy()
    if kind == "bytes":
        return base64.b64decode(value["data"])
    if kind == "tuple":
        return tuple(map(from_plain, value["items"]))
    if kind == "dict":
        return {from_plain(key): from_plain(item) for key, item in value["items"]}
    return {key: from_plain(item) for key, item in value.items()}
