"""How long a rank may stay silent: the published limits, and shorter ones learned from the run itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from bigtrain.heartbeat import Beat, Phase

LEAST_S: Final = 60.0
"""No learned limit is shorter: a step may compile, wait for a disk or be paged in."""
TIMES_LONGEST: Final = 20.0
ENOUGH: Final[Mapping[str, int]] = {"step": 50, "data": 50, "save": 3, "evaluation": 3}
"""Silences of a phase after which its limit is learned; start-up and stopping happen once."""


class LearnedLimits:
    """The limits of one generation, by phase: TIMES_LONGEST the longest silence so far, within LEAST_S and `published`.

    A silence is the time between two beats of one rank, counted for the phase in which it was.
    """

    def __init__(self, published: Mapping[str, float]) -> None:
        self._published = dict(published)
        self._last: dict[int, Beat] = {}
        self._longest: dict[str, float] = {}
        self._count: dict[str, int] = {}

    def observe(self, rank: int, beat: Beat) -> None:
        """Take a reading of a rank's page in; read often, it sees each silence to within the time between readings."""
        before = self._last.get(rank)
        self._last[rank] = beat
        if before is None or ((beat.step, beat.phase) == (before.step, before.phase) and beat.age_s >= before.age_s):
            return
        self._longest[before.phase] = max(self._longest.get(before.phase, 0.0), before.age_s)
        self._count[before.phase] = self._count.get(before.phase, 0) + 1

    def limit_s(self, phase: Phase) -> float:
        """Seconds of silence allowed in a phase."""
        if phase == "data":
            # Waiting for data is part of a step: a server is given as long as a step may take.
            return max(self._limit_s("data"), self._limit_s("step"))
        return self._limit_s(phase)

    def _limit_s(self, phase: Phase) -> float:
        published = self._published[phase]
        if phase not in ENOUGH or self._count.get(phase, 0) < ENOUGH[phase]:
            return published
        return min(published, max(LEAST_S, TIMES_LONGEST * self._longest[phase]))
