"""Reads the rows of MDS shards, the format of mosaicml-streaming (version 2).

A directory holds an index.json and shards. A shard begins with little-endian uint32 numbers: the number of samples n,
then n + 1 offsets (the start of each sample, and the end of the last one). After these come a description in JSON and
the samples. A sample consists of the sizes of its variable-size columns (uint32 each), then the values of all columns.
Columns of pickles are never decoded; they are skipped.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config import UserError
from bigtrain.data.formats.compressed import open_bytes

INDEX_NAME = "index.json"
MAX_SHARD_BYTES = 1 << 32
SCALARS = {
    "int": "<i8", "uint8": "<u1", "uint16": "<u2", "uint32": "<u4", "uint64": "<u8", "int8": "<i1", "int16": "<i2",
    "int32": "<i4", "int64": "<i8", "float16": "<f2", "float32": "<f4", "float64": "<f8",
}  # fmt: skip
ARRAY_TYPES = {
    8: "<u1", 9: "<i1", 16: "<u2", 17: "<i2", 18: "<f2", 32: "<u4", 33: "<i4", 34: "<f4", 64: "<u8", 65: "<i8",
    66: "<f8",
}  # fmt: skip
"""Types of arrays by the type code that precedes their values."""
DAMAGE = (
    struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError
)  # fmt: skip
"""Errors that a damaged shard causes."""
ENCODINGS = ("str", "json", "ndarray", *SCALARS)


def mds_files(directory: Path) -> list[Path]:
    """The shards of an MDS directory, in the order of its index; empty if it is no MDS directory.

    Raises:
        UserError: The index names files outside the directory.
    """
    try:
        value = json.loads((directory / INDEX_NAME).read_bytes())
        shards = value["shards"]
        if any(shard["format"] != "mds" for shard in shards):
            return []
        names = [(shard["zip_data"] or shard["raw_data"])["basename"] for shard in shards]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if any(name != Path(name).name or name.startswith(".") for name in names):
        raise UserError("the index of MDS shards refers to files outside its directory", str(directory / INDEX_NAME))
    return [directory / name for name in names]


def mds_rows(path: Path, keys: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the rows of a shard: texts, numbers, JSON values, and lists of numbers for one-dimensional arrays.

    Args:
        keys: Keys of a row, or keys joined by dots, that the caller needs; empty: any.

    Raises:
        UserError: The shard is damaged or holds an array with several axes, or no column that the caller needs has a
            supported encoding.
    """
    codec = {".zstd": "zstd", ".zst": "zstd", ".gz": "gzip", ".bz2": "bzip2"}.get(path.suffix)
    with open_bytes(path, codec) as file:
        data = file.read(MAX_SHARD_BYTES)
    try:
        (count,) = struct.unpack_from("<I", data)
        offsets = np.frombuffer(data, "<u4", count + 1, 4)
        config = json.loads(data[4 * (count + 2) : int(offsets[0])])
        columns = list(zip(config["column_names"], config["column_encodings"], config["column_sizes"], strict=True))
        _check_encodings(columns, keys, path)
        for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            yield _row(data[begin:end], columns)
    except DAMAGE as error:
        raise UserError(f"the MDS shard cannot be read: {error}", str(path)) from None


def _check_encodings(columns: list[tuple[str, str, int | None]], keys: Sequence[str], path: Path) -> None:
    wanted = {*keys, *(key.split(".")[0] for key in keys)}
    needed = [one for one in columns if one[0] in wanted] or columns
    if not any(encoding.split(":")[0] in ENCODINGS for _, encoding, _ in needed):
        found = ", ".join(f"{name!r} is {encoding!r}" for name, encoding, _ in needed)
        raise UserError(
            f"the MDS shard has its columns in encodings that are not supported: {found}",
            str(path),
            f"Write them again in one of these encodings: {', '.join(ENCODINGS)}.",
        )


def _row(data: bytes, columns: list[tuple[str, str, int | None]]) -> dict[str, Any]:
    varying = sum(size is None for *_, size in columns)
    sizes = iter(np.frombuffer(data, "<u4", varying).tolist())
    place, row = 4 * varying, {}
    for name, encoding, size in columns:
        length = next(sizes) if size is None else size
        if place + length > len(data):
            raise ValueError("a sample ends before its columns")
        value = _value(encoding, data[place : place + length])
        if value is not None:
            row[name] = value
        place += length
    return row


def _value(encoding: str, data: bytes) -> Any:
    """The value of a column; None for encodings that are not supported."""
    kind, *rest = encoding.split(":")
    if kind == "str":
        return data.decode("utf-8")
    if kind == "json":
        return json.loads(data)
    if kind in SCALARS:
        return np.frombuffer(data, SCALARS[kind])[0].item()
    return _list(data, rest) if kind == "ndarray" else None


def _list(data: bytes, rest: list[str]) -> list[Any]:
    """The values of a one-dimensional array. Its type and shape precede the values unless the column defines them."""
    place = 0
    if rest:
        dtype = SCALARS[rest[0]]
    else:
        dtype, place = ARRAY_TYPES[data[0]], 1
    if len(rest) < 2:
        # One byte holds the number of axes, and in its last two bits the size of the numbers that form the shape.
        axes, width = data[place] >> 2, 1 << (data[place] & 3)
        place += 1 + axes * width
    else:
        axes = len(rest[1].split(","))
    if axes != 1:
        raise ValueError(f"an array has {axes} axes")
    return np.frombuffer(data, dtype, offset=place).tolist()
