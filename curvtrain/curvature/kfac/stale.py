"""Which factors a refresh factorises: each at an interval of its own, longer while it changes little.

The adaptive rule for stale statistics of SP-NGD, Osawa et al. (2020), arXiv 2002.06015, written from memory of that
paper and not checked against its text. For every factor:

| symbol | meaning |
|---|---|
| X | the factor at this refresh: the present moving average |
| X_1, X_2 | the same factor when it was factorised last, and the time before |
| Delta | the next interval, in refreshes; Delta_1, Delta_2: the last one, and the one before |
| alpha | threshold: X is similar to Y if |X - Y|_F < alpha |Y|_F |

    X not similar to X_1                  Delta = max(1, floor(Delta_1 / 2))
    similar to X_1, not to X_2            Delta = Delta_1
    similar to both                       Delta = Delta_1 + Delta_2           (1, 1, 2, 3, 5, 8, ... of a constant X)

Here every update moves the averages, and only what is made of them gets stale; in the paper statistics are not taken
either in between. Two cases that it does not have: a non-finite result is retried at the next refresh and leaves the
intervals unchanged; a damping that the cached inverses were not made for makes every factor due, and as that is no
evidence of how long a factor may wait, a factor that was not due keeps its interval, which begins anew.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

Arrays = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Staleness:
    """What the rule remembers of each array of factors (L, d, d); without the rule, dictionaries are empty.

    Attributes:
      last, before: X_1 and X_2, (L, d, d); zero, and so similar to nothing, before there was any.
      intervals, intervals_before: Delta_1 and Delta_2, int32 (L,).
      wait: refreshes that each factor is still to sit out, int32 (L,).
      due: bool (L,), whether it was due at the last refresh.
      scale_weights: "ekfac": for each shape of blocks, as `KroneckerFactors.scale_weight`, but one for each slot (L,),
        for they have begun at different refreshes.
    """

    last: Arrays
    before: Arrays
    intervals: Arrays
    intervals_before: Arrays
    wait: Arrays
    due: Arrays
    scale_weights: Arrays

    @classmethod
    def begin(cls, factors: Arrays, scales: Mapping[str, jax.Array]) -> "Staleness":
        """Before the first refresh, at which all are due; of nothing, if there are no factors."""
        of = lambda value, dtype: {size: jnp.full(len(X), value, dtype) for size, X in factors.items()}
        zeros = lambda: {size: jnp.zeros_like(X) for size, X in factors.items()}
        return cls(
            last=zeros(),
            before=zeros(),
            intervals=of(1, jnp.int32),
            intervals_before=of(1, jnp.int32),
            wait=of(0, jnp.int32),
            due=of(False, bool),
            scale_weights={name: jnp.zeros(len(S), S.dtype) for name, S in scales.items()},
        )

    def share(self) -> jax.Array:
        """The share of factors that were due at the last refresh."""
        return jnp.mean(jnp.concatenate(list(self.due.values())), dtype=jnp.float32)

    def refresh(self, forced: jax.Array | bool) -> "Staleness":
        """At a new refresh: `due` says what to factorise; everything, if forced."""
        return dataclasses.replace(self, due={size: (wait <= 0) | forced for size, wait in self.wait.items()})

    def refreshed(self, factors: Arrays, finite: Arrays, alpha: float) -> "Staleness":
        """After a refresh in which all that were due were factorised, some perhaps with a result that is not finite."""
        new: dict[str, Arrays] = {field.name: {} for field in dataclasses.fields(self)}
        for size, X in factors.items():
            X1, X2, D1, D2, wait, due = (getattr(self, name)[size] for name in list(new)[:6])
            done, rule = due & finite[size], due & finite[size] & (wait <= 0)
            like_1, like_2 = similar(X, X1, alpha), similar(X, X2, alpha)
            D = jnp.where(like_1, jnp.where(like_2, D1 + D2, D1), jnp.maximum(D1 // 2, 1))
            pick = lambda mask, a, b: jnp.where(mask[:, None, None], a, b)
            new["last"][size], new["before"][size] = pick(done, X, X1), pick(rule, X1, X2)
            D1, new["intervals_before"][size] = jnp.where(rule, D, D1), jnp.where(rule, D1, D2)
            new["intervals"][size], new["due"][size] = D1, due
            new["wait"][size] = jnp.where(done, D1, jnp.where(due, 1, wait)) - 1
        return Staleness(**new | {"scale_weights": self.scale_weights})


def similar(X: jax.Array, Y: jax.Array, alpha: float) -> jax.Array:
    """Whether |X - Y|_F < alpha |Y|_F, matrix by matrix: (L,). Nothing is similar to zero, or to what is not finite."""
    norm = lambda Z: jnp.linalg.norm(Z, axis=(-2, -1))
    return norm(X - Y) < alpha * norm(Y)
