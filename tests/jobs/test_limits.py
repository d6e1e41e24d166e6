"""How long a rank may be silent: the published limits, and shorter ones learned within them."""

from __future__ import annotations

import pytest

from bigtrain.heartbeat import Beat, Phase
from bigtrain.jobs.config import LimitsConfig
from bigtrain.jobs.limits import ENOUGH, LEAST_S, TIMES_LONGEST, LearnedLimits

PUBLISHED = LimitsConfig().by_phase()


def observed(phase: Phase, silences: list[float]) -> LearnedLimits:
    """Limits after a rank was silent for so long between its beats."""
    limits = LearnedLimits(PUBLISHED)
    for step, silence in enumerate(silences):
        limits.observe(0, Beat(step, phase, 0.0))
        limits.observe(0, Beat(step, phase, silence))
    limits.observe(0, Beat(len(silences), phase, 0.0))
    return limits


@pytest.mark.parametrize(
    ("silences", "limit_s"),
    [
        ([1.0] * (ENOUGH["step"] - 1), PUBLISHED["step"]),
        ([1.0] * ENOUGH["step"], LEAST_S),
        ([*[1.0] * ENOUGH["step"], 5.0], TIMES_LONGEST * 5.0),
        ([*[1.0] * ENOUGH["step"], 50.0], PUBLISHED["step"]),
    ],
)
def test_a_limit_is_learned_from_the_longest_silence_within_the_published_one(
    silences: list[float], limit_s: float
) -> None:
    assert observed("step", silences).limit_s("step") == limit_s


def test_a_phase_learns_from_itself_alone() -> None:
    limits = observed("step", [1.0] * ENOUGH["step"])
    assert limits.limit_s("save") == PUBLISHED["save"]
    assert limits.limit_s("start") == PUBLISHED["start"]


def test_a_silence_that_goes_on_teaches_nothing() -> None:
    limits = LearnedLimits(PUBLISHED)
    for age in range(100):
        limits.observe(0, Beat(3, "step", float(age)))
    assert limits.limit_s("step") == PUBLISHED["step"]


def test_a_users_own_limit_is_never_lengthened() -> None:
    limits = LearnedLimits({**PUBLISHED, "step": 5.0})
    for step in range(2 * ENOUGH["step"]):
        limits.observe(0, Beat(step, "step", 0.0))
        limits.observe(0, Beat(step, "step", 4.0))
    assert limits.limit_s("step") == 5.0


def test_data_may_be_waited_for_as_long_as_a_step_may_take() -> None:
    limits = observed("step", [5.0] * ENOUGH["step"])
    for step in range(1000, 1001 + ENOUGH["data"]):
        limits.observe(0, Beat(step, "data", 0.0))
        limits.observe(0, Beat(step, "data", 0.1))
    assert limits.limit_s("data") == limits.limit_s("step") == TIMES_LONGEST * 5.0
