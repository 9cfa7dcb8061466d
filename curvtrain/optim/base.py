"""What optimizers that consume a curvature share: how they get it, and how vectors pass between them and it."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain.curvature.base import Estimate
from curvtrain.objective import Objective, by_path, path_name

PyTree = Any
C = TypeVar("C", bound=Estimate)
Convert = Callable[[PyTree], PyTree]


def require_curvature(optimizer: str, curvature: Any, kind: type[C], estimator: str) -> C:
    """The curvature among an update's extra arguments. Raises TypeError if it is missing or of another kind."""
    advice = (
        f"Pass curvature={kind.__name__} to update(), give the Trainer curvature={estimator}, or wrap the optimizer in "
        f"optim.self_contained({optimizer}, {estimator}, schedule, objective)."
    )
    if curvature is None:
        raise TypeError(
            f"{optimizer}.update() needs a curvature among its extra arguments, and there is none. {advice}"
        )
    if not isinstance(curvature, kind):
        raise TypeError(
            f"{optimizer}.update(curvature=) should be {kind.__name__}, not {type(curvature).__name__}. {advice}"
        )
    return curvature


def require_transformation(argument: str, tx: Any) -> None:
    """Raises TypeError unless `tx` has `init` and `update`, as optax's transformations and `optax.MultiSteps` have."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"{argument} should be an optax transformation, not {type(tx).__name__}.")


def require_params(optimizer: str, params: Any) -> None:
    """Raises ValueError if `update` was called without the parameters."""
    if params is None:
        raise ValueError(f"{optimizer} needs the parameters: call update(grads, state, params).")


def transformation(init: Callable[..., Any], update: Callable[..., Any]) -> optax.GradientTransformationExtraArgs:
    """An optax transformation; optax's own types know no dataclasses in states, such as a `Request`."""
    return optax.GradientTransformationExtraArgs(init, update)


def chained(
    optimizer: str,
    link: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    mask: Any,
    *,
    coupled: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The link of an optimizer with weight decay and a learning rate, whose options are checked.

    The decay is decoupled, or, `coupled`, a part of the gradients that the link is given.
    """
    if not callable(learning_rate):
        _checks.number_in(f"{optimizer}(learning_rate)", learning_rate, 0.0)
    _checks.number_in(f"{optimizer}(weight_decay)", weight_decay, 0.0)
    links = [link]
    if _checks.is_off(weight_decay) and mask is not None:
        raise ValueError(
            f"{optimizer}(mask) says which parameters decay, and weight_decay=0 lets none. Leave one of them out."
        )
    if not _checks.is_off(weight_decay):
        links.insert(0 if coupled else 1, optax.add_decayed_weights(weight_decay, mask))
    return optax.chain(*links, optax.scale_by_learning_rate(learning_rate))


def require_objective(why: str, objective: Any, batch: Any, instead: str = "") -> None:
    """Raises TypeError, with `why` it is needed and what to do `instead`, unless `update` was given both."""
    if not isinstance(objective, Objective) or batch is None:
        missing = "batch" if isinstance(objective, Objective) else "objective"
        raise TypeError(
            f"{why}, so update() needs {missing}=. A Trainer passes it; in a loop of your own call update(..., "
            f"objective=objective, batch=batch).{instead}"
        )


def vectors_for(optimizer: str, curvature: Estimate, updates: PyTree) -> tuple[Convert, Convert]:
    """How an optimizer's vectors become vectors of its curvature, and back.

    The two may come in different containers (`nnx.State` and dicts), and the optimizer may see a part of what the
    curvature was estimated for (`optax.masked`, `optax.multi_transform`): the rest of the vector is then zero.

    Args:
      optimizer: its name, for messages.
      curvature: what it was given.
      updates: a vector of the optimizer.

    Returns:
      (a function from trees like `updates` to vectors of the curvature, its inverse, which drops the rest).

    Raises:
      ValueError: parameters of other names or shapes than the curvature's; or a part of them that the curvature cannot
        be restricted to, as it mixes them with the rest.
    """
    like = curvature.like()
    if like is None:
        return (lambda vector: vector), (lambda vector: vector)
    ours, theirs = by_path(updates), by_path(like)
    treedef, theirs_treedef = jax.tree.structure(updates), jax.tree.structure(like)
    unknown = [path for path in ours if path not in theirs or theirs[path].shape != jnp.shape(ours[path])]
    if unknown:
        shown = [f"{path_name(path)} {jnp.shape(ours[path])}" for path in unknown[:3]]
        have = [f"{path_name(path)} {leaf.shape}" for path, leaf in theirs.items()][:3]
        raise ValueError(
            f"{optimizer}: {', '.join(shown)} of the gradients is not among the parameters of the curvature, "
            f"{', '.join(have)}, ...: this {type(curvature).__name__} is of another model."
        )
    if treedef == theirs_treedef:
        return (lambda vector: vector), (lambda vector: vector)
    if len(ours) < len(theirs):
        _check_separable(optimizer, curvature, set(ours))

    def to(vector: PyTree) -> PyTree:
        have = by_path(vector)
        zero = lambda path: jnp.zeros(theirs[path].shape, theirs[path].dtype)
        return theirs_treedef.unflatten([have[path] if path in have else zero(path) for path in theirs])

    def back(vector: PyTree) -> PyTree:
        have = by_path(vector)
        return treedef.unflatten([have[path] for path in ours])

    return to, back


def _check_separable(optimizer: str, curvature: Estimate, chosen: set) -> None:
    """Raises ValueError if a group of the curvature has parameters of both sorts."""
    for group in curvature.groups():
        inside = [path for path in group if path in chosen]
        if inside and len(inside) < len(group):
            outside = next(path for path in group if path not in chosen)
            raise ValueError(
                f"{optimizer} is given {path_name(inside[0])} but not {path_name(outside)}, which "
                f"{type(curvature).__name__} mixes with it. Estimate the curvature of the chosen parameters alone: a "
                f"Trainer and optim.self_contained do so, and Objective.select(params, paths) in a loop of your own."
            )
