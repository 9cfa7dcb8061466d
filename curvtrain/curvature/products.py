"""Matrix-free products with the Hessian, the generalised Gauss-Newton matrix and the Fisher information.

Symbols: theta the parameters, f(theta, x_i) the outputs z_i of example i, l its loss, w_i its weight, W = sum_i w_i,
J_i = d z_i / d theta, H_i = d^2 l / d z_i^2, g_i = J_i^T d l / d z_i the gradient of example i.

| product | matrix |
|---|---|
| `hvp` | d^2/dtheta^2 of sum_i w_i l_i / W |
| `ggnvp` | sum_i w_i J_i^T H_i J_i / W |
| `fvp(fisher="exact")` | sum_i w_i J_i^T E_t[dl dl^T] J_i / W, t from the model: for `curvtrain.losses`, the GGN |
| `fvp(fisher="sampled")` | sum_i w_i g_i g_i^T / W with one target per example drawn from the model |
| `fvp(fisher="empirical")` | sum_i w_i g_i g_i^T / W with the targets of the batch: not the Fisher |

The Hessian of the objective's regulariser, if it has one, is added to each of them, once: it is part of the loss.

For sequence outputs an example is what the loss calls one: a position. All products are taken in float32 (parameters of
another dtype are read exactly, then cast) and walk the batch in `objective.microbatch` pieces.

Pearlmutter (1994), "Fast exact multiplication by the Hessian"; Schraudolph (2002), "Fast curvature matrix-vector
products"; Kunstner et al. (2019), arXiv 1905.12558, on the empirical Fisher.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from curvtrain import _checks
from curvtrain._outputs import floats, with_floats
from curvtrain.curvature import trees
from curvtrain.losses import SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError, unmasked, weight_like
from curvtrain.objective import Objective, safe

PyTree = Any

FISHERS = ("exact", "sampled", "empirical")
PRODUCTS = ("hessian", "ggn")


def hvp(objective: Objective, params: PyTree, vector: PyTree, batch: Any, key: jax.Array | None = None) -> PyTree:
    """H v: the Hessian of the mean loss times `vector`, by forward-over-reverse differentiation.

    Args:
      objective: any objective.
      params: where the Hessian is taken.
      vector: like `params`.
      batch, key: as for `objective.loss`; the key fixes dropout, so that H is one matrix.

    Returns:
      float32, like `params`.
    """

    if objective.in_one_piece(batch):  # divide the loss, not the product: that is as large as the parameters
        gradient = jax.grad(lambda p: objective.loss(p, batch, key))
        return jax.jvp(gradient, (trees.float32(params),), (trees.float32(vector),))[1]  # v → H v

    def product(params, vector, piece, key):
        total = lambda p: objective.total(p, piece, key)
        _, Hv, weight = jax.jvp(jax.grad(total, has_aux=True), (params,), (vector,), has_aux=True)  # v → H v
        return Hv, weight

    return _mean_product(product, objective, params, vector, batch, key)


def ggnvp(objective: Objective, params: PyTree, vector: PyTree, batch: Any, key: jax.Array | None = None) -> PyTree:
    """G v: the generalised Gauss-Newton matrix times `vector`. Positive semi-definite for a convex loss.

    Arguments and result as for `hvp`. Raises TypeError on a loss-only objective.
    """
    objective.require_outputs("ggnvp", "hvp, or Objective.from_model(model, predict, loss)")
    loss = objective.loss_of_outputs

    def product(params, vector, piece, key):
        z, Jv, pull = _linearised_outputs(objective, params, vector, piece, key)
        HJv = loss.hessian_product(z, piece, with_floats(z, Jv))  # Jv → H J v, weights included
        return pull(floats(HJv))[0], jnp.sum(loss.weights(z, piece))  # H J v → J^T H J v

    return _mean_product(product, objective, params, vector, batch, key)


def ggn_gram(
    objective: Objective, params: PyTree, vectors: Sequence[PyTree], batch: Any, key: jax.Array | None = None
) -> jax.Array:
    """V_i^T G V_j for k vectors like the parameters, float32 (k, k): k forward-mode products, and no backward pass.

    Arguments as for `ggnvp`. Raises TypeError on a loss-only objective.
    """
    objective.require_outputs("ggn_gram", "hvp, or Objective.from_model(model, predict, loss)")
    loss = objective.loss_of_outputs
    params = trees.float32(params)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(trees.float32, vectors))

    def sums(piece, key):
        def outputs(p):
            z = objective.predict(p, piece, key)
            return floats(z), z

        _, J, z = jax.linearize(outputs, params, has_aux=True)
        Jv = jax.vmap(J)(stacked)
        HJv = jax.vmap(lambda u: floats(loss.hessian_product(z, piece, with_floats(z, u))))(Jv)  # weights included
        inner = lambda u, h: jnp.einsum("ia,ja->ij", *(x.reshape(len(vectors), -1).astype(jnp.float32) for x in (u, h)))
        with trees.exact():
            return sum(map(inner, Jv, HJv)), jnp.sum(loss.weights(z, piece))

    total, weight = objective.accumulate(sums, batch, key)
    gram = total / safe(weight)
    if objective.regulariser is None:
        return gram
    of_penalty = jax.vmap(lambda v: _penalty_product(objective, params, v))(stacked)
    inner = lambda u, h: u.reshape(len(vectors), -1) @ h.reshape(len(vectors), -1).T
    with trees.exact():
        return sum(map(inner, jax.tree.leaves(stacked), jax.tree.leaves(of_penalty)), gram)


def fvp(
    objective: Objective,
    params: PyTree,
    vector: PyTree,
    batch: Any,
    key: jax.Array | None = None,
    *,
    fisher: str = "exact",
) -> PyTree:
    """F v: the Fisher information times `vector`, exact, sampled or empirical (see the table above).

    Arguments and result as for `hvp`; `fisher="sampled"` needs a key, which also draws the targets. Raises TypeError
    on a loss-only objective, and for a loss that does not say what its distribution is.
    """
    _checks.one_of("fvp(fisher)", fisher, FISHERS)
    objective.require_outputs("fvp", "hvp, or Objective.from_model(model, predict, loss)")
    loss = objective.loss_of_outputs
    if fisher == "exact":
        if not isinstance(loss, SoftmaxCrossEntropy | SigmoidCrossEntropy | SquaredError):
            raise TypeError(
                f"fvp(fisher='exact') knows the distribution of the losses of curvtrain.losses, not of "
                f"{type(loss).__name__}. Use ggnvp, or fisher='sampled' with a loss that defines sample_targets."
            )
        return ggnvp(objective, params, vector, batch, key)  # E_t[dl dl^T] = H_l for these natural parameters
    if why := objective.coupling(params, batch, key):
        raise ValueError(
            f"fvp(fisher={fisher!r}) takes gradients of single examples, but {why}. Use hvp or ggnvp, which are those "
            f"of the loss of the whole batch."
        )
    if fisher == "sampled" and key is None:
        raise ValueError("fvp(fisher='sampled') draws targets from the model and needs a key.")

    def product(params, vector, piece, key):
        z, Jv, pull = _linearised_outputs(objective, params, vector, piece, key)
        targets = loss.sample_targets(z, piece, jax.random.fold_in(key, 1)) if fisher == "sampled" else piece
        w = loss.weights(z, piece)
        values = lambda leaves: jnp.sum(loss.values(unmasked(with_floats(z, leaves), w), targets))
        r = jax.grad(values)(floats(z))  # r_i = dl/dz_i, so g_i = J_i^T r_i
        inner = lambda r, Jv: jnp.sum((r * Jv).astype(jnp.float32), axis=tuple(range(w.ndim, r.ndim)))
        along = sum(map(inner, r, Jv))  # g_i . v
        return pull([(weight_like(w * along, r) * r).astype(r.dtype) for r in r])[0], jnp.sum(w)

    return _mean_product(product, objective, params, vector, batch, key)


def matvec(
    product: str, objective: Objective, params: PyTree, batch: Any, key: jax.Array | None = None
) -> Callable[[PyTree], PyTree]:
    """v -> C v for `product` "hessian" or "ggn", as a linear function of a vector like `params`."""
    _checks.one_of("product", product, PRODUCTS)
    function = hvp if product == "hessian" else ggnvp
    return lambda vector: function(objective, params, vector, batch, key)


def as_matrix(matvec: Callable[[PyTree], PyTree], params: PyTree) -> jax.Array:
    """The dense (n, n) matrix of a linear map, in `ravel_pytree(params)` order. Tests and small problems only."""
    flat, unravel = ravel_pytree(trees.float32(params))
    return jax.lax.map(lambda e: ravel_pytree(matvec(unravel(e)))[0], jnp.eye(flat.size, dtype=flat.dtype)).T


def _linearised_outputs(objective, params, vector, piece, key):
    """(outputs z of one piece, J v, the function u -> J^T u); J v and u are lists of z's floating-point leaves."""

    def outputs(p):
        z = objective.predict(p, piece, key)
        return floats(z), z

    _, pull, z = jax.vjp(outputs, params, has_aux=True)
    Jv = jax.jvp(outputs, (params,), (vector,), has_aux=True)[1]  # v → J v; XLA shares the forward pass with the vjp
    return z, Jv, pull


def _mean_product(product, objective, params, vector, batch, key):
    """Adds `product(params, vector, piece, key) -> (C v, weight)` over the pieces and divides once."""
    params, vector = trees.float32(params), trees.float32(vector)
    total, weight = objective.accumulate(lambda piece, k: product(params, vector, piece, k), batch, key)
    product = trees.scale(1.0 / safe(weight), total)
    return product if objective.regulariser is None else trees.add(product, _penalty_product(objective, params, vector))


def _penalty_product(objective, params, vector):
    """The Hessian of the regulariser times a vector."""
    return trees.float32(jax.jvp(jax.grad(objective.penalty), (params,), (vector,))[1])
