from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from bigtrain.checkpoint import loader
from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.state import flatten, materialise_optimizer
from bigtrain.config import UserError
from bigtrain.optim.config import OPTIMIZERS

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in OPTIMIZERS},
    "sgd momentum": {"name": "sgd", "momentum": 0.9, "nesterov": True},
    "rmsprop momentum": {"name": "rmsprop", "momentum": 0.9},
}
"""Every registered optimizer, and those of its settings that change what it keeps."""


def maker(name: str) -> Callable[[nn.Module], Optimizer]:
    keys = VARIANTS[name]
    config = OPTIMIZERS[keys["name"]](**keys, lr=0.01)
    return lambda model: config.build(model.named_parameters())


class Tied(nn.Module):
    """A head tied to the embedding, and a buffer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("kept", torch.arange(3.0))
        self.inner.register_buffer("derived", torch.ones(2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embedding(tokens)))


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(11, (8,), generator=torch.Generator().manual_seed(step))
        model(tokens).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def fresh(make: Callable[[nn.Module], Optimizer], seed: int) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    return model, make(model)


def test_names_are_qualified_and_a_tied_weight_is_there_once() -> None:
    model, optimizer = fresh(maker("adamw"), 0)
    train(model, optimizer, range(1))
    names = list(flatten(model, optimizer))
    assert names[:4] == ["model.embedding.weight", "model.inner.weight", "model.inner.bias", "model.kept"]
    assert [name for name in names if "embedding" in name][1:] == [
        f"optimizer.embedding.weight.{key}" for key in ("step", "exp_avg", "exp_avg_sq")
    ]
    assert not any("head" in name or "derived" in name for name in names)


def test_compiling_a_block_changes_no_name() -> None:
    model, _ = fresh(maker("adamw"), 0)
    before = list(flatten(model))
    model.inner = torch.compile(model.inner)  # type: ignore[assignment]
    assert list(flatten(model)) == before


@pytest.mark.parametrize("name", VARIANTS)
def test_materialised_state_is_what_a_first_step_makes(name: str) -> None:
    stepped_model, stepped = fresh(maker(name), 0)
    train(stepped_model, stepped, range(1))
    model, optimizer = fresh(maker(name), 0)
    materialise_optimizer(optimizer)
    expected = flatten(stepped_model, stepped)
    made = flatten(model, optimizer)
    assert list(made) == list(expected)
    for key, tensor in made.items():
        assert (tensor.shape, tensor.dtype, tensor.device, tensor.stride()) == (
            expected[key].shape,
            expected[key].dtype,
            expected[key].device,
            expected[key].stride(),
        )
        assert key.startswith("model.") or not tensor.any()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_from_materialised_state_is_torch_s_own_first_step(name: str) -> None:
    model, optimizer = fresh(maker(name), 0)
    other, other_optimizer = fresh(maker(name), 0)
    materialise_optimizer(other_optimizer)
    train(model, optimizer, range(3))
    train(other, other_optimizer, range(3))
    for key, tensor in flatten(model, optimizer).items():
        assert torch.equal(tensor, flatten(other, other_optimizer)[key]), key


@pytest.mark.parametrize("name", VARIANTS)
def test_a_resumed_run_is_bit_equal_to_an_undisturbed_one(name: str, tmp_path: Path) -> None:
    model, optimizer = fresh(maker(name), 0)
    train(model, optimizer, range(3))
    saver = Saver(tmp_path, CheckpointConfig(asynchronous=True))
    saver.save(3, flatten(model, optimizer), progress={}, config_hash="", identity="")
    train(model, optimizer, range(3, 6))
    saver.close()
    resumed, resumed_optimizer = fresh(maker(name), 1)
    materialise_optimizer(resumed_optimizer)
    loader.load(tmp_path, 3, flatten(resumed, resumed_optimizer))
    train(resumed, resumed_optimizer, range(3, 6))
    expected = flatten(model, optimizer)
    for key, tensor in flatten(resumed, resumed_optimizer).items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("name", VARIANTS)
def test_the_stated_bytes_are_those_of_the_state(name: str) -> None:
    model, optimizer = fresh(maker(name), 0)
    materialise_optimizer(optimizer)
    keys = VARIANTS[name]
    config = OPTIMIZERS[keys["name"]](**keys)
    stated = sum(config.state_bytes(tuple(parameter.shape)) for parameter in model.parameters())
    held = [value for name, value in flatten(model, optimizer).items() if name.startswith("optimizer.")]
    assert stated == sum(value.numel() * value.element_size() for value in held)


def test_materialising_leaves_state_that_is_there() -> None:
    model, optimizer = fresh(maker("adamw"), 0)
    train(model, optimizer, range(2))
    before = copy.deepcopy(flatten(model, optimizer))
    materialise_optimizer(optimizer)
    for key, tensor in flatten(model, optimizer).items():
        assert torch.equal(tensor, before[key])


def test_what_cannot_be_materialised_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be created"):
        materialise_optimizer(LBFGS(Tied().parameters()))


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, _ = fresh(maker("adamw"), 0)
    _, optimizer = fresh(maker("adamw"), 0)
    with pytest.raises(UserError, match="not a parameter of the model"):
        flatten(model, optimizer)
