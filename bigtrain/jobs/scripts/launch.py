"""What the launchers of a script share, on a cluster and on this machine: its record, its lease and its ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from bigtrain import storage, variables
from bigtrain.config import Section, UserError, load
from bigtrain.jobs.config import JobConfig
from bigtrain.jobs.controller import next_attempt
from bigtrain.jobs.generation import Launch
from bigtrain.jobs.scripts.call import ScriptCall
from bigtrain.run import FORMAT_VERSION, Lease, RunDirectory

RANK_MODULE: Final = "bigtrain.jobs.scripts.rank"


class _Settings(Section):
    """What can be set for a script."""

    job: JobConfig = JobConfig()


def job_config(overrides: Iterable[str], nodes: int | None = None, procs_per_node: int | None = None) -> JobConfig:
    """The `job` section of a script, from `job.KEY=VALUE` words of the command line.

    Args:
        nodes: Sets `job.nodes`.
        procs_per_node: Sets `job.procs_per_node`.

    Raises:
        UserError: A word that is no such key, or a bad value.
    """
    document = load.from_overrides(overrides)
    for key, value in (("nodes", nodes), ("procs_per_node", procs_per_node)):
        if value is not None:
            document.override(("job", key), value)
    return load.build(_Settings, document).job


def script_launch(call: ScriptCall, job: JobConfig, procs: int) -> Launch:
    """How the ranks of a script are started, `procs` on each node."""
    # torchrun sets one thread where several ranks share a node, unless the user has chosen.
    defaults = {"OMP_NUM_THREADS": "1"} if procs > 1 else {}
    return Launch(
        RANK_MODULE,
        # For those who look at the list of processes; what counts is in the call.
        [call.file, *call.arguments],
        procs,
        job.limits.by_phase(),
        exit_grace_s=job.script.exit,
        stop_grace_s=job.script.stop,
        reports_steps=False,
        defaults=defaults,
    )


def script_environment(call: ScriptCall, directory: RunDirectory, job: JobConfig) -> dict[str, str]:
    """The variables by which each rank's process knows what to run."""
    known = replace(
        call,
        run_name=directory.name,
        first_attempt=next_attempt(directory.path),
        max_restarts=job.max_failures,
    )
    return {variables.SCRIPT: known.dump()}


def check_directory(directory: RunDirectory, script: str) -> None:
    """Refuse a directory that holds something else than runs of this script.

    Args:
        script: What the record names it by.

    Raises:
        UserError: It does.
    """
    if directory.is_foreign():
        raise UserError(
            f"{directory.path} holds files and is not a run",
            fix="Choose another --name or --runs-dir, or move them away.",
        )
    if directory.exists() and directory.recipe() != {"script": script}:
        raise UserError(f"'{directory.name}' is another run", str(directory.path), "Choose another --name.")


@contextlib.contextmanager
def held(directory: RunDirectory, script: str) -> Iterator[Lease]:
    """Hold the lease of a script's directory, with its record written.

    Raises:
        UserError: Another process holds it.
    """
    lease = Lease.acquire(directory)
    try:
        lease.keep()
        if not directory.exists():
            record = {
                "format_version": FORMAT_VERSION,
                "name": directory.name,
                "identity": None,
                "what": {"script": script},
            }
            storage.write_json(directory.record, record)
        yield lease
    finally:
        lease.release()


def refuse_resume(name: str, where: Path | str) -> UserError:
    """The refusal to resume a script by its name: its arguments are not recorded."""
    return UserError(
        f"'{name}' is a script of your own, which `resume` cannot start",
        str(where),
        "Start it again with its arguments, as you did before; it loads its own checkpoint.",
    )
