"""Reading text: from files of many kinds to a sequence of documents in a fixed order.

Nothing is guessed: text is UTF-8 (a byte-order mark is dropped), and what is not is an error that names the file
and the byte, line, row or sample. What decompresses to far more than text does is refused.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from bigtrain.config import UserError
from bigtrain.data.formats.compressed import CODECS, open_bytes, parquet_module
from bigtrain.data.formats.tar import members, read_at
from bigtrain.data.formats.text import TEXT_MEMBERS, read_text

TEXT_SUFFIXES = frozenset({
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".htm", ".xml", ".csv", ".tsv", ".json", ".yaml", ".yml",
    ".toml", ".ini", ".cfg", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java",
    ".js", ".ts", ".rb", ".sh", ".sql", ".pl", ".lua", ".scala", ".kt", ".swift", ".jl", ".r", ".hs", ".ml",
    ".lean",
})  # fmt: skip
JSON_LINES_SUFFIXES = frozenset({".jsonl", ".ndjson"})
READ_BYTES = 1 << 22
MAX_LINE_BYTES = 1 << 28
PARQUET_ROWS = 256

Kind = Literal["text", "lines", "parquet", "tar"]


@dataclass(frozen=True)
class Source:
    """A file of documents, or a part of one: always the same parts for the same file."""

    path: Path
    name: str
    """For people: its path under the input."""
    kind: Kind
    codec: str | None = None
    """How it is compressed: one of the values of CODECS."""
    start: int = 0
    """First byte of JSON lines, or first row group of Parquet."""
    stop: int | None = None
    """One past the last; None: to the end."""
    bytes: int = 0
    """Size of the file, or of this part of it."""


@dataclass(frozen=True)
class Document:
    """One text with a name: a file's path under its input, or FILE:LINE of a JSON-lines file.

    Either `text` holds it, or it is read from `path` when asked for.
    """

    name: str
    path: Path
    text: str | None = None
    codec: str | None = None

    def pieces(self) -> Iterator[str]:
        """The text in order, in pieces of a few MiB, so that memory does not grow with the document.

        Raises:
            UserError: The file is binary or not UTF-8; names the byte.
        """
        if self.text is not None:
            yield self.text
        else:
            with open_bytes(self.path, self.codec) as file:
                yield from _decoded(self.path, file)


def documents(inputs: Sequence[str | Path], key: str = "text") -> Iterator[Document]:
    """The documents of some inputs, in their order; see `sources`.

    Args:
        key: The key of a JSON line, or the column of a Parquet file, that holds the text.

    Raises:
        UserError: See `sources`; something that is not text, or a line without text under `key`.
    """
    for source in sources(inputs):
        yield from documents_of(source, key)


def sources(inputs: Sequence[str | Path]) -> Iterator[Source]:
    """The files that some inputs name.

    Text, JSON lines (.jsonl), Parquet, and tars of text members, each of them also as .gz or .zst; a directory stands
    for such files under it, sorted; "*", "?", "**" for those that match. A text file is one document, and so is a line,
    a row or a sample. Inside a directory, hidden files, empty ones and those of other suffixes are passed over.

    Raises:
        UserError: A path is not there, or a named file is empty.
    """
    if not inputs:
        raise UserError("no input given", fix="name at least one text file, directory, .jsonl or .parquet file")
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            for found in _files_under(path):
                yield _source(found, str(found.relative_to(path)))
        elif path.is_file():
            if path.stat().st_size == 0:
                raise UserError("the input is empty", where=str(path))
            yield _source(path, path.name)
        else:
            matches = sorted(glob.glob(str(given), recursive=True)) if glob.has_magic(str(given)) else []
            files = [Path(match) for match in matches if Path(match).is_file() and Path(match).stat().st_size]
            if not files:
                raise UserError(f"no such file or directory: {str(given)!r}")
            for found in files:
                yield _source(found, str(found))


def documents_of(
    source: Source, key: str = "text", bad: Callable[[UserError], None] | None = None
) -> Iterator[Document]:
    """The documents of one source.

    Args:
        bad: Called with what is wrong with a line, row or sample, which is then passed over; None: raise it.

    Raises:
        UserError: See `documents`.
    """
    bad = bad or _raise
    if source.kind == "lines":
        yield from _json_lines(source, key, bad)
    elif source.kind == "parquet":
        yield from _parquet(source, key, bad)
    elif source.kind == "tar":
        yield from _tar(source, key, bad)
    else:
        yield Document(source.name, source.path, codec=source.codec)


def parts(source: Source, part_bytes: int) -> Iterator[Source]:
    """A source in parts of about `part_bytes` where it can be read from the middle: JSON lines and Parquet."""

    def part(start: int, stop: int, size: int) -> Source:
        return Source(source.path, source.name, source.kind, source.codec, start, stop, size)

    if source.kind == "lines" and source.codec is None and source.bytes > part_bytes:
        for start in range(0, source.bytes, part_bytes):
            stop = min(source.bytes, start + part_bytes)
            yield part(start, stop, stop - start)
    elif source.kind == "parquet":
        with _parquet_file(source.path) as file:
            groups = file.metadata.num_row_groups
        for group in range(groups):
            yield part(group, group + 1, source.bytes // groups)
    else:
        yield source


def _source(path: Path, name: str) -> Source:
    kind, codec = _kind(path)
    return Source(path, name, kind, codec, bytes=path.stat().st_size)


def _kind(path: Path) -> tuple[Kind, str | None]:
    name = path.name.lower()
    if name.endswith(".tgz"):
        return "tar", "gzip"
    suffixes = [f".{part}" for part in name.split(".")[1:]]
    codec = CODECS.get(suffixes[-1]) if suffixes else None
    inner = (suffixes[-2] if len(suffixes) > 1 else "") if codec else (suffixes[-1] if suffixes else "")
    if inner in JSON_LINES_SUFFIXES:
        return "lines", codec
    if inner == ".parquet" and codec is None:
        return "parquet", None
    return ("tar" if inner == ".tar" else "text"), codec


def _is_text(path: Path) -> bool:
    name = path.name.lower()
    for suffix in CODECS:
        name = name.removesuffix(suffix)
    inner = Path(name).suffix
    return inner in TEXT_SUFFIXES | JSON_LINES_SUFFIXES or name.endswith((".parquet", ".tar", ".tgz"))


def _files_under(directory: Path) -> Iterable[Path]:
    """Files of text below a directory, by path. Links to directories are not followed: they may form a cycle."""
    found = [
        path
        for path in directory.rglob("*")
        if _is_text(path)
        and not any(part.startswith((".", "__pycache__")) for part in path.relative_to(directory).parts)
        and path.is_file()
        and path.stat().st_size > 0
    ]
    if not found:
        raise UserError(
            "the directory holds no text",
            where=str(directory),
            fix="files with suffixes such as .txt, .md, .py, .jsonl, .parquet are read; name others one by one",
        )
    return sorted(found, key=lambda path: path.relative_to(directory).parts)


def _raise(error: UserError) -> None:
    raise error


def _decoded(path: Path, file: IO[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    offset = 0
    chunk = file.read(READ_BYTES)
    if chunk.startswith(codecs.BOM_UTF8):
        offset, chunk = len(codecs.BOM_UTF8), chunk[len(codecs.BOM_UTF8) :]
    while True:
        zero = chunk.find(b"\0")
        if zero >= 0:
            raise UserError(
                "the input is binary, not text",
                where=f"{path}, byte {offset + zero}",
                fix="give UTF-8 text",
            )
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise UserError(
                f"the input is not UTF-8: {error.reason}",
                where=f"{path}, byte {offset - held + error.start}",
                fix="convert it, for example with iconv -f latin1 -t utf-8",
            ) from None
        if text:
            yield text
        if not chunk:
            return
        offset += len(chunk)
        chunk = file.read(READ_BYTES)


def _json_lines(source: Source, key: str, bad: Callable[[UserError], None]) -> Iterator[Document]:
    with open_bytes(source.path, source.codec) as file:
        if source.start:
            # A line belongs to the part that its first byte lies in.
            file.seek(source.start - 1)
            while (skipped := file.readline(READ_BYTES)) and not skipped.endswith(b"\n"):
                continue
        begin = file.tell() if source.start else 0
        position, number = begin, 0
        while (source.stop is None or position < source.stop) and (line := file.readline(MAX_LINE_BYTES + 1)):
            position += len(line)
            number += 1
            try:
                text = _line_text(line, key, source, begin, number)
            except UserError as error:
                bad(error)
                continue
            if text:
                yield Document(f"{source.name}:{number if not begin else f'{begin}+{number}'}", source.path, text)


def _line_text(line: bytes, key: str, source: Source, begin: int, number: int) -> str:
    where = f"{source.path}, line {number}"
    try:
        if len(line) > MAX_LINE_BYTES:
            raise UserError(f"the line is longer than {MAX_LINE_BYTES} bytes", where=where)
        if number == 1 and not begin:
            line = line.removeprefix(codecs.BOM_UTF8)
        return _text_of(line, key, where) if line.strip() else ""
    except UserError as error:
        if begin:
            absolute = number + _lines_before(source.path, begin)
            error.where = (error.where or "").replace(where, f"{source.path}, line {absolute}")
        raise


def _lines_before(path: Path, offset: int) -> int:
    count = 0
    with open(path, "rb") as file:
        while offset > 0 and (chunk := file.read(min(READ_BYTES, offset))):
            count += chunk.count(b"\n")
            offset -= len(chunk)
    return count


def _text_of(line: bytes, key: str, where: str) -> str:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"the line is not UTF-8: {error.reason}", where=f"{where}, byte {error.start}") from None
    except RecursionError:
        raise UserError("the line is nested too deeply", where=where) from None
    except ValueError as error:
        raise UserError(f"the line is not JSON: {error}", where=where) from None
    if not isinstance(value, dict):
        raise UserError("the line is not a JSON object", where=where, fix=f'write {{"{key}": "..."}} on each line')
    text = value.get(key)
    if not isinstance(text, str):
        raise UserError(
            f"the line has no text under {key!r}",
            where=where,
            fix=f"its keys are {', '.join(list(value)[:20]) or 'none'}: --key",
        )
    return _whole(text, where)


def _whole(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the text holds half a character: {error.reason}", where=where) from None
    return text


@contextlib.contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    parquet, errors = parquet_module(path)
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except errors as error:
        raise UserError(f"the Parquet file cannot be read: {error}", where=str(path)) from None


def _parquet(source: Source, key: str, bad: Callable[[UserError], None]) -> Iterator[Document]:
    with _parquet_file(source.path) as file:
        names = file.schema_arrow.names
        if key not in names:
            raise UserError(
                f"the file has no column {key!r}", str(source.path), f"it has {', '.join(names[:20])}: --key"
            )
        stop = file.metadata.num_row_groups if source.stop is None else source.stop
        row = sum(file.metadata.row_group(group).num_rows for group in range(source.start))
        groups = list(range(source.start, stop))
        for batch in file.iter_batches(PARQUET_ROWS, row_groups=groups, columns=[key]):
            for value in batch.column(0).to_pylist():
                row += 1
                where = f"{source.path}, row {row}"
                if not isinstance(value, str):
                    bad(UserError(f"the row has no text under {key!r}", where))
                elif value:
                    yield Document(f"{source.name}:{row}", source.path, value)


def _tar(source: Source, key: str, bad: Callable[[UserError], None]) -> Iterator[Document]:
    with contextlib.ExitStack() as stack:
        path = source.path
        if source.codec is not None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bigtrain-"))) / "plain.tar"
            with open_bytes(source.path, source.codec) as file, open(path, "wb") as plain:
                while chunk := file.read(READ_BYTES):
                    plain.write(chunk)
        for sample, group in itertools.groupby(members(path), key=lambda member: member.key):
            where = f"{source.path}, sample {sample!r}"
            found = [member for member in group if member.suffix in TEXT_MEMBERS or member.suffix == "json"]
            try:
                if not found:
                    raise UserError("the sample has no member .txt, .txt.gz or .json", where)
                member = min(found, key=lambda member: member.suffix == "json")
                if member.suffix == "json":
                    if member.size > MAX_LINE_BYTES:
                        raise UserError(f"the member has more than {MAX_LINE_BYTES} bytes", where)
                    text = _text_of(read_at(path, member.offset, member.size), key, where)
                else:
                    text = read_text(path, member.offset, member.size, TEXT_MEMBERS[member.suffix], where)
            except UserError as error:
                bad(error)
                continue
            if text:
                yield Document(f"{source.name}:{sample}", source.path, text)
