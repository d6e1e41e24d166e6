"""Ranks that die, hang or misbehave: the run ends as if nothing had been, and says in one line what was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

HANG_S = 8.0
"""A silence that counts as a hang, where one is planted: far above a step, also on a busy machine."""
STOPPED = {"kind": "stop", "step": 12}


@pytest.fixture(scope="module")
def struck(two_ranks: Any) -> Callable[[dict[str, Any]], str]:
    """The name of a run whose second rank did itself a harm; each is run once."""
    done: set[str] = set()

    def run(fault: dict[str, Any]) -> str:
        name = "-".join(str(value).replace(" ", "-") for value in fault.values())
        if name not in done:
            limit_s = HANG_S if fault["kind"] in ("stop", "stop at once", "hold the GIL") else None
            two_ranks.finish(two_ranks.start(name, 2, fault={"rank": 1, **fault}, limit_s=limit_s))
            done.add(name)
        return name

    return run


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ({"kind": "kill", "step": 12}, "was killed by SIGKILL at step 12"),
        ({"kind": "exit", "step": 12}, "exited with 0 at step 12 while other ranks continued"),
        (STOPPED, "hangs in phase step at step 12"),
        ({"kind": "stop", "step": 14, "phase": "save"}, "hangs in phase save at step 14"),
        ({"kind": "stop at once", "step": 12, "phase": "data"}, "hangs in phase data at step 12"),
        ({"kind": "kill", "step": 13, "phase": "data"}, "was killed by SIGKILL at step 13, in phase data"),
        ({"kind": "hold the GIL", "step": 12}, "hangs in phase step at step 12"),
        ({"kind": "raise", "step": 12}, "raised ValueError: planted"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_a_fault_of_a_rank_leaves_no_trace_but_a_line(
    two_ranks: Any, struck: Callable[[dict[str, Any]], str], fault: dict[str, Any], cause: str
) -> None:
    """Other signals than SIGKILL end a process the same way: tests/jobs/test_launch.py has them named."""
    name = struck(fault)
    two_ranks.assert_same(name, "undisturbed")
    two_ranks.assert_nothing_left(name)
    [event] = two_ranks.events(name, "fault")
    assert (event["rank"], event["step"]) == (1, fault["step"])
    assert f"rank 1 on host {event['host']} " in event["cause"]
    assert cause in event["cause"]
    assert "\n" not in event["cause"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hung_rank_leaves_its_stacks_and_its_peers_last_collective(
    two_ranks: Any, struck: Callable[[dict[str, Any]], str]
) -> None:
    peer = (two_ranks.run(struck(STOPPED)) / "logs" / "attempt_0" / "rank_0.log").read_text()
    assert "train_step" in peer, "the stack of the rank that waits"
    assert "flight recorder, last collectives of each group" in peer
    assert "NOT DONE" in peer


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_same_exception_at_one_step_twice_ends_the_run_with_its_traceback(two_ranks: Any) -> None:
    name = "twice"
    said = two_ranks.finish(
        two_ranks.start(name, 2, fault={"rank": 1, "kind": "raise", "step": 12, "attempts": 9}), code=1
    )
    assert "the same exception was raised twice at step 12" in said
    assert "ValueError: planted" in said
    assert len(two_ranks.events(name, "fault")) == 2
    two_ranks.assert_nothing_left(name)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_straggler_is_reported_and_not_restarted(make_workplace: Any) -> None:
    workplace = make_workplace(duration="100 steps")
    workplace.finish(workplace.start("slow", 2, fault={"rank": 1, "kind": "sleep", "step": 70}))
    [straggler] = workplace.events("slow", "straggler")
    assert (straggler["rank"], straggler["step"]) == (1, 100)
    assert "the other ranks wait for rank 1" in straggler["cause"]
    assert not workplace.events("slow", "fault")
