"""The measurement of an order's shuffling, on orders whose answer is known."""

from __future__ import annotations

import pytest

from bigtrain.data.order.mixture import MixedOrder
from bigtrain.data.order.sample_order import FixedOrder, SampleOrder
from bigtrain.data.order.shuffle_quality import shuffle_quality


def test_an_order_that_shuffles_nothing_and_one_that_shuffles_all() -> None:
    counts = [50] * 40
    plain = shuffle_quality(FixedOrder(counts), 20).measured
    assert (plain.travel_median, plain.same_batch) == (1, pytest.approx(0.95, abs=0.02))
    assert plain.shards_per_batch <= 2
    whole = shuffle_quality(SampleOrder(1, "x", counts, 40), 20)
    # Two random places of n are (1 - sqrt(1/2)) n apart in the median.
    for mixing in (whole.measured, whole.permutation):
        assert mixing.travel_median == pytest.approx(0.293 * 2000, rel=0.1)
        assert mixing.same_batch == pytest.approx(19 / 1999, abs=0.008)
    assert whole.measured.shards_per_batch == pytest.approx(whole.permutation.shards_per_batch, rel=0.05)


def test_neighbours_travel_as_far_as_the_window_reaches() -> None:
    found = shuffle_quality(SampleOrder(1, "x", [50] * 40, 8), 20).measured
    assert found.travel_median == pytest.approx(0.293 * 400, rel=0.1)


def test_the_shares_of_a_mixture_vary_less_than_chance_would() -> None:
    orders = [SampleOrder(1, name, [60] * 10, 4) for name in "ab"]
    found = shuffle_quality(MixedOrder(orders, [(0, [3.0, 1.0])]), 32, [0] * 10 + [1] * 10)
    assert found.measured.source_deviation < 1
    assert found.permutation.source_deviation > 2
