"""What is checked of a run before anything is started: its config, its data, its directory and its past."""

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
    """A run that passed every check which needs no hardware: what `train` and the driver of a cluster's job start."""

    prepared: Prepared
    directory: RunDirectory
    newest: int | None
    """Step of its newest checkpoint, where it has one."""
    finished: bool
    """Whether nothing is left to do."""
    back_to: int | None = None
    """The step whose checkpoint it goes back to; what came after it is set aside."""

    def with_job(self, **update: Any) -> CheckedRun:
        """The same run with other keys in `job`."""
        config = self.prepared.config
        job = config.job.model_copy(update=update)
        return replace(self, prepared=replace(self.prepared, config=config.model_copy(update={"job": job})))

    @property
    def environment(self) -> dict[str, str]:
        """How the ranks find the user's own code."""
        return plugin_environment()

    @contextlib.contextmanager
    def held(self) -> Iterator[Lease]:
        """Hold the run's lease, with its record written and what a killed save left swept away.

        Raises:
            UserError: Someone else holds it.
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
    """Check a run against its data, its directory and its past; nothing is written and no process started.

    Args:
        fork: Name of a new run that begins where the newest checkpoint of `config.name` stands.
        step: Go back to the checkpoint of this step.

    Raises:
        UserError: Anything that is wrong.
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
            f"{directory.path} holds files and is not a run",
            fix="Choose another --name or --runs-dir, or move them away.",
        )
    return CheckedRun(prepared, directory, newest, finished, step)


def check_when_free(
    config: RunConfig, runs_dir: Path, *, fork: str | None = None, step: int | None = None, say: Callable[[str], None]
) -> CheckedRun:
    """`check`, and wait where another machine's launcher may be dead (see `bigtrain.jobs.takeover`).

    Raises:
        UserError: Anything that is wrong; another machine's launcher lives.
    """
    run = check(config, runs_dir, fork=fork, step=step)
    if not run.finished and outlast(run.directory, say):
        # It may have saved the run, or finished it, since.
        run = check(config, runs_dir, fork=fork, step=step)
    return run


def _check_plugin(prepared: Prepared) -> None:
    """What `bigtrain config validate` checks: the user's code is new, and loads torch in any case."""
    from bigtrain.models.check import check_model

    config = prepared.config
    check_model(config.model, prepared.outputs, config.engine.deterministic == "across_layouts")


def _check_source(prepared: Prepared, directory: RunDirectory) -> None:
    """Refuse a source that the run cannot begin with."""
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
            f"The run would begin after step {source.step}, and its duration ends at {prepared.total_steps}",
            f"init.source {init.source}",
            "Give a longer duration, for example duration='2000 steps'.",
        )


def _check_duration(directory: RunDirectory, prepared: Prepared) -> None:
    """A longer duration may follow only where the schedule's past does not depend on its end."""
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
            f"step {changed}, which is done, would have been another",
            str(directory.path),
            "Fork from a checkpoint before the decay: --fork NEW.",
        )
    if prepared.total_steps < newest:
        raise UserError(
            f"The run '{directory.name}' is at step {newest}, past the new duration of {prepared.total_steps} steps",
            str(directory.path),
        )


def _newest_step(directory: RunDirectory) -> int | None:
    """Step of the newest checkpoint that looks complete, by its manifest and its files' sizes."""
    for checkpoint in reversed(commit.list_checkpoints(directory.checkpoints)):
        if not commit.verify(checkpoint.path, hashes=False):
            return checkpoint.step
    return None


def _check_checkpoint(directory: RunDirectory, step: int) -> None:
    """Refuse to go on from a checkpoint that another run saved."""
    found = commit.find_checkpoint(directory.checkpoints, step)
    assert found is not None
    directory.check_checkpoint(step, read_manifest(found.path).identity)


def _check_step(directory: RunDirectory, step: int) -> None:
    """Refuse to go back to a step that has no sound checkpoint."""
    steps = [checkpoint.step for checkpoint in commit.list_checkpoints(directory.checkpoints)]
    if step not in steps:
        known = f"It has those of {', '.join(map(str, steps))}." if steps else "It has none yet."
        raise UserError(f"The run '{directory.name}' has no checkpoint of step {step}", str(directory.path), known)
    if not _is_sound(directory, step):
        raise UserError(f"The checkpoint of step {step} is damaged", str(directory.path), "See `checkpoint verify`.")


def _set_aside(directory: RunDirectory, step: int) -> None:
    """Move checkpoints of later steps out of the way, into a directory of their own: a person may want them back."""
    later = [found for found in commit.list_checkpoints(directory.checkpoints) if found.step > step]
    if not later:
        return
    aside = directory.path / f"checkpoints_after_{step}" / time.strftime("%Y%m%d-%H%M%S")
    aside.mkdir(parents=True)
    # From the newest on: a kill in between leaves a run that goes back less far.
    for checkpoint in reversed(later):
        checkpoint.path.rename(aside / checkpoint.path.name)
    commit.rewind(directory.checkpoints, step)
    directory.event("resumed", step=step, cause=f"asked to go back; later checkpoints are in {aside}")


def _is_sound(directory: RunDirectory, step: int) -> bool:
    """Whether every byte of the checkpoint of `step` is as its manifest says."""
    found = commit.find_checkpoint(directory.checkpoints, step)
    return found is not None and not commit.verify(found.path)


def _is_over(directory: RunDirectory, step: int) -> bool:
    """Whether a run whose last checkpoint is that of `step` also came to its end.

    One that was killed in between starts once more, for no step: what its tracker had not written is sent again.
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
    """Let a branch begin after what the run before has consumed; a run that has begun keeps what it began after."""
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
    """Write out which checkpoint `init.source` means, by place and by content.

    A run that has begun keeps its own: by now its source may have newer checkpoints, or be gone.
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
