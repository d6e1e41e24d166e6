"""Mixtures: exact shares, one order at any world size and from any step, nothing read twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bigtrain.config import UserError
from bigtrain.data.config import DataConfig
from bigtrain.data.index import ShardIndex, load_index
from bigtrain.data.loader import Loader
from bigtrain.data.order.mixture import MAX_PERIOD, MixedOrder, Sources, parts, pattern
from bigtrain.data.order.sample_order import SampleOrder
from bigtrain.data.packing.documents import pack
from bigtrain.data.tokenizers import Tokenizer

CONTEXT, BATCH = 16, 6

weights = st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any)
counts = st.lists(st.integers(1, 7), min_size=1, max_size=4)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[MixedOrder, list[tuple[int, list[float]]], list[int]]:
    """An order, its phases, and how many sequences its sources begin after."""
    sizes = draw(st.lists(counts, min_size=1, max_size=4))
    starts = sorted(draw(st.sets(st.integers(0, 40), max_size=2)) | {draw(st.integers(0, 5))})
    shares = st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes)).filter(any)
    phases = [(start, [float(weight) for weight in draw(shares)]) for start in starts]
    begun = draw(st.lists(st.integers(0, 30), min_size=len(sizes), max_size=len(sizes)))
    orders = [SampleOrder(1, f"data {number}", size, 2) for number, size in enumerate(sizes)]
    return MixedOrder(orders, phases, begun), phases, begun


def drawn_one_by_one(order: MixedOrder, start: int, count: int) -> list[tuple[int, int, int]]:
    draw = order.take(start, count)
    return list(zip(draw.shard.tolist(), draw.sequence.tolist(), draw.epoch.tolist(), strict=True))


@given(weights)
def test_after_any_number_of_sequences_a_source_is_less_than_one_from_its_share(shares: list[int]) -> None:
    whole = parts([float(share) for share in shares])
    dealt = pattern(whole)
    ideal = np.arange(1, len(dealt) + 1)[:, None] * np.asarray(whole) / sum(whole)
    given_out = np.cumsum(dealt[:, None] == np.arange(len(whole)), axis=0)
    assert np.abs(given_out - ideal).max() < 1
    assert given_out[-1].tolist() == list(whole)


def test_weights_that_need_more_than_the_period_are_rounded_and_none_is_lost() -> None:
    assert parts([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert parts([3, 3]) == (1, 1)
    found = parts([1e-9, 1.0, 0.3333333])
    assert sum(found) <= MAX_PERIOD + 1
    assert found[0] == 1
    assert found[2] / sum(found) == pytest.approx(0.25, abs=1e-4)
    with pytest.raises(ValueError, match="no source"):
        parts([0.0])


@given(mixtures(), st.integers(0, 60), st.lists(st.integers(1, 9), max_size=8))
@settings(deadline=None)
def test_any_division_into_takes_gives_the_same_order_and_counts(
    mixture: tuple[MixedOrder, list[tuple[int, list[float]]], list[int]], begin: int, sizes: list[int]
) -> None:
    order, phases, _ = mixture
    start = phases[0][0] + begin
    whole = drawn_one_by_one(order, start, sum(sizes))
    position = start
    for size in sizes:
        assert drawn_one_by_one(order, position, size) == whole[position - start : position - start + size]
        assert set(order.take(position, size).shard.tolist()) <= set(order.upcoming(position, size).tolist())
        assert sum(order.drawn(position + size) - order.drawn(position)) == size
        position += size


@given(mixtures())
@settings(deadline=None)
def test_a_source_goes_on_in_its_own_order_through_all_phases(
    mixture: tuple[MixedOrder, list[tuple[int, list[float]]], list[int]],
) -> None:
    """So nothing is read twice in an epoch, and a resume or a branch reads on where the counts say."""
    order, phases, begun = mixture
    start, count = phases[0][0], 45
    found = order.take(start, count)
    ends = np.cumsum([len(one.counts) for one in order._orders])
    of = np.searchsorted(ends, found.shard, side="right")
    assert order.drawn(start).tolist() == begun
    for source, own in enumerate(order._orders):
        expected = own.take(begun[source], int((of == source).sum()))
        mine = of == source
        assert (found.shard[mine] - order._first_shards[source]).tolist() == expected.shard.tolist()
        assert found.sequence[mine].tolist() == expected.sequence.tolist()
        assert found.epoch[mine].tolist() == expected.epoch.tolist()
    for place, (first, shares) in enumerate(phases):
        last = phases[place + 1][0] if place + 1 < len(phases) else start + count
        for position in range(first, last + 1):
            ideal = (position - first) * np.asarray(shares) / sum(shares)
            assert np.abs(order.drawn(position) - order.drawn(first) - ideal).max() < 1


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Letters and digits, in several shards each."""
    found: dict[str, ShardIndex] = {}
    for name, letters in (("letters", "abcdefgh"), ("digits", "12345")):
        place = tmp_path_factory.mktemp(name)
        lines = [f"{letter * (37 + number)}\n" for number, letter in enumerate(letters * 6)]
        (place / "text.txt").write_text("\n".join(lines))
        pack([place / "text.txt"], place / "out", Tokenizer.open("bytes"), shard_bytes=1 << 12)
        found[name] = load_index(place / "out" / "train")
    return Sources.by_content(found)


def loader(sources: Sources, **arguments: object) -> Loader:
    orders = [SampleOrder(5, index.fingerprint, index.sequence_counts(CONTEXT), 2) for index in sources.indexes]
    shares = {"letters": 3.0, "digits": 1.0}
    first = [shares[name] for name in sources.names]
    order = MixedOrder(orders, [(0, first), (4 * BATCH, first[::-1])])
    return Loader(sources, order, batch_size=BATCH, context=CONTEXT, **arguments)  # type: ignore[arg-type]


def test_four_two_one_and_three_ranks_consume_the_same_mixture(two: Sources) -> None:
    reference = loader(two, log_samples=True)
    seen: Counter[str] = Counter()
    for step in range(12):
        ranks = (4, 2, 1, 3)[step % 4]
        with reference._lock:
            whole = reference.batch(step)
        batches = [
            loader(two, dp_rank=rank, dp_size=ranks, micro_size=2, log_samples=True).batch(step)
            for rank in range(ranks)
        ]
        for name in ("tokens", "targets", "weights", "sources"):
            joined = np.concatenate([micro[name] for batch in batches for micro in batch.micro_batches])
            assert np.array_equal(joined[:BATCH], np.concatenate([micro[name] for micro in whole.micro_batches]))
            assert not joined[BATCH:].any() or name != "sources"
        assert all(batch.sample_ids == whole.sample_ids for batch in batches)
        seen.update(sample.split("/")[0] for sample in whole.sample_ids)
        assert reference.position(step + 1) == {"step": step + 1, "drawn": dict(seen)}


def test_the_source_of_a_sequence_is_the_one_that_its_text_shows(two: Sources) -> None:
    for step in range(6):
        for micro in loader(two).batch(step).micro_batches:
            text_is_digits = [chr(int(row[row > 64].max(initial=48))) < "a" for row in micro["tokens"]]
            column = two.names.index("digits")
            assert micro["sources"][:, column].astype(bool).tolist() == text_is_digits


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "empty"),
        ([{"path": "a"}, {"path": "x/a"}], "name 'a'"),
        ([{"path": "a", "name": "b"}, {"path": "a", "name": "c"}], "two names"),
        ([{"path": "a", "weight": 0}], "no source has a weight"),
        ([{"path": "a", "from_step": 5}], "from step 0 on no source"),
        ([{"path": "a"}, {"path": "a", "weight": 2}], "two weights"),
        ([{"path": "a", "name": "x/y"}], "pattern"),
        ([{"path": "pipe:x"}], "scheme"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused(train: list[dict], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(train=train)


def test_weights_hold_from_their_step_on_and_names_come_from_the_place() -> None:
    config = DataConfig(
        train=[
            {"path": "x/web/train", "weight": 0.7},
            {"path": "s3://b/code", "weight": 0.3},
            {"path": "x/web/train", "weight": 0, "from_step": 10},
            {"path": "books", "weight": "1", "from_step": "1k"},
        ]
    )
    assert config.phases() == [
        (0, {"web": 0.7, "code": 0.3, "books": 0.0}),
        (10, {"web": 0.0, "code": 0.3, "books": 0.0}),
        (1000, {"web": 0.0, "code": 0.3, "books": 1.0}),
    ]
    assert DataConfig.model_validate(config.plain()) == config


def test_the_same_data_under_two_names_is_refused(two: Sources, tmp_path: Path) -> None:
    twice = Sources(("a", "b"), (two.indexes[0], two.indexes[0]))
    with pytest.raises(UserError, match="the same data"):
        twice.require_same_samples()
