"""When a run should leave its nodes: the judgement alone, on a placer that does nothing."""

from __future__ import annotations

from typing import Any

import pytest

from bigtrain.jobs.causes import Fault, Kind
from bigtrain.jobs.membership import Membership
from bigtrain.jobs.placing import Notice, Placer


class Still(Placer):
    """An elastic placer that is only asked; what it says stands in its attributes."""

    elastic = True

    def __init__(self) -> None:
        self.said: list[Notice] = []
        self.more = 0
        self.distrusted: list[str] = []
        self.excluded: list[str] = []

    def place(self, cancelled: Any) -> list[Any]:
        return []

    def release(self) -> None: ...

    def distrust(self, agent: str) -> None:
        self.distrusted.append(agent)

    def exclude(self, agent: str) -> bool:
        self.excluded.append(agent)
        return True

    def leave(self, agent: str) -> None: ...

    def notices(self) -> list[Notice]:
        return self.said

    def larger(self) -> int:
        return self.more


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that membership sees."""
    now = [1000.0]
    monkeypatch.setattr("bigtrain.jobs.membership.time.monotonic", lambda: now[0])
    return now


def membership(placer: Still) -> tuple[Membership, list[tuple[str, dict[str, Any]]]]:
    events: list[tuple[str, dict[str, Any]]] = []
    return Membership(placer, lambda line: None, lambda event, /, **fields: events.append((event, fields))), events


def test_more_nodes_are_taken_only_when_they_have_been_there_for_a_while(clock: list[float]) -> None:
    placer = Still()
    members, _ = membership(placer)
    placer.more = 3
    assert members.reason_to_leave() is None
    clock[0] += 3
    placer.more = 0
    assert members.reason_to_leave() is None, "gone again"
    clock[0] += 3
    placer.more = 3
    assert members.reason_to_leave() is None
    clock[0] += 6
    assert members.reason_to_leave() == "3 nodes are available"
    members.placed()
    placer.more = 0
    clock[0] += 6
    assert members.reason_to_leave() is None


def test_a_fault_on_a_node_with_notice_is_preemption_and_on_another_is_not(clock: list[float]) -> None:
    placer = Still()
    members, events = membership(placer)
    placer.said = [Notice("a", "host-a", 2.0)]
    assert "host-a will be preempted in 2 s" in str(members.reason_to_leave())
    assert [name for name, _ in events] == ["notice"]
    lost, anew = members.judge(Fault(Kind.AGENT_LOST, "gone", "host-a", agent="a"), ["a"])
    assert (lost.kind, anew) == (Kind.PREEMPTED, True)
    other, anew = members.judge(Fault(Kind.SIGNAL, "killed", "host-b", agent="b"), [])
    assert (other.kind, anew) == (Kind.SIGNAL, True), "it leaves anyway, so it leaves now"


@pytest.mark.parametrize(
    ("kind", "struck"), [(Kind.SIGNAL, True), (Kind.HANG, True), (Kind.EXCEPTION, False), (Kind.EARLY_EXIT, False)]
)
def test_two_failures_that_may_be_the_nodes_own_leave_it_out(kind: Kind, struck: bool) -> None:
    placer = Still()
    members, _ = membership(placer)
    fault = Fault(kind, "x", "host-a", agent="a")
    assert members.judge(fault, []) == (fault, False)
    assert members.judge(fault, []) == (fault, struck)
    assert placer.excluded == (["a"] if struck else [])
