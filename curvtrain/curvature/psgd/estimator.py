"""The estimator that fits a preconditioner, from Hessian or Gauss-Newton products or from gradients."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from curvtrain import _checks
from curvtrain._keys import Purpose, fold
from curvtrain._text import table
from curvtrain.curvature import trees
from curvtrain.curvature.base import CurvatureEstimator, Estimate
from curvtrain.curvature.fisher import Diagonal
from curvtrain.curvature.products import as_matrix, matvec
from curvtrain.curvature.psgd.base import Preconditioner, Structure
from curvtrain.curvature.psgd.elementwise import Elementwise
from curvtrain.curvature.psgd.frequency import RULES, Annealed, is_due
from curvtrain.curvature.psgd.kron import Kron
from curvtrain.curvature.psgd.kronecker import Kronecker
from curvtrain.curvature.scanned import scan_axes
from curvtrain.objective import Objective, Path, by_path

PyTree = Any
Number = float | Callable[[jax.Array], jax.Array | float]

RATE = Annealed(0.5, 0.1, 0.001, 0)  # measured: better than 0.1 and 0.5, on gradients of an MLP and on Rosenbrock
FITS = ("hessian", "ggn", "gradient")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FittedPreconditioner(Estimate):
    """P ~ |H|^-1, or (E g g^T)^(-1/2): a matrix that multiplies gradients as it is, without a damping.

    Attributes:
      state: the arrays of the preconditioner's family.
      mean: the moving average of gradients that is whitened, like the parameters; empty if the gradient itself is.
      calls: int32 (), calls of `update` so far.
      waited: int32 (), calls since the last fit.
      fits: int32 (), fits so far.
      failures: int32 (), parts of fits that were not made, as they were not finite.
      preconditioner: the family.
      whitens: whether gradients are what it was fitted to.
      structure: the shapes of the parameters.
    """

    state: PyTree
    mean: PyTree
    calls: jax.Array
    waited: jax.Array
    fits: jax.Array
    failures: jax.Array
    preconditioner: Preconditioner = dataclasses.field(metadata=dict(static=True))
    whitens: bool = dataclasses.field(metadata=dict(static=True))
    structure: Structure = dataclasses.field(metadata=dict(static=True))

    def like(self) -> PyTree:
        return jax.eval_shape(self.structure.like)

    def groups(self) -> tuple[tuple[Path, ...], ...]:
        """Each parameter by itself, or all of them together where the family mixes them."""
        paths = tuple(by_path(self.like()))
        return (paths,) if self.preconditioner.mixes() else tuple((path,) for path in paths)

    def apply(self, vector: PyTree) -> PyTree:
        """P v, for a vector shaped like the parameters; float64 where one of them is, otherwise float32."""
        return self.preconditioner.apply(self.structure, self.state, trees.wide(vector))

    def invert(self, vector: PyTree) -> PyTree:
        """P^-1 v, for a vector shaped like the parameters; float64 where one of them is, otherwise float32."""
        return self.preconditioner.invert(self.structure, self.state, trees.wide(vector))

    def as_matrix(self) -> jax.Array:
        """P as a dense (n, n) matrix in `ravel_pytree(params)` order. Tests and small problems only."""
        return as_matrix(self.apply, self.structure.like())

    def telemetry(self) -> dict[str, jax.Array]:
        return {"fits": self.fits, "failures": self.failures}


@dataclasses.dataclass(frozen=True)
class PSGD(CurvatureEstimator[FittedPreconditioner]):
    """Fits a preconditioner by one small step in every `update`; `refresh` has nothing to do.

    Attributes:
      preconditioner: `Kron()`, `LowRank()`, `XMat()`, `Affine()`, `Dense()` or `Diagonal()`, which stands for
        `Elementwise()`, the class that takes options.
      fit: "hessian" or "ggn": to products with random probes, P ~ |H|^-1; "gradient": whitening, P ~ (E g g^T)^(-1/2),
        which gives updates of unit size that want a learning rate like Adam's.
      rate: mu in (0, 1], or a function of the number of fits so far. Half a step starts fast, but what the fit settles
        to in noise is proportional to it: so 0.5 at first, 0.1 from 1,600 fits on.
      probes: products per fit, for "hessian" and "ggn".
      momentum: for "gradient", the decay of a moving average of gradients, which is whitened in their place.
      update_probability: the share of calls of `update` that fit, or a function of the calls so far (`Annealed()`). The
        decision is made in the compiled step; a `CurvatureSchedule(update_every=...)` makes it on the host, and a step
        without a fit then pays nothing for it.
      rule: "deterministic" (as soon as 1 / probability calls have passed) or "bernoulli" (by chance).
      memory_limit: bytes that the preconditioner may take; None allows the memory of the devices.

    Raises:
      TypeError, ValueError: when built with a bad argument; in `init` for complex parameters, a family that does not
        fit the parameters, and a preconditioner that needs more memory than there is.
    """

    factorises = False

    preconditioner: Preconditioner | Diagonal = dataclasses.field(default_factory=Kron)
    fit: str = "gradient"
    rate: Number = RATE
    _: dataclasses.KW_ONLY
    probes: int = 1
    momentum: float = 0.0
    update_probability: Number = 1.0
    rule: str = "deterministic"
    memory_limit: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "preconditioner", self.family)
        _checks.one_of("PSGD(fit)", self.fit, FITS)
        if not callable(self.rate):
            _checks.number_in("PSGD(rate)", self.rate, 0.0, 1.0, open_low=True)
            if isinstance(self.family, Kronecker) and self.family.dtype == "bfloat16" and self.rate < 0.1:
                raise ValueError(
                    f"PSGD(rate={self.rate}) makes steps below the resolution of factors in bfloat16. Use a rate of at "
                    f"least 0.1, or dtype='float32'."
                )
        _checks.positive_int("PSGD(probes)", self.probes)
        if self.probes > 1 and self.fit == "gradient":
            raise ValueError("PSGD(probes) counts Hessian products, and fit='gradient' takes none. Leave it out.")
        _checks.number_in("PSGD(momentum)", self.momentum, 0.0, 1.0, open_high=True)
        if self.momentum and self.fit != "gradient":
            raise ValueError(
                f"PSGD(momentum) is that of gradients that are whitened, not of fit={self.fit!r}. The optimizer's own "
                f"is optim.psgd(b1=...)."
            )
        if not callable(self.update_probability):
            _checks.number_in("PSGD(update_probability)", self.update_probability, 0.0, 1.0)
        _checks.one_of("PSGD(rule)", self.rule, RULES)
        if self.rule != RULES[0] and self._always:
            raise ValueError(
                f"PSGD(rule={self.rule!r}) chooses among calls of update, and update_probability=1 takes them all. "
                f"Leave it out, or lower update_probability."
            )
        if self.memory_limit is not None:
            _checks.positive_int("PSGD(memory_limit)", self.memory_limit)

    @property
    def family(self) -> Preconditioner:
        """The preconditioner; `Diagonal()` names one."""
        if isinstance(self.preconditioner, Preconditioner):
            return self.preconditioner
        if isinstance(self.preconditioner, Diagonal) and not jax.tree.leaves(self.preconditioner.values):
            return Elementwise()
        raise TypeError(
            f"PSGD(preconditioner) should be Kron(), LowRank(), XMat(), Affine(), Dense() or Diagonal(), not "
            f"{self.preconditioner!r}."
        )

    def structure(self, objective: Objective | None, params: PyTree) -> Structure:
        """Shapes of the parameters, and which of their axes count the layers of an `nnx.scan`."""
        return Structure.of(params, list(scan_axes("PSGD", objective, params)))

    def init(self, objective, params) -> FittedPreconditioner:
        structure = self.structure(objective, params)
        self._check_memory(structure)
        return FittedPreconditioner(
            state=self.family.init(structure),
            mean=trees.zeros(params) if self.momentum else {},
            calls=jnp.int32(0),
            waited=jnp.int32(0),
            fits=jnp.int32(0),
            failures=jnp.int32(0),
            preconditioner=self.family,
            whitens=self.fit == "gradient",
            structure=structure,
        )

    def update(
        self, curvature: FittedPreconditioner, objective, params, batch, key, *, grads=None
    ) -> FittedPreconditioner:
        c, mean = curvature, curvature.mean
        if self.momentum:  # an average needs the gradient of every call
            mean = self._moved(c, self._gradient(objective, params, batch, key, grads))

        def fit(state):
            noise = fold(key, Purpose.FIT)
            if self.fit == "gradient":
                observed = mean if self.momentum else self._gradient(objective, params, batch, key, grads)
                v, h = None, jax.tree.map(lambda a: a[None].astype(c.structure.dtype), observed)
            else:
                v = trees.normal(fold(key, Purpose.PROBES), params, self.probes)
                h = jax.vmap(matvec(self.fit, objective, params, batch, key))(v)
            rate = jnp.asarray(self.rate(c.fits) if callable(self.rate) else self.rate, c.structure.dtype)
            return self.family.fit(c.structure, state, v, h, noise, rate)

        if self._always:
            due = True
            state, bad = fit(c.state)
        else:  # all that only a fit needs is computed inside of the branch
            probability = self.update_probability
            p = jnp.float32(probability(c.calls) if callable(probability) else probability)
            chance = fold(key, Purpose.CHANCE)
            due = is_due(self.rule, p, c.calls, c.waited, chance)
            state, bad = jax.lax.cond(due, fit, lambda state: (state, jnp.int32(0)), c.state)
        return dataclasses.replace(
            c,
            state=state,
            mean=mean,
            calls=c.calls + 1,
            waited=jnp.where(due, 0, c.waited + 1).astype(jnp.int32),
            fits=c.fits + jnp.asarray(due, jnp.int32),
            failures=c.failures + bad,
        )

    @property
    def _always(self) -> bool:
        """Whether every call fits, and the program needs no branch."""
        p = self.update_probability
        return not (callable(p) or isinstance(p, jax.Array)) and p == 1

    def _gradient(self, objective, params, batch, key, grads: PyTree) -> PyTree:
        return trees.wide(objective.value_and_grad(params, batch, key)[1] if grads is None else grads)

    def _moved(self, c: FittedPreconditioner, observed: PyTree) -> PyTree:
        """The moving average after one more gradient; as it was if that is not finite."""
        calls = c.calls.astype(c.structure.dtype)
        beta = jnp.minimum(calls / (calls + 1), self.momentum)
        fine = jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(observed)]).all()
        moved = lambda m, g: (beta * m + (1 - beta) * g).astype(m.dtype)
        return jax.tree.map(lambda m, g: jnp.where(fine, moved(m, g), m), c.mean, observed)

    def refresh(self, curvature, objective, params, batch, key, damping=None) -> FittedPreconditioner:
        """The curvature as it is."""
        return curvature

    def partition_specs(self, curvature: FittedPreconditioner, param_specs, mesh):
        specs = jax.tree.map(lambda _: PartitionSpec(), curvature)
        state = self.family.partition_specs(curvature.structure, curvature.state, param_specs, mesh)
        return dataclasses.replace(specs, state=state, mean=param_specs if self.momentum else {})

    def overview(self, objective, params) -> str:
        rows = self.family.blocks(self.structure(objective, params))
        lines = [("parameters", "preconditioner", "bytes"), *((names, what, f"{n:,}") for names, what, n in rows)]
        lines.append(("total", "", f"{sum(n for *_, n in rows):,}"))
        return table(lines, left=2)

    def _check_memory(self, structure: Structure) -> None:
        rows = self.family.blocks(structure)
        needed, there = sum(n for *_, n in rows), self.memory_limit or device_memory()
        if there is None or needed <= there:
            return
        names, what, most = max(rows, key=lambda row: row[-1])
        raise ValueError(
            f"PSGD({type(self.family).__name__}()) would take {needed:,} bytes, and there are {there:,}. Most "
            f"of it, {most:,} bytes, is {what} for {names}. Lower max_size, max_skew or block_size, as in "
            f"Kron(block_size=64), or take Diagonal(); or raise PSGD(memory_limit=...) if it is to be sharded."
        )


def device_memory() -> int | None:
    """Bytes of memory of this process's devices together; None where nobody says."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return jax.local_device_count() * stats["bytes_limit"]
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
