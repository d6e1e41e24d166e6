"""Packs independent samples of any kind, such as images with classes or captions, arrays, sounds.

Samples are shuffled once, by a permutation, because a folder holds them class by class. Shards depend only on the
samples and their sizes, so any number of processes writes the same bytes. After a kill, finished shards are not written
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
from typing import Any

import numpy as np

from bigtrain.config import UserError
from bigtrain.config.plugin import active_plugin, load_plugin
from bigtrain.data.accounting import PassedOver
from bigtrain.data.formats.arrays import ArrayInfo
from bigtrain.data.formats.images import ImageInfo
from bigtrain.data.indexing import check_common, write_common, write_shard
from bigtrain.data.order.sample_order import permutation
from bigtrain.data.packing.documents import parse_share, publish, workplace
from bigtrain.data.packing.options import PackOptions
from bigtrain.data.packing.sample import Means, Sample
from bigtrain.data.packing.summary import PackSummary, SplitSummary
from bigtrain.data.packing.work import Scratch
from bigtrain.data.packing.workers import open_pool
from bigtrain.data.scanning import Scan, scan_shard
from bigtrain.data.shard import Shard
from bigtrain.data.tokenizers import Definition, Tokenizer
from bigtrain.storage import fsync_directory, fsync_file, write_json

HEADERS_BYTES = 2048
"""Approximate bytes of headers and padding of one sample in a tar."""


@dataclass(frozen=True)
class PlannedSamples:
    """One shard to be written."""

    split: str
    number: int
    first: int
    samples: tuple[Sample, ...]


class SampleWorker:
    """Writes planned shards, in this process or another."""

    def __init__(
        self,
        scratch: Scratch,
        kind: str,
        size: int | None,
        tokenizer: tuple[Definition | None] | None,
        skip_bad: int,
        plugin: str | None,
    ) -> None:
        if plugin is not None:
            # A worker process is new, so it does not know the kinds of the user's plugin yet.
            load_plugin(plugin)
        self._scratch, self._kind, self._skip_bad = scratch, kind, skip_bad
        self._means = Means(size, None if tokenizer is None else Tokenizer.from_definition(tokenizer[0]))

    def write(self, shard: PlannedSamples) -> None:
        """Write one shard and its sidecar."""
        entry = self._scratch.entry(shard.split, shard.number)
        path = self._scratch.shard(shard.split, shard.number)
        if entry.exists():
            return
        passed = PassedOver(self._skip_bad)
        text_bytes = characters = 0
        with open(path, "wb") as file, tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for key, sample in enumerate(shard.samples, shard.first):
                try:
                    members = sample.members(self._means)
                except UserError as error:
                    passed(error)
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
            "scan": _scan_json(scan),
            "text_bytes": text_bytes,
            "characters": characters,
            "bad": passed.bad,
        }
        write_json(entry, note)


def pack_samples(
    kind: str, samples: Sequence[Sample], out: str | Path, options: PackOptions, notes: dict[str, Any]
) -> PackSummary:
    """Pack samples into OUT/train, and into OUT/validation if some are held out.

    Args:
        kind: Name of the sample kind.
        notes: JSON files to write into each split, by file name.

    Raises:
        UserError: There are too many bad samples, samples have different shapes, or `out` is refused as in
            `documents.pack`.
    """
    share = parse_share(options.validation)
    target, tokenizer = Path(out), options.tokenizer
    held_out = min(max(1, round(share * len(samples))), len(samples) - 1) if share else 0
    mixed = [samples[number] for number in permutation(len(samples), options.seed)]
    parts = {"train": mixed[held_out:], "validation": mixed[:held_out]}
    shards = [shard for split, part in parts.items() for shard in _planned(split, part, options.shard_bytes)]
    made_with = None if tokenizer is None else [tokenizer.info.as_json(), tokenizer.companions]
    arguments = [kind, options.image_size, made_with, share, options.shard_bytes, options.seed, options.skip_bad]
    definition = None if tokenizer is None else (tokenizer.definition(),)
    with workplace(target, _identity(samples, arguments)) as scratch:
        for split in parts:
            if parts[split]:
                (scratch.root / split).mkdir(exist_ok=True)
        plugin = active_plugin()
        place = None if plugin is None else plugin.place
        make = partial(SampleWorker, scratch, kind, options.image_size, definition, options.skip_bad, place)
        with open_pool(options.workers, make) as pool:
            under_way: deque[Future[None]] = deque()
            for number, shard in enumerate(shards):
                under_way.append(pool.submit("write", shard))
                while len(under_way) > (0 if number + 1 == len(shards) else pool.ahead):
                    under_way.popleft().result()
                    if options.progress is not None:
                        options.progress("packed", number + 1 - len(under_way), len(shards))
        finishing = _Finishing(scratch, kind, tokenizer, target, notes, options.passed)
        splits = {
            split: finishing.finish(split, sum(shard.split == split for shard in shards))
            for split in parts
            if parts[split]
        }
        publish(scratch.root, target)
    return PackSummary(str(target), finishing.vocab_size, kind if held_out else None, splits, options.passed)


def _scan_json(scan: Scan) -> dict[str, Any]:
    """A scan without its rows, as JSON values for the note about a finished shard."""
    return {
        "dtype": scan.dtype,
        "largest_id": scan.largest_id,
        "image": None if scan.image is None else vars(scan.image),
        "arrays": None if scan.arrays is None else [info.as_json() for info in scan.arrays],
        "classes": scan.classes,
        "facts": scan.facts,
    }


def _scan_of(kind: str, value: dict[str, Any]) -> Scan:
    image, arrays = value["image"], value["arrays"]
    parts = {
        "image": None if image is None else ImageInfo(**image),
        "arrays": None if arrays is None else tuple(ArrayInfo.from_json(one) for one in arrays),
    }
    return Scan(kind, np.zeros((0, 3), dtype=np.int64), **{**value, **parts})


def _identity(samples: Sequence[Sample], arguments: list[Any]) -> str:
    """A hash that identifies a packing: its samples, the current state of their files, and its arguments."""
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
        self,
        scratch: Scratch,
        kind: str,
        tokenizer: Tokenizer | None,
        target: Path,
        notes: dict[str, Any],
        passed: PassedOver,
    ) -> None:
        self._scratch, self._kind, self._tokenizer, self._target, self._notes = scratch, kind, tokenizer, target, notes
        self._passed = passed

    def finish(self, split: str, count: int) -> SplitSummary:
        """Write the index of a split with `count` shards."""
        root = self._scratch.root / split
        scans, shards = [], []
        text_bytes = characters = 0
        for number in range(count):
            value = json.loads(self._scratch.entry(split, number).read_bytes())
            scans.append((self._scratch.shard(split, number), _scan_of(self._kind, value["scan"])))
            shards.append(Shard(**value["shard"]))
            self._passed.skip(value["bad"])
            text_bytes, characters = text_bytes + value["text_bytes"], characters + value["characters"]
        check_common(scans)
        for name, content in self._notes.items():
            write_json(root / name, content)
        index = write_common(root, scans, shards, self._tokenizer, text_bytes=text_bytes or None)
        fsync_directory(root)
        self.vocab_size = max(self.vocab_size, index.vocab_size)
        place = str(self._target / split)
        return SplitSummary(place, index.samples, index.tokens, characters, len(shards), index.bytes, index.fingerprint)
