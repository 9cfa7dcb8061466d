"""The needs of a run, as tables: bytes of its state on each device, and FLOPs and collectives of its programs."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvtrain._text import human_bytes, table
from curvtrain.trainer.mesh.sharding import path_name

PyTree = Any

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_CALL = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")  # such as f32[8,128], pred[], f8e4m3fn[16]


@dataclasses.dataclass(frozen=True)
class Part:
    """Bytes of a part of the state.

    Attributes:
      whole: bytes of one copy.
      per_device: bytes that one device holds.
      replicated: the bytes among them that every device holds; 0 on a single device.
      largest: the largest array that every device holds, as "path (bytes)".
    """

    whole: int
    per_device: int
    replicated: int
    largest: str

    @classmethod
    def of(cls, tree: PyTree) -> "Part":
        """Counts the bytes of a tree of arrays, or abstract arrays, with shardings."""
        whole = per_device = 0
        copies = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            each = _itemsize(leaf)
            mine = each * math.prod(leaf.sharding.shard_shape(leaf.shape))
            whole, per_device = whole + each * leaf.size, per_device + mine
            if leaf.sharding.is_fully_replicated and leaf.sharding.num_devices > 1:
                copies[path_name(path)] = mine
        name = max(copies, key=copies.__getitem__, default="")
        return cls(whole, per_device, sum(copies.values()), f"{name} ({human_bytes(copies[name])})" if name else "")


@dataclasses.dataclass(frozen=True)
class StateReport(Mapping[str, Part]):
    """Bytes of the parts of a training state by their names; parts without arrays are left out. Print it."""

    parts: dict[str, Part]
    checkpoints: int

    @classmethod
    def of(cls, state: PyTree, checkpoints: int) -> "StateReport":
        """The report of an abstract state, of which `checkpoints` may be on disk at a time."""
        found = {field.name: Part.of(getattr(state, field.name)) for field in dataclasses.fields(state)}
        return cls({name: part for name, part in found.items() if part.whole}, checkpoints)

    def __getitem__(self, name: str) -> Part:
        return self.parts[name]

    def __iter__(self):
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def whole(self) -> int:
        """Bytes of one copy of everything: the size of a checkpoint."""
        return sum(part.whole for part in self.values())

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("state", "one copy", "per device", "of that on all", "largest of these")]
        numbers = lambda *counts: tuple(map(human_bytes, counts))
        for name, part in self.items():
            if name in ("step", "key"):  # a few bytes
                continue
            rows.append((name, *numbers(part.whole, part.per_device, part.replicated), part.largest))
        per_device, replicated = (sum(getattr(p, n) for p in self.values()) for n in ("per_device", "replicated"))
        rows.append(("all", *numbers(self.whole, per_device, replicated), ""))
        if self.checkpoints:
            on_disk = f"{human_bytes(self.whole * self.checkpoints)} on disk"
            rows.append((f"{self.checkpoints} checkpoints", on_disk, "", "", ""))
        return table(rows)


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """One compiled program, per device: FLOPs (loop bodies counted once), bytes of arguments and temporaries.

    Attributes:
      collectives: the number of collectives in the program's text, by kind.
      sent: the bytes of their results, by kind.
    """

    name: str
    flops: float
    argument_bytes: int
    temporary_bytes: int
    collectives: dict[str, int]
    sent: dict[str, int]

    @staticmethod
    def of(name: str, compiled: Any) -> "ProgramReport":
        """The report of a compiled program."""
        cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
        flops = float((cost or {}).get("flops", float("nan")))
        counts, sent = collectives(compiled.as_text())
        return ProgramReport(name, flops, memory.argument_size_in_bytes, memory.temp_size_in_bytes, counts, sent)


@dataclasses.dataclass(frozen=True)
class DryRun:
    """The needs of a run: its programs, bytes of state, mesh and batch size. Print it."""

    programs: list[ProgramReport]
    state: StateReport
    mesh: dict[str, int]
    batch_size: int

    def __str__(self) -> str:
        rows = [("program", "GFLOP", "arguments", "temporaries", "collectives")]
        for p in self.programs:
            sent = ", ".join(f"{n} {kind} ({human_bytes(p.sent[kind])})" for kind, n in p.collectives.items()) or "none"
            memory = (human_bytes(p.argument_bytes), human_bytes(p.temporary_bytes))
            rows.append((p.name, f"{p.flops / 1e9:.3g}", *memory, sent))
        head = f"mesh {self.mesh}, batch of {self.batch_size}; per device, loop bodies counted once"
        return f"{head}\n\n{table(rows)}\n\n{self.state}"


def collectives(hlo: str) -> tuple[dict[str, int], dict[str, int]]:
    """({kind: number of collectives in a program's text}, {kind: bytes of their results on one device})."""
    counts, sent = collections.Counter[str](), collections.Counter[str]()
    for shapes, kind, start in _CALL.findall(hlo):
        sizes = [_bytes(*shape) for shape in _SHAPE.findall(shapes)]
        if start and kind != "all-reduce":  # an asynchronous one lists its operands before its results
            sizes = sizes[len(sizes) // 2 :] if kind != "collective-permute" else sizes[1:2]
        counts[kind] += 1
        sent[kind] += sum(sizes)
    in_order = lambda found: {kind: found[kind] for kind in KINDS if kind in found}
    return in_order(counts), in_order(sent)


def _bytes(kind: str, bits: str, shape: str) -> int:
    """The bytes of an array in a program's text."""
    each = max(1, int(bits) // 8) if bits else 1  # pred
    return each * math.prod(map(int, filter(None, shape.split(","))))


def _itemsize(leaf: Any) -> int:
    """The bytes of an element; for a random key, the bytes of its data."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf.dtype.itemsize
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), leaf.dtype))
    return data.size * data.dtype.itemsize
