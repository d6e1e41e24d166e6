"""Reading text: files, directories and JSON lines, as a sequence of documents in a fixed order.

Nothing is guessed: text is UTF-8 (a byte-order mark is dropped), and what is not is an error that
names the file and the byte or line.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtrain.config import UserError

TEXT_SUFFIXES = frozenset({
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".htm", ".xml", ".csv", ".tsv", ".json", ".yaml", ".yml",
    ".toml", ".ini", ".cfg", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java",
    ".js", ".ts", ".rb", ".sh", ".sql", ".pl", ".lua", ".scala", ".kt", ".swift", ".jl", ".r", ".hs", ".ml",
    ".lean",
})  # fmt: skip
JSON_LINES_SUFFIXES = frozenset({".jsonl", ".ndjson"})
READ_BYTES = 1 << 22
MAX_LINE_BYTES = 1 << 28


@dataclass(frozen=True)
class Document:
    """One text with a name: a file's path under its input, or FILE:LINE of a JSON-lines file.

    Either `text` holds it, or it is read from `path` when asked for.
    """

    name: str
    path: Path
    text: str | None = None

    def pieces(self) -> Iterator[str]:
        """The text in order, in pieces of a few MiB, so that memory does not grow with the document.

        Raises:
            UserError: The file is binary or not UTF-8; names the byte.
        """
        if self.text is not None:
            yield self.text
        else:
            yield from _decoded(self.path)


def documents(inputs: Sequence[str | Path], key: str = "text") -> Iterator[Document]:
    """The documents of files, directories (the text and JSON-lines files under them, sorted) and JSON lines.

    A file is one document, and so is a line of JSON. Inside a directory, hidden files, empty ones and those
    whose suffix is not that of text are passed over.

    Args:
        inputs: Paths, read in this order.
        key: The key of a JSON line that holds the text.

    Raises:
        UserError: A path is not there, a named file is empty, a line is not an object with text under `key`.
    """
    if not inputs:
        raise UserError("no input given", fix="name at least one text file, directory or .jsonl file")
    for given in inputs:
        source = Path(given)
        if source.is_dir():
            for path in _files_under(source):
                yield from _read(path, str(path.relative_to(source)), key)
        elif source.is_file():
            if source.stat().st_size == 0:
                raise UserError("the input is empty", where=str(source))
            yield from _read(source, source.name, key)
        else:
            raise UserError(f"no such file or directory: {str(given)!r}")


def _files_under(directory: Path) -> Iterable[Path]:
    """Text files below a directory, by path. Links to directories are not followed: they may form a cycle."""
    wanted = TEXT_SUFFIXES | JSON_LINES_SUFFIXES
    found = [
        path
        for path in directory.rglob("*")
        if path.suffix.lower() in wanted
        and not any(part.startswith((".", "__pycache__")) for part in path.relative_to(directory).parts)
        and path.is_file()
        and path.stat().st_size > 0
    ]
    if not found:
        raise UserError(
            "the directory holds no text",
            where=str(directory),
            fix="files with suffixes such as .txt, .md, .py, .jsonl are read; name others one by one",
        )
    return sorted(found, key=lambda path: path.relative_to(directory).parts)


def _read(path: Path, name: str, key: str) -> Iterator[Document]:
    if path.suffix.lower() in JSON_LINES_SUFFIXES:
        yield from _json_lines(path, name, key)
    else:
        yield Document(name, path)


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    offset = 0
    with open(path, "rb") as file:
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


def _json_lines(path: Path, name: str, key: str) -> Iterator[Document]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise UserError(f"the line is longer than {MAX_LINE_BYTES} bytes", where=where)
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            text = _text_of(line, key, where)
            if text:
                yield Document(f"{name}:{number}", path, text)


def _text_of(line: bytes, key: str, where: str) -> str:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"the line is not UTF-8: {error.reason}", where=f"{where}, byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the line is not JSON: {error}", where=where) from None
    if not isinstance(value, dict):
        raise UserError("the line is not a JSON object", where=where, fix=f'write {{"{key}": "..."}} on each line')
    text = value.get(key)
    if not isinstance(text, str):
        raise UserError(
            f"the line has no text under {key!r}",
            where=where,
            fix=f"its keys are {', '.join(value) or 'none'}: --key",
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the text holds half a character: {error.reason}", where=where) from None
    return text
