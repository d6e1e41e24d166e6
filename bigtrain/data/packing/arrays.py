"""Packing arrays (`bigtrain data pack --arrays`): files that hold all samples, or a folder of files for each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config import UserError
from bigtrain.data.formats.arrays import LABELS, MAX_ARRAY_BYTES, array_info, array_name
from bigtrain.data.formats.images import MAX_CLASSES, MAX_LABEL_BYTES
from bigtrain.data.formats.npy import HEADER_BYTES, NpyLayout, npy_bytes, npy_layout
from bigtrain.data.formats.tar import read_at
from bigtrain.data.packing.documents import SHARD_BYTES, PackSummary
from bigtrain.data.packing.samples import Means, Member, Stretch, pack_samples


@dataclass(frozen=True)
class Column:
    """A file whose first axis counts the samples."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    """Of one sample."""
    begin: int
    """Byte at which the first sample begins."""

    @property
    def bytes(self) -> int:
        """Size of one sample."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def member(self, row: int) -> Member:
        """What the sample number `row` holds of it."""
        data = read_at(self.path, self.begin + row * self.bytes, self.bytes)
        values = np.frombuffer(data, self.dtype).reshape(self.shape)
        if self.name != LABELS:
            return Member(f"{self.name}.npy", npy_bytes(values))
        if not 0 <= int(values) < MAX_CLASSES:
            raise UserError(f"the label {int(values)} is not a class number", f"{self.path}, sample {row}")
        return Member("cls", str(int(values)).encode())


@dataclass(frozen=True)
class Row:
    """One sample of files that hold all."""

    columns: tuple[Column, ...]
    row: int

    @property
    def bytes(self) -> int:
        """See `Sample`."""
        return sum(column.bytes for column in self.columns)

    @property
    def files(self) -> tuple[Path, ...]:
        """See `Sample`."""
        return tuple(column.path for column in self.columns)

    def members(self, means: Means) -> list[Member]:
        """See `Sample`."""
        return [column.member(self.row) for column in self.columns]


@dataclass(frozen=True)
class Files:
    """One sample of a folder: its files by their suffixes."""

    found: tuple[tuple[str, Stretch], ...]

    @property
    def bytes(self) -> int:
        """See `Sample`."""
        return sum(stretch.size for _, stretch in self.found)

    @property
    def files(self) -> tuple[Path, ...]:
        """See `Sample`."""
        return tuple(stretch.path for _, stretch in self.found)

    def members(self, means: Means) -> list[Member]:
        """See `Sample`."""
        members = []
        for suffix, stretch in self.found:
            limit = MAX_LABEL_BYTES if suffix == "cls" else MAX_ARRAY_BYTES + HEADER_BYTES
            if stretch.size > limit:
                raise UserError(f"the file has more than {limit} bytes", str(stretch.path))
            data = stretch.read()
            name = array_name(suffix, str(stretch.path))
            if name is not None:
                # Said by the file that the user has, and not by a shard that is being written.
                layout = npy_layout(data[:HEADER_BYTES], str(stretch.path))
                array_info(name, layout, len(data), str(stretch.path))
            members.append(Member(suffix, data))
        return members


def pack_arrays(
    inputs: Sequence[str | Path], out: str | Path, *, shard_bytes: int = SHARD_BYTES, **options: Any
) -> PackSummary:
    """Pack arrays into OUT/train, and OUT/validation where `validation` is above zero.

    Args:
        inputs: NAME.npy files of equal first axes, which counts the samples; labels.npy, whole numbers, becomes their
            classes. Or one folder of KEY.npy or KEY.NAME.npy, and KEY.cls where there are classes, at any depth.
        options: See `pack_samples`.

    Raises:
        UserError: Types that are not read, above all objects; files of different lengths, samples of different shapes;
            what `pack` raises for its output.
    """
    paths = [Path(given) for given in inputs]
    if len(paths) == 1 and paths[0].is_dir():
        samples: list[Any] = list(_in_folder(paths[0]))
    else:
        samples = _in_columns(paths)
    if len(samples) < 2:
        raise UserError(
            "there are no samples", ", ".join(map(str, inputs)), "give NAME.npy files, or a folder of KEY.npy files"
        )
    return pack_samples("arrays", samples, out, shard_bytes=shard_bytes, **options)


def _in_folder(folder: Path) -> Iterator[Files]:
    def key(path: Path) -> tuple[Path, str]:
        return path.parent, path.name.split(".", 1)[0]

    found = [
        path for path in folder.rglob("*.*") if path.name.lower().endswith((".npy", ".cls")) and path.name[0] != "."
    ]
    for _, group in groupby(sorted(found, key=lambda path: (key(path), path.name)), key=key):
        yield Files(tuple((path.name.split(".", 1)[1].lower(), Stretch.whole(path)) for path in group))


def _in_columns(paths: Sequence[Path]) -> list[Row]:
    columns, counts = [], []
    for path in paths:
        if not path.is_file():
            raise UserError(f"no such file: {str(path)!r}")
        if path.suffix != ".npy":
            raise UserError("arrays are not read from such a file", str(path), "give .npy files, or one folder of them")
        column, count = _column(path)
        columns.append(column)
        counts.append(count)
        if count != counts[0]:
            raise UserError(f"the file has {count} samples; {paths[0].name} has {counts[0]}", str(path))
    names = [column.name for column in columns]
    if len(set(names)) != len(names):
        raise UserError(f"two files are called {max(names, key=names.count)}.npy", ", ".join(map(str, paths)))
    if set(names) <= {LABELS}:
        raise UserError("there are classes and no arrays", ", ".join(map(str, paths)))
    ordered = tuple(sorted(columns, key=lambda column: column.name))
    return [Row(ordered, row) for row in range(counts[0])]


def _column(path: Path) -> tuple[Column, int]:
    where, size = str(path), path.stat().st_size
    layout = npy_layout(read_at(path, 0, min(size, HEADER_BYTES)), where)
    if layout.fortran:
        raise UserError("the array is stored column by column", where, "store np.ascontiguousarray of it")
    if not layout.shape:
        raise UserError(f"the array has no axis that counts samples (type {layout.dtype})", where)
    count, shape = layout.shape[0], layout.shape[1:]
    one = NpyLayout(layout.dtype, shape, False, layout.begin)
    if path.stem.lower() == LABELS:
        if np.dtype(layout.dtype).kind not in "iu" or shape:
            raise UserError("the classes are not a list of whole numbers", where)
        name = LABELS
    else:
        name = array_name(path.name.lower(), where) or path.stem
    per_sample = (size - layout.begin) // count if count else 0
    info = array_info(name, one, layout.begin + per_sample, where)
    if per_sample * count != size - layout.begin:
        raise UserError("the array's header does not fit its bytes", where)
    return Column(path, name, info.dtype, info.shape, layout.begin), count
