"""A small perceptron in NumPy, float64, and its gradient written out: for references that know nothing of JAX."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvtrain import optim
from curvtrain._keys import Purpose, fold
from curvtrain.curvature import Diagonal, trees

Arrays = dict[str, np.ndarray]
EXAMPLES = 16


def begin(seed: int = 0) -> Arrays:
    """Parameters of a 3-5-2 perceptron."""
    rng = np.random.default_rng(seed)
    shapes = {"A": (3, 5), "a": (5,), "B": (5, 2), "b": (2,)}
    return {name: rng.normal(size=shape) / np.sqrt(shape[0]) for name, shape in shapes.items()}


def batch_at(step: int) -> tuple[np.ndarray, np.ndarray]:
    """The inputs (EXAMPLES, 3) and targets (EXAMPLES, 2) of a step."""
    rng = np.random.default_rng(1000 + step)
    x = rng.normal(size=(EXAMPLES, 3))
    return x, np.stack([np.sin(x[:, 0] + x[:, 1]), x[:, 2] ** 2], axis=1)


def gradient(theta: Arrays, step: int) -> Arrays:
    """Of the mean of 1/2 |f(x) - y|^2, tanh in between."""
    x, y = batch_at(step)
    h = np.tanh(x @ theta["A"] + theta["a"])
    e = (h @ theta["B"] + theta["b"] - y) / EXAMPLES
    d = (e @ theta["B"].T) * (1 - h**2)
    return {"A": x.T @ d, "a": d.sum(0), "B": h.T @ e, "b": e.sum(0)}


def outputs(theta: Arrays, x: np.ndarray) -> np.ndarray:
    return np.tanh(x @ theta["A"] + theta["a"]) @ theta["B"] + theta["b"]


def loss(theta: Arrays, step: int) -> float:
    """Whose `gradient` is above."""
    x, y = batch_at(step)
    return float(np.mean(0.5 * np.sum((outputs(theta, x) - y) ** 2, axis=1)))


def gauss_newton(theta: Arrays, d: Arrays, step: int) -> float:
    """d^T G d of that loss: the mean of |J d|^2."""
    x, _ = batch_at(step)
    h = np.tanh(x @ theta["A"] + theta["a"])
    Jd = ((1 - h**2) * (x @ d["A"] + d["a"])) @ theta["B"] + h @ d["B"] + d["b"]
    return float(np.mean(np.sum(Jd**2, axis=1)))


def replay(
    tx: optax.GradientTransformation, reference: Callable[[Arrays, Callable[[Arrays, int], Arrays], int], Arrays]
) -> float:
    """The largest relative distance of a parameter from a reference's after 20 steps in float64.

    Args:
      reference: (parameters, gradient, steps) -> parameters, in float64.
    """
    steps, theta = 20, begin()
    right = reference({name: a.copy() for name, a in theta.items()}, gradient, steps)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, theta)
        extended, batch = optax.with_extra_args_support(tx), {"x": jnp.zeros((EXAMPLES, 3))}
        state = extended.init(params)
        update = jax.jit(lambda g, s, p: extended.update(g, s, p, batch=batch))
        for step in range(steps):
            at = {name: np.asarray(a) for name, a in params.items()}
            updates, state = update(jax.tree.map(jnp.asarray, gradient(at, step)), state, params)
            params = optax.apply_updates(params, updates)
    moved = {name: np.abs(np.asarray(params[name]) - right[name]).max() for name in right}
    return max(moved[name] / np.abs(right[name]).max() for name in right)


def noise_of(step: int, draw: int) -> Arrays:
    """Standard normal numbers of a draw of parameters, float64, as the package makes them."""
    with jax.enable_x64(True):
        key = fold(jax.random.fold_in(jax.random.key(step), draw), Purpose.SAMPLE)
        drawn = trees.normal(jax.random.fold_in(key, 0), jax.tree.map(jnp.asarray, begin()))
    return {name: np.asarray(e) for name, e in drawn.items()}


def replay_draws(
    tx: optax.GradientTransformationExtraArgs,
    right: Arrays,
    steps: int,
    samples: int,
    curvature_at: Callable[[int], Arrays] | None = None,
) -> float:
    """The largest relative distance of parameters from a reference's after steps of an optimizer that samples.

    Args:
      tx: the optimizer.
      right: the parameters of the reference, which has the noise of `noise_of`.
      steps, samples: how many.
      curvature_at: the diagonal of a step, if it takes a curvature; zero before the first step.
    """
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, begin())
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
        state, before = tx.init(params), Diagonal(trees.zeros(params))

        @jax.jit
        def one(params, state, before, after, step):
            of = lambda theta, step: gradient(jax.tree.map(np.asarray, theta), int(step))
            look = lambda theta, _: (jnp.zeros(()), jax.pure_callback(of, shapes, theta, step))
            key = jax.random.key(step)
            _, grads, draws = optim.at_draws(look, state, params, key, samples=samples, curvature=before)
            updates, state = tx.update(grads, state, params, curvature=after, draws=draws)
            return optax.apply_updates(params, updates), state

        for step in range(steps):
            after = Diagonal(jax.tree.map(jnp.asarray, curvature_at(step))) if curvature_at else before
            params, state = one(params, state, before, after, step)
            before = after
    return max(np.abs(np.asarray(params[k]) - right[k]).max() / np.abs(right[k]).max() for k in right)
