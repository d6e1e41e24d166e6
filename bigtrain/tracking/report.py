"""`bigtrain report`: one page that says how a run went."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bigtrain.run import names
from bigtrain.storage import write_atomic
from bigtrain.tracking.forecast import held_against
from bigtrain.tracking.forecast_page import show_forecast
from bigtrain.tracking.goodput import PARTS, Goodput
from bigtrain.tracking.history import (
    Columns,
    FloatArray,
    newest,
    read_columns,
    read_events,
    state,
    whole,
)
from bigtrain.tracking.numbers import short, span, timestamp
from bigtrain.tracking.page import Chart, Fact, Mark, Page, Series
from bigtrain.tracking.redact import redact, redact_text, redact_yaml
from bigtrain.tracking.status import run_goodput

MAX_EVENTS = 300
MAX_MARKS = 100
SMOOTH_FROM = 200
_FAULTS = ("fault", "failed")


def write_report(run_dir: Path, alive: bool = False) -> Path:
    """Write RUN/report.html, self-contained and readable offline.

    Args:
        run_dir: The run's directory; whatever of its files is there is shown.
        alive: Whether the run is still going, so that its wall time runs up to now.

    Returns:
        The file's path.
    """
    columns = read_columns(run_dir / names.METRICS)
    events = read_events(run_dir / names.EVENTS)
    good = run_goodput(run_dir, alive)
    page = Page(title=run_dir.resolve().name, subtitle=_subtitle(events, alive))
    page.headline(_facts(columns, events, good))
    if good.wall_s > 0:
        page.heading("Where the time went")
        page.shares(_shares(good))
    if len(columns):
        page.heading("Training")
        page.charts(_charts(columns, _marks(events)))
    if held := held_against(run_dir):
        show_forecast(page, held)
    if events:
        page.heading("Events")
        _events_table(page, events)
    if (sample := run_dir / "sample.txt").exists():
        page.heading("A sample of its text")
        page.preformatted(redact_text(sample.read_text(encoding="utf-8", errors="replace")), prose=True)
    if (config := run_dir / names.CONFIG).exists():
        page.heading("Configuration")
        page.preformatted(redact_yaml(config.read_text(encoding="utf-8")))
    target = run_dir / "report.html"
    write_atomic(target, page.render())
    return target


def _subtitle(events: Sequence[dict[str, Any]], alive: bool) -> str:
    first = next((timestamp(event.get("time")) for event in events), None)
    started = f", started {_clock(first)}" if first is not None else ""
    return f"bigtrain run, {state(events, alive)}{started}"


def _clock(time_s: float | None) -> str:
    return "" if time_s is None else datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _number(value: float | None, form: str = ".4f") -> str:
    return format(value, form) if value is not None else "n/a"


def _facts(columns: Columns, events: Sequence[dict[str, Any]], good: Goodput) -> list[Fact]:
    total = whole(newest(events, "total_steps"))
    step = int(columns.step[-1]) if len(columns) else 0
    tokens, rate = columns.last("tokens"), _median(columns.get("tokens_per_s"))
    share, bits = _median(columns.get("mfu")), columns.last("val_bits_per_byte")
    restarts = sum(event["event"] == "restarted" for event in events)
    faults = sum(event["event"] == "fault" for event in events)
    return [
        Fact("Steps", f"{step:,}", f"of {total:,}" if total is not None else ""),
        Fact("Tokens", short(tokens) if tokens is not None else "n/a"),
        Fact("Final loss", _number(columns.last("loss")), "training, nats per token"),
        Fact(
            "Validation loss",
            _number(columns.last("val_loss")),
            f"{bits:.4f} bits per byte" if bits is not None else "",
        ),
        Fact("Tokens per second", short(rate) if rate is not None else "n/a", "median"),
        Fact(
            "MFU",
            f"{share:.1%}" if share is not None else "n/a",
            "median" if share is not None else "unknown peak",
        ),
        Fact(
            "Wall time",
            span(good.wall_s) if good.wall_s else "n/a",
            _counted(faults, "fault", restarts, "restart"),
        ),
        *(
            Fact(f"Epochs of {name}", _number(columns.last(f"epochs/{name}"), ".2f"), "times through this source")
            for name in columns.sources
        ),
        Fact("Goodput", f"{good.share:.1%}" if good.share is not None else "n/a", "of wall time, in kept steps"),
    ]


def _counted(faults: int, fault: str, restarts: int, restart: str) -> str:
    return f"{faults} {fault}{'s' * (faults != 1)}, {restarts} {restart}{'s' * (restarts != 1)}"


def _median(values: FloatArray) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None


def _shares(good: Goodput) -> list[tuple[str, float, str]]:
    parts = [("steps that were kept", good.steps_s), *((PARTS[name], seconds) for name, seconds in good.lost_s.items())]
    return [(label, seconds, f"{span(seconds)}, {seconds / good.wall_s:.1%}") for label, seconds in parts]


def _marks(events: Sequence[dict[str, Any]]) -> list[Mark]:
    marks: list[Mark] = []
    for event in events:
        if event["event"] in (*_FAULTS, "restarted", "resumed") and isinstance(event.get("step"), int):
            cause = f": {redact_text(str(event['cause']))}" if event.get("cause") else ""
            kind: Literal["fault", "restart"] = "fault" if event["event"] in _FAULTS else "restart"
            marks.append(Mark(event["step"], f"{event['event']}{cause}"[:160], kind))
    return marks[-MAX_MARKS:]


def smooth(values: FloatArray, window: int) -> FloatArray:
    """Mean over `window` values around each one, so without lag; what is not finite is left out.

    Args:
        values: Shape (n,).
        window: How many values; at the ends those that there are. NaN where there is none.
    """
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    low = np.maximum(np.arange(len(values)) - window // 2, 0)
    high = np.minimum(np.arange(len(values)) + window // 2 + 1, len(values))
    with np.errstate(invalid="ignore"):
        return np.asarray((sums[high] - sums[low]) / (counts[high] - counts[low]), dtype=np.float64)


def _with_mean(
    columns: Columns, name: str, label: str, color: Literal[1, 2, 3, 4], factor: float = 1.0
) -> list[Series]:
    """A column's curve; a long one is faint, with its running mean before it."""
    values = columns.get(name) * factor
    if len(columns) < SMOOTH_FROM:
        return [Series(label, columns.step, values, color)]
    mean = smooth(values, len(columns) // 60)
    return [
        Series(f"{label}, each step", columns.step, values, color, faint=True),
        Series(f"{label}, mean", columns.step, mean, color),
    ]


def _loss_series(columns: Columns) -> list[Series]:
    validation = Series("validation", columns.step, columns.get("val_loss"), 2, markers=True)
    return [*_with_mean(columns, "loss", "training", 1), validation]


def _charts(columns: Columns, marks: Sequence[Mark]) -> list[Chart]:
    step = columns.step
    sources = sorted(name for name in columns.values if name.startswith("loss/"))
    colors: tuple[Literal[1, 2, 3, 4], ...] = (1, 2, 3, 4)
    by_source = [
        Series(name.removeprefix("loss/"), step, smooth(columns.get(name), len(columns) // 60), color)
        for name, color in zip(sources, colors, strict=False)
    ]
    rate = _with_mean(columns, "tokens_per_s", "tokens/s", 1)
    memory = [Series("memory", step, columns.get("memory_bytes") / 2**30, 2)]
    return [
        Chart("Loss", _loss_series(columns), "nats per token", marks=marks, wide=True, log_switch=True),
        Chart("Loss by source", by_source, "nats per token", marks=marks, wide=True, log_switch=True),
        Chart("Learning rate", [Series("learning rate", step, columns.get("lr"), 3)], value_format=".3~e"),
        Chart("Gradient norm", _with_mean(columns, "grad_norm", "gradient norm", 4), marks=marks),
        Chart("Throughput", rate, "tokens/s", marks=marks, value_format=".3~s", from_zero=True),
        Chart(
            "MFU", _with_mean(columns, "mfu", "MFU", 1), "share of dense peak", marks=marks,
            value_format=".1%", tick_format=".0%", from_zero=True,
        ),
        Chart("Memory", memory, "GiB, peak of the worst rank", marks=marks, from_zero=True),
        Chart("Wait for data", _with_mean(columns, "data_wait_s", "wait", 3, 1e3), "ms a step", marks=marks),
    ]  # fmt: skip


def _events_table(page: Page, events: Sequence[dict[str, Any]]) -> None:
    shown = list(events)
    if len(shown) > MAX_EVENTS:
        shown = [event for event in shown if event["event"] != "saved"][-MAX_EVENTS:]
        page.note(f"{len(shown)} of {len(events)} events; events.jsonl has all of them.")
    header = ("Time", "Event", "Step", "Attempt", "Rank", "Host", "Cause")
    rows = []
    for event in shown:
        fields = redact({name.lower(): event.get(name.lower()) for name in header[1:]})
        rows.append([_clock(timestamp(event.get("time"))), *fields.values()])
    page.table(header, rows, long=("Cause",))
