"""Which of several silent ranks is named: stand-ins for ranks, whose logs answer when the test says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bigtrain.heartbeat import ANSWERED, Beat
from bigtrain.jobs import agent
from bigtrain.jobs import generation as generation_module
from bigtrain.jobs.agent import LocalRanks
from bigtrain.jobs.generation import Generation, Launch


class Rank:
    """A rank, silent for `age_s` at step 12, whose stacks are in its log from the `answers_at`-th read on."""

    def __init__(self, rank: int, age_s: float, answers_at: int | None, stopped: bool = False) -> None:
        self.rank, self.stopped, self._answers_at, self.looks = rank, stopped, answers_at, 0
        self.page = SimpleNamespace(read=lambda: Beat(12, "step", age_s))

    def log_size(self) -> int:
        return 0

    def dump_stacks(self) -> None:
        pass

    def log_tail(self, start: int) -> str:
        self.looks += 1
        return ANSWERED if self._answers_at is not None and self.looks >= self._answers_at else ""


def named(monkeypatch: pytest.MonkeyPatch, *ranks: Rank) -> int:
    """The rank that is reported."""
    monkeypatch.setattr(agent, "STACKS_S", 0.0)
    monkeypatch.setattr(agent, "LOOK_S", 0.01)
    sent: list[dict[str, Any]] = []
    gang = LocalRanks.__new__(LocalRanks)
    gang.ranks, gang.generation = list(ranks), 0  # type: ignore[arg-type]
    gang._limits = SimpleNamespace(limit_s=lambda phase: 5.0)  # type: ignore[assignment]
    gang._channel = SimpleNamespace(send=lambda kind, **fields: sent.append(fields))  # type: ignore[assignment]
    gang._examined, gang.placement = False, SimpleNamespace(world_size=len(ranks))  # type: ignore[assignment]
    gang.examine()
    gang.examine()
    assert len(sent) == 1
    return int(sent[0]["rank"])


@pytest.mark.parametrize("answers_at", [1, 4])
def test_one_that_answers_late_is_not_the_one_that_holds_the_gil(
    monkeypatch: pytest.MonkeyPatch, answers_at: int
) -> None:
    assert named(monkeypatch, Rank(0, age_s=9.0, answers_at=answers_at), Rank(1, age_s=8.9, answers_at=None)) == 1


def test_where_nobody_answers_the_longest_silence_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "LATE_STACKS_S", 0.1)
    assert named(monkeypatch, Rank(0, age_s=8.0, answers_at=None), Rank(1, age_s=9.0, answers_at=None)) == 1


def test_a_stopped_one_is_named_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Rank(0, age_s=9.0, answers_at=None), Rank(1, age_s=8.0, answers_at=None, stopped=True)
    assert named(monkeypatch, *ranks) == 1
    assert ranks[0].looks == 1


class Connection:
    """A connection to an agent that takes what is sent."""

    peer_address = "127.0.0.1"

    def __init__(self) -> None:
        self.sent: list[str] = []

    def send(self, kind: str, **fields: Any) -> None:
        self.sent.append(kind)


def generation_of() -> tuple[Generation, list[Any]]:
    """A generation of one rank a node, and its agents."""
    agents = [SimpleNamespace(channel=Connection(), host=f"host{node}", agent=str(node)) for node in range(2)]
    launch = Launch("module", [], 1, {})
    generation = Generation(1, agents, launch, {}, "logs", lambda: 0, lambda agent: None)  # type: ignore[arg-type]
    return generation, agents


def report(rank: int, **changed: Any) -> dict[str, Any]:
    known = {"type": "hung", "generation": 1, "rank": rank, "step": 7, "phase": "step", "age_s": 60.0, "limit_s": 60.0}
    return known | {"stopped": False, "answered": True, "stacks": ""} | changed


CULPRITS = [{"stopped": True, "answered": False}, {"step": 6}, {"answered": False}, {"age_s": 61.0}]


@pytest.mark.parametrize("sign", CULPRITS, ids=str)
@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("first", [0, 1])
def test_of_two_nodes_the_one_that_hangs_is_named_whoever_reports_first(
    sign: dict[str, Any], culprit: int, first: int
) -> None:
    generation, agents = generation_of()
    for node in (first, 1 - first):
        assert generation._outcome.fault is None
        generation._handle(node, {"type": "overdue", "generation": 1})
        generation._handle(node, report(node, **(sign if node == culprit else {})))
    assert "examine" in agents[1 - first].channel.sent
    assert "examine" not in agents[first].channel.sent
    fault = generation._outcome.fault
    assert fault is not None
    assert (fault.rank, fault.host, fault.agent) == (culprit, f"host{culprit}", str(culprit))
    assert all("kill" in agent.channel.sent for agent in agents)


def test_a_node_that_does_not_report_is_waited_for_no_longer_than_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_module, "EXAMINE_S", 0.0)
    generation, _ = generation_of()
    generation._handle(1, {"type": "overdue", "generation": 1})
    generation._handle(1, report(1))
    assert generation._outcome.fault is not None
    # The late report is of a rank that is stopped: it is the cause after all.
    generation._handle(0, report(0, stopped=True))
    assert generation._outcome.fault.rank == 0
