"""The controller in the caller's process: with ranks on this machine, in a Slurm job, or where a placer says."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.jobs.controller import Controller, EventWriter
from bigtrain.jobs.generation import EXIT_GRACE_S, Launch
from bigtrain.jobs.placers import slurm
from bigtrain.jobs.placers.local import LocalPlacer
from bigtrain.jobs.placers.placer import Placer
from bigtrain.jobs.placers.slurm import RequeueOnSignal, SlurmPlacer
from bigtrain.jobs.protocol import SILENCE_S
from bigtrain.run import ExitCode, names

if TYPE_CHECKING:
    from bigtrain.jobs.config import JobConfig


def say_on_stderr(line: str) -> None:
    """Print a line where it does not mix with results."""
    print(line, file=sys.stderr, flush=True)


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
        return controller.run()


def launch_local(run_dir: Path, *, silence_s: float = SILENCE_S, **options: Any) -> int:
    """Run all ranks on this machine; logs/agent.log holds the agent's own words.

    Args:
        run_dir: The run directory.
        silence_s: How long agent and controller wait for a word from each other.
        options: See `run_controlled`.
    """
    run_dir = run_dir.absolute()
    return run_controlled(run_dir, LocalPlacer(run_dir / names.LOGS / "agent.log", silence_s), **options)


def launch_here(
    run_dir: Path,
    *,
    job: JobConfig,
    sizes: Sequence[int] | None = None,
    say: Callable[[str], None] = say_on_stderr,
    around: Callable[[Controller], AbstractContextManager[object]] = nullcontext,
    kept: Placer | None = None,
    **options: Any,
) -> int:
    """Run a job's ranks where this command was started: on this machine, or on the nodes of its Slurm job.

    In a Slurm job the signal before its time limit makes the run save itself and the job go back into the queue.

    Args:
        run_dir: The run directory.
        job: Its section; `job.nodes` above one needs a Slurm job.
        sizes: Numbers of nodes at which the run can be laid out; by default all from `min_nodes` to `nodes`.
        kept: Gives an agent of this machine that may outlast the run; by default the run has one of its own.
        options: See `run_controlled`.
    """
    run_dir = run_dir.absolute()
    log_path = run_dir / names.LOGS / "agent.log"
    placer: Placer = kept or LocalPlacer(log_path)
    if not slurm.in_allocation():
        return run_controlled(run_dir, placer, job=job, say=say, around=around, **options)
    if job.nodes > 1:
        placer = SlurmPlacer(sizes or range(job.least_nodes, job.nodes + 1), log_path, say=say)
    requeue = RequeueOnSignal()

    @contextmanager
    def listening(controller: Controller) -> Iterator[None]:
        with around(controller), requeue.listening(controller):
            yield

    code = run_controlled(run_dir, placer, job=job, say=say, around=listening, **options)
    if requeue.asked and code == ExitCode.STOPPED:
        slurm.requeue_and_say(run_dir.name, say)
    return code
