"""Which rank the others wait for, found from the times at which ranks enter their collectives."""

from __future__ import annotations

import random

import pytest

from bigtrain.training.stragglers import lateness

STEPS, COLLECTIVES = 10, 5


def ranks_of(slow: float, clocks: list[float]) -> list[dict[str, float]]:
    """Ranks of which the second is `slow` seconds slower once a step, each with a clock of its own."""
    noise = random.Random(7)
    left, ranks = 0.0, [dict[str, float]() for _ in clocks]
    for step in range(STEPS):
        for collective in range(COLLECTIVES):
            enters = [left + 0.01 + noise.uniform(0, 0.001) for _ in clocks]
            if collective == 2:
                enters[1] += slow
            for rank, clock, time in zip(ranks, clocks, enters, strict=True):
                rank[f"default#{step * COLLECTIVES + collective}"] = time + clock
            left = max(enters)
    return ranks


@pytest.mark.parametrize("clocks", [[5.0, -3.0, 1000.0], [0.0, 3.0], [7.0, 0.0]])
def test_the_slow_rank_is_the_one_that_is_waited_for_whatever_the_clocks_show(clocks: list[float]) -> None:
    waited, span = lateness(ranks_of(0.2, clocks), [f"host-{clock}" for clock in clocks])
    assert waited[1] == pytest.approx(0.2 * STEPS, rel=0.1)
    assert all(value < 0.1 for rank, value in enumerate(waited) if rank != 1)
    assert waited[1] / span > 0.7


def test_equal_ranks_wait_for_none() -> None:
    waited, span = lateness(ranks_of(0.0, [0.0, 2.0, 2.0]), ["a", "b", "b"])
    assert max(waited) / span < 0.1


def test_ranks_of_different_groups_are_compared_within_them() -> None:
    pair = ranks_of(0.2, [0.0, 0.0])
    other = [{f"other#{number}": float(number) for number in range(50)} for _ in range(2)]
    waited, _ = lateness([*pair, *other], ["a"] * 4)
    assert waited[1] == pytest.approx(0.2 * STEPS, rel=0.1)
    assert waited[2] == waited[3] == 0.0
