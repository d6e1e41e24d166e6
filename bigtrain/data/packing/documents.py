"""Packing: turns documents into shards of tokens (`bigtrain data pack`).

    survey    hash the documents of each part of the input, if some are held out    parts/N.survey.npy
    tokenise  write the tokens of each part and the lengths of its documents        parts/N.tokens, N.npy, N.json
    plan      assign tokens to the members of shards, from the lengths only
    write     write, index and sync each shard separately                           train/shard-N.tar, ...

Parts depend only on the input, and shards only on the lengths, so any number of processes writes the same bytes. A task
is finished when its last file exists, and a start after a kill continues from there. At the end, one rename publishes
all files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config import UserError
from bigtrain.data.accounting import PassedOver
from bigtrain.data.formats.documents import parts, sources
from bigtrain.data.formats.records import Source
from bigtrain.data.indexing import write_common
from bigtrain.data.packing.options import SHARD_BYTES, ReportProgress
from bigtrain.data.packing.plan import PlannedShard, SplitPlan, Survey
from bigtrain.data.packing.summary import PackSummary, SplitSummary
from bigtrain.data.packing.work import PackJob, Scratch, finished_shards, text_worker
from bigtrain.data.packing.workers import PackError, Pool, open_pool
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.storage import fsync_directory, locks, write_json

FORMAT_VERSION = 1
MIN_SHARD_BYTES = 1 << 10
PART_BYTES = 8 << 20
SMALLEST_PART_BYTES = 1 << 20
PARTS_OF_SMALL_INPUT = 64
"""Minimum number of parts of an input, so that all workers end at about the same time."""
SMALL_INPUT_BYTES = 4 << 20


def pack(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    validation: float | str = 0.0,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
    key: str = "text",
    token_type: str | None = None,
    skip_bad: int = 0,
    workers: int = 1,
    part_bytes: int | None = None,
    progress: ReportProgress | None = None,
) -> PackSummary:
    """Tokenise documents into OUT/train, and into OUT/validation if `validation` is above zero.

    After a kill, the same call continues where it stopped; with other inputs or arguments, it starts again.

    Args:
        inputs: Files, directories or patterns; see `sources`.
        out: A directory that does not exist yet, or is empty.
        tokenizer: The tokenizer that encodes the text; it is copied into each split.
        validation: Share of the documents to hold out ("1%" or 0.01), at least one document. They are chosen by a hash
            of their text and `seed`, so copies of a text are in the same split. A single document is divided, and its
            end is held out.
        shard_bytes: Maximum bytes of a shard apart from headers; a longer document spans several shards.
        seed: Seed for the choice of held-out documents.
        key: The key of an object, or the column of a table, that holds the text; dots join keys (`records.under`).
        token_type: Integer type of `.bin` files that hold only tokens; see `token_files`.
        skip_bad: Maximum number of bad documents that are skipped and counted; one more is an error.
        workers: Number of processes. The bytes written do not depend on it.
        part_bytes: Bytes of input that one process takes at a time; None: chosen by the size of the input.
        progress: Called after each task.

    Raises:
        UserError: The input is bad (see `documents`) or holds no text, or `out` is not empty or is being packed by
            another process.
        PackError: A process died. The same call can continue.
    """
    share = parse_share(validation)
    target = Path(out)
    if shard_bytes < MIN_SHARD_BYTES:
        raise UserError(f"shards of {shard_bytes} bytes are too small", fix=f"Use at least {MIN_SHARD_BYTES}.")
    passed = PassedOver(skip_bad)
    found = list(sources(inputs, passed, key, token_type))
    total = sum(source.bytes for source in found)
    if part_bytes is None:
        part_bytes = min(PART_BYTES, max(SMALLEST_PART_BYTES, total // PARTS_OF_SMALL_INPUT))
    job = PackJob(key, skip_bad, seed, tuple(_grouped(found, part_bytes, passed)))
    arguments = [key, token_type, skip_bad, seed, share, shard_bytes, part_bytes]
    identity = _identity(found, [*arguments, tokenizer.info.as_json()])
    with workplace(target, identity) as scratch:
        if total <= SMALL_INPUT_BYTES:
            workers = 1
        with open_pool(workers, partial(text_worker, job, scratch, tokenizer.definition())) as pool:
            return _Packing(pool, job, scratch, tokenizer, shard_bytes, progress, passed).run(share, target)


class _Packing:
    """Runs one packing, from the survey to the summary."""

    def __init__(
        self,
        pool: Pool,
        job: PackJob,
        scratch: Scratch,
        tokenizer: Tokenizer,
        shard_bytes: int,
        progress: ReportProgress | None,
        passed: PassedOver,
    ) -> None:
        self._passed = passed
        self._pool, self._job, self._scratch, self._tokenizer = pool, job, scratch, tokenizer
        self._shard_bytes = shard_bytes
        self._progress = progress or (lambda stage, done, total: None)
        self._writing: deque[tuple[PlannedShard, Future[None]]] = deque()
        self._plans: dict[str, SplitPlan] = {}
        self._number = self._kept_from = 0

    def run(self, share: float, target: Path) -> PackSummary:
        survey = self._survey() if share else None
        boundary = None if survey is None else survey.tail_boundary(share)
        held_out = survey.held_out(share) if survey is not None and boundary is None else set()
        for name in ["train"] if survey is None else ["train", "validation"]:
            (self._scratch.root / name).mkdir(exist_ok=True)
            self._plans[name] = SplitPlan(name, self._tokenizer.dtype.itemsize, self._shard_bytes)
        for part in self._parts("encode", "tokenised", boundary):
            self._plan(part, held_out, boundary is not None)
        for plan in self._plans.values():
            self._write(plan.finish())
        while self._writing:
            self._writing.popleft()[1].result()
        if not self._number:
            raise _no_text()
        splits = {name: self._finish(name, target) for name in self._plans}
        publish(self._scratch.root, target)
        how = None if survey is None else "documents" if boundary is None else "tail"
        return PackSummary(str(target), self._tokenizer.vocab_size, how, splits, self._passed)

    def _parts(self, method: str, stage: str, *arguments: Any) -> Iterator[int]:
        """Call a worker's method on all parts, a few at a time. Yields each part when it is done, in their order."""
        total = len(self._job.parts)
        under_way: deque[Future[None]] = deque()
        submitted = 0
        for part in range(total):
            while submitted < min(total, part + self._pool.ahead):
                under_way.append(self._pool.submit(method, submitted, *arguments))
                submitted += 1
            under_way.popleft().result()
            yield part
            self._progress(stage, part + 1, total)

    def _survey(self) -> Survey:
        hashes: list[int] = []
        characters: list[int] = []
        for part in self._parts("survey", "surveyed"):
            found = np.load(self._scratch.part(part, ".survey.npy"), allow_pickle=False)
            hashes += found[:, 0].tolist()
            characters += found[:, 1].tolist()
        if not hashes:
            raise _no_text()
        if len(hashes) == 1 and characters[0] < 2:
            raise UserError("one character cannot be divided into training and validation text", fix="Give more text.")
        return Survey(hashes, characters)

    def _plan(self, part: int, held_out: set[int], divided: bool) -> None:
        """Assign the documents of a part to shards, and submit the shards that are full for writing."""
        note = json.loads(self._scratch.part(part, ".json").read_bytes())
        self._passed.empty += note["empty"]
        self._passed.skip(note["bad"])
        start = 0
        for tokens, characters, text_bytes in np.load(self._scratch.part(part, ".npy"), allow_pickle=False).tolist():
            wanted = self._number == 1 if divided else self._number in held_out
            plan = self._plans["validation" if wanted else "train"]
            plan.counts.documents += 1
            plan.counts.characters += characters
            plan.counts.text_bytes += text_bytes
            self._number += 1
            self._write(plan.add(part, start, tokens))
            start += tokens
        self._forget(part)

    def _write(self, shards: Iterable[PlannedShard]) -> None:
        for shard in shards:
            self._writing.append((shard, self._pool.submit("write", shard)))
            while len(self._writing) > self._pool.ahead:
                self._writing.popleft()[1].result()

    def _forget(self, part: int) -> None:
        """Delete the tokens of parts that no unwritten shard needs."""
        while self._writing and self._writing[0][1].done():
            self._writing.popleft()[1].result()
        needed = [shard.pieces[0].part for shard, _ in self._writing]
        needed += [plan.oldest_part for plan in self._plans.values() if plan.oldest_part is not None]
        for number in range(self._kept_from, min([*needed, part + 1])):
            self._scratch.part(number, ".tokens").unlink(missing_ok=True)
            self._kept_from = number + 1

    def _finish(self, name: str, target: Path) -> SplitSummary:
        """Write the index of a split."""
        counts, root = self._plans[name].counts, self._scratch.root / name
        found = finished_shards(self._scratch, name, counts.shards, self._tokenizer.dtype.str)
        scans, shards = [(path, scan) for path, scan, _ in found], [shard for *_, shard in found]
        index = write_common(root, scans, shards, self._tokenizer, text_bytes=counts.text_bytes)
        fsync_directory(root)
        return SplitSummary(
            directory=str(target / name),
            documents=counts.documents,
            tokens=index.tokens,
            characters=counts.characters,
            shards=len(index.shards),
            bytes=index.bytes,
            fingerprint=index.fingerprint,
        )


def parse_share(value: float | str) -> float:
    """Parse a share such as "1%" or 0.01 into a number in [0, 1).

    Raises:
        UserError: The value is no such share.
    """
    text = str(value).strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise UserError(f"{value!r} is not a share of the documents", fix="Write for example 1%.")
    return share


def _no_text() -> UserError:
    return UserError("the input is empty: it holds no text", fix="Give files with text in them.")


def _grouped(found: Sequence[Source], part_bytes: int, passed: PassedOver) -> Iterator[tuple[Source, ...]]:
    """Yield parts of the input of about equal size: small files are grouped, and large files divided if possible."""
    group: list[Source] = []
    size = 0
    for source in found:
        for part in _parts(source, part_bytes, passed):
            if group and size + part.bytes > part_bytes:
                yield tuple(group)
                group, size = [], 0
            group.append(part)
            size += part.bytes
    if group:
        yield tuple(group)


def _parts(source: Source, part_bytes: int, passed: PassedOver) -> list[Source]:
    """The parts of a source; an empty list if the source cannot be opened and is skipped."""
    try:
        return list(parts(source, part_bytes))
    except UserError as error:
        passed(error)
        return []


def _identity(found: Sequence[Source], arguments: list[Any]) -> str:
    """A hash that identifies a packing: the current state of its files, and its arguments."""
    files = []
    for source in found:
        status = source.path.stat()
        files.append([str(source.path.absolute()), source.name, status.st_size, status.st_mtime_ns])
    value = json.dumps([FORMAT_VERSION, arguments, files])
    return hashlib.sha256(value.encode()).hexdigest()


@contextlib.contextmanager
def workplace(target: Path, identity: str) -> Iterator[Scratch]:
    """A temporary directory beside `target`, locked while it is used.

    After a kill or a full disk it is kept, so that the packing can continue.

    Args:
        identity: Identity of the packing. Files of a packing with another identity are removed.

    Raises:
        UserError: `target` is not empty, or another process packs to it.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"'{target}' exists and is not empty", fix="Choose another --out, or delete it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    root = target.parent / f".{target.name}.packing"
    with _alone(root.with_name(f"{root.name}.lock"), target):
        job = root / "job.json"
        if not job.is_file() or json.loads(job.read_bytes()).get("identity") != identity:
            shutil.rmtree(root, ignore_errors=True)
            (root / "parts").mkdir(parents=True)
            write_json(job, {"format_version": FORMAT_VERSION, "identity": identity})
        try:
            yield Scratch(root)
        except PackError:
            raise
        except UserError:
            # The user has to repair the input, which changes the identity of the packing.
            shutil.rmtree(root, ignore_errors=True)
            raise


@contextlib.contextmanager
def _alone(lock: Path, target: Path) -> Iterator[None]:
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not locks.lock(descriptor, wait=False):
            raise UserError(
                "another process is packing to this directory", str(target), "Wait for it, or choose another --out."
            )
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def publish(root: Path, target: Path) -> None:
    """Move the finished splits to `target`, with a single rename."""
    shutil.rmtree(root / "parts")
    (root / "job.json").unlink()
    fsync_directory(root)
    try:
        os.replace(root, target)
    except OSError as error:
        raise UserError(f"the output cannot be moved to its final path: {error.strerror}", where=str(target)) from None
    fsync_directory(target.parent)
