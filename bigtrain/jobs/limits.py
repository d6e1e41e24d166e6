"""How long a rank may go without a heartbeat: the configured limits, and shorter ones learned from the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from bigtrain.heartbeat import Beat, Phase

LEAST_S: Final = 60.0
"""The shortest learned limit in seconds: a step may compile, wait for a disk or be paged in."""
TIMES_LONGEST: Final = 20.0
ENOUGH: Final[Mapping[str, int]] = {"step": 50, "data": 50, "save": 3, "evaluation": 3}
"""Number of observed silences after which the limit of a phase is learned. Start-up and stopping happen once, so
their limits are never learned."""


class LearnedLimits:
    """The limits of one generation in seconds, by phase.

    The limit of a phase is TIMES_LONGEST times its longest silence so far, but at least LEAST_S and at most the
    configured limit. A silence is the time between two heartbeats of one rank; it counts for the phase of the first.

    Args:
        published: The configured limits in seconds, by phase.
    """

    def __init__(self, published: Mapping[str, float]) -> None:
        self._published = dict(published)
        self._last: dict[int, Beat] = {}
        self._longest: dict[str, float] = {}
        self._count: dict[str, int] = {}

    def observe(self, rank: int, beat: Beat) -> None:
        """Record one reading of a rank's heartbeat page.

        A silence is measured with an error of at most the time between two readings.
        """
        before = self._last.get(rank)
        self._last[rank] = beat
        if before is None or ((beat.step, beat.phase) == (before.step, before.phase) and beat.age_s >= before.age_s):
            return
        self._longest[before.phase] = max(self._longest.get(before.phase, 0.0), before.age_s)
        self._count[before.phase] = self._count.get(before.phase, 0) + 1

    def limit_s(self, phase: Phase) -> float:
        """The longest allowed silence in a phase, in seconds."""
        if phase == "data":
            # Waiting for data is part of a step, so a data server may take as long as a step.
            return max(self._limit_s("data"), self._limit_s("step"))
        return self._limit_s(phase)

    def _limit_s(self, phase: Phase) -> float:
        published = self._published[phase]
        if phase not in ENOUGH or self._count.get(phase, 0) < ENOUGH[phase]:
            return published
        return min(published, max(LEAST_S, TIMES_LONGEST * self._longest[phase]))
