"""The progress that a driver shows: a live table of the running trials on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from bigtrain.sweeps.journal import SweepDirectory, SweepState
from bigtrain.sweeps.trials import Trial
from bigtrain.tracking.follow import Follower
from bigtrain.tracking.numbers import finite, short, span

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

REFRESH_S = 0.5
LINE_EVERY_S = 20.0


class SweepDisplay:
    """Shows the progress of a sweep.

    Args:
        directory: The sweep's directory.
        stream: Where progress is shown: as a live table if it is a terminal, otherwise as plain lines.
        clock: A function that returns seconds of a monotonic clock.
    """

    def __init__(self, directory: SweepDirectory, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory, self._stream, self._clock = directory, stream, clock
        self._state = SweepState()
        self._live: Live | None = None
        self._followers: dict[str, Follower] = {}
        self._rows: dict[str, dict[str, Any]] = {}
        self._began = clock()
        self._before = 0.0
        """FLOPs of the trials that were finished when this driver began."""
        self._parts_before: dict[str, float] = {}
        """For each trial that this driver runs, the fraction that an earlier driver had trained."""
        self._next = 0.0

    @contextlib.contextmanager
    def shown(self, state: SweepState, slots: int) -> Iterator[None]:
        """Show the table while the `with` block runs, if the stream is a terminal."""
        self._state, self._before = state, _done(state)
        if not self._stream.isatty():
            yield
            return
        from rich.console import Console
        from rich.live import Live

        with Live("", console=Console(file=self._stream), auto_refresh=False) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def say(self, line: str) -> None:
        """Print one line, above the table if there is one."""
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self._stream, flush=True)

    def update(self, running: Mapping[int, Trial]) -> None:
        """Show the steps of the running trials; returns at once if the last update was recent.

        Args:
            running: The running trials by slot.
        """
        now = self._clock()
        if now < self._next:
            return
        self._next = now + (REFRESH_S if self._live is not None else LINE_EVERY_S)
        for trial in running.values():
            follower = self._followers.setdefault(trial.name, Follower(self._directory.run(trial.name).metrics))
            rows, _ = follower.follow()
            if rows:
                self._rows[trial.name] = rows[-1]
            # A resumed run goes back to its checkpoint, so its fraction may shrink.
            self._parts_before[trial.name] = min(self._part(trial), self._parts_before.get(trial.name, 1.0))
        if self._live is not None:
            self._live.update(self._table(running), refresh=True)
        elif running:
            print(f"{self._head(running)}: {', '.join(self._line(trial) for trial in running.values())}",
                  file=self._stream, flush=True)  # fmt: skip

    def _head(self, running: Mapping[int, Trial]) -> str:
        trials = self._state.trials.values()
        finished = sum(record.state == "finished" for record in trials)
        total = sum(record.trial.own_flops for record in trials if record.state != "refused")
        done = _done(self._state) + sum(self._part(trial) * trial.own_flops for trial in running.values())
        before = sum(part * self._state.trials[name].trial.own_flops for name, part in self._parts_before.items())
        elapsed, gained = self._clock() - self._began, done - self._before - before
        eta = f", {span(elapsed / gained * (total - done))} left" if gained > 0 and elapsed > LINE_EVERY_S else ""
        return f"{finished} of {len(trials)} trials, {done / max(total, 1.0):.0%} of the FLOPs{eta}"

    def _part(self, trial: Trial) -> float:
        step = self._rows.get(trial.name, {}).get("step", trial.parent_step)
        return max(0.0, (step - trial.parent_step) / max(1, trial.own_steps))

    def _line(self, trial: Trial) -> str:
        row = self._rows.get(trial.name, {})
        loss = finite(row.get("loss"))
        shown = f" loss {loss:.3f}" if loss is not None else ""
        return f"{trial.name} {row.get('step', trial.parent_step)}/{trial.steps}{shown}"

    def _table(self, running: Mapping[int, Trial]) -> RenderableType:
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for slot, trial in sorted(running.items()):
            row = self._rows.get(trial.name, {})
            loss, rate = finite(row.get("loss")), finite(row.get("tokens_per_s"))
            table.add_row(
                str(slot), trial.name, ProgressBar(total=1.0, completed=self._part(trial), width=24),
                f"{row.get('step', trial.parent_step)}/{trial.steps}", f"loss {loss:.3f}" if loss is not None else "",
                f"{short(rate)} tokens/s" if rate is not None else "",
            )  # fmt: skip
        return Panel(
            table, title=f"{self._directory.name}: {self._head(running)}", title_align="left", border_style="dim"
        )


def _done(state: SweepState) -> float:
    return sum(record.trial.own_flops for record in state.trials.values() if record.state == "finished")
