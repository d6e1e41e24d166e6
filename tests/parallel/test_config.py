"""The layout's arithmetic: sizes, places of ranks, refusals that name what would work."""

from __future__ import annotations

from typing import Any

import pytest

from bigtrain.models.config import ModelConfig, family
from bigtrain.parallel.config import LayoutConfig, Mesh

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


@pytest.mark.parametrize("axis", ["pp"])
def test_axes_without_a_technique_are_refused(axis: str) -> None:
    with pytest.raises(ValueError, match="it must be 1"):
        LayoutConfig(**{axis: 2})


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
            r"cp 3 \(ulysses\) cannot share out 4 query and 2 key heads; cp may be 1, 2, 4, "
            r"or with layout.cp_kind: all_gather 1, 2, 3, 4, 6, 12$",
        ),
        (
            {"cp": 8, "cp_kind": "all_gather"},
            {},
            r"cp 8 \(all_gather\) wants model.context 24 to be a multiple of 16; cp may be 1, 2, 3, 4, 6, 12, "
            r"or with layout.cp_kind: ulysses 1, 2, 4$",
        ),
        (
            {"cp": 4, "tp": 2},
            {},
            r"share out 2 query and 1 key heads of a rank under tp 2; cp may be 1, 2, .*all_gather 1, 2, 3, 4, 6",
        ),
        (
            {"cp": 2, "tp": 2},
            {"context": 10},
            r"wants model.context 10 to be a multiple of 4; cp may be 1, or with layout.cp_kind: all_gather 1, 5$",
        ),
    ],
)
def test_what_the_model_cannot_split_is_refused_with_the_sizes_that_would_work(
    layout: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    keys = {"layers": 1, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 56, "context": 24} | model
    outputs = keys.pop("outputs", 61)
    with pytest.raises(ValueError, match=message):
        LayoutConfig(**layout).check(family("llama")(**keys), outputs)


@pytest.mark.parametrize(("axis", "message"), [("tp", "no tensor plan"), ("cp", "no plan for it: use cp 1")])
def test_a_family_without_a_plan_is_refused(axis: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayoutConfig(**{axis: 2}).check(family("vit")(image_size=8), 10)


def test_the_sizes_that_are_named_are_those_that_are_not_refused() -> None:
    model = family("llama")(layers=1, width=48, heads=12, kv_heads=4, mlp_width=56, context=24)
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


def test_what_fits_is_not_refused() -> None:
    model = family("llama")(layers=1, width=32, heads=4, kv_heads=2, mlp_width=56, context=9)
    LayoutConfig(tp=2, sequence_parallel=False).check(model, 61)
    LayoutConfig().check(family("vit")(image_size=8), 10)
