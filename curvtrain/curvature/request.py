"""What an optimizer asks of whoever maintains its curvature, kept in the optimizer's own state.

An optimizer that consumes a curvature puts a `Request` into its state. There a Trainer, or `optim.self_contained`,
finds it whatever the optimizer is wrapped in (`optax.chain`, `masked`, `multi_transform`, `inject_hyperparams`, ...),
and learns which parameters are to be measured, what kind of curvature is expected, and which damping it will ask for.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax

from curvtrain.curvature.base import CurvatureEstimator, Estimate
from curvtrain.objective import Objective, Path, by_path, nested

PyTree = Any
Estimator = TypeVar("Estimator", bound=CurvatureEstimator)


class _Paths(tuple):
    """Paths of parameters, where no paths at all compare equal to any.

    `optax.tree_utils.tree_map_params` initialises an optimizer with a placeholder, which has no leaves, and expects a
    state of the same structure as that of the parameters.
    """

    def __eq__(self, other):
        return not self or not other or tuple.__eq__(self, other)

    def __ne__(self, other):
        return not self == other

    def __hash__(self):
        return 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """The wishes of one optimizer.

    Attributes:
      damping: float32 (), what the next update will ask of `Curvature.solve`; None where there is no damping.
      optimizer: the optimizer's name, for messages.
      takes: the class of curvature that it takes.
      paths: of the parameters that it was initialised with.
      damping_every: steps after which the damping may change; None if it is constant, or changes in every step.
      constant: whether the damping is a plain number of the program: a resumed run takes that of the new program.
      update_every: steps between updates of the curvature, for a schedule that leaves it open; None for every step.
      wishes: (name, value) pairs of the estimator's options, for those that its user left open (None).
    """

    damping: jax.Array | None
    optimizer: str = dataclasses.field(metadata=dict(static=True))
    takes: type[Estimate] = dataclasses.field(metadata=dict(static=True))
    paths: tuple[Path, ...] = dataclasses.field(metadata=dict(static=True))
    damping_every: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    constant: bool = dataclasses.field(default=False, metadata=dict(static=True))
    update_every: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    wishes: tuple[tuple[str, Any], ...] = dataclasses.field(default=(), metadata=dict(static=True))

    @classmethod
    def of(
        cls,
        optimizer: str,
        takes: type[Estimate],
        params: PyTree,
        damping: jax.Array | None = None,
        damping_every: int | None = None,
        constant: bool = False,
        wishes: Mapping[str, Any] | None = None,
        update_every: int | None = None,
    ) -> "Request":
        """The request of an optimizer that is initialised with `params`, which may have holes (`optax.masked`)."""
        known = tuple((wishes or {}).items())
        return cls(damping, optimizer, takes, _Paths(by_path(params)), damping_every, constant, update_every, known)

    def with_damping(self, damping: jax.Array) -> "Request":
        """The same wishes with another damping."""
        return dataclasses.replace(self, damping=damping)


class Answered(abc.ABC):
    """A base class for optimizer states that hold their own curvature: nobody else needs to answer their requests."""

    @abc.abstractmethod
    def answer(self) -> tuple[PyTree, Any]:
        """(the state of the optimizer whose requests are answered, the curvature that answers them)."""


def requests(opt_state: PyTree) -> list[Request]:
    """The requests in an optimizer's state, abstract or not, that are not answered there."""
    is_end = lambda node: isinstance(node, Request | Answered)
    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_end) if isinstance(node, Request)]


def requested_damping(found: Sequence[Request]) -> jax.Array | None:
    """The damping that the next refresh should factorise for; None if nobody says, or several do."""
    dampings = [request.damping for request in found if request.damping is not None]
    return dampings[0] if len(dampings) == 1 else None


def requested_part(found: Sequence[Request], objective: Objective, params: PyTree) -> tuple[Objective, PyTree]:
    """(the objective, its parameters) that an estimator should see: only parameters that some request names."""
    if not found:
        return objective, params
    paths = {path for request in found for path in request.paths}
    return objective.select(params, paths)


def as_wished(estimator: Estimator, found: Sequence[Request]) -> Estimator:
    """The estimator with options that its user left open, None, as the optimizers wish.

    Raises ValueError if two of them wish different ones.
    """
    chosen: dict[str, tuple[Any, str]] = {}
    for request in found:
        for name, value in request.wishes:
            if getattr(estimator, name, value) is not None:  # said already, or no option of this estimator
                continue
            if chosen.setdefault(name, (value, request.optimizer))[0] != value:
                other, optimizer = chosen[name]
                raise ValueError(
                    f"One curvature serves optim.{optimizer} and optim.{request.optimizer}, which want "
                    f"{name}={other!r} and {name}={value!r} of it. Give {type(estimator).__name__}({name}=...) and "
                    f"both of them the same."
                )
    open_options: Any = estimator  # only dataclasses leave options open
    return dataclasses.replace(open_options, **{n: v for n, (v, _) in chosen.items()}) if chosen else estimator


def part_of(vector: PyTree, params: PyTree) -> PyTree:
    """The leaves of a vector that belong to these parameters, structured like them."""
    have, want = by_path(vector), by_path(params)
    if have.keys() == want.keys():
        return vector
    return nested({path: have[path] for path in want})


def check_requests(found: Sequence[Request], estimate: Estimate | None, argument: str) -> None:
    """Raises TypeError unless the curvature is what every request takes; `argument` is what errors call it."""
    for request in found:
        if not request.paths:
            raise ValueError(
                f"optim.{request.optimizer} is given no parameters: a mask, label or route leaves it none."
            )
        advice = f"optim.{request.optimizer} takes {_described(request.takes)}"
        if estimate is None:
            raise TypeError(f"{advice}, and {argument} is None. Give it an estimator.")
        if not isinstance(estimate, request.takes):
            raise TypeError(f"{advice}, and {argument} estimates {type(estimate).__name__}. See the README's table.")


def _described(kind: type[Estimate]) -> str:
    return {
        "Curvature": "a Curvature, such as that of curvature.KFAC()",
        "Eigenpairs": "Eigenpairs, those of curvature.Lanczos(k)",
        "GradientFactors": "GradientFactors, those of curvature.GradientKronecker()",
        "DiagonalFactors": "DiagonalFactors, those of curvature.KroneckerDiagonal()",
        "ReleasedFactors": "ReleasedFactors, those of curvature.KroneckerDiagonal(faithful=True)",
        "InverseFreeFactors": "InverseFreeFactors, those of curvature.InverseFree() or curvature.InverseFreeKFAC()",
        "FittedPreconditioner": "a FittedPreconditioner, such as that of curvature.PSGD()",
    }.get(kind.__name__, kind.__name__)
