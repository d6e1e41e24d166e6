"""What is refused before a request reaches the cluster, and by which message."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from bigtrain.config import UserError
from bigtrain.jobs.cluster.dashboard import Dashboard, check_address
from bigtrain.jobs.cluster.submission import check_capacity, check_fits, check_versions
from bigtrain.jobs.config import JobConfig
from bigtrain.run import load_config
from tests.jobs.cluster.conftest import Client

pytestmark = pytest.mark.timeout(900)

TOKEN = "0123456789abcdef" * 4


class Answers(http.server.BaseHTTPRequestHandler):
    """A dashboard of another cluster: one with another Ray, or with an autoscaler, cannot be raised here.

    Its answers have the form of Ray 2.60's.
    """

    answers: ClassVar[dict[str, Any]] = {}

    def do_GET(self) -> None:
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.send_error(403, "Forbidden")
            return
        answer = self.answers.get(self.path.partition("?")[0])
        if answer is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    path.chmod(0o600)
    return path


@pytest.fixture
def dashboard(token_file: Path) -> Iterator[Callable[[dict[str, Any]], Dashboard]]:
    """Makes a dashboard that gives the answers that a test sets."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def make(answers: dict[str, Any]) -> Dashboard:
        Answers.answers = answers
        return Dashboard(f"http://127.0.0.1:{server.server_port}", token_file)

    yield make
    server.shutdown()
    server.server_close()


def of_versions(ray: str, python: str) -> dict[str, Any]:
    return {
        "/api/version": {"version": "4", "ray_version": ray},
        "/api/v0/cluster_metadata": {"data": {"pythonVersion": python, "rayVersion": ray}},
    }


def of_nodes(resources: list[dict[str, float]], kinds: dict[str, str] | None = None) -> dict[str, Any]:
    nodes = [
        {
            "node_id": f"{i}",
            "node_ip": f"10.0.0.{i}",
            "state": "ALIVE",
            "resources_total": total,
            "labels": {"rack": "a"},
        }
        for i, total in enumerate(resources)
    ]
    mapping = {f"{i}": f"node_{i}" for i in range(len(nodes))} if kinds is None else kinds
    return {
        "/api/v0/nodes": {"data": {"result": {"result": nodes}}},
        "/api/cluster_status": {"data": {"clusterStatus": {"autoscalerReport": {"nodeTypeMapping": mapping}}}},
    }


def test_another_ray_or_python_is_refused_and_another_patch_is_not(dashboard: Any) -> None:
    local = {"ray": "2.60.0", "python": "3.11.7"}
    check_versions(dashboard(of_versions("2.60.1", "3.11.9")), local)
    with pytest.raises(UserError, match=r"Ray is 2.58.0 on the cluster and 2.60.0 here"):
        check_versions(dashboard(of_versions("2.58.0", "3.11.7")), local)
    with pytest.raises(UserError, match=r"Python is 3.12.1 on the cluster and 3.11.7 here"):
        check_versions(dashboard(of_versions("2.60.0", "3.12.1")), local)


def test_more_than_the_cluster_can_ever_have_is_refused(dashboard: Any) -> None:
    two = dashboard(of_nodes([{"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 4}, {"CPU": 2}]))
    assert check_capacity(two, JobConfig(nodes=2, procs_per_node=4)) is None
    with pytest.raises(UserError, match="2 of the cluster's nodes have 4 GPUs, but the job needs 3") as refused:
        check_capacity(two, JobConfig(nodes=3, procs_per_node=4))
    assert "10.0.0.0 with 4 GPU and 8 CPU" in str(refused.value)
    with pytest.raises(UserError, match="0 of the cluster's nodes have 8 GPUs"):
        check_capacity(two, JobConfig(nodes=1, procs_per_node=8))
    with pytest.raises(UserError, match=r"labels {'rack': 'b'}"):
        check_capacity(two, JobConfig(nodes=1, procs_per_node=1, labels={"rack": "b"}))
    waits = check_capacity(two, JobConfig(nodes=3, min_nodes=2, procs_per_node=4))
    assert waits is not None


LARGE = """
name: large
model: {arch: llama, layers: 400, width: 8192, heads: 64, context: 4096}
data: {train: shards}
batch: {size: 8}
duration: 10 steps
job: {nodes: 1, procs_per_node: 4}
"""


def test_what_cannot_fit_the_accelerators_is_refused_before_it_is_sent(dashboard: Any, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(LARGE)
    config = load_config(tmp_path / "run.yaml")
    with pytest.raises(UserError, match="H100 SXM has 75 GiB"):
        check_fits(dashboard(of_nodes([{"CPU": 8, "GPU": 4, "accelerator_type:H100": 1}])), config)
    check_fits(dashboard(of_nodes([{"CPU": 8}])), config)


def test_what_an_autoscaler_may_add_is_waited_for(dashboard: Any) -> None:
    growing = dashboard(of_nodes([{"CPU": 1}], {"0": "head-group"}))
    waits = check_capacity(growing, JobConfig(nodes=4, procs_per_node=8))
    assert waits is not None
    assert "but the job needs 4" in waits


def test_a_public_address_without_a_token_is_refused() -> None:
    with pytest.raises(UserError, match="anyone who can reach a Ray dashboard without a token can run code there"):
        check_address("http://203.0.113.9:8265", None)
    assert check_address("203.0.113.9", "token") == "http://203.0.113.9:8265"
    assert check_address("localhost:9", None) == "http://localhost:9"
    for wrong in ("ftp://host", "http://user@host", "http://host:port", "http://"):
        with pytest.raises(UserError, match="is not the address of a Ray dashboard"):
            check_address(wrong, "token")


def test_a_token_that_others_may_read_is_refused(token_file: Path) -> None:
    token_file.chmod(0o644)
    with pytest.raises(UserError, match="Others may read the token: its mode is 0644"):
        Dashboard("http://127.0.0.1:1", token_file)


def test_an_address_where_nobody_answers_is_one_clear_line(token_file: Path, write_config: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    done = Client(f"http://127.0.0.1:{port}", token_file, tmp_path)("submit", write_config())
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: No Ray dashboard answers at http://127.0.0.1:{port}: Connection refused\n")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_wrong_token_is_one_clear_line(cluster: Any, token_file: Path, write_config: Any, tmp_path: Path) -> None:
    done = Client(cluster.address, token_file, tmp_path)("submit", write_config())
    assert done.returncode == 2
    assert "does not accept this token" in done.stderr
    assert TOKEN not in done.stderr
    token_file.unlink()
    missing = Client(cluster.address, token_file, tmp_path)("status")
    assert missing.returncode == 2
    assert "The token cannot be read" in missing.stderr


@pytest.mark.slow
def test_a_job_that_fits_no_node_is_refused_by_a_real_cluster(client: Any, write_config: Any) -> None:
    done = client("submit", write_config(job={"nodes": 4, "procs_per_node": 2}), "--json")
    assert done.returncode == 2
    assert "The job can never run there: 3 of the cluster's nodes have 2 CPUs, but the job needs 4" in done.stdout
    fits = client.json("submit", write_config(job={"nodes": 3, "procs_per_node": 2}), "--dry-run")
    assert (fits["nodes"], fits["procs_per_node"], fits["waits_for"]) == (3, 2, None)


def test_an_unknown_run_names_the_nearest(client: Any) -> None:
    done = client("status", "nobody")
    assert done.returncode == 2
    assert "The cluster has no run 'nobody'" in done.stderr
