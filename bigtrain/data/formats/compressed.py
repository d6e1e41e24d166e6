"""Reads compressed files as streams of limited size (against decompression bombs), and imports pyarrow if needed."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from bigtrain.config import UserError

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
"""Suffixes of compressed files."""
MAGIC = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"))
"""First bytes of compressed files, and their codecs."""
ZSTD_WINDOW_BYTES = 1 << 27
"""Maximum window that pyarrow decompresses; `zstd --long` uses up to 2 GiB."""
MAX_RATIO = 250
"""Maximum ratio of decompressed to compressed bytes; real text stays far below."""
FREE_BYTES = 1 << 28
"""Decompressed bytes up to which any ratio is accepted."""

_EXTRA = "In the checkout, run pip install -e '.[data]'."


@contextlib.contextmanager
def open_bytes(path: Path, codec: str | None) -> Iterator[IO[bytes]]:
    """Open a file as a stream of its decompressed bytes.

    Args:
        codec: One of the values of CODECS; None: the file is not compressed.

    Raises:
        UserError: The file is damaged or truncated, decompresses to too many bytes, or needs a library that is not
            installed.
    """
    if codec is None:
        with open(path, "rb") as plain:
            yield plain
        return
    limit = max(FREE_BYTES, MAX_RATIO * path.stat().st_size)
    errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, lzma.LZMAError)
    openers: dict[str, Callable[..., Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
    with contextlib.ExitStack() as stack:
        if codec in openers:
            stream: Any = stack.enter_context(openers[codec](path, "rb"))
        else:
            _check_window(path)
            try:
                import pyarrow
            except ImportError:
                raise UserError("reading zstd needs pyarrow", str(path), _EXTRA) from None
            stream = stack.enter_context(pyarrow.CompressedInputStream(str(path), codec))
            errors = (OSError, pyarrow.ArrowException)
        yield io.BufferedReader(_Bounded(stream, limit, path, errors), 1 << 20)


def _check_window(path: Path) -> None:
    """Refuse a zstd file whose frame header (RFC 8878) requires too much memory for decompression."""
    with open(path, "rb") as file:
        head = file.read(6)
    if len(head) < 6 or not head.startswith(b"\x28\xb5\x2f\xfd") or head[4] & 0x20:
        return
    base = 1 << (10 + (head[5] >> 3))
    window = base + (base >> 3) * (head[5] & 7)
    if window > ZSTD_WINDOW_BYTES:
        raise UserError(
            f"the zstd file was written with a window of {window >> 20} MiB; up to {ZSTD_WINDOW_BYTES >> 20} are read",
            str(path),
            f"Compress it again: zstd -dc --long=31 {path.name} | zstd -o NEW.zst",
        )


def pyarrow_module(name: str, what: str, path: Path) -> tuple[Any, tuple[type[Exception], ...]]:
    """A module of pyarrow, and the exceptions that it raises for damaged files.

    Args:
        name: "parquet" or "ipc".
        what: Name of its files, for the message.
        path: The file to be read.

    Raises:
        UserError: pyarrow is not installed.
    """
    try:
        import pyarrow

        return importlib.import_module(f"pyarrow.{name}"), (pyarrow.ArrowException, OSError)
    except ImportError:
        raise UserError(f"reading {what} needs pyarrow", str(path), _EXTRA) from None


class _Bounded(io.RawIOBase):
    """A stream that raises an error after more than `limit` bytes."""

    def __init__(self, stream: Any, limit: int, path: Path, errors: tuple[type[Exception], ...]) -> None:
        self._stream, self._limit, self._path, self._errors = stream, limit, path, errors
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except self._errors as error:
            raise UserError(f"the compressed file is damaged or cut short: {error}", str(self._path)) from None
        self._count += len(data)
        if self._count > self._limit:
            raise UserError(
                f"the file decompresses to more than {self._limit} bytes",
                str(self._path),
                "Decompress the file first if its size is intended.",
            )
        buffer[: len(data)] = data
        return len(data)
