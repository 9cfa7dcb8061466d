"""Muon: momentum, orthogonalised, for hidden matrices; AdamW for everything else.

Jordan et al. (2024); the scale of its updates: Liu et al. (2025), arXiv 2502.16982.
"""

import re
from typing import Any

import jax
import optax

from curvtrain import _checks
from curvtrain.curvature.matrices import Patterns
from curvtrain.objective import by_path, path_name
from curvtrain.optim.normuon import normuon
from curvtrain.optim.orthogonalize import check_orthogonalize, orthogonalize

PyTree = Any

OTHERS = "embed|position|head"  # what counts as no hidden matrix, by its name


def muon(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.95,
    *,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    preset: str = "standard",
    scale: str = "rms",
    patterns: Patterns = (),
    normalize: float | None = None,
    others: str = OTHERS,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    adam_eps: float = 1e-8,
    dtype: str | None = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Orthogonalised momentum for hidden matrices, AdamW for vectors, embeddings and the output layer.

    Args:
      learning_rate: a number or an optax schedule. With scale="rms" rates of AdamW's size, with "muon" about 0.02.
      b1: decay of the momentum.
      nesterov: whether the momentum looks one step ahead.
      weight_decay: decoupled, of all parameters.
      preset, scale, patterns, dtype: as for `orthogonalize`.
      normalize: decay of NorMuon's averages of the rows' squares, e.g. 0.95 (see `normuon`); None: no such averages.
      others: a regular expression, searched in the parameters' names: which go to AdamW although they are matrices.
      adam_learning_rate: AdamW's; None: the same one.
      adam_b1, adam_b2, adam_eps: AdamW's.
      mu_dtype: of the momentum; None for the gradients' own.
    """
    check_orthogonalize("muon", preset, scale, patterns, dtype)
    if not callable(learning_rate):
        _checks.number_in("muon(learning_rate)", learning_rate, 0.0)
    _checks.number_in("muon(b1)", b1, 0.0, 1.0, open_high=True)
    _checks.number_in("muon(weight_decay)", weight_decay, 0.0)
    if adam_learning_rate is not None and not callable(adam_learning_rate):
        _checks.number_in("muon(adam_learning_rate)", adam_learning_rate, 0.0)
    for name, decay in (("normalize", normalize), ("adam_b1", adam_b1), ("adam_b2", adam_b2)):
        if decay is not None:
            _checks.number_in(f"muon({name})", decay, 0.0, 1.0, open_high=True)
    _checks.number_in("muon(adam_eps)", adam_eps, 0.0)
    try:
        pattern = re.compile(others)
    except re.error as error:
        raise ValueError(f"muon(others): {others!r} is not a regular expression: {error}.") from error
    links = [
        optax.trace(b1, nesterov, accumulator_dtype=mu_dtype),
        orthogonalize(preset, scale=scale, patterns=patterns, dtype=dtype),
    ]
    if normalize is not None:
        links.append(normuon(normalize, patterns=patterns))
    if not _checks.is_off(weight_decay):
        links.append(optax.add_decayed_weights(weight_decay))
    links.append(optax.scale_by_learning_rate(learning_rate))
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    adamw = optax.adamw(rate, adam_b1, adam_b2, adam_eps, weight_decay=weight_decay)

    def labels(params: PyTree) -> PyTree:
        """Which of the two moves each parameter."""
        is_hidden = lambda name, p: p.ndim >= 2 and not pattern.search(name)
        names = ["muon" if is_hidden(path_name(path), p) else "adamw" for path, p in by_path(params).items()]
        return jax.tree.structure(params).unflatten(names)

    inner = optax.multi_transform({"muon": optax.chain(*links), "adamw": adamw}, labels)

    def init(params):
        if "muon" not in jax.tree.leaves(labels(params)):
            shown = [f"{path_name(path)} {p.shape}" for path, p in by_path(params).items()][:4]
            raise ValueError(
                f"muon finds no hidden matrix among {', '.join(shown)}: vectors, and what muon(others={others!r}) "
                f"matches, go to AdamW. Use optax.adamw, or another pattern."
            )
        return inner.init(params)

    return optax.GradientTransformationExtraArgs(init, inner.update)
