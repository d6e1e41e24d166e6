"""The working directory of a submitted script: the directory it was submitted from, or a copy in the run directory.

If every node sees the same script at the client's path, the script is called there, in the client's working directory,
as torchrun would. Otherwise the shipped files are unpacked to `work` in the run directory, which all nodes share.
Files that the script writes there are kept for later submissions.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Final

from bigtrain.jobs.cluster.package import WORK_NAME, Script
from bigtrain.jobs.scripts.call import ScriptCall
from bigtrain.run import RunDirectory

WORK: Final = "work"
"""Directory in a script's run directory with the shipped files and the files that the script writes."""
ANSWER_S: Final = 60.0


def sees(directory: str, file: str, sha256: str | None) -> bool:
    """Whether this machine sees a directory and, unless `sha256` is None, a file in it with this hash."""
    if not os.path.isdir(directory):
        return False
    if sha256 is None:
        return True
    try:
        return hashlib.sha256(Path(directory, file).read_bytes()).hexdigest() == sha256
    except OSError:
        return False


def place(script: Script, directory: RunDirectory) -> tuple[ScriptCall, bool]:
    """Choose the working directory of a script, and unpack the shipped files if needed. Ray must be connected.

    Returns:
        How the nodes call the script, and whether its working directory is the client's.
    """
    call = script.call
    assert call.directory is not None  # The client sets it.
    if sees(call.directory, call.file, script.sha256) and _all_see(call.directory, call.file, script.sha256):
        return call, True
    work = directory.path / WORK
    work.mkdir(parents=True, exist_ok=True)
    if Path(WORK_NAME).exists():
        with tarfile.open(WORK_NAME) as archive:
            # bigtrain made this archive of the client's files, so its links can be trusted.
            archive.extractall(work, filter="tar")
    file = call.file if script.sha256 is None else str(work / script.name)
    return replace(call, file=file, directory=str(work)), False


def _all_see(directory: str, file: str, sha256: str | None) -> bool:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(sees)
    here = ray.get_runtime_context().get_node_id()
    asked = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            directory, file, sha256
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here
    ]
    answered, silent = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
    if silent:
        return False
    try:
        return all(ray.get(answered))
    except ray.exceptions.RayError:
        return False
