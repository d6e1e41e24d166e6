"""An optimizer whose `zero_state` is not the state that its steps make is refused before a run begins."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest
import torch

from bigtrain.config import UserError
from bigtrain.optim.check import check_zero_state
from bigtrain.optim.config import OPTIMIZERS, OptimizerConfig


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_built_in_optimizers_describe_their_state(name: str) -> None:
    check_zero_state(OPTIMIZERS.read({"name": name}))


class Adagrad(OptimizerConfig):
    """torch's Adagrad, whose sums begin at 0.5."""

    name: Literal["adagrad"] = "adagrad"
    state: ClassVar[dict[str, Any] | None] = None

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(groups, lr=self.lr, initial_accumulator_value=0.5)

    def zero_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.state is None:
            return super().zero_state(parameter)
        step = {"step": torch.zeros(())}
        return step | {key: torch.full_like(parameter, value) for key, value in self.state.items()}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (None, "define zero_state"),
        ({}, "zero_state.. returns step: float32 .., but a step creates step: float32 .., sum: float32 .3, 4."),
        ({"sums": 0.5}, "returns step: float32 .., sums:"),
        ({"sum": 0.0}, "is not the optimizer's own first step"),
    ],
)
def test_a_state_that_steps_do_not_make_is_refused(
    monkeypatch: pytest.MonkeyPatch, state: dict[str, float] | None, said: str
) -> None:
    monkeypatch.setattr(Adagrad, "state", state)
    with pytest.raises(UserError, match=said):
        check_zero_state(Adagrad())


def test_the_state_that_steps_make_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Adagrad, "state", {"sum": 0.5})
    check_zero_state(Adagrad())
