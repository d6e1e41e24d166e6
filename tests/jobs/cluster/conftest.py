"""A real Ray cluster on this machine, raised once, and clients that see of it only the dashboard."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bigtrain import variables
from bigtrain.jobs.cluster.local import ClusterRecord, raise_local, take_down
from bigtrain.storage import hash_file, read_lines
from bigtrain.tracking.metrics import last_step

CLIENT_S = 800
GONE_S = 60.0
"""Far above the 10 s of silence after which an agent ends its ranks: a busy machine is no failure."""
HIDE = 'mount -t tmpfs tmpfs "$1" && shift && exec "$@"'


@dataclass
class Client:
    """Runs `bigtrain` as someone elsewhere would: with the address and the token of a cluster."""

    address: str
    token_file: Path
    cwd: Path
    prefix: list[str] = field(default_factory=list)

    def command(self, *arguments: object) -> list[str]:
        return [*self.prefix, sys.executable, "-m", "bigtrain.cli", *map(str, arguments)]

    @property
    def environment(self) -> dict[str, str]:
        known = {"BIGTRAIN_ADDRESS": self.address, "RAY_AUTH_TOKEN_PATH": str(self.token_file)}
        return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | known

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            self.command(*arguments), env=self.environment, cwd=self.cwd, capture_output=True, text=True,
            timeout=CLIENT_S, check=False,
        )  # fmt: skip

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Start a command whose output is read line by line."""
        return subprocess.Popen(
            self.command(*arguments), env=self.environment, cwd=self.cwd, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def json(self, *arguments: object) -> Any:
        """The object that a command prints."""
        done = self(*arguments, "--json")
        assert done.stdout, done.stderr
        return json.loads(done.stdout)

    def submit(self, config: Path, runs: Path) -> None:
        """Submit a run that is accepted."""
        done = self("submit", config, "--runs-dir", runs)
        assert done.returncode == 0, done.stderr

    def finish(self, name: str) -> None:
        """Wait until a run is finished."""
        deadline = time.monotonic() + CLIENT_S
        while (status := self.json("status", name))["state"] != "finished":
            assert time.monotonic() < deadline, status
            assert status["state"] != "failed", self("logs", name).stdout
            time.sleep(1)

    def wait_for(self, name: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first status of a run for which a condition holds."""
        deadline = time.monotonic() + CLIENT_S
        while True:
            status = self.json("status", name)
            assert time.monotonic() < deadline, status
            if "error" in status:  # It has not been submitted yet.
                time.sleep(0.5)
                continue
            if condition(status):
                return status
            assert status["state"] not in ("failed", "finished", "stopped"), (status, self("events", name).stdout)
            time.sleep(0.5)


def marked(mark: str) -> list[int]:
    """Living processes of a cluster."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if f"{variables.CLUSTER}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(int(pid))
        except OSError:
            continue
    return found


def driver_pid(mark: str, submission: str) -> int:
    """The process that drives a submission of a cluster."""
    for pid in marked(mark):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            names = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"bigtrain.jobs.cluster.driver" in words and f"BIGTRAIN_SUBMISSION={submission}".encode() in names:
            return pid
    raise AssertionError(f"{submission} has no driver")


def wait_for_step(run: Path, step: int) -> None:
    """Wait, as one who sees the run's directory, until a step is logged: a client hears of it too late to strike."""
    deadline = time.monotonic() + CLIENT_S
    while (last_step(run / "metrics.jsonl") or 0) < step:
        assert time.monotonic() < deadline, list(read_lines(run / "events.jsonl"))[-3:]
        time.sleep(0.01)


def wait_until_gone(run: Path) -> None:
    """Wait until no process carries a run in its environment; they have to end by themselves."""
    deadline = time.monotonic() + GONE_S
    while left := [pid for pid in filter(str.isdigit, os.listdir("/proc")) if _carries(pid, run)]:
        assert time.monotonic() < deadline, f"still alive: {left}"
        time.sleep(0.1)


def _carries(pid: str, run: Path) -> bool:
    try:
        return f"BIGTRAIN_RUN={run}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


@pytest.fixture(scope="session")
def short_directory() -> Iterator[Path]:
    """A place for clusters: Ray's sockets need short paths."""
    path = Path(tempfile.mkdtemp(prefix="bt-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def shared(short_directory: Path, text_shards: Path) -> Path:
    """The one directory that isolated nodes all see, with the shards in it."""
    path = short_directory / "shared"
    shutil.copytree(text_shards, path / "shards")
    return path


def on_shared(shared: Path) -> dict[str, Any]:
    """The data section of a run on isolated nodes."""
    return {"data": {"train": str(shared / "shards" / "train"), "validation": str(shared / "shards" / "validation")}}


@pytest.fixture(scope="session")
def cluster(short_directory: Path) -> Iterator[ClusterRecord]:
    """Three nodes of two CPUs, whose processes must all be gone at the end."""
    directory = short_directory / "cluster"
    record = raise_local(directory, nodes=3, procs_per_node=2, say=lambda line: None)
    yield record
    take_down(directory)
    assert marked(record.mark) == []
    assert not Path(record.temporary).exists()
    assert not directory.exists()


@pytest.fixture
def client(cluster: ClusterRecord, tmp_path: Path) -> Client:
    """A client of the cluster."""
    return Client(cluster.address, Path(cluster.token_file), tmp_path)


@pytest.fixture
def blind() -> Callable[[Client, Path], Client]:
    """Makes a client that cannot see a directory: it is empty in its own mount namespace."""
    probe = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"mount namespaces are forbidden here: {probe.stderr.strip()}")

    def make(client: Client, hidden: Path) -> Client:
        prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", HIDE, "sh", str(hidden)]
        return Client(client.address, client.token_file, client.cwd, prefix)

    return make


@dataclass(frozen=True)
class Result:
    """What a run has computed."""

    losses: list[tuple[int, float]]
    samples: list[dict[str, Any]]
    weights: dict[str, str]


def result_of(run: Path) -> Result:
    """Losses, consumed samples and the hashes of the newest checkpoint's files, but for its manifest."""
    losses = [(row["step"], row["loss"]) for row in read_lines(run / "metrics.jsonl")]
    newest = max(path for path in (run / "checkpoints").glob("step_*") if path.is_dir())
    shards = (path for path in sorted(newest.rglob("*")) if path.is_file() and path.name != "manifest.json")
    weights = {str(path.relative_to(newest)): hash_file(path) for path in shards}
    assert losses
    assert weights
    return Result(losses, list(read_lines(run / "samples.jsonl")), weights)


@pytest.fixture
def result() -> Callable[[Path], Result]:
    """Reads what a run has computed."""
    return result_of


@pytest.fixture
def on_one_machine(write_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Result]:
    """What `bigtrain train` computes from a config, with as many processes on this machine."""

    def train(nproc: int, **sections: object) -> Result:
        config = write_config(name="alone", **sections)
        done = subprocess.run(
            [sys.executable, "-m", "bigtrain.cli", "train", str(config), "--nproc", str(nproc)],
            cwd=tmp_path, capture_output=True, text=True, timeout=CLIENT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return result_of(tmp_path / "runs" / "alone")

    return train
