"""The controller in the caller's process, with ranks where a placer says."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.jobs.controller import Controller, EventWriter
from bigtrain.jobs.generation import EXIT_GRACE_S, Launch
from bigtrain.jobs.placing import PlacementRequest, Placer
from bigtrain.jobs.protocol import SILENCE_S
from bigtrain.run import names
from bigtrain.streams import enduring

if TYPE_CHECKING:
    from bigtrain.jobs.config import JobConfig


def say_on_stderr(line: str) -> None:
    """Print a line where it does not mix with results."""
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
    """Run `nproc` ranks of `rank_module`, or those of `launch`, on each node that `placer` gives, to the run's end.

    The working directory, the interpreter and the environment of the ranks are the caller's.

    Args:
        run_dir: The run directory; logs go to logs/attempt_K/rank_R.log.
        placer: Gives the machines.
        nproc: Number of ranks on each of them.
        job: Budget and limits.
        event: Writes events (see `Controller`).
        launch: What a rank is, in place of `nproc`, `rank_module`, `arguments` and `exit_grace_s`.
        rank_module: Module that each rank runs as `python -m`, with `arguments`.
        environment: More variables for the ranks. They travel over the agents' connections: no secrets.
        run_name: For what people read; by default the run directory's name.
        progress: Step of the newest checkpoint; by default what checkpoints/LATEST names.
        exit_grace_s: How long ranks may go on after the first one has left.
        around: Gives, for the controller, what to enter while it runs.
        run: Runs the controller; see `Placer.run`.

    Returns:
        0 finished, 1 failed, 2 the user's mistake, 75 stopped and resumable.
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


def launch_local(run_dir: Path, *, silence_s: float = SILENCE_S, **options: Any) -> int:
    """Run all ranks on this machine; logs/agent.log holds the agent's own words.

    Args:
        run_dir: The run directory.
        silence_s: How long agent and controller wait for a word from each other.
        options: See `run_controlled`.
    """
    run_dir = run_dir.absolute()
    from bigtrain.jobs.placers.local import LocalPlacer  # pydantic

    return run_controlled(run_dir, LocalPlacer(run_dir / names.LOGS / "agent.log", silence_s), **options)


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
    """Run a job's ranks on the machines that `job.placer` names: by default where this command was started.

    Args:
        run_dir: The run directory.
        job: Its section.
        nproc: Ranks on each node.
        sizes: Numbers of nodes at which the run can be laid out; by default all from `min_nodes` to `nodes`.
        kept: Gives agents that may outlast the run; by default the run has its own.
        options: See `run_controlled`.
    """
    from bigtrain.jobs.placer_kinds import kind_of  # pydantic

    run_dir = run_dir.absolute()
    kind = kind_of(job)
    legal = sizes or range(job.least_nodes, job.nodes + 1)
    placer = kept or kind.of(PlacementRequest(job, run_dir / names.LOGS, say, nproc, legal, on_event=event))

    def run(controller: Controller) -> int:
        return kind.run(controller, run_dir.name, say)

    return run_controlled(run_dir, placer, job=job, event=event, nproc=nproc, say=say, run=run, **options)
