"""NorMuon: after orthogonalisation, outputs that are always moved far are moved less.

Li et al. (2025), arXiv 2510.05491: v <- b v + (1 - b) mean_i U_ij^2 for each output j; U_j / (sqrt(v_j) + eps), scaled
back to the norm of U.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain.curvature import trees
from curvtrain.curvature.matrices import Patterns, check_patterns, matrix_view
from curvtrain.objective import by_path, path_name
from curvtrain.optim.base import transformation

PyTree = Any

_EPS = 1e-8


class NormuonState(NamedTuple):
    """State of `normuon`.

    Attributes:
      nu: v of each parameter, (K, d_o) for K matrices of d_o outputs.
    """

    nu: PyTree


def normuon(b2: float = 0.95, *, patterns: Patterns = ()) -> optax.GradientTransformationExtraArgs:
    """Divides the updates of each output by the root of their average square, and keeps each matrix's norm.

    A link of a chain, after `orthogonalize`.

    Args:
      b2: decay of the averages, which begin at zero and are not debiased: the norm is kept anyway.
      patterns: as for `orthogonalize`.
    """
    _checks.number_in("normuon(b2)", b2, 0.0, 1.0, open_high=True)
    check_patterns("normuon(patterns)", patterns)
    views = lambda tree: [
        matrix_view("normuon", path_name(path), x.shape, patterns) for path, x in by_path(tree).items()
    ]

    def init(params):
        nu = [jnp.zeros((view.copies, view.sides[1]), trees.width(params)) for view in views(params)]
        return NormuonState(jax.tree.structure(params).unflatten(nu))

    def update(updates, state, params=None, **extra):
        out, new = [], []
        for view, u, v in zip(views(updates), by_path(updates).values(), by_path(state.nu).values(), strict=True):
            U = trees.wide(view.read(u))
            v = b2 * v + (1 - b2) * jnp.sum(jnp.square(U), axis=1) / max(U.shape[1], 1)
            scaled = U / (jnp.sqrt(v) + _EPS)[:, None]
            size = lambda X: jnp.sqrt(jnp.sum(jnp.square(X), axis=(1, 2), keepdims=True))
            norm = size(scaled)
            out.append(view.write(scaled * size(U) / jnp.where(norm > 0, norm, 1.0)).astype(u.dtype))
            new.append(v)
        structure = jax.tree.structure(updates)
        return structure.unflatten(out), NormuonState(structure.unflatten(new))

    return transformation(init, update)
