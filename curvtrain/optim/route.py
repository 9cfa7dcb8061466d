"""Different optimizers for different parameters, chosen by the parameters' names."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

from curvtrain._extra import accepting
from curvtrain.objective import by_path, path_name
from curvtrain.optim.base import require_transformation

PyTree = Any
Routes = Sequence[tuple[str, optax.GradientTransformation | None]]


def route(routes: Routes) -> optax.GradientTransformationExtraArgs:
    """Each parameter is moved by the first transformation whose pattern is found in its name.

        optim.route([
            ("norm|bias", optax.adamw(1e-3)),
            ("embed", None),                      # stays as it is
            (".*", optim.kfac(0.1, 0.9, 1e-2)),   # measures, stores and factorises these parameters alone
        ])

    A name is a path like "encoder/0/kernel". At most one route may lead to an optimizer of a given curvature, unless
    the curvature can be split between the routes (`Estimate.groups`).

    Args:
      routes: (regular expression, transformation) pairs, searched in order; None leaves parameters unchanged.

    Returns:
      A transformation whose `update` passes all extra arguments on to every route.

    Raises:
      TypeError, ValueError: routes that are no such pairs, or patterns that are no regular expressions; in `init`, a
        parameter that no pattern matches, or a route that no parameter reaches.
    """
    patterns, transformations = [], {}
    if isinstance(routes, str) or not isinstance(routes, Sequence) or not routes:
        raise TypeError(f"optim.route(routes) should be a list of (pattern, transformation) pairs, not {routes!r}.")
    for index, pair in enumerate(routes):
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(f"optim.route(routes[{index}]) should be a (pattern, transformation) pair, not {pair!r}.")
        pattern, tx = pair
        try:
            patterns.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(f"optim.route: {pattern!r} is not a regular expression: {error}.") from error
        if tx is not None:
            require_transformation(f"optim.route({pattern!r})", tx)
        transformations[index] = accepting(optax.set_to_zero() if tx is None else tx)

    def labels(params: PyTree) -> PyTree:
        chosen = [_first(patterns, path_name(path)) for path in by_path(params)]
        return jax.tree.structure(params).unflatten(chosen)

    inner = optax.multi_transform(transformations, labels)

    def init(params):
        _check_reached(patterns, [path_name(path) for path in by_path(params)])
        return inner.init(params)

    return optax.GradientTransformationExtraArgs(init, inner.update)


def _first(patterns: Sequence[re.Pattern[str]], name: str) -> int:
    return next((index for index, pattern in enumerate(patterns) if pattern.search(name)), -1)


def _check_reached(patterns: Sequence[re.Pattern[str]], names: Sequence[str]) -> None:
    """Raises ValueError unless every parameter has a route and every route a parameter."""
    chosen = [_first(patterns, name) for name in names]
    missed = [name for name, index in zip(names, chosen, strict=True) if index < 0]
    if missed:
        shown = ", ".join(missed[:4]) + (f" and {len(missed) - 4} more" if len(missed) > 4 else "")
        raise ValueError(
            f"optim.route: no pattern matches {shown}. End the list with ('.*', transformation), or ('.*', None) to "
            f"leave the rest unchanged."
        )
    for index, pattern in enumerate(patterns):
        if index not in chosen:
            raise ValueError(
                f"optim.route: no parameter reaches {pattern.pattern!r} (route {index}): it matches none of their "
                f"names, such as {list(names[:3])}, or routes before it take all that it matches."
            )
