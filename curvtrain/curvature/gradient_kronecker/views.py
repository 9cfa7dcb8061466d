"""Views say which parameters are matrices with two factors, which have one, and which have none.

| parameter | seen as |
|---|---|
| two axes or more | a matrix of consecutive axes, split where its two factors are the smallest, or as a pattern says |
| leading axes of an `nnx.scan` or `nnx.vmap` | they count matrices |
| vectors, scalars, matrices with both sides above `max_size` | a diagonal |

With a `block_size`, sides are first cut into equal blocks, and each block of a matrix is a matrix of its own. A side
above `max_size` has no factor, which stands for the identity.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain._dtypes import check_real, width
from curvtrain.curvature.matrices import MatrixView, Patterns, matrix_view
from curvtrain.curvature.owners import Matrix
from curvtrain.objective import Path, by_path, path_name

PyTree = Any
Arrays = dict[str, jax.Array]
NAME = "GradientKronecker"


@dataclasses.dataclass(frozen=True)
class Views:
    """All parameters, in the order of their leaves. Static: hashable, without arrays.

    Attributes:
      treedef: the structure of the parameters.
      paths: of their leaves.
      shapes: of their leaves.
      matrices: (how a leaf is seen, which of its two sides have factors); None for a diagonal.
      dtype: of the curvature, as `curvtrain._dtypes.width` chooses it for the parameters.
    """

    treedef: Any
    paths: tuple[Path, ...]
    shapes: tuple[tuple[int, ...], ...]
    matrices: tuple[tuple[MatrixView, tuple[bool, bool]] | None, ...]
    dtype: str

    @classmethod
    def of(
        cls,
        params: PyTree,
        scan_axes: Sequence[int],
        patterns: Patterns,
        max_size: int,
        block_size: int | None,
        one_sided: bool,
    ) -> "Views":
        """Raises TypeError for parameters that are no real numbers, ValueError for a pattern that does not fit."""
        check_real(params, f"Parameters of curvature.{NAME}", "Split a complex one into its real and imaginary part.")
        leaves = by_path(params)
        shapes = tuple(tuple(leaf.shape) for leaf in leaves.values())
        found = []
        for path, shape, axes in zip(leaves, shapes, scan_axes, strict=True):
            view = _view(path_name(path), shape, axes, patterns)
            if view is not None and block_size is not None:
                view = dataclasses.replace(
                    view, blocks=(_cut(view.sides[0], block_size), _cut(view.sides[1], block_size))
                )
            found.append(None if view is None else _with_factors(view, max_size, one_sided))
        return cls(jax.tree.structure(params), tuple(leaves), shapes, tuple(found), width(params).name)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the leaves, in order."""
        return tuple(map(path_name, self.paths))

    @functools.cached_property
    def factored(self) -> tuple[Matrix, ...]:
        """The matrices that have factors, for a layout."""
        seen = [entry for entry in self.matrices if entry is not None]
        return tuple(Matrix(view.name, view.copies, *view.sides, sides) for view, sides in seen)

    def read(self, vector: PyTree) -> tuple[Arrays, Arrays]:
        """(the matrices (K, d_i, d_o) of a vector like the parameters, the leaves that are diagonal), by name."""
        matrices, diagonals = {}, {}
        for name, entry, leaf in zip(self.names, self.matrices, self.treedef.flatten_up_to(vector), strict=True):
            if entry is None:
                diagonals[name] = leaf
            else:
                matrices[name] = entry[0].read(leaf)
        return matrices, diagonals

    def write(self, matrices: Mapping[str, jax.Array], diagonals: Mapping[str, jax.Array]) -> PyTree:
        """The inverse of `read`."""
        pairs = zip(self.names, self.matrices, strict=True)
        leaves = [diagonals[name] if entry is None else entry[0].write(matrices[name]) for name, entry in pairs]
        return self.treedef.unflatten(leaves)

    def like(self) -> PyTree:
        """Shapes and dtypes of a vector like the parameters."""
        return self.treedef.unflatten([jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype)) for shape in self.shapes])


def _view(name: str, shape: tuple[int, ...], scan_axes: int, patterns: Patterns) -> MatrixView | None:
    if math.prod(shape) == 0:
        return None
    if any(re.search(regex, name) for regex, _ in patterns):
        return matrix_view(NAME, name, shape, patterns)
    own = shape[scan_axes:]
    if len(own) < 2:
        return None
    cost = lambda at: math.prod(own[:at]) ** 2 + math.prod(own[at:]) ** 2
    at = min(range(1, len(own)), key=lambda at: (cost(at), -at))
    axes = [f"a{i}" for i in range(len(shape))]
    left, right = axes[scan_axes : scan_axes + at], axes[scan_axes + at :]
    pattern = f"{' '.join(axes)} -> {' '.join([*axes[:scan_axes], ''])}({' '.join(left)}) ({' '.join(right)})"
    return MatrixView(name, shape, pattern, (*shape[:scan_axes], math.prod(own[:at]), math.prod(own[at:])))


def _cut(side: int, block_size: int) -> int:
    """Into how many equal blocks of at most block_size a side is cut; 1 if they would be shorter than half of it."""
    number = next(n for n in range(-(-side // block_size), side + 1) if side % n == 0)
    return number if 2 * (side // number) >= block_size else 1


def _with_factors(view: MatrixView, max_size: int, one_sided: bool) -> tuple[MatrixView, tuple[bool, bool]] | None:
    d_i, d_o = view.sides
    left, right = d_i <= max_size, d_o <= max_size
    if one_sided:
        if min(d_i, d_o) == 1:  # the smaller side's factor is one number
            return None
        left, right = left and d_i <= d_o, right and d_o < d_i
    return (view, (left, right)) if left or right else None
