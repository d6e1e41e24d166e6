"""Packing: documents of text become shards of tokens (`bigtrain data pack`).

The same input gives the same bytes: keys are counted, times and owners are zero. Everything is written to a
temporary directory beside the output and renamed at the end, so that a kill leaves nothing that looks whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config import UserError
from bigtrain.data.documents import Document, documents
from bigtrain.data.index import ShardIndex
from bigtrain.data.indexing import index_directory
from bigtrain.data.tokenizers import Tokenizer, Tokens
from bigtrain.storage import fsync_directory, fsync_file

SHARD_BYTES = 64 << 20
MIN_SHARD_BYTES = 1 << 10
SHARD_NAME = "shard-{:06d}.tar"

Progress = Callable[[str, int, int], None]
"""Called after each document with its name, and the documents and tokens so far."""


@dataclass(frozen=True)
class SplitSummary:
    """What one split holds."""

    directory: str
    documents: int
    tokens: int
    """Ends of text included."""
    characters: int
    shards: int
    bytes: int
    fingerprint: str

    @property
    def characters_per_token(self) -> float:
        """How far the tokenizer compresses the text; ends of text are no characters."""
        return self.characters / self.tokens


@dataclass(frozen=True)
class PackSummary:
    """What `pack` wrote."""

    out: str
    vocab_size: int
    held_out: str | None
    """How the validation data was chosen: "documents", "tail" of the only document, or None."""
    empty_documents: int
    """Documents without text, which were passed over."""
    splits: dict[str, SplitSummary]

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        value = dataclasses.asdict(self)
        for name, split in self.splits.items():
            value["splits"][name]["characters_per_token"] = split.characters_per_token
        return value


def pack(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    validation: float | str = 0.0,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
    key: str = "text",
    progress: Progress | None = None,
) -> PackSummary:
    """Tokenise documents into OUT/train, and OUT/validation where `validation` is above zero.

    Args:
        inputs: Files, directories, JSON lines: see `documents`.
        out: A directory that does not exist yet, or is empty.
        tokenizer: What encodes the text; copied into each split.
        validation: Share of the documents to hold out ("1%" or 0.01), at least one, chosen by a hash of
            their text and `seed`, so that copies of a text fall on the same side. A single document gives up
            its tail.
        shard_bytes: Size that a shard exceeds by its headers at most; a longer document goes on in the next.
        seed: Another choice of held-out documents.
        key: The key of a JSON line that holds the text.
        progress: Called after each document.

    Raises:
        UserError: Bad input (see `documents`), no text at all, or `out` is not empty.
    """
    share = parse_share(validation)
    target = Path(out)
    if shard_bytes < MIN_SHARD_BYTES:
        raise UserError(f"shards of {shard_bytes} bytes are too small", fix=f"use at least {MIN_SHARD_BYTES}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{str(out)!r} exists and is not empty", fix="choose another --out, or delete it")
    survey = _survey(documents(inputs, key), seed) if share else None
    with _temporary_beside(target) as temporary:
        writers, empty = _write_splits(
            documents(inputs, key), temporary, tokenizer, share, survey, shard_bytes, progress
        )
        splits = {}
        for name, writer in writers.items():
            index = index_directory(writer.directory, tokenizer, text_bytes=writer.text_bytes)
            fsync_directory(writer.directory)
            splits[name] = _summary(writer, index, target / name)
        fsync_directory(temporary)
        try:
            os.replace(temporary, target)
        except OSError as error:
            raise UserError(f"the output cannot be put in place: {error.strerror}", where=str(target)) from None
        fsync_directory(target.parent)
    held_out = None if survey is None else "tail" if len(survey.hashes) == 1 else "documents"
    return PackSummary(str(target), tokenizer.vocab_size, held_out, empty, splits)


def parse_share(value: float | str) -> float:
    """A share such as "1%" or 0.01 as a number in [0, 1).

    Raises:
        UserError: Anything else.
    """
    text = str(value).strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise UserError(f"{value!r} is not a share of the documents", fix="write for example 1%")
    return share


@dataclass(frozen=True)
class _Survey:
    """What a first reading of all documents finds out."""

    hashes: list[int]
    characters: list[int]

    def held_out(self, share: float) -> set[int]:
        """The documents to hold out, by number: those of the smallest hashes."""
        count = len(self.hashes)
        ranked = sorted(range(count), key=lambda number: (self.hashes[number], number))
        wanted = min(max(1, round(share * count)), count - 1)
        chosen = ranked[:wanted]
        copies = [number for number in ranked[wanted:] if self.hashes[number] == self.hashes[chosen[-1]]]
        return set(chosen + copies if wanted + len(copies) < count else chosen)


def _survey(texts: Iterable[Document], seed: int) -> _Survey:
    hashes, characters = [], []
    for document in texts:
        digest = hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, "little", signed=True))
        count = 0
        for piece in document.pieces():
            digest.update(piece.encode("utf-8"))
            count += len(piece)
        if count:
            hashes.append(int.from_bytes(digest.digest(), "little"))
            characters.append(count)
    if not hashes:
        raise _no_text()
    if len(hashes) == 1 and characters[0] < 2:
        raise UserError("one character cannot be divided into training and validation text", fix="give more text")
    return _Survey(hashes, characters)


def _no_text() -> UserError:
    return UserError("the input is empty: it holds no text", fix="give files with text in them")


class _SplitWriter:
    """Writes the shards of one split through WebDataset's TarWriter."""

    def __init__(self, directory: Path, tokenizer: Tokenizer, shard_bytes: int) -> None:
        directory.mkdir()
        self.directory = directory
        self.documents = self.characters = self.tokens = self.text_bytes = 0
        self._tokenizer = tokenizer
        self._shard_bytes = shard_bytes
        self._member_tokens = max(1, shard_bytes // tokenizer.dtype.itemsize)
        self._members = self._shards = self._used_bytes = 0
        self._stack = contextlib.ExitStack()
        self._tar: Any = None

    def write(self, pieces: Iterable[str]) -> bool:
        """Append one document and its end of text; False where it holds no text."""
        held: list[Tokens] = []
        count = before = self.characters
        for ids in self._tokenizer.encode_stream(self._counted(pieces)):
            held.append(ids)
            count = sum(len(part) for part in held)
            while count >= self._member_tokens:
                joined = np.concatenate(held)
                self._write_member(joined[: self._member_tokens])
                held = [joined[self._member_tokens :]]
                count = len(held[0])
        if self.characters == before:
            return False
        self._write_member(np.concatenate([*held, np.asarray([self._tokenizer.eot])]))
        self.documents += 1
        return True

    def close(self) -> None:
        """Finish the last shard and sync it."""
        if self._tar is not None:
            path = self.directory / SHARD_NAME.format(self._shards - 1)
            self._stack.close()
            fsync_file(path)
            self._tar = None

    def _counted(self, pieces: Iterable[str]) -> Iterator[str]:
        for piece in pieces:
            self.characters += len(piece)
            self.text_bytes += len(piece.encode("utf-8"))
            yield piece

    def _write_member(self, ids: Tokens) -> None:
        from webdataset import TarWriter

        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, ids.astype(self._tokenizer.dtype), allow_pickle=False)
        size = buffer.tell()
        if self._tar is not None and self._used_bytes + size > self._shard_bytes:
            self.close()
        if self._tar is None:
            file = self._stack.enter_context(open(self.directory / SHARD_NAME.format(self._shards), "wb"))  # noqa: SIM115
            writer = TarWriter(file, user="", group="", mode=0o644, compress=False, encoder=False, mtime=0)
            self._tar = self._stack.enter_context(writer)
            self._shards += 1
            self._used_bytes = 0
        self._tar.write({"__key__": f"{self._members:09d}", "npy": buffer.getvalue()})
        self._members += 1
        self._used_bytes += size
        self.tokens += len(ids)


def _write_splits(
    texts: Iterable[Document],
    root: Path,
    tokenizer: Tokenizer,
    share: float,
    survey: _Survey | None,
    shard_bytes: int,
    progress: Progress | None,
) -> tuple[dict[str, _SplitWriter], int]:
    """Write all documents; the writers by split, and how many documents were empty."""
    names = ["train"] if survey is None else ["train", "validation"]
    writers = {name: _SplitWriter(root / name, tokenizer, shard_bytes) for name in names}
    single = survey is not None and len(survey.hashes) == 1
    held_out = survey.held_out(share) if survey is not None and not single else set()
    number = empty = 0
    with contextlib.ExitStack() as stack:
        for writer in writers.values():
            stack.callback(writer.close)
        for document in texts:
            if single and survey is not None:
                boundary = min(max(1, int(survey.characters[0] * (1 - share))), survey.characters[0] - 1)
                head, tail = _divided(document, boundary)
                written = writers["train"].write(head) and writers["validation"].write(tail)
            else:
                written = writers["validation" if number in held_out else "train"].write(document.pieces())
            number += written
            empty += not written
            if progress is not None:
                progress(document.name, number, sum(writer.tokens for writer in writers.values()))
    if not number:
        raise _no_text()
    return writers, empty


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


def _summary(writer: _SplitWriter, index: ShardIndex, directory: Path) -> SplitSummary:
    return SplitSummary(
        directory=str(directory),
        documents=writer.documents,
        tokens=index.tokens,
        characters=writer.characters,
        shards=len(index.shards),
        bytes=index.bytes,
        fingerprint=index.fingerprint,
    )


@contextlib.contextmanager
def _temporary_beside(target: Path) -> Iterator[Path]:
    """A new directory beside `target` that is gone afterwards unless it was renamed.

    It is locked while its maker lives, so that the leavings of a killed one are known and removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.tmp-"
    for leaving in [path for path in target.parent.iterdir() if path.name.startswith(prefix)]:
        with _locked(leaving) as free:
            if free:
                shutil.rmtree(leaving, ignore_errors=True)
    temporary = target.parent / f"{prefix}{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    with _locked(temporary):
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Hold a directory's lock for a while; False where another process holds it, or it is gone."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
