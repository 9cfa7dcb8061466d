"""Fits absorb a gradient into factors, and a refresh makes new bases of them. Symbols as in `factors.py`.

    ema    A <- A + (G G^T - A) / w,    w = 1 + decay w: the debiased moving average
    kl     A <- decay A + (1 - decay) G B^-1 G^T / d_o,    B <- decay B + (1 - decay) G^T A^-1 G / d_i

the latter with the other factor as it was, and its inverse in the basis, Q_B diag(1 / beta) Q_B^T. Wherever alpha and
beta are used they are kept up to date: they are diag(Q^T A Q) at all times, so that a direction that is new since the
last refresh is none without a value, and is not blown up by a root of nothing.

The factors of "kl" begin as s I, for which s^2 is the mean square of the first gradient: C then has its size, and no
absolute number has to be chosen. (The authors' code begins with 0.1 and steps only from the second gradient on.) The
share of a gradient that is much larger than C expects, `SURPRISE`, is smaller than 1 - decay.
"""

from typing import Any

import jax
import jax.numpy as jnp

from curvtrain.curvature import stacks
from curvtrain.curvature.gradient_kronecker.factors import rotated
from curvtrain.curvature.kfac.finite import keep_finite, outside, positive

PyTree = Any

SURPRISE = 10.0  # mean square of a whitened gradient, which should be 1, from which it moves the factors less
LEAST = 1e-5  # of the mean of a factor's values: what a smaller one counts as where it is inverted


def ema(A, B, G, *, weight: jax.Array) -> tuple[PyTree, PyTree]:
    """Both factors (k, d, d) after a gradient G (k, d_i, d_o)."""
    left, right = _factored(A, B, G)
    moved = lambda old, new: old + (new - old) / weight
    return {"factors": moved(A, G @ _t(G)) if left else A}, {"factors": moved(B, _t(G) @ G) if right else B}


def ema_with_values(A, B, QA, QB, alpha, beta, G, *, weight: jax.Array) -> tuple[PyTree, PyTree]:
    """Both factors and their values (k, d) after a gradient."""
    (left, right), sides = _factored(A, B, G), ema(A, B, G, weight=weight)
    moved = lambda old, new: old + (new - old) / weight
    if left:
        alpha = moved(alpha, jnp.sum(jnp.square(_t(QA) @ G), axis=-1))
    if right:
        beta = moved(beta, jnp.sum(jnp.square(G @ QB), axis=-2))
    return sides[0] | {"values": alpha}, sides[1] | {"values": beta}


def kl(A, B, QA, QB, alpha, beta, G, *, decay: float) -> tuple[PyTree, PyTree]:
    """Both factors (k, d, d) and their values (k, d) after a gradient."""
    (left, right), (_, d_i, d_o) = _factored(A, B, G), G.shape
    s = jnp.mean(jnp.square(G), axis=(-2, -1))
    s = jnp.sqrt(s) if left and right else s
    A, alpha = _begun(A, alpha, s) if left else (A, alpha)
    B, beta = _begun(B, beta, s) if right else (B, beta)
    in_basis = rotated(QA, G, QB, back=True)
    root = lambda values, used: _root_of_inverse(values) if used else jnp.ones_like(values)
    in_A, in_B = in_basis * root(beta, right)[:, None, :], in_basis * root(alpha, left)[:, :, None]
    share = jnp.full(len(G), 1 - decay, G.dtype)
    if left and right:  # both factors would take up the size of an unusual gradient, C twice of it
        whitened = in_A * root(alpha, left)[:, :, None]
        share = share / jnp.sqrt(jnp.maximum(1, jnp.mean(jnp.square(whitened), axis=(-2, -1)) / SURPRISE))
    moved = lambda old, new: decay * old + share.reshape(-1, *[1] * (old.ndim - 1)) * new
    sides: list[PyTree] = [{"factors": A, "values": alpha}, {"factors": B, "values": beta}]
    if left:
        X, new = QA @ in_A, jnp.mean(jnp.square(in_A), axis=-1)
        sides[0] = {"factors": moved(A, X @ _t(X) / d_o), "values": moved(alpha, new)}
    if right:
        X, new = in_B @ _t(QB), jnp.mean(jnp.square(in_B), axis=-2)
        sides[1] = {"factors": moved(B, _t(X) @ X / d_i), "values": moved(beta, new)}
    return _balanced(*sides) if left and right else (sides[0], sides[1])


def _balanced(left: PyTree, right: PyTree) -> tuple[PyTree, PyTree]:
    """c A and B / c, for which the mean values of both are the same: the same C.

    Nothing else holds c: where some directions never have a gradient, one factor would go to zero and one to infinity.
    """
    means = [jnp.mean(side["values"], axis=-1, keepdims=True) for side in (left, right)]
    begun = (means[0] > 0) & (means[1] > 0)
    c = jnp.where(begun, jnp.sqrt(means[1]) / jnp.sqrt(jnp.where(begun, means[0], 1)), 1)
    scaled = lambda side, c: {"factors": side["factors"] * c[:, :, None], "values": side["values"] * c}
    return scaled(left, c), scaled(right, 1 / c)


def _begun(X: jax.Array, values: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A factor and its values, which are s I and s where there is nothing yet."""
    new = ~jnp.any(values > 0, axis=-1)
    eye = jnp.eye(X.shape[-1], dtype=X.dtype)
    return (
        jnp.where(new[:, None, None], s[:, None, None] * eye, X),
        jnp.where(new[:, None], s[:, None], values),
    )


def _root_of_inverse(values: jax.Array) -> jax.Array:
    """values^(-1/2) (k, d), where none counts as less than `LEAST` of their mean; 0 where all are 0.

    Along a direction that has had no gradient for long the value decays to nothing, and the first gradient there would
    make the other factor, and with it C, larger by as much.
    """
    values = jnp.maximum(values, LEAST * jnp.mean(values, axis=-1, keepdims=True))
    return jnp.where(values > 0, jax.lax.rsqrt(jnp.where(values > 0, values, 1)), 0)


def moments(QA, QB, V, G, *, weight: jax.Array) -> jax.Array:
    """V after a gradient."""
    return V + (jnp.square(rotated(QA, G, QB, back=True)) - V) / weight


def carried(QA, QB, new_QA, new_QB, V) -> jax.Array:
    """V in a new basis: the second moments there if those in the old one were uncorrelated.

    With R = Q^T Q_new that is (R_A * R_A)^T V (R_B * R_B): columns of squares sum to 1, so V keeps its sum, and nothing
    gets negative.
    """
    if QA.shape[-1] == V.shape[-2]:
        V = _t(jnp.square(_t(QA) @ new_QA)) @ V
    if QB.shape[-1] == V.shape[-1]:
        V = V @ jnp.square(_t(QB) @ new_QB)
    return V


def bases(method: str, first: jax.Array, given: dict[str, PyTree]) -> Any:
    """New bases of all factors.

    Args:
      method: "qr" or "eigh".
      first: bool (), whether this is the first refresh, at which "qr" has nothing to begin with.
      given: for each size ((factors, values, Q, which rows are padding if any are), which slots are due).

    Returns:
      ({size: (values, Q)}, the old ones where the new are not finite; {size: which are finite (L,)}).
    """
    old = {size: arrays[1:3] for size, (arrays, _) in given.items()}
    rows = {size: arrays[3:] for size, (arrays, _) in given.items()}
    by_eigh = lambda size, X: positive(*stacks.eigh(outside(X, rows[size], -1.0)))  # padding stays first
    by_qr = lambda size, X: stepped(X, old[size][1], rows[size])
    X = {size: arrays[0] for size, (arrays, _) in given.items()}
    if method == "eigh":
        return keep_finite(stacks.in_turn(by_eigh, X), old)
    return keep_finite(
        jax.lax.cond(first, lambda X: stacks.in_turn(by_eigh, X), lambda X: stacks.in_turn(by_qr, X), X), old
    )


def stepped(X: jax.Array, Q: jax.Array, rows: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """(values, Q) after a step of the orthogonal iteration, Q <- qr(X Q), with the largest values first.

    An exact step for columns that are in the order of their eigenvalues; without the sorting, columns that changed
    places would stay mixed.
    """
    X = outside(X, rows, 1.0)
    within = lambda Q: jnp.einsum("lij,lij->lj", Q, X @ Q)
    values = within(Q)
    if rows:
        values = jnp.where(rows[0], jnp.inf, values)  # padding stays first
    order = jnp.argsort(-values, axis=-1)
    Q = stacks.qr(X @ jnp.take_along_axis(Q, order[:, None, :], axis=-1))
    values = jnp.maximum(within(Q), 0.0)
    return jnp.where(rows[0], 0.0, values) if rows else values, Q


def _factored(A: jax.Array, B: jax.Array, G: jax.Array) -> tuple[bool, bool]:
    return A.shape[-1] == G.shape[-2], B.shape[-1] == G.shape[-1]


def _t(X: jax.Array) -> jax.Array:
    return jnp.swapaxes(X, -1, -2)
