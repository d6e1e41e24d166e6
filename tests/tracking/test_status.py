from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtrain.cli.remote import status_line
from bigtrain.tracking.live import LiveProgress, metrics_line
from bigtrain.tracking.metrics import MetricsFile
from bigtrain.tracking.status import status

START_S = 1_790_000_000.0
KEYS = [
    "name", "state", "step", "loss", "tokens_per_s", "units", "goodput", "nodes", "metrics", "epochs", "restarts",
    "last_event", "eta_s", "forecast", "wandb_url", "time", "energy_j", "best",
]  # fmt: skip

Event = Callable[..., dict[str, Any]]


def test_a_run_without_files_is_pending_and_has_every_key(run_dir: Path) -> None:
    found = status(run_dir, alive=True)
    assert list(found) == KEYS
    assert (found["name"], found["state"], found["restarts"]) == ("tiny", "pending", 0)
    assert all(found[key] is None for key in KEYS if key not in ("name", "state", "restarts", "time"))


@pytest.mark.parametrize(
    ("names", "alive", "state"),
    [
        ([], False, "pending"),
        (["started"], True, "running"),
        (["started", "saved"], True, "running"),
        (["started", "fault"], True, "waiting"),
        (["started", "fault", "restarted"], True, "running"),
        (["started", "fault", "restarted", "saved"], True, "running"),
        (["started", "stopped"], False, "stopped"),
        (["started", "stopped"], True, "pending"),
        (["started", "stopped", "resumed"], True, "running"),
        (["started", "finished"], False, "finished"),
        (["started", "finished"], True, "finished"),
        (["started", "fault", "failed"], False, "failed"),
        (["started", "saved"], False, "failed"),
    ],
)
def test_state_follows_the_events_and_the_lease(
    run_dir: Path, event: Event, write_lines: Callable[..., None], names: list[str], alive: bool, state: str
) -> None:
    write_lines(run_dir / "events.jsonl", *(event(name, at) for at, name in enumerate(names)))
    assert status(run_dir, alive, now=START_S + 10)["state"] == state


def test_a_running_run_tells_its_numbers(
    run_dir: Path, row: Callable[..., dict[str, Any]], event: Event, write_lines: Callable[..., None]
) -> None:
    best = {"step": 4, "metric": "val_loss", "value": 4.5}
    write_lines(
        run_dir / "events.jsonl", event("started", total_steps=30, nodes=2),
        event("saved", 7, step=12, best={**best, "step": 12}), event("rolled_back", 8, step=13, to=6),
        event("saved", 9, step=8, best=best),
    )  # fmt: skip
    write_lines(run_dir / "metrics.jsonl", *(row(step, loss=5.0 - 0.1 * step) for step in range(1, 11)))
    (run_dir / "wandb").mkdir()
    (run_dir / "wandb" / "url").write_text("https://wandb.ai/a/bigtrain/runs/tiny-1\n")
    found = status(run_dir, alive=True, now=START_S + 20)
    assert found == {
        "name": "tiny", "state": "running", "step": 10, "loss": pytest.approx(4.0), "tokens_per_s": 100.0,
        "units": None, "goodput": pytest.approx(0.5), "nodes": 2, "metrics": None, "epochs": None, "restarts": 0,
        "last_event": "saved",
        "eta_s": pytest.approx(20.0), "forecast": None, "wandb_url": "https://wandb.ai/a/bigtrain/runs/tiny-1",
        "time": found["time"], "energy_j": None, "best": best,
    }  # fmt: skip
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_goodput_counts_only_steps_that_were_kept_and_no_time_while_stopped(
    run_dir: Path, row: Callable[..., dict[str, Any]], event: Event, write_lines: Callable[..., None]
) -> None:
    write_lines(
        run_dir / "events.jsonl",
        event("started", 0), event("fault", 12, step=12), event("restarted", 13), event("resumed", 16, step=10),
        event("stopped", 20, step=14), event("resumed", 1000, step=14), event("finished", 1010, step=20),
    )  # fmt: skip
    write_lines(run_dir / "metrics.jsonl", *(row(step) for step in range(1, 21)))
    found = status(run_dir, alive=False, now=START_S + 99999)
    assert found["goodput"] == pytest.approx(20 / 30)
    assert found["restarts"] == 1
    assert found["eta_s"] is None


def test_units_and_the_losses_of_parts_are_in_the_status(
    run_dir: Path, row: Callable[..., dict[str, Any]], event: Event, write_lines: Callable[..., None]
) -> None:
    file = MetricsFile(run_dir / "metrics.jsonl")
    file.add_units({"tokens": "images", "tokens_per_s": "images/s", "loss": "of the critic"})
    file.append(row(1, **{"loss/critic": 0.5, "loss/maker": 2.0, "loss/web": 3.0, "epochs/web": 0.1}))
    found = status(run_dir, alive=False)
    assert found["units"] == {"tokens_per_s": "images/s", "loss": "of the critic"}
    assert found["metrics"] == {name: {"value": value, "unit": ""} for name, value in
                                {"loss/critic": 0.5, "loss/maker": 2.0}.items()}  # fmt: skip
    assert "100 images/s" in status_line(found)
    assert "tokens" not in status_line(found)


def test_times_as_iso_texts_are_understood(run_dir: Path, row: Callable[..., dict[str, Any]], write_lines: Any) -> None:
    write_lines(
        run_dir / "events.jsonl",
        {"time": "2026-09-21T12:00:00+00:00", "event": "started"},
        {"time": "2026-09-21T12:00:40+00:00", "event": "finished"},
    )
    write_lines(run_dir / "metrics.jsonl", *(row(step) for step in range(1, 11)))
    assert status(run_dir, alive=False)["goodput"] == pytest.approx(0.25)


def test_recorded_metrics_have_their_newest_value_and_unit(
    run_dir: Path, row: Callable[..., dict[str, Any]], write_lines: Callable[..., None]
) -> None:
    write_lines(run_dir / "metrics.jsonl", row(1, fan_speed=900, val_accuracy=0.25), row(2, fan_speed=950))
    MetricsFile(run_dir / "metrics.jsonl").add_units({"fan_speed": "rpm"})
    assert status(run_dir, alive=False)["metrics"] == {
        "fan_speed": {"value": 950, "unit": "rpm"},
        "val_accuracy": {"value": 0.25, "unit": ""},
    }
    assert metrics_line(LiveProgress(2), row(2, fan_speed=950)).endswith("fan_speed 950")
