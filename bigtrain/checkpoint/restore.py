"""Runs with checkpoints on an object store: restore a run after its disk was lost, or fetch a checkpoint to read it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

from bigtrain.checkpoint import commit
from bigtrain.checkpoint.best import best_checkpoints
from bigtrain.checkpoint.manifest import read_manifest
from bigtrain.checkpoint.store import HASTE, RunStore
from bigtrain.config import CorruptionError, UserError
from bigtrain.config.urls import is_url
from bigtrain.models.hf_files import HfFiles
from bigtrain.run import Lease, RunConfig, RunDirectory, find_checkpoints, split_run_step
from bigtrain.storage.locks import locked
from bigtrain.storage.objects import RemoteError, cache_home

_log = logging.getLogger(__name__)


def store_of(config: RunConfig) -> RunStore | None:
    """The store to which a run's checkpoints are uploaded; None if `checkpoint.storage` is not set."""
    storage = config.checkpoint.storage
    return None if storage is None else RunStore(f"{storage}/{config.name}")


def check_store(config: RunConfig) -> None:
    """Check that the run can upload to its store, by writing and removing a small object.

    Raises:
        UserError: The store refused the object: the bucket, the credentials or the endpoint are wrong.
    """
    storage = config.checkpoint.storage
    if storage is not None:
        with _as_mistake("checkpoint.storage"):
            RunStore(f"{storage}/{config.name}", HASTE).check_access()


def bring_back(config: RunConfig, runs_dir: Path) -> str | None:
    """Restore a run from its store before a resume, if it has no checkpoint on this disk and some on the store.

    Returns:
        A sentence that describes what was restored; None if nothing was.

    Raises:
        UserError: The store cannot be read, or another process holds the run's lease.
        CorruptionError: All checkpoints on the store are damaged.
    """
    run = RunDirectory(runs_dir / config.name)
    storage = config.checkpoint.storage
    if storage is None or run.is_foreign() or commit.list_checkpoints(run.checkpoints):
        return None
    with _as_mistake("checkpoint.storage"):
        url = f"{storage}/{config.name}"
        return _restore(RunStore(url), run) if RunStore(url, HASTE).committed() else None


def bring_back_from(url: str, runs_dir: Path) -> tuple[RunDirectory, str]:
    """Restore the run NAME from the URL PREFIX/NAME or PREFIX/NAME@STEP into `runs_dir`, which has no such run yet.

    Returns:
        The run's directory, and a sentence that describes what was restored.

    Raises:
        UserError: A run of this name exists already, the store has no such checkpoint, the store cannot be read, or
            another process holds the run's lease.
        CorruptionError: The requested checkpoint, or every one on the store, is damaged.
    """
    place, step = split_run_step(resolve_best(url, runs_dir))
    with _as_mistake(place):
        store = RunStore(place, HASTE)
        run = RunDirectory(runs_dir / store.url.rpartition("/")[2])
        if run.exists() or run.is_foreign():
            raise UserError(f"A run '{run.name}' already exists here", str(run.path), f"bigtrain resume {run.name}")
        _require_committed(store, step)
        return run, _restore(RunStore(place), run, step)


def resolve_best(run: str, runs_dir: Path) -> str:
    """Replace RUN@best by RUN@STEP, where RUN is a name, path or URL; any other text is returned unchanged.

    Raises:
        UserError: There is no such run, it keeps no best checkpoint, or the store cannot be read.
    """
    name, at, which = run.rpartition("@")
    if not at or which != "best":
        return run
    if is_url(name):
        with _as_mistake(name):
            found = RunStore(name, HASTE).best()
    else:
        found = best_checkpoints(find_checkpoints(name, runs_dir).checkpoints)
    if not found:
        raise UserError(
            f"The run '{name}' keeps no best checkpoint",
            run,
            "Give a step; or set checkpoint.best: {metric: val_loss}, so that the run keeps its best checkpoint from "
            "now on.",
        )
    return f"{name}@{found[0].step}"


def weights_at(text: str, runs_dir: Path) -> HfFiles | tuple[RunDirectory, int | None]:
    """Find the weights that a user names: a directory of Hugging Face weights, or a checkpoint (`checkpoint_at`).

    All commands that read weights accept these sources. A run of that name under `runs_dir` has precedence.

    Raises:
        UserError: There is no such run, checkpoint or directory, the store cannot be read, or the headers of the
            weights cannot be read.
        CorruptionError: The checkpoint on the store is damaged.
    """
    if HfFiles.is_one(Path(text)) and not RunDirectory(runs_dir / text).exists():
        return HfFiles.open(Path(text))
    return checkpoint_at(text, runs_dir)


def checkpoint_at(run: str, runs_dir: Path) -> tuple[RunDirectory, int | None]:
    """The run and the step that RUN, RUN@STEP or RUN@best names; a URL is first downloaded into a cache.

    A directory that `checkpoint import` wrote is accepted as a run; it has no run.json (`exists()` is false).

    Raises:
        UserError: There is no such run or checkpoint, or the store cannot be read.
        CorruptionError: The checkpoint on the store is damaged.
    """
    name, step = split_run_step(resolve_best(run, runs_dir))
    if not is_url(name):
        return find_checkpoints(name, runs_dir), step
    with _as_mistake(name):
        return fetch_into_cache(name, step)


def newest_of(run: RunDirectory) -> int:
    """Step of a run's newest intact checkpoint; a warning is logged for each newer one that is damaged or missing.

    Raises:
        UserError: The run has no checkpoint yet.
        CorruptionError: All checkpoints are damaged.
    """
    step, warnings = commit.newest_verified(run.checkpoints)
    if step is None:
        raise UserError(f"The run '{run.name}' has no checkpoint yet", str(run.checkpoints))
    for warning in warnings:
        _log.warning("%s; the checkpoint of step %s is used", warning, step)
    return step


def fetch_into_cache(url: str, step: int | None) -> tuple[RunDirectory, int]:
    """Fetch a checkpoint from a store into the cache directory, unless it is there already.

    The processes of a machine share the cache: one of them fetches, and the others wait.

    Args:
        url: The run on the store, PREFIX/NAME.
        step: Step of the checkpoint; None: the newest.

    Returns:
        A run directory with the checkpoint, and the checkpoint's step.
    """
    step = _require_committed(RunStore(url, HASTE), step)
    store = RunStore(url)
    manifest = store.manifest(step)
    run = RunDirectory(cache_home() / "checkpoints" / hashlib.sha256(store.url.encode()).hexdigest()[:32])
    run.path.mkdir(parents=True, exist_ok=True)
    with locked(run.path / ".lock", make=True):
        store.fetch_records(run)
        found = commit.find_checkpoint(run.checkpoints, step)
        if found is None or commit.verify(found.path, hashes=False) or read_manifest(found.path) != manifest:
            store.fetch(step, run.checkpoints)
    return run, step


def refuse_unrestored(config: RunConfig) -> None:
    """Refuse to start a run at step 0 if there are checkpoints of it on its store.

    Raises:
        UserError: The store has a checkpoint of the run.
    """
    store = store_of(config)
    steps = store.committed() if store is not None else []
    if store is not None and steps:
        raise UserError(
            f"The run '{config.name}' has no checkpoint on this machine, but its store holds one of step {steps[-1]}",
            store.url,
            f"Fetch it with `bigtrain resume {store.url}`, or choose another --name.",
        )


def _restore(store: RunStore, run: RunDirectory, step: int | None = None) -> str:
    """Fetch a run's records and its newest intact checkpoint, or that of `step`, into the run's directory."""
    lease = Lease.acquire(run)
    try:
        commit.clean(run.checkpoints)
        store.fetch_records(run)
        run.read_record()
        problems = []
        for candidate in reversed(store.committed()) if step is None else [step]:
            try:
                store.fetch(candidate, run.checkpoints)
            except CorruptionError as error:
                problems.append(f"step {candidate}: {error.what}")
                continue
            passed = f"; skipped because they are damaged: {'; '.join(problems)}" if problems else ""
            cause = f"the checkpoint of step {candidate} was fetched from {store.url}{passed}"
            run.event("restored", step=candidate, cause=cause)
            return f"{run.name}: {cause}"
        raise CorruptionError("no checkpoint on the store is intact: " + "; ".join(problems), store.url)
    finally:
        lease.release()


def _require_committed(store: RunStore, step: int | None) -> int:
    steps = store.committed()
    if not steps:
        raise UserError("There is no checkpoint", store.url, "Name a run: s3://BUCKET/PREFIX/NAME, or NAME@STEP.")
    if step is not None and step not in steps:
        raise UserError(
            f"There is no checkpoint of step {step}",
            store.url,
            f"Choose one of these steps: {', '.join(map(str, steps))}.",
        )
    return steps[-1] if step is None else step


@contextlib.contextmanager
def _as_mistake(where: str) -> Iterator[None]:
    """Raise a store's error as a `UserError`: before the first step, the user can fix it."""
    try:
        yield
    except RemoteError as error:
        raise UserError(f"{where}: {error.what}", error.where, error.fix) from None
