"""Schedules against their closed forms and torch's own schedulers."""

from __future__ import annotations

import math
import warnings
from typing import Annotated

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from bigtrain.config import Duration, UserError
from bigtrain.optim.config import SCHEDULES, ScheduleConfig
from bigtrain.optim.schedule import Schedule

ADAPTER: TypeAdapter[ScheduleConfig] = TypeAdapter(Annotated[ScheduleConfig, SCHEDULES])
PEAK = 3e-4


def build(total: int = 100, **keys: object) -> Schedule:
    return ADAPTER.validate_python(keys).build(PEAK, total, to_steps)


def to_steps(duration: Duration) -> int:
    return duration.in_steps(tokens_per_step=1000, sequences_per_step=10, sequences_per_epoch=200)


@pytest.mark.parametrize("keys", [{"name": "constant"}, {"name": "cosine"}, {"name": "wsd"}])
def test_warmup_rises_by_equal_steps_and_ends_at_the_peak(keys: dict[str, str]) -> None:
    schedule = build(**keys, warmup="10 steps")
    assert [schedule.lr(step) for step in range(10)] == pytest.approx([PEAK * (i + 1) / 10 for i in range(10)])
    assert schedule.lr(0) > 0
    assert schedule.lr(9) == schedule.lr(10) == PEAK


def test_constant_stays() -> None:
    schedule = build()
    assert {schedule.lr(step) for step in (0, 1, 99, 10**9)} == {PEAK}


def test_cosine_equals_torchs_scheduler() -> None:
    schedule = build(name="cosine", warmup="20 steps", final_lr=1e-5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=80, eta_min=1e-5)
    for step in range(20, 101):
        assert schedule.lr(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference.step()
    assert schedule.lr(100) == schedule.lr(1000) == pytest.approx(1e-5)


def test_warmup_and_linear_decay_equal_torchs_scheduler() -> None:
    schedule = build(name="wsd", decay="30 steps", shape="linear", final_lr=PEAK / 10)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    reference = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=30)
    for step in range(70, 101):
        assert schedule.lr(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference.step()


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ("linear", lambda t: 1 - t),
        ("1-sqrt", lambda t: 1 - math.sqrt(t)),
        ("cosine", lambda t: (1 + math.cos(math.pi * t)) / 2),
    ],
)
def test_wsd_warms_up_stays_and_decays_by_its_shape(shape: str, left: object) -> None:
    assert callable(left)
    schedule = build(name="wsd", warmup="5 steps", decay="20%", shape=shape, final_lr=1e-5)
    assert all(schedule.lr(step) == PEAK for step in range(4, 81))
    for step in range(80, 101):
        assert schedule.lr(step) == pytest.approx(1e-5 + (PEAK - 1e-5) * left((step - 80) / 20))
    assert schedule.lr(100) == schedule.lr(200) == pytest.approx(1e-5)
    assert all(schedule.lr(step) >= schedule.lr(step + 1) for step in range(80, 110))


@pytest.mark.parametrize(("decay", "steps"), [("30%", 30), ("0%", 0), ("25 steps", 25), ("2 epochs", 40)])
def test_decay_is_a_percentage_or_a_duration(decay: str, steps: int) -> None:
    schedule = build(name="wsd", decay=decay)
    assert [step for step in range(100) if schedule.lr(step) == PEAK][-1] == min(100 - steps, 99)


@pytest.mark.parametrize("keys", [{"decay": "120%"}, {"decay": "x%"}, {"decay": 0.2}, {"shape": "sqrt"}, {"warmup": 5}])
def test_other_spellings_are_refused(keys: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python({"name": "wsd"} | keys)


@pytest.mark.parametrize(
    "keys",
    [{"name": "cosine", "warmup": "101 steps"}, {"name": "wsd", "warmup": "90 steps", "decay": "20 steps"}],
)
def test_parts_longer_than_the_run_are_refused(keys: dict[str, object]) -> None:
    with pytest.raises(UserError, match="the run has 100"):
        build(**keys)


@pytest.mark.parametrize(
    ("keys", "ends", "free"),
    [({"name": "constant"}, False, 100), ({"name": "cosine"}, True, 10), ({"name": "wsd"}, False, 80)],
)
def test_a_longer_run_changes_nothing_before_its_last_part(keys: dict[str, str], ends: bool, free: int) -> None:
    keys = keys | {"warmup": "10 steps"}
    short, long = build(100, **keys), build(150, **keys)
    assert ADAPTER.validate_python(keys).ends_at_duration is ends
    assert all(short.lr(step) == long.lr(step) for step in range(free))
    assert (short.lr(99) == long.lr(99)) is (free == 100)


def test_a_config_written_out_reads_back_equal() -> None:
    for keys in (
        {"name": "wsd", "decay": "12.5%"},
        {"name": "wsd", "decay": "100 tokens"},
        {"name": "cosine"},
        {},
    ):
        config = ADAPTER.validate_python(keys)
        assert ADAPTER.validate_python(config.plain()) == config
    assert len(ADAPTER.json_schema()["anyOf"]) == len(SCHEDULES.names())
