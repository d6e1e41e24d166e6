"""`bigtrain.submit` against a real cluster, as the API's README shows it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from bigtrain.jobs.cluster.local import ClusterRecord
from tests.api.test_readme import example

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def test_a_run_is_submitted_followed_and_resumed_from_python(
    cluster: ClusterRecord, write_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move(write_config(name="first", job={"procs_per_node": 1}), tmp_path / "first.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", cluster.token_file)
    code = example("bigtrain.submit").replace("http://127.0.0.1:8265", cluster.address)
    found: dict[str, Any] = {}
    exec(code, found)
    run = found["run"]
    status = run.status()
    assert (status["state"], status["step"], status["nodes"]) == ("finished", 8, 2)
    assert [event["event"] for event in run.events()][-1] == "finished"
    assert (tmp_path / "runs" / "first" / "checkpoints").is_dir()
    again = found["bigtrain"].submit("first.yaml", {"job.nodes": 2, "duration": "12 steps"}, address=cluster.address)
    assert again.wait(timeout_s=600).status()["step"] == 12
