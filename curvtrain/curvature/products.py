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

For sequence outputs an example is what the loss calls one: a position. All products are taken in float32, or in
float64 where a parameter is (others are read exactly, then cast; see `curvtrain/_dtypes.py`), and walk the batch in
`objective.microbatch` pieces.

Pearlmutter (1994), "Fast exact multiplication by the Hessian"; Schraudolph (2002), "Fast curvature matrix-vector
products"; Kunstner et al. (2019), arXiv 1905.12558, on the empirical Fisher.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from curvtrain import _checks
from curvtrain._dtypes import SPLIT, check_real
from curvtrain._keys import Purpose, fold
from curvtrain._outputs import floats, with_floats
from curvtrain.curvature import trees
from curvtrain.losses import unmasked, weight_like
from curvtrain.objective import Objective, by_path, path_name, safe

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
      Like `params`; float64 where one of them is, otherwise float32.
    """
    _check(params)
    if objective.in_one_piece(batch):  # divide the loss, not the product: that is as large as the parameters
        gradient = jax.grad(lambda p: objective.loss(p, batch, key))
        return jax.jvp(gradient, (trees.wide(params),), (_like(params, vector),))[1]  # v → H v

    def product(params, vector, piece, key):
        def mean(p):
            total, weight = objective.total(p, piece, key)
            return total / safe(weight), weight

        _, Hv, weight = jax.jvp(jax.grad(mean, has_aux=True), (params,), (vector,), has_aux=True)  # v → H v
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
        weight = jnp.sum(loss.weights(z, piece))
        return pull(_mean(floats(HJv), weight))[0], weight  # H J v → J^T H J v

    return _mean_product(product, objective, params, vector, batch, key)


def ggn_gram(
    objective: Objective, params: PyTree, vectors: Sequence[PyTree], batch: Any, key: jax.Array | None = None
) -> jax.Array:
    """V_i^T G V_j for k vectors like the parameters, (k, k): k forward-mode products, and no backward pass.

    Arguments as for `ggnvp`. Raises TypeError on a loss-only objective.
    """
    objective.require_outputs("ggn_gram", "hvp, or Objective.from_model(model, predict, loss)")
    loss = objective.loss_of_outputs
    _check(params)
    dtype = trees.width(params)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(_like(params, vector) for vector in vectors))
    params = trees.wide(params)

    def sums(piece, key):
        def outputs(p):
            z = objective.predict(p, piece, key)
            return floats(z), z

        _, J, z = jax.linearize(outputs, params, has_aux=True)
        Jv = jax.vmap(J)(stacked)
        HJv = jax.vmap(lambda u: floats(loss.hessian_product(z, piece, with_floats(z, u))))(Jv)  # weights included
        inner = lambda u, h: jnp.einsum("ia,ja->ij", *(x.reshape(len(vectors), -1).astype(dtype) for x in (u, h)))
        with trees.exact():
            return sum(map(inner, Jv, HJv)), jnp.sum(loss.weights(z, piece))

    total, weight = objective.accumulate(sums, batch, key)
    gram = total / safe(weight)
    if objective.regulariser is None:
        return gram
    of_penalty = jax.vmap(lambda v: _of_penalty(objective, params, v))(stacked)
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
        if not loss.hessian_is_fisher:
            works = " or ".join(f"fisher={kind!r}" for kind in loss.fishers if kind in FISHERS)
            raise TypeError(
                f"fvp(fisher='exact') knows the distribution of the losses of curvtrain.losses, not of "
                f"{type(loss).__name__}. Use ggnvp, or {works}; or give the loss hessian_is_fisher = True, if it is so."
            )
        return ggnvp(objective, params, vector, batch, key)  # E_t[dl dl^T] = H_l for these natural parameters
    if fisher == "sampled" and not loss.can_sample:
        raise TypeError(
            f"fvp(fisher='sampled') draws targets from the model, and {type(loss).__name__} cannot be sampled: it has "
            f"no sample_targets of its own. Use ggnvp or fisher='empirical', or define it."
        )
    if why := objective.coupling(params, batch, key):
        raise ValueError(
            f"fvp(fisher={fisher!r}) takes gradients of single examples, but {why}. Use hvp or ggnvp, which are those "
            f"of the loss of the whole batch."
        )
    if fisher == "sampled" and key is None:
        raise ValueError("fvp(fisher='sampled') draws targets from the model and needs a key.")

    def product(params, vector, piece, key):
        z, Jv, pull = _linearised_outputs(objective, params, vector, piece, key)
        targets = loss.sample_targets(z, piece, fold(key, Purpose.TARGETS)) if fisher == "sampled" else piece
        w = loss.weights(z, piece)
        if any(leaf.shape[: w.ndim] != w.shape for leaf in floats(z)):
            raise TypeError(
                f"fvp(fisher={fisher!r}) needs outputs that begin with the shape {w.shape} of the loss's values, not "
                f"{[leaf.shape for leaf in floats(z)]}: which of them belong to an example is not known. Use ggnvp."
            )
        values = lambda leaves: jnp.sum(loss.values(unmasked(with_floats(z, leaves), w), targets))
        r = jax.grad(values)(floats(z))  # r_i = dl/dz_i, so g_i = J_i^T r_i
        inner = lambda r, Jv: jnp.sum(trees.wide(r) * trees.wide(Jv), axis=tuple(range(w.ndim, r.ndim)))
        along, weight = sum(map(inner, r, Jv)), jnp.sum(w)  # g_i . v
        return pull(_mean([(weight_like(w * along, r) * r).astype(r.dtype) for r in r], weight))[0], weight

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
    flat, unravel = ravel_pytree(trees.wide(params))
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
    """The mean of `product(params, vector, piece, key) -> (C v of the piece's mean, weight)` over the pieces."""
    _check(params)
    params, vector, dtype = trees.wide(params), _like(params, vector), trees.width(params)

    def whole(Cv):
        return Cv if objective.regulariser is None else trees.add(Cv, _of_penalty(objective, params, vector))

    if objective.in_one_piece(batch):
        return whole(product(params, vector, batch, key)[0])

    def sums(piece, key):
        Cv, weight = product(params, vector, piece, key)
        weight = weight.astype(dtype)
        return trees.scale(weight, Cv), weight

    total, weight = objective.accumulate(sums, batch, key)
    return whole(trees.scale(1.0 / safe(weight), total))


def _of_penalty(objective, params, vector):
    """The Hessian of the regulariser times a vector."""
    return jax.jvp(jax.grad(objective.penalty), (params,), (vector,))[1]


def _mean(cotangents: list[jax.Array], weight: jax.Array) -> list[jax.Array]:
    """Cotangents of a sum over examples as those of the mean: a sum's derivatives overflow in float16."""
    return [(u / safe(weight)).astype(u.dtype) for u in cotangents]


def _like(params: PyTree, vector: PyTree) -> PyTree:
    """A vector in the dtype in which products are taken. Raises ValueError unless it is like the parameters."""
    dtype, want, have = trees.width(params), by_path(params), by_path(vector)
    for path in (*want, *have):
        shapes = [jnp.shape(leaves[path]) if path in leaves else None for leaves in (want, have)]
        if shapes[0] != shapes[1]:
            is_there = [f"has the shape {shape}" if shape is not None else "is absent" for shape in shapes]
            raise ValueError(
                f"The vector of a curvature-vector product should be like the parameters: {path_name(path) or 'it'} "
                f"{is_there[0]} among the parameters, and {is_there[1]} in the vector."
            )
    return jax.tree.map(lambda v: jnp.asarray(v, dtype), vector)


def _check(params: PyTree) -> None:
    check_real(params, "The parameters of a curvature-vector product", SPLIT)
