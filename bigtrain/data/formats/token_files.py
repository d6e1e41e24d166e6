"""Reads files of token ids: Megatron's `.bin` with `.idx`, llm.c's `.bin` with a header, nanoGPT's `.bin` of ids only.

    Megatron .idx   "MMIDIDX\\0\\0", version 1 (u8); type (u1); sequences, documents + 1 (u8 each); lengths (i4) and
                    byte offsets (i8) of the sequences; numbers (i8) of the sequences at which documents begin
    llm.c .bin      256 numbers (i4): magic, version, tokens; then the ids, uint16 or uint32 by the magic
    nanoGPT .bin    ids of the type that `--token-type` names

Without an index, end-of-text tokens separate documents. All numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bigtrain.config import UserError

MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
LLMC_TYPES = {20240520: "<u2", 20240801: "<u4"}
LLMC_HEADER_BYTES = 1024
TOKEN_TYPES = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4", "int32": "<i4", "int64": "<i8"}
"""Dtypes by the names that `--token-type` accepts."""
INDEX_SUFFIX = ".idx"

Ids = npt.NDArray[Any]


@dataclass(frozen=True)
class TokenFile:
    """A memory-mapped file of tokens."""

    path: Path
    ids: Ids
    """All token ids, in their stored dtype."""
    bounds: npt.NDArray[np.int64] | None
    """First token of each document, and the end of the last one; None: documents end at end-of-text tokens."""

    @property
    def size(self) -> int:
        """Number of documents; without bounds, number of tokens."""
        return len(self.ids) if self.bounds is None else len(self.bounds) - 1

    def documents(self, start: int, stop: int | None, eot: int) -> Iterator[tuple[int, Ids]]:
        """Yield documents with their number, counted from 1; without bounds, with the index of their first token.

        Args:
            start, stop: Range of documents; without bounds, range of tokens. A document belongs to the range that
                contains its first token.
            eot: Id of the end-of-text token, which ends a document.
        """
        last = self.size if stop is None else stop
        if self.bounds is not None:
            for number in range(start, last):
                yield number + 1, self.ids[self.bounds[number] : self.bounds[number + 1]]
            return
        begin = start
        if start and self.ids[start - 1] != eot:
            begin = self._after(start, eot)
        while begin < last:
            end = self._after(begin, eot)
            yield begin, self.ids[begin:end]
            begin = end

    def _after(self, place: int, eot: int, chunk: int = 1 << 20) -> int:
        """The index after the next end-of-text token; the number of tokens if there is none."""
        while place < len(self.ids):
            found = np.flatnonzero(self.ids[place : place + chunk] == eot)
            if len(found):
                return place + int(found[0]) + 1
            place += chunk
        return len(self.ids)


def is_token_file(path: Path) -> bool:
    """Whether a file is a `.bin` file of tokens with an index or a header."""
    return path.suffix == ".bin" and (_has_index(path) or _llmc_type(path) is not None)


def open_token_file(path: Path, token_type: str | None = None) -> TokenFile:
    """Open a file of tokens.

    Args:
        token_type: A key of TOKEN_TYPES, for files without index or header.

    Raises:
        UserError: The type of the tokens is not known, or the index does not fit the file.
    """
    if _has_index(path):
        return _megatron(path)
    header = _llmc_type(path)
    if header is None and token_type is None:
        raise UserError(
            "the file does not state the type of its tokens",
            str(path),
            f"Name it with --token-type {' or '.join(TOKEN_TYPES)}.",
        )
    dtype = np.dtype(header or TOKEN_TYPES[str(token_type)])
    offset = LLMC_HEADER_BYTES if header else 0
    size = path.stat().st_size - offset
    if size <= 0 or size % dtype.itemsize:
        raise UserError(f"the file does not hold whole tokens of {dtype.name}", str(path))
    return TokenFile(path, np.asarray(np.memmap(path, dtype, "r", offset)), None)


def _has_index(path: Path) -> bool:
    index = path.with_suffix(INDEX_SUFFIX)
    if not index.is_file():
        return False
    with open(index, "rb") as file:
        return file.read(len(MEGATRON_MAGIC)) == MEGATRON_MAGIC


def _llmc_type(path: Path) -> str | None:
    with open(path, "rb") as file:
        head = file.read(12)
    if len(head) < 12:
        return None
    magic, _, tokens = struct.unpack("<3i", head)
    dtype = LLMC_TYPES.get(magic)
    whole = dtype is not None and path.stat().st_size == LLMC_HEADER_BYTES + tokens * np.dtype(dtype).itemsize
    return dtype if whole else None


def _megatron(path: Path) -> TokenFile:
    index = path.with_suffix(INDEX_SUFFIX)
    data = index.read_bytes()
    try:
        version, code, sequences, documents = struct.unpack_from("<QBQQ", data, len(MEGATRON_MAGIC))
        dtype = np.dtype(MEGATRON_TYPES[code])
        place = len(MEGATRON_MAGIC) + struct.calcsize("<QBQQ")
        lengths = np.frombuffer(data, "<i4", sequences, place).astype(np.int64)
        pointers = np.frombuffer(data, "<i8", sequences, place + 4 * sequences)
        numbers = np.frombuffer(data, "<i8", documents, place + 12 * sequences)
        if version != 1 or len(numbers) < 2 or numbers[0] != 0 or numbers[-1] != sequences or (lengths < 0).any():
            raise ValueError("the documents are not all sequences")
        starts = np.concatenate([[0], np.cumsum(lengths)])
        if (np.diff(numbers) < 0).any() or not np.array_equal(pointers, starts[:-1] * dtype.itemsize):
            raise ValueError("the sequences do not lie one after another")
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise UserError(f"the index of tokens cannot be read: {error}", str(index)) from None
    if starts[-1] * dtype.itemsize != path.stat().st_size:
        raise UserError(f"the index lists {starts[-1]} tokens of {dtype.name}, which the file does not have", str(path))
    ids = np.asarray(np.memmap(path, dtype, "r")) if len(lengths) and starts[-1] else np.zeros(0, dtype)
    return TokenFile(path, ids, starts[numbers])
