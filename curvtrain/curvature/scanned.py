"""Which leading axes of parameters count the layers of an `nnx.scan` or `nnx.vmap`."""

from typing import Any

from curvtrain.curvature.capture import cover
from curvtrain.objective import Objective, by_path

PyTree = Any


def scan_axes(estimator: str, objective: Objective | None, params: PyTree) -> tuple[int, ...]:
    """The number of such axes of each leaf of the parameters: 0 where there is no model that says so.

    `estimator` is what messages call whoever asks.
    """
    counts = {}
    if objective is not None and objective.has_outputs:
        for layer in cover(objective, params, estimator, uncovered="diagonal").layers:
            counts |= {(*layer.path, name): len(layer.scan_axes) for name, _ in layer.shapes}
    return tuple(counts.get(path, 0) for path in by_path(params))
