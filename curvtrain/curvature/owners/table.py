"""The table of a layout: what is stored for how many owners, and what of it is padding."""

import collections

from curvtrain._text import table
from curvtrain.curvature.owners.layout import Layout


def overview(layout: Layout) -> str:
    """A table of the arrays of factors: which sizes are in each, and what share of a copy of it is padding."""
    rows = [("array", "sizes", "factors", "slots", "bytes per owner", "padding")]
    for size, (D, slots) in layout.factors:
        sizes = ", ".join(f"{d} x {count}" for d, count in sorted(collections.Counter(slots.dims).items()))
        padding = 1 - sum(d * d for d in slots.dims) / (D * D * slots.count)
        each = 4 * D * D * slots.count // layout.owners
        rows.append((size, sizes, str(len(slots.at)), str(slots.count), f"{each:,}", f"{padding:.1%}"))
    total, pads = layout.numbers(scales=False)
    rows.append(("all", "", "", "", f"{4 * total // layout.owners:,}", f"{pads / total:.1%}"))
    return table(rows, left=2)
