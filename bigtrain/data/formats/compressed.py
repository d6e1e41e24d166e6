"""Compressed files, read as streams that end where a bomb begins; and Parquet's library, where it is installed."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from bigtrain.config import UserError

CODECS = {".gz": "gzip", ".zst": "zstd"}
"""Suffixes of compressed files."""
MAX_RATIO = 250
"""Bytes of text that a compressed byte may stand for; real text stays far below."""
FREE_BYTES = 1 << 28
"""Up to here any ratio will do."""

_EXTRA = "pip install -e '.[data]', in the checkout"


@contextlib.contextmanager
def open_bytes(path: Path, codec: str | None) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed.

    Raises:
        UserError: Damaged, cut short, more than MAX_RATIO times its size, or of a kind whose library is not installed.
    """
    if codec is None:
        with open(path, "rb") as plain:
            yield plain
        return
    limit = max(FREE_BYTES, MAX_RATIO * path.stat().st_size)
    errors: tuple[type[Exception], ...] = (gzip.BadGzipFile, EOFError, zlib.error)
    with contextlib.ExitStack() as stack:
        if codec == "gzip":
            stream: Any = stack.enter_context(gzip.open(path, "rb"))
        else:
            try:
                import pyarrow
            except ImportError:
                raise UserError("reading zstd needs pyarrow", str(path), _EXTRA) from None
            stream = stack.enter_context(pyarrow.CompressedInputStream(str(path), codec))
            errors = (OSError, pyarrow.ArrowException)
        yield io.BufferedReader(_Bounded(stream, limit, path, errors), 1 << 20)


def parquet_module(path: Path) -> tuple[Any, tuple[type[Exception], ...]]:
    """pyarrow.parquet, and what it raises for damaged files.

    Raises:
        UserError: It is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("reading Parquet needs pyarrow", str(path), _EXTRA) from None
    return parquet, (pyarrow.ArrowException, OSError)


class _Bounded(io.RawIOBase):
    """A stream that is an error beyond a number of bytes."""

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
                "decompress it, if it is meant",
            )
        buffer[: len(data)] = data
        return len(data)
