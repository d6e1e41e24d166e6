"""What DeepSpeed's stages exchange in a step, alone and under tp and pp, is what the formula says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch.distributed as dist

from bigtrain.engines.deepspeed.config import DeepSpeedConfig
from bigtrain.models.config import FAMILIES
from bigtrain.models.families.llama import Config as Llama
from bigtrain.parallel.config import LayoutConfig, Mesh
from bigtrain.planning.communication import Collective, Passes, total
from bigtrain.planning.zero import zero
from bigtrain.testing.collectives import RecordedCollectives
from bigtrain.testing.equivalence import LR, How, What, build, micro_batches
from bigtrain.testing.ranks import RankPool

SHAPE: dict[str, Any] = {"layers": 3, "width": 32, "heads": 8, "kv_heads": 4, "mlp_width": 56}
LLAMA: dict[str, Any] = {"arch": "llama", **SHAPE}
PLAIN, BF16 = What(LLAMA), What(LLAMA, precision="bf16")
TIED = What({**LLAMA, "tied": True, "qk_norm": True, "dropout": 0.1})
TIED_BF16 = What({**LLAMA, "tied": True, "qk_norm": True}, precision="bf16")
GPT2 = What({"arch": "gpt2", "layers": 3, "width": 32, "heads": 4}, optimizer={"name": "adamw", "eps": 1e-6})
"""With one learning rate: the formula knows the groups of weight decay alone, and DeepSpeed gathers group by group."""


def how(ranks: int, stage: int, layout: dict[str, Any] | None = None, **engine: Any) -> How:
    return How(ranks, layout or {}, {"name": "deepspeed", "zero": stage, **engine})


SPREAD: dict[str, Any] = {"passthrough": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
TP: dict[str, Any] = {"tp": 2}
PP: dict[str, Any] = {"pp": 2}
CASES = {
    "ZeRO 0": (GPT2, how(2, 0)),
    "ZeRO 1": (PLAIN, how(2, 1)),
    "ZeRO 1 in bf16": (BF16, how(2, 1)),
    "ZeRO 2": (GPT2, how(2, 2)),
    "ZeRO 2 in bf16": (BF16, how(2, 2)),
    "ZeRO 3": (PLAIN, how(2, 3)),
    "ZeRO 3 with nothing kept whole": (TIED, how(2, 3, **SPREAD)),
    "ZeRO 3 in bf16 with nothing kept whole": (BF16, how(2, 3, **SPREAD)),
    "ZeRO 3 with selective recompute": (PLAIN, how(2, 3, recompute="selective", **SPREAD)),
    "ZeRO 3 with full recompute": (PLAIN, how(2, 3, recompute="full", **SPREAD)),
    "ZeRO 1 with offload": (PLAIN, how(2, 1, offload="optimizer")),
    "ZeRO 2 with offload in bf16": (BF16, how(2, 2, offload="optimizer")),
    "ZeRO 3 with offload": (PLAIN, how(2, 3, offload="optimizer")),
    "ZeRO 1, tp2": (TIED, how(2, 1, TP)),
    "ZeRO 0, tp2 with the head gathered": (TIED_BF16, how(2, 0, {**TP, "loss_parallel": False})),
    "ZeRO 1, tp2 alone": (TIED_BF16, how(2, 1, {**TP, "loss_parallel": False, "sequence_parallel": False})),
    "ZeRO 0, tp2 x dp2": (GPT2, how(4, 0, TP)),
    "ZeRO 1, tp2 x dp2": (TIED_BF16, how(4, 1, TP)),
    "ZeRO 2, tp2 x dp2": (TIED_BF16, how(4, 2, TP)),
    "ZeRO 2, tp2 x dp2 with full recompute": (TIED, how(4, 2, TP, recompute="full")),
    "ZeRO 3, tp2 x dp2": (TIED_BF16, how(4, 3, TP)),
    "ZeRO 3, tp2 x dp2 with selective recompute": (TIED, how(4, 3, TP, recompute="selective", **SPREAD)),
    "ZeRO 0, pp2": (TIED, how(2, 0, PP)),
    "ZeRO 0, pp2 x dp2": (GPT2, how(4, 0, PP)),
    "ZeRO 1, pp2 x dp2": (TIED, how(4, 1, PP)),
    "ZeRO 1, pp2 x dp2 in bf16": (BF16, how(4, 1, PP)),
    "ZeRO 1, tp2 x pp2": (TIED_BF16, how(4, 1, {**TP, **PP})),
    "ZeRO 0, tp2 x pp2": (PLAIN, how(4, 0, {**TP, **PP})),
    "ZeRO 1, tp2 x pp2 x dp2": (TIED, how(8, 1, {**TP, **PP})),
}
FAST = "ZeRO 1, pp2 x dp2"


def exchanged(what: What, how: How) -> tuple[Counter[Collective], Counter[Collective], dict[Any, int]]:
    """The third step of this rank: measured, by the formula, and what was missed."""
    engine, layout = build(what, how), LayoutConfig(**how.layout)
    sizes = layout.mesh(how.ranks)
    place = engine.data_parallel_rank, engine.data_parallel_size
    # ZeRO 3 traces its first steps, and fetches ahead from then on.
    for step in range(2):
        engine.train_step(step, micro_batches(what, how, step, *place), LR)
    batches = micro_batches(what, how, 2, *place)
    with RecordedCollectives(sizes) as record:
        engine.train_step(2, batches, LR)
    terms = zero(
        FAMILIES[what.model["arch"]](**what.model, context=what.context),
        what.vocabulary,
        sizes=sizes,
        layout=layout,
        engine=DeepSpeedConfig(**how.engine),
        precision=what.precision,
        passes=Passes(len(batches), *batches[0]["tokens"].shape),
        rank=dist.get_rank(),
    )
    engine.close()
    # DeepSpeed also reduces over groups of this rank alone, which moves nothing.
    return Counter(one for one in record if one.axes), total(terms), record.missed


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == FAST else pytest.mark.slow) for name in CASES])
def test_a_step_exchanges_what_the_formula_says(ranks: RankPool, name: str) -> None:
    what, how = CASES[name]
    for rank, (measured, formula, missed) in enumerate(ranks.run(exchanged, what, how, ranks=how.ranks)):
        assert not measured - formula, f"rank {rank} exchanges more"
        assert not formula - measured, f"rank {rank} exchanges less"
        assert not missed


def test_a_model_of_many_buckets_has_no_formula() -> None:
    model = Llama(layers=32, width=4096, heads=32, context=4096)
    with pytest.raises(ValueError, match="do not fit one of DeepSpeed's buckets"):
        zero(
            model, 128_000, sizes=Mesh(dp_shard=8), layout=LayoutConfig(), engine=DeepSpeedConfig(),
            precision="bf16", passes=Passes(1, 1, 4096),
        )  # fmt: skip
