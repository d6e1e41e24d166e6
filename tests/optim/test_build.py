"""Optimizers: against torch's plain forms, grouped by pattern, the same bits each time."""

from __future__ import annotations

import copy
from typing import Annotated, Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from bigtrain.config import UserError
from bigtrain.optim.config import OPTIMIZERS, OptimizerConfig

ADAPTER: TypeAdapter[OptimizerConfig] = TypeAdapter(Annotated[OptimizerConfig, OPTIMIZERS])


def make_model() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 7), nn.Linear(7, 5), nn.LayerNorm(5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


PLAIN = {"foreach": False, "fused": False}
CASES = {
    "adamw": (
        {"betas": [0.9, 0.99], "eps": 0.1},
        lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=0.1, **PLAIN),
    ),
    "adam": ({}, lambda groups: torch.optim.Adam(groups, **PLAIN)),
    "sgd": (
        {"momentum": 0.9, "nesterov": True},
        lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True, **PLAIN),
    ),
    "rmsprop": (
        {"alpha": 0.9, "momentum": 0.5},
        lambda groups: torch.optim.RMSprop(groups, alpha=0.9, momentum=0.5, foreach=False),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_optimizer_steps_like_torchs_plain_form(name: str) -> None:
    keys, plain = CASES[name]
    built, by_hand = make_model(), make_model()
    config = ADAPTER.validate_python({"name": name, "lr": 0.01, "weight_decay": 0.1} | keys)
    matrices = [parameter for parameter in by_hand.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in by_hand.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "lr": 0.01, "weight_decay": 0.1},
        {"params": vectors, "lr": 0.01, "weight_decay": 0.0},
    ]
    after = train(built, config.build(built.named_parameters()))
    for mine, other in zip(after, train(by_hand, plain(groups)), strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=2e-6)


def test_what_is_frozen_is_in_no_group_whether_it_needs_a_gradient_or_not() -> None:
    config = ADAPTER.validate_python({"name": "adamw", "frozen": ["1.*"]})
    for needs_gradient in (True, False):
        model = make_model()
        model[2].weight.requires_grad_(needs_gradient)
        optimizer = config.build(model.named_parameters())
        names = {name for group in optimizer.param_groups for name in group["names"]}
        assert names == {"0.weight", "2.bias", *(["2.weight"] if needs_gradient else [])}


@pytest.mark.parametrize("name", CASES)
def test_the_same_steps_give_the_same_bits(name: str) -> None:
    config = ADAPTER.validate_python({"name": name})
    runs = []
    for _ in range(2):
        model = make_model()
        runs.append(train(model, config.build(model.named_parameters())))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_restored_optimizer_goes_on_with_the_same_bits(name: str) -> None:
    config = ADAPTER.validate_python({"name": name})
    model = make_model()
    optimizer = config.build(model.named_parameters())
    train(model, optimizer)
    twin = make_model()
    twin.load_state_dict(model.state_dict())
    restored = config.build(twin.named_parameters())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pairs = zip(train(model, optimizer), train(twin, restored), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)


def groups_of(**keys: Any) -> dict[str, tuple[float, float, float]]:
    optimizer = ADAPTER.validate_python(keys).build(make_model().named_parameters())
    return {
        name: (group["lr_scale"], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["names"]
    }


def test_decay_is_for_matrices_unless_a_group_says_otherwise() -> None:
    assert groups_of(lr=1.0, weight_decay=0.1) == {
        "0.weight": (1, 1, 0.1), "1.weight": (1, 1, 0.1), "1.bias": (1, 1, 0),
        "2.weight": (1, 1, 0), "2.bias": (1, 1, 0),
    }  # fmt: skip


def test_the_first_group_that_matches_counts() -> None:
    groups = [
        {"pattern": "0.*", "lr_scale": 0.5, "weight_decay": 0.0},
        {"pattern": "*.weight", "weight_decay": 0.3},
        {"pattern": "*", "lr_scale": 2.0},
    ]
    assert groups_of(lr=1.0, weight_decay=0.1, groups=groups) == {
        "0.weight": (0.5, 0.5, 0), "1.weight": (1, 1, 0.3), "2.weight": (1, 1, 0.3),
        "1.bias": (2, 2, 0), "2.bias": (2, 2, 0),
    }  # fmt: skip


def test_a_pattern_without_a_parameter_names_the_nearest() -> None:
    with pytest.raises(UserError) as error:
        groups_of(groups=[{"pattern": "*"}, {"pattern": "1.wieght"}])
    assert error.value.where == "optimizer.groups.1.pattern"
    assert "'1.weight'" in (error.value.fix or "")


def test_names_are_the_order_of_parameters_and_each_is_there_once() -> None:
    model = make_model()
    optimizer = ADAPTER.validate_python({}).build(model.named_parameters())
    named = dict(model.named_parameters())
    seen = [(n, p) for g in optimizer.param_groups for n, p in zip(g["names"], g["params"], strict=True)]
    assert len(seen) == len(named)
    assert all(named[name] is parameter for name, parameter in seen)


def test_defaults_are_adamw_with_clipping() -> None:
    config = ADAPTER.validate_python({})
    assert (config.name, config.lr, config.plain()["clip"]) == ("adamw", 1e-3, 1.0)
    assert ADAPTER.validate_python({"clip": None}).clip is None
    assert ADAPTER.validate_python(config.plain()) == config


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "adan"},
        {"lr": 0},
        {"betas": [0.9, 1.0]},
        {"momentum": 0.9},
        {"name": "sgd", "nesterov": True},
    ],
)
def test_bad_settings_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(keys)
