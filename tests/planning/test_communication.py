"""What a step exchanges is what the formula says: every collective, by kind, axes and bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch.distributed as dist

from bigtrain.engines.config import FSDPConfig
from bigtrain.models.config import family
from bigtrain.parallel.config import LayoutConfig, Mesh
from bigtrain.planning.communication import Collective, Passes, communication, total
from bigtrain.testing.collectives import RecordedCollectives
from bigtrain.testing.equivalence import LR, How, What, build, micro_batches
from bigtrain.testing.ranks import RankPool

LLAMA = {"arch": "llama", "layers": 4, "width": 32, "heads": 8, "kv_heads": 4, "mlp_width": 56}
GPT2 = {"arch": "gpt2", "layers": 4, "width": 32, "heads": 4}
MODELS = {
    "llama": What(LLAMA),
    "llama tied with qk norms and dropout": What({**LLAMA, "tied": True, "qk_norm": True, "dropout": 0.1}),
    "gpt2": What({**GPT2, "layers": 1}),
    "llama in bf16": What(LLAMA, precision="bf16"),
}
FULL = {"recompute": "full"}
LAYOUTS = {
    "one process": How(1),
    "dp2": How(2),
    "dp2 in one pass": How(2, micro_size=None),
    "dp2 with recompute": How(2, {}, FULL),
    "dp4": How(4),
    "replicas": How(2, {"dp_replicate": 2}),
    "hsdp2x2": How(4, {"dp_replicate": 2}),
    "tp2": How(2, {"tp": 2}),
    "tp2 with recompute": How(2, {"tp": 2}, FULL),
    "tp4": How(4, {"tp": 4}),
    "tp2 without sequence parallel": How(2, {"tp": 2, "sequence_parallel": False}),
    "tp2 without sequence parallel, with recompute": How(2, {"tp": 2, "sequence_parallel": False}, FULL),
    "tp2 with the head gathered": How(2, {"tp": 2, "loss_parallel": False}),
    "tp2 with the head gathered, without sequence parallel": How(
        2, {"tp": 2, "loss_parallel": False, "sequence_parallel": False}
    ),
    "tp2 x dp2": How(4, {"tp": 2}),
    "tp2 x dp2 with recompute": How(4, {"tp": 2}, FULL),
    "tp2 x hsdp2": How(4, {"tp": 2, "dp_replicate": 2}),
    "cp2 ulysses": How(2, {"cp": 2}),
    "cp2 all_gather": How(2, {"cp": 2, "cp_kind": "all_gather"}),
    "cp4 ulysses": How(4, {"cp": 4}),
    "cp2 ulysses x dp2, with recompute": How(4, {"cp": 2}, FULL),
    "cp2 all_gather x hsdp2, with recompute": How(4, {"cp": 2, "cp_kind": "all_gather", "dp_replicate": 2}, FULL),
    "tp2 x cp2 ulysses": How(4, {"tp": 2, "cp": 2}),
    "tp2 x cp2 all_gather": How(4, {"tp": 2, "cp": 2, "cp_kind": "all_gather"}),
    "pp2": How(2, {"pp": 2}),
    "pp2 with recompute": How(2, {"pp": 2}, FULL),
    "pp2 interleaved": How(2, {"pp": 2, "pp_schedule": "interleaved", "pp_stages_per_rank": 2}),
    "pp2 zero bubble": How(2, {"pp": 2, "pp_schedule": "zero_bubble"}),
    "pp4": How(4, {"pp": 4}),
    "pp2 x dp2": How(4, {"pp": 2}, micro_size=1),
    "pp2 x hsdp": How(4, {"pp": 2, "dp_replicate": 2}, micro_size=1),
    "cp2 ulysses x pp2": How(4, {"cp": 2, "pp": 2}),
    "cp2 all_gather x pp2": How(4, {"cp": 2, "cp_kind": "all_gather", "pp": 2}),
    "pp2 x tp2": How(4, {"pp": 2, "tp": 2}),
    "pp2 x tp2 without sequence parallel": How(4, {"pp": 2, "tp": 2, "sequence_parallel": False}),
}
ALL = [(model, layout) for model in MODELS for layout in LAYOUTS]
EACH_ONCE = [
    ("llama", "hsdp2x2"),
    ("llama", "tp2 x cp2 ulysses"),
    ("llama tied with qk norms and dropout", "pp2 x tp2"),
]
"""The fast tier."""


@dataclass(frozen=True)
class Exchanged:
    """What a rank's step has exchanged, and what it should."""

    measured: Counter[Collective]
    formula: Counter[Collective]
    missed: dict[tuple[str, ...], int] = field(default_factory=dict)


def sizes_of(how: How) -> Mesh:
    return LayoutConfig(**how.layout).mesh(how.ranks)


def exchanged(what: What, how: How) -> Exchanged:
    """The second step of this rank."""
    engine, sizes = build(what, how), sizes_of(how)
    place = engine.data_parallel_rank, engine.data_parallel_size
    engine.train_step(0, micro_batches(what, how, 0, *place), LR)
    batches = micro_batches(what, how, 1, *place)
    with RecordedCollectives(sizes) as record:
        engine.train_step(1, batches, LR)
    terms = communication(
        family(what.model["arch"])(**what.model, context=what.context),
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


@pytest.mark.parametrize(
    ("model", "layout"),
    [pytest.param(*pair, marks=[] if pair in EACH_ONCE else pytest.mark.slow) for pair in ALL],
)
def test_a_step_exchanges_what_the_formula_says(ranks: RankPool, model: str, layout: str) -> None:
    how = LAYOUTS[layout]
    for rank, found in enumerate(ranks.run(exchanged, MODELS[model], how, ranks=how.ranks)):
        assert found.measured == found.formula, f"rank {rank}:\n{difference(found)}"
        assert not found.missed


def difference(found: Exchanged) -> str:
    both = sorted(set(found.measured) | set(found.formula))
    return "\n".join(
        f"{one}: measured {found.measured[one]}, formula {found.formula[one]}"
        for one in both
        if found.measured[one] != found.formula[one]
    )
