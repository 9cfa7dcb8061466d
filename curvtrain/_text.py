"""Tables and sizes as text, for every room."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of text, the first a heading, as aligned columns: the first `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = lambda i, cell: cell.ljust(widths[i]) if i < left else cell.rjust(widths[i])
    return "\n".join("  ".join(aligned(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows)


def human_bytes(count: float) -> str:
    """1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
