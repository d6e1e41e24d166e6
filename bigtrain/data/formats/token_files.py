"""Files of token ids: Megatron's `.bin` with `.idx`, llm.c's `.bin` with a header, and nanoGPT's `.bin` of ids alone.

    Megatron .idx   "MMIDIDX\\0\\0", version 1 (u8); type (u1); sequences, documents + 1 (u8 each); lengths (i4) and
                    places in bytes (i8) of the sequences; numbers (i8) of the sequences at which documents begin
    llm.c .bin      256 numbers (i4): magic, version, tokens; then the ids, uint16 or uint32 by the magic
    nanoGPT .bin    ids of the type that `--token-type` names

Without an index, documents are what lies between ends of text. All numbers are little-endian.
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
"""What `--token-type` may name."""
INDEX_SUFFIX = ".idx"

Ids = npt.NDArray[Any]


@dataclass(frozen=True)
class TokenFile:
    """A file of tokens, mapped."""

    path: Path
    ids: Ids
    """All of them, as they are stored."""
    bounds: npt.NDArray[np.int64] | None
    """Where documents begin, and where the last one ends; None: at the ends of text."""

    @property
    def size(self) -> int:
        """How many documents, or without bounds tokens, there are."""
        return len(self.ids) if self.bounds is None else len(self.bounds) - 1

    def documents(self, start: int, stop: int | None, eot: int) -> Iterator[tuple[int, Ids]]:
        """Documents with their number from 1, or with the place of their first token.

        Args:
            start, stop: Of the documents; without bounds of the tokens: a document belongs to the part that its first
                token lies in.
            eot: The end of text, which closes a document.
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
        """One past the next end of text."""
        while place < len(self.ids):
            found = np.flatnonzero(self.ids[place : place + chunk] == eot)
            if len(found):
                return place + int(found[0]) + 1
            place += chunk
        return len(self.ids)


def is_token_file(path: Path) -> bool:
    """Whether a `.bin` file says by an index or a header what it holds."""
    return path.suffix == ".bin" and (_has_index(path) or _llmc_type(path) is not None)


def open_token_file(path: Path, token_type: str | None = None) -> TokenFile:
    """A file of tokens.

    Args:
        token_type: A name of TOKEN_TYPES, for files that do not say it.

    Raises:
        UserError: The type is not known, or the index does not fit the file.
    """
    if _has_index(path):
        return _megatron(path)
    header = _llmc_type(path)
    if header is None and token_type is None:
        raise UserError(
            "the file does not say of which type its tokens are",
            str(path),
            f"name it with --token-type {' or '.join(TOKEN_TYPES)}",
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
