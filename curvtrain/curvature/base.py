"""The two halves of curvature: an estimator, which is configuration, and what it maintains, which is arrays.

Three costs are kept apart: absorbing a batch (`update`, cheap), factorising (`refresh`, dear) and applying
(`Curvature.solve`, every step). What an estimator maintains is one of two things:

* a `Curvature` C, a symmetric matrix: `solve(v, damping)` is (C + damping I)^-1 v, right for any damping;
* a fitted preconditioner P (of `curvature.PSGD`, `InverseFree` or `InverseFreeKFAC`), used as it is: `apply(v)`
  is P v. It has no damping.
"""

import abc
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from curvtrain.objective import Measure, Objective, Path, by_path

PyTree = Any


class Estimate(abc.ABC):  # noqa: B024 - all of its methods have defaults
    """The result of an estimator: a pytree of arrays that acts on vectors like the parameters."""

    def like(self) -> PyTree:
        """Shapes and dtypes of the vectors that it acts on: `jax.ShapeDtypeStruct`s, structured like the parameters.

        None, the default: it takes vectors as they come, and acts on all parameters or none.
        """
        return None

    def groups(self) -> tuple[tuple[Path, ...], ...]:
        """Paths of the parameters in groups that do not mix: what it does to one group depends on that group alone.

        It can be restricted to any union of groups by putting zeros elsewhere. The default is one group.
        """
        return (tuple(by_path(self.like())),)

    def telemetry(self) -> dict[str, jax.Array]:
        """Scalars worth logging, by name. Cheap: it is computed with every logged step."""
        return {}


class Curvature(Estimate):
    """An estimate C of the curvature at the parameters: it acts as a symmetric matrix.

    C may be indefinite. Then `solve` is the inverse of the matrix as it is, (value + damping)^-1 along an eigenvector,
    whatever the sign; `power` is its real power, and NaN where there is none: where value + damping is negative and
    the exponent no integer. Neither clips eigenvalues.
    """

    @abc.abstractmethod
    def matvec(self, vector: PyTree) -> PyTree:
        """C v, for a vector shaped like the parameters."""

    @abc.abstractmethod
    def solve(self, vector: PyTree, damping: jax.Array | float) -> PyTree:
        """(C + damping I)^-1 v, right for any damping."""

    def power(self, vector: PyTree, damping: jax.Array | float, exponent: jax.Array | float) -> PyTree:
        """(C + damping I)^exponent v.

        Raises TypeError where this curvature has no eigenbasis, unless the exponent is -1.
        """
        if is_inverse(exponent):
            return self.solve(vector, damping)
        raise TypeError(
            f"{type(self).__name__} has no power {exponent} of (C + damping I): only -1, which is `solve`. Curvatures "
            f"with an eigenbasis have them all: those of Lanczos, DiagonalFisher, KroneckerDiagonal, UnitWise, "
            f"FullBlock, GradientKronecker and KFAC(inverse='eigh' or 'ekfac')."
        )

    def diagonal(self) -> PyTree:
        """The diagonal of C, like the parameters; float64 where one of them is, otherwise float32."""
        raise TypeError(
            f"{type(self).__name__} does not know its diagonal. Curvatures of Lanczos, DiagonalFisher, "
            f"KroneckerDiagonal, UnitWise, FullBlock, GradientKronecker and KFAC do."
        )

    def logdet(self, damping: jax.Array | float) -> jax.Array:
        """log |det(C + damping I)|, a scalar."""
        raise TypeError(
            f"{type(self).__name__} does not know its determinant. Curvatures of Lanczos, DiagonalFisher, "
            f"KroneckerDiagonal, UnitWise, FullBlock, GradientKronecker and KFAC do."
        )

    def as_matrix(self) -> jax.Array:
        """C as a dense (n, n) matrix in `ravel_pytree(params)` order. Tests and small problems only."""
        if self.like() is None:
            raise TypeError(f"{type(self).__name__} does not say which vectors it acts on: give it a method like().")
        flat, unravel = ravel_pytree(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.like()))
        column = lambda e: ravel_pytree(self.matvec(unravel(e)))[0]
        return jax.lax.map(column, jnp.eye(flat.size, dtype=flat.dtype)).T


def is_inverse(exponent: jax.Array | float) -> bool:
    """Says whether a power is known to be the inverse: an exponent that is an array may be anything."""
    return not isinstance(exponent, jax.Array) and exponent == -1


E = TypeVar("E", bound=Estimate)


class CurvatureEstimator(abc.ABC, Generic[E]):
    """Configuration that knows how to estimate a curvature. Frozen, hashable, checked when it is built.

    All methods are pure functions of arrays: they can be jitted, and their curvature argument donated.
    """

    absorbs: ClassVar[bool] = True  # whether `update` does anything
    factorises: ClassVar[bool] = True  # whether `refresh` does

    @abc.abstractmethod
    def init(self, objective: Objective | None, params: PyTree) -> E:
        """The curvature before any data. Works under `jax.eval_shape`. `objective` is None where it comes later."""

    @abc.abstractmethod
    def update(
        self, curvature: E, objective: Objective, params: PyTree, batch: Any, key: jax.Array, *, grads: PyTree = None
    ) -> E:
        """Absorbs a batch: cheap enough for every step.

        Args:
          curvature: as it was.
          objective, params, batch, key: as for `objective.loss`.
          grads: the gradient of the mean loss for these arguments, where the caller has it. An estimator that needs
            just that takes it, and computes nothing again; with None it computes its own.
        """

    @abc.abstractmethod
    def refresh(
        self,
        curvature: E,
        objective: Objective,
        params: PyTree,
        batch: Any,
        key: jax.Array,
        damping: jax.Array | float | None = None,
    ) -> E:
        """Factorises or solves for eigenpairs: dear, now and then. `damping` hints at what `solve` will be asked."""

    @abc.abstractmethod
    def partition_specs(self, curvature: E, param_specs: PyTree, mesh: jax.sharding.Mesh) -> Any:
        """A `PartitionSpec` for every leaf of the curvature, given those of the parameters."""

    def measure(self, curvature: E, objective: Objective, params: PyTree, batch: Any, key: jax.Array) -> Measure | None:
        """Returns what `update` wants of the backward passes of the batch; None if it makes its own, or needs none.

        A training step takes it together with the gradient, `Objective.value_grad_and_measure`, in one forward pass
        over every piece of the batch, and hands the result to `absorb` in the place of a call of `update`.
        """
        return None

    def absorb(self, curvature: E, measured: tuple[PyTree, jax.Array], key: jax.Array) -> E:
        """The curvature with one more batch: what `measure` found, (sums, total weight). For those that measure."""
        raise TypeError(f"{type(self).__name__} measures nothing in the backward passes of a batch: call update().")

    def choices(self, objective: Objective, params: PyTree, mesh: jax.sharding.Mesh) -> dict[str, Any]:
        """Options that were left open and whose best value depends on the mesh, as plain JSON.

        A Trainer fixes them when a run begins, `dataclasses.replace(estimator, **choices)`. From then on they belong to
        the run: its checkpoints open on other meshes with the same choices.
        """
        return {}

    def overview(self, objective: Objective, params: PyTree) -> str:
        """A table of what is estimated of which parameter, printed when training starts; empty if there is none."""
        return ""
