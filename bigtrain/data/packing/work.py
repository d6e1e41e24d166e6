"""The tasks of a packing. Each task reads files and writes files, and is finished when its last file exists."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config import UserError
from bigtrain.data.accounting import PassedOver
from bigtrain.data.formats.documents import Document, documents_of
from bigtrain.data.formats.records import Source
from bigtrain.data.indexing import write_shard
from bigtrain.data.packing.plan import NPY_HEADER_BYTES, PlannedShard
from bigtrain.data.scanning import Scan
from bigtrain.data.shard import Shard
from bigtrain.data.sidecar import Rows
from bigtrain.data.tokenizers import Definition, Tokenizer
from bigtrain.storage import fsync_file, write_json

ID_CHUNK = 1 << 18
"""Number of stored tokens that are decoded at once, to count their characters."""
SHARD_NAME = "shard-{:06d}.tar"


@dataclass(frozen=True)
class PackJob:
    """The settings and inputs that every worker has."""

    key: str
    skip_bad: int
    seed: int
    parts: tuple[tuple[Source, ...], ...]
    """The parts of the input; a worker takes one part at a time."""


@dataclass(frozen=True)
class Scratch:
    """The temporary directory of a packing."""

    root: Path

    def part(self, number: int, suffix: str) -> Path:
        """Path of a file of one part."""
        return self.root / "parts" / f"{number:08d}{suffix}"

    def shard(self, split: str, number: int) -> Path:
        """Path of a shard."""
        return self.root / split / SHARD_NAME.format(number)

    def entry(self, split: str, number: int) -> Path:
        """Path of the note with a shard's entry for the index. It exists once the shard is finished."""
        return self.root / "parts" / f"{split}-{number:08d}.json"


class Worker:
    """Runs tasks, in this process or another."""

    def __init__(self, job: PackJob, scratch: Scratch, tokenizer: Tokenizer) -> None:
        self.job, self.scratch, self.tokenizer = job, scratch, tokenizer

    def survey(self, number: int) -> None:
        """Hash the documents of a part, and count their characters (or stored tokens)."""
        done = self.scratch.part(number, ".survey.npy")
        if done.exists():
            return
        found = []
        for document, pieces in self._documents(number, PassedOver(self.job.skip_bad)):
            digest = hashlib.blake2b(digest_size=8, key=self.job.seed.to_bytes(8, "little", signed=True))
            count = 0
            if document.ids is not None:
                digest.update(document.ids.tobytes())
                count = len(document.ids)
            for piece in pieces if document.ids is None else ():
                digest.update(piece.encode("utf-8"))
                count += len(piece)
            del document
            if count:
                found.append((int.from_bytes(digest.digest(), "little"), count))
        _save(done, np.asarray(found, dtype=np.uint64).reshape(-1, 2))

    def encode(self, number: int, boundary: int | None) -> None:
        """Tokenise the documents of a part.

        Args:
            boundary: The character (or stored token) at which the only document is divided into two; None: no division.
        """
        done = self.scratch.part(number, ".json")
        if done.exists():
            return
        lengths: list[tuple[int, int, int]] = []
        passed = PassedOver(self.job.skip_bad)
        with open(self.scratch.part(number, ".tokens"), "wb") as file:
            for document, pieces in self._documents(number, passed):
                for content in _contents(document, pieces, boundary):
                    begin = file.tell()
                    try:
                        if isinstance(content, np.ndarray):
                            length = self._copy_ids(content, document, file)
                        else:
                            length = self._encode_one(content, file)
                    except UserError as error:
                        passed(error)
                        file.seek(begin)
                        file.truncate()
                        continue
                    passed.empty += length is None
                    if length is not None:
                        lengths.append(length)
        _save(self.scratch.part(number, ".npy"), np.asarray(lengths, dtype=np.int64).reshape(-1, 3))
        write_json(done, {"empty": passed.empty, "bad": passed.bad})

    def write(self, shard: PlannedShard) -> None:
        """Write one shard and its sidecar."""
        entry, path = self.scratch.entry(shard.split, shard.number), self.scratch.shard(shard.split, shard.number)
        if entry.exists():
            return
        dtype = self.tokenizer.dtype
        stored: dict[int, Any] = {}
        rows: list[tuple[int, int]] = []
        largest, position = -1, 0
        # WebDataset's TarWriter is not used: its import loads torch, which takes seconds and 300 MB in each worker. It
        # also writes the members of a sample in another order than existing shards have.
        with open(path, "wb") as file:
            for member, piece in enumerate(shard.pieces, shard.first_member):
                if piece.part not in stored:
                    # Pieces come in the order of the parts. A plain array view of the memory map is cheap to slice.
                    tokens = np.memmap(self.scratch.part(piece.part, ".tokens"), dtype, mode="r")
                    stored = {piece.part: np.asarray(tokens)}
                ids = stored[piece.part][piece.start : piece.start + piece.count]
                head = _npy_head(dtype.str, piece.count)
                assert len(head) == NPY_HEADER_BYTES
                header = tarfile.TarInfo(f"{member:09d}.npy")
                header.size = len(head) + ids.nbytes
                padding = bytes(-header.size % tarfile.BLOCKSIZE)
                before = header.tobuf(tarfile.USTAR_FORMAT) + head
                rows.append((position + len(before), piece.count))
                largest = max(largest, int(ids.max()))
                position += file.write(b"".join((before, ids.tobytes(), padding)))
            end = position + 2 * tarfile.BLOCKSIZE
            file.truncate(end + -end % tarfile.RECORDSIZE)
        fsync_file(path)
        # Equal to the result of scan_shard, without reading the shard again.
        scan = Scan("tokens", np.asarray(rows, dtype=np.int64), dtype=dtype.str, largest_id=largest)
        recorded = write_shard(path, scan, path.parent)
        write_json(entry, {"shard": recorded.as_json(), "largest_id": scan.largest_id})

    def _documents(self, number: int, passed: PassedOver) -> Iterator[tuple[Document, Iterator[str]]]:
        for source in self.job.parts[number]:
            try:
                for document in documents_of(source, self.job.key, passed, self.tokenizer.eot):
                    if not self.job.skip_bad or _is_sound(document, passed):
                        yield document, document.pieces()
            except UserError as error:
                # The file itself cannot be read, or cannot be read to its end.
                passed(error)

    def _encode_one(self, pieces: Iterable[str], file: Any) -> tuple[int, int, int] | None:
        """Write a document's tokens and its end-of-text token.

        Returns:
            Numbers of tokens, characters and UTF-8 bytes; None if the document is empty.
        """
        characters = text_bytes = tokens = 0

        def counted() -> Iterator[str]:
            nonlocal characters, text_bytes
            for piece in pieces:
                characters += len(piece)
                text_bytes += len(piece.encode("utf-8"))
                yield piece

        dtype = self.tokenizer.dtype
        if self.tokenizer.bos is not None:
            tokens += self._write_ids(np.asarray([self.tokenizer.bos]), file)
        for ids in self.tokenizer.encode_stream(counted()):
            file.write(ids.astype(dtype).tobytes())
            tokens += len(ids)
        if not characters:
            # The begin-of-text token that was written belongs to no document, so it is removed.
            file.seek(-tokens * dtype.itemsize, os.SEEK_CUR)
            file.truncate()
            return None
        return tokens + self._write_ids(np.asarray([self.tokenizer.eot]), file), characters, text_bytes

    def _copy_ids(self, ids: np.ndarray, document: Document, file: Any) -> tuple[int, int, int] | None:
        """Write stored tokens, and add an end-of-text token if they do not end with one; see `_encode_one`."""
        if not len(ids) or (len(ids) == 1 and int(ids[0]) == self.tokenizer.eot):
            return None
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.tokenizer.vocab_size:
            raise UserError(
                f"the token ids range from {low} to {high}, but the tokenizer has {self.tokenizer.vocab_size} tokens",
                f"{document.path}, {document.name}",
                "Give the tokenizer that made them, or, for a file of tokens, another --token-type.",
            )
        characters = text_bytes = 0
        for first in range(0, len(ids), ID_CHUNK):
            text = self.tokenizer.decode(ids[first : first + ID_CHUNK])
            characters, text_bytes = characters + len(text), text_bytes + len(text.encode("utf-8", "replace"))
            self._write_ids(ids[first : first + ID_CHUNK], file)
        added = 0 if int(ids[-1]) == self.tokenizer.eot else self._write_ids(np.asarray([self.tokenizer.eot]), file)
        return len(ids) + added, characters, text_bytes

    def _write_ids(self, ids: np.ndarray, file: Any) -> int:
        file.write(ids.astype(self.tokenizer.dtype).tobytes())
        return len(ids)


def text_worker(job: PackJob, scratch: Scratch, tokenizer: Definition | None) -> Worker:
    """Build a worker from arguments that can be sent to another process; see `Tokenizer.definition`."""
    return Worker(job, scratch, Tokenizer.from_definition(tokenizer))


def _contents(document: Document, pieces: Iterator[str], boundary: int | None) -> Iterable[Iterator[str] | np.ndarray]:
    """The contents to store of a document: the full document, or its two parts at a boundary."""
    if document.ids is not None:
        return [document.ids] if boundary is None else [document.ids[:boundary], document.ids[boundary:]]
    return [pieces] if boundary is None else _divided(document, boundary)


def _is_sound(document: Document, passed: PassedOver) -> bool:
    """Whether a document can be read to its end. If not, it is counted as bad and skipped completely."""
    if document.text is None and document.ids is None:
        try:
            for _ in document.pieces():
                pass
        except UserError as error:
            passed(error)
            return False
    return True


def _divided(document: Document, boundary: int) -> tuple[Iterator[str], Iterator[str]]:
    """The first `boundary` characters of a document, and the rest, both as pieces of text."""

    def cut(first: int, last: int | None) -> Iterator[str]:
        position = 0
        for piece in document.pieces():
            part = piece[max(0, first - position) : None if last is None else max(0, last - position)]
            position += len(piece)
            if part:
                yield part

    return cut(0, boundary), cut(boundary, None)


def finished_shards(scratch: Scratch, split: str, count: int, dtype: str) -> list[tuple[Path, Scan, Shard]]:
    """The path, scan and index entry of each shard of a split. The scans have no rows."""
    none: Rows = np.zeros((0, 2), dtype=np.int64)
    found = []
    for number in range(count):
        value = json.loads(scratch.entry(split, number).read_bytes())
        scan = Scan("tokens", none, dtype=dtype, largest_id=value["largest_id"])
        found.append((scratch.shard(split, number), scan, Shard(**value["shard"])))
    return found


@functools.lru_cache(1 << 14)
def _npy_head(dtype: str, count: int) -> bytes:
    """The header of a .npy file with a one-dimensional array."""
    buffer = io.BytesIO()
    layout = {"descr": dtype, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(buffer, layout)
    return buffer.getvalue()


def _save(path: Path, values: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}")
    with open(temporary, "wb") as file:
        np.save(file, values, allow_pickle=False)
    os.replace(temporary, path)
