"""The checkpoints of a run on an object store: uploaded after the commit on the local disk, and fetched back.

    s3://bucket/prefix/NAME/config.yaml, run.json, metrics.jsonl, events.jsonl, samples.jsonl
    s3://bucket/prefix/NAME/checkpoints/step_00000100/   files, then manifest.json

The layout is that of the run directory. An object store has no rename, so the upload of the manifest is the commit: it
comes after all files have been uploaded and compared with it. When a checkpoint is removed, the manifest is removed
first. So an interrupted upload is not a checkpoint, and the next upload continues with the objects that exist.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import threading
import uuid
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from bigtrain.checkpoint import commit
from bigtrain.checkpoint.best import Best, has_rule, ranked
from bigtrain.checkpoint.commit import FencedError, PhaseHook
from bigtrain.checkpoint.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileRecord, Manifest, read_manifest
from bigtrain.config import CorruptionError
from bigtrain.run import RunDirectory
from bigtrain.run.names import CHECKPOINTS
from bigtrain.storage import fsync_directory, hash_file
from bigtrain.storage.hashes import named, new_digest
from bigtrain.storage.objects import Patience, Transient, fetch, patiently
from bigtrain.storage.scheme import open_store

ARRIVALS = 3
"""How often a file is fetched if its hash is not that in the manifest, before this is an error."""
FETCHERS = 8
HASTE = Patience(timeout_s=10.0, retries=2)
"""Time limit and retries for requests while a user waits for the answer."""

T = TypeVar("T")


class RunStore:
    """The checkpoints and records of one run on an object store; see the module's docstring.

    Every method raises RemoteError if the store refuses a request, or fails more often in a row than `patience` allows.

    Args:
        url: URL of the run, PREFIX/NAME.
        patience: Time limit and retries for each request; None: the defaults of `Patience`.

    Raises:
        UserError: `url` is not the URL of an object store, or the library for its scheme is not installed.
    """

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        self._patience = patience or Patience()
        self._cancelled = threading.Event()
        self._place = open_store(url, self._patience)
        self.url = self._place.url

    def cancel(self) -> None:
        """End the current and all later waits between retries with Cancelled; may be called from any thread."""
        self._cancelled.set()

    def listing(self) -> dict[int, dict[str, int]]:
        """Bytes of each object of each step by its name, committed or not, in order of steps."""
        steps: dict[int, dict[str, int]] = {}
        for path, size in self._try(lambda: self._place.sizes(CHECKPOINTS), CHECKPOINTS).items():
            directory, _, name = path.partition("/")
            step = commit.parse_step(directory)
            if step is not None and name:
                steps.setdefault(step, {})[name] = size
        return dict(sorted(steps.items()))

    def committed(self) -> list[int]:
        """The steps of committed checkpoints (those with a manifest), oldest first."""
        return [step for step, sizes in self.listing().items() if MANIFEST_NAME in sizes]

    def best(self, listing: Mapping[int, Mapping[str, int]] | None = None) -> list[Best]:
        """The best checkpoints on the store, as `best.ranked` returns them.

        Args:
            listing: A result of the method `listing`; None: list the objects now.
        """
        manifests: list[Manifest] = []
        found = self.listing() if listing is None else listing
        for step in sorted(found, reverse=True):
            if MANIFEST_NAME not in found[step]:
                continue
            with contextlib.suppress(CorruptionError):
                manifests.append(self.manifest(step))
            if len(manifests) == 1 and not has_rule(manifests[0]):
                return []  # The newest manifest decides, and it has no rule.
        return ranked(manifests)

    def manifest(self, step: int) -> Manifest:
        """Fetch the manifest of a step.

        Raises:
            CorruptionError: The manifest is damaged, or belongs to another step.
        """
        with tempfile.TemporaryDirectory() as place:
            return self._manifest_into(Path(place), step)

    def problems(self, step: int, sizes: Mapping[str, int], *, hashes: bool) -> list[str]:
        """Compare a committed checkpoint with its manifest.

        Args:
            step: Step of the checkpoint.
            sizes: Bytes of its objects by name, from `listing`.
            hashes: Whether to read every byte and compare hashes; otherwise only sizes are compared.

        Returns:
            One sentence for each problem; empty for an intact checkpoint.
        """
        try:
            manifest = self.manifest(step)
        except CorruptionError as error:
            return [error.what]
        found = []
        for name, record in manifest.files.items():
            if name not in sizes:
                found.append(f"{name} is missing")
            elif sizes[name] != record.bytes:
                found.append(f"{name} has {sizes[name]} bytes, but the manifest says {record.bytes}")
            elif hashes and self._hash(_object(step, name)) != record.hash:
                found.append(f"{name} does not match its hash")
        return found

    def holds(self, manifest: Manifest, sizes: Mapping[str, int]) -> bool:
        """Whether the store has a committed checkpoint with exactly this manifest, and files of the sizes in it."""
        if MANIFEST_NAME not in sizes or any(sizes.get(name) != one.bytes for name, one in manifest.files.items()):
            return False
        try:
            return self.manifest(manifest.step) == manifest
        except CorruptionError:
            return False

    def upload(
        self,
        source: Path,
        manifest: Manifest,
        present: Mapping[str, int],
        *,
        read_back: bool,
        may_publish: Callable[[], bool] = lambda: True,
        hook: PhaseHook = lambda phase: None,
    ) -> None:
        """Upload a committed checkpoint. Files that an interrupted upload of the same bytes left are not sent again.

        Args:
            source: Directory of the checkpoint on the local disk.
            manifest: The manifest in that directory.
            present: Bytes of the step's objects on the store by name, from `listing`.
            read_back: Whether each stored object is read and compared with its hash; otherwise only its size is
                compared.
            may_publish: Returns whether this process still holds the run's lease; called before a manifest is removed
                or uploaded.
            hook: Called with "object" after each object, and with "stored" after the manifest; for fault injection.

        Raises:
            FencedError: The lease was lost.
            FileNotFoundError: The checkpoint was removed from the local disk meanwhile.
        """
        if MANIFEST_NAME in present:
            # This manifest would commit other bytes than those that are uploaded now.
            _require(may_publish)
            self._remove(manifest.step, [MANIFEST_NAME])
        for name, record in manifest.files.items():
            path = _object(manifest.step, name)
            if present.get(name) != record.bytes or self._hash(path) != record.hash:
                self._put(source / name, path, record, read_back)
            hook("object")
        _require(may_publish)
        self._put_small(source / MANIFEST_NAME, _object(manifest.step, MANIFEST_NAME))
        hook("stored")

    def put_records(self, run: RunDirectory) -> None:
        """Upload the current state of the other files that a resume needs: config, run record and logs."""
        for name in (run.config, run.record):
            self._put_small(name, name.name)
        for log in _logs(run):
            if log.exists():
                self._try(functools.partial(self._place.put, log, log.name), log.name)

    def prune(self, keep_last: int, *, local: Collection[int] = (), dry_run: bool = False) -> list[int]:
        """Remove old checkpoints and interrupted uploads.

        Kept are the `keep_last` newest complete checkpoints, the permanent ones and the best ones.

        Args:
            keep_last: Number of complete checkpoints to keep.
            local: Steps of the checkpoints on the run's disk. Uploads of these steps may be in progress and are kept.
                Steps newer than all of these are removed: the run has gone back to an earlier step.
            dry_run: Whether to remove nothing and only return the steps.

        Returns:
            The removed steps (with `dry_run`, those that would be removed), newest first.
        """
        newest = max(local, default=None)
        kept, doomed = 0, []
        listing = self.listing()
        spare = {best.step for best in self.best(listing)}
        for step, sizes in reversed(listing.items()):
            if newest is not None and step > newest:
                doomed.append(step)
            elif MANIFEST_NAME not in sizes:
                doomed += [] if step in local else [step]
            elif kept < keep_last:
                kept += not self.problems(step, sizes, hashes=False)
            elif step not in spare and not self._is_permanent(step):
                doomed.append(step)
        if not dry_run:
            for step in doomed:
                self._remove(step, sorted(listing[step], key=lambda name: name != MANIFEST_NAME))
        return doomed

    def fetch(self, step: int, directory: Path) -> Path:
        """Fetch a checkpoint into a run's directory of checkpoints, and commit it there after verifying every file.

        Returns:
            The directory of the fetched checkpoint.

        Raises:
            CorruptionError: The checkpoint on the store is damaged.
        """
        temporary = directory / commit.temporary_name(step)
        temporary.mkdir(parents=True)
        try:
            manifest = self._manifest_into(temporary, step)
            with ThreadPoolExecutor(FETCHERS, thread_name_prefix="bigtrain-fetch") as pool:
                names = manifest.files.items()
                list(pool.map(lambda item: self._fetch_file(step, temporary / item[0], item[1]), names))
            fsync_directory(temporary)
            return commit.adopt(temporary, manifest)
        except BaseException:
            commit.discard(temporary)
            raise

    def fetch_records(self, run: RunDirectory) -> None:
        """Fetch the other files that a resume needs (config, run record, logs), unless they exist on the disk."""
        there = self._try(lambda: self._place.names(), "")
        # First the files that make a directory a run: after a kill, the next attempt restores it again.
        for record in (run.config, run.record, *_logs(run)):
            if record.name in there and not record.exists():
                self._fetch_whole(record.name, record)

    def check_access(self) -> None:
        """Check access to the store: write a small object, list the checkpoints, and remove the object.

        Raises:
            RemoteError: The store refused: the bucket, the credentials or the endpoint are wrong.
        """
        probe = f".probe-{uuid.uuid4().hex[:8]}"
        self._try(lambda: self._place.put_bytes(b"bigtrain", probe), probe)
        self._try(lambda: self._place.sizes(CHECKPOINTS), CHECKPOINTS)
        self._try(lambda: self._place.remove([probe]), probe)

    def _put_small(self, source: Path, path: str) -> None:
        record = FileRecord(bytes=source.stat().st_size, hash=hash_file(source))
        self._put(source, path, record, read_back=True)

    def _put(self, source: Path, path: str, record: FileRecord, read_back: bool) -> None:
        def put_and_compare() -> None:
            self._place.put(source, path)
            with self._place.open(path, 0) as body:
                if body.total != record.bytes:
                    raise Transient(f"{body.total} of {record.bytes} bytes were stored")
            if read_back and self._read_hash(path) != record.hash:
                raise Transient("the stored object differs from what was written")

        self._try(put_and_compare, path)

    def _hash(self, path: str) -> str:
        return self._try(lambda: self._read_hash(path), path)

    def _read_hash(self, path: str) -> str:
        digest = new_digest()
        with self._place.open(path, 0) as body:
            for chunk in body.chunks:
                digest.update(chunk)
        return named(digest)

    def _fetch_file(self, step: int, target: Path, record: FileRecord) -> None:
        for _ in range(ARRIVALS):
            self._fetch_whole(_object(step, target.name), target, record.bytes)
            if hash_file(target) == record.hash:
                return
            target.unlink()
        raise CorruptionError(
            f"{target.name} was downloaded {ARRIVALS} times, each time with bytes that differ from its manifest",
            f"{self.url}/{_object(step, target.name)}",
            "Use another step.",
        )

    def _fetch_whole(self, path: str, target: Path, size: int | None = None, limit: int = 1 << 62) -> None:
        """Fetch an object into a file, which exists afterwards completely and synced, or not at all."""
        part = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
        try:
            with open(part, "w+b") as file:
                fetch(
                    self._place, path, file, size=size, limit=limit if size is None else size,
                    patience=self._patience, cancelled=self._cancelled,
                )  # fmt: skip
                file.flush()
                os.fsync(file.fileno())
            part.rename(target)
        finally:
            part.unlink(missing_ok=True)

    def _manifest_into(self, directory: Path, step: int) -> Manifest:
        path = _object(step, MANIFEST_NAME)
        for arrival in range(1, ARRIVALS + 1):
            self._fetch_whole(path, directory / MANIFEST_NAME, limit=MAX_MANIFEST_BYTES)
            try:
                manifest = read_manifest(directory)
                break
            except CorruptionError as error:
                if arrival == ARRIVALS:
                    raise CorruptionError(error.what, f"{self.url}/{path}", "Use another step.") from None
        if manifest.step != step:
            raise CorruptionError(f"the manifest belongs to step {manifest.step}", f"{self.url}/{path}")
        return manifest

    def _is_permanent(self, step: int) -> bool:
        with contextlib.suppress(CorruptionError):
            return self.manifest(step).permanent
        return False

    def _remove(self, step: int, names: Collection[str]) -> None:
        paths = [_object(step, name) for name in names]
        self._try(lambda: self._place.remove(paths), f"{CHECKPOINTS}/{commit.step_name(step)}")

    def _try(self, action: Callable[[], T], path: str) -> T:
        return patiently(action, self._patience, f"{self.url}/{path}", self._cancelled)


def _object(step: int, name: str) -> str:
    return f"{CHECKPOINTS}/{commit.step_name(step)}/{name}"


def _logs(run: RunDirectory) -> tuple[Path, ...]:
    """The logs that grow during an upload; a resume truncates them to the step of its checkpoint."""
    return run.metrics, run.events, run.samples


def _require(may_publish: Callable[[], bool]) -> None:
    if not may_publish():
        raise FencedError("this attempt no longer holds the run's lease")
