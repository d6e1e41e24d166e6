"""Reads objects from JSON lines, JSON arrays, Parquet, Arrow (as the library `datasets` saves it), MDS and tars."""

from __future__ import annotations

import codecs
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bigtrain.config import UserError
from bigtrain.data.accounting import PassedOver
from bigtrain.data.formats.compressed import open_bytes, pyarrow_module
from bigtrain.data.formats.detect import Kind
from bigtrain.data.formats.mds import mds_rows
from bigtrain.data.formats.tar import TarSample, samples

READ_BYTES = 1 << 22
MAX_LINE_BYTES = 1 << 28
MAX_ARRAY_BYTES = 1 << 30
"""Maximum bytes of a JSON array, which is parsed at once."""
TABLE_ROWS = 256
MISSING: Final = object()
"""Marks that an object does not have a key."""
EACH = "*"
"""Part of a key that stands for each entry of a list."""


@dataclass(frozen=True)
class Source:
    """A file of documents or objects, or a part of one."""

    path: Path
    name: str
    """Name for messages: the file's path under the input."""
    kind: Kind
    codec: str | None = None
    """Compression of the file: one of the values of CODECS; None: not compressed."""
    start: int = 0
    """First byte of JSON lines, first token of tokens, first row group of Parquet, first document of indexed tokens."""
    stop: int | None = None
    """One past the last byte, token, row group or document; None: to the end."""
    bytes: int = 0
    """Size of the file, or of this part of it, in bytes."""
    token_type: str | None = None
    """Integer type of the ids, for a file that holds only tokens."""


@dataclass(frozen=True)
class Record:
    """One object of a file."""

    source: Source
    value: Any
    noun: str
    """Word for the record in messages: "line", "object", "row" or "sample"."""
    number: int | str
    """Number of the record in this part of the file, counted from 1; the key of a sample in a tar."""

    @property
    def name(self) -> str:
        """Name of the record: FILE:NUMBER, or FILE:BYTE+NUMBER for a later part of a file of JSON lines."""
        begin = f"{self.source.start}+" if self.noun == "line" and self.source.start else ""
        return f"{self.source.name}:{begin}{self.number}"

    @property
    def where(self) -> str:
        """Location of the record, for error messages."""
        number = self.number
        if self.noun == "line" and self.source.start and isinstance(number, int):
            number += _lines_before(self.source.path, _first_line(self.source))
        return f"{self.source.path}, {self.noun} {number!r}" if isinstance(number, str) else (
            f"{self.source.path}, {self.noun} {number}"
        )  # fmt: skip


def records_of(source: Source, passed: PassedOver, keys: Sequence[str] = ()) -> Iterator[Record]:
    """Yield the objects of a source.

    Args:
        passed: Counts or refuses objects that cannot be read.
        keys: Keys for which columns of a table are read; empty: all columns.

    Raises:
        UserError: The source or an object cannot be read.
    """
    yield from READERS[source.kind](source, passed, keys)


def under(value: Any, key: str) -> Any:
    """The value of an object under a key, or under keys that are joined by dots; MISSING if there is none.

    `data.text` names a key of a nested object, `choices.0.text` an entry of a list, and `parts.*.text` a list with a
    value from each entry.
    """
    if isinstance(value, dict) and key in value:
        return value[key]
    head, _, rest = key.partition(".")
    if head == EACH and isinstance(value, list):
        found = [under(one, rest) if rest else one for one in value]
        return MISSING if any(one is MISSING for one in found) else found
    if isinstance(value, list) and head.isdigit() and int(head) < len(value):
        inner = value[int(head)]
    elif isinstance(value, dict) and head in value:
        inner = value[head]
    else:
        return MISSING
    return under(inner, rest) if rest else inner


def _json_lines(source: Source, passed: PassedOver, keys: Sequence[str]) -> Iterator[Record]:
    with open_bytes(source.path, source.codec) as file:
        if source.start:
            # A line belongs to the part that contains its first byte.
            file.seek(source.start - 1)
            while (skipped := file.readline(READ_BYTES)) and not skipped.endswith(b"\n"):
                continue
        position, number = file.tell() if source.start else 0, 0
        while (source.stop is None or position < source.stop) and (line := file.readline(MAX_LINE_BYTES + 1)):
            position += len(line)
            number += 1
            if not line.strip():
                continue
            record = Record(source, None, "line", number)
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise UserError(f"the line is longer than {MAX_LINE_BYTES} bytes", where=record.where)
                if number == 1 and not source.start:
                    line = line.removeprefix(codecs.BOM_UTF8)
                value = parse_json(line, record)
            except UserError as error:
                passed(error)
                continue
            yield Record(source, value, "line", number)


def parse_json(data: bytes, record: Record) -> Any:
    """Parse the JSON of a line or a member.

    Raises:
        UserError: The data is not JSON.
    """
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"the line is not UTF-8: {error.reason}", f"{record.where}, byte {error.start}") from None
    except RecursionError:
        raise UserError("the line is nested too deeply", record.where) from None
    except ValueError as error:
        raise UserError(f"the line is not JSON: {error}", record.where) from None


def _json_array(source: Source, passed: PassedOver, keys: Sequence[str]) -> Iterator[Record]:
    """Yield the objects of a JSON array, which is read at once."""
    with open_bytes(source.path, source.codec) as file:
        data = file.read(MAX_ARRAY_BYTES + 1)
    fix = f"Write it as JSON lines: jq -c '.[]' {source.path.name} > {source.path.stem}.jsonl"
    if len(data) > MAX_ARRAY_BYTES:
        raise UserError(f"the JSON array has more than {MAX_ARRAY_BYTES} bytes", str(source.path), fix)
    try:
        values = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"the JSON array cannot be read: {error}", str(source.path), fix) from None
    for number, value in enumerate(values, 1):
        yield Record(source, value, "object", number)


@contextlib.contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """Open a Parquet file.

    Raises:
        UserError: The file cannot be read.
    """
    parquet, errors = pyarrow_module("parquet", "Parquet", path)
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except errors as error:
        raise UserError(f"the Parquet file cannot be read: {error}", where=str(path)) from None


def _columns(names: Sequence[str], keys: Sequence[str], path: Path) -> list[str]:
    """The columns that hold the values of some keys; all columns if there are no keys."""
    wanted = [key if key in names else key.split(".")[0] for key in keys]
    found = [name for name in names if not keys or name in wanted]
    if not found:
        raise UserError(
            f"the file has no column {' or '.join(map(repr, keys))}",
            str(path),
            f"Name the column with --key. The file has {', '.join(names[:20])}.",
        )
    return found


def _parquet(source: Source, passed: PassedOver, keys: Sequence[str]) -> Iterator[Record]:
    _refuse_codec(source, "Parquet")
    with parquet_file(source.path) as file:
        columns = _columns(file.schema_arrow.names, keys, source.path)
        stop = file.metadata.num_row_groups if source.stop is None else source.stop
        row = sum(file.metadata.row_group(group).num_rows for group in range(source.start))
        groups = list(range(source.start, stop))
        for batch in file.iter_batches(TABLE_ROWS, row_groups=groups, columns=columns):
            for value in batch.to_pylist():
                row += 1
                yield Record(source, value, "row", row)


def _arrow(source: Source, passed: PassedOver, keys: Sequence[str]) -> Iterator[Record]:
    """Yield the rows of an Arrow stream, the format in which `datasets` saves tables, or of an Arrow file."""
    _refuse_codec(source, "Arrow")
    ipc, errors = pyarrow_module("ipc", "Arrow files", source.path)
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(source.path, "rb"))
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            reader = stack.enter_context(ipc.open_file(file) if is_file else ipc.open_stream(file))
            columns = _columns(reader.schema.names, keys, source.path)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            row = 0
            for batch in batches:
                chosen = batch.select(columns)
                for first in range(0, chosen.num_rows, TABLE_ROWS):
                    for value in chosen.slice(first, TABLE_ROWS).to_pylist():
                        row += 1
                        yield Record(source, value, "row", row)
    except errors as error:
        raise UserError(f"the Arrow file cannot be read: {error}", where=str(source.path)) from None


def _mds(source: Source, passed: PassedOver, keys: Sequence[str]) -> Iterator[Record]:
    for row, value in enumerate(mds_rows(source.path, keys), 1):
        yield Record(source, value, "row", row)


def _tar(source: Source, passed: PassedOver, keys: Sequence[str]) -> Iterator[Record]:
    """Yield the objects of a tar, one per member `.json`."""
    for sample in tar_samples(source, passed):
        record = Record(source, None, "sample", sample.key)
        try:
            value = parse_json(sample.read(sample.one("json"), MAX_LINE_BYTES), record)
        except UserError as error:
            passed(error)
            continue
        yield Record(source, value, "sample", sample.key)


def tar_samples(source: Source, passed: PassedOver) -> Iterator[TarSample]:
    """Yield the samples of a tar. A compressed tar is decompressed to a temporary file first."""
    with contextlib.ExitStack() as stack:
        path = source.path
        if source.codec is not None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bigtrain-"))) / "plain.tar"
            with open_bytes(source.path, source.codec) as file, open(path, "wb") as plain:
                while chunk := file.read(READ_BYTES):
                    plain.write(chunk)
        yield from samples(path, passed)


def _refuse_codec(source: Source, what: str) -> None:
    if source.codec is not None:
        raise UserError(f"the {what} file is compressed with {source.codec}", str(source.path), "Decompress it.")


def _first_line(source: Source) -> int:
    """The byte at which the first line of a part begins."""
    with open(source.path, "rb") as file:
        file.seek(source.start - 1)
        while (skipped := file.readline(READ_BYTES)) and not skipped.endswith(b"\n"):
            continue
        return file.tell()


def _lines_before(path: Path, offset: int) -> int:
    count = 0
    with open(path, "rb") as file:
        while offset > 0 and (chunk := file.read(min(READ_BYTES, offset))):
            count += chunk.count(b"\n")
            offset -= len(chunk)
    return count


READERS: dict[str, Callable[[Source, PassedOver, Sequence[str]], Iterator[Record]]] = {
    "lines": _json_lines,
    "records": _json_array,
    "parquet": _parquet,
    "arrow": _arrow,
    "mds": _mds,
    "tar": _tar,
}
