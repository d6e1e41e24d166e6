"""muP: its factors in closed form, the standard model at the base width, exports without its constants."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.checkpoint.peft import export_peft
from bigtrain.config import UserError
from bigtrain.models.config import FAMILIES
from bigtrain.models.contract import Normal
from bigtrain.optim.config import OPTIMIZERS
from bigtrain.run import load_config
from bigtrain.training.prepare import prepare

MakeDecoder = Callable[..., nn.Module]
MakeBatch = Callable[..., dict[str, Tensor]]
BASE = {"base_width": 32, "base_head_width": 8}
HIDDEN = ("query", "key", "value", "output", "gate", "up", "down")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tied": True, "kv_heads": 2}),
    "gpt2": ("gpt2", {}),
    "norms of queries and keys": ("qwen3", {"kv_heads": 2}),
    "gemma3": ("gemma3_text", {"kv_heads": 2, "mlp_width": 56}),
    "bias of the head": ("phi", {}),
    "norms of all heads": ("olmo2", {}),
}
ROUNDING = 1e-11
"""Relative, in FP64: the constants are multiplied at other places."""
OF_LOGITS = 1e-6
"""Relative: logits are returned in FP32."""


@pytest.mark.parametrize("case", CASES)
def test_at_the_base_width_the_model_and_its_optimizer_are_the_standard_ones_to_the_bit(
    case: str, make_decoder: MakeDecoder, make_batch: MakeBatch
) -> None:
    arch, keys = CASES[case]
    standard, mup = (make_decoder(arch, **keys, head_width=8, **more) for more in ({}, {"mup": BASE}))
    ends = []
    for model in (standard, mup):
        optimizer = OPTIMIZERS.read({"name": "adamw", "lr": 0.01}).build(
            model.named_parameters(), lr_scale=model.config.lr_scale
        )
        for seed in range(2):
            loss = model(make_batch(seed=seed)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([loss.detach(), *(parameter.detach() for parameter in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_the_factors_are_those_of_table_8(tied: bool) -> None:
    shape = {"layers": 3, "width": 128, "heads": 8, "context": 16, "mlp_width": 256, "init_std": 0.04, "tied": tied}
    config = FAMILIES["llama"](**shape, mup=BASE)
    with torch.device("meta"):
        model = config.build(97)
    rules, settings = model.initialisers(), {}
    optimizer = OPTIMIZERS.read({"name": "adamw", "lr": 0.01, "weight_decay": 0.3}).build(
        model.named_parameters(), lr_scale=config.lr_scale
    )
    for group in optimizer.param_groups:
        settings |= dict.fromkeys(group["names"], (group["lr"], group["lr_scale"], group["weight_decay"]))
    for name in rules:
        if name.split(".")[-2] in HIDDEN:
            ends = name.endswith(("output.weight", "down.weight"))
            assert rules[name] == Normal(pytest.approx(0.02 / (math.sqrt(6) if ends else 1)))
            assert settings[name] == pytest.approx((0.0025, 0.25, 1.2))
        elif name in ("embedding.weight", "head.weight"):
            assert rules[name] == Normal(0.04)
            assert settings[name] == pytest.approx((0.01, 1.0, 0.3))
        else:
            assert name.endswith("norm.weight")
            assert settings[name] == pytest.approx((0.01, 1.0, 0.0))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_divided_by_the_width_and_scores_by_the_width_of_a_head(
    case: str, make_decoder: MakeDecoder, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward pass of the standard model with its scores and logits changed by hand."""
    arch, keys = CASES[case]
    shape = {**keys, "width": 64, "head_width": 16}
    mup, standard = make_decoder(arch, **shape, mup=BASE).double(), make_decoder(arch, **shape).double()
    mup.compute_dtype = standard.compute_dtype = torch.float64
    with torch.no_grad():
        for name, parameter in standard.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)), alpha=0.1)
            dict(mup.named_parameters())[name].copy_(parameter)
    found = mup.logits(make_batch())
    plain, root = F.scaled_dot_product_attention, math.sqrt(8 / 16)

    def scaled(query: Tensor, *rest: Tensor, **more: Any) -> Tensor:
        return plain(query * root, *rest, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", scaled)
    if standard.config.scale_embedding:
        embedded = standard._embedded
        monkeypatch.setattr(standard, "_embedded", lambda *given: embedded(*given) * math.sqrt(0.5))
    bias = standard.head.bias if standard.config.head_bias else 0.0
    expected = (standard.logits(make_batch()) - bias) * 0.5 + bias
    assert (found - expected).norm() <= OF_LOGITS * expected.norm()


@pytest.mark.parametrize("case", CASES)
def test_folded_parameters_give_a_model_without_the_constants(
    case: str, make_decoder: MakeDecoder, make_batch: MakeBatch
) -> None:
    arch, keys = CASES[case]
    shape = {**keys, "width": 64, "head_width": 16}
    mup, plain = make_decoder(arch, **shape, mup=BASE).double(), make_decoder(arch, **shape).double()
    mup.compute_dtype = plain.compute_dtype = torch.float64
    with torch.no_grad():
        for name, parameter in mup.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)), alpha=0.1)
            dict(plain.named_parameters())[name].copy_(mup.config.folded(name, parameter))
    found, expected = plain(make_batch()).loss, mup(make_batch()).loss
    assert abs(found - expected) <= ROUNDING * abs(expected)
    # And they are not the parameters themselves.
    plain.load_state_dict(mup.state_dict())
    assert abs(plain(make_batch()).loss - expected) > 1e-3 * abs(expected)


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
def test_an_optimizer_with_other_rules_is_refused_before_anything_is_built(
    name: str, write_config: Callable[..., Path]
) -> None:
    model = {"arch": "llama", "layers": 2, "width": 32, "heads": 4, "context": 32, "mup": {"base_width": 16}}
    config = load_config(write_config(model=model, optimizer={"name": name, "weight_decay": 0.0}))
    with pytest.raises(UserError, match=f"the optimizer '{name}' follows another") as refused:
        prepare(config, verify=False)
    assert "Use adamw or lion" in str(refused.value.fix)
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(UserError, match="follows another"):
        config.optimizer.build([("layers.0.mlp.up.weight", weight)], lr_scale=config.model.lr_scale)


def test_the_key_is_part_of_the_identity_only_where_it_is_set(write_config: Callable[..., Path]) -> None:
    config = write_config()
    assert "mup" not in prepare(load_config(config), verify=False).what["model"]
    found = prepare(load_config(config, ["model.mup.base_width=16"]), verify=False).what["model"]["mup"]
    assert found == {"base_width": 16, "base_head_width": None}


def test_a_policy_of_preferences_has_its_decoder_s_factors() -> None:
    policy = {"arch": "llama", "layers": 1, "width": 64, "heads": 4, "context": 16, "mup": BASE}
    config = FAMILIES["dpo"](policy=policy)
    assert config.follows_mup
    assert (config.lr_scale("layers.0.mlp.up.weight"), config.lr_scale("embedding.weight")) == (0.5, 1.0)
    assert torch.equal(config.folded("norm.weight", torch.ones(64)), torch.full((64,), 0.5))


def test_adapters_beside_constants_that_peft_does_not_know_are_not_exported(tmp_path: Path) -> None:
    shape = {"layers": 1, "width": 64, "heads": 4, "context": 16, "mup": BASE, "adapter": {"name": "lora"}}
    with pytest.raises(UserError, match="does not have the constants of") as refused:
        export_peft(tmp_path, 1, tmp_path / "out", config=FAMILIES["llama"](**shape))
    assert refused.value.fix == "Export with --format hf, which merges them."
