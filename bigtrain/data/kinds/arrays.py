"""Samples of named arrays: `KEY.npy` or `KEY.NAME.npy`, and `KEY.cls` if there are classes.

A row of the sidecar holds the byte offset of each array's values, in the order of the names, and the class.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bigtrain.config import UserError
from bigtrain.data.formats.arrays import (
    ARRAY_TYPES,
    LABELS,
    MAX_ARRAY_BYTES,
    MAX_ARRAYS,
    ArrayInfo,
    array_info,
    array_name,
)
from bigtrain.data.formats.images import IMAGE_SUFFIXES, MAX_CLASSES, MAX_LABEL_BYTES, decode_label
from bigtrain.data.formats.npy import HEADER_BYTES, NpyLayout, npy_bytes, npy_layout
from bigtrain.data.formats.stored_tokens import TOKEN_TYPES
from bigtrain.data.formats.tar import Member, TarSample, read_at
from bigtrain.data.index import ShardIndex, advice_on_shards
from bigtrain.data.kind import SampleKind, Scanner
from bigtrain.data.packing.options import PackOptions
from bigtrain.data.packing.sample import Means, PackedMember, Sample, Span
from bigtrain.data.reading import Reader, SampleReader, too_short
from bigtrain.data.scanning import Scan
from bigtrain.data.shard import Shard
from bigtrain.data.sidecar import Rows, spans_fit
from bigtrain.data.streaming.store import ShardStore
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.models.batches import KINDS, Arrays

if TYPE_CHECKING:
    from bigtrain.models.config import ModelConfig

Held = tuple[tuple[ArrayInfo, ...], bool]
"""The arrays of a sample in the order of their names, and whether the sample has a class."""


@KINDS.register
class ArraySamples(SampleKind):
    """Named arrays, each of one type and shape, and an optional class."""

    name = "arrays"
    layout = "KEY.NAME.npy, or KEY.npy that is no list of whole numbers; KEY.cls"

    def columns(self, index: ShardIndex) -> int:
        """See the module's docstring."""
        return len(index.arrays or ()) + (index.classes is not None)

    def class_column(self, index: ShardIndex) -> int | None:
        """The last column, if there are classes."""
        return None if index.classes is None else self.columns(index) - 1

    def is_complete(self, index: ShardIndex) -> bool:
        """See `SampleKind`."""
        return bool(index.arrays)

    def rows_fit(self, index: ShardIndex, shard: Shard, rows: Rows) -> bool:
        """See `SampleKind`."""
        inside = all(
            spans_fit(rows[:, column], np.asarray(info.bytes), shard.filesize)
            for column, info in enumerate(index.arrays or ())
        )
        return inside and (index.classes is None or int(rows[:, -1].max()) < index.classes)

    def describe(self, index: ShardIndex) -> str | None:
        """Names, types and shapes of the arrays, and the number of classes."""
        classes = [] if index.classes is None else [f"labels of {index.classes} classes"]
        return ", ".join([*map(str, index.arrays or ()), *classes])

    def require_same(self, index: ShardIndex, other: ShardIndex) -> None:
        """Require equal names, types and shapes, and no more classes in `other`."""
        if (index.arrays, index.classes is None) != (other.arrays, other.classes is None) or (
            (other.classes or 0) > (index.classes or 0)
        ):
            raise UserError(
                f"the arrays ({self.describe(other)}) differ from the others ({self.describe(index)})",
                where=f"{other.place} and {index.place}",
                fix="Give both directories arrays of the same names, types and shapes, with the classes of the "
                "first one.",
            )

    def check_model(self, index: ShardIndex, config: ModelConfig) -> None:
        """Require all arrays that the model takes, in the model's shapes."""
        found = {info.name: info.shape for info in index.arrays or ()}
        if index.classes is not None:
            found[LABELS] = ()
        for name, shape in config.sample_arrays.items():
            if name not in found:
                raise UserError(
                    f"A model of arch '{config.arch}' takes the array '{name}', but data.train holds "
                    f"{self.describe(index)}",
                    index.place,
                )
            if shape != found[name]:
                raise UserError(
                    f"The array '{name}' is {_by(found[name])}, but the model takes {_by(shape)}",
                    index.place,
                    "Change the sizes under 'model'.",
                )

    def recognises(self, sample: TarSample) -> bool:
        """Whether the .npy members are arrays and not tokens: they have names, classes, other types or other axes."""
        if sample.suffixes & set(IMAGE_SUFFIXES):
            return False
        if any(suffix.endswith(".npy") for suffix in sample.suffixes):
            return True
        if "npy" not in sample.suffixes:
            return False
        if "cls" in sample.suffixes:
            return True
        layout = npy_layout(_head(sample, sample.one("npy")), sample.where)
        return layout.dtype not in TOKEN_TYPES or len(layout.shape) != 1

    def scanner(self, first: TarSample, tokenizer: Tokenizer | None) -> Scanner:
        """See `SampleKind`."""
        return _ArrayScanner()

    def named(self, scan: Scan) -> str:
        """See `SampleKind`."""
        return "arrays: " + _listed(scan.arrays or (), scan.classes is not None)

    def find(self, inputs: Sequence[str | Path], options: PackOptions) -> Sequence[Sample]:
        """Find samples in NAME.npy files, whose first axis is the sample, or in one folder of KEY[.NAME].npy, KEY.cls.

        The integers of `labels.npy` become the classes.
        """
        paths = [Path(given) for given in inputs]
        folder = len(paths) == 1 and paths[0].is_dir()
        samples: list[Any] = list(_in_folder(paths[0], options)) if folder else _in_columns(paths)
        if len(samples) < 2:
            fix = advice_on_shards(inputs) or "Give NAME.npy files, or a folder of KEY.npy files."
            raise UserError("there are no samples", ", ".join(map(str, inputs)), fix)
        return samples

    def open_reader(
        self, index: ShardIndex, context: int, document_mask: bool, open_shards: int, store: ShardStore
    ) -> Reader:
        """See `SampleKind`."""
        return ArrayReader(index, open_shards, store)

    def example_batch(
        self, config: ModelConfig, vocabulary: int, count: int, random: np.random.Generator, documents: bool = False
    ) -> Arrays:
        """Each array by its name, float32 (B, ...); labels, keys int64 (B,); weights float32 (B,)."""
        batch: Arrays = {"keys": random.integers(0, 2**62, count), "weights": np.ones(count, np.float32)}
        for name, shape in config.sample_arrays.items():
            batch[name] = random.normal(size=(count, *shape)).astype(np.float32)
        if LABELS in batch:
            batch[LABELS] = random.integers(0, max(1, vocabulary), count)
        return batch


class ArrayReader(SampleReader):
    """Reads arrays by name, and classes if there are any."""

    def blank(self, count: int) -> Arrays:
        """Zeros: each array in its stored dtype (n, ...); with classes, labels int64 (n,); weights float32 (n,)."""
        arrays: Arrays = {
            info.name: np.zeros((count, *info.shape), np.dtype(info.dtype)) for info in self._index.arrays or ()
        }
        if self._index.classes is not None:
            arrays[LABELS] = np.zeros(count, np.int64)
        return arrays | {"weights": np.zeros(count, np.float32)}

    def fill(self, arrays: Arrays, place: int, descriptor: int, row: list[int], where: str) -> None:
        """See `SampleReader`."""
        infos = self._index.arrays or ()
        for info, offset in zip(infos, row, strict=False):
            values = arrays[info.name][place : place + 1].reshape(-1).view(np.uint8).data
            if os.preadv(descriptor, [values], offset) != info.bytes:
                raise too_short(where)
        if self._index.classes is not None:
            arrays[LABELS][place] = row[-1]


class _ArrayScanner(Scanner):
    noun = "array"

    def __init__(self) -> None:
        self._first: tuple[ArrayInfo, ...] | None = None
        self._labelled, self._classes = False, 0

    def add(self, sample: TarSample) -> tuple[int, ...]:
        infos, places = _arrays(sample)
        label = []
        if "cls" in sample.suffixes:
            label = [decode_label(sample.read(sample.one("cls"), MAX_LABEL_BYTES), "cls", sample.where)]
        if self._first is not None and (infos, bool(label)) != (self._first, self._labelled):
            raise _unlike((infos, bool(label)), (self._first, self._labelled), sample.where)
        self._first, self._labelled = infos, bool(label)
        self._classes = max([self._classes, *(number + 1 for number in label)])
        return (*places, *label)

    def result(self, rows: Rows) -> Scan:
        return Scan("arrays", rows, arrays=self._first, classes=self._classes if self._labelled else None)


def _arrays(sample: TarSample) -> tuple[tuple[ArrayInfo, ...], tuple[int, ...]]:
    """The arrays of a sample in the order of their names, and the byte offset of each array's values."""
    found: dict[str, tuple[ArrayInfo, int]] = {}
    for member in sample.members:
        name = array_name(member.suffix, sample.where)
        if name is None:
            continue
        if name in found or len(found) == MAX_ARRAYS:
            raise UserError(
                f"the sample has two arrays {name!r}" if name in found else f"the sample has over {MAX_ARRAYS} arrays",
                where=sample.where,
            )
        layout = npy_layout(_head(sample, member), sample.where)
        found[name] = array_info(name, layout, member.size, sample.where), member.offset + layout.begin
    if not found:
        raise UserError("the sample has no member .npy", where=sample.where)
    names = sorted(found)
    return tuple(found[name][0] for name in names), tuple(found[name][1] for name in names)


def _head(sample: TarSample, member: Member) -> bytes:
    return read_at(sample.path, member.offset, min(member.size, HEADER_BYTES))


def _unlike(held: Held, first: Held, where: str) -> UserError:
    return UserError(
        f"the sample holds {_listed(*held)}, but the first holds {_listed(*first)}",
        where=where,
        fix="Store arrays of one set of names, types and shapes in a directory.",
    )


def _listed(arrays: tuple[ArrayInfo, ...], labelled: bool) -> str:
    """Names, types and shapes, for error messages."""
    return ", ".join([*map(str, arrays), *([LABELS] if labelled else [])])


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"


@dataclass(frozen=True)
class Column:
    """A .npy file whose first axis is the sample."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    """Shape of one sample."""
    begin: int
    """Byte at which the first sample begins."""

    @property
    def bytes(self) -> int:
        """Size of one sample in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def member(self, row: int) -> PackedMember:
        """The member with the values of sample number `row`."""
        data = read_at(self.path, self.begin + row * self.bytes, self.bytes)
        values = np.frombuffer(data, self.dtype).reshape(self.shape)
        if self.name != LABELS:
            return PackedMember(f"{self.name}.npy", npy_bytes(values))
        if not 0 <= int(values) < MAX_CLASSES:
            raise UserError(f"the label {int(values)} is not a class number", f"{self.path}, sample {row}")
        return PackedMember("cls", str(int(values)).encode())


@dataclass(frozen=True)
class Row:
    """One sample from files that each hold one array of all samples."""

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

    def members(self, means: Means) -> list[PackedMember]:
        """See `Sample`."""
        return [column.member(self.row) for column in self.columns]


@dataclass(frozen=True)
class Files:
    """One sample from a folder: its files with their suffixes."""

    found: tuple[tuple[str, Span], ...]

    @property
    def bytes(self) -> int:
        """See `Sample`."""
        return sum(span.size for _, span in self.found)

    @property
    def files(self) -> tuple[Path, ...]:
        """See `Sample`."""
        return tuple(span.path for _, span in self.found)

    @property
    def where(self) -> str:
        """The first of the sample's files, for error messages."""
        return str(self.found[0][1].path)

    def held(self) -> Held:
        """The arrays of the files, from their headers, and whether there is a class.

        Raises:
            UserError: A file holds no array of a supported type, or there is no file .npy.
        """
        infos = []
        for suffix, span in self.found:
            name = array_name(suffix, str(span.path))
            if name is not None:
                layout = npy_layout(read_at(span.path, 0, min(span.size, HEADER_BYTES)), str(span.path))
                infos.append(array_info(name, layout, span.size, str(span.path)))
        if not infos:
            raise UserError("the sample has no file .npy", self.where)
        return tuple(sorted(infos, key=lambda info: info.name)), len(infos) < len(self.found)

    def members(self, means: Means) -> list[PackedMember]:
        """See `Sample`."""
        members = []
        for suffix, span in self.found:
            limit = MAX_LABEL_BYTES if suffix == "cls" else MAX_ARRAY_BYTES + HEADER_BYTES
            if span.size > limit:
                raise UserError(f"the file has more than {limit} bytes", str(span.path))
            data = span.read()
            if suffix == "cls":
                decode_label(data, suffix, str(span.path))
            members.append(PackedMember(suffix, data))
        return members


def _in_folder(folder: Path, options: PackOptions) -> Iterator[Files]:
    def key(path: Path) -> tuple[Path, str]:
        return path.parent, path.name.split(".", 1)[0]

    found = []
    for path in sorted(folder.rglob("*")):
        if path.name.lower().endswith((".npy", ".cls")) and path.name[0] != "." and path.is_file():
            found.append(path)
        elif not path.is_dir() or path.is_symlink():
            options.passed.ignore(str(path.relative_to(folder)), "neither .npy nor .cls, or hidden")
    first: Held | None = None
    for _, group in groupby(sorted(found, key=lambda path: (key(path), path.name)), key=key):
        sample = Files(tuple((path.name.split(".", 1)[1].lower(), Span.whole(path)) for path in group))
        # Checked here, so that an error names the user's file, and not a shard that is being written.
        try:
            held = sample.held()
            if first is not None and held != first:
                raise _unlike(held, first, sample.where)
        except UserError as error:
            options.passed(error)
            continue
        first = held
        yield sample


def _in_columns(paths: Sequence[Path]) -> list[Row]:
    columns, counts = [], []
    for path in paths:
        if not path.is_file():
            raise UserError(f"no such file: {str(path)!r}")
        if path.suffix != ".npy":
            raise UserError(
                "arrays cannot be read from this file", str(path), "Give .npy files, or one folder of them."
            )
        column, count = _column(path)
        columns.append(column)
        counts.append(count)
        if count != counts[0]:
            raise UserError(f"the file has {count} samples, but {paths[0].name} has {counts[0]}", str(path))
    names = [column.name for column in columns]
    if len(set(names)) != len(names):
        raise UserError(f"two files are called {max(names, key=names.count)}.npy", ", ".join(map(str, paths)))
    if set(names) <= {LABELS}:
        raise UserError("there are classes, but no arrays", ", ".join(map(str, paths)))
    ordered = tuple(sorted(columns, key=lambda column: column.name))
    return [Row(ordered, row) for row in range(counts[0])]


def _column(path: Path) -> tuple[Column, int]:
    where, size = str(path), path.stat().st_size
    layout = npy_layout(read_at(path, 0, min(size, HEADER_BYTES)), where)
    if layout.dtype == "unknown":
        raise UserError("the type of the array is not supported", where, f"Store one of {', '.join(ARRAY_TYPES)}.")
    if layout.fortran:
        raise UserError(
            "the array is stored in column-major (Fortran) order", where, "Store np.ascontiguousarray(array)."
        )
    if not layout.shape:
        raise UserError(f"the array has no axis that counts samples (type {layout.dtype})", where)
    count, shape = layout.shape[0], layout.shape[1:]
    one = NpyLayout(layout.dtype, shape, False, layout.begin)
    if path.stem.lower() == LABELS:
        if np.dtype(layout.dtype).kind not in "iu" or shape:
            found = f"{layout.dtype} of shape {layout.shape}"
            fix = "Store one whole number for each sample: labels.astype(np.int64).reshape(-1)"
            raise UserError(f"the classes are not a list of whole numbers, but {found}", where, fix)
        name = LABELS
    else:
        name = array_name(path.name.lower(), where) or path.stem
    per_sample = (size - layout.begin) // count if count else 0
    info = array_info(name, one, layout.begin + per_sample, where)
    if per_sample * count != size - layout.begin:
        raise UserError("the array's header does not fit its bytes", where)
    return Column(path, name, info.dtype, info.shape, layout.begin), count
