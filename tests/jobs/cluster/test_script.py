"""Scripts that know nothing of bigtrain: the same agents, logs, retries and stops."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from bigtrain.jobs.cluster.local import ClusterRecord
from tests.jobs.cluster.conftest import marked

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

SCRIPTS = Path(__file__).parent / "scripts"
CANARY = "canary-77c0ffee"


@pytest.mark.parametrize("kind", ["torchrun", "accelerate", "deepspeed"])
def test_a_users_script_is_restarted_and_stopped(
    kind: str, client: Any, cluster: ClusterRecord, tmp_path: Path
) -> None:
    script = SCRIPTS / f"with_{kind}.py"
    options = ("--name", kind, "--nodes", 2, "--procs-per-node", 1, "--runs-dir", tmp_path / "runs")
    arguments = ("--", "--epochs", 100000, "--sleep", 0.05, "--snapshot", tmp_path / "snapshot")
    waiting = client.start("submit", "--script", script, *options, "--wait", *arguments)
    logs = tmp_path / "runs" / kind / "logs"
    client.wait_for(kind, lambda status: _says(logs / "attempt_0" / "rank_1.log", "from epoch 0"))
    client.wait_for(kind, lambda status: _snapshot(tmp_path))
    victims = [pid for pid in marked(cluster.mark) if str(script.name).encode() in _line(pid) and _rank(pid) == b"1"]
    os.kill(victims[-1], signal.SIGKILL)
    client.wait_for(kind, lambda status: _says(logs / "attempt_1" / "rank_0.log", "[rank 0 of 2] from epoch"))
    assert "from epoch 0" not in (logs / "attempt_1" / "rank_0.log").read_text()
    assert client.json("status", kind)["restarts"] == 1
    assert "stopped" in client("stop", kind).stdout
    assert waiting.wait(60) == 75
    waiting.communicate()
    events = [event["event"] for event in client.json("events", kind)["events"]]
    assert events == ["placed", "fault", "restarted", "stopped"]


def test_keys_reach_the_ranks_and_nothing_else(client: Any, cluster: ClusterRecord, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.write_text(f"WANDB_API_KEY={CANARY}\n")
    secrets.chmod(0o600)
    script = tmp_path / "look.py"
    script.write_text(
        "import hashlib, os, pathlib\n"
        "print('key', hashlib.sha256(os.environ['WANDB_API_KEY'].encode()).hexdigest())\n"
        "commands = [path.read_bytes() for path in pathlib.Path('/proc').glob('[0-9]*/cmdline')]\n"
        f"print('seen in', [line for line in commands if b'{CANARY[:6]}' b'{CANARY[6:]}' in line])\n"
    )
    done = client(
        "submit", "--script", script, "--name", "secret", "--nodes", 2, "--runs-dir", tmp_path / "runs",
        "--secrets-file", secrets, "--wait", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = client("logs", "secret", "--rank", 1).stdout
    assert f"key {hashlib.sha256(CANARY.encode()).hexdigest()}" in log
    assert "seen in []" in log
    assert "no HF_TOKEN" in client("logs", "secret").stdout
    assert "no WANDB_API_KEY" not in client("logs", "secret").stdout
    places = [tmp_path / "runs", Path(cluster.temporary), Path(cluster.token_file).parent]
    leaks = [path for place in places for path in place.rglob("*") if _holds(path, CANARY.encode())]
    assert leaks == []
    assert CANARY not in client("status", "--json").stdout + client("events", "secret").stdout + done.stderr

    secrets.chmod(0o644)
    refused = client(
        "submit", "--script", script, "--name", "open", "--runs-dir", tmp_path / "runs", "--secrets-file", secrets
    )
    assert refused.returncode == 2
    assert "Others may read the secrets" in refused.stderr
    assert CANARY not in refused.stderr


def _holds(path: Path, text: bytes) -> bool:
    try:
        return path.is_file() and text in path.read_bytes()
    except OSError:
        return False


def _says(log: Path, text: str) -> bool:
    return log.exists() and text in log.read_text()


def _snapshot(directory: Path) -> bool:
    """Whether the script has saved itself completely at least once."""
    place = directory / "snapshot"
    return place.is_file() or (place / "epoch").exists() or (place / "latest").exists()


def _line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _rank(pid: int) -> bytes:
    try:
        names = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return b""
    return next((name.partition(b"=")[2] for name in names if name.startswith(b"RANK=")), b"")
