"""The head of a cluster is lost, and with it the driver: the same name goes on elsewhere."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from bigtrain.jobs.cluster import isolation
from bigtrain.jobs.cluster.local import ClusterRecord, raise_local, take_down
from bigtrain.storage import read_lines
from tests.jobs.cluster.conftest import Client, marked, on_shared, wait_for_step, wait_until_gone

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

STEPS = {
    "duration": "200 steps", "checkpoint": {"every": "20 steps"}, "evaluation": {"every": "100 steps", "batches": 2},
}  # fmt: skip
SIX = {"size": 6}


def test_a_killed_head_ends_the_job_and_the_same_name_resumes(
    short_directory: Path, shared: Path, tmp_path: Path, write_config: Any, result: Any, on_one_machine: Any
) -> None:
    if (why := isolation.obstacle()) is not None:
        pytest.skip(f"namespaces are forbidden here: {why}")
    job = {"nodes": 3, "procs_per_node": 2}
    config = write_config(name="headless", job=job, batch=SIX, **STEPS, **on_shared(shared))
    directory, runs = short_directory / "head", shared / "runs"

    def raised() -> tuple[ClusterRecord, Client]:
        record = raise_local(
            directory, nodes=3, procs_per_node=2, isolated=True, shared=[shared], say=lambda line: None
        )
        return record, Client(record.address, Path(record.token_file), tmp_path)

    record, client = raised()
    try:
        client.submit(config, runs)
        wait_for_step(runs / "headless", 6)
        assert record.nodes[0].pid is not None
        os.kill(record.nodes[0].pid, signal.SIGKILL)
        # The other two nodes live on; what ran there ends by itself.
        wait_until_gone(runs / "headless")
        assert marked(record.mark)
    finally:
        take_down(directory)

    record, client = raised()
    try:
        done = client("submit", config, "--runs-dir", runs, "--wait", "--json")
        assert done.returncode == 0, done.stderr
    finally:
        take_down(directory)
    assert marked(record.mark) == []
    assert result(runs / "headless") == on_one_machine(6, batch=SIX, **STEPS)
    rows = [row["step"] for row in read_lines(runs / "headless" / "metrics.jsonl")]
    assert rows == list(range(1, 201)), "a step is missing, or is there twice"
