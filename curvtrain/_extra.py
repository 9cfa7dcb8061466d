"""Extra arguments of `update` reach only the transformations that take them: optax's, and anybody's own."""

import inspect
import re
from collections.abc import Collection
from typing import Any

import optax

_UNEXPECTED = re.compile(r"got an unexpected keyword argument '(\w+)'")


def accepting(tx: Any) -> optax.GradientTransformationExtraArgs:
    """The same transformation with an `update` that is given all extra arguments and passes on those that `tx` takes.

    What `tx` takes is what its `update` names, or everything if that has `**kwargs`. A chain has, and passes them on to
    links that may refuse some (`optax.contrib.sam`): these are then left out for all of it. Parameters are passed on if
    there is room for them.

    Args:
      tx: anything with `init` and `update`: an optax transformation, `optax.MultiSteps`, or an object of one's own.

    Returns:
      A transformation whose `update` raises TypeError if a link refuses an argument that another one needs.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        update_of: Any = tx.update
        has_room, names = _signature(tx)
        passed = {name: value for name, value in extra.items() if names is None or name in names}
        if not has_room and (names is None or "params" in names):
            passed["params"] = params
        refused: list[str] = []
        while True:
            try:
                return update_of(updates, state, *((params,) if has_room else ()), **passed)
            except Exception as error:
                found = _UNEXPECTED.search(str(error)) if isinstance(error, TypeError) else None
                if found is not None and found[1] in passed:
                    refused.append(found[1])
                    del passed[found[1]]
                elif refused:
                    raise TypeError(
                        f"A part of the optimizer refuses the extra argument {refused[0]!r}, so none of it was given "
                        f"{', '.join(refused)}, and another part failed: {error} Wrap the part that refuses it as "
                        f"optax.GradientTransformation(part.init, part.update): then it is given no extra arguments."
                    ) from error
                else:
                    raise

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _signature(tx: Any) -> tuple[bool, Collection[str] | None]:
    """(whether `update` takes parameters by position, the names of its other arguments; None for any)."""
    try:
        parameters = list(inspect.signature(tx.update).parameters.values())
    except (TypeError, ValueError):  # written in C: optax's own convention decides
        return True, None if isinstance(tx, optax.GradientTransformationExtraArgs) else ()
    first = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:3]
    has_room = len(first) == 3 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return has_room, None if takes_any else [p.name for p in parameters if p not in first]
