"""One step of one factor Q, in each of the geometries (the rules by which a step stays on a group of matrices).

Symbols as in `base.py`. All functions take matrices (..., d, d), or diagonals (..., d), and step each by its own bound.

| geometry | dense factor | diagonal factor | Q stays |
|---|---|---|---|
| PRO ("Q0.5EQ1.5") | a Procrustes rotation of Q - sigma E Q | q (1 - sigma E) | almost symmetric positive definite |
| QUAD | X = Q - sigma/2 E Q; X - sigma/2 X E, symmetrised | q (1 - sigma E / 2)^2 | symmetric |
| EQ | Q - sigma triu(E) Q | q (1 - sigma E) | upper triangular |
| QEQ | Q - sigma Q E | q (1 - sigma E) | invertible |
| QEP | Q - sigma E Q | q (1 - sigma E) | invertible |

Only EQ solves with Q; the others are made of matrix products. The order "1st" takes the size of E, for EQ that of
triu(E).
"""

import jax
import jax.numpy as jnp

from curvtrain.curvature.psgd.base import TINY, running_bound, step_length

GEOMETRIES = ("PRO", "QUAD", "EQ", "QEQ", "QEP")


def step_dense(
    geometry: str,
    Q: jax.Array,
    T1: jax.Array,
    T2: jax.Array,
    rate: jax.Array,
    L: jax.Array,
    decay: float,
    order: str = "bounded",
) -> tuple[jax.Array, jax.Array]:
    """(the new Q (..., d, d), the new L (...)), for T1 and T2 like Q."""
    present = spectral_bound(T1 + T2)
    L, E = running_bound(L, present, decay), T1 - T2
    if order == "1st":
        present = direction_bound(jnp.triu(E) if geometry == "EQ" else E)
    E = step_length(rate, L if order == "bounded" else present)[..., None, None] * E  # with sigma
    if geometry == "EQ":
        Q = Q - jnp.triu(E) @ Q
    elif geometry == "QEP":
        Q = Q - E @ Q
    elif geometry == "QEQ":
        Q = Q - Q @ E
    elif geometry == "QUAD":
        X = Q - 0.5 * (E @ Q)
        X = X - 0.5 * (X @ E)
        Q = 0.5 * (X + _t(X))
    else:
        Q = procrustes(Q - E @ Q)
    return Q, L


def step_diagonal(
    geometry: str,
    q: jax.Array,
    T1: jax.Array,
    T2: jax.Array,
    rate: jax.Array,
    L: jax.Array,
    decay: float,
    axes: tuple[int, ...] = (-1,),
    order: str = "bounded",
) -> tuple[jax.Array, jax.Array]:
    """(the new q, the new L) for q, T1, T2 of one shape, and L without the `axes` of q."""
    present = jnp.max(T1 + T2, axis=axes, initial=0.0)
    L, E = running_bound(L, present, decay), T1 - T2
    if order == "1st":
        present = jnp.max(jnp.abs(E), axis=axes, initial=0.0)
    E = jnp.expand_dims(step_length(rate, L if order == "bounded" else present), axes) * E
    return q * (jnp.square(1.0 - 0.5 * E) if geometry == "QUAD" else 1.0 - E), L


def procrustes(Q: jax.Array) -> jax.Array:
    """Q rotated towards the nearest symmetric positive definite matrix, to second order in the rotation.

    The rotation exp(a R) along R = Q^T - Q raises tr Q the most at a = -tr(R Q) / tr(R^2 Q), and is kept to an eighth.
    |R| is taken as |R|_F / sqrt(2), which bounds the norm of an antisymmetric matrix from above: close to symmetry,
    where a fit stays, the eighth is never reached.
    """
    R = _t(Q) - Q
    M = R @ Q
    t1, t2 = jnp.trace(M, axis1=-2, axis2=-1), jnp.sum(_t(R) * M, axis=(-2, -1))  # tr(R Q), tr(R^2 Q)
    longest = 0.125 / jnp.maximum(jnp.sqrt(0.5 * jnp.sum(jnp.square(R), axis=(-2, -1))), TINY)
    a = jnp.where(t2 < 0, jnp.minimum(-t1 / jnp.where(t2 < 0, t2, -1.0), longest), longest)[..., None, None]
    return Q + a * (M + 0.5 * a * (R @ M))


def spectral_bound(A: jax.Array) -> jax.Array:
    """A lower bound (...) of the spectral norm of symmetric positive semi-definite A (..., d, d).

    Three products with a vector that starts as the row of the largest diagonal entry: that row is as long as any entry
    of A is large, and is not orthogonal to the leading eigenvectors by accident of a fixed start.
    """
    diagonal = jnp.diagonal(A, axis1=-2, axis2=-1)
    scale = jnp.max(diagonal, axis=-1)
    row = jnp.argmax(diagonal, axis=-1)
    x = jnp.take_along_axis(A, row[..., None, None], axis=-2)[..., 0, :]
    for _ in range(3):
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), TINY)
        x = jnp.einsum("...ab,...b->...a", A, x)
    return jnp.maximum(jnp.linalg.norm(x, axis=-1), scale)


def direction_bound(A: jax.Array) -> jax.Array:
    """`spectral_bound` of any A, by way of A^T A."""
    scale = jnp.maximum(jnp.max(jnp.abs(A), axis=(-2, -1), keepdims=True), TINY)
    A = A / scale
    return scale[..., 0, 0] * jnp.sqrt(spectral_bound(_t(A) @ A))


def triangular_inverse(U: jax.Array) -> jax.Array:
    """U^-1 of upper triangular matrices (L, d, d); on CPUs one after the other, for the reasons in `stacks.py`."""
    eye = jnp.eye(U.shape[-1], dtype=U.dtype)
    solve = lambda U: jax.scipy.linalg.solve_triangular(U, jnp.broadcast_to(eye, U.shape), lower=False)
    return jax.lax.platform_dependent(U, cpu=lambda U: jax.lax.map(solve, U), default=solve)


def _t(X: jax.Array) -> jax.Array:
    return jnp.swapaxes(X, -1, -2)
