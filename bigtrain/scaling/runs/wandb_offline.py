"""A reader of W&B's offline files, by their record framing and wandb.proto, since W&B has no public reader.

A .wandb file has a header of 7 bytes and then LevelDB's log format. This consists of blocks of 32 KiB; a record is cut
into pieces that fit into blocks. Each piece has a CRC, a length and a kind (whole, first, middle or last). A killed
process leaves an incomplete record at the end, which is ignored.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigtrain.config import CorruptionError
from bigtrain.scaling.runs.columns import flatten

_MAGIC, _HEADER_BYTES = b":W&B", 7
_BLOCK_BYTES, _PIECE = 32768, struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_PATTERNS = ("*.wandb", "*run-*/*.wandb", "wandb/*run-*/*.wandb", "*/wandb/*run-*/*.wandb", "*/*/wandb/*run-*/*.wandb")


@dataclass
class WandbRun:
    """One W&B run, merged from the files of all its segments."""

    id: str
    name: str = ""
    group: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    """Exit code of the last segment; None if it was killed or still runs."""
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Metrics of each step; a resumed run replaces the steps that it repeats, and those after them."""

    def row(self) -> dict[str, Any]:
        """The run as one row: its config, and the last value of each metric."""
        metrics: dict[str, Any] = dict(self.summary)
        for step in sorted(self.steps):
            metrics.update(self.steps[step])
        own = {name: value for name, value in metrics.items() if not name.startswith("_")}
        # The column is not called "group", which stands for the model: W&B's group of a sweep's runs is the sweep.
        group = {"wandb_group": self.group} if self.group else {}
        return {**self.config, **own, "run": self.name or self.id, **group}


def find_files(path: Path) -> list[Path]:
    """The .wandb files under the directory of a run, of a sweep or of W&B, the oldest segment first."""
    return sorted({file for pattern in _PATTERNS for file in path.glob(pattern)}, key=lambda file: file.parent.name)


def read_runs(path: Path) -> list[WandbRun]:
    """Read all runs under a directory; segments with the same id are one run.

    Raises:
        CorruptionError: A file is not a W&B file, or is damaged before its last block.
    """
    from wandb.proto import wandb_internal_pb2

    new_record: Any = vars(wandb_internal_pb2)["Record"]  # protobuf creates its classes at run time

    runs: dict[str, WandbRun] = {}
    for file in find_files(path):
        run: WandbRun | None = None
        for data in records(file):
            record = new_record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = runs.setdefault(record.run.run_id, WandbRun(record.run.run_id))
                run.name = record.run.display_name or run.name
                run.group = record.run.run_group or run.group
                run.config.update(_items(record.run.config.update))
                run.exit_code = None
            elif run is not None and kind == "exit":
                run.exit_code = int(record.exit.exit_code)
            elif run is not None and kind == "config":
                run.config.update(_items(record.config.update))
            elif run is not None and kind == "summary":
                run.summary.update(_items(record.summary.update))
            elif run is not None and kind == "history":
                row = _items(record.history.item)
                step = int(row.get("_step", record.history.step.num))
                # A resumed segment repeats steps, so earlier values of this step's successors are discarded.
                for later in [done for done in run.steps if done > step]:
                    del run.steps[later]
                run.steps[step] = {**run.steps.get(step, {}), **row}
    return list(runs.values())


def records(path: Path) -> Iterator[bytes]:
    """The complete records of a .wandb file; an incomplete record at its end is ignored.

    Raises:
        CorruptionError: The file is not a W&B file, or a checksum fails before its last block.
    """
    data = path.read_bytes()
    if len(data) < _HEADER_BYTES:
        return
    if data[:4] != _MAGIC:
        raise CorruptionError("The file is not one of W&B's", str(path))
    position, partial = _HEADER_BYTES, b""
    while position + _PIECE.size <= len(data):
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _PIECE.size:
            position += left
            continue
        crc, length, kind = _PIECE.unpack_from(data, position)
        begin = position + _PIECE.size
        piece = data[begin : begin + length]
        if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST) or len(piece) < length or _crc(kind, piece) != crc:
            if len(data) - position > _BLOCK_BYTES:
                raise CorruptionError(f"A record at byte {position} is damaged", str(path))
            return
        partial = piece if kind in (_WHOLE, _FIRST) else partial + piece
        if kind in (_WHOLE, _LAST):
            yield partial
        position = begin + length


def _crc(kind: int, piece: bytes) -> int:
    return zlib.crc32(piece, zlib.crc32(bytes([kind])))


def _items(items: Any) -> dict[str, Any]:
    """Keys and values of a record; nested keys and nested objects have dotted names."""
    found = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
    return flatten({name: value for name, value in found.items() if not name.startswith("_wandb")})
