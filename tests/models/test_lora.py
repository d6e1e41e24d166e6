"""LoRA beside a decoder's weights: what is trained, what is refused, and peft's files in and out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from bigtrain.checkpoint.huggingface import export_hf, import_hf
from bigtrain.checkpoint.loader import read_tensors
from bigtrain.checkpoint.peft import PeftFiles, export_peft
from bigtrain.config import UserError
from bigtrain.engines.deepspeed.config import DeepSpeedConfig
from bigtrain.engines.support import check_support
from bigtrain.models.check import check_model
from bigtrain.models.config import FAMILIES, ModelConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.run import ExitCode, load_config

VOCAB, CONTEXT = 257, 32
ALL = ["query", "key", "value", "output", "gate", "up", "down"]
LOGITS = 1e-5
"""Absolute, in FP32: a merged product rounds otherwise than one of two narrow products."""
MERGED = 1e-6


def lora(**keys: Any) -> dict[str, Any]:
    return {"name": "lora", "rank": 4, "alpha": 8.0, **keys}


def shape(**keys: Any) -> ModelConfig:
    model = {"arch": "llama", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "context": CONTEXT}
    return FAMILIES[keys.get("arch", "llama")](**{**model, **keys})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("base") / "llama"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def test_an_adapted_model_keeps_the_contract_begins_as_the_base_and_has_gradients_for_adapters_alone() -> None:
    config = shape(adapter=lora(targets=ALL))
    check_model(config, VOCAB)
    module = config.build(VOCAB)
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == config.is_adapter(name), name
        assert parameter.requires_grad != name.endswith((".weight", ".bias")), "the patterns of `frozen` say otherwise"
    rules = module.initialisers()
    from bigtrain.models.init import initialise

    initialise(module, 5)
    plain = shape().build(VOCAB)
    initialise(plain, 5)
    tokens = torch.arange(CONTEXT)[None] * 7 % VOCAB
    with torch.no_grad():
        assert torch.equal(module.logits({"tokens": tokens}), plain.logits({"tokens": tokens}))
    assert sum(name.endswith("lora_a") for name in rules) == 14
    added = config.parameter_count(VOCAB) - shape().parameter_count(VOCAB)
    assert added == sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    # 4 of 6 remain of what is frozen, and 6 for each adapter's own.
    attention = 12 * 2 * 32 * CONTEXT
    dense = shape().flops_per_token(VOCAB).full - attention
    assert config.flops_per_token(VOCAB).full - attention == dense // 6 * 4 + 6 * added


def test_what_does_not_go_with_an_adapter_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no gate"):
        shape(arch="gpt2", kv_heads=None, adapter=lora(targets=["gate"]))
    with pytest.raises(UserError, match="cannot freeze parameters") as refused:
        check_support(DeepSpeedConfig(), "llama", LayoutConfig(), frozen=shape(adapter=lora()).frozen)
    assert refused.value.where == "model.adapter"
    with pytest.raises(UserError, match="no LoRA adapter"):
        export_peft(tmp_path, 1, tmp_path / "out", config=shape())
    gpt2 = shape(arch="gpt2", kv_heads=None, adapter=lora())
    with pytest.raises(UserError, match=r"a part of transformer\.h\.0\.attn"):
        export_peft(tmp_path, 1, tmp_path / "out", config=gpt2)


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_dora", True), ("use_rslora", True), ("rank_pattern", {"q_proj": 2}), ("modules_to_save", ["lm_head"]),
     ("bias", "all"), ("peft_type", "IA3"), ("init_lora_weights", "pissa"), ("a_key_of_tomorrow", 3)],
)  # fmt: skip
def test_adapters_of_another_kind_are_refused_by_their_key(key: str, value: Any, tmp_path: Path) -> None:
    facts = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "init_lora_weights": True, "use_dora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**facts, key: value}))
    with pytest.raises(UserError, match=key):
        PeftFiles.open(tmp_path)


def test_a_dropout_that_is_not_applied_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.05}
    (tmp_path / "adapter_config.json").write_text(json.dumps(facts))
    # The weights are missing.
    with pytest.raises(UserError):
        PeftFiles.open(tmp_path)
    assert "lora_dropout 0.05" in caplog.text


@pytest.mark.slow
def test_a_run_moves_adapters_alone_resumes_to_the_bit_and_peft_computes_what_it_computes(
    base: Path, write_config: Callable[..., Path], bigtrain: Callable[..., Any], tmp_path: Path
) -> None:
    import peft

    model = {**shape(adapter=lora(targets=["query", "output", "down"])).plain(), "max_positions": CONTEXT}
    config = write_config(model=model, init={"source": str(base)}, checkpoint={"every": "2 steps"})
    for name, durations in (("whole", [4]), ("resumed", [2, 4])):
        for steps in durations:
            done = bigtrain("train", config, "--nproc", 2, "--name", name, f"duration={steps} steps")
            assert done.returncode == ExitCode.FINISHED, done.stderr
    run = tmp_path / "runs" / "whole"
    checkpoints = run / "checkpoints"
    state, again = (
        read_tensors(tmp_path / "runs" / name / "checkpoints", 4, prefix="") for name in ("whole", "resumed")
    )
    assert state.keys() == again.keys()
    assert [name for name in state if not torch.equal(state[name], again[name])] == []
    assert all(".lora_" in name for name in state if name.startswith("optimizer."))
    import_hf(base, tmp_path / "imported")
    begun = read_tensors(tmp_path / "imported" / "checkpoints", 0)
    assert [name for name in begun if not torch.equal(begun[name], state[f"model.{name}"])] == []
    moved = [name for name in state if name.startswith("model.") and name.endswith("lora_b") and state[name].any()]
    assert len(moved) == 6

    for form in ("peft", "hf"):
        done = bigtrain("checkpoint", "export", "whole", "--format", form, "--out", tmp_path / form)
        assert done.returncode == 0, done.stderr
    native = load_config(run / "config.yaml").model.build(VOCAB)
    native.load_state_dict(read_tensors(checkpoints, 4))
    tokens = torch.arange(CONTEXT)[None] * 5 % VOCAB
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.PeftModel.from_pretrained(hf_model, tmp_path / "peft").eval()
    with torch.no_grad():
        expected = native.logits({"tokens": tokens})
        assert (expected - hf_model(tokens).logits).abs().max() < LOGITS
        with adapted.disable_adapter():
            assert (expected - adapted(tokens).logits).abs().max() > 1e-3, "the adapters change nothing"
    merged = adapted.merge_and_unload().state_dict()
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert stored.keys() <= merged.keys()
    assert max((merged[name] - value).abs().max() for name, value in stored.items()) < MERGED

    _peft_s_own_files_are_learned_on_from(base, write_config, bigtrain, tmp_path, tokens)


def _peft_s_own_files_are_learned_on_from(
    base: Path, write_config: Callable[..., Path], bigtrain: Callable[..., Any], tmp_path: Path, tokens: torch.Tensor
) -> None:
    import peft

    torch.manual_seed(8)
    options = {"r": 4, "lora_alpha": 16, "target_modules": ["k_proj", "up_proj"], "init_lora_weights": False}
    fresh = transformers.AutoModelForCausalLM.from_pretrained(base)
    hf_model = peft.get_peft_model(fresh, peft.LoraConfig(**options, task_type="CAUSAL_LM")).eval()
    hf_model.save_pretrained(tmp_path / "hf_model")
    done = bigtrain("checkpoint", "import", tmp_path / "hf_model", "--out", tmp_path / "taken", "--json")
    assert done.returncode == 0, done.stderr
    keys = json.loads(done.stdout)["model"]
    assert keys["adapter"] == {"name": "lora", "rank": 4, "alpha": 16.0, "targets": ["key", "up"]}
    native = FAMILIES["llama"](**keys).build(VOCAB)
    native.load_state_dict(read_tensors(tmp_path / "taken" / "checkpoints", 0))
    with torch.no_grad():
        assert (native.logits({"tokens": tokens}) - hf_model(tokens).logits).abs().max() < LOGITS
    config = write_config(
        name="on", model=keys, init={"source": f"{tmp_path / 'taken'}@0"}, duration="1 steps", checkpoint={}
    )
    done = bigtrain("train", config)
    assert done.returncode == ExitCode.FINISHED, done.stderr
    export_hf(tmp_path / "taken" / "checkpoints", 0, tmp_path / "hf0", config=FAMILIES["llama"](**keys))
    stored = load_file(tmp_path / "hf0" / "model.safetensors")
    merged = hf_model.merge_and_unload().state_dict()
    assert max((merged[name] - value).abs().max() for name, value in stored.items()) < MERGED
