"""Character-level language modelling over any text file.

The text is cut into windows that do not overlap; the target of a position is the next character. Without a file, the
source of Python's own standard library serves as text, so that a recipe runs on a bare machine.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # stands for every character outside the vocabulary; always token 0
KEPT_CHARACTERS = 255  # plus the replacement: at most 256 classes
STANDARD_LIBRARY_CHARACTERS = 1_000_000


@dataclass(frozen=True, eq=False)
class TextData:
    """Windows of text as tokens, in memory.

    `train` and `test` are `{"tokens": int32 (N, length), "targets": int32 (N, length)}`, with `targets[i, t]` the
    character after `tokens[i, t]`. The test windows are the end of the text.
    """

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    vocabulary: tuple[str, ...]  # token -> character: the replacement, then by code point; tokens are indices into it

    @cached_property
    def _codes(self) -> np.ndarray:
        """The vocabulary's code points without the replacement, uint32, ascending."""
        return _code_points("".join(self.vocabulary[1:]))

    def encode(self, text: str) -> np.ndarray:
        """Tokens int32 (len(text),) of `text`; a character outside the vocabulary becomes token 0."""
        return _encode(_code_points(text), self._codes)

    def decode(self, tokens: np.ndarray) -> str:
        """The text of `tokens`, integers (n,).

        Raises:
            ValueError: not one axis of integers in 0..len(vocabulary)-1.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
            raise ValueError(f"decode(tokens=...) takes one axis of integers, got {tokens.dtype} {tokens.shape}.")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < len(self.vocabulary):
            raise ValueError(
                f"decode(tokens=...): tokens go from {tokens.min()} to {tokens.max()}, but the vocabulary has 0 to "
                f"{len(self.vocabulary) - 1}."
            )
        return "".join(self.vocabulary[t] for t in tokens.tolist())


def load_text(path: str | os.PathLike[str] | None = None, length: int = 64, test_fraction: float = 0.1) -> TextData:
    """Load a text and cut it into windows of `length` characters.

    Args:
        path: a UTF-8 text file; None: the source of the standard library's top-level modules, in order of their names,
            its first million characters (so the text depends on the version of Python).
        length: characters per window, at least 1.
        test_fraction: share of the windows, those at the end of the text, that are for testing; in (0, 1). At least one
            window goes to each side.

    Returns:
        The windows. The vocabulary holds the 255 most frequent characters of the *training* part (ties: the lower code
        point first); every other character, wherever it occurs, is the replacement character.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not UTF-8, an empty or too short text, `length` or `test_fraction` out of range.
    """
    if length < 1:
        raise ValueError(f"load_text(length={length}): a window has at least one character.")
    if not 0 < test_fraction < 1:
        raise ValueError(f"load_text(test_fraction={test_fraction}): should be between 0 and 1, both excluded.")
    text, source = _standard_library() if path is None else _read(Path(path))
    windows = (len(text) - 1) // length  # the last window's last target is one character further
    if windows < 2:
        what = "is empty" if not text else f"has {len(text)} characters"
        raise ValueError(
            f"load_text(length={length}): {source} {what}; one window to train and one to test need {2 * length + 1}."
        )
    test = min(max(1, round(test_fraction * windows)), windows - 1)
    train = windows - test

    points = _code_points(text)
    codes = _most_frequent(points[: train * length + 1], KEPT_CHARACTERS)
    tokens = _encode(points[: windows * length + 1], codes)
    inputs, targets = tokens[:-1].reshape(windows, length), tokens[1:].reshape(windows, length)
    return TextData(
        train={"tokens": inputs[:train], "targets": targets[:train]},
        test={"tokens": inputs[train:], "targets": targets[train:]},
        vocabulary=(REPLACEMENT, *map(chr, codes.tolist())),
    )


def _read(path: Path) -> tuple[str, str]:
    """The text of a file and what to call it; line ends become newlines, a byte-order mark is dropped."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"load_text(path={str(path)!r}): the file {what}. Pass a UTF-8 text file, or no path.")
    try:
        return path.read_text(encoding="utf-8-sig"), str(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"load_text(path={str(path)!r}): not UTF-8 text ({error}). Unpack or convert it.") from error


def _standard_library() -> tuple[str, str]:
    folder = Path(os.path.dirname(os.__file__))
    parts, total = [], 0
    for path in sorted(folder.glob("*.py")):
        parts.append(path.read_text(encoding="utf-8"))
        total += len(parts[-1])
        if total >= STANDARD_LIBRARY_CHARACTERS:
            break
    return "".join(parts)[:STANDARD_LIBRARY_CHARACTERS], f"the standard library's source ({folder}/*.py)"


def _code_points(text: str) -> np.ndarray:
    """uint32 (len(text),)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _most_frequent(points: np.ndarray, limit: int) -> np.ndarray:
    """The `limit` most frequent code points, uint32, ascending; the replacement character is not counted."""
    codes, counts = np.unique(points[points != ord(REPLACEMENT)], return_counts=True)
    return np.sort(codes[np.argsort(-counts, kind="stable")[:limit]])


def _encode(points: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """int32: 1 + the index in `codes` (ascending) of each code point, 0 for those that are not there."""
    if not codes.size:
        return np.zeros(points.shape, np.int32)
    index = np.minimum(np.searchsorted(codes, points), codes.size - 1)
    return np.where(codes[index] == points, index + 1, 0).astype(np.int32)
