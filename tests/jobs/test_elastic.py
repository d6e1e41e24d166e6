"""Runs whose nodes are lost, taken away, come back or fail again and again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from bigtrain.jobs.config import JobConfig

RANK = """
import tiny_steps
from functools import partial
saved = lambda: tiny_steps.saved(run)
go = partial(tiny_steps.go, run, page)
"""


def steps_of(job: Any, rank: int) -> list[list[int]]:
    """[attempt, step, world size] of each step that a rank did."""
    return [[int(word) for word in line.split()[:3]] for line in (job.path / f"steps_{rank}").read_text().splitlines()]


def when(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Act once a condition holds, beside the run."""
    ended = threading.Event()

    def wait() -> None:
        while not ended.wait(0.02):
            if condition():
                act()
                return

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_lost_node_is_replaced_and_the_others_keep_their_place(job: Any, machines: Any) -> None:
    job.write_rank(RANK + "go(12 if attempt else 10**6)")
    placer = machines("abc", (2,))
    when(lambda: (job.path / "at_1_0").exists(), lambda: placer.lose("b"))
    assert job.launch(nproc=1, placer=placer, job=JobConfig(nodes=2)) == 0
    assert placer.placements == ["ab", "ac"]
    [fault] = job.named("fault")
    assert "the agent on host host-b is lost" in fault["cause"]
    assert placer.distrusted == ["b"]


def test_a_rank_killed_on_one_of_two_nodes_restarts_in_place_and_is_named(job: Any, machines: Any) -> None:
    job.write_rank(
        RANK
        + """
def die(step):
    if attempt == 0 and rank == 1 and step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
try:
    go(8, at=die) if rank == 1 or attempt else go(5)
finally:
    if attempt == 0:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")
"""
    )
    placer = machines("ab", (2,))
    assert job.launch(nproc=1, placer=placer, job=JobConfig(nodes=2)) == 0
    assert placer.placements == ["ab"], "no new placement"
    [fault] = job.named("fault")
    assert (fault["rank"], fault["host"], fault["step"]) == (1, "host-b", 4)
    assert "SIGKILL" in fault["cause"]


def test_a_run_shrinks_when_none_is_spare_and_grows_at_a_requested_checkpoint(
    job: Any, machines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigtrain.jobs.membership.GROW_AFTER_S", 0.3)
    job.write_rank(RANK + "go(10**6 if int(os.environ['WORLD_SIZE']) < 3 or attempt == 0 else saved() + 5)")
    placer = machines("abc", (2, 3))
    when(lambda: (job.path / "at_2_0").exists(), lambda: placer.lose("a"))
    when(lambda: (job.path / "at_1_1").exists(), lambda: placer.there.append("d"))
    assert job.launch(nproc=1, placer=placer, job=JobConfig(nodes=3, min_nodes=2)) == 0
    assert placer.placements == ["abc", "bc", "bcd"]
    done = [step for attempt, step, _ in steps_of(job, 0) if attempt > 0]
    assert done == list(range(1, len(done) + 1)), "no step is done twice or skipped when it grows"
    assert {world for attempt, _, world in steps_of(job, 0) if attempt == 1} == {2}
    assert job.named("restarted")[-1]["cause"] == "3 nodes are available"
    assert len(job.named("fault")) == 1


def test_a_node_that_is_announced_to_go_loses_no_step(job: Any, machines: Any) -> None:
    job.write_rank(RANK + "go(10**6 if attempt == 0 else saved() + 5)")
    placer = machines("abc", (2,))
    when(lambda: (job.path / "at_1_0").exists(), lambda: placer.leaving.update(a=20.0))
    assert job.launch(nproc=1, placer=placer, job=JobConfig(nodes=2, max_failures=0)) == 0
    assert placer.placements == ["ab", "cb"]
    done = [step for _, step, _ in steps_of(job, 1)]
    assert done == list(range(1, len(done) + 1))
    assert not job.named("fault")
    [notice] = job.named("notice")
    assert notice["host"] == "host-a"
    assert "in 20 s" in notice["cause"]


@pytest.mark.slow
def test_an_agent_that_gets_sigterm_moves_the_run(job: Any, machines: Any) -> None:
    job.write_rank(RANK + "go(10**6 if attempt == 0 else saved() + 5)")
    placer = machines("abc", (2,))
    when(lambda: (job.path / "at_1_0").exists(), lambda: os.kill(placer.pid("b"), signal.SIGTERM))
    assert job.launch(nproc=1, placer=placer, job=JobConfig(nodes=2, max_failures=0)) == 0
    assert placer.placements == ["ab", "ac"]
    assert not job.named("fault")


@pytest.mark.slow
def test_a_notice_shorter_than_a_save_is_reported_and_costs_no_budget(job: Any, machines: Any) -> None:
    job.write_rank(RANK + "go(10**6 if attempt == 0 else 5, save_s=60 if attempt == 0 else 0)")
    placer = machines("abc", (2,))
    when(lambda: (job.path / "at_1_0").exists(), lambda: placer.leaving.update(a=1.0))
    when(lambda: bool(job.named("notice")), lambda: placer.lose("a"))
    assert job.launch(nproc=1, placer=placer, job=JobConfig(nodes=2, max_failures=0)) == 0
    [fault] = job.named("fault")
    assert "host host-a was preempted before the run had saved (notice period: 1 s)" in fault["cause"]
    assert placer.placements == ["ab", "cb"]


@pytest.mark.slow
def test_a_node_with_two_faults_is_excluded(job: Any, machines: Any) -> None:
    job.write_rank(
        RANK
        + """
def die(step):
    if attempt < 2 and rank == 1 and step == 3:
        if attempt == 1 and rank == 1:
            publish(2)
        os.kill(os.getpid(), signal.SIGKILL)
go(6, at=die)
"""
    )
    placer = machines("abc", (2,))
    assert job.launch(nproc=1, placer=placer, job=JobConfig(nodes=2)) == 0
    assert placer.placements == ["ab", "ac"], "the first strike restarts in place"
    [excluded] = job.named("excluded")
    assert excluded["host"] == "host-b"


@pytest.mark.slow
def test_a_node_that_cannot_be_spared_is_kept_in_spite_of_its_strikes(job: Any, machines: Any) -> None:
    job.write_rank(
        RANK
        + """
def die(step):
    if attempt < 2 and rank == 1 and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
go(6, at=die)
"""
    )
    placer = machines("ab", (2,))
    assert job.launch(nproc=1, placer=placer, job=JobConfig(nodes=2)) == 0
    assert placer.placements == ["ab"]
    assert any("cannot continue without it" in line for line in job.said)


@pytest.mark.slow
def test_a_run_that_waits_for_nodes_can_be_stopped(job: Any, machines: Any) -> None:
    job.write_rank(RANK + "go(10**6)")
    placer = machines("ab", (2,))
    when(lambda: (job.path / "at_1_0").exists(), lambda: placer.lose("b"))
    when(lambda: placer.waits > 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert job.launch(nproc=1, placer=placer, job=JobConfig(nodes=2)) == 75
    assert job.events[-1]["event"] == "stopped"


@pytest.mark.slow
def test_lost_nodes_and_failing_ranks_have_budgets_of_their_own(job: Any, machines: Any) -> None:
    job.write_rank(
        RANK
        + """
def die(step):
    if attempt == 0 and rank == 1 and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
go(10**6 if attempt == 1 else 6, at=die)
"""
    )
    placer = machines("abc", (2,))
    when(lambda: (job.path / "at_1_1").exists(), lambda: placer.lose("b"))
    assert job.launch(nproc=1, placer=placer, job=JobConfig(nodes=2, max_failures=1)) == 0
    assert len(job.named("fault")) == 2
