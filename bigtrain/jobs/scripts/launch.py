"""Launching a user's script, on a cluster or on this machine: its `job` section, record, lease and ranks."""

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
    """The sections that can be set for a script."""

    job: JobConfig = JobConfig()


def job_config(overrides: Iterable[str], nodes: int | None = None, procs_per_node: int | None = None) -> JobConfig:
    """Build the `job` section of a script from command-line overrides.

    Args:
        overrides: Overrides of the form `job.KEY=VALUE`.
        nodes: If not None, the value of `job.nodes`.
        procs_per_node: If not None, the value of `job.procs_per_node`.

    Raises:
        UserError: An override names an unknown key or has an invalid value.
    """
    document = load.from_overrides(overrides)
    for key, value in (("nodes", nodes), ("procs_per_node", procs_per_node)):
        if value is not None:
            document.override(("job", key), value)
    return load.build(_Settings, document).job


def script_launch(call: ScriptCall, job: JobConfig, procs: int) -> Launch:
    """The `Launch` of a script, with `procs` ranks on each node."""
    # Like torchrun, set one thread if several ranks share a node, unless the user has set the variable.
    defaults = {"OMP_NUM_THREADS": "1"} if procs > 1 else {}
    return Launch(
        RANK_MODULE,
        # Shown in the process list only; the rank reads the call from its environment.
        [call.file, *call.arguments],
        procs,
        job.limits.by_phase(),
        exit_grace_s=job.script.exit,
        stop_grace_s=job.script.stop,
        reports_steps=False,
        defaults=defaults,
    )


def script_environment(call: ScriptCall, directory: RunDirectory, job: JobConfig) -> dict[str, str]:
    """The environment variables that tell each rank's process how to call the script."""
    known = replace(
        call,
        run_name=directory.name,
        first_attempt=next_attempt(directory.path),
        max_restarts=job.max_failures,
    )
    return {variables.SCRIPT: known.dump()}


def check_directory(directory: RunDirectory, script: str) -> None:
    """Refuse a run directory that does not belong to this script.

    Args:
        directory: The run directory.
        script: The script's name in the run's record.

    Raises:
        UserError: The directory holds other files, another run or another script.
    """
    if directory.is_foreign():
        raise UserError(
            f"{directory.path} holds files, but is not a run",
            fix="Choose another --name or --runs-dir, or move them away.",
        )
    if directory.exists() and directory.recipe() != {"script": script}:
        raise UserError(
            f"'{directory.name}' is a run of another script, or of a config",
            str(directory.path),
            "Choose another --name.",
        )


@contextlib.contextmanager
def held(directory: RunDirectory, script: str) -> Iterator[Lease]:
    """Hold the lease of a script's run directory. On entry, the run's record is written if it does not exist.

    Raises:
        UserError: Another process holds the lease.
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
    """The error for `bigtrain resume` of a script; a script cannot be resumed, as its arguments are not recorded."""
    return UserError(
        f"'{name}' is a script of your own, which `resume` cannot start",
        str(where),
        "Start it again with its arguments, as you did before; it loads its own checkpoint.",
    )
