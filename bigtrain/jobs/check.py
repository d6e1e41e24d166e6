"""The checks of a run before any process starts: its config, data, run directory and earlier attempts."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigtrain.checkpoint import commit
from bigtrain.checkpoint.manifest import read_manifest
from bigtrain.config import UserError
from bigtrain.config.plugin import plugin_environment
from bigtrain.jobs.takeover import outlast
from bigtrain.optim.schedule import rates
from bigtrain.run import NAME_PATTERN, Lease, RunConfig, RunDirectory, find_run, load_config, split_run_step
from bigtrain.tracking.history import read_events, state
from bigtrain.tracking.metrics import last_step
from bigtrain.training.branch import consumed
from bigtrain.training.config import InitConfig
from bigtrain.training.prepare import Prepared, prepare
from bigtrain.training.source import CheckpointSource, HfSource, check_fresh, check_hf_source, resolve_source


@dataclass(frozen=True)
class CheckedRun:
    """A run that passed all checks that need no hardware; `train` and the driver of a cluster job start it."""

    prepared: Prepared
    directory: RunDirectory
    newest: int | None
    """Step of the run's newest checkpoint; None if it has none."""
    finished: bool
    """Whether nothing is left to do."""
    back_to: int | None = None
    """If not None, the run goes back to the checkpoint of this step, and later checkpoints are moved aside."""

    def with_job(self, **update: Any) -> CheckedRun:
        """A copy of the run in which these keys of the `job` section are changed."""
        config = self.prepared.config
        job = config.job.model_copy(update=update)
        return replace(self, prepared=replace(self.prepared, config=config.model_copy(update={"job": job})))

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables by which the ranks find the user's plugins."""
        return plugin_environment()

    @contextlib.contextmanager
    def held(self) -> Iterator[Lease]:
        """Hold the run's lease.

        On entry the remains of killed saves are removed, and the run's config and record are written.

        Raises:
            UserError: Another process holds the lease.
        """
        directory = self.directory
        lease = Lease.acquire(directory, commit.published_lease(directory.checkpoints))
        try:
            lease.keep()
            if lease.predecessor is not None:
                dead = lease.predecessor
                cause = f"the launcher, process {dead.pid} on {dead.host}, ended without releasing its lease"
                silent_s = round(max(0.0, time.time() - dead.renewed), 3)
                directory.event(
                    "fault", step=last_step(directory.metrics), cause=cause, host=dead.host, silent_s=silent_s
                )
            commit.clean(directory.checkpoints)
            if self.back_to is not None:
                _set_aside(directory, self.back_to)
            directory.write(self.prepared.config, self.prepared.what)
            yield lease
        finally:
            lease.release()


def check(config: RunConfig, runs_dir: Path, *, fork: str | None = None, step: int | None = None) -> CheckedRun:
    """Check a run's config against its data and its run directory. Nothing is written, and no process is started.

    Args:
        config: The run's config.
        runs_dir: The directory that holds all run directories.
        fork: Name of a new run that starts from the newest checkpoint of the run `config.name`.
        step: The run goes back to the checkpoint of this step.

    Raises:
        UserError: A check failed.
    """
    if fork is not None:
        config = _fork(config, runs_dir, fork)
    directory = RunDirectory(runs_dir / config.name)
    config = _fix_source(config, directory)
    prepared = _after_branch(prepare(config), directory)
    config = prepared.config
    if config.model.plugin is not None:
        _check_plugin(prepared)
    newest, finished = None, False
    if directory.exists():
        called = {found: name for name, found in prepared.fingerprints.items()} if prepared.is_mixture else {}
        directory.check_identity(config, prepared.what, called)
        _check_duration(directory, prepared)
        newest = _newest_step(directory)
        finished = newest is not None and newest >= prepared.total_steps and _is_over(directory, newest)
    else:
        _check_source(prepared, directory)
    if step is not None:
        _check_step(directory, step)
        newest, finished = step, finished and step == newest
    if newest is not None:
        _check_checkpoint(directory, newest)
    if not finished and directory.is_foreign():
        raise UserError(
            f"{directory.path} holds files, but is not a run",
            fix="Choose another --name or --runs-dir, or move them away.",
        )
    return CheckedRun(prepared, directory, newest, finished, step)


def check_when_free(
    config: RunConfig, runs_dir: Path, *, fork: str | None = None, step: int | None = None, say: Callable[[str], None]
) -> CheckedRun:
    """Like `check`, but first waits if a launcher on another machine holds the run and may be dead.

    See `bigtrain.jobs.takeover`. The waiting is reported by `say`.

    Raises:
        UserError: A check failed, or the other launcher is alive.
    """
    run = check(config, runs_dir, fork=fork, step=step)
    if not run.finished and outlast(run.directory, say):
        # The other launcher may have saved or finished the run meanwhile.
        run = check(config, runs_dir, fork=fork, step=step)
    return run


def _check_plugin(prepared: Prepared) -> None:
    """Check the model of a plugin, as `bigtrain config validate` does.

    Only plugins are checked here: user code is untested, and imports torch, which takes seconds, in any case.
    """
    from bigtrain.models.check import check_model

    config = prepared.config
    check_model(config.model, prepared.outputs, config.engine.deterministic == "across_layouts")


def _check_source(prepared: Prepared, directory: RunDirectory) -> None:
    """Refuse an `init.source` from which the run cannot start."""
    config, init = prepared.config, prepared.config.init
    if init.source is None:
        return
    shapes = getattr(config.model, "parameter_shapes", None)
    shapes = None if shapes is None else shapes(prepared.outputs)
    if shapes is not None:
        check_fresh(shapes, init)
    source = resolve_source(init.source, directory.path.parent)
    if isinstance(source, HfSource):
        check_hf_source(source, config.model, shapes, init)
    elif init.state == "all" and source.step >= prepared.total_steps:
        raise UserError(
            f"The run would start after step {source.step}, but its duration ends at step {prepared.total_steps}",
            f"init.source {init.source}",
            "Give a longer duration, for example duration='2000 steps'.",
        )


def _check_duration(directory: RunDirectory, prepared: Prepared) -> None:
    """Refuse a new duration that changes the learning rate of a finished step, or that ends before the newest one."""
    old = load_config(directory.config)
    if old.duration == prepared.config.duration:
        return
    newest = _newest_step(directory) or 0
    before = replace(prepared, config=old, total_steps=prepared.steps(old.duration))
    schedule = old.optimizer.schedule_of(old.schedule, before.total_steps, prepared.steps)
    changed = next((step for step in range(newest) if rates(schedule, step) != rates(prepared.schedule, step)), None)
    if changed is not None:
        raise UserError(
            f"The duration cannot change from '{old.duration}' to '{prepared.config.duration}': the learning rate of "
            f"step {changed}, which is finished, would change",
            str(directory.path),
            "Fork from a checkpoint before the decay: --fork NEW.",
        )
    if prepared.total_steps < newest:
        raise UserError(
            f"The run '{directory.name}' is at step {newest}, past the new duration of {prepared.total_steps} steps",
            str(directory.path),
        )


def _newest_step(directory: RunDirectory) -> int | None:
    """Step of the newest checkpoint that is complete according to its manifest and file sizes; hashes are not read."""
    for checkpoint in reversed(commit.list_checkpoints(directory.checkpoints)):
        if not commit.verify(checkpoint.path, hashes=False):
            return checkpoint.step
    return None


def _check_checkpoint(directory: RunDirectory, step: int) -> None:
    """Refuse to continue from a checkpoint that another run saved."""
    found = commit.find_checkpoint(directory.checkpoints, step)
    assert found is not None
    directory.check_checkpoint(step, read_manifest(found.path).identity)


def _check_step(directory: RunDirectory, step: int) -> None:
    """Refuse to go back to a step that has no verified checkpoint."""
    steps = [checkpoint.step for checkpoint in commit.list_checkpoints(directory.checkpoints)]
    if step not in steps:
        known = (
            f"Choose one of these steps: {', '.join(map(str, steps))}." if steps else "The run has no checkpoints yet."
        )
        raise UserError(f"The run '{directory.name}' has no checkpoint of step {step}", str(directory.path), known)
    if not _is_sound(directory, step):
        raise UserError(f"The checkpoint of step {step} is damaged", str(directory.path), "See `checkpoint verify`.")


def _set_aside(directory: RunDirectory, step: int) -> None:
    """Move the checkpoints of later steps into another directory, so that the user can restore them."""
    later = [found for found in commit.list_checkpoints(directory.checkpoints) if found.step > step]
    if not later:
        return
    aside = directory.path / f"checkpoints_after_{step}" / time.strftime("%Y%m%d-%H%M%S")
    aside.mkdir(parents=True)
    # Newest first: if the process is killed in between, the run goes back fewer steps.
    for checkpoint in reversed(later):
        checkpoint.path.rename(aside / checkpoint.path.name)
    commit.rewind(directory.checkpoints, step)
    directory.event(
        "resumed", step=step, cause=f"went back to step {step} on request; later checkpoints are in {aside}"
    )


def _is_sound(directory: RunDirectory, step: int) -> bool:
    """Whether the checkpoint of `step` exists and all its files have the hashes of its manifest."""
    found = commit.find_checkpoint(directory.checkpoints, step)
    return found is not None and not commit.verify(found.path)


def _is_over(directory: RunDirectory, step: int) -> bool:
    """Whether a run with its last checkpoint at `step` also recorded its end.

    A run that was killed after its last checkpoint starts again without training a step, so that its trackers send
    what they had not yet written.
    """
    return state(read_events(directory.events), alive=False) == "finished" and _is_sound(directory, step)


def _fork(config: RunConfig, runs_dir: Path, new: str) -> RunConfig:
    if not re.match(NAME_PATTERN, new):
        raise UserError(f"'{new}' cannot be the name of a run", "--fork", "Use letters, digits, '.', '_' and '-'.")
    parent = find_run(config.name, runs_dir)
    if (runs_dir / new).exists():
        raise UserError(f"A run '{new}' exists already", str(runs_dir / new), "Choose another name for --fork.")
    step = _newest_step(parent)
    if step is None:
        raise UserError(f"The run '{parent.name}' has no checkpoint to fork from", str(parent.path))
    return config.model_copy(
        update={"name": new, "init": InitConfig(source=f"{parent.path.absolute()}@{step}", state="all")}
    )


def _after_branch(prepared: Prepared, directory: RunDirectory) -> Prepared:
    """Set `data.consumed` of a branch, so that it skips the samples that its parent run has consumed.

    A branch is a run with `init.state: all`. If the run has started before, the recorded value is kept.
    """
    config = prepared.config
    if config.init.source is None or config.init.state != "all" or config.data.consumed is not None:
        return prepared
    if directory.exists():
        found = load_config(directory.config).data.consumed
    else:
        source = resolve_source(config.init.source, directory.path.parent)
        found = consumed(prepared, source) if isinstance(source, CheckpointSource) else None
    data = config.data.model_copy(update={"consumed": found})
    return replace(prepared, config=config.model_copy(update={"data": data}))


def _fix_source(config: RunConfig, directory: RunDirectory) -> RunConfig:
    """Replace `init.source` by the full path and step of its checkpoint, and set `init.hash` to its content hash.

    If the run has started before, the recorded values are kept, because the source may have newer checkpoints by now,
    or may be gone.
    """
    init, runs_dir = config.init, directory.path.parent
    if init.source is None or init.hash is not None:
        return config
    if directory.exists():
        begun = load_config(directory.config).init
        name, step = split_run_step(init.source.removesuffix("@best"))
        run, begun_step = split_run_step(begun.source or "")
        if run in (str((runs_dir / name).absolute()), str(Path(name).absolute())) and step in (None, begun_step):
            return config.model_copy(update={"init": begun.model_copy(update={"state": init.state})})
    source = resolve_source(init.source, runs_dir)
    update = {"source": source.name, "hash": source.content()}
    return config.model_copy(update={"init": init.model_copy(update=update)})
