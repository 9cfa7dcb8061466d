"""Distributions of parameters that optimizers keep in their states, and draws from them.

An optimizer that samples puts a `Posterior` into its own state, as one that consumes a curvature puts a `Request`
there. So whoever has the state can draw, whatever the optimizer is wrapped in (`optax.chain`, `masked`,
`multi_transform`, `inject_hyperparams`, ...). Expectations over draws are those of `draws.py`.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp

from curvtrain.curvature import trees
from curvtrain.curvature.request import Answered
from curvtrain.objective import Path, by_path

PyTree = Any
Noise = Mapping[Path, jax.Array]


class Posterior(abc.ABC):
    """A distribution around the parameters that an optimizer was initialised with: a node of its state."""

    @property
    def wants(self) -> tuple[str, ...]:
        """The statistics of draws that its optimizer's update takes: names of fields of `draws.Draws`."""
        return ()

    @property
    def constants(self) -> tuple[str, ...]:
        """The fields that are numbers of the program: a resumed run takes those of the new program."""
        return ()

    @abc.abstractmethod
    def noise(self, params: Mapping[Path, Any], key: jax.Array, curvature: Any) -> Noise:
        """One draw less the mean, by path, in the dtype of `trees.width`.

        Args:
          params: all parameters by path, for their shapes and dtypes.
          key: decides the draw.
          curvature: what is maintained for the optimizer, or None.
        """

    def with_examples(self, examples: Callable[[], int] | None) -> Self:
        """The same with the number of training examples, where it was left to the Trainer; None: it does not know."""
        return self


def posteriors(opt_state: PyTree, curvature: Any = None) -> list[tuple[Posterior, Any]]:
    """The posteriors in an optimizer's state, abstract or not, each with its curvature."""
    is_end = lambda node: isinstance(node, Posterior | Answered)
    found: list[tuple[Posterior, Any]] = []
    for node in jax.tree.leaves(opt_state, is_leaf=is_end):
        if isinstance(node, Posterior):
            found.append((node, curvature))
        elif isinstance(node, Answered):
            found += posteriors(*node.answer())
    return found


def noise(opt_state: PyTree, params: PyTree, key: jax.Array, curvature: Any = None) -> PyTree:
    """One draw less the mean, like the parameters; zero where no posterior says anything.

    Raises TypeError if there is no posterior in the state.
    """
    found = posteriors(opt_state, curvature)
    if not found:
        raise no_posterior("sample_params")
    leaves, drawn = by_path(params), {}
    for index, (posterior, own) in enumerate(found):
        drawn |= posterior.noise(leaves, jax.random.fold_in(key, index), own)
    width = trees.width(params)
    of = lambda path, leaf: drawn[path] if path in drawn else jnp.zeros(leaf.shape, width)
    return jax.tree.structure(params).unflatten([of(path, leaf) for path, leaf in leaves.items()])


def sample_params(opt_state: PyTree, params: PyTree, key: jax.Array, curvature: Any = None) -> PyTree:
    """Draws parameters from the posteriors in an optimizer's state, whatever it is wrapped in.

    Args:
      opt_state: the state, with the posterior of `optim.ivon` or `optim.vogn` somewhere in it.
      params: the means.
      key: decides the draw.
      curvature: what is maintained for the optimizer; `self_contained` has its own.

    Returns:
      Parameters like `params`, in their dtypes. Those that no posterior covers are as they were.

    Raises:
      TypeError: a state without a posterior; no curvature, where one is needed.
    """
    return moved(params, noise(opt_state, params, key, curvature))


def no_posterior(function: str) -> TypeError:
    """The error about a state without a posterior."""
    return TypeError(
        f"{function}(opt_state): there is no posterior in this state, so there is nothing to draw from. Pass the state "
        f"of an optimizer that samples, as its init and update return it."
    )


def moved(params: PyTree, by: PyTree) -> PyTree:
    """The parameters and a vector added up, in the parameters' dtypes."""
    return jax.tree.map(lambda p, n: (p.astype(n.dtype) + n).astype(p.dtype), params, by)


def with_examples(opt_state: PyTree, examples: Callable[[], int] | None) -> PyTree:
    """The state whose posteriors know the number of training examples, where they were not told any.

    Args:
      opt_state: as the optimizer's init made it.
      examples: counts them; None where nobody can.
    """
    is_posterior = lambda node: isinstance(node, Posterior)
    fill = lambda node: node.with_examples(examples) if is_posterior(node) else node
    return jax.tree.map(fill, opt_state, is_leaf=is_posterior)


def wanted(opt_state: PyTree) -> frozenset[str]:
    """The statistics of the draws that some update will want."""
    return frozenset(name for posterior, _ in posteriors(opt_state) for name in posterior.wants)


def own_part(vector: PyTree, like: PyTree) -> PyTree:
    """The leaves of a vector over all parameters that a tree like some of them has, which may have holes."""
    have = by_path(vector)
    return jax.tree.structure(like).unflatten([have[path] for path in by_path(like)])


# -- whoever samples ---------------------------------------------------------------------------------------------------

Sampler = Callable[[PyTree, PyTree, jax.Array, Any], tuple[PyTree, PyTree]]


@runtime_checkable
class _Samples(Protocol):
    """An optimizer with a function that draws."""

    @property
    def sample(self) -> Callable[..., PyTree]: ...


def sampler_of(tx: Any, opt_state: PyTree) -> Sampler | None:
    """How an optimizer draws parameters; None if it does not.

    Args:
      tx: the optimizer. If it has a `sample(opt_state, params, key, curvature)` and no posterior in its state, that is
        asked.
      opt_state: its state, abstract or not.

    Returns:
      A function `(opt_state, params, key, curvature) -> (parameters, noise)`, where noise, the distance from the mean,
      has all digits that the parameters' dtype has not.
    """
    if posteriors(opt_state):

        def drawn(opt_state, params, key, curvature):
            by = noise(opt_state, params, key, curvature)
            return moved(params, by), by

        return drawn
    if not isinstance(tx, _Samples):
        return None
    own = tx.sample

    def asked(opt_state, params, key, curvature):
        theta = own(opt_state, params, key, curvature)
        return theta, jax.tree.map(lambda t, p: trees.wide(t) - trees.wide(p), theta, params)

    return asked
