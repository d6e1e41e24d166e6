from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.run import RunDirectory, boot_hash
from bigtrain.tracking.goodput import PARTS, goodput, since_s
from bigtrain.tracking.history import Columns, read_columns
from bigtrain.tracking.metrics import MetricsFile
from bigtrain.tracking.status import run_goodput

Event = Callable[..., dict[str, Any]]
NO_COLUMNS = Columns(np.array([], dtype=np.int64), {})


def times(steps_s: float, data_s: float = 0.0, saves_s: float = 0.0, evaluation_s: float = 0.0) -> dict[str, float]:
    return {"steps_s": steps_s, "data_s": data_s, "saves_s": saves_s, "evaluation_s": evaluation_s}


def test_each_second_is_in_the_part_where_it_went(event: Event) -> None:
    events = [
        event("started", 10, step=0, start_s=9.0),
        event("saved", 40, step=20, times=times(20, 3, 1, 4)),
        event("saved", 60, step=40, times=times(36, 3, 2, 4)),
        event("fault", 80, step=55, kind="hang", silent_s=12.0),
        event("restarted", 81), event("resumed", 90, step=40),
        event("saved", 120, step=60, times=times(25, 1, 1, 0)),
        event("fault", 125, step=63, kind="signal"),
        event("restarted", 126), event("fault", 130, kind="exception"), event("restarted", 131),
        event("resumed", 140, step=60),
        event("stopped", 150, step=65),
        event("resumed", 1000, step=65, start_s=5.0, energy_j=None),
        event("saved", 1010, step=70, times=times(9, 0, 0.5)),
        event("finished", 1012, step=70, energy_j=7.2e6),
    ]  # fmt: skip
    good = goodput(events, NO_COLUMNS, 99999)
    assert good.wall_s == pytest.approx(149 + 17)
    # The third attempt stopped without a save that could tell what its ten seconds were.
    assert good.steps_s == pytest.approx(36 + 25 + 9)
    assert good.lost_s == pytest.approx({
        "start_up": 14, "data": 4, "saves": 3.5, "evaluation": 4, "again": 70 - 45 - 12 + 35 - 27,
        "hangs": 12, "restarts": 10 + 15, "other": 10 + 12 - 9.5,
    })  # fmt: skip
    assert good.energy_j == 7.2e6
    assert str(good).startswith(f"goodput {70 / 166:.1%} of 2m46s (start-up 14s, waiting for data 4s")
    assert "used 2 kWh" in str(good)


def test_the_parts_sum_up_to_the_wall_time_whatever_the_record_holds(event: Event) -> None:
    names = ["started", "resumed", "saved", "fault", "restarted", "stopped", "finished", "failed", "fallback"]
    for seed in range(300):
        draw = random.Random(seed)
        at, events = 0.0, []
        for _ in range(draw.randrange(1, 25)):
            at += draw.choice([0.0, 1.0, 7.5, -3600.0])
            fields = {
                "start_s": 2.0,
                "silent_s": draw.choice([0.0, 1.0, 500.0]),
                "kind": draw.choice(["hang", "signal"]),
            }
            if draw.random() < 0.8:
                fields["step"] = draw.randrange(20)
            if draw.random() < 0.7:
                fields["times"] = times(*(draw.choice([0.0, 1.0, 400.0]) for _ in range(4)))
            events.append(event(draw.choice(names), at, **fields))
        columns = Columns(np.arange(1, 12), {"tokens": np.arange(1, 12.0), "tokens_per_s": np.full(11, 1.0)})
        good = goodput(events, columns, 3.0)
        assert good.steps_s + sum(good.lost_s.values()) == pytest.approx(good.wall_s), seed
        assert min(good.steps_s, *good.lost_s.values()) >= 0, seed
        assert good.share is None or 0 <= good.share <= 1
        assert list(good.lost_s) == list(PARTS)


def test_a_clock_that_is_set_changes_no_interval(event: Event) -> None:
    def stamped(name: str, at: float, jump: float, **fields: Any) -> dict[str, Any]:
        return {**event(name, at + jump, **fields), "uptime_s": 500.0 + at, "boot": "a"}

    def record(jump: float) -> list[dict[str, Any]]:
        return [
            stamped("started", 0, 0, step=0), stamped("saved", 8, jump, step=8, times=times(8)),
            stamped("finished", 10, -jump, step=10),
        ]  # fmt: skip

    assert goodput(record(3600), NO_COLUMNS) == goodput(record(0), NO_COLUMNS)
    assert goodput(record(0), NO_COLUMNS).wall_s == 10


def test_an_event_tells_its_age_by_the_monotonic_clock(run_dir: Path) -> None:
    event = {"time": time.time() - 3600, "uptime_s": time.monotonic() - 5, "boot": boot_hash()}
    assert since_s(event) == pytest.approx(5, abs=2)
    assert since_s({**event, "boot": "another machine's"}) == pytest.approx(3600, abs=2)
    RunDirectory(run_dir).event("started", step=0)


def test_steps_since_the_last_save_count_until_a_fault_takes_them(
    run_dir: Path, event: Event, row: Callable[..., dict[str, Any]], write_lines: Callable[..., None]
) -> None:
    log = MetricsFile(run_dir / "metrics.jsonl")
    for step in range(1, 11):
        log.append(row(step, data_wait_s=0.25))
    begun = [event("started", 0, step=0), event("saved", 6, step=6, times=times(4.5, 1.5))]
    columns = read_columns(log.path)
    live = goodput(begun, columns, 4.0)
    assert (live.wall_s, live.steps_s, live.lost_s["data"]) == pytest.approx((10, 7.5, 2.5))
    failed = goodput([*begun, event("fault", 10, step=10)], columns, 5.0)
    assert failed.steps_s == pytest.approx(4.5)
    assert (failed.lost_s["again"], failed.lost_s["restarts"]) == pytest.approx((4, 5))
    write_lines(run_dir / "events.jsonl", *begun, event("stopped", 11))
    assert run_goodput(run_dir).lost_s["other"] == pytest.approx(1)
