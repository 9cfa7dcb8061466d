"""Losses of one example that depend on the rest of the batch: in-batch negatives, statistics of a batch, its size.

Such a loss is another one in pieces of a batch, next to padding, and has no gradients of single examples. It is found
out once for each loss and shape: outputs whose shapes mix examples, and values of two examples that change with the
outputs of others, tried on random outputs. A normalisation over the batch inside of the model is not looked for.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal

from curvtrain.losses import Loss, SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError
from curvtrain.losses.weighing import RESERVED
from curvtrain.objective.pieces import batch_size

PyTree = Any
Predict = Callable[[PyTree, Any], PyTree]  # (parameters, batch) -> outputs

_APART = {cls.values for cls in (SoftmaxCrossEntropy, SigmoidCrossEntropy, SquaredError)}  # known not to couple
_FEW, _HALF = 4, 2  # examples of the trial, and those whose values are looked at
_SAME = 1e-6  # relative; values of batches of two sizes are rounded differently
_ROUNDED = 1e-4


def coupling(loss: Loss, predict: Predict, params: PyTree, batch: Any, outputs: PyTree | None = None) -> str:
    """Says what the loss of one example has to do with the others of its batch; empty if nothing was found.

    Args:
      loss: of the outputs.
      predict: the model; traced only, and only where shapes do not tell.
      params, batch: shapes and dtypes are used.
      outputs: their shapes, where they are known.
    """
    if len({jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}) != 1:
        return ""  # groups of unequal length have no examples to be told apart
    n, abstract = batch_size(batch), functools.partial(_resized, batch)
    outputs = jax.eval_shape(predict, params, abstract(n)) if outputs is None else outputs
    leaves = jax.tree_util.tree_leaves_with_path(outputs)
    together = [False] * len(leaves)  # one value for all examples, made of them
    if any(leaf.shape[:1] != (n,) or n in leaf.shape[1:] for _, leaf in leaves):
        jaxpr, twice = jax.make_jaxpr(predict, return_shape=True)(params, abstract(2 * n))
        wide = [leaf.shape for leaf in jax.tree.leaves(twice)]
        for (path, leaf), shape in zip(leaves, wide, strict=True):
            if shape[1:] != leaf.shape[1:]:
                return (
                    f"the outputs{jax.tree_util.keystr(path)} have the shape {leaf.shape} for a batch of {n}: one "
                    f"example's part of them grows with the batch, so its loss depends on the other examples"
                )
        alike = [leaf.shape == shape for (_, leaf), shape in zip(leaves, wide, strict=True)]
        mixed = _tainted(jaxpr.jaxpr, len(jax.tree.leaves(params)))
        together = [same and tainted for same, tainted in zip(alike, mixed, strict=True)]
    else:
        alike = together
    if type(loss).values in _APART:
        return ""
    shape = lambda leaf, whole: (leaf.shape if whole else leaf.shape[1:], leaf.dtype)
    of_outputs = tuple(shape(leaf, whole) for (_, leaf), whole in zip(leaves, alike, strict=True))
    entries = jax.tree_util.tree_leaves_with_path(abstract(1))
    names = lambda path: tuple(str(getattr(part, "key", part)) for part in path)
    of_batch = tuple((names(path), a.shape[1:], a.dtype) for path, a in entries)
    treedefs = jax.tree.structure(outputs), jax.tree.structure(batch)
    arguments = loss, of_outputs, tuple(alike), tuple(together), of_batch, treedefs
    try:
        return _tried(*arguments)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return _tried.__wrapped__(*arguments)


def refused(microbatch: int, why: str) -> ValueError:
    """The error of an objective that would take such a loss in pieces."""
    return ValueError(
        f"Objective(microbatch={microbatch}) would walk a batch in pieces, but {why}: the result would be that of "
        f"another loss. Leave microbatch=None, and use a batch that fits into memory."
    )


def _resized(batch: Any, n: int) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *jnp.shape(a)[1:]), jnp.result_type(a)), batch)


def _tainted(jaxpr: Jaxpr, parameters: int) -> list[bool]:
    """Which outputs of a program depend on its inputs other than the first ones, parameters."""
    seen = set(jaxpr.invars[parameters:])
    reads = lambda atoms: any(not isinstance(atom, Literal) and atom in seen for atom in atoms)
    for eqn in jaxpr.eqns:
        if reads(eqn.invars):
            seen.update(eqn.outvars)
    return [reads([out]) for out in jaxpr.outvars]


@functools.lru_cache(maxsize=256)
def _tried(loss, of_outputs, alike, together, of_batch, treedefs) -> str:
    """The values of two examples among four, with two sets of outputs of the others, and by themselves."""
    rng = np.random.default_rng(0)

    def random(shape, dtype):
        is_float = jnp.issubdtype(dtype, jnp.inexact)
        return np.asarray(rng.normal(size=shape) if is_float else rng.integers(0, 2, shape), dtype)

    def with_others(z, whole, mixed):
        """The same outputs of the first examples, others of the rest."""
        if whole:
            return random(z.shape, z.dtype) if mixed else z
        return np.concatenate([z[:_HALF], random(z[_HALF:].shape, z.dtype)])

    values = jax.jit(lambda z, batch: loss.values(treedefs[0].unflatten(z), treedefs[1].unflatten(batch)))
    differ = lambda a, b, tolerance: not np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    for several in (False, True):  # classes, for losses that look for negatives among them
        batch = [_entry(rng, path, shape, dtype, several) for path, shape, dtype in of_batch]
        z = [
            random(shape if same else (_FEW, *shape), dtype)
            for (shape, dtype), same in zip(of_outputs, alike, strict=True)
        ]
        other = [with_others(*each) for each in zip(z, alike, together, strict=True)]
        fewer = [leaf if same else leaf[:_HALF] for leaf, same in zip(z, alike, strict=True)]
        try:
            with jax.ensure_compile_time_eval():
                among, changed = (np.asarray(values(v, batch), np.float64)[:_HALF] for v in (z, other))
                alone = np.asarray(values(fewer, [a[:_HALF] for a in batch]), np.float64)
        except Exception:  # of the user's own code, for a batch that is not his: tracing shows what it does with that
            return ""
        if differ(among, changed, _SAME):
            return f"the values of {_named(loss)} for one example depend on the outputs of other examples"
        if among.shape != alone.shape or differ(among, alone, _ROUNDED):
            return f"the values of {_named(loss)} for one example depend on the other examples, or on their number"
    return ""


def _entry(rng, path, shape, dtype, several: bool) -> np.ndarray:
    """An entry of a batch of four examples: weights are one, labels zero, or zero and one."""
    shape = (_FEW, *shape)
    if jnp.issubdtype(dtype, jnp.bool_) or any(name in path for name in RESERVED):
        return np.ones(shape, dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return np.asarray(rng.uniform(0.1, 0.9, shape), dtype)
    column = np.arange(_FEW).reshape(-1, *(1,) * (len(shape) - 1)) % 2
    return np.asarray(np.zeros(shape) + column * several, dtype)


def _named(loss: Loss) -> str:
    function = getattr(loss, "function", None)
    inner = getattr(function, "__name__", "")
    return f"{type(loss).__name__}({inner})" if inner else type(loss).__name__
