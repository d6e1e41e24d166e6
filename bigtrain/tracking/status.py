"""What `bigtrain status` says of one run, from the files that it writes."""

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
    """One run's status, under the names that `bigtrain status --json` prints.

    Args:
        run_dir: The run's directory; one without metrics or events is pending.
        alive: Whether somebody holds the run's lease.
        now: Seconds since the epoch; the clock where None.

    Returns:
        Plain values for JSON. `goodput` is the share of wall time since the first start that went into steps
        that were kept, `time` where all of it went (`bigtrain.tracking.goodput`); `energy_j` the joules that the
        machine used meanwhile, where they can be read; `last_event` an event's name; `eta_s` seconds, only while
        the run runs; `forecast` the run beside its preregistered forecast (`held_against`);
        `metrics` the newest value and the unit of each metric that was recorded by name;
        `best` the step, metric and value of the best checkpoint (`checkpoint.best`);
        `epochs` how often each source of a mixture has been gone through; what is not known is None.
    """
    columns = read_columns(run_dir / names.METRICS)
    events = read_events(run_dir / names.EVENTS)
    state = state_of(events, alive)
    good = _goodput(run_dir, events, columns, alive, now)
    return {
        "name": run_dir.resolve().name,
        "state": state,
        "step": int(columns.step[-1]) if len(columns) else None,
        "loss": columns.last("loss"),
        "tokens_per_s": columns.last("tokens_per_s"),
        "goodput": good.share,
        "nodes": whole(newest(events, "nodes")),
        "metrics": _recorded(run_dir, columns) or None,
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
    """What the newest save that was not taken back named as the best checkpoint."""
    saves: dict[int, dict[str, Any] | None] = {}
    for event in events:
        if event["event"] == "saved" and isinstance(step := event.get("step"), int):
            saves[step] = event.get("best")
        elif event["event"] == "rolled_back" and isinstance(to := event.get("to"), int):
            saves = {step: best for step, best in saves.items() if step <= to}
    return saves[max(saves)] if saves else None


def _recorded(run_dir: Path, columns: Columns) -> dict[str, dict[str, Any]]:
    units = read_units(run_dir / names.METRICS)
    return {name: {"value": columns.last(name), "unit": units.get(name, "")} for name in columns.recorded}


def run_goodput(run_dir: Path, alive: bool = False) -> Goodput:
    """Where a run's time went; `alive`: whether somebody holds its lease, so that its time goes on."""
    events = read_events(run_dir / names.EVENTS)
    return _goodput(run_dir, events, read_columns(run_dir / names.METRICS), alive, None)


def _goodput(run_dir: Path, events: list[dict[str, Any]], columns: Columns, alive: bool, now: float | None) -> Goodput:
    if not alive:
        return goodput(events, columns, record_s(run_dir, events))
    last = timestamp(events[-1].get("time")) if events else None
    return goodput(events, columns, None if now is None or last is None else max(0.0, now - last))
