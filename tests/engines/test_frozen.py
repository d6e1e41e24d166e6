"""Weights that come from a Hugging Face directory and, in part, stay as they came, at every layout of fsdp."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from bigtrain.checkpoint.huggingface import import_hf, load_hf
from bigtrain.checkpoint.loader import read_tensors
from bigtrain.checkpoint.state import qualified_name
from bigtrain.config import UserError
from bigtrain.engines.deepspeed.config import DeepSpeedConfig
from bigtrain.engines.support import check_support
from bigtrain.models.config import FAMILIES
from bigtrain.models.hf_files import HfFiles
from bigtrain.optim.optimizers.adamw import AdamWConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.testing.equivalence import LR, How, What, build, gather, micro_batches
from bigtrain.testing.ranks import RankPool

FROZEN = ("embedding.*", "layers.0.*", "layers.2.mlp.*")
"""All that the first of two stages holds, and a part of a block that is trained."""
RELATIVE = 1e-5
"""Of weights in FP32 after two steps: sums over ranks round otherwise."""
MODEL = {"arch": "qwen3", "layers": 4, "width": 32, "heads": 8, "kv_heads": 4, "mlp_width": 56, "norm_eps": 1e-6}
WHAT = What({**MODEL, "head_width": 8}, frozen=FROZEN)

LAYOUTS = {
    "dp2": How(2),
    "hsdp2x2 with recompute": How(4, {"dp_replicate": 2}, {"recompute": "full"}),
    "tp2 x dp2 with selective recompute": How(4, {"tp": 2}, {"recompute": "selective"}),
    "cp2": How(2, {"cp": 2}),
    "pp2, the first stage frozen as a whole": How(2, {"pp": 2, "pp_split": (1, 3)}),
    "pp2 interleaved": How(2, {"pp": 2, "pp_schedule": "interleaved", "pp_stages_per_rank": 2}),
    "pp2 zero bubble": How(2, {"pp": 2, "pp_schedule": "zero_bubble", "pp_stages_per_rank": 2}),
}


def train(what: What, how: How, source: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Take the weights of `source` and two steps: all weights before and after, and the names of this rank's state."""
    engine = build(what, how)
    files = HfFiles.open(source)
    config = FAMILIES[what.model["arch"]](**what.model, context=what.context)
    state = engine.state()
    weights = {name.removeprefix("model."): state[name] for name in state if name.startswith("model.")}
    load_hf(files, files.check_fit(config, {name: tuple(weights[name].shape) for name in weights}), weights)
    before = gather(weights)
    for step in range(2):
        batch = micro_batches(what, how, step, engine.data_parallel_rank, engine.data_parallel_size)
        engine.train_step(step, batch, LR).read()
    # A gradient that the optimizer leaves alone would still count in the norm.
    trained = [qualified_name(name) for name, one in engine.model.named_parameters() if one.requires_grad]
    assert not [name for name in trained if is_frozen(name)]
    state = engine.state()
    after = gather({name.removeprefix("model."): state[name] for name in state if name.startswith("model.")})
    names = list(state)
    engine.close()
    return before, after, names


def is_frozen(name: str) -> bool:
    return name.startswith(("embedding.", "layers.0.", "layers.2.mlp."))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("hf") / "qwen3"
    config = transformers.Qwen3Config(
        vocab_size=WHAT.vocabulary, hidden_size=32, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=56, head_dim=8, max_position_embeddings=64, rope_parameters={
            "rope_type": "default", "rope_theta": 1e6,
        },
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path, max_shard_size="60KB")
    return path


@pytest.fixture(scope="module")
def alone(ranks: RankPool, source: Path) -> Any:
    ((before, after, names),) = ranks.run(train, WHAT, How(micro_size=None), source, ranks=1)
    return before, after, names


@pytest.mark.parametrize(
    "layout", [name if name == "dp2" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_what_is_frozen_does_not_move_by_a_bit_and_the_rest_trains_as_on_one_process(
    layout: str, ranks: RankPool, source: Path, alone: Any, tmp_path: Path
) -> None:
    how = LAYOUTS[layout]
    results = ranks.run(train, WHAT, how, source, ranks=how.ranks)
    expected_before, expected_after, _ = alone
    import_hf(source, tmp_path / "imported")
    stored = read_tensors(tmp_path / "imported" / "checkpoints", 0)
    assert stored.keys() == expected_before.keys()
    for before, after, names in results:
        assert before.keys() == after.keys() == expected_after.keys()
        assert not [name for name in names if name.startswith("optimizer.") and is_frozen(name.partition(".")[2])]
        for name, value in after.items():
            assert torch.equal(before[name], stored[name])
            assert torch.equal(value, before[name]) == is_frozen(name), name
            distance = (value - expected_after[name]).norm()
            assert distance <= RELATIVE * expected_after[name].norm(), name
    assert any(name.startswith("optimizer.") for _, _, names in results for name in names)


def test_wrong_patterns_and_other_engines_are_refused() -> None:
    for frozen, said in ((("embeding.*",), "nearest name is 'embedding.weight'"), (("*",), "nothing to train")):
        with pytest.raises(UserError) as caught:
            build(replace(WHAT, frozen=frozen), How())
        assert said in str(caught.value)
    with pytest.raises(UserError, match="cannot freeze parameters"):
        check_support(DeepSpeedConfig(), "llama", LayoutConfig(), optimizer=AdamWConfig(frozen=("*",)))
