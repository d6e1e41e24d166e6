"""The error about a family that breaks the contract names the family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bigtrain.config import UserError
from bigtrain.models.check import check_model, check_module
from bigtrain.models.config import FAMILIES, preset, presets
from bigtrain.models.contract import Init, Ones, Zeros

DECODER = {"layers": 2, "width": 16, "heads": 2, "context": 8}
SIZES: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 8},
    "captioner": {"image_size": 8, "context": 5},
    "dpo": {"policy": {"arch": "llama", **DECODER}},
}


def spoil(change: Callable[[nn.Module], None]) -> nn.Module:
    class Honest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.compute_dtype = torch.float32
            self.layers = nn.ModuleList([nn.Linear(2, 2)])
            self.rules: dict[str, Init] = {"layers.0.weight": Ones(), "layers.0.bias": Zeros()}
            self.names = ["layers.0"]

        def blocks(self) -> list[tuple[str, nn.Module]]:
            return [(name, self.layers[0]) for name in self.names]

        def initialisers(self) -> dict[str, Init]:
            return self.rules

    module = Honest()
    check_module(module, "here")
    change(module)
    return module


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.register_buffer("table", torch.ones(2)), "buffer, 'table'"),
        (lambda m: setattr(m, "drop", nn.Dropout(0.1)), "'drop' is Dropout"),
        (lambda m: setattr(m, "names", ["layer.0"]), "names a module 'layer.0'"),
        (lambda m: m.rules.pop("layers.0.bias"), "no rule for the parameter 'layers.0.bias'"),
        (lambda m: m.rules.update({"layers.0.wieght": Ones()}), "'layers.0.wieght', which is not a parameter"),
        (lambda m: delattr(m, "compute_dtype"), "no compute_dtype"),
    ],
    ids=["buffer", "dropout", "block", "missing rule", "rule too many", "dtype"],
)
def test_a_broken_promise_is_named(change: Callable[[nn.Module], None], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_module(spoil(change), "here")


def test_a_dropout_of_zero_is_no_offence() -> None:
    check_module(spoil(lambda m: setattr(m, "drop", nn.Dropout(0.0))), "here")


@pytest.mark.parametrize(
    "arch", [arch for arch in FAMILIES.names() if FAMILIES[arch].keeps_contract and not FAMILIES[arch].is_plain]
)
def test_every_family_keeps_the_contract(arch: str) -> None:
    sizes = SIZES.get(arch, DECODER)
    check_model(FAMILIES[arch](**sizes), 19)


FAST = {preset(name)["arch"]: name for name in reversed(presets())}.values()
"""A preset of each family."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in presets()]
)
def test_every_preset_counts_its_parameters_right(name: str) -> None:
    keys = preset(name)
    check_model(FAMILIES[keys["arch"]](**keys), 1000)


def test_a_wrong_count_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FAMILIES["vit"](image_size=8)
    monkeypatch.setattr(type(config), "parameter_count", lambda self, vocab_size: 7)
    with pytest.raises(UserError, match=r"parameter_count\(\) returns 7"):
        check_model(config, 10)


@pytest.mark.parametrize("result", [torch.zeros(()), (torch.zeros(()),), (torch.zeros(2), torch.zeros(())), None])
def test_a_forward_that_returns_no_sums_is_reported(monkeypatch: pytest.MonkeyPatch, result: object) -> None:
    config = FAMILIES["vit"](image_size=8)
    monkeypatch.setattr("bigtrain.models.families.vit.VisionTransformer.forward", lambda self, batch: result)
    with pytest.raises(UserError, match=r"forward\(\) does not return two FP32 scalars"):
        check_model(config, 10)
