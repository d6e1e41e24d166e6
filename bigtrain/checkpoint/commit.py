"""The commit protocol on a local disk: a checkpoint exists completely, or not at all.

    step_00000100.tmp-1f2e3d4c/   shards are written and synced here
        manifest.json             then the manifest is written, atomically
    step_00000100/                then the directory is renamed, and its parent synced
    LATEST                        then the pointer is published, atomically
                                  then the new checkpoint is read back, and older ones are pruned

A directory that is replaced (the same step saved again after a resume) keeps the name `step_N.old-HEX` until its
replacement has been read back. While `step_N` does not exist, it counts as the checkpoint of that step. A directory
is renamed to a `.tmp-` name before it is removed. So a kill between any two system calls leaves a directory of
checkpoints that can be read.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtrain.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest, read_object, write_manifest
from bigtrain.config import CorruptionError
from bigtrain.run.names import LATEST
from bigtrain.storage import fsync_directory, hash_file, write_json

LATEST_VERSION = 1
_MAX_LATEST_BYTES = 1 << 16

_STEP = re.compile(r"step_([0-9]{8,18})(\.old-[0-9a-f]{8})?")
_LEFTOVER = re.compile(r"step_[0-9]{8,18}\.tmp-[0-9a-f]{8}|\.LATEST\.tmp-[0-9a-f]+")

PhaseHook = Callable[[str], None]


class FencedError(Exception):
    """Another process has taken the run's lease: this writer may publish nothing any more."""


@dataclass(frozen=True)
class Checkpoint:
    """Step and directory of a published checkpoint, which is not necessarily verified."""

    step: int
    path: Path


def step_name(step: int) -> str:
    """Name of a step's directory: "step_00000100" for step 100."""
    return f"step_{step:08d}"


def parse_step(name: str) -> int | None:
    """The step of a directory named by `step_name`; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and not match[2] else None


def temporary_name(step: int) -> str:
    """A new, unique name for a directory that is being written or removed."""
    return f"{step_name(step)}.tmp-{uuid.uuid4().hex[:8]}"


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """List the published checkpoints, oldest first, without verification; empty if the directory does not exist."""
    current: dict[int, Path] = {}
    replaced: dict[int, Path] = {}
    if not directory.is_dir():
        return []
    with os.scandir(directory) as entries:
        for entry in entries:
            match = _STEP.fullmatch(entry.name)
            if match and entry.is_dir(follow_symlinks=False):
                (replaced if match[2] else current)[int(match[1])] = directory / entry.name
    return [Checkpoint(step, path) for step, path in sorted({**replaced, **current}.items())]


def find_checkpoint(directory: Path, step: int) -> Checkpoint | None:
    """The published checkpoint of one step, without verification; None if it does not exist."""
    return next((found for found in list_checkpoints(directory) if found.step == step), None)


def verify(path: Path, *, names: Collection[str] | None = None, hashes: bool = True) -> list[str]:
    """Compare a checkpoint's directory with its manifest.

    Args:
        path: The directory of one step.
        names: Names of the files to compare; None: all files.
        hashes: Whether to read every byte and compare hashes; otherwise only sizes are compared.

    Returns:
        One sentence for each problem found; empty for an intact checkpoint.
    """
    try:
        manifest = read_manifest(path)
    except CorruptionError as error:
        return [error.what]
    match = _STEP.fullmatch(path.name)
    if match and int(match[1]) != manifest.step:
        return [f"{path.name} holds the manifest of step {manifest.step}"]
    if not manifest.files:
        return ["the manifest lists no files"]
    wanted = manifest.files if names is None else {name: manifest.files[name] for name in names}
    problems = []
    for name, record in wanted.items():
        problem = _verify_file(path / name, record.bytes, record.hash if hashes else None)
        if problem:
            problems.append(f"{name} {problem}")
    return problems


def _verify_file(path: Path, size: int, expected: str | None) -> str | None:
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            return "is not a regular file"
        if status.st_size != size:
            return f"has {status.st_size} bytes, but the manifest says {size}"
        if expected is not None and hash_file(path) != expected:
            return "does not match its hash"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def newest_verified(directory: Path) -> tuple[int | None, list[str]]:
    """Find the newest checkpoint that passes verification.

    Returns:
        The step of that checkpoint (None if no checkpoint has ever been saved), and a warning for each newer checkpoint
        that is damaged or missing.

    Raises:
        CorruptionError: Checkpoints exist, or existed according to LATEST, and none passes verification.
    """
    found, warnings = choose(directory, list_checkpoints(directory), lambda candidate: verify(candidate.path))
    return (found.step if found else None), warnings


def choose(
    directory: Path, candidates: Sequence[Checkpoint], check: Callable[[Checkpoint], list[str]]
) -> tuple[Checkpoint | None, list[str]]:
    """The newest of `candidates` (oldest first) for which `check` returns no problem, and warnings about newer ones.

    Raises:
        CorruptionError: No candidate passes the check, although there are some or LATEST names one.
    """
    missing = missing_latest(directory)
    warnings = [] if missing is None else [missing]
    for candidate in reversed(candidates):
        problems = check(candidate)
        if not problems:
            return candidate, warnings
        warnings.append(passed_over(candidate, problems))
    if warnings or (directory / LATEST).exists():
        raise CorruptionError(
            "no checkpoint is intact: " + ("; ".join(warnings) or "LATEST refers to one, but none exists"),
            str(directory),
            "Restore the directory of a checkpoint, or move this directory away to start again from step 0.",
        )
    return None, warnings


def passed_over(checkpoint: Checkpoint, problems: Sequence[str]) -> str:
    """The warning that this damaged checkpoint is not used, and an older one is used instead."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"checkpoint of step {checkpoint.step} is damaged and is skipped: {problems[0]}{more}"


def missing_latest(directory: Path) -> str | None:
    """A warning if LATEST names a newer step than all existing checkpoints, or no valid step; otherwise None."""
    if not (directory / LATEST).exists():
        return None
    try:
        step = read_object(directory / LATEST, _MAX_LATEST_BYTES).get("step")
    except CorruptionError as error:
        return f"{error.what}: a newer checkpoint may be missing"
    if not isinstance(step, int):
        return "LATEST holds no valid step: a newer checkpoint may be missing"
    found = list_checkpoints(directory)
    if found and found[-1].step >= step:
        return None
    path = directory / step_name(step)
    why = "does not exist"
    if path.is_symlink():
        why = "is a symbolic link, which is not followed: move the directory here, or mount it"
    elif path.exists():
        why = "is not a directory"
    return f"LATEST refers to step {step}, but {path.name} {why}"


def publish(
    temporary: Path,
    manifest: Manifest,
    *,
    may_publish: Callable[[], bool] = lambda: True,
    hook: PhaseHook = lambda phase: None,
) -> Path:
    """Commit a written and synced directory as the checkpoint of `manifest.step`.

    Args:
        temporary: The directory with the shards, in the same parent directory as the final one.
        manifest: The manifest, with the sizes and hashes of all files.
        may_publish: Returns whether this process still holds the lease; called before each publishing write.
        hook: Called after each phase, with "manifest", "rename" or "publish".

    Returns:
        The directory of the published checkpoint.

    Raises:
        FencedError: The lease was lost, or a later holder has already published a checkpoint.
    """
    directory = temporary.parent
    write_manifest(temporary, manifest)
    hook("manifest")
    final = directory / step_name(manifest.step)
    _refuse_if_fenced(directory, final, manifest, may_publish)
    if final.exists():
        replaced = final.with_name(f"{final.name}.old-{uuid.uuid4().hex[:8]}")
        os.rename(final, replaced)
        try:
            os.rename(temporary, final)
        except OSError:
            os.rename(replaced, final)
            raise
    else:
        os.rename(temporary, final)
    fsync_directory(directory)
    hook("rename")
    _refuse_if_fenced(directory, final, manifest, may_publish)
    _write_latest(directory, manifest.step, manifest.lease)
    hook("publish")
    return final


def adopt(temporary: Path, manifest: Manifest) -> Path:
    """Commit a complete, verified and synced directory that was fetched with its manifest.

    A checkpoint of the same step is replaced. LATEST is updated if this step is now the newest one.
    """
    directory = temporary.parent
    final = directory / step_name(manifest.step)
    if final.exists():
        remove(final)
    os.rename(temporary, final)
    fsync_directory(directory)
    if list_checkpoints(directory)[-1].step == manifest.step:
        _write_latest(directory, manifest.step, manifest.lease)
    return final


def withdraw(path: Path) -> None:
    """Remove a published checkpoint that failed its read-back, and restore the checkpoint that it replaced, if any."""
    step = int(path.name.removeprefix("step_"))
    directory = path.parent
    remove(path)
    for old in directory.glob(f"{step_name(step)}.old-*"):
        os.rename(old, path)
        break
    remaining = list_checkpoints(directory)
    if not remaining:
        (directory / LATEST).unlink(missing_ok=True)
        return
    _write_latest(directory, remaining[-1].step, _lease_of_latest(directory))


def rewind(directory: Path, step: int) -> list[int]:
    """Make the existing checkpoint of `step` the newest one, by removing all later ones.

    If the process is killed meanwhile, some of the later checkpoints remain, undamaged.

    Returns:
        The steps removed, oldest first.
    """
    _write_latest(directory, step, _lease_of_latest(directory))
    later = [found for found in list_checkpoints(directory) if found.step > step]
    for found in later:
        remove(found.path)
    return [found.step for found in later]


def prune(
    directory: Path,
    keep_last: int,
    known_good: set[tuple[str, int]],
    *,
    spare: Collection[int] = (),
    dry_run: bool = False,
) -> list[int]:
    """Remove checkpoints older than the `keep_last` newest intact ones unless they are permanent; and replaced ones.

    A damaged checkpoint does not count as one of the newest, so the last intact one is never removed.

    Args:
        directory: The directory that holds the run's checkpoints.
        keep_last: Number of intact checkpoints to keep.
        known_good: (directory name, inode) of the checkpoints that have been read back in full. For these only sizes
            are compared again. Those found intact here are added.
        spare: Steps that are kept in any case: one that is being uploaded, the best ones.
        dry_run: Whether to remove nothing and only return the steps.

    Returns:
        The removed steps (with `dry_run`, those that would be removed), newest first.
    """
    kept = 0
    removed = []
    for candidate in reversed(list_checkpoints(directory)):
        if kept >= keep_last:
            if candidate.step not in spare and not _is_permanent(candidate.path):
                removed.append(candidate.step)
                if not dry_run:
                    remove(candidate.path)
            continue
        kept += is_sound(candidate.path, known_good)
    if not dry_run:
        _remove_replaced(directory)
    return removed


def is_sound(path: Path, known_good: set[tuple[str, int]] | None = None) -> bool:
    """Whether a checkpoint passes verification.

    Args:
        path: The directory of one step.
        known_good: The same set as in `prune`. None: only the sizes of the files are compared.
    """
    if known_good is None:
        return not verify(path, hashes=False)
    mark = good_mark(path)
    if verify(path, hashes=mark not in known_good):
        return False
    known_good.add(mark)
    return True


def good_mark(path: Path) -> tuple[str, int]:
    """The (directory name, inode) by which `known_good` of `prune` identifies a checkpoint's directory."""
    return path.name, path.stat().st_ino


def clean(directory: Path) -> list[str]:
    """Remove the leftovers of interrupted saves. The holder of a new lease calls this before its first save.

    Returns:
        Names of the files and directories that were removed or renamed back.
    """
    if not directory.is_dir():
        return []
    handled = []
    for candidate in list_checkpoints(directory):
        if ".old-" in candidate.path.name:
            os.rename(candidate.path, directory / step_name(candidate.step))
            handled.append(candidate.path.name)
    handled += _remove_replaced(directory)
    for entry in sorted(directory.iterdir()):
        if _LEFTOVER.fullmatch(entry.name):
            discard(entry)
            handled.append(entry.name)
    return handled


def remove(path: Path) -> None:
    """Remove a checkpoint; if the process is killed meanwhile, no partial checkpoint remains under this name."""
    match = _STEP.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not the name of a checkpoint")
    doomed = path.with_name(temporary_name(int(match[1])))
    os.rename(path, doomed)
    discard(doomed)


def discard(path: Path) -> None:
    """Remove a temporary file or directory; errors of the file system are ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def drop_from_cache(path: Path, names: Iterable[str]) -> None:
    """Ask the kernel to drop synced files from its page cache, so that the next read comes from the disk."""
    for name in names:
        descriptor = os.open(path / name, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _remove_replaced(directory: Path) -> list[str]:
    """Remove the `.old-` directories of steps whose own directory exists."""
    handled = []
    for entry in sorted(directory.iterdir()):
        match = _STEP.fullmatch(entry.name)
        if match and match[2] and (directory / step_name(int(match[1]))).is_dir():
            remove(entry)
            handled.append(entry.name)
    return handled


def _refuse_if_fenced(directory: Path, final: Path, manifest: Manifest, may_publish: Callable[[], bool]) -> None:
    """Raise FencedError if the lease is lost, or if a later holder has already published a checkpoint."""
    if not may_publish():
        raise FencedError("this attempt no longer holds the run's lease")
    found = [_lease_of_latest(directory)]
    if (final / MANIFEST_NAME).exists():
        found.append(_lease_of(final))
    if max(found) > manifest.lease:
        raise FencedError(f"lease {max(found)} has already published here; this attempt holds lease {manifest.lease}")


def published_lease(directory: Path) -> int:
    """The highest lease number under which a checkpoint was published here; 0 if there is none."""
    return max([_lease_of_latest(directory), *(_lease_of(found.path) for found in list_checkpoints(directory))])


def _is_permanent(path: Path) -> bool:
    try:
        return read_manifest(path).permanent
    except CorruptionError:
        return False


def _lease_of(path: Path) -> int:
    try:
        return read_manifest(path).lease
    except CorruptionError:
        return 0


def _lease_of_latest(directory: Path) -> int:
    try:
        lease = read_object(directory / LATEST, _MAX_LATEST_BYTES).get("lease")
    except CorruptionError:
        return 0
    return lease if isinstance(lease, int) else 0


def _write_latest(directory: Path, step: int, lease: int) -> None:
    value = {"format_version": LATEST_VERSION, "step": step, "directory": step_name(step), "lease": lease}
    write_json(directory / LATEST, value)
