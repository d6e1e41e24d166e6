"""The benchmark of a step: both sides do the same work, and the result says what it is worth."""

from __future__ import annotations

import pytest

from bigtrain.testing.bench_train import _check_same, bench, summary, table


def test_a_difference_in_the_work_is_refused() -> None:
    _check_same([2.0, 1.0], [2.0, 1.00001], "fp32")
    with pytest.raises(RuntimeError, match=r"step 1: .* not the same work"):
        _check_same([2.0, 1.0], [2.0, 1.01], "fp32")


def test_the_interval_of_a_median_holds_it_and_narrows_with_more_pairs() -> None:
    few, many = summary([0.9, 1.0, 1.1, 1.2, 1.3]), summary([0.9, 1.0, 1.1, 1.2, 1.3] * 40)
    assert few["median"] == many["median"] == 1.1
    for found in (few, many):
        assert found["interval"][0] <= found["median"] <= found["interval"][1]
    assert many["interval"][1] - many["interval"][0] < few["interval"][1] - few["interval"][0]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.exhaustive)])
def test_both_loops_are_timed_on_the_same_work(precision: str) -> None:
    result = bench(pairs=2, precision=precision, batch=1, clock="cpu")  # type: ignore[arg-type]
    assert result["within"] in (True, False, None)
    assert 0.5 < result["bigtrain"]["median"] < 2
    assert "bare / bare (A/A)" in table(result)
