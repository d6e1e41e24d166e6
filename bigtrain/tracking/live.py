"""The live display of the controller during a run: a panel on a terminal, plain lines in other output."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bigtrain.run import names
from bigtrain.tracking.follow import Follower
from bigtrain.tracking.metrics import is_recorded, part_losses, read_units
from bigtrain.tracking.numbers import finite, short, span

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

POLL_S = 0.25
LINE_EVERY_S = 5.0
_RECENT = 60
_SHOWN = 8
"""Largest number of metrics recorded by name in a line."""
_LINE_WIDTH = 120
"""Largest number of characters in a plain line."""
_BARS = "▁▂▃▄▅▆▇█"
_LOUD = {"fault": "red", "failed": "red", "restarted": "yellow", "stopped": "yellow", "finished": "green"}
_SAID = ("fault", "restarted", "stopped", "failed", "finished")
"""Events that the display does not print, since the controller prints its own lines for them by `LiveDisplay.say`."""


def sparkline(values: list[float], width: int = 24) -> str:
    """A curve as one row of characters, the newest value on the right, scaled from smallest to largest value."""
    shown = values[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in shown)


class LiveProgress:
    """The values of a run that the display shows."""

    def __init__(self, total_steps: int | None) -> None:
        self.total_steps = total_steps
        self.row: dict[str, Any] = {}
        self.val_loss: float | None = None
        self.event: dict[str, Any] | None = None
        self.losses: deque[float] = deque(maxlen=_RECENT)
        self._pace: deque[float] = deque(maxlen=_RECENT)

    def restart(self) -> None:
        """Discard the metrics, since the file was truncated and is read again from its start."""
        self.row, self.val_loss = {}, None
        self.losses.clear()
        self._pace.clear()

    def add(self, row: dict[str, Any]) -> None:
        """Process one object of metrics.jsonl."""
        before, self.row = self.row, row
        if (loss := finite(row.get("loss"))) is not None:
            self.losses.append(loss)
        if (val := finite(row.get("val_loss"))) is not None:
            self.val_loss = val
        steps = row["step"] - before.get("step", 0)
        tokens = (finite(row.get("tokens")) or 0.0) - (finite(before.get("tokens")) or 0.0)
        rate = finite(row.get("tokens_per_s"))
        if steps > 0 and tokens > 0 and rate:
            self._pace.append(tokens / rate / steps)

    def add_event(self, event: dict[str, Any]) -> None:
        """Process one object of events.jsonl."""
        self.event = event
        if isinstance(event.get("total_steps"), int):
            self.total_steps = event["total_steps"]

    @property
    def eta_s(self) -> float | None:
        """Estimated seconds to the last step at the recent median speed; None if unknown."""
        if not self._pace or self.total_steps is None:
            return None
        pace = sorted(self._pace)[len(self._pace) // 2]
        return float(max(0, self.total_steps - self.row["step"]) * pace)


def metrics_line(progress: LiveProgress, row: dict[str, Any], units: Mapping[str, str] | None = None) -> str:
    """A line such as `step 120/2000  loss 2.312  val 2.401  lr 9.8e-04  41.2k tokens/s  eta 3m10s`.

    `val` appears only after an evaluation; `units` may have another unit of the rate. Metrics recorded by name follow,
    as many as fit into the line.
    """
    total = f"/{progress.total_steps}" if progress.total_steps is not None else ""
    loss = finite(row.get("loss"))
    parts = [f"step {row['step']}{total}", f"loss {loss:.3f}" if loss is not None else "loss nan"]
    if (val := finite(row.get("val_loss"))) is not None:
        parts.append(f"val {val:.3f}")
    if (lr := finite(row.get("lr"))) is not None:
        parts.append(f"lr {lr:.1e}")
    if (rate := finite(row.get("tokens_per_s"))) is not None:
        parts.append(f"{short(rate)} {(units or {}).get('tokens_per_s', 'tokens/s')}")
    if (eta := progress.eta_s) is not None:
        parts.append(f"eta {span(eta)}")
    line, own = "  ".join(parts), main_first(recorded(row))
    for number, (name, text) in enumerate(own):
        more = f"{line}  {name} {text}"
        if number == _SHOWN or len(more) > _LINE_WIDTH:
            return f"{line}  (+{len(own) - number} metrics)"
        line = more
    return line


def main_first(metrics: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Sort metrics: first the losses of a model's parts, last what belongs to another metric (`weight_norm/layers`)."""
    return sorted(metrics, key=lambda metric: "/" in metric[0] and not metric[0].startswith("loss/"))


def recorded(row: dict[str, Any], units: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    """Name, and value with unit, of each metric in the row that was recorded by name or is the loss of a part."""
    found, parts = [], {f"loss/{part}" for part in part_losses(row)}
    for name, item in row.items():
        value = finite(item)
        if value is not None and (is_recorded(name) or name in parts):
            unit = (units or {}).get(name, "")
            found.append((name, f"{short(value)} {unit}".rstrip()))
    return found


def event_line(event: dict[str, Any]) -> str:
    """A line such as `event fault  step 120  rank 3  host a7  cause killed by SIGKILL`."""
    parts = [f"event {event['event']}"]
    for name in ("step", "attempt", "rank", "host", "cause"):
        if event.get(name) is not None:
            parts.append(f"{name} {event[name]}")
    return "  ".join(parts)


class LiveDisplay:
    """Reads a run's metrics.jsonl and events.jsonl in a thread while they grow, and shows them.

    Rows that the files contain at the start are used for the curve, but not printed.

    Args:
        run_dir: The run's directory, whose files need not exist yet.
        total_steps: Number of steps of the run; None: unknown. An event with `total_steps` replaces it.
        stream: The output: on a terminal a panel that is redrawn, otherwise plain lines.
        line_every_s: Shortest time in seconds between two plain lines; evaluations and events are always printed.
        poll_s: Seconds between two reads of the files.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int | None,
        stream: IO[str],
        *,
        line_every_s: float = LINE_EVERY_S,
        poll_s: float = POLL_S,
    ) -> None:
        self._run_dir = run_dir
        self._name = run_dir.resolve().name
        self._stream = stream
        self._line_every_s, self._poll_s = line_every_s, poll_s
        self._progress = LiveProgress(total_steps)
        self._metrics = Follower(run_dir / names.METRICS)
        self._events = Follower(run_dir / names.EVENTS)
        self._stop = threading.Event()
        self._console: Console | None = None
        self._thread: threading.Thread | None = None
        self._last_line_s = float("-inf")
        self._printed_step: int | None = None

    def start(self) -> None:
        """Start the display's thread, and return at once."""
        self._read()
        self._printed_step = self._progress.row.get("step")
        run = self._show_panel if self._stream.isatty() else self._show_lines
        self._thread = threading.Thread(target=run, name="live-display", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Show the last rows, and wait until the display's thread has ended."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def say(self, line: str) -> None:
        """Print a line; may be called from any thread, also before `start` and after `stop`."""
        console = self._console
        if console is not None:
            console.print(line, markup=False, highlight=False)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def _read(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        rows, was_cut = self._metrics.follow()
        if was_cut:
            self._progress.restart()
        rows = [row for row in rows if isinstance(row.get("step"), int)]
        for row in rows:
            self._progress.add(row)
        if was_cut:
            # The rows before the truncation have already been shown.
            self._printed_step = rows[-1]["step"] if rows else None
            rows = []
        events = [event for event in self._events.follow()[0] if isinstance(event.get("event"), str)]
        for event in events:
            self._progress.add_event(event)
        return rows, events

    def _show_lines(self) -> None:
        while not self._stop.wait(self._poll_s):
            self._print_new()
        self._print_new(last=True)

    def _print_new(self, last: bool = False) -> None:
        rows, events = self._read()
        lines = [event_line(event) for event in events if event["event"] not in _SAID]
        for row in rows:
            if finite(row.get("val_loss")) is not None:
                lines.append(self._line(row))
        newest = self._progress.row
        is_due = last or time.monotonic() - self._last_line_s >= self._line_every_s
        if newest and newest["step"] != self._printed_step and is_due:
            lines.append(self._line(newest))
        if lines:
            self._stream.write("".join(line + "\n" for line in lines))
            self._stream.flush()

    def _line(self, row: dict[str, Any]) -> str:
        self._last_line_s = time.monotonic()
        self._printed_step = row["step"]
        return metrics_line(self._progress, row, read_units(self._run_dir / names.METRICS))

    def _show_panel(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._stream)
        with Live(self._panel(), console=console, auto_refresh=False) as live:
            self._console = live.console
            while not self._stop.wait(self._poll_s):
                self._read()
                live.update(self._panel(), refresh=True)
            self._read()
            live.update(self._panel(), refresh=True)
            self._console = None

    def _panel(self) -> RenderableType:
        return panel(self._name, self._progress, read_units(self._run_dir / names.METRICS))


def panel(name: str, progress: LiveProgress, units: Mapping[str, str] | None = None) -> RenderableType:
    """The panel of one run, for rich."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    row = progress.row
    step, total = row.get("step", 0), progress.total_steps
    head = Table.grid(expand=True, padding=(0, 1))
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(justify="right", no_wrap=True)
    share = f"{step / total:.0%}" if total else ""
    head.add_row(
        Text(f"step {step}" + (f"/{total}" if total else ""), style="bold"),
        ProgressBar(total=total or 1, completed=step if total else 0),
        Text(share, style="bold"),
    )
    body = Table.grid(padding=(0, 3))
    loss, val = finite(row.get("loss")), progress.val_loss
    curve = sparkline(list(progress.losses))
    body.add_row(*_cell("loss", f"{loss:.3f}" if loss is not None else "–"), Text(curve, style="cyan", no_wrap=True))
    facts = [("val", f"{val:.3f}" if val is not None else "–")]
    for label, key, form in (("lr", "lr", "{:.1e}"), ("mfu", "mfu", "{:.1%}")):
        value = finite(row.get(key))
        facts.append((label, form.format(value) if value is not None else "n/a" if key == "mfu" else "–"))
    rate, eta = finite(row.get("tokens_per_s")), progress.eta_s
    facts.append(((units or {}).get("tokens_per_s", "tokens/s"), short(rate) if rate is not None else "–"))
    facts.append(("eta", span(eta) if eta is not None else "–"))
    line = Table.grid(padding=(0, 2))
    line.add_row(*[Text.assemble((f"{label} ", "dim"), text) for label, text in facts])
    parts: list[RenderableType] = [head, body, line]
    if own := main_first(recorded(row, units))[:_SHOWN]:
        cells = (part for label, text in own for part in ((f"{label} ", "dim"), f"{text}  "))
        parts.append(Text.assemble(*cells, no_wrap=True, overflow="ellipsis"))
    if progress.event is not None:
        style = _LOUD.get(progress.event["event"], "dim")
        parts.append(Text(event_line(progress.event), style=style, no_wrap=True, overflow="ellipsis"))
    return Panel(Group(*parts), title=Text(name, style="bold"), title_align="left", border_style="dim")


def _cell(label: str, value: str) -> tuple[RenderableType]:
    from rich.text import Text

    return (Text.assemble((f"{label} ", "dim"), (value, "bold")),)
