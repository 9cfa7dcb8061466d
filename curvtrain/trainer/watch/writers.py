"""Writers of logged scalars: JSON lines, CSV and TensorBoard event files, each a few lines around a library."""

import abc
import csv
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

Scalars = dict[str, float]


class Writer(abc.ABC):
    """A place for scalars. A resumed run writes on; rows that were logged after the restored step are dropped first."""

    @abc.abstractmethod
    def write(self, step: int, scalars: Scalars) -> None:
        """Writes scalars after `step` steps."""

    @abc.abstractmethod
    def close(self) -> None:
        """Flushes and closes."""


class JsonLines(Writer):
    """`metrics.jsonl`: one object per write, {"step": 50, "train/loss": 0.3, ...}; not-a-number is null."""

    def __init__(self, folder: Path, first_step: int):
        self._file = _reopen(folder / "metrics.jsonl", lambda line: json.loads(line)["step"] <= first_step)

    def write(self, step, scalars):
        row = {"step": step, **{name: value if math.isfinite(value) else None for name, value in scalars.items()}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self):
        self._file.close()


class Csv(Writer):
    """`metrics.csv`: one row per scalar, step,name,value, so that columns never change within a file."""

    HEADER = "step,name,value\n"

    def __init__(self, folder: Path, first_step: int):
        keep = lambda line: line != self.HEADER and int(line.split(",")[0]) <= first_step
        self._file = _reopen(folder / "metrics.csv", keep, self.HEADER)
        self._writer = csv.writer(self._file, lineterminator="\n")

    def write(self, step, scalars):
        self._writer.writerows([step, name, value] for name, value in scalars.items())
        self._file.flush()

    def close(self):
        self._file.close()


class TensorBoard(Writer):
    """TensorBoard event files, by tensorboardX."""

    def __init__(self, folder: Path, first_step: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ImportError(
                "TrainerConfig(writers=['tensorboard']) needs tensorboardX: pip install 'curvtrain[tensorboard]'."
            ) from None
        # the suffix: files are named by the second, and a run may well be resumed within one
        self._writer = SummaryWriter(
            os.fspath(folder / "tensorboard"), purge_step=first_step + 1, filename_suffix=f".{first_step}"
        )

    def write(self, step, scalars):
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self):
        self._writer.close()


class Many(Writer):
    """Several writers as one; without any, it writes nowhere."""

    def __init__(self, writers: Sequence[Writer]):
        self._writers = writers

    def write(self, step, scalars):
        for writer in self._writers:
            writer.write(step, scalars)

    def close(self):
        for writer in self._writers:
            writer.close()


KINDS = {"jsonl": JsonLines, "csv": Csv, "tensorboard": TensorBoard}


def open_writers(names: Sequence[str], folder: Path | None, first_step: int) -> Writer:
    """The writers of a workdir, or none without one. `first_step` is the step that the run starts or resumes from."""
    return Many([] if folder is None else [KINDS[name](folder, first_step) for name in names])


def _reopen(path: Path, keep: Callable[[str], bool], header: str = "") -> TextIO:
    """The file, cut down to the lines to keep, to be written on. A line that a kill cut short is never kept."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and keep(line)]
    rewritten = path.with_name(path.name + ".new")
    rewritten.write_text(header + "".join(kept), encoding="utf-8")
    os.replace(rewritten, path)  # at once: a kill here loses nothing
    return open(path, "a", encoding="utf-8")


def read_jsonl(path: str | os.PathLike) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
