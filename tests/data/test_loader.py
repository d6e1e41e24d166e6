from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.config import CorruptionError
from bigtrain.data.index import ShardIndex
from bigtrain.data.loader import EvaluationLoader, Loader, StepBatch, distribute
from bigtrain.data.order.sample_order import SampleOrder, sequence_keys

CONTEXT = 16


def loader(index: ShardIndex, context: int = CONTEXT, **arguments: Any) -> Loader:
    order = SampleOrder(5, index.fingerprint, index.sequence_counts(context), window=2)
    return Loader(index, order, **{"batch_size": 10, "context": context, "seed": 5, **arguments})


def joined(batches: list[StepBatch], name: str) -> np.ndarray:
    return np.concatenate([micro[name] for batch in batches for micro in batch.micro_batches])


@pytest.mark.parametrize("batch_size", [1, 7, 10, 12, 64])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("micro_size", [1, 3, 100])
def test_every_slot_lies_on_one_rank_and_no_micro_batch_is_too_large(
    batch_size: int, ranks: int, micro_size: int
) -> None:
    shape = distribute(batch_size, ranks, micro_size)
    slots = [slot for rank in range(ranks) for slot in shape.slots(rank)]
    assert slots == list(range(batch_size + shape.fillers))
    assert shape.micro_batch <= micro_size
    assert shape.per_rank - -(-batch_size // ranks) < shape.n_micro


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize(("least", "multiple"), [(3, 1), (4, 4), (1, 2)])
def test_a_requested_number_of_micro_batches_is_met(batch_size: int, least: int, multiple: int) -> None:
    shape = distribute(batch_size, 2, 3, least=least, multiple=multiple)
    assert shape.n_micro >= least
    assert shape.n_micro % multiple == 0
    assert shape.micro_batch <= 3
    assert [slot for rank in range(2) for slot in shape.slots(rank)] == list(range(batch_size + shape.fillers))


def test_distribution_is_the_documented_one() -> None:
    shape = distribute(10, 4, 2)
    assert (shape.n_micro, shape.micro_batch, shape.per_rank, shape.fillers) == (2, 2, 4, 6)
    with pytest.raises(ValueError, match="at least 1"):
        distribute(10, 0, 1)


def test_four_two_one_and_three_ranks_consume_the_same_samples(packed: ShardIndex) -> None:
    """A run that goes on at another world size: no sample twice, none lost, the same keys."""
    reference = loader(packed, log_samples=True)
    epoch = sum(packed.sequence_counts(CONTEXT))
    steps = range(epoch // 10)
    seen: Counter[str] = Counter()
    for step in steps:
        ranks = (4, 2, 1, 3)[step * 4 // len(steps)]
        parts = [
            loader(packed, dp_rank=rank, dp_size=ranks, micro_size=2, log_samples=True).batch(step)
            for rank in range(ranks)
        ]
        whole = reference.batch(step)
        for name in ("tokens", "targets", "weights", "keys"):
            assert np.array_equal(joined(parts, name)[:10], joined([whole], name))
        assert joined(parts, "weights")[10:].sum() == 0
        assert all(part.sample_ids == whole.sample_ids for part in parts)
        seen.update(whole.sample_ids)
    assert len(seen) == len(steps) * 10
    assert set(seen.values()) == {1}


def test_keys_are_those_of_seed_step_and_slot(packed: ShardIndex) -> None:
    batch = loader(packed, dp_rank=1, dp_size=2, micro_size=2).batch(3)
    assert joined([batch], "keys").tolist() == sequence_keys(5, 3, np.arange(6, 12)).tolist()


def test_a_batch_depends_on_its_step_alone(packed: ShardIndex) -> None:
    with loader(packed) as fresh, loader(packed) as running:
        from_start = [batch for batch, _ in zip(running.batches(0), range(12), strict=False)]
        resumed = [batch for batch, _ in zip(fresh.batches(9), range(3), strict=False)]
    assert [batch.step for batch in resumed] == [9, 10, 11]
    assert np.array_equal(joined(from_start[9:], "tokens"), joined(resumed, "tokens"))


def test_the_position_is_the_step_and_the_count_consumed(packed: ShardIndex) -> None:
    assert loader(packed).position(7) == {"step": 7, "drawn": {"train": 70}}


def test_an_error_of_the_thread_reaches_the_consumer_and_close_ends_the_thread(packed: ShardIndex) -> None:
    before = threading.active_count()
    for shard in packed.shards:
        path = packed.directory / shard.url
        path.write_bytes(path.read_bytes()[:-512])
    with loader(packed) as broken:
        batches = broken.batches()
        for _ in range(2):
            with pytest.raises(CorruptionError, match="but the index says"):
                next(batches)
    assert threading.active_count() == before


def test_closing_with_batches_waiting_ends_the_thread(packed: ShardIndex) -> None:
    before = threading.active_count()
    source = loader(packed, prefetch=3)
    batches = source.batches()
    next(batches)
    assert source.data_wait_s > 0
    source.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(batches)


def test_an_order_of_another_context_is_refused(packed: ShardIndex) -> None:
    order = SampleOrder(5, packed.fingerprint, packed.sequence_counts(8), window=2)
    with pytest.raises(ValueError, match="another context"):
        Loader(packed, order, batch_size=1, context=16)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_evaluation_covers_the_data_once_in_order_at_any_world_size(packed: ShardIndex, ranks: int) -> None:
    parts = []
    for rank in range(ranks):
        with EvaluationLoader(
            packed.directory, batches=10_000, batch_size=10, context=CONTEXT, dp_rank=rank, dp_size=ranks, micro_size=4
        ) as evaluation:
            first, second = list(evaluation), list(evaluation)
            assert len(first) == len(evaluation)
            assert np.array_equal(joined(first, "tokens"), joined(second, "tokens"))
            parts.append(first)
    total = sum(float(joined(part, "weights").sum()) for part in parts)
    assert total == sum(shard.tokens - 1 for shard in packed.shards)
    assert len({len(part) for part in parts}) == 1


def test_an_evaluation_stops_at_the_requested_batches(packed: ShardIndex) -> None:
    with EvaluationLoader(packed, batches=3, batch_size=4, context=CONTEXT) as evaluation:
        assert [batch.step for batch in evaluation] == [0, 1, 2]


@pytest.mark.parametrize(("batch_size", "ranks"), [(4, 1), (5, 2), (100, 3)])
def test_an_evaluation_of_so_many_sequences_is_the_same_at_any_batch_size(
    packed: ShardIndex, batch_size: int, ranks: int
) -> None:
    """A ladder's sizes have batches of their own, and are held against the same tokens all the same."""
    with EvaluationLoader(packed, batches=10_000, batch_size=1, context=CONTEXT) as whole:
        first = [batch for batch, _ in zip(whole, range(17), strict=False)]
    weight = 0.0
    for rank in range(ranks):
        reading = {"batch_size": batch_size, "dp_rank": rank, "dp_size": ranks}
        with EvaluationLoader(packed, batches=1, sequences=17, context=CONTEXT, **reading) as evaluation:
            weight += float(joined(list(evaluation), "weights").sum())
    assert weight == float(joined(first, "weights").sum())


def test_the_directory_of_a_string_path_is_loaded(packed: ShardIndex, tmp_path: Path) -> None:
    order = SampleOrder(5, packed.fingerprint, packed.sequence_counts(4), window=2)
    assert len(Loader(str(packed.directory), order, batch_size=2, context=4).batch(0).micro_batches) == 1
