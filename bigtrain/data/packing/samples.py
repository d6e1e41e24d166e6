"""Packing samples that stand alone, from whatever they are made of: images with classes or captions, arrays.

Samples are mixed once, by a permutation, since a folder holds them class after class. Shards are fixed by the samples
and their sizes, so that any number of processes writes the same bytes; after a kill a finished one is not written
again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bigtrain.config import UserError
from bigtrain.data.formats.arrays import ArrayInfo
from bigtrain.data.formats.images import ImageInfo
from bigtrain.data.formats.tar import read_at
from bigtrain.data.formats.text import BadSamples
from bigtrain.data.index import Kind, Shard
from bigtrain.data.indexing import check_common, write_common, write_shard
from bigtrain.data.order.sample_order import permutation
from bigtrain.data.packing.documents import PackSummary, Progress, SplitSummary, parse_share, publish, workplace
from bigtrain.data.packing.work import Scratch
from bigtrain.data.packing.workers import open_pool
from bigtrain.data.scanning import Scan, scan_shard
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.storage import fsync_directory, fsync_file, write_json

HEADERS_BYTES = 2048
"""What the members of a sample take in a tar besides their own bytes, about."""


@dataclass(frozen=True)
class Stretch:
    """A file, or a part of one."""

    path: Path
    size: int
    offset: int = 0

    @classmethod
    def whole(cls, path: Path) -> Stretch:
        """A file as it is now."""
        return cls(path, path.stat().st_size)

    def read(self) -> bytes:
        """Its bytes."""
        return read_at(self.path, self.offset, self.size)


@dataclass(frozen=True)
class Means:
    """What workers make members with."""

    image_size: int | None = None
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class Member:
    """One file of a sample."""

    suffix: str
    data: bytes
    text_bytes: int = 0
    """UTF-8 bytes of the text that it stands for."""
    characters: int = 0


class Sample(Protocol):
    """One sample, before it is packed."""

    @property
    def bytes(self) -> int:
        """Its size in a shard, about."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """What it is read from: another sample where one of them has changed."""
        ...

    def members(self, means: Means) -> list[Member]:
        """Its members in their order.

        Raises:
            UserError: It is bad.
        """
        ...


@dataclass(frozen=True)
class PlannedSamples:
    """One shard to be written."""

    split: str
    number: int
    first: int
    samples: tuple[Sample, ...]


class SampleWorker:
    """Writes shards."""

    def __init__(
        self, scratch: Scratch, kind: Kind, size: int | None, tokenizer: tuple[Any] | None, skip_bad: int
    ) -> None:
        self._scratch, self._kind, self._skip_bad = scratch, kind, skip_bad
        self._means = Means(size, None if tokenizer is None else Tokenizer.from_definition(tokenizer[0]))

    def write(self, shard: PlannedSamples) -> None:
        """Write one shard and its sidecar."""
        entry = self._scratch.entry(shard.split, shard.number)
        path = self._scratch.shard(shard.split, shard.number)
        if entry.exists():
            return
        bad = BadSamples(self._skip_bad)
        text_bytes = characters = 0
        with open(path, "wb") as file, tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for key, sample in enumerate(shard.samples, shard.first):
                try:
                    members = sample.members(self._means)
                except UserError as error:
                    bad(error)
                    continue
                for member in members:
                    header = tarfile.TarInfo(f"{key:09d}.{member.suffix}")
                    header.size = len(member.data)
                    tar.addfile(header, io.BytesIO(member.data))
                    text_bytes, characters = text_bytes + member.text_bytes, characters + member.characters
                tar.members = []  # type: ignore[attr-defined]  # the library keeps every header otherwise
        fsync_file(path)
        scan = scan_shard(path, kind=self._kind)
        note = {
            "shard": write_shard(path, scan, path.parent).as_json(),
            "dtype": scan.dtype,
            "largest_id": scan.largest_id,
            "image": None if scan.image is None else vars(scan.image),
            "arrays": None if scan.arrays is None else [info.as_json() for info in scan.arrays],
            "classes": scan.classes,
            "text_bytes": text_bytes,
            "characters": characters,
            "bad": bad.seen,
        }
        write_json(entry, note)


def pack_samples(
    kind: Kind,
    samples: Sequence[Sample],
    out: str | Path,
    *,
    size: int | None = None,
    tokenizer: Tokenizer | None = None,
    validation: float | str = 0.0,
    shard_bytes: int,
    seed: int = 0,
    skip_bad: int = 0,
    workers: int = 1,
    notes: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> PackSummary:
    """Pack samples into OUT/train, and OUT/validation where `validation` is above zero.

    Args:
        kind: What they are.
        size: Scale and crop all images to squares of this many pixels; None: they have one size already.
        tokenizer: Of captions.
        validation: Share of the samples to hold out, at least one.
        seed: Another permutation.
        skip_bad: Samples of a shard that may be bad, and are passed over.
        notes: JSON files to write into each split, by their names.

    Raises:
        UserError: A bad sample, samples of several shapes, or what `pack` raises for its output.
    """
    share = parse_share(validation)
    target = Path(out)
    held_out = min(max(1, round(share * len(samples))), len(samples) - 1) if share else 0
    mixed = [samples[number] for number in permutation(len(samples), seed)]
    parts = {"train": mixed[held_out:], "validation": mixed[:held_out]}
    shards = [shard for split, part in parts.items() for shard in _planned(split, part, shard_bytes)]
    made_with = None if tokenizer is None else [tokenizer.hash, tokenizer.eot]
    identity = _identity(samples, [kind, size, made_with, share, shard_bytes, seed, skip_bad])
    definition = None if tokenizer is None else (tokenizer.definition(),)
    with workplace(target, identity) as scratch:
        for split in parts:
            if parts[split]:
                (scratch.root / split).mkdir(exist_ok=True)
        with open_pool(workers, partial(SampleWorker, scratch, kind, size, definition, skip_bad)) as pool:
            under_way: deque[Future[None]] = deque()
            for number, shard in enumerate(shards):
                under_way.append(pool.submit("write", shard))
                while len(under_way) > (0 if number + 1 == len(shards) else pool.ahead):
                    under_way.popleft().result()
                    if progress is not None:
                        progress("packed", number + 1 - len(under_way), len(shards))
        finishing = _Finishing(scratch, kind, tokenizer, target, notes or {})
        splits = {
            split: finishing.finish(split, sum(shard.split == split for shard in shards))
            for split in parts
            if parts[split]
        }
        publish(scratch.root, target)
    return PackSummary(str(target), finishing.vocab_size, kind if held_out else None, 0, splits, finishing.skipped)


def _identity(samples: Sequence[Sample], arguments: list[Any]) -> str:
    """Identifies a packing: its samples, their files as they are now, and its arguments."""
    digest = hashlib.sha256(json.dumps(arguments).encode())
    known: dict[Path, str] = {}
    for sample in samples:
        for path in sample.files:
            if path not in known:
                status = os.stat(path)
                known[path] = f"{path}\0{status.st_size}\0{status.st_mtime_ns}"
                digest.update(known[path].encode(errors="surrogateescape"))
        digest.update(f"\0{sample!r}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _planned(split: str, samples: list[Sample], shard_bytes: int) -> list[PlannedSamples]:
    shards: list[PlannedSamples] = []
    begin = used = 0
    for number, sample in enumerate(samples):
        taken = HEADERS_BYTES + sample.bytes
        if number > begin and used + taken > shard_bytes:
            shards.append(PlannedSamples(split, len(shards), begin, tuple(samples[begin:number])))
            begin, used = number, 0
        used += taken
    if samples:
        shards.append(PlannedSamples(split, len(shards), begin, tuple(samples[begin:])))
    return shards


class _Finishing:
    """Writes the index of each split."""

    vocab_size = 0

    def __init__(
        self, scratch: Scratch, kind: Kind, tokenizer: Tokenizer | None, target: Path, notes: dict[str, Any]
    ) -> None:
        self._scratch, self._kind, self._tokenizer, self._target, self._notes = scratch, kind, tokenizer, target, notes
        self.skipped: list[str] = []

    def finish(self, split: str, count: int) -> SplitSummary:
        """Write the index of a split of so many shards."""
        root, none = self._scratch.root / split, np.zeros((0, 3), dtype=np.int64)
        scans, shards = [], []
        text_bytes = characters = 0
        for number in range(count):
            value = json.loads(self._scratch.entry(split, number).read_bytes())
            image, arrays = value["image"], value["arrays"]
            scan = Scan(
                self._kind,
                none,
                dtype=value["dtype"],
                largest_id=value["largest_id"],
                image=None if image is None else ImageInfo(**image),
                arrays=None if arrays is None else tuple(ArrayInfo.from_json(one) for one in arrays),
                classes=value["classes"],
            )
            scans.append((self._scratch.shard(split, number), scan))
            shards.append(Shard(**value["shard"]))
            self.skipped += value["bad"]
            text_bytes, characters = text_bytes + value["text_bytes"], characters + value["characters"]
        check_common(scans)
        index = write_common(root, scans, shards, self._tokenizer, text_bytes=text_bytes or None)
        for name, content in self._notes.items():
            write_json(root / name, content)
        fsync_directory(root)
        self.vocab_size = max(self.vocab_size, index.vocab_size)
        place = str(self._target / split)
        return SplitSummary(place, index.samples, index.tokens, characters, len(shards), index.bytes, index.fingerprint)
