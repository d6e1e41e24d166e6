"""Reading text: from files of many kinds to a sequence of documents in a fixed order.

Nothing is guessed: text is UTF-8 (a byte-order mark is dropped), and what is not is an error that names the file
and the byte, line, row or sample. What decompresses to far more than text does is refused.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bigtrain.config import UserError
from bigtrain.data.accounting import PassedOver
from bigtrain.data.formats.compressed import CODECS, open_bytes, parquet_module
from bigtrain.data.formats.detect import NOT_TEXT, Content, Kind, detect
from bigtrain.data.formats.tar import samples
from bigtrain.data.formats.text import TEXT_MEMBERS, read_text

TEXT_SUFFIXES = frozenset({
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".htm", ".xml", ".csv", ".tsv", ".json", ".yaml", ".yml",
    ".toml", ".ini", ".cfg", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java",
    ".js", ".ts", ".rb", ".sh", ".sql", ".pl", ".lua", ".scala", ".kt", ".swift", ".jl", ".r", ".hs", ".ml",
    ".lean",
})  # fmt: skip
READ_BYTES = 1 << 22
MAX_LINE_BYTES = 1 << 28
MAX_ARRAY_BYTES = 1 << 30
"""Of a JSON array, which is parsed as a whole."""
PARQUET_ROWS = 256


@dataclass(frozen=True)
class TextSource:
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

    Either `text` holds it, or it is read from `path` when needed.
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
    for source in sources(inputs, key=key):
        yield from documents_of(source, key)


def sources(inputs: Sequence[str | Path], passed: PassedOver | None = None, key: str = "text") -> Iterator[TextSource]:
    """The files that some inputs name.

    Text, JSON lines, JSON arrays of objects, Parquet, and tars of text members, each of them also compressed with gzip,
    zstd, bzip2 or xz, recognized by their content. A directory stands for such files under it, sorted; "*", "?", "**"
    for those that match. A text file is one document, and so is a line, an object, a row or a sample.

    Args:
        passed: Counts the files in directories that are not read.
        key: See `documents`.

    Raises:
        UserError: A path is not there, or a named file is empty or no text.
    """
    passed = passed or PassedOver()
    if not inputs:
        raise UserError("no input given", fix="name at least one text file, directory, .jsonl or .parquet file")
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            yield from _files_under(path, passed, key)
        elif path.is_file():
            if path.stat().st_size == 0:
                raise UserError("the input is empty", where=str(path))
            yield _named(path, path.name, key)
        else:
            matches = sorted(glob.glob(str(given), recursive=True)) if glob.has_magic(str(given)) else []
            files = [Path(match) for match in matches if Path(match).is_file() and Path(match).stat().st_size]
            if not files:
                raise UserError(f"no such file or directory: {str(given)!r}")
            for found in files:
                yield _named(found, str(found), key)


def documents_of(source: TextSource, key: str = "text", passed: PassedOver | None = None) -> Iterator[Document]:
    """The documents of one source.

    Args:
        passed: Counts what is empty, and says whether a bad line, object, row or sample is skipped; None: raise it.

    Raises:
        UserError: See `documents`.
    """
    passed = passed or PassedOver()
    read = {"lines": _json_lines, "records": _records, "parquet": _parquet, "tar": _tar}.get(source.kind)
    if read is None:
        yield Document(source.name, source.path, codec=source.codec)
        return
    for document in read(source, key, passed):
        if document.text:
            yield document
        else:
            passed.empty += 1


def parts(source: TextSource, part_bytes: int) -> Iterator[TextSource]:
    """A source in parts of about `part_bytes` where it can be read from the middle: JSON lines and Parquet."""

    def part(start: int, stop: int, size: int) -> TextSource:
        return TextSource(source.path, source.name, source.kind, source.codec, start, stop, size)

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


def _source(path: Path, name: str, content: Content) -> TextSource:
    return TextSource(path, name, content.kind, content.codec, bytes=path.stat().st_size)


def _named(path: Path, name: str, key: str) -> TextSource:
    """A file that the user has named: what is no text is an error."""
    content = detect(path, key)
    if content.kind == "binary" and content.what != NOT_TEXT:
        raise UserError(f"the input is {content.what}, not text", str(path), "unpack it, or name files of text")
    return _source(path, name, content if content.kind != "binary" else Content("text", content.codec))


def _files_under(directory: Path, passed: PassedOver, key: str) -> Iterator[TextSource]:
    """Files of text below a directory, by path. Links to directories are not followed: they may form a cycle."""
    found = 0
    for path in sorted(directory.rglob("*"), key=lambda path: path.relative_to(directory).parts):
        name = str(path.relative_to(directory))
        if path.is_symlink() and not path.is_file():
            passed.ignore(name, "a link to a directory, or to nothing")
        elif path.is_dir():
            continue
        elif any(part.startswith((".", "__pycache__")) for part in path.relative_to(directory).parts):
            passed.ignore(name, "hidden")
        elif not path.is_file():
            passed.ignore(name, "not a regular file")
        elif not path.stat().st_size:
            passed.empty += 1
        else:
            content = detect(path, key)
            reason = _reason_to_skip(path, content)
            if reason is not None:
                passed.ignore(name, reason)
                continue
            found += 1
            yield _source(path, name, Content("text", content.codec) if content.kind == "binary" else content)
    if not found:
        raise UserError(
            "the directory holds no text",
            where=str(directory),
            fix="files with suffixes such as .txt, .md, .py, .jsonl, .parquet are read; name others one by one",
        )


def _reason_to_skip(path: Path, content: Content) -> str | None:
    """Why a file of a directory is not read; None: it is."""
    name = path.name.lower()
    for suffix in CODECS:
        name = name.removesuffix(suffix)
    suffix = Path(name).suffix
    if content.kind == "binary":
        # A file that is named like text and holds something else is a mistake, which reading it reports.
        return None if suffix in TEXT_SUFFIXES and content.what == NOT_TEXT else content.what
    if content.kind == "text" and suffix not in TEXT_SUFFIXES and suffix:
        return "text of another suffix: name it to read it"
    return None


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


def _json_lines(source: TextSource, key: str, passed: PassedOver) -> Iterator[Document]:
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
            if not line.strip():
                continue
            try:
                text = _line_text(line, key, source, begin, number)
            except UserError as error:
                passed(error)
                continue
            yield Document(f"{source.name}:{number if not begin else f'{begin}+{number}'}", source.path, text)


def _records(source: TextSource, key: str, passed: PassedOver) -> Iterator[Document]:
    """The objects of one JSON array, which is read as a whole."""
    with open_bytes(source.path, source.codec) as file:
        data = file.read(MAX_ARRAY_BYTES + 1)
    fix = f"write it as JSON lines: jq -c '.[]' {source.path.name} > {source.path.stem}.jsonl"
    if len(data) > MAX_ARRAY_BYTES:
        raise UserError(f"the JSON array has more than {MAX_ARRAY_BYTES} bytes", str(source.path), fix)
    try:
        values = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"the JSON array cannot be read: {error}", str(source.path), fix) from None
    for number, value in enumerate(values, 1):
        try:
            text = _text_under(value, key, f"{source.path}, object {number}")
        except UserError as error:
            passed(error)
            continue
        yield Document(f"{source.name}:{number}", source.path, text)


def _line_text(line: bytes, key: str, source: TextSource, begin: int, number: int) -> str:
    where = f"{source.path}, line {number}"
    try:
        if len(line) > MAX_LINE_BYTES:
            raise UserError(f"the line is longer than {MAX_LINE_BYTES} bytes", where=where)
        if number == 1 and not begin:
            line = line.removeprefix(codecs.BOM_UTF8)
        return _text_of(line, key, where)
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
    return _text_under(value, key, where)


def _text_under(value: Any, key: str, where: str) -> str:
    """The text of an object under a key, or under the keys that dots join: "data.text"."""
    if not isinstance(value, dict):
        raise UserError("the line is not a JSON object", where=where, fix=f'write {{"{key}": "..."}} on each line')
    text: Any = value.get(key)
    if key not in value:
        text = value
        for part in key.split("."):
            text = text.get(part) if isinstance(text, dict) else None
    if not isinstance(text, str):
        raise UserError(
            f"the line has no text under {key!r}",
            where=where,
            fix=f"name the key with --key; its keys are {', '.join(_keys(value)[:20]) or 'none'}",
        )
    return _whole(text, where)


def _keys(value: dict[str, Any]) -> list[str]:
    """The keys of an object, those of objects in it joined by dots."""
    found = []
    for name, inner in value.items():
        found += [f"{name}.{one}" for one in inner] if isinstance(inner, dict) else [name]
    return found


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


def _parquet(source: TextSource, key: str, passed: PassedOver) -> Iterator[Document]:
    if source.codec is not None:
        raise UserError(f"the Parquet file is compressed with {source.codec}", str(source.path), "decompress it")
    with _parquet_file(source.path) as file:
        names = file.schema_arrow.names
        column = key if key in names else key.split(".")[0]
        if column not in names:
            raise UserError(
                f"the file has no column {key!r}",
                str(source.path),
                f"name the column with --key; it has {', '.join(names[:20])}",
            )
        stop = file.metadata.num_row_groups if source.stop is None else source.stop
        row = sum(file.metadata.row_group(group).num_rows for group in range(source.start))
        groups = list(range(source.start, stop))
        for batch in file.iter_batches(PARQUET_ROWS, row_groups=groups, columns=[column]):
            for value in batch.column(0).to_pylist():
                row += 1
                for part in key.split(".")[1:] if column != key else ():
                    value = value.get(part) if isinstance(value, dict) else None
                if isinstance(value, str):
                    yield Document(f"{source.name}:{row}", source.path, value)
                else:
                    passed(UserError(f"the row has no text under {key!r}", f"{source.path}, row {row}"))


def _tar(source: TextSource, key: str, passed: PassedOver) -> Iterator[Document]:
    with contextlib.ExitStack() as stack:
        path = source.path
        if source.codec is not None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bigtrain-"))) / "plain.tar"
            with open_bytes(source.path, source.codec) as file, open(path, "wb") as plain:
                while chunk := file.read(READ_BYTES):
                    plain.write(chunk)
        for sample in samples(path, passed):
            where = f"{source.path}, sample {sample.key!r}"
            found = [member for member in sample.members if member.suffix in TEXT_MEMBERS or member.suffix == "json"]
            try:
                if not found:
                    raise UserError("the sample has no member .txt, .txt.gz or .json", where)
                member = min(found, key=lambda member: member.suffix == "json")
                if member.suffix == "json":
                    text = _text_of(sample.read(member, MAX_LINE_BYTES), key, where)
                else:
                    text = read_text(path, member.offset, member.size, TEXT_MEMBERS[member.suffix], where)
            except UserError as error:
                passed(error)
                continue
            yield Document(f"{source.name}:{sample.key}", source.path, text)
