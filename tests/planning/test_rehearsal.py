"""A rehearsal does what real ranks do: the same collectives and bytes; and it finds what the plain check cannot."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.tensor import DTensor, Replicate, Shard

from bigtrain.config import UserError
from bigtrain.engines.fsdp.engine import FSDPEngine
from bigtrain.models.families.llama import Config as Llama
from bigtrain.planning.rehearsal import rehearsal_text, rehearse
from bigtrain.planning.rehearsal.checkpoint import cover_fault
from bigtrain.planning.rehearsal.memory import TrackedMemory
from bigtrain.run import load_config
from bigtrain.testing.equivalence import How, What
from bigtrain.testing.ranks import RankPool
from tests.bench.plan_rehearsals import measured, role_of, seen_on

RUN = """
name: rehearsed
model: {arch: llama, layers: 2, width: 32, heads: 8, kv_heads: 4, mlp_width: 56, context: 24}
data: {train: shards}
batch: {size: 8}
duration: 10 steps
layout: {micro_size: 2}
"""
VOCABULARY = 61


def run(tmp_path: Path, *overrides: str) -> Any:
    file = tmp_path / "run.yaml"
    file.write_text(RUN)
    return load_config(file, list(overrides))


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "dp4 in bf16": (4, ["precision=bf16", "engine.recompute=full"]),
    "tp2 x hsdp2": (8, ["layout.tp=2", "layout.dp_replicate=2", "model.tied=true"]),
    "tp2 x pp2 x cp2 x dp2": (16, ["layout.tp=2", "layout.pp=2", "layout.cp=2", "engine.recompute=selective"]),
    "tied over pp4, 512 ranks": (512, ["layout.pp=4", "model.layers=4", "model.tied=true", "batch.size=1024"]),
    "zero bubble": (4, ["layout.pp=2", "layout.pp_schedule=zero_bubble", "model.dropout=0.1"]),
}


EACH_ONCE = ("dp4 in bf16",)
"""The fast tier."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in EACH_ONCE else pytest.mark.slow) for name in LAYOUTS]
)
def test_a_rehearsal_holds_and_exchanges_what_the_formulas_say(tmp_path: Path, name: str) -> None:
    gpus, overrides = LAYOUTS[name]
    document = rehearse(run(tmp_path, *overrides), VOCABULARY, gpus)
    assert document["faults"] == []
    assert not dist.is_initialized()
    stages = document["mesh"]["pp"]
    assert [row["stage"] for row in document["ranks"]] == sorted({0, stages // 2, stages - 1})
    for row in document["ranks"]:
        kinds = {kind: one["rehearsed"] for kind, one in row["memory"].items()}
        assert sum(kinds.values()) == 2 * kinds["total"]
        assert kinds["activations"] > 0
        assert gpus == 1 or row["collectives"]
    assert "no faults" in rehearsal_text(document)


@pytest.mark.slow
def test_ranks_that_share_a_large_vocabulary_sum_chunk_by_chunk(tmp_path: Path) -> None:
    document = rehearse(run(tmp_path, "layout.tp=2", "model.context=512"), 70_000, 4)
    assert document["faults"] == []
    (row,) = document["ranks"]
    sums = [one for one in row["collectives"] if one["kind"] == "all_reduce" and one["axes"] == ["tp"]]
    assert len(sums) >= 4, "highest logits and sums, of whole chunks and of the rest"


CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "large").glob("*.yaml"))
IN_CI = "llama-1b-8"


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, id=file.stem, marks=pytest.mark.slow if file.stem == IN_CI else pytest.mark.exhaustive)
        for file in CONFIGS
    ],
)
def test_the_large_configs_start(file: Path) -> None:
    config = load_config(file)
    document = rehearse(config, 128_256, config.job.nodes * int(config.job.procs_per_node))
    assert document["faults"] == []


# What it finds


def test_a_size_that_does_not_divide_is_found(tmp_path: Path) -> None:
    class Boasting(Llama):
        """A family that promises any tensor parallelism."""

        def tensor_parallel_sizes(self) -> dict[str, int]:
            return {"heads": 1 << 10}

    config = run(tmp_path, "layout.tp=8")
    config = config.model_copy(update={"model": Boasting(**{**config.model.plain(), "kv_heads": 2})})
    document = rehearse(config, VOCABULARY, 16)
    assert document["faults"]
    assert document["faults"][0].startswith("rank 0: ")


@pytest.mark.slow
def test_a_stage_without_layers_is_found(tmp_path: Path) -> None:
    def without_layers(engine: FSDPEngine) -> None:
        for stage in engine.model:
            stage.blocks = list

    document = rehearse(run(tmp_path, "layout.pp=2"), VOCABULARY, 4, plant=without_layers)
    assert any("a stage has no layers" in line for line in document["faults"])


@pytest.mark.slow
def test_a_collective_on_the_wrong_group_is_found(tmp_path: Path) -> None:
    def sum_over_others(engine: FSDPEngine) -> None:
        assert engine._mesh is not None
        engine.reducer.reduce = _reduce_over(engine, engine._mesh["tp"].get_group())  # type: ignore[method-assign]

    document = rehearse(run(tmp_path, "layout.tp=2"), VOCABULARY, 8, plant=sum_over_others)
    assert any("all_reduce over tp of 40 bytes: 1 times, but the formula says 0" in line for line in document["faults"])


def _reduce_over(engine: FSDPEngine, group: Any) -> Any:
    reduce, all_reduce = engine.reducer.reduce, dist.all_reduce

    def over(*arguments: Any) -> Any:
        with patch.object(dist, "all_reduce", lambda vector: all_reduce(vector, group=group)):
            return reduce(*arguments)

    return over


def test_overlapping_shards_of_a_checkpoint_are_found(tmp_path: Path) -> None:
    chunks_of = DTensor.__create_chunk_list__

    def a_row_early(tensor: DTensor) -> list[ChunkStorageMetadata]:
        (chunk,) = chunks_of(tensor)
        row, *others = chunk.offsets
        return [ChunkStorageMetadata(torch.Size([max(0, row - 1), *others]), chunk.sizes)]

    with patch.object(DTensor, "__create_chunk_list__", a_row_early):
        document = rehearse(run(tmp_path), VOCABULARY, 4)
    assert any("model.embedding.weight: parts of the ranks overlap from [15, 0]" in line for line in document["faults"])


@pytest.mark.slow
def test_a_part_that_a_rank_does_not_hold_is_found(tmp_path: Path) -> None:
    def forget_tensor_parallelism(engine: FSDPEngine) -> None:
        state_of = engine.state

        def state() -> dict[str, torch.Tensor]:
            state = state_of()
            whole: Any = state["model.embedding.weight"]
            wrong = DTensor.from_local(
                whole.to_local(),
                whole.device_mesh,
                [Shard(0), Replicate()],
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )
            return {**state, "model.embedding.weight": wrong}

        engine.state = state  # type: ignore[method-assign]

    document = rehearse(run(tmp_path, "layout.tp=2"), VOCABULARY, 4, plant=forget_tensor_parallelism)
    assert any("embedding.weight: this rank holds" in line for line in document["faults"]), document["faults"]


def test_parts_must_cover_a_tensor_once() -> None:
    halves = {((0, 0), (2, 3)), ((2, 0), (2, 3))}
    assert cover_fault((4, 3), halves) is None
    assert "overlap from [1, 0]" in str(cover_fault((4, 3), halves | {((1, 0), (1, 1))}))
    assert "no rank has the part from [2, 0]" in str(cover_fault((4, 3), {((0, 0), (2, 3))}))
    assert "outside" in str(cover_fault((3, 3), halves))


def test_what_cannot_be_rehearsed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="deepspeed"):
        rehearse(run(tmp_path, "engine.name=deepspeed"), VOCABULARY, 4)
    with pytest.raises(UserError, match="does not make 6 ranks"):
        rehearse(run(tmp_path, "layout.tp=4"), VOCABULARY, 6)


# Real ranks


_LLAMA = {"arch": "llama", "layers": 4, "width": 32, "heads": 8, "kv_heads": 4, "mlp_width": 56}
REAL = {
    "dp2": (What(_LLAMA), How(2)),
    "tp2 x dp2": (What(_LLAMA, precision="bf16"), How(4, {"tp": 2})),
    "cp2 x hsdp2": (What(_LLAMA), How(4, {"cp": 2, "dp_replicate": 2}, {"recompute": "full"})),
    "tp2 x pp2": (What({**_LLAMA, "tied": True}), How(4, {"tp": 2, "pp": 2}, micro_size=1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_ranks_exchange_what_was_rehearsed(ranks: RankPool, name: str) -> None:
    what, how = REAL[name]
    for rank, (collectives, peak, held) in enumerate(ranks.run(measured, what, how, ranks=how.ranks)):
        seen = seen_on(role_of(what, how), rank)
        assert Counter(seen.collectives) == collectives, rank
        assert seen.held == held, rank
        assert seen.peak["total"] == pytest.approx(peak["total"], rel=0.02), rank


def test_memory_is_counted_until_it_is_freed() -> None:
    with TrackedMemory() as memory:
        kept = torch.zeros(100)
        memory.begin()
        large = torch.zeros(1000) + 1
        del large
        small = torch.zeros(10)
    assert memory.peak()["total"] == 4 * (100 + 2 * 1000)
    del kept, small
