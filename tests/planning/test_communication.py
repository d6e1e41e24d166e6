"""What a step exchanges is what the formula says: every collective, by kind, axes and bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch.distributed as dist

from bigtrain.engines.fsdp.config import FSDPConfig
from bigtrain.models.config import FAMILIES
from bigtrain.parallel.config import LayoutConfig, Mesh
from bigtrain.planning.communication import Collective, Passes, communication, total
from bigtrain.testing.collectives import RecordedCollectives
from bigtrain.testing.equivalence import LR, How, What, build, micro_batches
from bigtrain.testing.ranks import RankPool

_LLAMA = {"arch": "llama", "layers": 4, "width": 32, "heads": 8, "kv_heads": 4, "mlp_width": 56}
LLAMA, BF16 = What(_LLAMA), What(_LLAMA, precision="bf16")
FEW_KEYS = What({**_LLAMA, "kv_heads": 2})
TIED = What({**_LLAMA, "tied": True, "qk_norm": True, "dropout": 0.1})
GPT2 = What({"arch": "gpt2", "layers": 4, "width": 32, "heads": 4})
ONE_BLOCK = What({"arch": "gpt2", "layers": 1, "width": 32, "heads": 4})

FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}
TP: dict[str, Any] = {"tp": 2}
WHOLE: dict[str, Any] = {**TP, "sequence_parallel": False}
GATHERED: dict[str, Any] = {**TP, "loss_parallel": False}
ULYSSES: dict[str, Any] = {"cp": 2}
ALL_GATHER: dict[str, Any] = {"cp": 2, "cp_kind": "all_gather"}
PP: dict[str, Any] = {"pp": 2}
CASES = {
    "one process": (LLAMA, How(1)),
    "dp2 in one pass": (TIED, How(2, micro_size=None)),
    "dp2 with one block": (ONE_BLOCK, How(2)),
    "dp2 with recompute": (LLAMA, How(2, {}, FULL)),
    "dp4": (BF16, How(4)),
    "replicas": (TIED, How(2, {"dp_replicate": 2})),
    "hsdp2x2": (LLAMA, How(4, {"dp_replicate": 2})),
    "tp2": (BF16, How(2, TP)),
    "tp2 with recompute": (LLAMA, How(2, TP, FULL)),
    "tp2 with recompute and dropout": (TIED, How(2, TP, FULL)),
    "tp2 with selective recompute": (TIED, How(2, TP, SELECTIVE)),
    "tp2, compiled": (LLAMA, How(2, TP, {"compile": True})),
    "tp4": (LLAMA, How(4, {"tp": 4})),
    "tp2 without sequence parallel": (GPT2, How(2, WHOLE)),
    "tp2 without sequence parallel, with recompute": (LLAMA, How(2, WHOLE, FULL)),
    "tp2 with the head gathered": (LLAMA, How(2, GATHERED)),
    "tp2 with the head gathered, without sequence parallel": (GPT2, How(2, {**WHOLE, **GATHERED})),
    "tp2 x dp2 with the head gathered": (BF16, How(4, GATHERED)),
    "tp2 x dp2 with selective recompute": (BF16, How(4, TP, SELECTIVE)),
    "tp2 x hsdp2": (TIED, How(4, {**TP, "dp_replicate": 2})),
    "cp2 ulysses": (BF16, How(2, ULYSSES)),
    "cp2 ulysses with selective recompute": (LLAMA, How(2, ULYSSES, SELECTIVE)),
    "cp4 ulysses with fewer key heads": (FEW_KEYS, How(4, {"cp": 4})),
    "cp2 ulysses x dp2, with recompute": (LLAMA, How(4, ULYSSES, FULL)),
    "cp2 all_gather": (GPT2, How(2, ALL_GATHER)),
    "cp2 all_gather with selective recompute": (LLAMA, How(2, ALL_GATHER, SELECTIVE)),
    "cp2 all_gather x hsdp2, with recompute": (TIED, How(4, {**ALL_GATHER, "dp_replicate": 2}, FULL)),
    "tp2 x cp2 ulysses": (LLAMA, How(4, {**TP, **ULYSSES})),
    "tp2 x cp2 all_gather": (BF16, How(4, {**TP, **ALL_GATHER})),
    "pp2": (LLAMA, How(2, PP)),
    "pp2 interleaved": (TIED, How(2, {**PP, "pp_schedule": "interleaved", "pp_stages_per_rank": 2})),
    "pp2 zero bubble": (BF16, How(2, {**PP, "pp_schedule": "zero_bubble"})),
    "pp4": (TIED, How(4, {"pp": 4})),
    "pp2 x dp2": (GPT2, How(4, PP, micro_size=1)),
    "pp2 x hsdp2": (TIED, How(4, {**PP, "dp_replicate": 2}, micro_size=1)),
    "cp2 ulysses x pp2": (LLAMA, How(4, {**ULYSSES, **PP})),
    "tp2 x pp2": (TIED, How(4, {**TP, **PP})),
    "tp2 x pp2 without sequence parallel, with selective recompute": (LLAMA, How(4, {**WHOLE, **PP}, SELECTIVE)),
    "tp2 x pp2 x dp2": (LLAMA, How(8, {**TP, **PP}, micro_size=1)),
}
"""Each technique, and each two that exchange something else together than alone."""
FAST = "tp2 x pp2"
"""The row of the fast tier."""


@dataclass(frozen=True)
class Exchanged:
    """What a rank's step has exchanged, and what it should."""

    measured: Counter[Collective]
    formula: Counter[Collective]
    missed: dict[tuple[str, ...], int] = field(default_factory=dict)


def sizes_of(how: How) -> Mesh:
    return LayoutConfig(**how.layout).mesh(how.ranks)


def give_back_the_last_block(engine: Any) -> None:
    """As FSDP2 would by itself: the backward pass gathers it again at once."""
    _, last = engine.model.blocks()[-1]
    last.set_reshard_after_forward(True)


def exchanged(what: What, how: How, plant: Callable[[Any], None] | None = None) -> Exchanged:
    """The second step of this rank.

    Args:
        plant: Breaks the engine, to see that it shows.
    """
    engine, sizes = build(what, how), sizes_of(how)
    if plant is not None:
        plant(engine)
    place = engine.data_parallel_rank, engine.data_parallel_size
    engine.train_step(0, micro_batches(what, how, 0, *place), LR)
    batches = micro_batches(what, how, 1, *place)
    with RecordedCollectives(sizes) as record:
        engine.train_step(1, batches, LR)
    terms = communication(
        FAMILIES[what.model["arch"]](**what.model, context=what.context),
        what.vocabulary,
        sizes=sizes,
        layout=LayoutConfig(**how.layout),
        engine=FSDPConfig(**how.engine),
        precision=what.precision,
        passes=Passes(len(batches), *batches[0]["tokens"].shape),
        rank=dist.get_rank(),
    )
    engine.close()
    return Exchanged(Counter(record), total(terms), record.missed)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == FAST else pytest.mark.slow) for name in CASES])
def test_a_step_exchanges_what_the_formula_says(ranks: RankPool, name: str) -> None:
    what, how = CASES[name]
    for rank, found in enumerate(ranks.run(exchanged, what, how, ranks=how.ranks)):
        assert found.measured == found.formula, f"rank {rank}:\n{difference(found)}"
        assert not found.missed


@pytest.mark.slow
def test_what_is_gathered_twice_shows(ranks: RankPool) -> None:
    for found in ranks.run(exchanged, LLAMA, How(2), give_back_the_last_block, ranks=2):
        ((again, count),) = (found.measured - found.formula).items()
        assert (again.kind, again.axes) == ("all_gather", ("dp_shard",))
        assert count == 2, "once in each pass"


def difference(found: Exchanged) -> str:
    both = sorted(set(found.measured) | set(found.formula))
    return "\n".join(
        f"{one}: measured {found.measured[one]}, formula {found.formula[one]}"
        for one in both
        if found.measured[one] != found.formula[one]
    )
