"""The benchmark of layouts: both sides do the same work with the same collectives, and what differs is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from bigtrain.planning.communication import Collective
from bigtrain.testing.ranks import RankPool
from tests.bench.bench_layouts import LAYOUTS, Measured, Size, _judged, bench, table

TINY = Size(layers=4, width=32, heads=4, vocabulary=64, context=16, batch=8)
EXCHANGE = Counter({Collective("all_reduce", ("tp",), 32): 1})
SOUND = Measured(
    losses=[(2.0, 2.0)],
    norms=[(1.0, 1.0)],
    native=EXCHANGE,
    plain=EXCHANGE,
    ratios={"bigtrain": [1.0, 1.01, 1.02], "a_a": [1.0, 0.99, 1.01]},
    seconds={"bigtrain": [0.1] * 3, "plain": [0.1] * 3},
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS])
def test_bigtrain_and_plain_torch_do_the_same_with_the_same_collectives(ranks: RankPool, name: str) -> None:
    result = bench([name], 2, TINY, ranks)
    assert result["layouts"][name]["difference"] <= 1e-5
    assert name in table(result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": [(2.0, 2.001)]}, "differ by"),
        ({"norms": [(1.0, float("nan"))]}, "differ by"),
        ({"plain": EXCHANGE + EXCHANGE}, "collectives"),
        ({"missed": {("tp",): 1}}, "unseen"),
    ],
)
def test_a_difference_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        _judged("tp4", [replace(SOUND, **change)])  # type: ignore[arg-type]


def test_a_noisy_measurement_gives_no_verdict() -> None:
    assert _judged("tp4", [SOUND])["within"] is True
    slow = SOUND.ratios | {"bigtrain": [1.2, 1.2, 1.2]}
    assert _judged("tp4", [replace(SOUND, ratios=slow)])["within"] is False
    noisy = SOUND.ratios | {"a_a": [0.5, 1.0, 1.5]}
    assert _judged("tp4", [replace(SOUND, ratios=noisy)])["within"] is None
