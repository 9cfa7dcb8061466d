"""The estimator of the gradient's covariance: two factors for every matrix, and their eigenbases."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from curvtrain import _checks
from curvtrain._text import table
from curvtrain.curvature import owners, trees
from curvtrain.curvature.base import CurvatureEstimator
from curvtrain.curvature.gradient_kronecker import fits
from curvtrain.curvature.gradient_kronecker.factors import GradientFactors
from curvtrain.curvature.gradient_kronecker.views import NAME, Views
from curvtrain.curvature.matrices import Patterns, check_patterns
from curvtrain.curvature.mesh import axes_for, everywhere, spec_for
from curvtrain.curvature.scanned import scan_axes

PyTree = Any

FITS = ("ema", "kl")
EIGENVALUES = ("product", "corrected")
BASES = ("qr", "eigh")
DECAY = 0.95  # unless the user or an optimizer says otherwise


@dataclasses.dataclass(frozen=True)
class GradientKronecker(CurvatureEstimator[GradientFactors]):
    """C ~ E[g g^T] for the gradient g of a step, one Kronecker product for each matrix among the parameters.

    All that it needs is the gradient: it works for any loss. `update` moves the averages, `refresh` makes new bases.
    What is left open (None) is what an optimizer asks for, in a Trainer or in `optim.self_contained`: "corrected"
    for `optim.soap`, "product" for `optim.shampoo`, and fit="kl" for `optim.kl_shampoo`, each with its b2 for a decay.

    Attributes:
      fit: "ema": averages of G G^T and G^T G, Shampoo's; "kl": the factors of the matrix Gaussian of maximum
        likelihood, which have the right size without a normalisation. None: "ema".
      eigenvalues: "product" of those of the factors; "corrected": second moments of the gradient in their eigenbasis,
        carried over a change of basis. None: "corrected" with "ema", "product" with "kl".
      decay: of all averages; None: 0.95.
      factor_decay: of the factors, if another one.
      basis: "qr": one step of the orthogonal iteration from the last basis, and eigenvectors at the first refresh
        alone; "eigh": eigenvectors at every refresh, five to ten times as dear.
      max_size: a side longer than this has no factor (an identity), and a matrix of two such sides is a diagonal. A
        factor takes its square of memory, twice.
      block_size: longer sides are cut into equal blocks of at most this length, the longest that divide them, unless
        these were shorter than half of it; each block of a matrix then has factors of its own. None: no blocks.
      one_sided: whether only the shorter side of each matrix has a factor.
      patterns: (regular expression, einops pattern) pairs, searched in the parameters' names, which say how parameters
        are matrices, as for `optim.orthogonalize`; by default axes are merged so that factors are the smallest.
      slots: number of owners that share the matrices, as for `KFAC`.

    Raises:
      TypeError, ValueError: when built with a bad argument; in `init` for parameters that are no real numbers, and for
        a pattern that does not fit.
    """

    fit: str | None = None
    eigenvalues: str | None = None
    decay: float | None = None
    _: dataclasses.KW_ONLY
    factor_decay: float | None = None
    basis: str = "qr"
    max_size: int = 10_000
    block_size: int | None = None
    one_sided: bool = False
    patterns: Patterns = ()
    slots: int | None = None

    def __post_init__(self):
        for name, options in (("fit", FITS), ("eigenvalues", EIGENVALUES)):
            if getattr(self, name) is not None:
                _checks.one_of(f"{NAME}({name})", getattr(self, name), options)
        for name in ("decay", "factor_decay"):
            if getattr(self, name) is not None:
                _checks.number_in(f"{NAME}({name})", getattr(self, name), 0.0, 1.0, open_high=True)
                object.__setattr__(self, name, float(getattr(self, name)))
        _checks.one_of(f"{NAME}(basis)", self.basis, BASES)
        _checks.positive_int(f"{NAME}(max_size)", self.max_size)
        if self.block_size is not None:
            _checks.positive_int(f"{NAME}(block_size)", self.block_size)
        if not isinstance(self.one_sided, bool):
            raise TypeError(f"{NAME}(one_sided) should be True or False, not {self.one_sided!r}.")
        check_patterns(f"{NAME}(patterns)", self.patterns)
        object.__setattr__(self, "patterns", tuple(map(tuple, self.patterns)))
        if self.slots is not None:
            _checks.positive_int(f"{NAME}(slots)", self.slots)

    def views(self, objective, params) -> Views:
        """Says how parameters are matrices."""
        axes = scan_axes(NAME, objective, params)
        return Views.of(params, axes, self.patterns, self.max_size, self.block_size, self.one_sided)

    def init(self, objective, params) -> GradientFactors:
        fit = self.fit or "ema"
        eigenvalues = self.eigenvalues or ("corrected" if fit == "ema" else "product")
        decay = DECAY if self.decay is None else self.decay
        views = self.views(objective, params)
        dtype, scaled = jnp.dtype(views.dtype), eigenvalues == "corrected"
        slots = self.slots or owners.owners_for(views.factored, scaled)
        layout = owners.layout_of(views.factored, slots)
        sizes = {size: (D, slots.count) for size, (D, slots) in layout.factors}
        zero = lambda: jnp.zeros((), dtype)
        empty, diagonals = views.read(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), views.like()))
        return GradientFactors(
            factors={size: jnp.zeros((count, D, D), dtype) for size, (D, count) in sizes.items()},
            values={size: jnp.zeros((count, D), dtype) for size, (D, count) in sizes.items()},
            vectors={
                size: jnp.zeros((count, D, D), dtype) + jnp.eye(D, dtype=dtype) for size, (D, count) in sizes.items()
            },
            scales=owners.blocks(layout, empty) if scaled else {},
            diagonals=diagonals,
            weight=zero(),
            scale_weight=zero(),
            updates=jnp.int32(0),
            refreshes=jnp.int32(0),
            failures=jnp.int32(0),
            skipped=jnp.int32(0),
            views=views,
            layout=layout,
            fit=fit,
            eigenvalues=eigenvalues,
            decay=decay,
        )

    # -- an update -----------------------------------------------------------------------------------------------------

    def update(self, curvature: GradientFactors, objective, params, batch, key, *, grads=None) -> GradientFactors:
        c = curvature
        grads = objective.value_and_grad(params, batch, key)[1] if grads is None else grads
        matrices, vectors = c.views.read(trees.wide(grads))
        finite = [jnp.all(jnp.isfinite(G)) for G in (*matrices.values(), *vectors.values())]
        usable = functools.reduce(jnp.logical_and, finite, jnp.bool_(True))
        factor_decay = c.decay if self.factor_decay is None else self.factor_decay
        weight, scale_weight = factor_decay * c.weight + 1, c.decay * c.scale_weight + 1
        square = lambda old, v: old + (jnp.square(v) - old) / scale_weight
        new: dict[str, Any] = {
            "diagonals": {name: square(c.diagonals[name], v) for name, v in vectors.items()},
            "weight": weight,
            "scale_weight": scale_weight,
            "updates": c.updates + 1,
        }
        matrices = owners.placed(c.layout, matrices)
        with trees.exact():
            if matrices and c.eigenvalues == "corrected":
                moved = functools.partial(fits.moments, weight=scale_weight)
                V = owners.by_shape(moved, c.layout, (c.vectors,), (c.scales, matrices))
                new["scales"] = owners.blocks(c.layout, V)
            if matrices:
                new |= self._factors(c, matrices, weight, factor_decay)
        pick = lambda a, b: jnp.where(usable, a, b)
        kept = {name: jax.tree.map(pick, value, getattr(c, name)) for name, value in new.items()}
        return dataclasses.replace(c, **kept, skipped=c.skipped + jnp.asarray(~usable, jnp.int32))

    def _factors(self, c: GradientFactors, matrices, weight: jax.Array, decay: float) -> dict[str, Any]:
        names, arrays = ("factors", "values"), (c.factors, c.vectors, c.values)
        if c.fit == "kl":
            moved = functools.partial(fits.kl, decay=decay)
        elif c.eigenvalues == "product":
            moved = functools.partial(fits.ema_with_values, weight=weight)
        else:  # V is all that is used
            names, arrays, moved = ("factors",), (c.factors,), functools.partial(fits.ema, weight=weight)
        found = owners.by_size(moved, c.layout, arrays, (matrices,))
        return {name: {size: trees[name] for size, trees in found.items()} for name in names}

    # -- a refresh -----------------------------------------------------------------------------------------------------

    def refresh(self, curvature: GradientFactors, objective, params, batch, key, damping=None) -> GradientFactors:
        """New bases; V is carried over. A basis that is not finite is not taken, and counted."""
        c = curvature
        if not c.layout.matrices:
            return dataclasses.replace(c, refreshes=c.refreshes + (c.updates > 0))
        given = {size: (X, c.values[size], c.vectors[size], *_rows(c, size)) for size, X in c.factors.items()}
        make = functools.partial(fits.bases, self.basis, c.refreshes == 0)
        with trees.exact():
            pairs = {size: (arrays, None) for size, arrays in given.items()}
            eigen, finite = owners.factorise(make, c.layout, pairs)
            values = {size: pair[0] for size, pair in eigen.items()}
            vectors = {size: pair[1] for size, pair in eigen.items()}
            scales = c.scales
            if c.eigenvalues == "corrected":
                V = owners.by_shape(fits.carried, c.layout, (c.vectors, vectors), (c.scales,))
                scales = owners.blocks(c.layout, V)
        finite = [c.layout.of_size(size).take(ok) for size, ok in everywhere(finite).items()]
        return dataclasses.replace(
            c,
            values=values,
            vectors=vectors,
            scales=scales,
            refreshes=c.refreshes + (c.updates > 0),
            failures=sum((jnp.sum(~ok, dtype=jnp.int32) for ok in finite), c.failures),
        )

    # -- where it lies -------------------------------------------------------------------------------------------------

    def partition_specs(self, curvature: GradientFactors, param_specs, mesh):
        """Factors, and what is made of them, are split over as many devices as `slots` allows."""
        c, specs = curvature, jax.tree.map(lambda _: PartitionSpec(), curvature)
        spec = spec_for(axes_for({} if mesh is None else mesh.shape, c.slots))
        names = ("factors", "values", "vectors", "scales")
        split = {name: jax.tree.map(lambda _: spec, getattr(c, name)) for name in names}
        leaves = jax.tree.leaves(param_specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
        own = dict(zip(c.views.names, leaves, strict=True))
        return dataclasses.replace(specs, **split, diagonals={name: own[name] for name in c.diagonals})

    def choices(self, objective, params, mesh):
        if self.slots is not None:
            return {}
        scaled = (self.eigenvalues or ("corrected" if (self.fit or "ema") == "ema" else "product")) == "corrected"
        return {"slots": owners.owners_for(self.views(objective, params).factored, scaled, mesh.shape)}

    def overview(self, objective, params) -> str:
        c = jax.eval_shape(self.init, objective, params)
        itemsize, scaled = jnp.dtype(c.views.dtype).itemsize, c.eigenvalues == "corrected"
        rows = [("parameter", "seen as", "factors", "bytes")]
        for name, shape, entry in zip(c.views.names, c.views.shapes, c.views.matrices, strict=True):
            if entry is None:
                size = functools.reduce(lambda a, b: a * b, shape, 1)
                rows.append((name, "diagonal", "", f"{size * itemsize:,}"))
                continue
            view, used = entry
            d = view.sides
            kept = [n for n, is_used in zip(d, used, strict=True) if is_used]
            numbers = view.copies * (sum(2 * n * n + n for n in kept) + scaled * d[0] * d[1])
            rows.append(
                (name, f"{view.copies} x {d[0]} x {d[1]}", ", ".join(map(str, kept)), f"{numbers * itemsize:,}")
            )
        shown = table(rows, left=3)
        return shown if c.slots == 1 or not c.layout.matrices else f"{shown}\n\n{owners.overview(c.layout)}"


def _rows(c: GradientFactors, size: str) -> tuple[jax.Array, ...]:
    """Where factors are smaller than their slots, which rows are not theirs (L, D)."""
    rows = c.layout.of_size(size).outside
    return () if rows is None else (jnp.asarray(rows),)
