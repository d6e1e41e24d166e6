"""`bigtrain prove`: rules of shrinking, agreement at real layouts, and planted faults that are named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config import UserError
from bigtrain.models.families.llama import Config as Llama
from bigtrain.parallel.config import LayoutConfig
from bigtrain.run import RunConfig, load_config
from bigtrain.testing.equivalence import section
from bigtrain.testing.prove import plan_proof, prove, shrunk_layout, shrunk_model
from bigtrain.testing.ranks import RankPool

RUN = """
name: proven
model: {preset: llama3-70b, tied: true, qk_norm: true, dropout: 0.1}
data: {train: shards, document_mask: true}
batch: {size: 64}
duration: 1000 steps
"""

WRONG = """
from typing import Literal

from bigtrain.models.config import FAMILIES
from bigtrain.models.decoder import DecoderModel
from bigtrain.models.decoder_config import TENSOR_PLAN, DecoderConfig


class Wrong(DecoderModel):
    def tensor_plan(self):
        # The keys' norm meets the rank's own heads alone, so its gradient is to be summed.
        return {"*.key_norm.*": "whole", **TENSOR_PLAN}


@FAMILIES.register
class Config(DecoderConfig):
    arch: Literal["wrong"] = "wrong"

    def build(self, vocab_size):
        return Wrong(self, vocab_size)
"""


def run_of(tmp_path: Path, text: str = RUN, *overrides: str) -> RunConfig:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return load_config(file, list(overrides))


@pytest.mark.parametrize(
    ("layout", "ranks", "expected"),
    [
        ({"tp": 8, "pp": 16}, 8, {"tp": 2, "pp": 2, "dp_shard": 2}),
        ({"tp": 2, "pp": 2, "dp_shard": 2}, 8, {"tp": 2, "pp": 2, "dp_shard": 2}),
        ({"tp": 4}, 8, {"tp": 4, "dp_shard": 2}),
        ({"cp": 4, "tp": 8, "pp": 8, "dp_replicate": 4}, 16, {"cp": 2, "tp": 2, "pp": 2, "dp_shard": 2}),
    ],
)
def test_degrees_are_halved_until_the_ranks_fit(layout: dict[str, int], ranks: int, expected: dict[str, int]) -> None:
    sizes, changed = shrunk_layout(LayoutConfig(**layout), ranks)  # type: ignore[arg-type]
    assert math.prod(sizes.values()) <= ranks
    assert {axis: size for axis, size in sizes.items() if size > 1} == expected
    assert all(f"layout.{axis}:" in " ".join(changed) for axis, size in layout.items() if sizes[axis] != size)


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"cp": 2}, {"tp": 2, "cp": 2}, {"tp": 4, "pp": 2}], ids=str)
def test_a_shrunk_model_keeps_its_kind_and_is_legal(layout: dict[str, int]) -> None:
    chosen = LayoutConfig(**layout)  # type: ignore[arg-type]
    big = Llama(layers=80, width=8192, heads=64, kv_heads=8, mlp_width=28672, context=8192, tied=True, qk_norm=True)
    small, _ = shrunk_model(big, chosen)
    model = Llama(**small, context=24)
    chosen.check(model, 61)
    assert (model.tied, model.qk_norm, model.mlp, model.norm) == (True, True, big.mlp, big.norm)
    assert model.heads // model.key_value_heads > 1
    assert model.parameter_count(61) < 1_000_000


CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_model_that_couples_its_batch_has_one_pass_a_rank_and_one_of_parts_is_refused() -> None:
    for name, micro_size in (("resnet-mnist", None), ("clip-emoji", None), ("lenet-mnist", 1)):
        assert plan_proof(load_config(CONFIGS / f"{name}.yaml"), 2)[1].micro_size == micro_size, name
    with pytest.raises(UserError, match=r"parts \(discriminator, generator\) cannot be proven"):
        plan_proof(load_config(CONFIGS / "dcgan-mnist.yaml"), 2)


@pytest.mark.slow
def test_a_large_run_is_proven_at_its_own_layout(tmp_path: Path, ranks: RankPool) -> None:
    what, how, changed = plan_proof(run_of(tmp_path, RUN, "layout.tp=8", "layout.pp=1"), 4)
    assert "layout.tp: 8 -> 2" in changed
    assert section(what).context >= 24
    assert prove(what, how, ranks, tmp_path) == []


@pytest.mark.slow
def test_a_wrong_tensor_plan_of_a_plugin_is_found_by_name(tmp_path: Path, ranks: RankPool) -> None:
    plugin = tmp_path / "wrong.py"
    plugin.write_text(WRONG)
    from bigtrain.config.plugin import load_plugin

    load_plugin(str(plugin))
    model = "{arch: wrong, layers: 4, width: 64, heads: 8, kv_heads: 4, context: 32, qk_norm: true, mlp: swiglu}"
    text = RUN.replace("{preset: llama3-70b, tied: true, qk_norm: true, dropout: 0.1}", model)
    config = run_of(tmp_path, text, "layout.tp=2", "layout.dp_shard=1", "layout.sequence_parallel=false")
    what, how, _ = plan_proof(config, 2, str(plugin))
    faults: list[Any] = prove(what, how, ranks, tmp_path)
    assert any("key_norm" in fault for fault in faults), faults
