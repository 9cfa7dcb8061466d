"""The nearest orthogonal matrix of an update, by Newton-Schulz iterations: the heart of Muon.

Jordan et al. (2024), "Muon: an optimizer for hidden layers in neural networks"; Polar Express: Amsel et al. (2025),
arXiv 2505.16932.

For M = U S V^T, what comes out is about U V^T: every iteration is an odd polynomial of all singular values at once,

    X <- a X + (b A + c A^2) X,    A = X X^T,    X_0 = M / |M|_F.

Matrices of one shape are iterated together. On a mesh each has one owner, which alone iterates it (the package
`curvature.owners`), so that no device works on, or holds whole, what it does not own.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvtrain import _checks
from curvtrain.curvature import owners, trees
from curvtrain.curvature.matrices import MatrixView, Patterns, check_patterns, matrix_view
from curvtrain.curvature.mesh import mesh_shape
from curvtrain.curvature.owners import Matrix, layout_of, owners_for
from curvtrain.objective import by_path, path_name
from curvtrain.optim.base import transformation

PyTree = Any
Coefficients = tuple[tuple[float, float, float], ...]

# (coefficients of each iteration, by which |M|_F is multiplied before the first)
PRESETS: dict[str, tuple[Coefficients, float]] = {
    "standard": (5 * ((3.4445, -4.7750, 2.0315),), 1.0),  # to 0.68 to 1.13, from 0.01 of the norm on
    "polar_express": (
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        1.02,
    ),  # to 0.85 to 1.14, from 0.001 of the norm on
    "exact": (12 * ((2.0, -1.5, 0.5),), 1.0),  # to 1
}
SCALES = ("none", "muon", "rms", "spectral")
DTYPES = ("float32", "bfloat16")
_SMALLEST = 1e-7  # of a norm that is divided by: what is smaller counts as rounding


def orthogonalize(
    preset: str = "standard",
    *,
    scale: str = "none",
    patterns: Patterns = (),
    dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates of matrices by the nearest orthogonal ones: a link of a chain, for any direction.

        optax.chain(optim.scale_by_psgd(), optim.orthogonalize(), optax.scale_by_learning_rate(0.02))

    Args:
      preset: "standard" (five iterations that blow small singular values up fast and leave all between 0.68 and 1.13),
        "polar_express" (five different polynomials: 0.85 to 1.14) or "exact" (twelve iterations: 1).
      scale: what the result is multiplied by, for d_i inputs and d_o outputs: "none": 1; "muon": sqrt(max(1, d_o/d_i)),
        Jordan's; "rms": 0.2 sqrt(max(d_i, d_o)), with which an update has the RMS of one of Adam's, so that its rates
        and decays may stay (Liu et al. 2025, arXiv 2502.16982); "spectral": sqrt(d_o/d_i), that of muP.
      patterns: (regular expression, einops pattern) pairs which say how parameters are matrices, see `matrices.py`:
        `("blocks/.*kernel", "layer i o -> layer i o")` for scanned layers, `("query/kernel", "i head o -> head i o")`
        for one matrix per head.
      dtype: of the iterations; None: bfloat16 on accelerators, that of the update on CPUs.

    Returns:
      A transformation without state. Its `init` raises ValueError for vectors, and says which.
    """
    check_orthogonalize("orthogonalize", preset, scale, patterns, dtype)

    def init(params):
        _views(params, patterns)
        return optax.EmptyState()

    def update(updates, state, params=None, **extra):
        return orthogonal(updates, preset, scale, patterns, dtype), state

    return transformation(init, update)


def check_orthogonalize(optimizer: str, preset: str, scale: str, patterns: Patterns, dtype: str | None) -> None:
    """Raises TypeError or ValueError about an option."""
    _checks.one_of(f"{optimizer}(preset)", preset, PRESETS)
    _checks.one_of(f"{optimizer}(scale)", scale, SCALES)
    check_patterns(f"{optimizer}(patterns)", patterns)
    if dtype is not None:
        _checks.one_of(f"{optimizer}(dtype)", dtype, DTYPES)


def orthogonal(updates: PyTree, preset: str, scale: str, patterns: Patterns, dtype: str | None) -> PyTree:
    """The orthogonalised updates, times their scale."""
    views = _views(updates, patterns)
    leaves = list(by_path(updates).values())
    given = {view.name: view.read(leaf) for view, leaf in zip(views, leaves, strict=True) if leaf.size}
    if not given:
        return updates
    matrices = tuple(Matrix(view.name, view.copies, *view.sides) for view in views if view.name in given)
    layout = layout_of(matrices, owners_for(matrices, False, mesh_shape()))
    iterate = lambda X: newton_schulz(X, preset, dtype)
    found = dict(owners.to_parameters(owners.by_shape(iterate, layout, (), (given,))))
    new = lambda view, leaf: (view.write(found[view.name]) * _scale(scale, *view.sides)).astype(leaf.dtype)
    out = [new(view, leaf) if leaf.size else leaf for view, leaf in zip(views, leaves, strict=True)]
    return jax.tree.structure(updates).unflatten(out)


def newton_schulz(X: jax.Array, preset: str = "standard", dtype: str | None = None) -> jax.Array:
    """The orthogonalised matrices of (K, d_i, d_o), in the dtype of `trees.width`."""
    coefficients, above = PRESETS[preset]
    X = trees.wide(X)
    whole = X.dtype
    wide = X.shape[-2] > X.shape[-1]
    X = jnp.swapaxes(X, -1, -2) if wide else X  # so that A is the smaller of the two products
    X = X / (above * jnp.linalg.norm(X, axis=(-2, -1), keepdims=True) + _SMALLEST)

    def run(dtype):
        def iteration(X, abc):
            a, b, c = abc
            A = X @ jnp.swapaxes(X, -1, -2)
            return a * X + (b * A + c * (A @ A)) @ X, None

        table = jnp.asarray(coefficients, dtype)
        return lambda X: jax.lax.scan(iteration, X.astype(dtype), table)[0].astype(whole)

    if dtype is None:
        X = jax.lax.platform_dependent(X, cpu=run(whole), default=run(jnp.bfloat16))
    else:
        X = run(jnp.dtype(dtype))(X)
    return jnp.swapaxes(X, -1, -2) if wide else X


def _views(tree: PyTree, patterns: Patterns) -> list[MatrixView]:
    return [matrix_view("orthogonalize", path_name(path), x.shape, patterns) for path, x in by_path(tree).items()]


def _scale(scale: str, d_i: int, d_o: int) -> float:
    return {
        "none": 1.0,
        "muon": math.sqrt(max(1.0, d_o / d_i)),
        "rms": 0.2 * math.sqrt(max(d_i, d_o)),
        "spectral": math.sqrt(d_o / d_i),
    }[scale]
