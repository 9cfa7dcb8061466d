"""Parameters as matrices, for optimizers that treat them as such: by einops patterns, chosen by the parameters' names.

A pattern such as "h w i o -> (h w i) o" says which axes make the rows and which the columns of a matrix (inputs and
outputs, for the kernels of NNX); axes before these two count matrices. What no pattern says: the last axis makes the
columns, all others the rows.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import einops
import jax
import numpy as np

_CUT = "k (n a) (m b) -> (k n m) a b"
Patterns = Sequence[tuple[str, str]]  # (regular expression, einops pattern)


def check_patterns(argument: str, patterns: Patterns) -> None:
    """Raises TypeError or ValueError unless every entry is a regular expression and an einops pattern."""
    pairs = not isinstance(patterns, str) and isinstance(patterns, Sequence)
    for pair in patterns if pairs else [patterns]:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise TypeError(f"{argument} should be a list of (regular expression, einops pattern) pairs, not {pair!r}.")
        try:
            re.compile(pair[0])
        except re.error as error:
            raise ValueError(f"{argument}: {pair[0]!r} is not a regular expression: {error}.") from error
        if pair[1].count("->") != 1 or "..." in pair[1]:
            raise ValueError(
                f"{argument} of {pair[0]!r} should say how axes become those of matrices, as 'h w i o -> (h w i) o' "
                f"does, not {pair[1]!r}."
            )


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """One parameter as K matrices.

    Attributes:
      name: of the parameter.
      shape: of the parameter.
      pattern: as einops writes it.
      wide: the shape that the pattern makes, whose last two axes are those of the matrices.
      blocks: into how many equal blocks rows and columns are cut; each block is then a matrix of its own.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    wide: tuple[int, ...]
    blocks: tuple[int, int] = (1, 1)

    @property
    def copies(self) -> int:
        """K, how many matrices there are."""
        return math.prod(self.wide[:-2]) * math.prod(self.blocks)

    @property
    def sides(self) -> tuple[int, int]:
        """(rows d_i, columns d_o) of each."""
        return self.wide[-2] // self.blocks[0], self.wide[-1] // self.blocks[1]

    def read(self, x: jax.Array) -> jax.Array:
        """The matrices (K, d_i, d_o) of an array like the parameter."""
        X = einops.rearrange(x, self.pattern).reshape(-1, *self.wide[-2:])
        return X if self.blocks == (1, 1) else einops.rearrange(X, _CUT, n=self.blocks[0], m=self.blocks[1])

    def write(self, X: jax.Array) -> jax.Array:
        """The inverse of `read`."""
        if self.blocks != (1, 1):
            whole, cut = _CUT.split("->")
            X = einops.rearrange(X, f"{cut} -> {whole}", n=self.blocks[0], m=self.blocks[1])
        left, right = self.pattern.split("->")
        sizes = einops.parse_shape(np.broadcast_to(0, self.shape), left)
        return einops.rearrange(X.reshape(self.wide), f"{right} -> {left}", **sizes)


def matrix_view(optimizer: str, name: str, shape: Sequence[int], patterns: Patterns) -> MatrixView:
    """Says how a parameter is seen.

    Raises:
      ValueError: a vector or a scalar, which is no matrix; or a pattern that does not fit the parameter.
    """
    shape = tuple(shape)
    pattern = next((pattern for regex, pattern in patterns if re.search(regex, name)), None)
    if pattern is None:
        if len(shape) < 2:
            raise ValueError(
                f"{optimizer} is for matrices, and {name} has the shape {shape}. Give such parameters another "
                f"optimizer, by optim.route([('kernel', {optimizer}(...)), ('.*', optax.adamw(1e-3))]) for example."
            )
        axes = [f"a{i}" for i in range(len(shape))]
        pattern = f"{' '.join(axes)} -> ({' '.join(axes[:-1])}) {axes[-1]}"
    try:
        wide = jax.eval_shape(lambda x: einops.rearrange(x, pattern), jax.ShapeDtypeStruct(shape, "float32")).shape
        fits = len(wide) >= 2
    except einops.EinopsError as error:
        raise ValueError(
            f"{optimizer}: the pattern {pattern!r} does not fit {name} of shape {shape}: {str(error).splitlines()[0]}"
        ) from error
    if not fits:
        raise ValueError(f"{optimizer}: the pattern {pattern!r} makes no matrices of {name}, but the shape {wide}.")
    return MatrixView(name, shape, pattern, tuple(wide))
