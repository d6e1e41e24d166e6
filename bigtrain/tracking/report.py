"""`bigtrain report`: an HTML page about a run, or a comparison of two runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from bigtrain.run import names
from bigtrain.storage import write_atomic
from bigtrain.tracking.forecast import held_against
from bigtrain.tracking.forecast_page import show_forecast
from bigtrain.tracking.goodput import PARTS, Goodput
from bigtrain.tracking.history import Columns, FloatArray, newest, read_columns, read_events, state, whole
from bigtrain.tracking.metrics import read_units
from bigtrain.tracking.numbers import short, span, timestamp
from bigtrain.tracking.page import Fact, Mark, Page
from bigtrain.tracking.pictures import note_of
from bigtrain.tracking.redact import redact, redact_text, redact_yaml
from bigtrain.tracking.report_charts import axes, charts
from bigtrain.tracking.status import run_goodput

MAX_EVENTS = 300
MAX_MARKS = 100
MAX_PICTURES = 4
"""Largest number of images with the same title in a report."""
MAX_VALIDATED = 4
"""Largest number of the evaluations' metrics, beside the loss, among the headline numbers."""
_FAULTS = ("fault", "failed")


@dataclass(frozen=True)
class _Run:
    """The contents of a run's files."""

    directory: Path
    alive: bool

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @cached_property
    def columns(self) -> Columns:
        return read_columns(self.directory / names.METRICS)

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        return read_events(self.directory / names.EVENTS)

    @cached_property
    def units(self) -> dict[str, str]:
        """Units of metrics, by the metric's name."""
        return read_units(self.directory / names.METRICS)

    @cached_property
    def goodput(self) -> Goodput:
        return run_goodput(self.directory, self.alive)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config; empty if it cannot be read."""
        try:
            found = yaml.safe_load((self.directory / names.CONFIG).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            return {}
        return found if isinstance(found, dict) else {}


def write_report(run_dir: Path, alive: bool = False) -> Path:
    """Write RUN/report.html, which is self-contained and opens offline.

    Args:
        run_dir: The run's directory; missing files are omitted from the report.
        alive: Whether a process holds the run's lease, so that its wall time counts up to now.

    Returns:
        Path of the report.
    """
    run = _Run(run_dir, alive)
    page = Page(title=run.name, subtitle=_subtitle(run.events, alive))
    if summary := _summary(run.config):
        page.note(summary)
    page.headline(_facts(run))
    if held := held_against(run_dir):
        show_forecast(page, held)
    _time_bars(page, [run])
    _curves(page, [run])
    _pictures(page, run)
    if run.events:
        page.heading("Events")
        _events_table(page, run.events)
    if (sample := run_dir / "sample.txt").exists():
        page.heading("A sample of its text")
        page.preformatted(redact_text(sample.read_text(encoding="utf-8", errors="replace")), prose=True)
    if (config := run_dir / names.CONFIG).exists():
        page.heading("Configuration")
        page.preformatted(redact_yaml(config.read_text(encoding="utf-8")))
    target = run_dir / "report.html"
    write_atomic(target, page.render())
    return target


def write_comparison(first: Path, second: Path, target: Path) -> Path:
    """Write a page that compares two runs: main numbers, differences of the configs, and curves in the same charts."""
    runs = [_Run(directory, alive=False) for directory in (first, second)]
    page = Page(title=" and ".join(run.name for run in runs), subtitle="two bigtrain runs side by side")
    facts = [{fact.label: fact for fact in _facts(run)} for run in runs]
    labels = [*facts[0], *(label for label in facts[1] if label not in facts[0])]
    rows = [[label, *(one[label].value if label in one else "" for one in facts)] for label in labels]
    page.table(["", *(run.name for run in runs)], rows)
    flat = [dict(_flat(redact(run.config))) for run in runs]
    differing = [key for key in {**flat[0], **flat[1]} if key != "name" and flat[0].get(key) != flat[1].get(key)]
    if differing:
        page.heading("What differs in their configs")
        page.table(["key", *(run.name for run in runs)], [[key, *(one.get(key) for one in flat)] for key in differing])
    _time_bars(page, runs)
    _curves(page, runs)
    write_atomic(target, page.render())
    return target


def _time_bars(page: Page, runs: Sequence[_Run]) -> None:
    known = [run for run in runs if run.goodput.wall_s > 0]
    if known:
        page.heading("Where the time went")
    for run in known:
        if len(runs) > 1:
            page.note(run.name)
        page.shares(_shares(run.goodput))


def _curves(page: Page, runs: Sequence[_Run]) -> None:
    known = {run.name: run.columns for run in runs if len(run.columns)}
    if not known:
        return
    page.heading("Training")
    units = _units(runs)
    page.controls(axes(max(known.values(), key=len), units.get("tokens", "tokens")))
    page.charts(charts(known, _marks(runs[0].events) if len(runs) == 1 else (), units))


def _units(runs: Sequence[_Run]) -> dict[str, str]:
    """The units of all runs' metrics; units that differ are joined by "or"."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, unit in run.units.items():
            found.setdefault(name, {})[unit] = None
    return {name: " or ".join(units) for name, units in found.items()}


def _pictures(page: Page, run: _Run) -> None:
    """Add the images of each title: those of the first and the newest step, and some evenly spaced between them."""
    by_title: dict[str, dict[int, Path]] = {}
    folder = run.directory / names.PICTURES
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if found := names.PICTURE.fullmatch(file.name):
            by_title.setdefault(found["title"].replace("-", " "), {})[int(found["step"])] = file
    for title, files in by_title.items():
        page.heading(title.capitalize())
        steps = sorted(files)
        if note := note_of(files[steps[-1]]):
            page.note(redact_text(note))
        chosen = np.unique(np.linspace(0, len(steps) - 1, MAX_PICTURES).round().astype(int))
        page.pictures(
            [(f"step {steps[n]:,}", f"{title} at step {steps[n]}", files[steps[n]].read_bytes()) for n in chosen]
        )


def _summary(config: dict[str, Any]) -> str:
    """The main values of a config in one line: model, batch, duration, optimizer, precision, engine."""

    def of(section: str, *keys: str) -> list[str]:
        found = config.get(section)
        values = found if isinstance(found, dict) else {}
        return [f"{key} {values[key]}" for key in keys if values.get(key) not in (None, False, "auto", -1)]

    # A model without tokens has a context of 1.
    model = [one for one in of("model", "arch", "layers", "width", "context") if one != "context 1"]
    optimizer = of("optimizer", "name", "lr", "weight_decay")
    parts = [", ".join(part) for part in (model, of("batch", "size"), optimizer, of("schedule", "name")) if part]
    if isinstance(config.get("duration"), str):
        parts.insert(2, config["duration"])
    layout = of("layout", "dp_replicate", "dp_shard", "cp", "tp", "pp")
    layout = [one for one in layout if not one.endswith(" 1")]
    parts += [", ".join([str(config.get("precision", "")), *of("engine", "name"), *layout]).strip(", ")]
    return redact_text(" · ".join(part.replace("name ", "").replace("size ", "batch ") for part in parts if part))


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _subtitle(events: Sequence[dict[str, Any]], alive: bool) -> str:
    first = next((timestamp(event.get("time")) for event in events), None)
    started = f", started {_clock(first)}" if first is not None else ""
    return f"bigtrain run, {state(events, alive)}{started}"


def _clock(time_s: float | None) -> str:
    return "" if time_s is None else datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _facts(run: _Run) -> list[Fact]:
    """The main numbers of a run; unknown ones are omitted."""
    columns, events, good = run.columns, run.events, run.goodput
    total = whole(newest(events, "total_steps"))
    step = int(columns.step[-1]) if len(columns) else 0
    counted = run.units.get("tokens", "tokens").capitalize()
    restarts = sum(event["event"] == "restarted" for event in events)
    faults = sum(event["event"] == "fault" for event in events)
    return [
        Fact("Steps", f"{step:,}", f"of {total:,}" if total is not None else ""),
        *_fact(counted, columns.last("tokens"), short),
        *_loss_facts(run),
        *_fact(f"{counted} per second", _median(columns.get("tokens_per_s")), short, "median"),
        *_fact("MFU", _median(columns.get("mfu")), "{:.1%}".format, "median"),
        *_fact("Wall time", good.wall_s or None, span, _counted(faults, "fault", restarts, "restart")),
        *(
            one
            for name in columns.sources
            for one in _fact(
                f"Epochs of {name}", columns.last(f"epochs/{name}"), "{:.2f}".format, "times through this source"
            )
        ),
        *_fact("Goodput", good.share, "{:.1%}".format, "of wall time, in kept steps"),
    ]


def _loss_facts(run: _Run) -> list[Fact]:
    """The losses, of each part if the model has several, and at most MAX_VALIDATED other metrics of the evaluations."""
    columns, unit = run.columns, run.units.get("loss", "")
    bits = columns.last("val_bits_per_byte")
    losses = {f", {part}": (f"loss/{part}", "") for part in columns.parts} or {"": ("loss", unit)}
    found = []
    for of, (name, note) in losses.items():
        found += _fact(f"Final loss{of}", columns.last(name), _decimals, f"training, {note}" if note else "training")
        note = note if bits is None else f"{bits:.4f} bits per byte"
        found += _fact(f"Validation loss{of}", columns.last(f"val_{name}"), _decimals, note)
    others = [name for name in columns.recorded if name.startswith("val_") and "/" not in name]
    for name in others[:MAX_VALIDATED]:
        label = name.removeprefix("val_").replace("_", " ")
        found += _fact(f"Validation {label}", columns.last(name), _decimals, run.units.get(name, ""))
    return found


def _fact(label: str, value: float | None, form: Callable[[float], str], note: str = "") -> list[Fact]:
    return [] if value is None else [Fact(label, form(value), note)]


def _decimals(value: float) -> str:
    return f"{value:.4f}" if abs(value) >= 0.01 or value == 0 else f"{value:.3g}"


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


def _events_table(page: Page, events: Sequence[dict[str, Any]]) -> None:
    shown = _folded(events)
    if len(shown) > MAX_EVENTS:
        shown = [event for event in shown if event["event"] != "saved"][-MAX_EVENTS:]
        page.note(f"{len(shown)} of {len(events)} events; events.jsonl has all of them.")
    header = ("Time", "Event", "Step", "Attempt", "Rank", "Host", "Cause")
    rows = []
    for event in shown:
        fields = redact({name.lower(): event.get(name.lower()) for name in header[1:]})
        rows.append([_clock(timestamp(event.get("time"))), *fields.values()])
    # Empty columns are omitted.
    kept = [number for number in range(len(header)) if any(row[number] is not None for row in rows)]
    page.table([header[n] for n in kept], [[row[n] for n in kept] for row in rows], long=("Cause",))


def _folded(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events, in which the straggler events of one rank are merged into the first, with their number."""
    counts: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
    shown = []
    for event in events:
        key = event.get("rank"), event.get("host")
        if event["event"] == "straggler":
            counts.setdefault(key, []).append(event)
            if len(counts[key]) > 1:
                continue
        shown.append(event)
    folded = []
    for event in shown:
        same = counts.get((event.get("rank"), event.get("host")), []) if event["event"] == "straggler" else []
        if len(same) > 1:
            cause = f"{event.get('cause', '')}; reported {len(same)} times, up to step {same[-1].get('step')}"
            folded.append({**event, "event": f"straggler \u00d7 {len(same)}", "cause": cause.lstrip("; ")})
        else:
            folded.append(event)
    return folded
