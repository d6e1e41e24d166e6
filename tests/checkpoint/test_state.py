from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, RMSprop

from bigtrain.checkpoint import loader
from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.state import flatten, materialise_optimizer
from bigtrain.config import UserError

MAKERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw": lambda p: AdamW(p, 0.01),
    "adamw fused": lambda p: AdamW(p, 0.01, fused=True),
    "adamw foreach": lambda p: AdamW(p, 0.01, foreach=True),
    "adam amsgrad": lambda p: Adam(p, 0.01, amsgrad=True),
    "sgd": lambda p: SGD(p, 0.01),
    "sgd momentum": lambda p: SGD(p, 0.01, momentum=0.9, nesterov=True),
    "sgd fused": lambda p: SGD(p, 0.01, momentum=0.9, fused=True),
    "rmsprop": lambda p: RMSprop(p, 0.01),
    "rmsprop momentum": lambda p: RMSprop(p, 0.01, momentum=0.9, centered=True, foreach=True),
}


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


def fresh(maker: Callable[[list[nn.Parameter]], Optimizer], seed: int) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    return model, maker(list(model.parameters()))


def test_names_are_qualified_and_a_tied_weight_is_there_once() -> None:
    model, optimizer = fresh(MAKERS["adamw"], 0)
    train(model, optimizer, range(1))
    names = list(flatten(model, optimizer))
    assert names[:4] == ["model.embedding.weight", "model.inner.weight", "model.inner.bias", "model.kept"]
    assert [name for name in names if "embedding" in name][1:] == [
        f"optimizer.embedding.weight.{key}" for key in ("step", "exp_avg", "exp_avg_sq")
    ]
    assert not any("head" in name or "derived" in name for name in names)


def test_compiling_a_block_changes_no_name() -> None:
    model, _ = fresh(MAKERS["adamw"], 0)
    before = list(flatten(model))
    model.inner = torch.compile(model.inner)  # type: ignore[assignment]
    assert list(flatten(model)) == before


@pytest.mark.parametrize("name", MAKERS)
def test_materialised_state_is_what_a_first_step_makes(name: str) -> None:
    stepped_model, stepped = fresh(MAKERS[name], 0)
    train(stepped_model, stepped, range(1))
    model, optimizer = fresh(MAKERS[name], 0)
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


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_from_materialised_state_is_torch_s_own_first_step(name: str) -> None:
    model, optimizer = fresh(MAKERS[name], 0)
    other, other_optimizer = fresh(MAKERS[name], 0)
    materialise_optimizer(other_optimizer)
    train(model, optimizer, range(3))
    train(other, other_optimizer, range(3))
    for key, tensor in flatten(model, optimizer).items():
        assert torch.equal(tensor, flatten(other, other_optimizer)[key]), key


@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_run_is_bit_equal_to_an_undisturbed_one(name: str, tmp_path: Path) -> None:
    model, optimizer = fresh(MAKERS[name], 0)
    train(model, optimizer, range(3))
    saver = Saver(tmp_path, CheckpointConfig(asynchronous=True))
    saver.save(3, flatten(model, optimizer), progress={}, config_hash="", identity="")
    train(model, optimizer, range(3, 6))
    saver.close()
    resumed, resumed_optimizer = fresh(MAKERS[name], 1)
    materialise_optimizer(resumed_optimizer)
    loader.load(tmp_path, 3, flatten(resumed, resumed_optimizer))
    train(resumed, resumed_optimizer, range(3, 6))
    expected = flatten(model, optimizer)
    for key, tensor in flatten(resumed, resumed_optimizer).items():
        assert torch.equal(tensor, expected[key]), key


def test_materialising_leaves_state_that_is_there() -> None:
    model, optimizer = fresh(MAKERS["adamw"], 0)
    train(model, optimizer, range(2))
    before = copy.deepcopy(flatten(model, optimizer))
    materialise_optimizer(optimizer)
    for key, tensor in flatten(model, optimizer).items():
        assert torch.equal(tensor, before[key])


def test_what_cannot_be_materialised_is_refused() -> None:
    for refused in (
        SGD(Tied().parameters(), 0.1, momentum=0.9, dampening=0.5),
        LBFGS(Tied().parameters()),
    ):
        with pytest.raises(UserError, match="cannot be made"):
            materialise_optimizer(refused)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, _ = fresh(MAKERS["adamw"], 0)
    _, optimizer = fresh(MAKERS["adamw"], 0)
    with pytest.raises(UserError, match="no parameter of the model"):
        flatten(model, optimizer)
