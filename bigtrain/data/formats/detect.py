"""Detects the format of a file by its content; the name only decides if the content does not."""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bigtrain.config import UserError
from bigtrain.data.formats.compressed import CODECS, MAGIC, open_bytes
from bigtrain.data.formats.token_files import is_token_file

HEAD_BYTES = 1 << 14
LINE_BYTES = 1 << 26
"""Maximum bytes of a first line that are parsed to see whether it is JSON."""
JSON_LINES_SUFFIXES = frozenset({".jsonl", ".ndjson"})

Kind = Literal["text", "lines", "records", "parquet", "arrow", "mds", "tar", "ids", "binary"]

NOT_TEXT = "not UTF-8 text"

_BINARY = (
    (b"PK\x03\x04", "a zip archive"), (b"\x93NUMPY", "a NumPy array"), (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"), (b"%PDF", "a PDF"), (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x04\x22\x4d\x18", "lz4"), (b"MMIDIDX\x00", "the index of a Megatron .bin"),
)  # fmt: skip
_TAR_MAGIC = slice(257, 262)


@dataclass(frozen=True)
class Content:
    """The format of a file."""

    kind: Kind
    codec: str | None = None
    """Compression of the file: one of the values of `CODECS`; None: not compressed."""
    what: str = ""
    """Description of a binary file, for messages."""


def detect(path: Path, key: str = "text") -> Content:
    """Detect the format of a file.

    JSON lines are several lines that each hold an object, or a single line whose object has `key`. A JSON array of
    objects is of the kind "records".
    """
    if is_token_file(path):
        return Content("ids")
    with open(path, "rb") as file:
        start = file.read(8)
    codec = next((name for magic, name in MAGIC if start.startswith(magic)), None) or CODECS.get(path.suffix.lower())
    if path.name.lower().endswith(".tgz"):
        codec = "gzip"
    inner = path.name.lower()
    for suffix in CODECS if codec else ():
        inner = inner.removesuffix(suffix)
    named = _by_name(inner)
    try:
        with open_bytes(path, codec) as stream:
            head = stream.read(HEAD_BYTES)
            if (kind := _by_magic(head)) is not None:
                return Content(kind[0], codec, kind[1])
            if named is not None:
                return Content(named, codec)
            if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"["):
                # If no line ends inside the head, the first line is read to its end.
                whole = head if b"\n" in head.strip() else head + stream.read(LINE_BYTES)
                return Content(_json_kind(whole, key, len(whole) < HEAD_BYTES + LINE_BYTES), codec)
    except UserError:
        # The file is damaged or truncated, or its library is not installed. Reading it will report that.
        return Content(named or "text", codec)
    return Content("text" if is_text(head) else "binary", codec, "" if is_text(head) else NOT_TEXT)


def suffix_of(path: Path) -> str:
    """A file's suffix in lower case, without the suffix of a compression."""
    name = path.name.lower()
    for suffix in CODECS:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def is_text(head: bytes) -> bool:
    """Whether the first bytes of a file are UTF-8 text."""
    try:
        codecs.getincrementaldecoder("utf-8")("strict").decode(head, final=len(head) < HEAD_BYTES)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _by_name(name: str) -> Kind | None:
    if name.endswith(tuple(JSON_LINES_SUFFIXES)):
        return "lines"
    if name.endswith(".parquet"):
        return "parquet"
    return "tar" if name.endswith((".tar", ".tgz")) else None


def _by_magic(head: bytes) -> tuple[Kind, str] | None:
    if head.startswith(b"PAR1"):
        return "parquet", ""
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow", ""
    if head[_TAR_MAGIC] == b"ustar":
        return "tar", ""
    return next((("binary", what) for magic, what in _BINARY if head.startswith(magic)), None)


def _json_kind(data: bytes, key: str, is_whole: bool) -> Kind:
    """Whether text that begins like JSON is lines of objects, an array of objects, or a document."""
    text = data.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"["):
        return "records" if text[1:].lstrip()[:1] == b"{" else "text"
    lines = [line for line in text.split(b"\n") if line.strip()]
    first = _object(lines[0])
    if first is None:
        return "text"
    if len(lines) == 1:
        return "lines" if key.split(".")[0] in first or not is_whole else "text"
    # The second line may end after the head.
    return "lines" if lines[1].lstrip().startswith(b"{") else "text"


def _object(line: bytes) -> dict[str, object] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
