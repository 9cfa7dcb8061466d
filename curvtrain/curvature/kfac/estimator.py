"""K-FAC: Kronecker factors from statistics of layers; factors of one size are factorised together.

Martens and Grosse (2015), arXiv 1503.05671; convolutions: Grosse and Martens (2016), arXiv 1602.01407; weight sharing:
Eschenhagen et al. (2023), arXiv 2311.00636; EKFAC: George et al. (2018), arXiv 1806.03884. Symbols in `factors.py`, the
rule for stale factors in `stale.py`.
"""

import dataclasses
import functools
import operator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from curvtrain import _checks
from curvtrain.curvature import owners, stacks, trees
from curvtrain.curvature.capture.statistics import WEIGHT_SHARING, KroneckerStatistic
from curvtrain.curvature.fisher.base import LayerEstimator
from curvtrain.curvature.kfac.factors import INVERSES, KroneckerFactors, matrices_of, own_blocks
from curvtrain.curvature.kfac.finite import keep_finite
from curvtrain.curvature.kfac.stale import Staleness
from curvtrain.curvature.mesh import axes_for, everywhere, spec_for, spread_spec
from curvtrain.objective import safe

PyTree = Any


@dataclasses.dataclass(frozen=True)
class KFAC(LayerEstimator[KroneckerFactors]):
    """Kronecker factors of the Fisher (or GGN) of every layer of an NNX model.

    `update` takes the statistics of a batch in the backward pass of its gradient ("empirical"), in one more
    ("sampled"), or in several ("exact"); `refresh` factorises. A model's layers are found by their classes (see
    `register_layer`); every parameter is in exactly one
    block, or `init` raises an error that lists those which are not.

    Attributes:
      fisher: "exact" (= "ggn" for the losses of curvtrain.losses; one backward pass per output), "sampled" (one pass,
        targets drawn from the model), or "empirical" (the batch's targets: not the Fisher).
      weight_sharing: "expand" (every position counts as an example) or "reduce" (positions are averaged first), for
        layers that are applied to several positions of one example. Of a layer that is called several times, every
        call adds positions; "reduce" averages those of one call.
      inverse: "cholesky" (damping split over the factors), "eigh" (exact for any damping), "ekfac" (eigh with second
        moments of the gradient in place of the products of eigenvalues).
      ema: as for `LayerEstimator`; EKFAC's second moments start anew in every basis, with the weight of one batch.
      damping: what `refresh` factorises for if it gets no hint.
      scale_every: updates between two of EKFAC's second moments.
      stale: alpha, e.g. 0.1: every factor has an interval of its own, and a refresh factorises only those that are due;
        one that changes by less than this relative to its size waits longer (Osawa et al. 2020, arXiv 2002.06015; see
        `stale.py`). With inverse="cholesky" another damping makes all due. Embeddings' bases are always refreshed.
        Costs the memory of two more copies of the factors. None: all factors at every refresh.
      slots: number of owners that share the layers. Factors and inverses are sharded when the device count divides it;
        each device then has some layers and factorises those. More owners than there are layers of a kind cost padding
        (`overview` says how much). None: in a Trainer, what takes the fewest bytes on each device of the mesh on which
        the run begins (`choices`); elsewhere, the largest power of two up to 64 of which the padding is at most a tenth
        and no size shares another's array. 1: all factors and inverses on every device, which still factorises only a
        share: more memory, and, where parameters are on every device too, no communication between two refreshes. It is
        part of the state; see the package `owners`.
      uncovered, plain, layers: as for `LayerEstimator`.

    Raises:
      TypeError, ValueError: as for `LayerEstimator`.
    """

    fisher: str = "sampled"
    weight_sharing: str = "expand"
    inverse: str = "cholesky"
    _: dataclasses.KW_ONLY
    damping: float = 1e-3
    scale_every: int = 1
    stale: float | None = None
    slots: int | None = None

    second_moments: ClassVar[frozenset[str]] = frozenset({"factors"})

    def _check_options(self):
        _checks.one_of("KFAC(weight_sharing)", self.weight_sharing, WEIGHT_SHARING)
        _checks.one_of("KFAC(inverse)", self.inverse, INVERSES)
        _checks.number_in("KFAC(damping)", self.damping, 0.0)
        _checks.positive_int("KFAC(scale_every)", self.scale_every)
        if self.stale is not None:
            _checks.number_in("KFAC(stale)", self.stale, 0.0, 1.0, open_low=True, open_high=True)
        if self.slots is not None:
            _checks.positive_int("KFAC(slots)", self.slots)

    def init(self, objective, params) -> KroneckerFactors:
        coverage = self.coverage(objective, params)
        matrices = matrices_of(coverage)
        cholesky, ekfac = self.inverse == "cholesky", self.inverse == "ekfac"
        layout = owners.layout_of(matrices, owners.owners_for(matrices, ekfac) if self.slots is None else self.slots)
        sizes = {size: (D, slots.count) for size, (D, slots) in layout.factors}
        dtype = coverage.dtype
        zeros = lambda: {size: jnp.zeros((count, D, D), dtype) for size, (D, count) in sizes.items()}
        eyes = {size: jnp.zeros((count, D, D), dtype) + jnp.eye(D, dtype=dtype) for size, (D, count) in sizes.items()}
        blocks, bases = {}, {}
        for key, (block, layers) in own_blocks(coverage).items():
            stored = [block.stored(layer.copies, layer.d_o) for layer in layers]
            together: dict[str, tuple[int, ...]] = {
                name: (sum(s[name][0] for s in stored), *shape[1:]) for name, shape in stored[0].items()
            }
            blocks[key] = {name: jnp.zeros(shape, dtype) for name, shape in together.items()}
            bases[key] = {name: jnp.zeros(shape, dtype) for name, shape in block.basis_shapes(together).items()}
            if "Q" in bases[key]:
                bases[key] |= {"Q": bases[key]["Q"] + jnp.eye(bases[key]["Q"].shape[-1], dtype=dtype)}
        empty = {m.name: jnp.zeros((m.copies, m.d_i, m.d_o), dtype) for m in matrices}
        scales: Any = owners.blocks(layout, empty) if ekfac else {}
        return KroneckerFactors(
            factors=zeros(),
            blocks=blocks,
            weight=jnp.zeros((), dtype),
            inverses=zeros() if cholesky else {},
            vectors={} if cholesky else eyes,
            values={} if cholesky else {size: jnp.zeros((count, D), dtype) for size, (D, count) in sizes.items()},
            bases=bases,
            scales=scales,
            scale_weight=jnp.zeros((), dtype),
            stale=Staleness.begin(*((zeros(), scales.by_shape if ekfac else {}) if self.stale else ({}, {}))),
            damping=jnp.full((), jnp.nan, dtype),
            updates=jnp.int32(0),
            refreshes=jnp.int32(0),
            failures=jnp.int32(0),
            skipped=jnp.int32(0),
            coverage=coverage,
            inverse=self.inverse,
            layout=layout,
        )

    # -- an update -----------------------------------------------------------------------------------------------------

    def _statistic(self):
        scales = self.inverse == "ekfac"
        return KroneckerStatistic(self.weight_sharing, scales=scales, sometimes=scales and self.scale_every > 1)

    def _given(self, curvature: KroneckerFactors):
        """EKFAC: the bases of every layer, which every device needs, and whether S is due."""
        c = curvature
        if self.inverse != "ekfac":
            return {}
        vectors, given = everywhere(c.vectors), {}
        for layer in c.coverage.factored:
            lead = (*layer.scan_axes, layer.groups)
            QA, QG = (Q.reshape(*lead, *Q.shape[1:]) for Q in c.pair(vectors, layer.name))
            given[layer.name] = {"QA": QA, "QG": QG}
            if self.scale_every > 1:
                given[layer.name]["due"] = jnp.broadcast_to(self._scales_due(c), layer.scan_axes)
        return given

    def _scales_due(self, c: KroneckerFactors) -> jax.Array:
        return c.updates % self.scale_every == 0

    def means(self, curvature: KroneckerFactors, sums, W):
        c, layers = curvature, curvature.coverage.factored
        places: dict[str, list[jax.Array]] = {size: [] for size in c.factors}
        rows, moments = [], {}
        for layer, (_, (a, _, g, _)) in zip(layers, c.layout.at, strict=True):
            x, K = sums[layer.name], layer.copies
            places[a].append(x["A"].reshape(K, layer.d_i, layer.d_i))
            places[g].append(x["G"].reshape(K, layer.d_o, layer.d_o))
            rows.append(x["rows"].reshape(K))
            if self.inverse == "ekfac":
                moments[layer.name] = x["S"].reshape(K, layer.d_i, layer.d_o)
        A, _, _, _ = c.layout.sides
        total = sum(slots.count for _, (_, slots) in c.layout.factors)
        weights = jnp.full(total, W)
        if rows:
            weights = weights.at[A].set(safe(jnp.concatenate(rows)))
        weights = c.layout.parted(weights)
        divided = {
            size: owners.shared(c.layout.of_size(size).place(parts) / weights[size][:, None, None], c.layout)
            for size, parts in places.items()
        }
        blocks = {}
        for key, (block, members) in own_blocks(c.coverage).items():
            each = [block.means(layer, sums[layer.name], W) for layer in members]
            blocks[key] = jax.tree.map(lambda *parts: parts[0] if len(parts) == 1 else jnp.concatenate(parts), *each)
        means: dict[str, PyTree] = {"factors": divided, "blocks": blocks}
        if self.inverse == "ekfac":
            S = owners.blocks(c.layout, moments)
            means["scales"] = owners.shared(jax.tree.map(lambda S: S / W, S), c.layout)
        return means

    def _besides(self, curvature: KroneckerFactors, means, usable, W):
        c = curvature
        updates = {"updates": c.updates + 1}
        if self.inverse != "ekfac":
            return updates
        usable = usable & self._scales_due(c)
        pick = lambda new, old: jnp.where(usable, new, old)
        scale_weight, scale_weights = self.ema * c.scale_weight + W, c.stale.scale_weights
        own: Any = jax.tree.map(lambda _: scale_weight, c.scales)
        if scale_weights:
            scale_weights = {shape: self.ema * w + W for shape, w in scale_weights.items()}
            own = owners.Blocks({shape: w[:, None, None] for shape, w in scale_weights.items()}, c.layout)
        scales = jax.tree.map(
            lambda S, old, own: pick(old + (S - old) * (W / safe(own)), old), means["scales"], c.scales, own
        )
        stale = dataclasses.replace(c.stale, scale_weights=jax.tree.map(pick, scale_weights, c.stale.scale_weights))
        return updates | {"scales": scales, "scale_weight": pick(scale_weight, c.scale_weight), "stale": stale}

    # -- a refresh -----------------------------------------------------------------------------------------------------

    def refresh(self, curvature: KroneckerFactors, objective, params, batch, key, damping=None) -> KroneckerFactors:
        c, cholesky = curvature, self.inverse == "cholesky"
        dtype = c.weight.dtype
        if not (isinstance(damping, jax.Array) and damping.dtype == dtype and not damping.weak_type):
            damping = jnp.asarray(self.damping if damping is None else damping, dtype)  # else the very one: see `solve`
        stale, due = c.stale, None
        if self.stale is not None:
            stale = stale.refresh(forced=(damping != c.damping) if cholesky else False)
            due = stale.due
        if cholesky:
            inverses, finite = c.damped_inverses(damping, due)
            new: dict[str, Any] = {"inverses": inverses}
        else:
            eigen, finite = c.eigenbases(due)
            values = {size: pair[0] for size, pair in eigen.items()}
            new = {"values": values, "vectors": {size: pair[1] for size, pair in eigen.items()}}
            if self.inverse == "ekfac":
                weight = self._weight_of_a_batch(c)
                scales, weights = _seeded(c, values, due, weight)
                stale = dataclasses.replace(stale, scale_weights=weights)
                new |= {"scales": scales, "scale_weight": weight}
        if self.stale is not None:
            stale = stale.refreshed(c.factors, finite, self.stale)
        finite = {size: c.layout.of_size(size).take(ok) for size, ok in everywhere(finite).items()}
        bases, whole = _own_bases(c, after=finite)
        failures = sum((jnp.sum(~ok, dtype=jnp.int32) for ok in (*finite.values(), *whole.values())), c.failures)
        return dataclasses.replace(
            c, **new, stale=stale, bases=bases, damping=damping, refreshes=c.refreshes + 1, failures=failures
        )

    def _weight_of_a_batch(self, c: KroneckerFactors) -> jax.Array:
        """The weight W of the batches that were absorbed, in their average; 1 before the first."""
        batches = jnp.maximum(c.updates - c.skipped, 1).astype(jnp.float32)
        powers = batches if self.ema == 1 else (1 - self.ema**batches) / (1 - self.ema)
        return jnp.where(c.weight > 0, c.weight / powers, 1.0).astype(c.weight.dtype)

    # -- where it lies -------------------------------------------------------------------------------------------------

    def partition_specs(self, curvature: KroneckerFactors, param_specs, mesh):
        """Factors, and what is made of them, are split over as many devices as `slots` allows."""
        specs = jax.tree.map(lambda _: PartitionSpec(), curvature)
        shape = {} if mesh is None else mesh.shape
        spec = spec_for(axes_for(shape, curvature.slots))
        split = lambda tree: jax.tree.map(lambda _: spec, tree)
        in_slots = {
            name: split(getattr(curvature, name)) for name in ("factors", "inverses", "vectors", "values", "scales")
        }
        stale = dataclasses.replace(split(curvature.stale), scale_weights=specs.stale.scale_weights)
        blocks = dict(specs.blocks)
        for key, (block, _) in own_blocks(curvature.coverage).items():
            if block.spread:
                blocks[key] = jax.tree.map(lambda a: spread_spec(shape, a.shape), curvature.blocks[key])
        return dataclasses.replace(specs, **in_slots, stale=stale, blocks=blocks)

    def choices(self, objective, params, mesh):
        if self.slots is not None:
            return {}
        matrices = matrices_of(self.coverage(objective, params))
        return {"slots": owners.owners_for(matrices, self.inverse == "ekfac", mesh.shape)}

    def overview(self, objective, params) -> str:
        c = jax.eval_shape(self.init, objective, params)
        itemsize = c.weight.dtype.itemsize
        blocks = {layer.name: self._bytes(layer, itemsize) for layer in c.coverage.layers}
        kept = jax.tree.leaves((c.factors, c.inverses, c.vectors, c.values, c.scales, c.stale))
        factored = [layer.name for layer in c.coverage.factored]
        padding = sum(a.size * a.dtype.itemsize for a in kept) - sum(blocks[name][1] for name in factored)
        shown = c.coverage.table(blocks, {f"padding for {c.slots} slots": padding} if padding else {})
        return shown if c.slots == 1 or not factored else f"{shown}\n\n{owners.overview(c.layout)}"

    def _described(self, layer):
        kind, size = self._bytes(layer)
        return kind, size // 4

    def _bytes(self, layer, itemsize: int = 4) -> tuple[str, int]:
        """(kind of a layer's block, bytes of its curvature)."""
        block, own = layer.block(), layer.block().own
        if own is not None:
            stored = own.stored(layer.copies, layer.d_o)
            shapes = (*stored.values(), *own.basis_shapes(stored).values())
            return own.kind(layer), itemsize * sum(functools.reduce(operator.mul, shape, 1) for shape in shapes)
        squares = layer.d_i**2 + layer.d_o**2
        size = 2 * itemsize * squares  # factors, and their inverses or eigenvectors
        if self.inverse != "cholesky":
            size += itemsize * (layer.d_i + layer.d_o)
        size += itemsize * layer.d_i * layer.d_o * (self.inverse == "ekfac")
        if self.stale is not None:  # two more copies of both, three integers and a bool each
            size += 2 * itemsize * squares + 2 * 13 + itemsize * (self.inverse == "ekfac")
        return f"{self.inverse} {block.kind(layer)}", size * layer.copies


def _seeded(
    c: KroneckerFactors, values: PyTree, due: PyTree, weight: jax.Array
) -> tuple[owners.Blocks, dict[str, jax.Array]]:
    """(S, `Staleness.scale_weights`) after a refresh: the second moments of another basis say nothing of this one.

    Where a basis moved, S begins with the products of its eigenvalues, which count with `weight`.
    """
    seed = lambda alpha, gamma: alpha[:, :, None] * gamma[:, None, :]
    if due is None:
        return owners.blocks(c.layout, c.by_matrix(seed, (values,))), {}
    whose, moved = everywhere(due), {}
    for shape, _ in c.layout.blocks:
        (a, rows_a), (g, rows_g) = c.layout.rows(shape)
        moved[shape] = whose[a][rows_a] | whose[g][rows_g]
    pick = lambda alpha, gamma, S, moved: jnp.where(moved[:, None, None], seed(alpha, gamma), S)
    seeds = c.by_matrix(pick, (values,), c.scales, owners.Blocks(moved, c.layout))
    weights = {shape: jnp.where(moved[shape], weight, w) for shape, w in c.stale.scale_weights.items()}
    return owners.blocks(c.layout, seeds), weights


def _own_bases(c: KroneckerFactors, after: PyTree) -> tuple[PyTree, PyTree]:
    """(`KroneckerFactors.bases` of the present means, by key which entries are finite); the last good ones are kept."""
    mixed = {}
    for key, (block, _) in own_blocks(c.coverage).items():
        X = block.to_factorise(c.blocks[key])
        if X is not None:
            mixed[key] = X
    vectors = stacks.in_turn(lambda _, X: stacks.eigh(X)[1], mixed, after=after)
    of = {key: block for key, (block, _) in own_blocks(c.coverage).items()}
    with trees.exact():
        new = {key: of[key].basis(c.blocks[key], Q) for key, Q in vectors.items()}
    kept, finite = keep_finite(new, c.bases)
    return c.bases | kept, finite
