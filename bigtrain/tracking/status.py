"""What `bigtrain status` says of one run, from the files that it writes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bigtrain.tracking.history import end_of_record, eta_s, goodput, newest, read_columns, read_events, whole
from bigtrain.tracking.history import state as state_of
from bigtrain.tracking.wandb import read_url


def status(run_dir: Path, alive: bool, now: float | None = None) -> dict[str, Any]:
    """One run's status, under the names that `bigtrain status --json` prints.

    Args:
        run_dir: The run's directory; one without metrics or events is pending.
        alive: Whether somebody holds the run's lease.
        now: Seconds since the epoch; the clock where None.

    Returns:
        Plain values for JSON. `goodput` is the share of wall time since the first start that went into steps
        that were kept; `last_event` an event's name; `eta_s` seconds, only while the run runs; what is not
        known is None. `epochs`: how often each source of a mixture has been gone through.
    """
    columns = read_columns(run_dir / "metrics.jsonl")
    events = read_events(run_dir / "events.jsonl")
    state = state_of(events, alive)
    until = (time.time() if now is None else now) if alive else end_of_record(run_dir, events)
    return {
        "name": run_dir.resolve().name,
        "state": state,
        "step": int(columns.step[-1]) if len(columns) else None,
        "loss": columns.last("loss"),
        "tokens_per_s": columns.last("tokens_per_s"),
        "goodput": goodput(events, columns, until).share,
        "nodes": whole(newest(events, "nodes")),
        "epochs": {name: columns.last(f"epochs/{name}") for name in columns.sources} or None,
        "restarts": sum(event["event"] == "restarted" for event in events),
        "last_event": events[-1]["event"] if events else None,
        "eta_s": eta_s(columns, whole(newest(events, "total_steps"))) if state == "running" else None,
        "wandb_url": read_url(run_dir),
    }
