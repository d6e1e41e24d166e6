"""What DeepSpeed's stages exchange in a step is what the formula says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from bigtrain.engines.build import build_engine
from bigtrain.engines.config import DeepSpeedConfig
from bigtrain.models.llama import Config as Llama
from bigtrain.optim.config import AdamWConfig
from bigtrain.parallel.config import LayoutConfig, Mesh
from bigtrain.parallel.mesh import Ranks
from bigtrain.planning.communication import Collective, Passes, total
from bigtrain.planning.zero import zero
from bigtrain.testing.collectives import RecordedCollectives
from bigtrain.testing.equivalence import LR, How, What, micro_batches
from bigtrain.testing.ranks import RankPool

SHAPE: dict[str, Any] = {"layers": 3, "width": 32, "heads": 8, "kv_heads": 4, "mlp_width": 56}
EVERYTHING_SPREAD = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def exchanged(
    stage: Any, precision: Any, passthrough: dict[str, Any]
) -> tuple[Counter[Collective], Counter[Collective], dict[Any, int]]:
    """The third step of this rank: measured, by the formula, and what was missed."""
    what = What({"arch": "llama", **SHAPE}, precision=precision)
    model, config = Llama(**SHAPE, context=what.context), DeepSpeedConfig(zero=stage, passthrough=passthrough)
    engine: Any = build_engine(
        model, what.vocabulary, AdamWConfig(lr=LR, clip=1.0), engine=config, layout=LayoutConfig(micro_size=2),
        precision=precision, seed=what.seed, ranks=Ranks.from_environment(),
    )  # fmt: skip
    place = engine.data_parallel_rank, engine.data_parallel_size
    # ZeRO 3 traces its first steps, and fetches ahead from then on.
    for step in range(2):
        engine.train_step(step, micro_batches(what, How(), step, *place), LR)
    batches = micro_batches(what, How(), 2, *place)
    with RecordedCollectives(Mesh(dp_shard=2)) as record:
        engine.train_step(2, batches, LR)
    passes = Passes(len(batches), *batches[0]["tokens"].shape)
    terms = zero(model, what.vocabulary, ranks=2, engine=config, precision=precision, passes=passes)
    engine.close()
    return Counter(record), total(terms), record.missed


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "passthrough"), [(0, {}), (1, {}), (2, {}), (3, {}), (3, EVERYTHING_SPREAD)],
    ids=["0", "1", "2", "3", "3 with nothing kept whole"],
)  # fmt: skip
def test_a_step_exchanges_what_the_formula_says(
    ranks: RankPool, stage: int, precision: str, passthrough: dict[str, Any]
) -> None:
    for measured, formula, missed in ranks.run(exchanged, stage, precision, passthrough):
        assert measured == formula
        assert not missed


def test_a_model_of_many_buckets_has_no_formula() -> None:
    model = Llama(layers=32, width=4096, heads=32, context=4096)
    with pytest.raises(ValueError, match="do not fit one of DeepSpeed's buckets"):
        zero(model, 128_000, ranks=8, engine=DeepSpeedConfig(), precision="bf16", passes=Passes(1, 1, 4096))
