"""A port that someone else has, and one where nobody listens: said within 30 s, with both ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bigtrain import variables
from bigtrain.jobs.protocol import new_token

SAID_S = 30.0
DEADLINE_S = 120.0


def environment_of(pid: str) -> dict[str, str]:
    try:
        items = Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in items if "=" in item)


def take_rendezvous_port(run: Path, attempt: int) -> socket.socket:
    """Listen where rank 0 of an attempt is about to: it has been given its port, and still imports torch."""
    deadline = time.monotonic() + DEADLINE_S
    wanted = {"BIGTRAIN_RUN": str(run), "RANK": "0", "BIGTRAIN_ATTEMPT": str(attempt)}
    while time.monotonic() < deadline:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            found = environment_of(pid)
            if wanted.items() <= found.items():
                return socket.create_server(("", int(found["MASTER_PORT"])))
        time.sleep(0.01)
    raise AssertionError("rank 0 was not started")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_port_taken_from_the_ranks_costs_a_restart_each_time_and_is_reported(two_ranks: Any) -> None:
    name = "port"
    process = two_ranks.start(name, 2)
    # Before a rank comes to its port it imports torch, on a busy machine for as long as it did before or longer.
    starts_s = 2 * two_ranks.events("undisturbed", "started")[0]["start_s"]
    for attempt in range(2):
        with take_rendezvous_port(two_ranks.run(name), attempt) as thief:
            taken, port = time.monotonic(), thief.getsockname()[1]
            while len(faults := two_ranks.events(name, "fault")) <= attempt:
                assert time.monotonic() - taken < starts_s + SAID_S
                time.sleep(0.02)
            fault = faults[-1]
            assert f"rank 0 on host {socket.gethostname()} " in fault["cause"]
            assert f"port: {port}" in fault["cause"]
            assert "could not listen on its port, which is in use" in fault["cause"]
    two_ranks.finish(process)
    two_ranks.assert_same(name, "undisturbed")
    two_ranks.assert_nothing_left(name)
    assert len(two_ranks.events(name, "fault")) == 2


def test_an_agent_that_finds_no_controller_says_who_it_is_and_where_it_looked() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = f"127.0.0.1:{gone.getsockname()[1]}"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "bigtrain.jobs.agent"],
        env=os.environ | {variables.CONTROLLER: address, variables.JOB_TOKEN: new_token()},
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert time.monotonic() - began < SAID_S
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"agent on {socket.gethostname()}: no controller answers at {address}: ")
