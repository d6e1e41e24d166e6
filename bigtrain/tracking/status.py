"""The status of a run for `bigtrain status`, computed from the files in the run's directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bigtrain.run import names
from bigtrain.tracking.forecast import held_against
from bigtrain.tracking.goodput import Goodput, goodput
from bigtrain.tracking.history import Columns, eta_s, newest, read_columns, read_events, record_s, whole
from bigtrain.tracking.history import state as state_of
from bigtrain.tracking.metrics import read_units
from bigtrain.tracking.numbers import timestamp
from bigtrain.tracking.trackers.wandb import read_url


def status(run_dir: Path, alive: bool, now: float | None = None) -> dict[str, Any]:
    """The status of one run, with the keys that `bigtrain status --json` prints.

    Args:
        run_dir: The run's directory. A run without events is pending.
        alive: Whether a process holds the run's lease.
        now: Current Unix time in seconds; None: from the system's clock.

    Returns:
        JSON values; an unknown value is None. Among the keys:
        `goodput`: share of the wall time since the first start that was spent on steps that were kept.
        `time`: seconds of each part of the wall time (`bigtrain.tracking.goodput`).
        `energy_j`: energy in joules that the machine used, where it can be measured.
        `last_event`: name of the last event.
        `eta_s`: estimated seconds to the end, only while the run trains.
        `forecast`: the run compared with its preregistered forecast (`held_against`).
        `units`: units of `loss` and `tokens_per_s`, which depend on the model; a unit that is not known is missing.
        `metrics`: newest value and unit of each metric that was recorded by name.
        `best`: step, metric and value of the best checkpoint (`checkpoint.best`).
        `epochs`: number of epochs of each source of a mixture.
    """
    columns = read_columns(run_dir / names.METRICS)
    events = read_events(run_dir / names.EVENTS)
    state = state_of(events, alive)
    units = read_units(run_dir / names.METRICS)
    recorded = [*(f"loss/{part}" for part in columns.parts), *columns.recorded]
    good = _goodput(run_dir, events, columns, alive, now)
    return {
        "name": run_dir.resolve().name,
        "state": state,
        "step": int(columns.step[-1]) if len(columns) else None,
        "loss": columns.last("loss"),
        "tokens_per_s": columns.last("tokens_per_s"),
        "units": {name: units[name] for name in ("loss", "tokens_per_s") if units.get(name)} or None,
        "goodput": good.share,
        "nodes": whole(newest(events, "nodes")),
        "metrics": {name: {"value": columns.last(name), "unit": units.get(name, "")} for name in recorded} or None,
        "epochs": {name: columns.last(f"epochs/{name}") for name in columns.sources} or None,
        "restarts": sum(event["event"] == "restarted" for event in events),
        "last_event": events[-1]["event"] if events else None,
        "eta_s": eta_s(columns, whole(newest(events, "total_steps"))) if state == "running" else None,
        "forecast": held_against(run_dir),
        "wandb_url": read_url(run_dir),
        "time": good.plain(),
        "energy_j": good.energy_j,
        "best": _best(events),
    }


def _best(events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The best checkpoint according to the newest `saved` event that no later `rolled_back` event revokes."""
    saves: dict[int, dict[str, Any] | None] = {}
    for event in events:
        if event["event"] == "saved" and isinstance(step := event.get("step"), int):
            saves[step] = event.get("best")
        elif event["event"] == "rolled_back" and isinstance(to := event.get("to"), int):
            saves = {step: best for step, best in saves.items() if step <= to}
    return saves[max(saves)] if saves else None


def run_goodput(run_dir: Path, alive: bool = False) -> Goodput:
    """The parts of a run's wall time; `alive`: whether a process holds its lease, so that time counts up to now."""
    events = read_events(run_dir / names.EVENTS)
    return _goodput(run_dir, events, read_columns(run_dir / names.METRICS), alive, None)


def _goodput(run_dir: Path, events: list[dict[str, Any]], columns: Columns, alive: bool, now: float | None) -> Goodput:
    if not alive:
        return goodput(events, columns, record_s(run_dir, events))
    last = timestamp(events[-1].get("time")) if events else None
    return goodput(events, columns, None if now is None or last is None else max(0.0, now - last))
