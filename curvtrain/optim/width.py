"""Rates and weight decay that carry over from a narrow model to a wide one: the scaling of the maximal update (muP).

Hidden units of a wide model are to move in a step as far as those of the narrow one: an update of a matrix (d_i, d_o)
should have a spectral norm proportional to sqrt(d_o / d_i) (Yang, Simon & Bernstein 2023, arXiv 2310.17813, condition
1). What a rate is to be multiplied by depends on what an optimizer makes of a gradient; r_i and r_o are d_i and d_o in
units of the narrow model's:

| rule | the optimizer's update has | factor | optimizers |
|---|---|---|---|
| "entries" | entries of size 1 | 1 / r_i | Adam, AdamW, `fadam`, `rf_adamw`, `rf_rmsprop`, `psgd` |
| "spectral" | spectral norm 1 | sqrt(r_o / r_i) | `muon(scale="none")`, `orthogonalize()`, `soap`, `shampoo` |
| "rms" | spectral norm sqrt(max(d_i, d_o)) | that over sqrt(max(d_i, d_o)), relative | `muon`, whose scale is "rms" |
| "gradient" | the gradient's size | r_o / r_i | SGD |
| "natural" | what lowers the loss by 1 at a rate of 1 | 1 | `kfac`, `natural_gradient` |

Vectors (biases, gains) have the factor 1, and r_o under "gradient". K-FAC's rule is that of Ishikawa & Karakida (2024),
arXiv 2312.12226; it holds as far as the damping is small. Decay that is independent of the rate's factor and falls as
1 / width: Qiu et al. (2025), arXiv 2512.05620. Measured on an MLP of widths 32, 128 and 512 (4 updates, seed 0), hidden
layers' updates move the next ones in proportion to width^0.9 with Adam, ^0.0 with Muon, SOAP and K-FAC, ^0.2 to 0.4
with `shampoo`, and ^0.6 with `kl_shampoo`, which is thus between two rules. The root-free ones, `adafisher`, the
inverse-free and the variational ones were not tried.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import optax

from curvtrain import _checks
from curvtrain.curvature.matrices import Patterns, check_patterns, matrix_view
from curvtrain.objective import by_path, path_name
from curvtrain.optim.base import require_params, transformation

PyTree = Any

# of the sides of a matrix and of the narrow model's
RULES: dict[str, Callable[[int, int, int, int], float]] = {
    "entries": lambda d_i, d_o, b_i, b_o: b_i / d_i,
    "spectral": lambda d_i, d_o, b_i, b_o: math.sqrt(d_o * b_i / (b_o * d_i)),
    "rms": lambda d_i, d_o, b_i, b_o: math.sqrt(d_o * b_i * max(b_i, b_o) / (b_o * d_i * max(d_i, d_o))),
    "gradient": lambda d_i, d_o, b_i, b_o: d_o * b_i / (b_o * d_i),
    "natural": lambda d_i, d_o, b_i, b_o: 1.0,
}


def scale_by_width(
    base: int | PyTree, rule: str = "entries", *, weight_decay: float = 0.0, patterns: Patterns = ()
) -> optax.GradientTransformationExtraArgs:
    """Scales updates so that a rate that was tuned on a narrow model is right for a wide one.

        narrow = nnx.eval_shape(lambda: nnx.state(Model(width=64, rngs=nnx.Rngs(0)), nnx.Param))
        tx = optax.chain(
            optax.scale_by_adam(),
            optim.scale_by_width(narrow, "entries", weight_decay=0.1),
            optax.scale_by_learning_rate(3e-3),  # the best one at width 64
        )

    A rate carries over if outputs do not depend on the width either: divide those of the last layer, or its initial
    weights, by r_i. For an optimizer with a rate of its own, chain it behind, without decay: `optax.chain(optim.soap(
    3e-3, weight_decay=0.0), optim.scale_by_width(narrow, "spectral"))`.

    Args:
      base: the narrow model's parameters, of the same structure (shapes are enough); or its width, which then stands
        for both sides of every matrix: of an input layer the factor is another one, the same for all widths.
      rule: what the optimizer's updates are like, one of the table above.
      weight_decay: lambda; lambda theta / r_i is added to the scaled update, in front of the rate.
      patterns: how tensors of more axes are matrices, as for `orthogonalize`.

    Raises:
      TypeError, ValueError: when built with a bad argument; in `init`, a base of other parameters.
    """
    _checks.one_of("scale_by_width(rule)", rule, list(RULES))
    _checks.number_in("scale_by_width(weight_decay)", weight_decay, 0.0)
    check_patterns("scale_by_width(patterns)", patterns)
    if not jax.tree.leaves(base) or isinstance(base, bool | float | str):
        raise TypeError(f"scale_by_width(base) should be a width or the narrow model's parameters, not {base!r}.")
    is_width = isinstance(base, numbers.Integral)
    if is_width:
        _checks.positive_int("scale_by_width(base)", base)

    def factors(tree: PyTree) -> tuple[PyTree, PyTree]:
        """(the factor of each update, and of each parameter's decay)."""
        ours, structure = by_path(tree), jax.tree.structure(tree)
        theirs = None if is_width else by_path(base)
        scales, decays = [], []
        for path, leaf in ours.items():
            name, shape = path_name(path), tuple(leaf.shape)
            d_i, d_o = _sides(name, shape, patterns)
            if theirs is None:
                b_i, b_o = (base if len(shape) > 1 else 1), base
            elif path in theirs and len(theirs[path].shape) == len(shape):
                b_i, b_o = _sides(name, tuple(theirs[path].shape), patterns)
            else:
                found = "has none of that name" if path not in theirs else f"has the shape {theirs[path].shape}"
                raise ValueError(
                    f"scale_by_width(base): {name} has the shape {shape}, and in base it {found}. Give the parameters "
                    f"of the same model at another width."
                )
            is_matrix = len(shape) > 1
            scales.append(RULES[rule](d_i, d_o, b_i, b_o) if is_matrix or rule == "gradient" else 1.0)
            decays.append(weight_decay * b_i / d_i)
        return structure.unflatten(scales), structure.unflatten(decays)

    def init(params):
        factors(params)
        return optax.EmptyState()

    def update(updates, state, params=None, **extra):
        scales, decays = factors(updates)
        scaled = jax.tree.map(lambda u, s: (u * s).astype(u.dtype), updates, scales)
        if _checks.is_off(weight_decay):
            return scaled, state
        require_params("scale_by_width", params)
        return jax.tree.map(lambda u, p, d: u + (d * p).astype(u.dtype), scaled, params, decays), state

    return transformation(init, update)


def _sides(name: str, shape: tuple[int, ...], patterns: Patterns) -> tuple[int, int]:
    """(d_i, d_o), at least 1; of a vector (1, its length)."""
    if len(shape) < 2:
        return 1, max(math.prod(shape), 1)
    d_i, d_o = matrix_view("scale_by_width", name, shape, patterns).sides
    return max(d_i, 1), max(d_o, 1)
