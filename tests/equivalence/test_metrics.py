"""Metrics that a user's model records equal one process's at every layout, each counted once, in no other message."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bigtrain.testing.collectives import RecordedCollectives
from bigtrain.testing.equivalence import LR, Deviations, How, What, build, deviations, micro_batches, record
from bigtrain.testing.ranks import RankPool

MODEL = {"layers": 4, "width": 32, "heads": 8, "kv_heads": 4, "mlp_width": 56, "tied": True, "dropout": 0.1}
WHAT = What(
    {"arch": "recording-llama", **MODEL}, documents=True, sources=3, steps=2,
    plugin=str(Path(__file__).with_name("recording_model.py")),
)  # fmt: skip
NAMES = {"stream_max", "stream_min", "even_tokens", "hidden_square", "hidden_norm", "counted_tokens"}
INTERLEAVED = {"pp": 2, "pp_schedule": "interleaved", "pp_stages_per_rank": 2}


def zero(ranks: int, stage: int, recompute: str = "none", **layout: object) -> How:
    return How(ranks, layout, {"name": "deepspeed", "zero": stage, "recompute": recompute})


LAYOUTS = {
    "dp2 with recompute": How(2, {}, {"recompute": "full"}),
    "hsdp2x2": How(4, {"dp_replicate": 2}),
    "tp2": How(2, {"tp": 2}),
    "tp2 without sequence parallel": How(2, {"tp": 2, "sequence_parallel": False}),
    "tp2 with the head gathered": How(2, {"tp": 2, "loss_parallel": False}),
    "tp2 x dp2 with selective recompute": How(4, {"tp": 2}, {"recompute": "selective"}),
    "cp2 ulysses": How(2, {"cp": 2}),
    "cp2 all_gather": How(2, {"cp": 2, "cp_kind": "all_gather"}),
    "tp2 x cp2 all_gather": How(4, {"tp": 2, "cp": 2, "cp_kind": "all_gather"}),
    "pp2 with recompute": How(2, {"pp": 2}, {"recompute": "full"}),
    "pp2 interleaved": How(2, INTERLEAVED),
    "pp2 zero bubble": How(2, {"pp": 2, "pp_schedule": "zero_bubble"}),
    "tp2 x pp2": How(4, {"tp": 2, "pp": 2}),
    "cp2 ulysses x pp2": How(4, {"cp": 2, "pp": 2}),
    "compiled": How(1, {}, {"compile": True}),
    "ZeRO 0, tp2": zero(2, 0, tp=2),
    "ZeRO 1, pp2": zero(2, 1, pp=2),
    "ZeRO 2, dp2 with recompute": zero(2, 2, recompute="full"),
    "ZeRO 3, tp2 x dp2": zero(4, 3, tp=2),
}
FAST = ("tp2", "pp2 with recompute", "ZeRO 1, pp2")
CI = (
    "dp2 with recompute",
    "cp2 all_gather",
    "hsdp2x2",
    "tp2 with the head gathered",
    "tp2 without sequence parallel",
    "pp2 interleaved",
    "tp2 x pp2",
    "ZeRO 3, tp2 x dp2",
    "compiled",
)


@pytest.fixture(scope="module")
def recorded(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process's record."""
    place = tmp_path_factory.mktemp("recorded")
    (numbers,) = ranks.run(record, WHAT, place, ranks=1)
    assert numbers[0].metrics.keys() == NAMES
    assert all(value.result is not None for value in numbers[0].metrics.values())
    assert numbers[0].metrics["counted_tokens"].result == numbers[0].weight
    return place


def marks(layout: str) -> list[pytest.MarkDecorator]:
    return [] if layout in FAST else [pytest.mark.slow if layout in CI else pytest.mark.exhaustive]


@pytest.mark.parametrize("layout", [pytest.param(layout, marks=marks(layout)) for layout in LAYOUTS])
def test_named_metrics_equal_one_processs(ranks: RankPool, recorded: Path, layout: str) -> None:
    how = LAYOUTS[layout]
    found = ranks.run(deviations, WHAT, how, recorded, ranks=how.ranks)
    assert not found[0].faults()
    assert all(other == found[0] for other in found), "the ranks disagree"


def copies_count(engine: object) -> None:
    engine.reducer.recorder._tensor_rank = 0  # type: ignore[attr-defined]


def recomputation_counts(engine: object) -> None:
    record = engine.reducer.recorder.record  # type: ignore[attr-defined]

    def twice(*arguments: object) -> None:
        record(*arguments)
        record(*arguments)

    engine.reducer.recorder.record = twice  # type: ignore[attr-defined]


FAULTS: dict[str, Callable[[object], None]] = {"tp2": copies_count, "dp2 with recompute": recomputation_counts}


def deviations_with(layout: str, what: What, directory: Path) -> Deviations:
    return deviations(what, LAYOUTS[layout], directory, FAULTS[layout])


@pytest.mark.parametrize("layout", FAULTS)
def test_the_comparison_finds_what_is_counted_twice(ranks: RankPool, recorded: Path, layout: str) -> None:
    found = ranks.run(deviations_with, layout, WHAT, recorded, ranks=LAYOUTS[layout].ranks)[0]
    assert any(line.startswith("metrics") for line in found.faults()), found.faults()


def collectives(what: What, how: How) -> Counter[tuple[str, tuple[str, ...]]]:
    """Of the second step of this rank, by kind and axes."""
    engine = build(what, how)
    place = engine.data_parallel_rank, engine.data_parallel_size
    for step in range(2):
        batch = micro_batches(what, how, step, *place)
        with RecordedCollectives(_sizes(how)) as seen:
            engine.train_step(step, batch, LR)
    engine.close()
    assert not seen.missed
    return Counter((one.kind, one.axes) for one in seen)


def _sizes(how: How) -> object:
    from bigtrain.parallel.config import LayoutConfig

    return LayoutConfig(**how.layout).mesh(how.ranks)


@pytest.mark.parametrize(
    "layout",
    [*(pytest.param(one, marks=pytest.mark.slow) for one in ("dp2 with recompute", "tp2 x pp2")), "ZeRO 1, pp2"],
)
def test_recorded_metrics_add_no_collective(ranks: RankPool, layout: str) -> None:
    how = LAYOUTS[layout]
    plain = replace(WHAT, model={"arch": "llama", **MODEL}, plugin=None)
    expected = ranks.run(collectives, plain, how, ranks=how.ranks)
    assert ranks.run(collectives, WHAT, how, ranks=how.ranks) == expected
