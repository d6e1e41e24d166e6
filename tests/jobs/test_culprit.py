"""Which of several silent ranks is named: stand-ins for ranks, whose logs answer when the test says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bigtrain.heartbeat import ANSWERED, Beat
from bigtrain.jobs import agent
from bigtrain.jobs.agent import Gang


class Rank:
    """Silent for `age_s` at step 12; asked for its stacks, it answers at the `answers_at`-th look at its log."""

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
    gang = Gang.__new__(Gang)
    gang.ranks, gang.generation = list(ranks), 0  # type: ignore[arg-type]
    gang._limits = SimpleNamespace(limit_s=lambda phase: 5.0)  # type: ignore[assignment]
    gang._channel = SimpleNamespace(send=lambda kind, **fields: sent.append(fields))  # type: ignore[assignment]
    gang._report_hang()
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
