"""What Accelerate's strategies exchange in a step is what the formula says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bigtrain.engines.accelerate.config import AccelerateConfig
from bigtrain.engines.config import Precision
from bigtrain.models.families.hf import Config
from bigtrain.optim.optimizers.adamw import AdamWConfig
from bigtrain.parallel.config import LayoutConfig, Mesh
from bigtrain.parallel.mesh import Ranks
from bigtrain.planning.communication import Collective, total
from bigtrain.planning.strategies import Unit, strategy
from bigtrain.testing.collectives import RecordedCollectives
from bigtrain.testing.equivalence import LR, How, What, micro_batches
from bigtrain.testing.ranks import RankPool

RANKS = 2
WHAT = What({})
UNITS = {
    "gpt2": (
        Unit(("transformer.h.0",)),
        Unit(("transformer.h.1",), kept=True),
        Unit(("transformer.ln_f", "transformer.wte"), kept=True),
    ),
    "llama": (
        Unit(("model.layers.0",)),
        Unit(("model.layers.1",), kept=True),
        Unit(("model.embed_tokens",)),
        Unit(("model.norm", "lm_head"), kept=True),
    ),
    "t5": (
        Unit(("encoder.block.0",)),
        Unit(("encoder.block.1",)),
        Unit(("decoder.block.0",)),
        Unit(("decoder.block.1",), kept=True),
    ),
}
"""What is gathered together, but for the rest: GPT-2's head is its embedding, T5's is both embeddings."""


@dataclass(frozen=True)
class Case:
    kind: str
    strategy: Any
    precision: Precision = "fp32"


CASES = [
    Case("gpt2", "ddp"),
    Case("llama", "fsdp2", "bf16"),
    Case("gpt2", "fsdp2"),
    Case("t5", "fsdp2"),
    Case("llama", "zero2", "bf16"),
]


def exchanged(case: Case, path: Path) -> tuple[Counter[Collective], Counter[Collective], dict[Any, int]]:
    """The third step of this rank: measured, by the formula, and what was missed."""
    config = AccelerateConfig(strategy=case.strategy)
    engine: Any = config.build(
        Config(hf=str(path), task="seq2seq" if case.kind == "t5" else "causal", context=WHAT.context),
        WHAT.vocabulary, AdamWConfig(lr=LR, clip=1.0), layout=LayoutConfig(micro_size=2),
        precision=case.precision, seed=WHAT.seed, ranks=Ranks.from_environment(),
    )  # fmt: skip
    shapes = {name: tuple(parameter.shape) for name, parameter in engine.strategy.module.named_parameters()}
    place = engine.data_parallel_rank, engine.data_parallel_size
    # DDP makes its buckets anew in the second step, by the order in which gradients came in the first.
    for step in range(2):
        engine.train_step(step, micro_batches(WHAT, How(), step, *place), LR)
    batches = micro_batches(WHAT, How(), 2, *place)
    with RecordedCollectives(Mesh(dp_shard=RANKS)) as record:
        engine.train_step(2, batches, LR)
    terms = strategy(
        shapes, config, ranks=RANKS, precision=case.precision, passes=len(batches), units=UNITS[case.kind]
    )  # fmt: skip
    engine.close()
    return Counter(record), total(terms), record.missed


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"{case.kind}-{case.strategy}") for case in CASES],
)
def test_a_step_exchanges_what_the_formula_says(ranks: RankPool, models: Callable[[str], Path], case: Case) -> None:
    for measured, formula, missed in ranks.run(exchanged, case, models(case.kind), ranks=RANKS):
        assert not measured - formula, "more is exchanged"
        assert not formula - measured, "less is exchanged"
        assert not missed


@pytest.mark.parametrize("settings", [{"strategy": "zero2"}, {"strategy": "ddp", "passthrough": {"bucket_cap_mb": 1}}])
def test_gradients_of_many_buckets_have_no_formula(settings: dict[str, Any]) -> None:
    shapes = {"weight": (100_000, 1_000)}
    with pytest.raises(ValueError, match="do not fit one bucket"):
        strategy(shapes, AccelerateConfig(**settings), ranks=2, precision="fp32", passes=1)
