"""Weights of transformers' models, one of each family: the way in, the way out, and what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bigtrain.checkpoint.huggingface import export_hf, import_hf
from bigtrain.checkpoint.loader import read_tensors
from bigtrain.config import UserError
from bigtrain.models.config import FAMILIES
from bigtrain.models.hf_files import HfFiles
from tests.models.tiny_hf import from_hf

VOCAB = 97
LOGITS = 1e-5
"""Absolute, for logits of order 1 in FP32."""
SHARD = "60KB"

SHARED = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB,
    "intermediate_size": 48, "max_position_embeddings": 32,
    "pad_token_id": None,  # transformers does not train the embedding of padding
}  # fmt: skip
DEEP = SHARED | {"num_hidden_layers": 3}
SCALING = {"rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=32, vocab_size=VOCAB),
    "llama": lambda: transformers.LlamaConfig(
        **SHARED, rope_parameters={**SCALING, "original_max_position_embeddings": 8}
    ),
    "llama tied": lambda: transformers.LlamaConfig(**SHARED, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SHARED, head_dim=16),
    "qwen2": lambda: transformers.Qwen2Config(**SHARED),
    "mistral": lambda: transformers.MistralConfig(**SHARED, sliding_window=9, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **DEEP, head_dim=16, sliding_window=7, query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    ),
    "olmo2": lambda: transformers.Olmo2Config(**SHARED),
    "olmo3": lambda: transformers.Olmo3Config(**(SHARED | {"num_hidden_layers": 5}), sliding_window=8),
    "smollm3": lambda: transformers.SmolLM3Config(
        **DEEP, no_rope_layer_interval=2, tie_word_embeddings=True
    ),
    "phi": lambda: transformers.PhiConfig(
        **(SHARED | {"num_key_value_heads": 4}), rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_model(kind: str) -> Any:
    """One of transformers' models with random weights, norms and biases too."""
    torch.manual_seed(4)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_go_in_and_out_and_every_logit_stays(kind: str, tmp_path: Path) -> None:
    hf_model = random_model(kind)
    hf_model.save_pretrained(tmp_path / "hf_model", max_shard_size=SHARD)
    assert len(list((tmp_path / "hf_model").glob("*.safetensors"))) > 1, "one file: nothing is sharded"
    step, keys = import_hf(tmp_path / "hf_model", tmp_path / "native")
    config = FAMILIES[keys["arch"]](**keys)
    directory = tmp_path / "native" / "checkpoints"

    model = config.build(VOCAB)
    model.load_state_dict(read_tensors(directory, step))
    tokens = torch.randint(VOCAB, (2, 32))
    with torch.no_grad():
        expected = hf_model(tokens).logits
        assert (model.logits({"tokens": tokens}) - expected).abs().max() < LOGITS

        files = export_hf(directory, step, tmp_path / "out", config=config, max_file_bytes=40_000)
        assert sum(file.suffix == ".safetensors" for file in files) > 1
        back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info.values())
        assert type(back) is type(hf_model)
        assert (back.eval()(tokens).logits - expected).abs().max() < LOGITS
    weights = hf_model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in back.state_dict().items())


@pytest.mark.parametrize("kind", ["gpt2", "llama tied", "qwen2", "qwen3", "gemma3"])
def test_an_export_of_a_model_with_mup_has_its_constants_in_the_weights(kind: str, tmp_path: Path) -> None:
    random_model(kind).save_pretrained(tmp_path / "hf_model")
    step, keys = import_hf(tmp_path / "hf_model", tmp_path / "native")
    config = FAMILIES[keys["arch"]](**keys, mup={"base_width": 20, "base_head_width": 5})
    directory = tmp_path / "native" / "checkpoints"
    model = config.build(VOCAB)
    model.load_state_dict(read_tensors(directory, step))
    tokens = torch.randint(VOCAB, (2, 32))
    export_hf(directory, step, tmp_path / "out", config=config)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = model.logits({"tokens": tokens})
        assert (back(tokens).logits - expected).abs().max() < LOGITS
    with pytest.raises(UserError, match=r"these weights were not trained with the constants of model\.mup"):
        HfFiles.open(tmp_path / "out").check_fit(config, {})


@pytest.mark.parametrize("kind", CONFIGS)
def test_three_steps_of_training_equal_those_of_transformers(kind: str, tmp_path: Path) -> None:
    hf_model = random_model(kind)
    keys = FAMILIES[hf_model.config.model_type].from_hf_config(hf_model.config.to_dict())
    config = FAMILIES[keys["arch"]](**keys)
    model = config.build(VOCAB)
    names = config.hf_names()
    model.load_state_dict(from_hf(names, hf_model.state_dict()))
    # A larger eps than usual: where a gradient is nothing but rounding, Adam would make steps of its sign.
    adam = {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1}
    optimizers = [torch.optim.AdamW(one.parameters(), **adam) for one in (model, hf_model)]
    for step in range(3):
        tokens = torch.randint(VOCAB, (2, 25), generator=torch.Generator().manual_seed(step))
        weights = torch.ones(2, 24)
        loss, weight, _ = model({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights})
        their_loss = hf_model(tokens, labels=tokens).loss
        for one in ((loss / weight), their_loss):
            one.backward()
        assert (loss / weight - their_loss).abs() < 1e-5 * their_loss
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    expected = from_hf(names, hf_model.state_dict())
    for name, value in model.state_dict().items():
        assert (value - expected[name]).norm() < 1e-5 * expected[name].norm(), name


def test_a_base_models_names_and_another_dtype_are_read_too(tmp_path: Path) -> None:
    """As the first GPT-2 was published: no prefix, and masks among the weights."""
    hf_model = random_model("gpt2").to(torch.bfloat16)
    hf_model.transformer.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    save_file({**load_file(path), "h.0.attn.bias": torch.ones(1, 1, 32, 32)}, path, metadata={"format": "pt"})
    import_hf(tmp_path / "base", tmp_path / "native")
    found = read_tensors(tmp_path / "native" / "checkpoints", 0)
    assert found["embedding.weight"].dtype == torch.float32
    assert torch.equal(found["embedding.weight"], hf_model.transformer.wte.weight.float())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "llama"
    random_model("llama").save_pretrained(path, max_shard_size=SHARD)
    return path


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def turn_into(kind: str, **keys: Any) -> Callable[[Path], None]:
    return lambda place: change(place / "config.json", model_type=kind, **keys)


def lose_a_tensor(place: Path) -> None:
    file = next(iter(sorted(place.glob("*.safetensors"))))
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file, metadata={"format": "pt"})


def add_a_bias(place: Path) -> None:
    file = next(iter(sorted(place.glob("*.safetensors"))))
    save_file({**load_file(file), "model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, file)


def point_outside(place: Path) -> None:
    change(place / "model.safetensors.index.json", weight_map={"model.norm.weight": "../model.safetensors"})


DAMAGES = {
    "another architecture": (lambda place: change(place / "config.json", model_type="mamba"), "no model of .* 'mamba'"),
    "a bias": (lambda place: change(place / "config.json", attention_bias=True), "attention_bias: True"),
    "an unknown stretching": (
        lambda place: change(place / "config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "yarn",
    ),
    "alternating layers": (turn_into("olmo3", layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    "soft caps": (
        turn_into("gemma3_text", hidden_activation="gelu_pytorch_tanh", attn_logit_softcapping=50.0),
        "attn_logit_softcapping: 50.0",
    ),
    "positions in some layers": (turn_into("smollm3", no_rope_layers=[0, 1]), "no_rope_layers"),
    "normalised keys": (turn_into("phi", hidden_act="gelu_new", qk_layernorm=True), "qk_layernorm"),
    "a tensor too few": (lose_a_tensor, "lack"),
    "a tensor too many": (add_a_bias, "q_proj.bias.*does not have"),
    "a part missing": (lambda place: next(iter(place.glob("*.safetensors"))).unlink(), "missing"),
    "a part cut off": (
        lambda place: next(iter(place.glob("*.safetensors"))).write_bytes(b"\x00" * 100), "cannot be read",
    ),
    "a part elsewhere": (point_outside, "is not the name of a file"),
    "no config": (lambda place: (place / "config.json").unlink(), "no config.json"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_imported_is_refused_and_nothing_written(damage: str, directory: Path, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    shutil.copytree(directory, place)
    harm, said = DAMAGES[damage]
    harm(place)
    with pytest.raises(UserError, match=said):
        import_hf(place, tmp_path / "native")
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"mlp_width": 64}, "mlp.*is .*48.* here"),
        ({"layers": 3}, "lack 'model.layers.2"),
        ({"rope_theta": 1e4}, "rope_theta is 10000.0, but the weights were trained with 5000.0"),
        ({"heads": 8}, "heads is 8"),
        ({"qk_norm": True}, "only model.qk_norm False, not True"),
        ({"tied": True}, "tied is True"),
    ],
)
def test_a_model_that_does_not_fit_its_source_is_refused(keys: dict[str, Any], said: str, directory: Path) -> None:
    files = HfFiles.open(directory)
    config = FAMILIES["llama"](**{**files.keys(), **keys})
    with pytest.raises(UserError, match=said):
        files.check_fit(config, config.parameter_shapes(VOCAB))


def test_a_shape_that_transformers_does_not_have_is_not_exported(tmp_path: Path) -> None:
    config = FAMILIES["llama"](layers=1, width=8, heads=2, context=4, norm="layernorm")
    with pytest.raises(UserError, match="cannot be exported to transformers"):
        export_hf(tmp_path, 1, tmp_path / "out", config=config)
