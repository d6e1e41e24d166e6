"""Functions that run the controller in the caller's process, with ranks on the nodes of a placer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.jobs.controller import Controller, EventWriter
from bigtrain.jobs.generation import EXIT_GRACE_S, Launch
from bigtrain.jobs.placing import PlacementRequest, Placer
from bigtrain.run import names
from bigtrain.streams import enduring

if TYPE_CHECKING:
    from bigtrain.jobs.config import JobConfig


def say_on_stderr(line: str) -> None:
    """Print a line to stderr, so that it does not mix with results on stdout."""
    print(line, file=enduring(sys.stderr), flush=True)


def run_controlled(
    run_dir: Path,
    placer: Placer,
    *,
    job: JobConfig,
    event: EventWriter,
    nproc: int = 1,
    launch: Launch | None = None,
    rank_module: str = "bigtrain.training.rank",
    arguments: list[str] | None = None,
    environment: dict[str, str] | None = None,
    run_name: str | None = None,
    say: Callable[[str], None] = say_on_stderr,
    progress: Callable[[], int] | None = None,
    first_attempt: int | None = None,
    exit_grace_s: float = EXIT_GRACE_S,
    around: Callable[[Controller], AbstractContextManager[object]] = nullcontext,
    run: Callable[[Controller], int] = Controller.run,
) -> int:
    """Run `nproc` ranks of `rank_module`, or those of `launch`, on each node of `placer`, until the run ends.

    The ranks inherit the working directory, the interpreter and the environment of the caller.

    Args:
        run_dir: The run directory; the ranks write to logs/attempt_K/rank_R.log.
        placer: Provides the nodes.
        job: The `job` section, with the retry budget and the limits.
        event: Writes events (see `Controller`).
        nproc: Number of ranks on each node.
        launch: What the ranks run; replaces `nproc`, `rank_module`, `arguments` and `exit_grace_s`.
        rank_module: Module that each rank runs as `python -m`, with `arguments`.
        arguments: Command-line arguments of each rank.
        environment: Additional variables for the ranks. They are sent unencrypted, so they must not hold secrets.
        run_name: The run's name in printed lines; by default the run directory's name.
        say: Prints one line for the user.
        progress: Returns the step of the newest checkpoint; by default the step that checkpoints/LATEST names.
        first_attempt: Number of the first attempt; by default the first number without logs.
        exit_grace_s: How long ranks may continue after the first rank exited, in seconds.
        around: Returns a context manager that is entered while the controller runs.
        run: Runs the controller; see `Placer.run`.

    Returns:
        0 finished, 1 failed, 2 user error, 75 stopped and resumable.
    """
    run_dir = run_dir.absolute()
    controller = Controller(
        run_dir,
        placer,
        job,
        run_name or run_dir.name,
        event,
        say=say,
        launch=launch or Launch(rank_module, list(arguments or ()), nproc, job.limits.by_phase(), exit_grace_s),
        environment=environment,
        progress=progress,
        first_attempt=first_attempt,
    )
    with around(controller):
        return run(controller)


def launch_here(
    run_dir: Path,
    *,
    job: JobConfig,
    event: EventWriter,
    nproc: int = 1,
    sizes: Sequence[int] | None = None,
    say: Callable[[str], None] = say_on_stderr,
    kept: Placer | None = None,
    **options: Any,
) -> int:
    """Run a job's ranks on the nodes of `job.placer`: see `placer_kinds.kind_of` for the default.

    Args:
        run_dir: The run directory.
        job: The run's `job` section.
        event: Writes events (see `Controller`).
        nproc: Ranks on each node.
        sizes: Numbers of nodes that the layout allows; by default all from `min_nodes` to `nodes`.
        say: Prints one line for the user.
        kept: A placer that keeps its agents after the run, for the next one; by default a new placer is built.
        options: See `run_controlled`.
    """
    from bigtrain.jobs.placer_kinds import kind_of  # imports pydantic

    run_dir = run_dir.absolute()
    kind = kind_of(job)
    legal = sizes or range(job.least_nodes, job.nodes + 1)
    placer = kept or kind.of(PlacementRequest(job, run_dir / names.LOGS, say, nproc, legal, on_event=event))

    def run(controller: Controller) -> int:
        return kind.run(controller, run_dir.name, say)

    return run_controlled(run_dir, placer, job=job, event=event, nproc=nproc, say=say, run=run, **options)
