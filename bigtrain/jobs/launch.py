"""A gang and its controller in the caller's process: on this machine, or on those that a placer gives."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bigtrain.jobs.controller import Controller, EventWriter
from bigtrain.jobs.generation import EXIT_GRACE_S, Launch
from bigtrain.jobs.local import LocalPlacer
from bigtrain.jobs.placer import Placer
from bigtrain.jobs.protocol import SILENCE_S

if TYPE_CHECKING:
    from bigtrain.jobs.config import JobConfig


def say_on_stderr(line: str) -> None:
    """Print a line where it does not mix with results."""
    print(line, file=sys.stderr, flush=True)


def launch_local(
    run_dir: Path,
    *,
    nproc: int,
    job: JobConfig,
    event: EventWriter,
    rank_module: str = "bigtrain.training.rank",
    arguments: list[str] | None = None,
    environment: dict[str, str] | None = None,
    run_name: str | None = None,
    say: Callable[[str], None] = say_on_stderr,
    progress: Callable[[], int] | None = None,
    first_attempt: int | None = None,
    silence_s: float = SILENCE_S,
    exit_grace_s: float = EXIT_GRACE_S,
) -> int:
    """Run `nproc` ranks of `rank_module` on this machine until the run is over.

    The working directory, the interpreter and the environment of the ranks are the caller's.

    Args:
        run_dir: The run directory; logs go to logs/attempt_K/rank_R.log and logs/agent.log.
        nproc: Number of ranks; `bigtrain.jobs.local.local_procs(job)` says how many the config asks for.
        job: Budget and limits.
        event: Writes events (see `Controller`).
        rank_module: Module that each rank runs as `python -m`, with `arguments`.
        environment: More variables for the ranks. They travel over the loopback connection: no secrets.
        run_name: For what people read; by default the run directory's name.
        progress: Step of the newest checkpoint; by default what checkpoints/LATEST names.
        silence_s: How long agent and controller wait for a word from each other.
        exit_grace_s: How long ranks may go on after the first one has left.

    Returns:
        0 finished, 1 failed, 2 the user's mistake, 75 stopped and resumable.
    """
    return run_controlled(
        run_dir,
        LocalPlacer(run_dir.absolute() / "logs" / "agent.log", silence_s),
        nproc=nproc,
        job=job,
        event=event,
        rank_module=rank_module,
        arguments=arguments,
        environment=environment,
        run_name=run_name,
        say=say,
        progress=progress,
        first_attempt=first_attempt,
        exit_grace_s=exit_grace_s,
    )


def run_controlled(
    run_dir: Path,
    placer: Placer,
    *,
    nproc: int,
    job: JobConfig,
    event: EventWriter,
    rank_module: str = "bigtrain.training.rank",
    arguments: list[str] | None = None,
    environment: dict[str, str] | None = None,
    run_name: str | None = None,
    say: Callable[[str], None] = say_on_stderr,
    progress: Callable[[], int] | None = None,
    first_attempt: int | None = None,
    exit_grace_s: float = EXIT_GRACE_S,
) -> int:
    """Run a gang on whatever machines `placer` gives, from this process, until the run is over.

    Args:
        placer: Gives the machines, one agent on each.
        nproc: Number of ranks on each machine.

    The other arguments, and what is returned, are those of `launch_local`.
    """
    run_dir = run_dir.absolute()
    controller = Controller(
        run_dir,
        placer,
        job,
        run_name or run_dir.name,
        event,
        say=say,
        launch=Launch(rank_module, list(arguments or ()), nproc, job.limits.by_phase(), exit_grace_s),
        environment=environment,
        progress=progress,
        first_attempt=first_attempt,
    )
    return controller.run()
