"""Asynchronous saving: copy the state to CPU memory, then write and commit it in the background during training."""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

import bigtrain
from bigtrain.checkpoint import commit
from bigtrain.checkpoint.best import Best, best_checkpoints
from bigtrain.checkpoint.commit import FencedError, PhaseHook
from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.checkpoint.manifest import FileRecord, Manifest
from bigtrain.checkpoint.ranks import RankGroup, WorkFailedError, own_group
from bigtrain.checkpoint.replicas import ReplicasDifferError, check_replicas
from bigtrain.checkpoint.shards import local_tensors, plan_items, write_shards
from bigtrain.checkpoint.upload import OnEvent, Uploader
from bigtrain.config import CorruptionError, UserError

logger = logging.getLogger(__name__)

PHASES = ("begin", "plan", "shards", "sync", "manifest", "rename", "publish", "verify", "prune")
"""The phases of a save, in order, with which a phase hook is called; "manifest", "rename" and "publish" only on the
first rank."""


@dataclass(frozen=True)
class SaveOutcome:
    """The outcome of a save; equal on all ranks, except for the durations."""

    step: int
    status: Literal["saved", "failed", "fenced"]
    cause: str | None
    """The reason why the checkpoint was not saved; None if it was."""
    total_bytes: int
    staging_s: float
    """Seconds for which the copy to CPU memory blocked training."""
    seconds: float
    """Seconds from the call of `save` to the end of pruning."""
    pruned: tuple[int, ...] = ()
    """Steps of the checkpoints that were removed."""
    failed_uploads: int = 0
    """Number of uploads that had failed in a row when the save ended."""


@dataclass
class _Job:
    step: int
    items: list[Any]
    local: dict[str, Tensor]
    facts: dict[str, Any]
    started: float
    staging_s: float = 0.0
    outcome: SaveOutcome | None = None
    error: BaseException | None = None
    thread: threading.Thread | None = field(default=None, repr=False)


class Saver:
    """Saves the state of a run by the commit protocol. Every rank has a Saver and calls it at the same steps.

    A failed save (disk full or read-only) does not stop training. Its temporary directory is removed, an event records
    the cause, and the next save tries again. All ranks agree on the outcome of each save. The outcome of a background
    save is processed when it is joined: at the next `save`, `wait` or `close`, so at the same step on all ranks.

    Events:
        saved: step, bytes, seconds, staging_s, pruned; with `config.best` the best checkpoint's step, metric and value.
        save_failed: step, cause, failures in a row.
        save_refused: step, cause. The lease was lost.
        replicas_differ: step, cause.
        save_waited: step, seconds. Training waited because the save before had not ended.
        unsaved: step, failures, cause. The limit of failed saves is reached.

    Args:
        directory: The directory that holds the run's checkpoints; the first save creates it. The constructor removes
            leftovers of interrupted saves from it, so only the holder of the run's lease may create a Saver.
        config: The section `checkpoint`.
        may_publish: Returns whether this attempt still holds the lease.
        on_event: Called on the first rank; must be safe to call from another thread.
        phase_hook: Called at the end of each phase of a save, in the saving thread; for fault injection.
        timeout_s: Seconds that a rank waits for the others in one collective of a save.
        uploader: On the first rank, if `config.storage` is set: woken after each new checkpoint.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        *,
        may_publish: Callable[[], bool] = lambda: True,
        on_event: OnEvent | None = None,
        phase_hook: PhaseHook | None = None,
        timeout_s: float = 1800.0,
        uploader: Uploader | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.config = config
        self.failures = 0
        """Number of saves that failed in a row."""
        self.fenced = False
        """Whether another attempt has taken the run's lease: this Saver can save nothing any more."""
        self.last: SaveOutcome | None = None
        """Outcome of the last joined save."""
        self._ranks = RankGroup(own_group(timeout_s))
        self._may_publish = may_publish
        self._on_event = on_event
        self._uploader = uploader
        self._hook: PhaseHook = phase_hook or (lambda phase: None)
        self._staged: dict[str, Tensor] = {}
        self._known_good: set[tuple[str, int]] = set()
        self._best: list[Best] = []
        self._job: _Job | None = None
        if self._ranks.first and may_publish():
            self._clean()

    @property
    def must_stop(self) -> bool:
        """Whether the run should end: the lease is lost, or with `stop_unsaved` too many saves or uploads failed."""
        failures = max(self.failures, 0 if self.last is None else self.last.failed_uploads)
        too_many = failures >= self.config.max_failed_saves
        return self.fenced or (self.config.stop_unsaved and too_many)

    @property
    def busy(self) -> bool:
        """Whether a save is in progress on this rank; ranks may see its end at different steps."""
        return self._job is not None and self._job.thread is not None and self._job.thread.is_alive()

    def save(
        self,
        step: int,
        state: Mapping[str, Tensor],
        *,
        progress: dict[str, Any],
        config_hash: str,
        identity: str,
        mesh: dict[str, int] | None = None,
        lease: int = 0,
        permanent: bool = False,
    ) -> None:
        """Save the state after `step` optimizer steps. Collective; waits first for the end of the save before.

        With `config.asynchronous`, the call returns when this rank's shards have been copied to CPU memory; then the
        tensors may change. The CPU buffers, of the size of this rank's shards, are reused until `close`.

        Args:
            step: Number of completed optimizer steps.
            state: Tensors and DTensors by name; see `bigtrain.checkpoint.state.flatten`.
            progress, mesh: JSON objects for the manifest; those of the first rank are written.
            config_hash, identity: Hashes of the run's configuration and of its recipe.
            lease: Number of the lease that this attempt holds.
            permanent: Whether pruning never removes the checkpoint.

        Raises:
            RanksLostError: The ranks lost contact, in this save or the one before.
            ReplicasDifferError: With `config.check_replicas`, ranks hold different bits of the same weights. Nothing is
                saved.
        """
        self._join(report_wait_at=step)
        started = time.perf_counter()
        if self.config.check_replicas:
            self._check_replicas(step, state)
        local = local_tensors(state)
        if self.config.asynchronous:
            local = self._stage(local)
        facts = {
            "config_hash": config_hash, "identity": identity, "progress": progress,
            "mesh": mesh or {}, "lease": lease, "permanent": permanent,
        }  # fmt: skip
        job = _Job(step, plan_items(state), local, facts, started, time.perf_counter() - started)
        self._job = job
        if self.config.asynchronous:
            job.thread = threading.Thread(target=self._run, args=(job,), name=f"save-{step}", daemon=True)
            job.thread.start()
        else:
            self._run(job)
            self._join()

    def wait(self) -> SaveOutcome | None:
        """Wait for the save in progress, if any, and return the outcome of the last save. Call it on all ranks."""
        self._join()
        return self.last

    def rewind(self, step: int) -> None:
        """Make the existing checkpoint of `step` the newest. Collective; call it when no save is in progress.

        Raises:
            FencedError: Another attempt has taken the run's lease.
        """

        def take_back() -> None:
            if not self._may_publish():
                raise FencedError("this attempt no longer holds the run's lease")
            commit.rewind(self.directory, step)
            if self._uploader is not None:
                self._uploader.wake()

        self._ranks.once(take_back)

    def close(self) -> None:
        """Wait for the save in progress, and release the CPU buffers and the process group."""
        try:
            self._join()
        finally:
            self._staged.clear()
            if self._ranks.group is not None:
                dist.destroy_process_group(self._ranks.group)
                self._ranks = RankGroup(None)

    def _check_replicas(self, step: int, state: Mapping[str, Tensor]) -> None:
        try:
            check_replicas(self._ranks, state)
        except ReplicasDifferError as error:
            self._emit("replicas_differ", step=step, cause=str(error))
            raise

    def _stage(self, local: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to CPU buffers, which are pinned for GPU tensors. The copies overlap; the end waits for all."""
        devices = set()
        for name, tensor in local.items():
            buffer = self._staged.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                pinned = tensor.device.type == "cuda"
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
                self._staged[name] = buffer
            buffer.copy_(tensor, non_blocking=True)
            if tensor.device.type == "cuda":
                devices.add(tensor.device)
        for name in self._staged.keys() - local.keys():
            del self._staged[name]
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return dict(self._staged)

    def _join(self, report_wait_at: int | None = None) -> None:
        """Wait for the save in progress and process its outcome; raise the exception that ended it, if any."""
        job, self._job = self._job, None
        if job is None:
            return
        if job.thread is not None:
            began = time.perf_counter()
            job.thread.join()
            waited = time.perf_counter() - began
            if report_wait_at is not None and waited > 0.01:
                self._emit("save_waited", step=report_wait_at, seconds=round(waited, 3))
        if job.error is not None:
            raise job.error
        self.last = job.outcome
        if self.last is None or self.last.status == "saved":
            self.failures = 0
            return
        self.fenced = self.fenced or self.last.status == "fenced"
        self.failures += 1
        if self.failures >= self.config.max_failed_saves:
            logger.error(
                "the last %d saves failed; training continues without a new checkpoint: %s",
                self.failures,
                self.last.cause,
            )
            self._emit("unsaved", step=self.last.step, failures=self.failures, cause=self.last.cause)

    def _run(self, job: _Job) -> None:
        """Execute one save, from the temporary directory to pruning; in the saving thread."""
        try:
            job.outcome = self._attempt(job)
        except BaseException as error:  # noqa: BLE001 - it reaches nobody unless it is joined
            job.error = error
            return
        outcome = job.outcome
        if outcome.status == "saved":
            if self._uploader is not None:
                self._uploader.wake()
            self._emit(
                "saved", step=job.step, bytes=outcome.total_bytes, seconds=round(outcome.seconds, 3),
                staging_s=round(outcome.staging_s, 4), pruned=list(outcome.pruned),
                **({"best": self._best[0].plain()} if self._best else {}),
            )  # fmt: skip
        elif outcome.status == "failed":
            self._emit("save_failed", step=job.step, cause=outcome.cause, failures=self.failures + 1)
        else:
            self._emit("save_refused", step=job.step, cause=outcome.cause)

    def _attempt(self, job: _Job) -> SaveOutcome:
        ranks = self._ranks
        temporary = self.directory / ranks.share(commit.temporary_name(job.step) if ranks.first else None)
        total = 0
        pruned: tuple[int, ...] = ()
        status: Literal["saved", "failed", "fenced"] = "saved"
        cause = None
        try:
            total, pruned = self._write_and_commit(job, temporary)
        except FencedError as error:
            status, cause = "fenced", str(error)
        except (WorkFailedError, UserError) as error:
            status, cause = "failed", str(error)
        if status != "saved" and ranks.first:
            commit.discard(temporary)
        seconds = time.perf_counter() - job.started
        return SaveOutcome(job.step, status, cause, total, job.staging_s, seconds, pruned, self._failed_uploads())

    def _failed_uploads(self) -> int:
        """Number of failed uploads in a row, shared by the first rank, so that all ranks stop or continue together."""
        if self.config.storage is None:
            return 0
        return self._ranks.share(0 if self._uploader is None else self._uploader.failures)

    def _write_and_commit(self, job: _Job, temporary: Path) -> tuple[int, tuple[int, ...]]:
        ranks, hook = self._ranks, self._hook
        ranks.once(lambda: temporary.mkdir(parents=True))
        hook("begin")
        records, mine = write_shards(ranks, temporary, job.items, job.local, hook)
        total = ranks.share(sum(record.bytes for record in records.values()) if ranks.first else None)
        final = ranks.once(lambda: self._publish(job, temporary, records))
        if self.config.read_back:
            self._read_back(final, mine)
        hook("verify")
        pruned = ranks.once(lambda: self._prune(final))
        hook("prune")
        return total, tuple(pruned)

    def _read_back(self, final: Path, names: list[str]) -> None:
        """Compare each rank's files with the manifest, and withdraw the checkpoint if they differ."""
        try:
            self._ranks.together(lambda: _verify_from_disk(final, names))
        except CorruptionError:
            self._ranks.once(lambda: commit.withdraw(final))
            raise

    def _publish(self, job: _Job, temporary: Path, records: dict[str, FileRecord]) -> Path:
        manifest = Manifest(
            step=job.step,
            files=records,
            world_size=self._ranks.size,
            versions={
                "bigtrain": bigtrain.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            **job.facts,
        )
        return commit.publish(temporary, manifest, may_publish=self._may_publish, hook=self._hook)

    def _prune(self, final: Path) -> list[int]:
        """Remove old checkpoints, and return their steps. An OSError is only logged: the save itself has succeeded."""
        self._known_good.add(commit.good_mark(final))
        if not self._may_publish():
            return []
        try:
            self._best = best_checkpoints(self.directory, self._known_good)
            spare = {best.step for best in self._best} | (self._uploader.in_use if self._uploader else set())
            return commit.prune(self.directory, self.config.keep_last, self._known_good, spare=spare)
        except OSError as error:
            logger.warning("old checkpoints could not be pruned: %s", error)
            return []

    def _clean(self) -> None:
        """Remove leftovers of interrupted saves. An OSError is only logged, since the first save will report it."""
        try:
            commit.clean(self.directory)
        except OSError as error:
            logger.warning("temporary files of interrupted saves could not be removed: %s", error)

    def _emit(self, event: str, **fields: Any) -> None:
        if self._on_event is None or not self._ranks.first:
            return
        try:
            self._on_event(event, **fields)
        except OSError as error:
            # A disk that is too full for a checkpoint may also be too full for the event.
            logger.warning("the event '%s' of step %s could not be recorded: %s", event, fields.get("step"), error)


def _verify_from_disk(path: Path, names: list[str]) -> None:
    """Compare this rank's files with the manifest, reading from the disk and not from the page cache."""
    commit.drop_from_cache(path, names)
    problems = commit.verify(path, names=names)
    if problems:
        raise CorruptionError(f"the checkpoint on disk differs from what was written: {problems[0]}", str(path))
