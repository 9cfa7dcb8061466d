"""The two halves of curvature: an estimator, which is configuration, and what it maintains, which is arrays.

Three costs are kept apart: absorbing a batch (`update`, cheap), factorising (`refresh`, dear) and applying
(`Curvature.solve`, every step).
"""

import abc
from typing import Any, ClassVar, Generic, TypeVar

import jax
import optax

from curvtrain.objective import Objective

PyTree = Any


class Curvature(abc.ABC):
    """An estimate C of the curvature at the parameters: a pytree of arrays that acts as a symmetric matrix."""

    @abc.abstractmethod
    def matvec(self, vector: PyTree) -> PyTree:
        """C v, for a vector shaped like the parameters."""

    @abc.abstractmethod
    def solve(self, vector: PyTree, damping: jax.Array | float) -> PyTree:
        """(C + damping I)^-1 v, right for any damping."""

    @abc.abstractmethod
    def as_matrix(self) -> jax.Array:
        """C as a dense (n, n) matrix in `ravel_pytree(params)` order. Tests and small problems only."""

    def power(self, vector: PyTree, damping: jax.Array | float, exponent: float) -> PyTree:
        """(C + damping I)^exponent v.

        Raises TypeError where this curvature has no eigenbasis, unless the exponent is -1.
        """
        if exponent == -1.0:
            return self.solve(vector, damping)
        raise TypeError(
            f"{type(self).__name__} has no power {exponent} of (C + damping I): only -1, which is `solve`. Curvatures "
            f"with an eigenbasis have them all: Diagonal, Eigenpairs, KFAC(inverse='eigh')."
        )

    def telemetry(self) -> dict[str, jax.Array]:
        """Scalars worth logging, by name. Cheap: it is computed with every logged step."""
        return {}


C = TypeVar("C", bound=Curvature)


class CurvatureEstimator(abc.ABC, Generic[C]):
    """Configuration that knows how to estimate a curvature. Frozen, hashable, checked when it is built.

    All methods are pure functions of arrays: they can be jitted, and their curvature argument donated.
    """

    absorbs: ClassVar[bool] = True  # whether `update` does anything
    factorises: ClassVar[bool] = True  # whether `refresh` does

    @abc.abstractmethod
    def init(self, objective: Objective | None, params: PyTree) -> C:
        """The curvature before any data. Works under `jax.eval_shape`. `objective` is None where it comes later."""

    @abc.abstractmethod
    def update(self, curvature: C, objective: Objective, params: PyTree, batch: Any, key: jax.Array) -> C:
        """Absorbs a batch: cheap enough for every step."""

    @abc.abstractmethod
    def refresh(
        self,
        curvature: C,
        objective: Objective,
        params: PyTree,
        batch: Any,
        key: jax.Array,
        damping: jax.Array | float | None = None,
    ) -> C:
        """Factorises or solves for eigenpairs: dear, now and then. `damping` hints at what `solve` will be asked."""

    @abc.abstractmethod
    def partition_specs(self, curvature: C, param_specs: PyTree, mesh: jax.sharding.Mesh) -> Any:
        """A `PartitionSpec` for every leaf of the curvature, given those of the parameters."""

    def choices(self, objective: Objective, params: PyTree, mesh: jax.sharding.Mesh) -> dict[str, Any]:
        """Options that were left open and whose best value depends on the mesh, as plain JSON.

        A Trainer fixes them when a run begins, `dataclasses.replace(estimator, **choices)`. From then on they belong to
        the run: its checkpoints open on other meshes with the same choices.
        """
        return {}

    def overview(self, objective: Objective, params: PyTree) -> str:
        """A table of what is estimated of which parameter, printed when training starts; empty if there is none."""
        return ""


def damping_hint(opt_state: PyTree) -> jax.Array | None:
    """The damping that an optimizer will ask of `Curvature.solve`: the scalar named `damping` in its state.

    A field comes before an entry of a dictionary: the options that `optax.inject_hyperparams` keeps are those of the
    step to come or of the one before, the field is what the optimizer itself says. None if there is none, or several.
    """
    named = [
        (path, value)
        for path, value in optax.tree.get_all_with_path(opt_state, "damping")
        if isinstance(value, jax.Array) and value.ndim == 0
    ]
    fields = [value for path, value in named if isinstance(path[-1], optax.tree_utils.NamedTupleKey)]
    scalars = fields or [value for _, value in named]
    return scalars[0] if len(scalars) == 1 else None
