"""K-FAC: Kronecker factors from statistics of layers, factorised in stacks of equal size.

Martens and Grosse (2015), arXiv 1503.05671; convolutions: Grosse and Martens (2016), arXiv 1602.01407; weight sharing:
Eschenhagen et al. (2023), arXiv 2311.00636; EKFAC: George et al. (2018), arXiv 1806.03884. Symbols in `factors.py`, the
rule for stale factors in `stale.py`.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from curvtrain import _checks
from curvtrain.curvature import stacks, trees
from curvtrain.curvature.base import CurvatureEstimator
from curvtrain.curvature.capture import FISHERS, Coverage, EmbedLayer, NormLayer, collect, cover
from curvtrain.curvature.capture.coverage import UNCOVERED
from curvtrain.curvature.capture.layers import Layer, MatrixLayer
from curvtrain.curvature.capture.statistics import WEIGHT_SHARING, KroneckerStatistic
from curvtrain.curvature.kfac import factors as kf
from curvtrain.curvature.kfac import owners
from curvtrain.curvature.kfac.factors import INVERSES, KroneckerFactors
from curvtrain.curvature.kfac.stale import Staleness
from curvtrain.curvature.mesh import axes_for, everywhere, spec_for, spread_spec
from curvtrain.objective import Objective, safe

PyTree = Any


@dataclasses.dataclass(frozen=True)
class KFAC(CurvatureEstimator[KroneckerFactors]):
    """Kronecker factors of the Fisher (or GGN) of every layer of an NNX model.

    `update` takes the statistics of a batch in one more backward pass (several for the exact Fisher); `refresh`
    factorises. A model's layers are found by their classes (see `register_layer`); every parameter is in exactly one
    block, or `init` raises an error that lists those which are not.

    Attributes:
      fisher: "exact" (= "ggn" for the losses of curvtrain.losses; one backward pass per output), "sampled" (one pass,
        targets drawn from the model), or "empirical" (the batch's targets: not the Fisher).
      weight_sharing: "expand" (every position counts as an example) or "reduce" (positions are averaged first), for
        layers that are applied to several positions of one example.
      inverse: "cholesky" (damping split over the factors), "eigh" (exact for any damping), "ekfac" (eigh with second
        moments of the gradient in place of the products of eigenvalues).
      ema: decay of the moving averages over updates, debiased; 0 keeps the last batch alone.
      damping: what `refresh` factorises for if it gets no hint.
      scale_every: updates between two of EKFAC's second moments.
      stale: alpha, e.g. 0.1: every factor has an interval of its own, and a refresh factorises only those that are due;
        one that changes by less than this relative to its size waits longer (Osawa et al. 2020, arXiv 2002.06015; see
        `stale.py`). With inverse="cholesky" another damping makes all due. Embeddings' bases are always refreshed.
        Costs the memory of two more copies of the factors. None: all factors at every refresh.
      slots: on how many devices, or on a number that divides it, the stacks of factors and all that is made of them are
        split, each device having some layers and factorising those; more than there are layers of a kind costs padding
        (`overview` says how much). None: in a Trainer, what takes the fewest bytes on each device of the mesh on which
        the run begins (`choices`); elsewhere, the largest power of two up to 64 of which the padding is at most a tenth
        and no size shares another's stack. 1: all factors and inverses on every device, which still factorises only a
        share: more memory, and, where parameters are on every device too, no communication between two refreshes. It is
        part of the state; see `owners.py`.
      uncovered: "error", or "diagonal": parameters of unknown layers get an exact diagonal of per-example gradients.
      plain: regular expression; layers and parameters whose path it matches get that diagonal too.

    Raises:
      TypeError, ValueError: when built with a bad argument; in `init` for an objective without outputs, and for
        parameters that belong to no known layer; in `update` for layers of which statistics would miss something:
        called without the axis of examples, or parameters used without calling their layer.
    """

    fisher: str = "sampled"
    weight_sharing: str = "expand"
    inverse: str = "cholesky"
    _: dataclasses.KW_ONLY
    ema: float = 0.95
    damping: float = 1e-3
    scale_every: int = 1
    stale: float | None = None
    slots: int | None = None
    uncovered: str = "error"
    plain: str | None = None

    def __post_init__(self):
        _checks.one_of("KFAC(fisher)", self.fisher, FISHERS)
        _checks.one_of("KFAC(weight_sharing)", self.weight_sharing, WEIGHT_SHARING)
        _checks.one_of("KFAC(inverse)", self.inverse, INVERSES)
        _checks.number_in("KFAC(ema)", self.ema, 0.0, 1.0, open_high=True)
        _checks.number_in("KFAC(damping)", self.damping, 0.0)
        _checks.positive_int("KFAC(scale_every)", self.scale_every)
        if self.stale is not None:
            _checks.number_in("KFAC(stale)", self.stale, 0.0, 1.0, open_low=True, open_high=True)
        if self.slots is not None:
            _checks.positive_int("KFAC(slots)", self.slots)
        _checks.one_of("KFAC(uncovered)", self.uncovered, UNCOVERED)

    def coverage(self, objective: Objective | None, params: PyTree) -> Coverage:
        """Which layer every parameter belongs to."""
        if objective is None:
            raise TypeError("KFAC finds the layers of a model, so init() needs the objective.")
        objective.require_outputs("KFAC", "Lanczos(product='hessian')")
        return cover(objective, params, "KFAC", uncovered=self.uncovered, plain=self.plain)

    def init(self, objective, params) -> KroneckerFactors:
        coverage = self.coverage(objective, params)
        cholesky, ekfac = self.inverse == "cholesky", self.inverse == "ekfac"
        slots = owners.slots_for(coverage, ekfac) if self.slots is None else self.slots
        layout = owners.layout_of(coverage, slots)
        sizes = {size: (d, stack.slots) for size, (d, stack) in layout.factors}
        stacks = {size: jnp.zeros((count, d, d)) for size, (d, count) in sizes.items()}
        eyes = {size: jnp.zeros((count, d, d)) + jnp.eye(d) for size, (d, count) in sizes.items()}
        embeddings, bases, norms = {}, {}, {}
        for layer in coverage.layers:
            if isinstance(layer, EmbedLayer):
                K, V, D = layer.copies, layer.vocabulary, layer.features
                row, square = jnp.zeros((K, V)), jnp.zeros((K, D, D))
                embeddings[layer.name] = {"counts": row, "G": square, "A_head": square, "G_head": row}
                zero = jnp.zeros((K, D))
                bases[layer.name] = {"Q": square + jnp.eye(D), "G": zero, "A_head": zero}
            elif isinstance(layer, NormLayer):
                norms[layer.name] = jnp.zeros((layer.copies * layer.channels, layer.units, layer.units))
        zeros = {m.name: jnp.zeros((m.copies, m.d_i, m.d_o)) for m in owners.matrices_of(coverage)}
        scales: Any = owners.blocks(coverage, slots, zeros) if ekfac else {}
        return KroneckerFactors(
            factors=stacks,
            embeddings=embeddings,
            norms=norms,
            plain={layer.name: jnp.zeros((1, 1, layer.size)) for layer in coverage.plain},
            weight=jnp.float32(0),
            inverses=jax.tree.map(jnp.zeros_like, stacks) if cholesky else {},
            vectors={} if cholesky else eyes,
            values={} if cholesky else {size: jnp.zeros((count, d)) for size, (d, count) in sizes.items()},
            bases=bases,
            scales=scales,
            scale_weight=jnp.float32(0),
            stale=Staleness.begin(*((stacks, scales) if self.stale else ({}, {}))),
            damping=jnp.float32(jnp.nan),
            updates=jnp.int32(0),
            refreshes=jnp.int32(0),
            failures=jnp.int32(0),
            skipped=jnp.int32(0),
            coverage=coverage,
            inverse=self.inverse,
            slots=slots,
        )

    def update(self, curvature: KroneckerFactors, objective, params, batch, key, *, grads=None) -> KroneckerFactors:
        if self.inverse != "ekfac":
            return self._absorb(curvature, objective, params, batch, key, scales=False)
        if self.scale_every == 1:
            return self._absorb(curvature, objective, params, batch, key, scales=True)
        absorb = lambda scales: lambda c: self._absorb(c, objective, params, batch, key, scales=scales)
        return jax.lax.cond(curvature.updates % self.scale_every == 0, absorb(True), absorb(False), curvature)

    def _absorb(self, c: KroneckerFactors, objective, params, batch, key, scales: bool) -> KroneckerFactors:
        statistic = KroneckerStatistic(self.weight_sharing, scales=scales)
        given = {}
        if scales:
            vectors = everywhere(c.vectors)  # every device has examples of every layer
            for layer in owners.matrices_of(c.coverage):
                QA, QG = c.pair(vectors, layer.name)
                of = lambda Q, layer=layer: Q.reshape(*layer.stack, layer.groups, *Q.shape[1:])
                given[layer.name] = {"QA": of(QA), "QG": of(QG)}
        found, W = collect(objective, params, batch, key, c.coverage, statistic, self.fisher, given=given, who="KFAC")
        # a batch whose statistics are not finite, or that is all masked, says nothing
        usable = functools.reduce(operator.and_, map(_finite, found.values()), W > 0)
        W = safe(W)
        weight = self.ema * c.weight + 1.0
        average = lambda old, new: old + (new - old) / weight  # debiased: the first batch counts in full

        stacks: dict[str, list[jax.Array]] = {size: [] for size in c.factors}
        layout = dict(c.layout.at)
        embeddings, norms, moments = {}, {}, {}
        scale_weight = self.ema * c.scale_weight + 1.0
        scale_weights = {name: self.ema * w + 1.0 for name, w in c.stale.scale_weights.items()}
        for layer in c.coverage.known:
            x = found[layer.name]
            if isinstance(layer, MatrixLayer):
                a, _, g, _ = layout[layer.name]
                stacks[a].append(_per_row(x["A"], x["rows"], layer).reshape(layer.copies, layer.d_i, layer.d_i))
                stacks[g].append((x["G"] / W).reshape(layer.copies, layer.d_o, layer.d_o))
                if scales:
                    moments[layer.name] = x["S"].reshape(layer.copies, layer.d_i, layer.d_o) / W
            elif isinstance(layer, EmbedLayer):
                K, e = layer.copies, c.embeddings[layer.name]
                x = {
                    "counts": _per_row(x["counts"], x["rows"], layer),
                    "G": x["G"] / W,
                    "A_head": _per_row(x["A_head"], x["head_rows"], layer),
                    "G_head": x["G_head"] / W,
                }
                embeddings[layer.name] = {n: average(e[n], x[n].reshape(K, *e[n].shape[1:])) for n in e}
            else:
                assert isinstance(layer, NormLayer)
                norms[layer.name] = average(c.norms[layer.name], norm_blocks(x["F"], layer) / W)
        new_scales = c.scales
        if scales:
            S = owners.shared(owners.blocks(c.coverage, c.slots, moments), c.slots)
            own: Any = jax.tree.map(lambda _: scale_weight, S)
            if scale_weights:
                each = {name: w[:, None, None] for name, w in scale_weights.items()}
                own = jax.tree.map(safe, owners.blocks(c.coverage, c.slots, each))  # 0 where there is padding
            new_scales = jax.tree.map(lambda S, old, own: old + (S - old) / own, S, c.scales, own)
        placed = {size: owners.shared(c.layout.stack(size).place(new), c.slots) for size, new in stacks.items()}
        new = dataclasses.replace(
            c,
            factors={size: average(c.factors[size], new) for size, new in placed.items()},
            embeddings=embeddings,
            norms=norms,
            plain={name: average(old, found[name]["D2"].reshape(old.shape) / W) for name, old in c.plain.items()},
            weight=weight,
            scales=new_scales,
            scale_weight=scale_weight if scales else c.scale_weight,
            stale=dataclasses.replace(c.stale, scale_weights=scale_weights) if scales else c.stale,
        )
        new = jax.tree.map(lambda new, old: jnp.where(usable, new, old), new, c)
        return dataclasses.replace(new, updates=c.updates + 1, skipped=c.skipped + ~usable)

    def refresh(self, curvature: KroneckerFactors, objective, params, batch, key, damping=None) -> KroneckerFactors:
        c, cholesky = curvature, self.inverse == "cholesky"
        damping = jnp.float32(self.damping if damping is None else damping)
        stale, due = c.stale, None
        if self.stale is not None:
            stale = stale.refresh(forced=(damping != c.damping) if cholesky else False)
            due = stale.due
        if cholesky:
            inverses, finite = c.damped_inverses(damping, due)
            new: dict[str, Any] = {"inverses": inverses}
        else:
            found, finite = c.eigenbases(due)
            values = {size: pair[0] for size, pair in found.items()}
            new = {"values": values, "vectors": {size: pair[1] for size, pair in found.items()}}
            if self.inverse == "ekfac":  # the second moments of another basis say nothing of this one
                seed = lambda alpha, gamma: alpha[:, :, None] * gamma[:, None, :]
                weights = {}
                if due is None:
                    seeds = c.by_matrix(seed, (values,))
                else:
                    whose, moved = everywhere(due), {}
                    for layer in owners.matrices_of(c.coverage):
                        moved[layer.name] = new_basis = functools.reduce(operator.or_, c.pair(whose, layer.name))
                        weights[layer.name] = jnp.where(new_basis, 1.0, stale.scale_weights[layer.name])
                    pick = lambda alpha, gamma, S, moved: jnp.where(moved[:, None, None], seed(alpha, gamma), S)
                    seeds = c.by_matrix(pick, (values,), c.scales, moved)
                stale = dataclasses.replace(stale, scale_weights=weights)
                new |= {"scales": c.blocks(seeds), "scale_weight": jnp.float32(1)}
        if self.stale is not None:
            stale = stale.refreshed(c.factors, finite, self.stale)
        finite = everywhere(finite)
        finite = {size: c.layout.stack(size).take(ok) for size, ok in finite.items()}
        mixed = {name: _mixed(e) for name, e in c.embeddings.items()}
        eigen = stacks.in_turn(lambda _, X: stacks.eigh(X)[1], mixed, after=finite)
        bases, whole = kf.keep_finite({name: _basis(e, eigen[name]) for name, e in c.embeddings.items()}, c.bases)
        failures = sum((jnp.sum(~ok, dtype=jnp.int32) for ok in (*finite.values(), *whole.values())), c.failures)
        return dataclasses.replace(
            c, **new, stale=stale, bases=bases, damping=damping, refreshes=c.refreshes + 1, failures=failures
        )

    def partition_specs(self, curvature: KroneckerFactors, param_specs, mesh):
        """Stacks of factors, and what is made of them, are split over as many devices as `slots` allows."""
        specs = jax.tree.map(lambda _: PartitionSpec(), curvature)
        shape = {} if mesh is None else mesh.shape
        spec = spec_for(axes_for(shape, curvature.slots))
        split = lambda tree: jax.tree.map(lambda _: spec, tree)
        stacks = {
            name: split(getattr(curvature, name)) for name in ("factors", "inverses", "vectors", "values", "scales")
        }
        stale = dataclasses.replace(split(curvature.stale), scale_weights=specs.stale.scale_weights)
        plain = {name: spread_spec(shape, d.shape) for name, d in curvature.plain.items()}
        norms = {name: spread_spec(shape, F.shape) for name, F in curvature.norms.items()}
        return dataclasses.replace(specs, **stacks, stale=stale, plain=plain, norms=norms)

    def choices(self, objective, params, mesh):
        if self.slots is not None:
            return {}
        return {"slots": owners.slots_for(self.coverage(objective, params), self.inverse == "ekfac", mesh.shape)}

    def overview(self, objective, params) -> str:
        curvature = jax.eval_shape(self.init, objective, params)
        coverage, blocks = curvature.coverage, {}
        for layer in coverage.layers:
            if isinstance(layer, MatrixLayer):
                squares = layer.d_i**2 + layer.d_o**2
                size = 8 * squares  # factors, and their inverses or eigenvectors
                if self.inverse != "cholesky":
                    size += 4 * (layer.d_i + layer.d_o)
                size += 4 * layer.d_i * layer.d_o * (self.inverse == "ekfac")
                if self.stale is not None:  # two more copies of both, three integers and a bool each
                    size += 8 * squares + 2 * 13 + 4 * (self.inverse == "ekfac")
                size *= layer.copies
                kind = f"{self.inverse} {layer.d_i} x {layer.d_o}" + (f" x {layer.copies}" if layer.copies > 1 else "")
            elif isinstance(layer, EmbedLayer):
                arrays = (curvature.embeddings[layer.name], curvature.bases[layer.name])
                size, kind = 4 * sum(a.size for a in jax.tree.leaves(arrays)), "diagonal x dense"
            elif isinstance(layer, NormLayer):
                size, kind = 4 * curvature.norms[layer.name].size, f"unit-wise {layer.units} x {layer.units}"
            else:
                size, kind = 4 * layer.size, "diagonal"
            blocks[layer.name] = (kind, size)
        c = curvature
        kept = jax.tree.leaves((c.factors, c.inverses, c.vectors, c.values, c.scales, c.stale))
        matrices = [layer.name for layer in owners.matrices_of(coverage)]
        padding = sum(a.size * a.dtype.itemsize for a in kept) - sum(blocks[name][1] for name in matrices)
        shown = coverage.table(blocks, {f"padding for {c.slots} slots": padding} if padding else {})
        return shown if c.slots == 1 or not matrices else f"{shown}\n\n{owners.overview(c.layout, c.slots)}"


def _finite(found: dict[str, jax.Array]) -> jax.Array:
    """Whether the statistics of a layer are finite: of second moments the diagonals show it, at a fraction of the cost
    of all their entries."""
    shown = [kf.diagonals(x) if name in ("A", "G", "A_head") else x for name, x in found.items()]
    return functools.reduce(operator.and_, [jnp.all(jnp.isfinite(x)) for x in shown])


def norm_blocks(F: jax.Array, layer: NormLayer) -> jax.Array:
    """(*stack, p, p, C) as (K * C, p, p)."""
    F = F.reshape(layer.copies, layer.units, layer.units, layer.channels)
    return jnp.moveaxis(F, 3, 1).reshape(-1, layer.units, layer.units)


def _mixed(e: dict[str, jax.Array]) -> jax.Array:
    """The matrix whose eigenvectors are an embedding's basis: of a tied one, a compromise between its two."""
    return _unit_trace(e["G"]) + jnp.where(jnp.any(e["G_head"] > 0), _unit_trace(e["A_head"]), 0.0)


def _basis(e: dict[str, jax.Array], Q: jax.Array) -> dict[str, jax.Array]:
    """What `KroneckerFactors.bases` says of an embedding."""
    diagonal = lambda X: jnp.maximum(jnp.einsum("kij,kij->kj", Q, X @ Q), 0.0)
    with trees.exact():
        return {"Q": Q, "G": diagonal(e["G"]), "A_head": diagonal(e["A_head"])}


def _per_row(x: jax.Array, rows: jax.Array, layer: Layer) -> jax.Array:
    """A sum over rows divided by their weight; both have the layer's stack as leading axes."""
    return x / safe(rows).reshape(*layer.stack, *(1,) * (x.ndim - len(layer.stack)))


def _unit_trace(X: jax.Array) -> jax.Array:
    trace = jnp.trace(X, axis1=-2, axis2=-1)[:, None, None]
    return X / jnp.where(trace > 0, trace, 1.0)
