"""Images and classes in Parquet files of `datasets`: a column of bytes or {bytes, path}, and a column of numbers."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.config import UserError
from bigtrain.data.formats.records import parquet_file

KEPT_BYTES = 1 << 30
"""Maximum bytes of images that a process caches, because samples are packed in another order than they are stored."""
_KEPT: OrderedDict[tuple[Path, int, int, str], list[bytes | None]] = OrderedDict()
"""Cached images of row groups, the most recently used last."""
LABELS = ("label", "labels", "cls", "class", "fine_label")
"""Accepted names of the column of classes."""


@dataclass(frozen=True)
class Cell:
    """The image of one row."""

    path: Path
    size: int
    """Size of the image in bytes."""
    group: int
    row: int
    """Number of the row in its row group."""
    column: str

    def read(self) -> bytes:
        """Read the bytes of the image file. This reads and caches all images of the row group."""
        return _images(self.path, self.group, self.column)[self.row] or b""


def is_parquet(path: Path) -> bool:
    """Whether a file begins with the magic bytes of Parquet."""
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def rows(path: Path) -> Iterator[tuple[Cell | None, Any, str]]:
    """Yield for each row the image (None if there is none), the value of the class, and the location for errors.

    Raises:
        UserError: The file does not have exactly one column of images, or has no column of classes.
    """
    with parquet_file(path) as file:
        image, label = _columns(file.schema_arrow, path)
        number = 0
        for group in range(file.metadata.num_row_groups):
            labels = file.read_row_group(group, columns=[label]).column(0).to_pylist()
            for row, (data, value) in enumerate(zip(_images(path, group, image), labels, strict=True)):
                number += 1
                found = None if data is None else Cell(path, len(data), group, row, image)
                yield found, value, f"{path}, row {number}"


def class_names(path: Path) -> list[str] | None:
    """The names of the classes from the metadata that `datasets` adds to the schema; None if there are none."""
    with parquet_file(path) as file:
        _, label = _columns(file.schema_arrow, path)
        noted = (file.schema_arrow.metadata or {}).get(b"huggingface")
    try:
        names = json.loads(noted)["info"]["features"][label]["names"] if noted else None
    except (ValueError, KeyError, TypeError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _images(path: Path, group: int, column: str) -> list[bytes | None]:
    key = path, path.stat().st_mtime_ns, group, column
    if key in _KEPT:
        _KEPT.move_to_end(key)
        return _KEPT[key]
    with parquet_file(path) as file:
        values = file.read_row_group(group, columns=[column]).column(0).to_pylist()
    images = [value["bytes"] if isinstance(value, dict) else value for value in values]
    _KEPT[key] = images
    while len(_KEPT) > 1 and sum(len(image or b"") for one in _KEPT.values() for image in one) > KEPT_BYTES:
        _KEPT.popitem(last=False)
    return images


def _columns(schema: Any, path: Path) -> tuple[str, str]:
    import pyarrow

    def holds_images(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind):
            return any(part.name == "bytes" and holds_images(part.type) for part in kind)
        return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    images = [field.name for field in schema if holds_images(field.type)]
    labels = [name for name in LABELS if name in schema.names]
    if len(images) != 1 or not labels:
        raise UserError(
            f"the columns are {', '.join(schema.names)}: exactly one must hold images, and one classes",
            str(path),
            f"Name the column of classes {' or '.join(LABELS)}, and keep one column of bytes, or of {{bytes, path}}.",
        )
    return images[0], labels[0]
