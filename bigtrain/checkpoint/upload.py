"""Uploading checkpoints to an object store in the background, on the first rank."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

from bigtrain.checkpoint import commit
from bigtrain.checkpoint.best import best_checkpoints
from bigtrain.checkpoint.commit import Checkpoint, FencedError, PhaseHook
from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest
from bigtrain.checkpoint.store import RunStore
from bigtrain.config import CorruptionError
from bigtrain.run import RunDirectory
from bigtrain.storage.objects import Cancelled

logger = logging.getLogger(__name__)

BEAT_S = 1.0


class OnEvent(Protocol):
    """A function that receives events on the first rank, from any thread."""

    def __call__(self, event: str, /, **fields: Any) -> None: ...


class Uploader:
    """Uploads the checkpoints in a run's directory that the store lacks, the newest first.

    If uploads are slower than saves, checkpoints that are pruned on the disk before their turn are skipped. Training
    never waits for an upload. A failed upload is tried again after the next save, and in the next attempt after a kill.

    Events:
        uploaded: step, bytes, seconds, pruned.
        upload_failed: step, cause, failures in a row.
        not_uploaded: step, failures, cause. The limit of failed uploads is reached.
        upload_refused: step, cause. The lease was lost, or the checkpoint on the disk is damaged (once for each).

    Args:
        run: The run whose checkpoints and records are uploaded.
        store: The store of that run.
        config: The section `checkpoint`.
        may_publish: Returns whether this attempt still holds the lease.
        on_event: Called from the uploading thread.
        hook: Called with the phases of `RunStore.upload`, and with "pruned"; for fault injection.
    """

    def __init__(
        self,
        run: RunDirectory,
        store: RunStore,
        config: CheckpointConfig,
        *,
        may_publish: Callable[[], bool] = lambda: True,
        on_event: OnEvent | None = None,
        hook: PhaseHook = lambda phase: None,
    ) -> None:
        self.failures = 0
        """Number of uploads that failed in a row."""
        self._run, self._store, self._config = run, store, config
        self._may_publish, self._on_event, self._hook = may_publish, on_event or _ignore, hook
        self._under_way: int | None = None
        self._held: dict[int, Manifest] = {}
        self._damaged: dict[int, str] = {}
        self._asked = self._answered = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._thread.start()

    @property
    def in_use(self) -> frozenset[int]:
        """The step that is being uploaded, if any; its checkpoint must not be pruned meanwhile."""
        step = self._under_way
        return frozenset() if step is None else frozenset({step})

    def wake(self) -> None:
        """Start to look for checkpoints to upload, in the background; may be called from any thread."""
        with self._changed:
            self._asked += 1
            self._changed.notify_all()

    def finish(self, beat: Callable[[], None] = lambda: None) -> bool:
        """Upload the missing checkpoints, including those that failed before, and wait until this succeeds or fails.

        Args:
            beat: Called every second during the wait.

        Returns:
            Whether the store now holds every checkpoint of the disk that retention keeps. False if an upload failed,
            if a checkpoint on the disk is damaged, or if the lease was lost.
        """
        self.wake()
        with self._changed:
            wanted = self._asked
            while self._answered < wanted and not self._closed:
                self._changed.wait(BEAT_S)
                beat()
            return not (self._closed or self.failures or self._damaged)

    def close(self) -> None:
        """Stop the thread after its current request to the store."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._store.cancel()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._asked > self._answered)
                if self._closed:
                    return
                asked = self._asked
            try:
                self._follow()
            except Cancelled:
                return
            except FencedError as error:
                self._on_event("upload_refused", step=self._under_way, cause=str(error))
                self._closed = True
            except Exception as error:  # noqa: BLE001 - a thread that ends silently would leave the run unsaved
                self._count(error)
            finally:
                self._under_way = None
                with self._changed:
                    self._answered = asked
                    self._changed.notify_all()

    def _follow(self) -> None:
        tried: set[int] = set()
        damaged: dict[int, str] = {}
        while (found := self._next(tried, damaged)) is not None:
            checkpoint, manifest, present = found
            tried.add(checkpoint.step)
            self._under_way = checkpoint.step
            began = time.perf_counter()
            try:
                if problems := commit.verify(checkpoint.path):
                    if checkpoint.path.exists():
                        damaged[checkpoint.step] = problems[0]
                    continue
                self._store.put_records(self._run)
                self._store.upload(
                    checkpoint.path, manifest, present,
                    read_back=self._config.read_back, may_publish=self._may_publish, hook=self._hook,
                )  # fmt: skip
            except FencedError:
                raise
            except Exception:
                if not checkpoint.path.exists():
                    # A rewind of the run to an earlier step has removed it.
                    continue
                raise
            self._held[checkpoint.step] = manifest
            seconds = time.perf_counter() - began
            pruned = self._prune()
            self._hook("pruned")
            self.failures = 0
            self._on_event(
                "uploaded", step=checkpoint.step, bytes=manifest.total_bytes, seconds=round(seconds, 3), pruned=pruned
            )
        self._note(damaged)
        self.failures = 0

    def _note(self, damaged: dict[int, str]) -> None:
        """Record the checkpoints that are damaged on the disk and missing on the store, and report the new ones."""
        new = damaged.keys() - self._damaged.keys()
        self._damaged = damaged
        for step in sorted(new):
            logger.warning("the checkpoint of step %d is not uploaded: %s", step, damaged[step])
            self._on_event("upload_refused", step=step, cause=damaged[step])

    def _next(
        self, tried: Collection[int], damaged: dict[int, str]
    ) -> tuple[Checkpoint, Manifest, dict[str, int]] | None:
        """The next checkpoint to upload: the newest one on the disk that retention keeps and the store lacks.

        Args:
            tried: Steps that are skipped.
            damaged: Receives a problem of each damaged checkpoint that the store lacks, by step.

        Returns:
            The checkpoint, its manifest, and the sizes of its objects on the store; None if the store lacks none.
        """
        listing = self._store.listing()
        spare = {best.step for best in best_checkpoints(self._run.checkpoints)}
        kept = 0
        for checkpoint in reversed(commit.list_checkpoints(self._run.checkpoints)):
            present = listing.get(checkpoint.step, {})
            try:
                manifest = _sound(checkpoint.path)
            except CorruptionError as error:
                if kept < self._config.keep_last and checkpoint.path.exists() and MANIFEST_NAME not in present:
                    damaged[checkpoint.step] = error.what
                continue
            if kept >= self._config.keep_last and not (manifest.permanent or checkpoint.step in spare):
                continue
            kept += 1
            if checkpoint.step not in tried and not self._holds(manifest, present):
                return checkpoint, manifest, present
        return None

    def _holds(self, manifest: Manifest, present: dict[str, int]) -> bool:
        if present and self._held.get(manifest.step) == manifest:
            return True
        if not self._store.holds(manifest, present):
            return False
        self._held[manifest.step] = manifest
        return True

    def _prune(self) -> list[int]:
        local = [checkpoint.step for checkpoint in commit.list_checkpoints(self._run.checkpoints)]
        if not local or not self._may_publish():
            return []
        return self._store.prune(self._config.keep_last, local=local)

    def _count(self, error: Exception) -> None:
        self.failures += 1
        cause = " ".join(str(error).split())
        self._on_event("upload_failed", step=self._under_way, cause=cause, failures=self.failures)
        if self.failures >= self._config.max_failed_saves:
            logger.error("the last %d uploads failed; checkpoints exist only on this disk: %s", self.failures, cause)
            self._on_event("not_uploaded", step=self._under_way, failures=self.failures, cause=cause)


def _sound(path: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CorruptionError: The manifest is damaged, or a file has another size than the manifest says.
    """
    if problems := commit.verify(path, hashes=False):
        raise CorruptionError(problems[0], str(path))
    return read_manifest(path)


def _ignore(event: str, /, **fields: Any) -> None:
    """Ignore an event."""
