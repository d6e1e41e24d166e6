"""A gradient that is not finite on one rank: no rank updates anything, whatever the engine, layout and optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bigtrain.engines.contract import StepNumbers
from bigtrain.models.contract import LossSum
from bigtrain.testing.equivalence import LR, How, What, build, gather, micro_batches
from bigtrain.testing.ranks import RankPool

BAD = (0, 2, 3)
"""The first step too, before any optimizer state is there."""
STEPS = 5
WHAT = What({"arch": "llama", "layers": 2, "width": 32, "heads": 8, "kv_heads": 4, "mlp_width": 56, "tied": True})


def poison(engine: Any, pipelined: bool) -> Callable[[], None]:
    """Let every loss on this rank have an infinite gradient; what is returned takes that back."""
    model = engine.model[-1] if isinstance(engine.model, torch.nn.ModuleList) else engine.model
    name = "forward_stage" if pipelined else "forward"
    right = getattr(model, name)

    def forward(*arguments: Any, **named: Any) -> Any:
        result = right(*arguments, **named)
        if isinstance(result, LossSum):
            result.loss.register_hook(lambda gradient: gradient * math.inf)
        return result

    setattr(model, name, forward)
    return lambda: setattr(model, name, right)


def train(how: How, optimizer: dict[str, Any], by_hand: bool) -> tuple[dict[str, Tensor], list[StepNumbers]]:
    """Train five steps of which some are bad on the last rank alone; `by_hand` skips these. Returns the state."""
    engine = build(replace(WHAT, optimizer=optimizer), how)
    pipelined, found = how.layout.get("pp", 1) > 1, []
    last = engine.data_parallel_rank == engine.data_parallel_size - 1
    for step in range(STEPS):
        batch = micro_batches(WHAT, how, step, engine.data_parallel_rank, engine.data_parallel_size)
        if step not in BAD:
            found.append(engine.train_step(step, batch, LR).read())
        elif not by_hand:
            cure = poison(engine, pipelined) if last else lambda: None
            found.append(engine.train_step(step, batch, LR).read())
            cure()
    state = gather(engine.state())
    engine.close()
    return state, found


ADAMW: dict[str, Any] = {"name": "adamw", "eps": 1e-6}
SGD: dict[str, Any] = {"name": "sgd", "momentum": 0.9}
RMSPROP: dict[str, Any] = {"name": "rmsprop", "momentum": 0.9}
DEEPSPEED = {"name": "deepspeed"}
CASES = {
    "one process": (How(), ADAMW),
    "dp2": (How(2), ADAMW),
    "dp2, sgd": (How(2), SGD),
    "dp2, rmsprop": (How(2), RMSPROP),
    "tp2 x dp2": (How(4, {"tp": 2}), ADAMW),
    "hsdp2x2": (How(4, {"dp_replicate": 2}), ADAMW),
    "pp2": (How(2, {"pp": 2}), ADAMW),
    **{f"deepspeed zero {zero}": (How(2, {}, {**DEEPSPEED, "zero": zero}), ADAMW) for zero in (0, 1, 3)},
    "deepspeed zero 2, sgd": (How(2, {}, {**DEEPSPEED, "zero": 2}), SGD),
    "deepspeed zero 2, offload": (How(2, {}, {**DEEPSPEED, "zero": 2, "offload": "optimizer"}), ADAMW),
    "deepspeed zero 1, pp2": (How(2, {"pp": 2}, {**DEEPSPEED, "zero": 1}), ADAMW),
}


@pytest.mark.parametrize(
    "case", [name if name in ("dp2", "dp2, rmsprop") else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_bad_gradient_on_one_rank_is_as_if_no_rank_had_taken_the_step(case: str, ranks: RankPool) -> None:
    how, optimizer = CASES[case]
    # Fused optimizers skip an update themselves; what others have done is taken back.
    results = ranks.run(train, how, optimizer, False, ranks=how.ranks)
    expected, undisturbed = ranks.run(train, how, optimizer, True, ranks=how.ranks)[0]
    for state, found in results:
        assert [bool(numbers.skipped) for numbers in found] == [step in BAD for step in range(STEPS)]
        assert all(math.isfinite(numbers.weight) for numbers in found)
        good = [numbers for numbers in found if not numbers.skipped]
        assert [numbers.loss for numbers in good] == [numbers.loss for numbers in undisturbed]
        assert state.keys() == expected.keys()
        different = [name for name, value in state.items() if not torch.equal(value, expected[name])]
        assert not different
    assert any(name.startswith("optimizer.") for name in expected)
