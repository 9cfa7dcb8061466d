"""AdaFisher's factors as its released code keeps them: for replays of published results, and not as a curvature.

What differs from the paper (Gomes et al. 2024, arXiv 2405.16397, equations 3 and 4), and what it does:

* factors are brought to [0, 1] before the average, which adds them with 0.01 gamma and keeps 0.1 gamma of what was, in
  the place of 1 - gamma and gamma. A factor comes to rest at about 1/115 of its scaled value, so that S (x) H stays
  below 1e-4 and the damping of 1e-3 above all of it: the direction is that of the momentum, cos > 0.999;
* they begin at 1, which makes the first period's steps about eight times smaller: a warm-up;
* the 1e-6 of the scaling is absolute: a loss that is multiplied by 1e-3 has other factors. The two entries for scale
  and bias of a norm layer become 0 and 1, whatever they were;
* layers other than `Linear`, `Conv` of two axes, `BatchNorm` and `LayerNorm` are divided by 1, where all others are by
  about 1e-3: they move a thousand times less.

| symbol | name here | meaning |
|---|---|---|
| H, S | the same | diagonal factors of inputs and of cotangents; H has the bias as its last entry |
| gamma | `ema` | 0.8 |
| Lambda | `damping` | 1e-3, of the optimizer |
| F~ | | S (x) H + Lambda, and 1 where there are no factors |
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain.curvature import trees
from curvtrain.curvature.capture import Coverage, Layer, LayerMeasure, NormLayer
from curvtrain.curvature.capture.seeds import AS_GIVEN
from curvtrain.curvature.fisher.diagonal import Diagonal, LayerDiagonal
from curvtrain.curvature.fisher.released_statistic import ReleasedStatistic, is_released, raw_factors
from curvtrain.objective import Objective, safe

PyTree = Any
Arrays = dict[str, jax.Array]

_OLD, _NEW, _TINY = 0.1, 0.01, 1e-6  # the coefficients of gamma, and what keeps the scaling finite
UNCOVERED = ("error", "one")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReleasedFactors(LayerDiagonal):
    """C = S (x) H for layers that have factors, and 0 for the rest; see the module's docstring.

    Attributes:
      factors: for each layer that the released code knows, H (c, 1, d_i) and S (c, g, d_o): c copies from scan axes, g
        groups, which share H; of a norm layer H (c, 1, 2) is for scale and bias.
      updates: int32 (), so far.
      skipped: int32 (), updates with statistics that were not numbers, or of no example; nothing was absorbed.
      coverage: which layer every parameter belongs to.
    """

    factors: dict[str, Arrays]
    updates: jax.Array
    skipped: jax.Array
    coverage: Coverage = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def empty(cls, coverage: Coverage) -> "ReleasedFactors":
        """The factors before the first update."""
        zeros = lambda layer: {name: jnp.zeros(shape, coverage.dtype) for name, shape in shapes(layer).items()}
        factors = {layer.name: zeros(layer) for layer in coverage.layers if is_released(layer)}
        return cls(factors, jnp.int32(0), jnp.int32(0), coverage)

    def diagonal(self) -> PyTree:
        """diag(C), like the parameters."""
        return self.map(self.coverage.zeros(), lambda F, zero: zero if F is None else F)

    def like(self) -> PyTree:
        return self.coverage.like()

    def map(self, vector: PyTree, function: Callable[[jax.Array | None, jax.Array], jax.Array]) -> PyTree:
        """Applies function(F, M) to each layer's matrix M (K, d_i, d_o) and to its S (x) H, None without factors."""
        matrices, mapped = self.coverage.matrices(trees.wide(vector)), {}
        for layer in self.coverage.layers:
            c = self.factors.get(layer.name)
            F = None if c is None else _product(layer, c)
            mapped[layer.name] = function(F, matrices[layer.name])
        return self.coverage.vector(mapped)

    def telemetry(self) -> dict[str, jax.Array]:
        """Largest and mean entry of the diagonal, and skipped updates."""
        return Diagonal(self.diagonal(), skipped=self.skipped).telemetry()

    def absorb(self, sums: Mapping[str, Arrays], W: jax.Array, gamma: float) -> "ReleasedFactors":
        """The factors with one more batch: c <- 0.1 gamma c + 0.01 gamma scaled(new), where c is 1 at first."""
        raw = {name: raw_factors(_layer(self.coverage, name), sums[name], safe(W)) for name in self.factors}
        bad = [jnp.any(jnp.isnan(a)) for a in jax.tree.leaves(raw)]
        usable = ~jnp.any(jnp.stack(bad)) & (W > 0)

        def moved(old: jax.Array, new: jax.Array) -> jax.Array:
            begun = jnp.where(self.updates > 0, old, 1.0)
            return jnp.where(usable, _OLD * gamma * begun + _NEW * gamma * scaled(new), old).astype(old.dtype)

        factors = {
            name: {"H": moved(c["H"], raw[name][0]), "S": moved(c["S"], raw[name][1])}
            for name, c in self.factors.items()
        }
        return dataclasses.replace(self, factors=factors, updates=self.updates + usable, skipped=self.skipped + ~usable)


def shapes(layer: Layer) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's factors, by name; none without factors."""
    if not is_released(layer):
        return {}
    copies = math.prod(layer.scan_axes)
    inputs = 2 if isinstance(layer, NormLayer) else layer.d_i
    return {"H": (copies, 1, inputs), "S": (copies, layer.groups, layer.d_o)}


def scaled(x: jax.Array) -> jax.Array:
    """(x - min) / (max - min + 1e-6) over the last two axes: those of one layer."""
    x = jnp.where(x == jnp.inf, 1.0, jnp.where(x == -jnp.inf, 0.0, x))
    low, high = (reduce(x, axis=(1, 2), keepdims=True) for reduce in (jnp.min, jnp.max))
    return (x - low) / (high - low + _TINY)


def _product(layer: Layer, c: Arrays) -> jax.Array:
    """S (x) H like the layer's M (K, d_i, d_o); a program that uses it elementwise never holds it."""
    H = c["H"]
    if isinstance(layer, NormLayer):
        H = jnp.stack([H[..., ("scale", "bias").index(name)] for name, _ in layer.shapes], axis=-1)
    F = H[..., :, None] * c["S"][..., None, :]
    return F.reshape(layer.copies, layer.d_i, layer.d_o)


def _layer(coverage: Coverage, name: str) -> Layer:
    return next(layer for layer in coverage.layers if layer.name == name)


def check_covered(coverage: Coverage, uncovered: str, plain: str | None, who: str) -> None:
    """Raises ValueError for parameters without factors, unless the user chose them, and for a model of no others."""
    rest = [layer for layer in coverage.layers if layer.size and not is_released(layer)]
    chosen = lambda name: plain is not None and any(re.match(plain, path) for path in (name, name.rpartition("/")[0]))
    unasked = [layer for layer in rest if uncovered == "error" and not chosen(layer.name)]
    if not any(map(is_released, coverage.layers)):
        raise ValueError(
            f"{who}(faithful=True): no layer of this model is a Linear, a Conv of two axes, a BatchNorm or a "
            f"LayerNorm, and the released AdaFisher has factors for no other. Leave faithful out."
        )
    if unasked:
        lines = "\n".join(f"  {layer.name}: {layer.kind}" for layer in unasked)
        raise ValueError(
            f"{who}(faithful=True): the released AdaFisher has no factors for\n{lines}\nand divides their momentum by "
            f"1: with its damping of 1e-3 they move a thousand times less than the rest. Give them another optimizer "
            f"(optim.route), say uncovered='one' to have it so, or leave faithful out."
        )


def measure(
    coverage: Coverage, objective: Objective, params: PyTree, batch: Any, key: jax.Array | None, who: str
) -> LayerMeasure:
    """The sums of the released code's statistics. Raises ValueError for layers that it sees in several calls."""
    known = Coverage(tuple(layer for layer in coverage.layers if is_released(layer)), coverage.dtype)
    found = LayerMeasure.of(objective, params, batch, key, known, ReleasedStatistic(), AS_GIVEN, who=who)
    calls = found.calls
    norms = {layer.name for layer in known.layers if isinstance(layer, NormLayer)}
    if several := sorted({*calls.repeated, *(calls.mapped & norms)}):
        raise ValueError(
            f"{who}(faithful=True): {', '.join(several)} is called several times for a batch, and of such a layer the "
            f"released AdaFisher keeps what the order of the calls makes of it. Leave faithful out, or have no factors "
            f"for it ({who}(plain={several[0]!r}))."
        )
    return found
