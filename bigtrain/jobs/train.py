"""`bigtrain train`: check everything, take the run's lease, start its ranks, and watch them until the run ends."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from bigtrain import variables
from bigtrain.config import UserError
from bigtrain.hardware.this_machine import this_machine
from bigtrain.jobs.announce import say_start
from bigtrain.jobs.check import CheckedRun, check_when_free
from bigtrain.jobs.ending import RunRecord, tell_end
from bigtrain.jobs.launch import launch_here
from bigtrain.jobs.placer_kinds import kind_of
from bigtrain.planning.check import check_memory
from bigtrain.run import ExitCode, Lease, RunConfig
from bigtrain.streams import enduring
from bigtrain.tracking.live import LiveDisplay


def train(
    config: RunConfig,
    runs_dir: Path,
    *,
    procs: int | None = None,
    fork: str | None = None,
    step: int | None = None,
    stream: TextIO | None = None,
    launch: Callable[..., int] | None = None,
    dry_run: bool = False,
    rehearse: bool = False,
) -> int:
    """Train a run to its end on this machine or on the nodes of this Slurm job. A run that exists is resumed.

    Args:
        config: The run's config.
        runs_dir: The directory that holds all run directories.
        procs: Processes on each node; None: the value of `job.procs_per_node`.
        fork: Name of a new run that starts from the newest checkpoint of the run `config.name`.
        step: The run goes back to the checkpoint of this step.
        stream: Receives the progress; None: stderr.
        launch: A function that is called in place of `launch_here`, with the same arguments.
        dry_run: Check everything, print what would be trained, and start nothing.
        rehearse: Check everything, run the ranks' code on fake tensors (`planning.rehearsal`), and start nothing.

    Returns:
        A value of ExitCode.

    Raises:
        UserError: A check before the start of the first process failed.
    """
    stream = enduring(stream or sys.stderr)
    run = check_when_free(config, runs_dir, fork=fork, step=step, say=lambda line: print(line, file=stream, flush=True))
    if run.finished:
        print(f"The run '{run.directory.name}' is finished: {run.newest} steps. Nothing to do.", file=stream)
        return ExitCode.FINISHED
    count = _processes(run.prepared.config, procs)
    check_memory(run.prepared.config, run.prepared.outputs, count, this_machine().device_name)
    if rehearse:
        return _rehearse(run, count, stream)
    if procs is not None:
        # Recorded in the config, so that `bigtrain train RUN/config.yaml` uses the same number.
        run = run.with_job(procs_per_node=procs)
    if dry_run:
        say_start(run, count, stream)
        return ExitCode.FINISHED
    with run.held() as lease:
        say_start(run, count, stream)
        code = _launch(run, lease, count, stream, launch or launch_here)
    tell_end(run.directory, run.prepared.config, code, stream)
    return code


def _rehearse(run: CheckedRun, count: int, stream: TextIO) -> int:
    """Rehearse the run and print the result; returns FAILED if the rehearsal finds a fault, otherwise FINISHED."""
    from bigtrain.planning.rehearsal import rehearsal_text, rehearse  # imports torch, which takes seconds

    document = rehearse(run.prepared.config, run.prepared.outputs, count)
    print(rehearsal_text(document), file=stream)
    return ExitCode.FAILED if document["faults"] else ExitCode.FINISHED


def _launch(run: CheckedRun, lease: Lease, count: int, stream: TextIO, launch: Callable[..., int]) -> int:
    directory, job = run.directory, run.prepared.config.job
    procs = count // job.nodes
    display = LiveDisplay(directory.path, run.prepared.total_steps, stream)
    display.start()
    try:
        with RunRecord(directory, machines=job.nodes) as record:
            code = launch(
                directory.path,
                nproc=procs,
                sizes=node_sizes(run.prepared.config, procs),
                job=job,
                environment={variables.LEASE: str(lease.number), **run.environment},
                event=record.event,
                say=display.say,
            )
    finally:
        display.stop()
    if code == ExitCode.FINISHED:
        print(f"{directory.name}: finished; see `bigtrain report {directory.name}`", file=stream)
    return code


def _processes(config: RunConfig, procs: int | None) -> int:
    configured = kind_of(config.job).procs(config.job)
    if procs is not None and procs < 1:
        raise UserError(f"--nproc is {procs}: at least one process is needed")
    count = config.job.nodes * (procs if procs is not None else configured)
    try:
        config.layout.mesh(count)
    except ValueError as error:
        raise UserError(str(error), fix="Change --nproc or the layout.") from None
    return count


def node_sizes(config: RunConfig, procs: int) -> list[int]:
    """Numbers of nodes that the layout allows, from `job.least_nodes` to `job.nodes`, in ascending order.

    Args:
        config: The run's config.
        procs: Ranks on each node.
    """
    found = []
    for nodes in range(config.job.least_nodes, config.job.nodes + 1):
        with contextlib.suppress(ValueError):
            config.layout.mesh(nodes * procs)
            found.append(nodes)
    return found
