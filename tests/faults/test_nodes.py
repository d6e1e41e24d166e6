"""Machines that are lost, taken away and come back under a run: same samples, and the losses of an undisturbed run.

The machines are this one (bigtrain.testing.machines); tests/jobs/test_ray.py has Ray's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

SAME_LOSS = 1e-5
"""At another number of ranks sums have another order; in FP32 the losses agree to this (reliability.md, case 8)."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_on_three_machines_goes_on_with_two_and_grows_again(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(duration="150 steps", checkpoint={"every": "20 steps"})
    workplace.finish(workplace.start("undisturbed", 3))
    said = workplace.finish(
        workplace.start("elastic", 1, "abc", "2,3", "30 lose b; 50 return d"),
    )
    assert "placements abc ac acd" in said
    assert workplace.samples("elastic") == workplace.samples("undisturbed")
    elastic, undisturbed = workplace.losses("elastic"), workplace.losses("undisturbed")
    assert elastic.keys() == undisturbed.keys()
    worst = max(abs(elastic[step] - undisturbed[step]) for step in elastic)
    print(f"largest difference of a loss: {worst:.2e}")
    assert worst < SAME_LOSS
    workplace.assert_nothing_left("elastic")
    [fault] = workplace.events("elastic", "fault")
    assert "the agent on host host-b is lost" in fault["cause"]
    steps = [event["step"] for event in workplace.events("elastic", "resumed")]
    assert steps[0] % 20 == 0
    assert 50 <= steps[1] < 150, "it grew at a requested checkpoint"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_machine_with_notice_loses_no_step_and_changes_no_bit(two_ranks: Any) -> None:
    slow = {"rank": 1, "kind": "sleep", "step": 5}  # So that the notice comes before the end of so short a run.
    said = two_ranks.finish(two_ranks.start("drained", 1, "abc", "2", "5 drain a 20", fault=slow))
    assert "placements ab cb" in said
    two_ranks.assert_same("drained", "undisturbed")
    assert not two_ranks.events("drained", "fault")
    two_ranks.assert_nothing_left("drained")
