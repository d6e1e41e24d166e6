"""The decoder against transformers' GPT-2 and Llama, and against itself with documents packed or apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from bigtrain.models.contract import Stage
from bigtrain.models.huggingface import to_hf
from tests.models.tiny_hf import from_hf

VOCAB = 97
MakeDecoder = Callable[..., nn.Module]
MakeBatch = Callable[..., dict[str, Tensor]]

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
"""Relative to the norm of what is compared: rounding of a few hundred additions."""

ROTARY = {"rope_theta": 10000.0, "rope_type": "default"}
SCALED = {
    "rope_theta": 5000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
OUR_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 8}

CASES = {
    "gpt2": ("gpt2", {}, {}),
    "llama": ("llama", {"mlp_width": 48}, {"rope_parameters": ROTARY}),
    "llama-gqa-tied": (
        "llama",
        {"mlp_width": 48, "kv_heads": 2, "tied": True},
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": ROTARY},
    ),
    "llama-scaled-rope-wide-heads": (
        "llama",
        {"mlp_width": 48, "kv_heads": 1, "head_width": 12, "rope_theta": 5000.0, "rope_scaling": OUR_SCALING},
        {"num_key_value_heads": 1, "head_dim": 12, "rope_parameters": SCALED},
    ),
}


def reference(arch: str, keys: dict[str, Any]) -> nn.Module:
    """transformers' model of the shape that `make_decoder` builds, with random weights and biases."""
    if arch == "gpt2":
        config = transformers.GPT2Config(
            n_layer=2, n_embd=32, n_head=4, n_positions=16, vocab_size=VOCAB,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **keys,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        keys = {"num_key_value_heads": 4} | keys
        config = transformers.LlamaConfig(
            num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=16, vocab_size=VOCAB, rms_norm_eps=1e-5, **keys,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        # transformers' RMSNorm computes in FP32 whatever the dtype; torch's own takes its place for FP64.
        for name, _ in list(model.named_modules()):
            if name.endswith("norm"):
                model.set_submodule(name, nn.RMSNorm(32, eps=1e-5))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def assert_close(native: Tensor, hf_model: Tensor, tolerance: float, scale: Tensor | None = None) -> None:
    norm = hf_model.norm() if scale is None else scale
    assert (native - hf_model).norm() <= tolerance * norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_those_of_transformers(
    case: str, dtype: torch.dtype, make_decoder: MakeDecoder, make_batch: MakeBatch
) -> None:
    arch, our_keys, their_keys = CASES[case]
    hf_model = reference(arch, their_keys).to(dtype)
    native = make_decoder(arch, **our_keys).to(dtype)
    native.compute_dtype = dtype
    names = native.config.hf_names()
    native.load_state_dict(from_hf(names, hf_model.state_dict()))

    batch = make_batch()
    their_logits = hf_model(batch["tokens"]).logits
    losses = F.cross_entropy(their_logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
    their_loss = (losses * batch["weights"].flatten()).sum()
    their_loss.backward()
    our_loss, weight, _ = native(batch)
    our_loss.backward()

    tolerance = TOLERANCE[dtype]
    assert weight == batch["weights"].sum()
    assert_close(native.logits(batch).double(), their_logits.double(), max(tolerance, 1e-6))
    assert_close(our_loss, their_loss, tolerance)
    expected = from_hf(names, {name: p.grad for name, p in hf_model.named_parameters()})
    total = torch.stack([grad.norm() for grad in expected.values()]).norm()
    assert expected.keys() == dict(native.named_parameters()).keys()
    for name, parameter in native.named_parameters():
        # A key's bias has a gradient of zero in exact arithmetic, so the scale is that of all gradients.
        assert_close(parameter.grad, expected[name], tolerance, total)


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_state_survives_the_way_to_transformers_and_back(case: str, make_decoder: MakeDecoder) -> None:
    arch, our_keys, their_keys = CASES[case]
    model = make_decoder(arch, **our_keys)
    names = model.config.hf_names()
    hf_model = to_hf(names, model.state_dict())
    missing, unexpected = reference(arch, their_keys).load_state_dict(hf_model, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    back = from_hf(names, hf_model)
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_packed_documents_cost_the_sum_of_the_documents_apart(arch: str, make_decoder: MakeDecoder) -> None:
    model = make_decoder(arch, kv_heads=2).double()
    model.compute_dtype = torch.float64
    lengths = [5, 1, 7, 3]
    generator = torch.Generator().manual_seed(5)
    documents = [torch.randint(VOCAB, (length,), generator=generator) for length in lengths]
    tokens = torch.cat(documents)[None]
    packed = {
        "tokens": tokens,
        "targets": tokens.roll(-1, dims=1),
        "weights": torch.cat([torch.tensor([1.0] * (n - 1) + [0.0]) for n in lengths])[None],
        "documents": torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None].int(),
        "positions": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    together = model(packed)
    together.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for document in documents:
        inputs, targets = document[None, :-1], document[None, 1:]
        if inputs.numel():
            batch = {"tokens": inputs, "targets": targets, "weights": torch.ones(targets.shape)}
            total = total + model(batch).loss
    total.backward()
    assert_close(together.loss, total, 1e-12)
    norm = torch.stack([grad.norm() for grad in gradients.values()]).norm()
    for name, parameter in model.named_parameters():
        assert_close(gradients[name], parameter.grad, 1e-12, norm)


@pytest.mark.parametrize(
    "keys",
    [
        {"mlp": "relu", "norm": "rmsnorm", "bias": False, "tied": False, "positions": "rotary"},
        {"mlp": "gelu", "norm": "layernorm", "bias": False, "qk_norm": True, "vocab_multiple": 64},
        {"mlp": "swiglu", "norm": "layernorm", "bias": True, "kv_heads": 1, "max_positions": 40},
    ],
)
def test_every_shape_trains_and_counts_its_parameters(
    keys: dict[str, Any], make_decoder: MakeDecoder, make_batch: MakeBatch
) -> None:
    model = make_decoder("gpt2", **keys)
    model(make_batch()).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.config.parameter_count(VOCAB) == sum(p.numel() for p in model.parameters())
    assert model.logits(make_batch()).shape == (3, 16, VOCAB)


def test_bf16_stays_near_fp32_and_gives_fp32_loss_and_gradients(
    make_decoder: MakeDecoder, make_batch: MakeBatch
) -> None:
    model, batch = make_decoder("llama", kv_heads=2), make_batch()
    exact = model(batch).loss
    model.compute_dtype = torch.bfloat16
    rounded = model(batch).loss
    rounded.backward()
    assert rounded.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert_close(rounded, exact, 2**-8)  # one rounding of BF16


def test_dropout_is_the_same_for_any_split_of_the_batch(make_decoder: MakeDecoder, make_batch: MakeBatch) -> None:
    model, batch = make_decoder("gpt2", dropout=0.3), make_batch(sequences=4)
    whole = model(batch).loss
    parts = [model({name: value[part] for name, value in batch.items()}).loss for part in ([0, 1, 2], [3])]
    assert_close(parts[0] + parts[1], whole, 1e-6)
    other = batch | {"keys": batch["keys"] + 1}
    assert model(other).loss != whole
    model.eval()
    assert model(batch).loss == model(other).loss


def test_blocks_are_found_under_their_qualified_names(make_decoder: MakeDecoder) -> None:
    model = make_decoder("llama", layers=3)
    assert [name for name, _ in model.blocks()] == ["layers.0", "layers.1", "layers.2"]
    assert all(model.get_submodule(name) is block for name, block in model.blocks())


@pytest.mark.parametrize("cuts", [(0, 2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize(
    ("arch", "keys"), [("gpt2", {"tied": True, "dropout": 0.2}), ("gpt2", {"tied": False}), ("llama", {"tied": True})]
)
def test_a_chain_of_stages_computes_what_the_whole_model_computes(
    arch: str, keys: dict[str, Any], cuts: tuple[int, ...], make_decoder: MakeDecoder, make_batch: MakeBatch
) -> None:
    def made() -> nn.Module:
        model = make_decoder(arch, layers=3, **keys).double()
        model.compute_dtype = torch.float64
        return model

    whole, batch = made(), make_batch()
    expected = whole(batch)
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}

    x, found, names = None, {}, []
    stages = [made() for _ in cuts[1:]]
    for model, first, last in zip(stages, cuts, cuts[1:], strict=False):
        model.keep(Stage(first, last, 3))
        x = model.forward_stage(x, batch)
    x.loss.backward()
    for model in stages:
        assert model.initialisers().items() <= whole.initialisers().items()
        for name, parameter in model.named_parameters():
            names.append(name)
            found[name] = found.get(name, 0) + parameter.grad
    assert_close(x.loss, expected.loss, 1e-12)
    assert x.weight == expected.weight
    assert found.keys() == gradients.keys()
    assert len(names) == len(set(names)) + bool(keys["tied"]), "a tied embedding alone is on two stages"
    norm = torch.stack([grad.norm() for grad in gradients.values()]).norm()
    for name, gradient in gradients.items():
        assert_close(found[name], gradient, 1e-12, norm)


def test_a_stage_names_its_own_layers_alone(make_decoder: MakeDecoder) -> None:
    model = make_decoder("llama", layers=4, tied=True)
    model.keep(Stage(1, 3, 4))
    assert [name for name, _ in model.blocks()] == ["layers.1", "layers.2"]
    assert {name.split(".")[1] for name, _ in model.named_parameters()} == {"1", "2"}
