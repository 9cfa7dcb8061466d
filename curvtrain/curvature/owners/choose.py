"""The number of owners, where nobody says it."""

import math
from collections.abc import Mapping

from curvtrain.curvature.mesh import axes_for
from curvtrain.curvature.owners.layout import Matrix, layout_of

MOST = 64  # owners that are chosen by themselves
PADDING = 0.1  # share of all bytes that may be padding then


def owners_for(matrices: tuple[Matrix, ...], scales: bool, mesh: Mapping[str, int] | None = None) -> int:
    """Chooses the number of owners, for one mesh or, without one, a default that suits any.

    On several devices, their number or a power of two: what takes the fewest bytes on each, and of equal ones the most.
    Else the largest power of two of which padding is a small share, `PADDING` at most, and no array has to hold smaller
    factors, which one device would cut out of it again and again.
    """
    devices = math.prod((mesh or {}).values())
    most = min(MOST, max(devices, sum(matrix.copies for matrix in matrices)))
    options = {2**k for k in range(most.bit_length())}
    if mesh and devices > 1:
        split = lambda owners: math.prod(mesh[axis] for axis in axes_for(mesh, owners))
        cost = lambda owners: layout_of(matrices, owners).numbers(scales)[0] / split(owners)
        return min(options | {devices}, key=lambda owners: (cost(owners), -owners))
    alike = lambda layout: all(slots.outside is None for _, (_, slots) in layout.factors)
    small = lambda layout: layout.numbers(scales)[1] <= PADDING * layout.numbers(scales)[0]
    return max(n for n in options if alike(layout := layout_of(matrices, n)) and small(layout))
