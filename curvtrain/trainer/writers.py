"""Writers of logged scalars: JSON lines, CSV and TensorBoard event files, each a few lines around a library."""

import abc
import csv
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

Scalars = dict[str, float]


class Writer(abc.ABC):
    """Where scalars go. A resumed run writes on: what was logged after the restored step is dropped first."""

    @abc.abstractmethod
    def write(self, step: int, scalars: Scalars) -> None:
        """Scalars after `step` steps."""

    @abc.abstractmethod
    def close(self) -> None:
        """Flushes and closes."""


class JsonLines(Writer):
    """`metrics.jsonl`: one object per write, {"step": 50, "train/loss": 0.3, ...}; not-a-number is null."""

    def __init__(self, folder: Path, first_step: int):
        path = folder / "metrics.jsonl"
        kept = [row for row in read_jsonl(path) if row["step"] <= first_step] if path.exists() else []
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed in close()
        for row in kept:
            self._line(row)

    def write(self, step, scalars):
        self._line({"step": step, **{name: value if math.isfinite(value) else None for name, value in scalars.items()}})

    def _line(self, row):
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self):
        self._file.close()


class Csv(Writer):
    """`metrics.csv`: one row per scalar, step,name,value, so that columns never change within a file."""

    def __init__(self, folder: Path, first_step: int):
        path = folder / "metrics.csv"
        rows: list[list[str]] = []
        if path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                rows = [row for row in list(csv.reader(file))[1:] if len(row) == 3 and int(row[0]) <= first_step]
        self._file = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115 - closed in close()
        self._writer = csv.writer(self._file)
        self._writer.writerows([["step", "name", "value"], *rows])

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
        self._writer = SummaryWriter(os.fspath(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step, scalars):
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self):
        self._writer.close()


class Many(Writer):
    """Several writers as one; none at all is a writer that writes nowhere."""

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


def read_jsonl(path: str | os.PathLike) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
