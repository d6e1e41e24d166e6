"""Shapes that are refused, families and presets, exact counts against transformers and torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bigtrain
from bigtrain.config import UserError
from bigtrain.models.config import FAMILIES, preset, presets

SHAPE = {"layers": 2, "width": 32, "heads": 4, "context": 16}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"heads": 5}, "width 32 is not divisible by heads 5"),
        ({"kv_heads": 3}, "heads 4 is not divisible by kv_heads 3"),
        ({"context": 17, "max_positions": 16}, "sequence longer than positions"),
        ({"positions": "rotary", "head_width": 7}, "even head width"),
        ({"rope_scaling": {}}, "rope_scaling needs positions: rotary"),
        ({"full_attention_every": 2}, "full_attention_every needs a sliding_window"),
        ({"norm_offset": True}, "norm_offset needs norm: rmsnorm"),
        ({"positions": "rotary", "rotary_part": 0.4}, "rotary_part 0.4 of a head's 8 channels"),
        ({"parallel_block": True, "norm_at": "both"}, "parallel_block needs norm_at: before"),
        ({"contxt": 3}, "contxt"),
    ],
)
def test_an_impossible_shape_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FAMILIES["gpt2"](**(SHAPE | keys))


def test_a_preset_with_a_longer_context_than_its_positions_is_refused() -> None:
    keys = preset("gpt2-124m") | {"context": 2048}
    with pytest.raises(ValueError, match="sequence longer than positions"):
        FAMILIES["gpt2"](**keys)


def test_families_are_the_files_that_define_a_config() -> None:
    folder = Path(bigtrain.models.__file__).parent / "families"
    assert FAMILIES.names() == sorted(file.stem for file in folder.glob("[!_]*.py"))


def test_a_family_says_what_it_counts_and_the_unit_of_its_loss() -> None:
    keys: dict[str, dict[str, Any]] = {
        "llama": {"context": 8, "layers": 1, "width": 8, "heads": 2}, "rnn": {"context": 8}, "bert": {"context": 8},
        "vae": {}, "dcgan": {},
        "clip": {"context": 8, "image_size": 8}, "captioner": {"context": 8, "image_size": 8},
        "vit": {"image_size": 8}, "sam": {"image_size": 8},
    }  # fmt: skip
    found = {}
    for arch, section in keys.items():
        units = FAMILIES[arch].model_validate({"arch": arch, **section}).metric_units()
        assert units["tokens_per_s"] == f"{units['tokens']}/s"
        assert units["val_loss"] == units["loss"]
        found[arch] = units["tokens"], units["loss"]
    assert found == {
        "llama": ("tokens", "nats per token"), "rnn": ("tokens", "nats per token"),
        "bert": ("masked tokens", "nats per masked token"), "vae": ("images", "nats per image"),
        "dcgan": ("images", "of the discriminator"), "clip": ("pairs", "nats per pair"),
        "captioner": ("tokens", "nats per token"), "vit": ("images", "nats per image"), "sam": ("images", ""),
    }  # fmt: skip


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UserError) as arch:
        FAMILIES["lama"]
    assert "llama" in (arch.value.fix or "")
    with pytest.raises(UserError) as name:
        preset("llama3-8B")
    assert "Did you mean 'llama3-8b'" in (name.value.fix or "")


def test_a_changed_preset_leaves_the_next_one_whole() -> None:
    preset("llama3-8b")["layers"] = 1
    assert preset("llama3-8b")["layers"] == 32


def test_configs_of_decoders_need_no_torch() -> None:
    code = (
        "import sys; from bigtrain.models.config import FAMILIES, preset; import bigtrain.optim.config;"
        "FAMILIES['llama'](**preset('llama3-8b')).flops_per_token(128256); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(bigtrain.__file__).parents[1])


def test_a_config_written_out_builds_the_same_config() -> None:
    config = FAMILIES["llama"](**SHAPE, rope_scaling={"factor": 4.0})
    assert FAMILIES["llama"](**config.plain()) == config


PUBLISHED = {
    "gpt2-124m": (50257, 124_439_808),
    "gpt2-355m": (50257, 354_823_168),
    "gpt2-774m": (50257, 774_030_080),
    "gpt2-1558m": (50257, 1_557_611_200),
    "llama2-7b": (32000, 6_738_415_616),
    "llama3-8b": (128256, 8_030_261_248),
    "llama3-70b": (128256, 70_553_706_496),
    "llama3-405b": (128256, 405_853_388_800),
    "qwen3-0.6b": (151936, 596_049_920),
    "qwen3-8b": (151936, 8_190_735_360),
    "qwen2.5-0.5b": (151936, 494_032_768),
    "qwen2.5-7b": (152064, 7_615_616_512),
    "mistral-7b": (32000, 7_241_732_096),
    "gemma3-270m": (262144, 268_098_176),
    "gemma3-1b": (262144, 999_885_952),
    "olmo2-1b": (100352, 1_484_916_736),
    "olmo2-7b": (100352, 7_298_617_344),
    "olmo3-7b": (100278, 7_298_011_136),
    "smollm3-3b": (128256, 3_075_098_624),
    "phi-1.5": (51200, 1_418_270_720),
    "phi-2": (51200, 2_779_683_840),
    "smollm-135m": (49152, 134_515_008),
    "smollm-360m": (49152, 361_821_120),
}


def test_every_preset_has_its_published_count_here() -> None:
    assert presets() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_presets_are_the_published_ones(name: str) -> None:
    vocab, published = PUBLISHED[name]
    keys = preset(name)
    config = FAMILIES[keys["arch"]](**keys)
    assert config.parameter_count(vocab) == published
    with torch.device("meta"):
        assert sum(p.numel() for p in config.build(vocab).parameters()) == published


@pytest.mark.parametrize("name", ["gpt2-124m", "llama3-8b", "smollm-135m"])
def test_parameter_counts_of_presets_equal_those_of_transformers(name: str) -> None:
    vocab, keys = PUBLISHED[name][0], preset(name)
    if keys["arch"] == "gpt2":
        hf_config = transformers.GPT2Config(n_layer=keys["layers"], n_embd=keys["width"], n_head=keys["heads"])
        kind = transformers.GPT2LMHeadModel
    else:
        hf_config = transformers.LlamaConfig(
            num_hidden_layers=keys["layers"], hidden_size=keys["width"], intermediate_size=keys["mlp_width"],
            num_attention_heads=keys["heads"], num_key_value_heads=keys["kv_heads"], vocab_size=vocab,
            tie_word_embeddings=keys.get("tied", False),
        )  # fmt: skip
        kind = transformers.LlamaForCausalLM
    with torch.device("meta"):
        model = kind(hf_config)
    count = sum(p.numel() for p in model.parameters())
    assert FAMILIES[keys["arch"]](**keys).parameter_count(vocab) == count


def test_parameters_without_embeddings_exclude_the_tables() -> None:
    config = FAMILIES["gpt2"](**SHAPE, max_positions=20)
    assert config.parameter_count(50) - config.parameter_count_without_embeddings(50) == (50 + 20) * 32


@pytest.mark.parametrize(
    ("arch", "keys"),
    [
        ("gpt2", {}),
        ("llama", {"kv_heads": 2}),
        ("llama", {"head_width": 6, "tied": True, "vocab_multiple": 64}),
        ("phi", {}),
        ("gemma3_text", {"sliding_window": 6}),
    ],
)
def test_flops_equal_torchs_counter_on_the_run_model(arch: str, keys: dict[str, Any]) -> None:
    config = FAMILIES[arch](**(SHAPE | keys))
    model = config.build(97)
    tokens = torch.zeros((3, 16), dtype=torch.long)
    batch = {"tokens": tokens, "targets": tokens, "weights": torch.ones(3, 16)}
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(batch).loss.backward()
    flops = config.flops_per_token(97)
    head = 6 * config.head_bias * 97  # a column of ones for the bias
    assert counter.get_total_flops() == (flops.full + head) * tokens.numel()
    attention = 12 * 2 * config.heads * config.width_of_head * 16
    seen = 16**2 / 2 if config.window is None else 6 * 16 - 6**2 / 2
    assert flops.full - flops.causal == attention * (1 - seen / 16**2)
