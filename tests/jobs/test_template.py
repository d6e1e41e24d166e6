"""Ranks that are forked from a template: as good as fresh ones, and held as tightly."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain import variables
from bigtrain.checkpoint.loader import read_tensors
from bigtrain.jobs.config import JobConfig
from bigtrain.jobs.template import can_fork
from bigtrain.run import ExitCode
from bigtrain.storage import read_lines

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8

RANK = """
import json, os, sys, time

def main():
    import numpy, torch
    from bigtrain.heartbeat import Heartbeat
    page = Heartbeat.from_environment()
    print(json.dumps({
        "rank": os.environ["RANK"], "argv": sys.argv[1:], "session": os.getsid(0) == os.getpgid(0) == os.getpid(),
        "parent": os.getppid(), "torch": torch.initial_seed(), "numpy": int(numpy.random.randint(1 << 31)),
        "tasks": len(os.listdir("/proc/self/task")),
        "descriptors": [os.path.realpath(file) for file in os.scandir("/proc/self/fd")],
    }), flush=True)
    page.beat(7, "step")
    if "stay" in sys.argv:
        time.sleep(1000)
    return 7
"""

AGENT = """
import json, os, signal, sys, time
from pathlib import Path
from bigtrain.jobs.ranks import Placement, RankProcess
from bigtrain.jobs.config import JobConfig
from bigtrain.jobs.template import Template

def placement(number, *arguments):
    return Placement(0, "tiny_template_rank", list(arguments), {"BIGTRAIN_RUN": "/a/run/%d" % number}, sys.argv[1],
                     {}, number, 1, 4, 0, "127.0.0.1", 20000)

def rank(number, *arguments):
    return RankProcess(placement(number, *arguments), 0, os.environ, template)

signal.alarm(120)  # so that a rank that does not do what it should ends the test
environment_of_a_rank = placement(0).rank_environment(0, os.environ)
template = Template("tiny_template_rank", environment_of_a_rank)
while not template.ready:
    assert not template.over
    template.look()
    time.sleep(0.02)
found = {"agent": os.getpid(), "fits": template.fits("tiny_template_rank", environment_of_a_rank),
         "fits_another": template.fits("tiny_template_rank", environment_of_a_rank | {"OMP_NUM_THREADS": "77"})}
first = rank(1, "leave")
while not first.has_exited():
    time.sleep(0.01)
found["code"] = first.reap()
second = rank(2, "stay")
while second.page.read().step != 7:
    time.sleep(0.01)
os.kill(second.pid, 11)
while not second.has_exited():
    time.sleep(0.01)
found["was_killed"], found["signal"] = second.was_killed(), second.reap()
third = rank(3, "stay")
while third.page.read().step != 7:
    time.sleep(0.01)
found |= {"template": template.pid, "pid": third.pid}
print(json.dumps(found), flush=True)
time.sleep(1000)
"""


def environment_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


@pytest.mark.slow
def test_a_forked_rank_is_held_as_a_fresh_one_and_looks_like_it(tmp_path: Path, wait_for: Any, job: Any) -> None:
    (tmp_path / "tiny_template_rank.py").write_text(RANK)
    (job.path / "logs").mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT))), "OMP_NUM_THREADS": "2"}
    agent = subprocess.Popen([sys.executable, "-c", AGENT, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    try:
        assert agent.stdout is not None
        found = json.loads(agent.stdout.readline())
        pid = found["pid"]
        assert (found["fits"], found["fits_another"]) == (True, False)
        assert (found["code"], found["was_killed"], found["signal"]) == (7, True, -11)
        variables = environment_of(pid)
        assert (variables["RANK"], variables["BIGTRAIN_RUN"], variables["OMP_NUM_THREADS"]) == ("3", "/a/run/3", "2")
        command = Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
        assert command[1:] == ["-P", "-m", "tiny_template_rank", "stay"]
        said = [json.loads((tmp_path / f"rank_{rank}.log").read_text().splitlines()[0]) for rank in (1, 2, 3)]
        assert [one["rank"] for one in said] == ["1", "2", "3"]
        assert {one["argv"][0] for one in said} == {"leave", "stay"}
        assert all(one["session"] and one["parent"] == found["agent"] and one["tasks"] == 1 for one in said)
        # Nothing of the template's or the agent's: neither their sockets nor pages and logs of others.
        for number, one in enumerate(said, 1):
            assert not [name for name in one["descriptors"] if "socket:" in name or "pipe:" in name]
            # Its mapping of the page holds a descriptor of its own.
            assert sum("memfd" in name for name in one["descriptors"]) == 2
            assert {name for name in one["descriptors"] if name.endswith(".log")} == {
                str(tmp_path / f"rank_{number}.log")
            }
        # As fresh processes, they draw each its own where nobody has seeded.
        assert len({one["torch"] for one in said}) == len({one["numpy"] for one in said}) == 3
    finally:
        agent.kill()
        agent.communicate()
    for one in (pid, found["template"]):
        wait_for(lambda one=one: not job.is_alive(one), 20)


def test_a_users_script_and_who_does_not_ask_get_fresh_processes() -> None:
    wanted = {variables.TEMPLATE: "1"}
    assert can_fork("bigtrain.training.rank", wanted)
    assert not can_fork("bigtrain.training.rank", {})
    assert not can_fork("bigtrain.jobs.scripts.rank", wanted)
    assert not can_fork("mine", wanted)


def strike(job: Any, mark: str, number: signal.Signals, then: Callable[[], None]) -> Callable[[Any], Any]:
    """What has the template of a launch get a signal while it imports."""

    def find() -> int | None:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                is_template = b"bigtrain.jobs.template" in Path(f"/proc/{pid}/cmdline").read_bytes()
                if is_template and environment_of(int(pid)).get("BIGTRAIN_TEST_MARK") == mark:
                    return int(pid)
        return None

    def run() -> None:
        while (pid := find()) is None:
            time.sleep(0.01)
        os.kill(pid, number)
        then()

    @contextlib.contextmanager
    def around(controller: Any) -> Iterator[None]:
        job.controller = controller
        threading.Thread(target=run, daemon=True).start()
        yield

    return around


@pytest.mark.slow
def test_ranks_that_wait_for_their_template_can_be_ended(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGTRAIN_TEST_MARK", str(job.path))
    monkeypatch.setenv(variables.TEMPLATE, "1")

    def end() -> None:
        job.controller.request_stop()
        time.sleep(0.2)
        job.controller.request_stop()

    around = strike(job, str(job.path), signal.SIGSTOP, end)
    assert job.launch(nproc=1, rank_module="bigtrain.training.rank", around=around) == ExitCode.FAILED
    assert not list((job.path / "logs").glob("attempt_*/*"))


def test_ranks_start_without_a_template_that_has_died(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a directory that is no run, which they say."""
    monkeypatch.setenv("BIGTRAIN_TEST_MARK", str(job.path))
    monkeypatch.setenv(variables.TEMPLATE, "1")
    around = strike(job, str(job.path), signal.SIGKILL, lambda: None)
    code = job.launch(nproc=1, rank_module="bigtrain.training.rank", around=around, job=JobConfig(max_failures=0))
    assert code in (ExitCode.FAILED, ExitCode.USER)
    assert "config.yaml" in job.log(0, 0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_forked_ranks_and_fresh_ones_end_in_the_same_bits(
    bigtrain: Callable[..., Any], write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(
        model={"arch": "llama", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 32, "dropout": 0.1},
    )
    monkeypatch.setenv(variables.TEMPLATE, "0")
    fresh = bigtrain("train", path, "--name", "fresh", "--nproc", 2)
    assert fresh.returncode == ExitCode.FINISHED, fresh.stderr
    monkeypatch.setenv(variables.TEMPLATE, "1")
    forked = bigtrain("train", path, "--name", "forked", "--nproc", 2)
    assert forked.returncode == ExitCode.FINISHED, forked.stderr
    runs = [tmp_path / "runs" / name for name in ("fresh", "forked")]
    losses = [{row["step"]: row["loss"] for row in read_lines(run / "metrics.jsonl")} for run in runs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
    forked_state, fresh_state = (read_tensors(run / "checkpoints", STEPS, prefix="") for run in runs)
    assert forked_state.keys() == fresh_state.keys()
    assert all(torch.equal(forked_state[name], fresh_state[name]) for name in forked_state)
