"""The pieces of work of a packing: each reads files, writes files, and is finished when its last file is there."""

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
"""Tokens of a file of tokens that are decoded at once, to count the characters that they stand for."""
SHARD_NAME = "shard-{:06d}.tar"


@dataclass(frozen=True)
class PackJob:
    """What every worker knows."""

    key: str
    skip_bad: int
    seed: int
    parts: tuple[tuple[Source, ...], ...]
    """Pieces of the input that one worker takes at a time."""


@dataclass(frozen=True)
class Scratch:
    """Where a packing keeps what it has done."""

    root: Path

    def part(self, number: int, suffix: str) -> Path:
        """A file of one part."""
        return self.root / "parts" / f"{number:08d}{suffix}"

    def shard(self, split: str, number: int) -> Path:
        """A finished shard."""
        return self.root / split / SHARD_NAME.format(number)

    def entry(self, split: str, number: int) -> Path:
        """What the index will say of a shard; there once the shard is finished."""
        return self.root / "parts" / f"{split}-{number:08d}.json"


class Worker:
    """Does pieces of work, in this process or another."""

    def __init__(self, job: PackJob, scratch: Scratch, tokenizer: Tokenizer) -> None:
        self.job, self.scratch, self.tokenizer = job, scratch, tokenizer

    def survey(self, number: int) -> None:
        """Hash and count the documents of a part."""
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
        """Tokenise the documents of a part; with a boundary, the only document as two."""
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
        # Written here: importing WebDataset's TarWriter loads torch, seconds and 300 MB for each worker, and it writes
        # the members of a sample in another order than shards that exist already.
        with open(path, "wb") as file:
            for member, piece in enumerate(shard.pieces, shard.first_member):
                if piece.part not in stored:
                    # Pieces come in the order of the parts. A plain array over the mapped one is cheap to slice.
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
        # As scan_shard finds it, without reading the shard over.
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
                # The file itself cannot be read, or not to its end.
                passed(error)

    def _encode_one(self, pieces: Iterable[str], file: Any) -> tuple[int, int, int] | None:
        """Write a document's tokens and its end of text; tokens, characters, bytes, or None where it is empty."""
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
            # What was written is not part of any document's length: it is taken back.
            file.seek(-tokens * dtype.itemsize, os.SEEK_CUR)
            file.truncate()
            return None
        return tokens + self._write_ids(np.asarray([self.tokenizer.eot]), file), characters, text_bytes

    def _copy_ids(self, ids: np.ndarray, document: Document, file: Any) -> tuple[int, int, int] | None:
        """Write the tokens of a file of tokens, which end with the end of text in any case."""
        if not len(ids) or (len(ids) == 1 and int(ids[0]) == self.tokenizer.eot):
            return None
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.tokenizer.vocab_size:
            raise UserError(
                f"the tokens go from {low} to {high}, and the tokenizer has {self.tokenizer.vocab_size}",
                f"{document.path}, {document.name}",
                "name the tokenizer that made them; or, of a file of tokens alone, another --token-type",
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
    """A worker from what can be sent to a process; see `Tokenizer.definition`."""
    return Worker(job, scratch, Tokenizer.from_definition(tokenizer))


def _contents(document: Document, pieces: Iterator[str], boundary: int | None) -> Iterable[Iterator[str] | np.ndarray]:
    """What is stored of a document: itself, or two parts of it."""
    if document.ids is not None:
        return [document.ids] if boundary is None else [document.ids[:boundary], document.ids[boundary:]]
    return [pieces] if boundary is None else _divided(document, boundary)


def _is_sound(document: Document, passed: PassedOver) -> bool:
    """Whether a document can be read to its end: one that cannot is skipped as a whole."""
    if document.text is None and document.ids is None:
        try:
            for _ in document.pieces():
                pass
        except UserError as error:
            passed(error)
            return False
    return True


def _divided(document: Document, boundary: int) -> tuple[Iterator[str], Iterator[str]]:
    """A document's first `boundary` characters and the others, each as pieces."""

    def cut(first: int, last: int | None) -> Iterator[str]:
        position = 0
        for piece in document.pieces():
            part = piece[max(0, first - position) : None if last is None else max(0, last - position)]
            position += len(piece)
            if part:
                yield part

    return cut(0, boundary), cut(boundary, None)


def finished_shards(scratch: Scratch, split: str, count: int, dtype: str) -> list[tuple[Path, Scan, Shard]]:
    """The shards of a split, with what their index needs to know."""
    none: Rows = np.zeros((0, 2), dtype=np.int64)
    found = []
    for number in range(count):
        value = json.loads(scratch.entry(split, number).read_bytes())
        scan = Scan("tokens", none, dtype=dtype, largest_id=value["largest_id"])
        found.append((scratch.shard(split, number), scan, Shard(**value["shard"])))
    return found


@functools.lru_cache(1 << 14)
def _npy_head(dtype: str, count: int) -> bytes:
    """What stands before the values of a .npy file of one axis."""
    buffer = io.BytesIO()
    layout = {"descr": dtype, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(buffer, layout)
    return buffer.getvalue()


def _save(path: Path, values: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}")
    with open(temporary, "wb") as file:
        np.save(file, values, allow_pickle=False)
    os.replace(temporary, path)
