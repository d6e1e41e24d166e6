from __future__ import annotations

import numpy as np
import pytest

from bigtrain.config import UserError
from bigtrain.data.order.sample_order import FixedOrder, SampleOrder, hash_words, permutation, sequence_keys, splitmix64

CASES = [([5, 3, 9, 1, 7], 2), ([4], 8), ([1, 1, 1], 1), ([0, 6, 0, 2, 11, 3, 8], 3)]


def pairs(order: SampleOrder, start: int, count: int) -> list[tuple[int, int]]:
    draw = order.take(start, count)
    return list(zip(draw.shard.tolist(), draw.sequence.tolist(), strict=True))


@pytest.mark.parametrize(("counts", "window"), CASES)
def test_every_epoch_visits_each_sequence_exactly_once(counts: list[int], window: int) -> None:
    order = SampleOrder(3, "data", counts, window)
    expected = sorted((shard, index) for shard, count in enumerate(counts) for index in range(count))
    size = order.sequences_per_epoch
    for epoch in range(4):
        assert sorted(pairs(order, epoch * size, size)) == expected
        assert set(order.take(epoch * size, size).epoch.tolist()) == {epoch}


@pytest.mark.parametrize(("counts", "window"), CASES)
def test_any_division_into_takes_gives_the_same_order(counts: list[int], window: int) -> None:
    whole = pairs(SampleOrder(3, "data", counts, window), 0, 60)
    for step in (1, 4, 7):
        order = SampleOrder(3, "data", counts, window)
        starts = list(range(0, 60, step))
        for start in reversed(starts):
            assert pairs(order, start, min(step, 60 - start)) == whole[start : start + step]


def test_a_shard_is_touched_inside_one_window_an_epoch() -> None:
    counts, window = [4] * 10, 3
    order = SampleOrder(1, "data", counts, window)
    for epoch in range(3):
        shards = order.take(epoch * 40, 40).shard
        for start in range(0, 40, 4 * window):
            assert len(set(shards[start : start + 4 * window].tolist())) <= window
        for shard in range(10):
            places = np.flatnonzero(shards == shard)
            assert len(set((places // (4 * window)).tolist())) == 1


def test_sequences_of_a_window_are_mixed() -> None:
    shards = SampleOrder(1, "data", [100] * 4, 4).take(0, 40).shard
    assert len(set(shards.tolist())) == 4


def test_seed_data_and_epoch_each_change_the_order() -> None:
    base = pairs(SampleOrder(1, "data", [50, 50], 2), 0, 100)
    assert pairs(SampleOrder(2, "data", [50, 50], 2), 0, 100) != base
    assert pairs(SampleOrder(1, "other", [50, 50], 2), 0, 100) != base
    assert pairs(SampleOrder(1, "data", [50, 50], 2), 100, 100) != base
    assert pairs(SampleOrder(1, "data", [50, 50], 2), 0, 100) == base


def test_a_single_shard_has_another_order_in_each_epoch() -> None:
    """Where nothing but the sequences of one window can be in another order."""
    order = SampleOrder(5, "data", [40], window=1)
    first, second = (order.take(start, 40).sequence.tolist() for start in (0, 40))
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second


def test_the_order_is_the_one_of_the_first_release() -> None:
    # Runs resume across versions: these numbers must never change.
    assert splitmix64(0).tolist() == [0xE220A8397B1DCDAF]
    assert permutation(6, 1, 2).tolist() == [0, 2, 1, 5, 3, 4]
    assert pairs(SampleOrder(1337, "sha256:00", [3, 2, 4], 2), 0, 9) == [
        (0, 2),
        (2, 3),
        (0, 1),
        (2, 0),
        (0, 0),
        (2, 2),
        (2, 1),
        (1, 0),
        (1, 1),
    ]


def test_permutation_is_close_to_uniform() -> None:
    firsts = np.bincount([int(permutation(8, key)[0]) for key in range(4000)], minlength=8)
    # 4000 draws over 8 places: 500 +- 21; six deviations.
    assert np.abs(firsts - 500).max() < 130


def test_fixed_order_is_the_order_of_the_shards_and_ends_with_them() -> None:
    order = FixedOrder([2, 0, 3])
    draw = order.take(1, 10)
    assert draw.shard.tolist() == [0, 2, 2, 2]
    assert draw.sequence.tolist() == [1, 0, 1, 2]
    assert len(order.take(5, 3).shard) == 0


def test_data_without_a_sequence_is_refused() -> None:
    with pytest.raises(UserError, match="no sequence"):
        SampleOrder(1, "data", [0, 0], 2)


def test_keys_differ_by_seed_step_and_slot() -> None:
    keys = [sequence_keys(seed, step, np.arange(50)) for seed in (1, 2) for step in (0, 1, 2)]
    assert len(np.unique(np.concatenate(keys))) == 300
    assert keys[0].dtype == np.int64
    assert hash_words(-1).tolist() == hash_words(2**64 - 1).tolist()


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_the_shards_that_come_next_are_known_and_include_those_of_the_batch(batch: int) -> None:
    counts = [3, 0, 5, 1, 4, 2, 6]
    for order in (SampleOrder(1, "x", counts, 2), FixedOrder(counts)):
        for start in range(0, 21 - batch if isinstance(order, FixedOrder) else 60, batch):
            drawn = set(order.take(start, batch).shard.tolist())
            upcoming = order.upcoming(start, batch).tolist()
            assert drawn <= set(upcoming)
            following = order.take(start, batch + 1).shard.tolist()
            assert set(following) <= set(upcoming)
