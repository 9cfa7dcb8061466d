"""One step of the Kronecker family's fit. Symbols as in `base.py`, `layout.py`, `tensors.py` and `rows.py`; y = P h.

    PRO, QUAD, QEQ   T1 = contract_i(y)       T2 = contract_i(v),        whitening (N / n_i) I
    QEP              T1 = contract_i(Q_i y)   T2 = contract_i(Q_i v),    whitening (N / n_i) Q_i Q_i^T
    EQ               T1 = contract_i(Q h)     T2 = contract_i(Q^-T v),   whitening Q_i^-T Q_i^-1 prod_j |Q_j^-1|_F^2

Products with tensors are made bucket by bucket. All that is done to factors is done to the rows of a group at once, and
all that is one number of a factor or a tensor to all of them: the compiled program does not grow with their number.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvtrain.curvature.psgd.base import TINY, usable
from curvtrain.curvature.psgd.geometry import step_dense, step_diagonal, triangular_inverse
from curvtrain.curvature.psgd.layout import Bucket
from curvtrain.curvature.psgd.rows import Group, Rows
from curvtrain.curvature.psgd.tensors import Factors, along, contract, masked, multiply, multiply_side

PyTree = Any
Damp = Callable[[jax.Array, jax.Array], jax.Array]

_SMALLEST = 1e-30  # of the largest entry of a factor that is balanced


@dataclasses.dataclass(frozen=True)
class KronFit:
    """The options of a step.

    Attributes:
      geometry, order, lipschitz_decay: as in `Kron`.
      dtype: in which factors are stored.
      scales: whether the first observation of a tensor sets the scale of its factors.
      damp: `(h, seed) -> h` with noise.
      floored: whether there is noise under the observations.
    """

    geometry: str
    order: str
    lipschitz_decay: float
    dtype: Any
    scales: bool
    damp: Damp
    floored: bool

    def step(
        self,
        buckets: Sequence[Bucket],
        states: Sequence[PyTree],
        V: Sequence[jax.Array] | None,
        H: Sequence[jax.Array],
        seeds: jax.Array,
        floors: Sequence[jax.Array],
        rate: jax.Array,
        together: bool,
    ) -> tuple[list[PyTree], jax.Array]:
        """One step of the factors of some buckets.

        Args:
          states: of each bucket: {"Q", "P", "L": {side: array}, "seen": (L,)}.
          V, H: for each bucket (k, L, *sides).
          seeds: uint32 (buckets,), of the noise.
          floors: for each bucket (L,), the size of the noise under the observations of each tensor.
          together: as in `Rows`.

        Returns:
          (the new states, how many tensors were left as they were because something was not finite).
        """
        rows = Rows(buckets, together)
        dtype = H[0].dtype
        Q, P, L = (
            [_listed(bucket, s[name], dtype) for bucket, s in zip(buckets, states, strict=True)] for name in "QPL"
        )
        P = [[_stored(*pair) for pair in zip(p, q, strict=True)] for p, q in zip(P, Q, strict=True)]
        seen = jnp.concatenate([state["seen"] for state in states])
        largest = jnp.concatenate([jnp.max(jnp.abs(h), axis=_of_each(h)) for h in H])
        used = largest != 0
        floor, first = jnp.concatenate(floors), used & ~seen
        scale = self._scale(buckets, V, H, largest, first, floor) if self.scales else None

        noisy = [masked(b, self.damp(h, seed)) for b, h, seed in zip(buckets, H, seeds, strict=True)]
        old = [group.gather(Q) for group in rows.groups]
        start = old if scale is None else self._scaled(rows, old, scale)
        T = self._conditions(rows, start, P, V, noisy, scale)
        if self.floored:
            seen_by_P = floor if scale is None or self.geometry == "EQ" else floor * scale  # P has not been scaled yet
            more = self._floored(rows, start, P, seen_by_P)
            T = [(T1 + own, T2) for (T1, T2), own in zip(T, more, strict=True)]
        bounds = rows.of_groups([group.gather(L) for group in rows.groups])
        new, bounds_of_new = [], []
        for group, q, (T1, T2), bound in zip(rows.groups, start, T, rows.per_group(bounds), strict=True):
            one = step_dense if group.dense else step_diagonal
            q, bound = one(self.geometry, q, T1, T2, rate, bound, self.lipschitz_decay, order=self.order)
            new.append(q)
            bounds_of_new.append(bound)

        new, fine = self._balanced(rows, new, rows.of_groups(bounds_of_new))
        accepted = used & jnp.isfinite(largest) & fine
        chosen = rows.of_tensors(accepted)
        bounds = rows.per_group(jnp.where(chosen, rows.of_groups(bounds_of_new), bounds))
        out = {name: [[None] * len(bucket.sides) for bucket in buckets] for name in "QPL"}
        for group, q, before, take, bound in zip(rows.groups, new, old, rows.per_group(chosen), bounds, strict=True):
            q = jnp.where(_wide(take, q), q, before).astype(self.dtype)
            group.spread(q, out["Q"])
            group.spread(bound, out["L"])
            if group.dense:
                group.spread(square(q.astype(bound.dtype)).astype(self.dtype), out["P"])
        counts = np.cumsum([bucket.count for bucket in buckets])[:-1]
        found = [
            {name: _filed(out[name][index]) for name in "QPL"} | {"seen": flags}
            for index, flags in enumerate(jnp.split(seen | accepted, counts))
        ]
        return found, jnp.sum(used & ~accepted, dtype=jnp.int32)

    def _scale(self, buckets, V, H, largest: jax.Array, first: jax.Array, floors: jax.Array) -> jax.Array:
        """(tensors,), the `initial_scale` of P of the tensors whose first observation this is; 1 for the others."""
        total = lambda X: jnp.concatenate([jnp.sum(jnp.square(x), axis=_of_each(x)) for x in X])

        def found():
            if V is not None:
                scale = jnp.sqrt(total(V) / total(H))
            else:
                top = jnp.maximum(largest, TINY)  # keeps a fourth power from overflow
                tops = jnp.split(top, np.cumsum([bucket.count for bucket in buckets])[:-1])
                entries = np.concatenate(
                    [np.full(b.count, float(len(h) * b.entries)) for b, h in zip(buckets, H, strict=True)]
                )
                fourth = total([jnp.square(h / along(t, h.ndim, 1)) for h, t in zip(H, tops, strict=True)])
                scale = (fourth / jnp.asarray(entries, top.dtype)) ** -0.25 / top
            return jnp.where(first, usable(scale, floors), 1.0)

        return jax.lax.cond(jnp.any(first), found, lambda: jnp.ones(first.shape, largest.dtype))

    def _scaled(self, rows: Rows, Q: list[jax.Array], scale: jax.Array) -> list[jax.Array]:
        """Q of P times the scale."""
        each = rows.of_tensors(scale ** jnp.asarray(0.5 / rows.factors, scale.dtype))
        return [_wide(s, q) * q for s, q in zip(rows.per_group(each), Q, strict=True)]

    # -- T1 and T2 -----------------------------------------------------------------------------------------------------

    def _conditions(self, rows: Rows, Q, P, V, H, scale) -> list[tuple[jax.Array, jax.Array]]:
        """(T1, T2) of the rows of each group. `Q` is scaled, the factors `P` are not."""
        buckets = rows.buckets
        if self.geometry == "EQ":
            inverses = [_inverse_of(group, q) for group, q in zip(rows.groups, Q, strict=True)]
            A = [multiply(b.sides, q, h) for b, q, h in zip(buckets, _spread(rows, Q), H, strict=True)]
            T1 = self._contracted(rows, A)
            if V is None:
                return list(zip(T1, self._outer(rows, inverses), strict=True))
            turned = _spread(
                rows, [_t(x) if group.dense else x for group, x in zip(rows.groups, inverses, strict=True)]
            )
            B = [multiply(b.sides, x, v) for b, x, v in zip(buckets, turned, V, strict=True)]
            return list(zip(T1, self._contracted(rows, B), strict=True))
        parts = [H] if scale is None else [H, jnp.split(scale, np.cumsum([b.count for b in buckets])[:-1])]
        y = []
        for index, (bucket, h, *s) in enumerate(zip(buckets, *parts, strict=True)):
            h = h if not s else h * along(s[0], h.ndim, 1)
            y.append(multiply(bucket.sides, P[index], h))
        turns = _spread(rows, Q) if self.geometry == "QEP" else None
        T1 = self._contracted(rows, y, turns)
        if V is not None:
            return list(zip(T1, self._contracted(rows, V, turns), strict=True))
        T2 = map(
            functools.partial(self._unit, rows), rows.groups, Q, rows.per_group(jnp.asarray(rows.weight, H[0].dtype))
        )
        return list(zip(T1, T2, strict=True))

    def _floored(self, rows: Rows, Q, P, floor: jax.Array) -> list[jax.Array]:
        """What noise of size `floor` (tensors,) adds to T1, in expectation: of each group's rows.

        Of samples P would learn, by chance, to mix directions in which there is nothing else with all others.
        """
        factors = Q if self.geometry == "EQ" else [group.gather(P) for group in rows.groups]
        others = rows.others(rows.over_rows(jnp.sum, rows.of_groups(self._norms(rows, factors)), 0.0))
        roots = rows.per_group(rows.of_tensors(floor) * rows.of_units(jnp.sqrt(others)))
        found = []
        for group, q, x, root in zip(rows.groups, Q, factors, roots, strict=True):
            x = _wide(root, x) * x  # P_i, or in EQ Q_i, and what is left of the other factors
            if self.geometry == "QEP":
                x = q @ x if group.dense else q * x
            found.append(_whole(rows.mask(group), square(_t(x))) if group.dense else jnp.square(x))
        return found

    def _norms(self, rows: Rows, factors: list[jax.Array]) -> list[jax.Array]:
        """The squared Frobenius norms of rows, without padding."""
        norms = []
        for group, x in zip(rows.groups, factors, strict=True):
            mask = rows.mask(group)
            inside = x if mask is None else x * mask[..., :, None]
            norms.append(jnp.sum(jnp.square(inside), axis=_own(group, x)))
        return norms

    def _contracted(
        self, rows: Rows, X: Sequence[jax.Array], turns: Sequence[Factors] | None = None
    ) -> list[jax.Array]:
        """contract_i(X), or contract_i(Q_i X), of the rows of each group."""
        found: list[Factors] = []
        for index, (bucket, x) in enumerate(zip(rows.buckets, X, strict=True)):
            turn = lambda side, i, x=x, index=index: x if turns is None else multiply_side(side, i, turns[index][i], x)
            found.append([None if s.kind == "none" else contract(s, i, turn(s, i)) for i, s in enumerate(bucket.sides)])
        return [group.gather(found) for group in rows.groups]

    def _unit(self, rows: Rows, group: Group, q: jax.Array, weight: jax.Array) -> jax.Array:
        """T2 of whitening, without v: (N / n_i) I, or, of QEP, (N / n_i) Q_i Q_i^T."""
        weight = _wide(weight, q)
        if not group.dense:
            return weight * (jnp.square(q) if self.geometry == "QEP" else jnp.ones_like(q))
        whole = q @ _t(q) if self.geometry == "QEP" else jnp.broadcast_to(jnp.eye(group.size, dtype=q.dtype), q.shape)
        return weight * _whole(rows.mask(group), whole)

    def _outer(self, rows: Rows, inverses: list[jax.Array]) -> list[jax.Array]:
        """T2 of EQ's whitening."""
        norms, found = self._norms(rows, inverses), []
        others = rows.of_units(rows.others(rows.over_rows(jnp.sum, rows.of_groups(norms), 0.0)))
        for group, x, factor in zip(rows.groups, inverses, rows.per_group(others), strict=True):
            outer = _whole(rows.mask(group), square(x)) if group.dense else jnp.square(x)
            found.append(_wide(factor, x) * outer)
        return found

    # -- after the step ------------------------------------------------------------------------------------------------

    def _balanced(self, rows: Rows, Q: list[jax.Array], bounds: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """(factors of equal size, which make the same P; whether all of a tensor is finite (tensors,)).

        Each factor is scaled to the geometric mean of the largest entries of its tensor's factors.
        """
        sizes = []
        for group, q in zip(rows.groups, Q, strict=True):
            inside = jnp.abs(_whole(rows.mask(group), q) if group.dense else q)
            sizes.append(jnp.max(inside, axis=_own(group, q)))
        largest = rows.over_rows(jnp.max, rows.of_groups(sizes), 0.0)
        logs = jnp.log(jnp.maximum(largest, _SMALLEST))
        mean = rows.over_units(jnp.sum, logs, 0.0) / jnp.asarray(rows.factors, logs.dtype)
        factor = jnp.exp(rows.of_tensors_by_unit(mean) - logs)
        widest = max(group.size for group in rows.groups)
        bad = rows.over_rows(jnp.max, (~jnp.isfinite(bounds)).astype(bounds.dtype), 0.0)
        bad = jnp.where(jnp.isfinite(jnp.square(largest * factor) * widest), bad, 1.0)  # so that P is finite too
        fine = rows.over_units(jnp.max, bad, 0.0) == 0
        each = rows.per_group(rows.of_units(factor))
        return [_wide(f, q) * q for f, q in zip(each, Q, strict=True)], fine


def square(q: jax.Array) -> jax.Array:
    """Q^T Q."""
    return _t(q) @ q


def _stored(p: jax.Array | None, q: jax.Array | None) -> jax.Array | None:
    """The factor of P of a side, where a diagonal one is not stored."""
    return p if p is not None else (None if q is None else jnp.square(q))


def _of_each(h: jax.Array) -> tuple[int, ...]:
    """The axes of a bucket's tensors (k, L, ...), and that of probes."""
    return (0, *range(2, h.ndim))


def _t(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _whole(mask: np.ndarray | None, X: jax.Array) -> jax.Array:
    """X (rows, b, b) with zeros in the rows and columns of padding."""
    return X if mask is None else X * mask[..., :, None] * mask[..., None, :]


def _inverse_of(group: Group, q: jax.Array) -> jax.Array:
    """Q^-1 of triangular or diagonal factors."""
    if not group.dense:
        return 1.0 / q
    return triangular_inverse(q.reshape(-1, group.size, group.size)).reshape(q.shape)


def _own(group: Group, q: jax.Array) -> tuple[int, ...]:
    """The axes of one row."""
    return tuple(range(len(group.lead), q.ndim))


def _wide(numbers: jax.Array, q: jax.Array) -> jax.Array:
    """One number for every row (*lead,), to be multiplied with rows (*lead, ...)."""
    return numbers.reshape(*numbers.shape, *(1,) * (q.ndim - numbers.ndim))


def _spread(rows: Rows, arrays: Sequence[jax.Array]) -> list[Factors]:
    """The rows of each group as the factors of each bucket."""
    out: list[Factors] = [[None] * len(bucket.sides) for bucket in rows.buckets]
    for group, array in zip(rows.groups, arrays, strict=True):
        group.spread(array, out)
    return out


def _listed(bucket: Bucket, filed: dict[str, jax.Array], dtype: Any) -> Factors:
    """One entry for every side, in the dtype of a step, None where there is nothing."""
    factors = [filed.get(str(i)) for i in range(len(bucket.sides))]
    return [None if a is None else a.astype(dtype) for a in factors]


def _filed(factors: Factors) -> dict[str, jax.Array]:
    """The inverse of `_listed`."""
    return {str(i): a for i, a in enumerate(factors) if a is not None}
