"""Reads text from files of many formats, as a sequence of documents in a fixed order.

Encodings are not guessed: text must be UTF-8 (a byte-order mark is dropped). Other text is an error that names the file
and the byte, line, row or sample. Files that decompress to far more bytes than text does are refused.
"""

from __future__ import annotations

import codecs
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from bigtrain.config import UserError
from bigtrain.data.accounting import PassedOver
from bigtrain.data.formats.compressed import open_bytes
from bigtrain.data.formats.detect import NOT_TEXT, Content, detect, suffix_of
from bigtrain.data.formats.mds import INDEX_NAME as MDS_INDEX
from bigtrain.data.formats.mds import mds_files
from bigtrain.data.formats.records import (
    MAX_LINE_BYTES,
    READ_BYTES,
    READERS,
    Record,
    Source,
    parquet_file,
    parse_json,
    records_of,
    tar_samples,
    under,
)
from bigtrain.data.formats.text import TEXT_MEMBERS, read_text
from bigtrain.data.formats.token_files import Ids, open_token_file
from bigtrain.data.index import advice_on_shards

TEXT_SUFFIXES = frozenset({
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".htm", ".xml", ".csv", ".tsv", ".json", ".yaml", ".yml",
    ".toml", ".ini", ".cfg", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java",
    ".js", ".ts", ".rb", ".sh", ".sql", ".pl", ".lua", ".scala", ".kt", ".swift", ".jl", ".r", ".hs", ".ml",
    ".lean",
})  # fmt: skip
RECORD_SUFFIXES = frozenset({".json", ".csv", ".tsv"})
"""Suffixes of files that usually hold records, and not a single text."""
TABLE_NOTES = frozenset({"state.json", "dataset_info.json", "dataset_dict.json"})
"""Metadata files that the library `datasets` writes beside its Arrow files."""


@dataclass(frozen=True)
class Document:
    """One text with a name, such as a file's path under its input, or FILE:LINE of a JSON-lines file.

    The text is in `text`, or is read from `path` when needed, or is already tokenised (`ids`).
    """

    name: str
    path: Path
    text: str | None = None
    codec: str | None = None
    ids: Ids | None = None
    """Stored tokens of the document, with or without an end-of-text token; None: the document is text."""

    def pieces(self) -> Iterator[str]:
        """Yield the text in pieces of a few MiB, so that a large file does not have to fit into memory.

        Raises:
            UserError: The file is binary or not UTF-8; the error names the byte.
        """
        if self.text is not None:
            yield self.text
        else:
            with open_bytes(self.path, self.codec) as file:
                yield from _decoded(self.path, file)


def documents(inputs: Sequence[str | Path], key: str = "text") -> Iterator[Document]:
    """The documents of some inputs, in their order; see `sources`.

    Args:
        key: The key of an object, or the column of a table, that holds the text; dots join keys (`records.under`).

    Raises:
        UserError: See `sources`; or a document is not text, or an object has no text under `key`.
    """
    for source in sources(inputs, key=key):
        yield from documents_of(source, key)


def sources(
    inputs: Sequence[str | Path], passed: PassedOver | None = None, key: str = "text", token_type: str | None = None
) -> Iterator[Source]:
    """Yield each file that the inputs name once.

    Formats are recognized by content: text, JSON lines, JSON arrays of objects, Parquet, and tars of text members, each
    also compressed with gzip, zstd, bzip2 or xz; Arrow files, directories of MDS, and files of tokens.
    A directory means all such files under it, sorted. "*", "?" and "**" are wildcards.
    One text file, line, object, row or sample is one document.

    Args:
        inputs: Paths of files or directories, or patterns.
        passed: Counts the skipped files, and the records that are read as plain text.
        key: See `documents`.
        token_type: Integer type of `.bin` files that hold only tokens; see `token_files`.

    Raises:
        UserError: A path does not exist, or a named file is empty or not text.
    """
    passed = passed or PassedOver()
    if not inputs:
        raise UserError("no input given", fix="Name at least one text file, directory, .jsonl or .parquet file.")
    seen: set[str] = set()
    for source in _given(inputs, passed, key, token_type):
        place = os.path.abspath(source.path)
        if place in seen:
            passed.ignore(str(source.path), "named twice")
            continue
        seen.add(place)
        if source.kind == "text" and suffix_of(source.path) in RECORD_SUFFIXES:
            passed.plain.append(source.name)
        yield source


def _given(inputs: Sequence[str | Path], passed: PassedOver, key: str, token_type: str | None) -> Iterator[Source]:
    """Yield the files of all inputs; a file that two inputs name comes twice."""
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            yield from _files_under(path, passed, key, token_type)
        elif path.is_file():
            if path.stat().st_size == 0:
                raise UserError("the input is empty", where=str(path))
            yield _named(path, path.name, key, token_type)
        else:
            matches = sorted(glob.glob(str(given), recursive=True)) if glob.has_magic(str(given)) else []
            files = [Path(match) for match in matches if Path(match).is_file() and Path(match).stat().st_size]
            if not files:
                raise UserError(f"no such file or directory: {str(given)!r}")
            for found in files:
                yield _named(found, str(found), key, token_type)


def documents_of(
    source: Source, key: str = "text", passed: PassedOver | None = None, eot: int = -1
) -> Iterator[Document]:
    """The documents of one source.

    Args:
        passed: Counts empty documents, and counts or refuses bad lines, objects, rows or samples; None: the first bad
            one is an error.
        eot: Id of the end-of-text token, at which files of tokens are divided into documents.

    Raises:
        UserError: See `documents`.
    """
    passed = passed or PassedOver()
    if source.kind == "ids":
        for place, ids in open_token_file(source.path, source.token_type).documents(source.start, source.stop, eot):
            yield Document(f"{source.name}:{place}", source.path, ids=ids)
        return
    if source.kind not in READERS:
        yield Document(source.name, source.path, codec=source.codec)
        return
    for document in (_tar if source.kind == "tar" else _objects)(source, key, passed):
        if document.text:
            yield document
        else:
            passed.empty += 1


def parts(source: Source, part_bytes: int) -> Iterator[Source]:
    """Divide a source into parts of about `part_bytes`, if its format can be read from the middle.

    These formats are JSON lines, Parquet (one part per row group), and files of tokens.
    """

    def part(start: int, stop: int, size: int) -> Source:
        return replace(source, start=start, stop=stop, bytes=size)

    if source.kind == "lines" and source.codec is None and source.bytes > part_bytes:
        for start in range(0, source.bytes, part_bytes):
            stop = min(source.bytes, start + part_bytes)
            yield part(start, stop, stop - start)
    elif source.kind == "parquet":
        with parquet_file(source.path) as file:
            groups = file.metadata.num_row_groups
        for group in range(groups):
            yield part(group, group + 1, source.bytes // groups)
    elif source.kind == "ids" and source.bytes > part_bytes:
        total = open_token_file(source.path, source.token_type).size
        count = min(total, -(-source.bytes // part_bytes))
        for number in range(count):
            yield part(total * number // count, total * (number + 1) // count, source.bytes // count)
    else:
        yield source


def _source(path: Path, name: str, content: Content, token_type: str | None = None) -> Source:
    return Source(path, name, content.kind, content.codec, bytes=path.stat().st_size, token_type=token_type)


def _named(path: Path, name: str, key: str, token_type: str | None) -> Source:
    """A file that the user has named itself. A file that is not text is an error."""
    if path.suffix == ".bin" and token_type is not None:
        return _source(path, name, Content("ids"), token_type)
    content = detect(path, key)
    if content.kind == "binary" and path.suffix == ".bin":
        open_token_file(path)
    if content.kind == "binary" and content.what != NOT_TEXT:
        raise UserError(f"the input is {content.what}, not text", str(path), "Unpack it, or name files of text.")
    return _source(path, name, content if content.kind != "binary" else Content("text", content.codec))


def _files_under(directory: Path, passed: PassedOver, key: str, token_type: str | None) -> Iterator[Source]:
    """Yield the text files below a directory, sorted by path. Links to directories are not followed (cycles)."""
    found = 0
    if (directory / MDS_INDEX).is_file() and (shards := mds_files(directory)):
        for path in shards:
            yield _source(path, path.name, Content("mds"))
        return
    has_tables = any(directory.rglob("*.arrow"))
    for path in sorted(directory.rglob("*"), key=lambda path: path.relative_to(directory).parts):
        name = str(path.relative_to(directory))
        if path.is_symlink() and not path.is_file():
            passed.ignore(name, "a link to a directory, or a broken link")
        elif path.is_dir():
            continue
        elif any(part.startswith((".", "__pycache__")) for part in path.relative_to(directory).parts):
            passed.ignore(name, "hidden")
        elif not path.is_file():
            passed.ignore(name, "not a regular file")
        elif not path.stat().st_size:
            passed.empty += 1
        elif has_tables and path.name in TABLE_NOTES:
            passed.ignore(name, "a metadata file of an Arrow data set")
        elif path.suffix == ".bin" and token_type is not None:
            found += 1
            yield _source(path, name, Content("ids"), token_type)
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
            fix="Name files one by one if their suffix is not one such as .txt, .md, .py, .jsonl or .parquet.",
        )


def _reason_to_skip(path: Path, content: Content) -> str | None:
    """The reason why a file of a directory is not read; None: it is read."""
    suffix = suffix_of(path)
    if content.kind == "binary":
        # A file that has a suffix of text but other content is a mistake, which reading it reports.
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
            wide = not offset and chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            raise UserError(
                "the input is UTF-16" if wide else "the input is binary, not text",
                where=f"{path}, byte {offset + zero}",
                fix="Convert it: iconv -f utf-16 -t utf-8" if wide else "Give UTF-8 text.",
            )
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise UserError(
                f"the input is not UTF-8: {error.reason}",
                where=f"{path}, byte {offset - held + error.start}",
                fix="Convert it, for example with iconv -f latin1 -t utf-8.",
            ) from None
        if text:
            yield text
        if not chunk:
            return
        offset += len(chunk)
        chunk = file.read(READ_BYTES)


def _objects(source: Source, key: str, passed: PassedOver) -> Iterator[Document]:
    for record in records_of(source, passed, [key]):
        try:
            text = _text_under(record, key)
        except UserError as error:
            passed(error)
            continue
        yield Document(record.name, source.path, text)


def _text_under(record: Record, key: str) -> str:
    """The text of an object under a key (`records.under`); a list of texts is joined as lines."""
    value = record.value
    if not isinstance(value, dict):
        fix = f'Write {{"{key}": "..."}} on each line.'
        raise UserError(f"the {record.noun} is not a JSON object", where=record.where, fix=fix)
    text = under(value, key)
    if isinstance(text, list) and text and all(isinstance(one, str) for one in text):
        text = "\n".join(text)
    if not isinstance(text, str):
        where = record.where
        raise UserError(
            f"the {record.noun} has no text under {key!r}",
            where=where,
            fix=f"Name the key with --key. Its keys are {', '.join(_keys(value)[:20]) or 'none'}.",
        )
    return _whole(text, record)


def _keys(value: dict[str, Any]) -> list[str]:
    """The keys of an object; keys of nested objects are joined by dots."""
    found = []
    for name, inner in value.items():
        found += [f"{name}.{one}" for one in inner] if isinstance(inner, dict) else [name]
    return found


def _whole(text: str, record: Record) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the text holds an unpaired surrogate: {error.reason}", where=record.where) from None
    return text


def _tar(source: Source, key: str, passed: PassedOver) -> Iterator[Document]:
    for sample in tar_samples(source, passed):
        record = Record(source, None, "sample", sample.key)
        found = [member for member in sample.members if member.suffix in TEXT_MEMBERS or member.suffix == "json"]
        try:
            if not found:
                fix = advice_on_shards([source.path]) or "give tars of texts, or --kind for samples of other kinds"
                raise UserError("the sample has no member .txt, .txt.gz or .json", record.where, fix)
            member = min(found, key=lambda member: member.suffix == "json")
            if member.suffix == "json":
                value = parse_json(sample.read(member, MAX_LINE_BYTES), record)
                text = _text_under(replace(record, value=value), key)
            else:
                text = read_text(sample.path, member.offset, member.size, TEXT_MEMBERS[member.suffix], record.where)
        except UserError as error:
            passed(error)
            continue
        yield Document(record.name, source.path, text)
