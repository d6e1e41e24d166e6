"""Norms by group of parameters equal one process's at every layout, and torch's own of the full tensors."""

from __future__ import annotations

import math

import pytest
import torch

from bigtrain.config import UserError
from bigtrain.engines.config import ENGINES
from bigtrain.testing.equivalence import LR, OF_NUMBERS, How, What, build, micro_batches
from bigtrain.testing.ranks import RankPool
from bigtrain.training.callbacks.norms import NormsConfig

WHAT = What(
    {"arch": "llama", "layers": 4, "width": 32, "heads": 8, "kv_heads": 4, "mlp_width": 56, "tied": True},
    optimizer={"name": "sgd", "momentum": 0.9, "weight_decay": 0.1},
)
"""Momentum and not Adam, whose steps are as large where a gradient is nothing but rounding."""
STEPS = 4


def norms(what: What, how: How, depth: int = 2) -> list[dict[str, float | None]]:
    """What each step's numbers show, and the gradient's norm."""
    engine = build(what, how)
    engine.record_norms(1, depth, ("gradient", "weight", "update"))
    found = []
    for step in range(STEPS):
        batch = micro_batches(what, how, step, engine.data_parallel_rank, engine.data_parallel_size)
        numbers = engine.train_step(step, batch, LR).read()
        if numbers.unknown:
            engine.reducer.agree()
        values = {name: value.result for name, value in numbers.metrics.items()}
        found.append({**values, "gradient_norm": numbers.gradient_norm})
    engine.close()
    return found


def directly() -> list[dict[str, float]]:
    """The norms of each step from full tensors of one process."""
    how = How()
    engine = build(WHAT, how)
    found = []
    for step in range(STEPS):
        sums = engine.backward(step, micro_batches(WHAT, how, step, 0, 1))
        named = dict(engine.model.named_parameters())
        before = {name: one.detach().clone() for name, one in named.items()}
        gradients = {name: one.grad / float(sums.weight) for name, one in named.items()}
        engine.reduce_and_scale(sums, 0.0)
        for group in engine.optimizer.param_groups:
            group["lr"] = LR * group["lr_scale"]
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        updates = {name: one.detach() - before[name] for name, one in named.items()}
        of_kinds = {"gradient": gradients, "weight": before, "update": updates}
        found.append({
            f"{kind}_norm/layers.{layer}": _norm(t for name, t in tensors.items() if f"layers.{layer}." in name)
            for kind, tensors in of_kinds.items() for layer in range(4)
        } | {f"{kind}_norm": _norm(of_kinds[kind].values()) for kind in ("weight", "update")})  # fmt: skip
    return found


def _norm(tensors: object) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def of_one_process(ranks: RankPool) -> list[dict[str, float | None]]:
    return ranks.run(norms, WHAT, How(), ranks=1)[0]


def test_norms_are_those_of_the_step_before(ranks: RankPool, of_one_process: list[dict[str, float | None]]) -> None:
    (expected,) = ranks.run(directly, ranks=1)
    # Names that are new are known to all ranks one step later, and seen in the next.
    for step in range(2, STEPS):
        shown = of_one_process[step]
        assert {name: shown[name] for name in expected[step - 1]} == pytest.approx(expected[step - 1], rel=OF_NUMBERS)
        squares = [value**2 for name, value in shown.items() if name.startswith("gradient_norm/") and value is not None]
        assert math.sqrt(sum(squares)) == pytest.approx(of_one_process[step - 1]["gradient_norm"], rel=OF_NUMBERS)


LAYOUTS = {
    "dp2": How(2),
    "hsdp2x2": How(4, {"dp_replicate": 2}),
    "tp2": How(2, {"tp": 2}),
    "pp2": How(2, {"pp": 2}),
    "tp2 x pp2": How(4, {"tp": 2, "pp": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [pytest.param(one, marks=[pytest.mark.exhaustive] if LAYOUTS[one].ranks > 2 else []) for one in LAYOUTS]
)
def test_norms_equal_one_process_s(ranks: RankPool, of_one_process: list[dict[str, float | None]], layout: str) -> None:
    how = LAYOUTS[layout]
    found = ranks.run(norms, WHAT, how, ranks=how.ranks)
    assert all(other == found[0] for other in found), "the ranks disagree"
    for own, expected in zip(found[0][2:], of_one_process[2:], strict=True):
        assert own == pytest.approx(expected, rel=OF_NUMBERS)


def test_they_are_recorded_every_so_many_steps_and_refused_elsewhere() -> None:
    from bigtrain.engines.norms import Norms
    from bigtrain.metrics import Recorder

    parameter = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    recorder = Recorder(torch.device("cpu"))
    recorded = Norms(recorder, {"a.weight": parameter}, every=3, depth=1, kinds=("weight",))
    seen = []
    for step in range(6):
        recorded.begin(step)
        recorded.before_update(torch.ones(()))
        seen.append(recorder.get("weight_norm/a") is not None)
        recorder.forget(["weight_norm/a"])
    assert seen == [False, True, False, False, True, False], "so that steps 3 and 6 show them"
    with pytest.raises(UserError, match="'deepspeed' records no norms"):
        NormsConfig().check(ENGINES.read({"name": "deepspeed"}))
