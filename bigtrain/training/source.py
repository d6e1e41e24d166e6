"""`init.source`: another run's checkpoint as the state before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bigtrain import storage
from bigtrain.checkpoint import commit
from bigtrain.config import UserError
from bigtrain.run import RunDirectory, find_run, split_run_step


@dataclass(frozen=True)
class Source:
    """One checkpoint of one run."""

    run: Path
    step: int
    hash: str
    """Hash of its manifest, which holds the hashes of all its files."""

    @property
    def checkpoints(self) -> Path:
        """The directory of the run's checkpoints."""
        return RunDirectory(self.run).checkpoints


def resolve_source(text: str, runs_dir: Path) -> Source:
    """The checkpoint that RUN@STEP or RUN names, or DIRECTORY@STEP.

    Raises:
        UserError: No such run, or no such step.
    """
    name, step = split_run_step(text)
    run = _run(name, runs_dir)
    found = commit.list_checkpoints(run.checkpoints)
    steps = [checkpoint.step for checkpoint in found]
    if not steps:
        raise UserError(f"init.source: the run '{name}' has no checkpoint", str(run.path))
    if step is None:
        step = max(steps)
    if step not in steps:
        raise UserError(
            f"init.source: the run '{name}' has no checkpoint of step {step}",
            str(run.checkpoints),
            f"It has {', '.join(map(str, steps))}.",
        )
    path = next(checkpoint.path for checkpoint in found if checkpoint.step == step)
    return Source(run.path.absolute(), step, storage.hash_file(path / "manifest.json"))


def _run(name: str, runs_dir: Path) -> RunDirectory:
    """A run, or a directory of checkpoints that no run has made, as `checkpoint import` writes it."""
    alone = RunDirectory(Path(name))
    return alone if alone.checkpoints.is_dir() else find_run(name, runs_dir)
