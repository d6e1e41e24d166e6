"""The layout's arithmetic: sizes, places of ranks, refusals that name what would work."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from bigtrain.data.loader import distribute
from bigtrain.models.config import FAMILIES, BlockCosts, ModelConfig, preset
from bigtrain.parallel.config import LayoutConfig, Mesh, balanced

FIVE_AXES = Mesh(pp=2, dp_replicate=3, dp_shard=2, cp=2, tp=2)


def test_dp_shard_takes_the_ranks_that_are_left() -> None:
    assert LayoutConfig(tp=2, dp_replicate=2).mesh(24) == Mesh(dp_replicate=2, dp_shard=6, tp=2)


def test_tp_ranks_are_neighbours_and_every_rank_has_a_place_of_its_own() -> None:
    places = [tuple(FIVE_AXES.coordinates(rank).items()) for rank in range(FIVE_AXES.world_size)]
    assert len(set(places)) == FIVE_AXES.world_size
    assert FIVE_AXES.coordinates(0) | {"tp": 1} == FIVE_AXES.coordinates(1)


def test_ranks_that_differ_in_tp_cp_or_pp_alone_read_the_same_samples() -> None:
    readers: dict[int, set[tuple[int, int]]] = {}
    for rank in range(FIVE_AXES.world_size):
        place = FIVE_AXES.coordinates(rank)
        readers.setdefault(FIVE_AXES.data_parallel_rank(rank), set()).add((place["dp_replicate"], place["dp_shard"]))
    assert sorted(readers) == list(range(FIVE_AXES.data_parallel))
    assert all(len(places) == 1 for places in readers.values())


def test_each_loss_counts_once() -> None:
    counting = [rank for rank in range(FIVE_AXES.world_size) if FIVE_AXES.counts_loss(rank)]
    assert len(counting) == FIVE_AXES.data_parallel * FIVE_AXES.cp
    assert all(FIVE_AXES.coordinates(rank)["pp"] == 1 for rank in counting)


@pytest.mark.parametrize(
    ("keys", "world_size", "message"),
    [
        ({"dp_replicate": 3}, 4, "dp_replicate may be 1, 2, 4"),
        ({"tp": 3}, 4, "tp may be 1, 2, 4"),
        ({"tp": 8, "dp_replicate": 2}, 8, "tp may be 1, 2, 4"),
        ({"dp_shard": 3}, 4, "dp_shard 3 does not make 4 ranks"),
    ],
)
def test_axes_that_do_not_make_the_ranks_are_refused(keys: dict[str, int], world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayoutConfig(**keys).mesh(world_size)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pp_stages_per_rank": 2}, "needs pp 2 or more"),
        ({"pp": 2, "pp_stages_per_rank": 2}, "or pp_schedule to interleaved"),
        ({"pp": 2, "pp_schedule": "interleaved"}, "needs pp_stages_per_rank of 2 or more"),
        ({"pp": 3, "pp_split": [1, 2]}, "names 2 stages, but the layout has 3"),
        ({"pp": 2, "pp_split": [0, 2]}, "greater than or equal to 1"),
    ],
)
def test_a_schedule_that_does_not_fit_the_stages_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayoutConfig(**keys)


def most_expensive(costs: BlockCosts, counts: tuple[int, ...]) -> float:
    stages: list[float] = list(counts)
    stages[0] += costs.before
    stages[-1] += costs.after
    return max(stages)


@pytest.mark.parametrize("blocks", [4, 7, 10])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize(("before", "after"), [(0.0, 0.0), (1.0, 1.0), (0.3, 2.4), (0.0, 9.0)])
def test_no_split_has_a_cheaper_most_expensive_stage(blocks: int, stages: int, before: float, after: float) -> None:
    costs = BlockCosts(blocks, before, after)
    counts = balanced(costs, stages)
    others = [split for split in product(range(1, blocks + 1), repeat=stages) if sum(split) == blocks]
    assert counts in others
    assert most_expensive(costs, counts) == min(most_expensive(costs, split) for split in others)


def test_embedding_and_head_weigh_in_the_split() -> None:
    """Llama 3 8B's head costs about two of its blocks; a small vocabulary costs nothing."""
    assert LayoutConfig(pp=4).split(FAMILIES["llama"](**preset("llama3-8b")).block_costs(128256)) == (7, 9, 9, 7)
    small = FAMILIES["llama"](layers=8, width=256, heads=4, context=64)
    assert LayoutConfig(pp=4).split(small.block_costs(61)) == (2, 2, 2, 2)


def test_the_schedules_get_as_many_micro_batches_as_they_take() -> None:
    """torch's 1F1B wants one a stage at least, the interleaved ones a multiple of the ranks; nobody else wants any."""

    def micro_batches(layout: LayoutConfig, micro_size: int) -> int:
        least, multiple = layout.least_micro_batches, layout.micro_batch_multiple
        return distribute(10, 1, micro_size, least=least, multiple=multiple).n_micro

    assert [micro_batches(LayoutConfig(), size) for size in (10, 2)] == [1, 5]
    assert [micro_batches(LayoutConfig(pp=4), size) for size in (10, 2)] == [4, 5]
    interleaved = LayoutConfig(pp=4, pp_schedule="interleaved", pp_stages_per_rank=2)
    assert [micro_batches(interleaved, size) for size in (10, 2, 1)] == [4, 8, 12]


@pytest.mark.parametrize(
    ("layout", "model", "message"),
    [
        ({"tp": 4}, {}, r"tp 4 does not divide model.kv_heads 2; tp may be 1, 2$"),
        ({"tp": 3}, {}, r"does not divide model.heads 4 and model.kv_heads 2 and model.mlp_width 56; tp may be 1, 2$"),
        ({"tp": 2}, {"context": 9}, r"does not divide model.context 9; tp may be 1, or any .*sequence_parallel: false"),
        ({"tp": 4}, {"kv_heads": 4, "width": 64, "outputs": 5}, r"without one of 5 rows; tp may be 1, 2$"),
        (
            {"cp": 3},
            {},
            r"cp 3 \(ulysses\) cannot divide 4 query and 2 key heads; cp may be 1, 2, 4, "
            r"or with layout.cp_kind: all_gather 1, 2, 3, 4, 6, 12$",
        ),
        (
            {"cp": 8, "cp_kind": "all_gather"},
            {},
            r"cp 8 \(all_gather\) needs model.context 24 to be a multiple of 16; cp may be 1, 2, 3, 4, 6, 12, "
            r"or with layout.cp_kind: ulysses 1, 2, 4$",
        ),
        (
            {"cp": 4, "tp": 2},
            {},
            r"cannot divide 2 query and 1 key heads of a rank under tp 2; cp may be 1, 2, .*all_gather 1, 2, 3, 4, 6",
        ),
        (
            {"cp": 2, "tp": 2},
            {"context": 10},
            r"needs model.context 10 to be a multiple of 4; cp may be 1, or with layout.cp_kind: all_gather 1, 5$",
        ),
    ],
)
def test_what_the_model_cannot_split_is_refused_with_the_sizes_that_would_work(
    layout: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    keys = {"layers": 1, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 56, "context": 24} | model
    outputs = keys.pop("outputs", 61)
    with pytest.raises(ValueError, match=message):
        LayoutConfig(**layout).check(FAMILIES["llama"](**keys), outputs)


@pytest.mark.parametrize(
    ("axis", "message"), [("tp", "no tensor plan"), ("cp", "not support context parallelism: use cp 1")]
)
def test_a_family_without_a_plan_is_refused(axis: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayoutConfig(**{axis: 2}).check(FAMILIES["vit"](image_size=8), 10)


def test_the_sizes_that_are_named_are_those_that_are_not_refused() -> None:
    model = FAMILIES["llama"](layers=1, width=48, heads=12, kv_heads=4, mlp_width=56, context=24)
    for keys, named in (
        ({}, [1, 2, 4, 12]),
        ({"cp_kind": "all_gather"}, [1, 2, 3, 4, 6, 12]),
        ({"tp": 2}, [1, 2, 6]),
        ({"tp": 4, "cp_kind": "all_gather"}, [1, 2, 3, 6]),
        ({"tp": 4, "cp_kind": "all_gather", "sequence_parallel": False}, [1, 2, 3, 4, 6, 12]),
    ):
        fits = [cp for cp in range(1, 25) if _fits(LayoutConfig(cp=cp, **keys), model)]
        assert fits == named
        with pytest.raises(ValueError, match=f"cp may be {', '.join(map(str, named))}, or"):
            LayoutConfig(cp=24, **keys).check(model, 61)


def _fits(layout: LayoutConfig, model: ModelConfig) -> bool:
    try:
        layout.check(model, 61)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"pp": 8}, r"makes 8 stages of 6 blocks; with 1 for each rank, pp may be 1, 2, 3, 4, 5, 6$"),
        (
            {"pp": 4, "pp_schedule": "interleaved", "pp_stages_per_rank": 2},
            r"makes 8 stages of 6 blocks; with 2 for each rank, pp may be 1, 2, 3$",
        ),
        ({"pp": 2, "pp_split": [2, 3]}, r"adds up to 5 blocks, but the model has 6; auto makes it \[3, 3\]"),
        ({"pp_split": [6]}, "has no meaning with pp 1"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_what_would_work(layout: dict[str, Any], message: str) -> None:
    model = FAMILIES["llama"](layers=6, width=256, heads=4, context=24)
    with pytest.raises(ValueError, match=message):
        LayoutConfig(**layout).check(model, 61)


def test_a_family_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be split into stages: use pp 1"):
        LayoutConfig(pp=2).check(FAMILIES["vit"](image_size=8), 10)


def test_what_fits_is_not_refused() -> None:
    model = FAMILIES["llama"](layers=1, width=32, heads=4, kv_heads=2, mlp_width=56, context=9)
    LayoutConfig(tp=2, sequence_parallel=False).check(model, 61)
    LayoutConfig().check(FAMILIES["vit"](image_size=8), 10)
