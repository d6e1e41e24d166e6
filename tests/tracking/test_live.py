from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bigtrain.tracking.follow import Follower
from bigtrain.tracking.live import LiveDisplay, LiveProgress, event_line, metrics_line, panel, sparkline
from bigtrain.tracking.metrics import MetricsFile

LINE = re.compile(
    r"step \d+(/\d+)?  loss (\d+\.\d{3}|nan)(  val \d+\.\d{3})?  lr \d\.\de-\d\d  \S+ tokens/s(  eta \S+)?"
)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_line_has_its_stated_form() -> None:
    progress = LiveProgress(2000)
    progress.add({"step": 119, "tokens": 119 * 4120, "loss": 2.4, "tokens_per_s": 41200.0})
    row = {
        "step": 120,
        "tokens": 120 * 4120,
        "loss": 2.3118,
        "val_loss": 2.401,
        "lr": 9.8e-4,
        "tokens_per_s": 41200.0,
    }
    progress.add(row)
    assert metrics_line(progress, row) == "step 120/2000  loss 2.312  val 2.401  lr 9.8e-04  41.2k tokens/s  eta 3m08s"
    of_parts = {**row, "gradient_norm/maker": 2.5, "loss/critic": 2.312, "loss/maker": 1.5}
    assert metrics_line(progress, of_parts, {"tokens_per_s": "images/s"}).endswith(
        "41.2k images/s  eta 3m08s  loss/critic 2.31  loss/maker 1.5  (+1 metrics)"
    )
    assert metrics_line(LiveProgress(None), {"step": 1, "loss": None}) == "step 1  loss nan"


def test_a_line_with_many_recorded_metrics_shows_the_main_ones_and_counts_the_others() -> None:
    groups = {f"{kind}_norm/layers.{layer}": 0.125 for kind in ("gradient", "weight") for layer in range(12)}
    row = {"step": 7, "loss": 3.0, "lr": 1e-3, **groups, "weight_norm": 41.5, "router_entropy": 1.25}
    progress = LiveProgress(None)
    line = metrics_line(progress, row)
    assert line.startswith(
        "step 7  loss 3.000  lr 1.0e-03  weight_norm 41.5  router_entropy 1.25  gradient_norm/layers.0"
    )
    shown = line.count("norm/")
    assert 0 < shown < 8
    assert len(line) <= 140
    assert line.endswith(f"(+{24 - shown} metrics)")
    progress.add(row)
    console = Console(file=io.StringIO(), width=60)
    console.print(panel("a-run", progress))
    rows = [one for one in console.file.getvalue().splitlines() if "norm" in one]  # type: ignore[attr-defined]
    assert ["weight_norm 41.5" in one for one in rows] == [True]


def test_plain_lines_follow_a_growing_file(
    run_dir: Path, row: Callable[..., dict[str, Any]], event: Callable[..., dict[str, Any]],
    write_lines: Callable[..., None], eventually: Callable[[Callable[[], bool]], None],
) -> None:  # fmt: skip
    stream = io.StringIO()
    write_lines(run_dir / "events.jsonl", event("started", total_steps=100))
    display = LiveDisplay(run_dir, None, stream, line_every_s=3600.0, poll_s=0.01)
    display.start()
    for step in range(1, 50):
        write_lines(run_dir / "metrics.jsonl", row(step, **({"val_loss": 3.25} if step == 20 else {})))
    write_lines(run_dir / "events.jsonl", event("fault", step=30, cause="killed by SIGKILL"), event("saved", step=40))
    eventually(lambda: "saved" in stream.getvalue())
    display.say("rank 3 was killed")
    write_lines(run_dir / "metrics.jsonl", row(50))
    display.stop()
    lines = stream.getvalue().splitlines()
    steps = [line for line in lines if line.startswith("step")]
    assert all(LINE.fullmatch(line) for line in steps), steps
    assert sum("val 3.250" in line for line in steps) == 1, "each evaluation is shown once"
    assert lines.count("event saved  step 40  attempt 0") == 1
    assert lines.count("rank 3 was killed") == 1
    assert not [line for line in lines if line.startswith("event fault")], "the controller says it in its own words"
    assert steps[-1].startswith("step 50/100"), "the last step is always shown"
    assert len(steps) <= 3, "otherwise at most a line each line_every_s"


def test_what_was_there_before_is_not_shown_again(
    run_dir: Path,
    row: Callable[..., dict[str, Any]],
    event: Callable[..., dict[str, Any]],
    write_lines: Callable[..., None],
) -> None:
    write_lines(run_dir / "metrics.jsonl", *(row(step, val_loss=1.0) for step in range(1, 10)))
    write_lines(run_dir / "events.jsonl", event("started", total_steps=100))
    stream = io.StringIO()
    display = LiveDisplay(run_dir, 100, stream, poll_s=0.01)
    display.start()
    display.stop()
    assert stream.getvalue() == ""


def test_a_resume_that_cuts_the_file_shows_only_new_steps(
    run_dir: Path, row: Callable[..., dict[str, Any]], eventually: Callable[[Callable[[], bool]], None]
) -> None:
    stream = io.StringIO()
    file = MetricsFile(run_dir / "metrics.jsonl")
    display = LiveDisplay(run_dir, 100, stream, line_every_s=0.0, poll_s=0.01)
    display.start()
    for step in range(1, 11):
        file.append(row(step, val_loss=1.0))
    eventually(lambda: "step 10/100" in stream.getvalue())
    file.cut(4)
    eventually(lambda: display._progress.row.get("step") == 4)
    for step in range(5, 9):
        file.append(row(step, val_loss=2.0))
    display.stop()
    steps = [line.split("/")[0] for line in stream.getvalue().splitlines()]
    assert steps == [f"step {step}" for step in (*range(1, 11), *range(5, 9))]


def test_a_terminal_gets_one_panel_with_the_numbers(
    run_dir: Path, row: Callable[..., dict[str, Any]], event: Callable[..., dict[str, Any]],
    write_lines: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    display = LiveDisplay(run_dir, 200, stream, poll_s=0.01)
    display.start()
    write_lines(run_dir / "metrics.jsonl", *(row(step, val_loss=3.25, mfu=0.421) for step in range(1, 51)))
    write_lines(run_dir / "events.jsonl", event("saved", step=50, cause="[bold]not markup[/bold]"))
    display.stop()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    last = text[text.rindex("╭") :]
    for part in (
        "tiny",
        "step 50/200",
        "25%",
        "3.250",
        "42.1%",
        "eta 2m30s",
        "event saved",
        "[bold]not markup",
    ):
        assert part in last, part


def test_a_sparkline_falls_with_its_values() -> None:
    assert sparkline([4.0, 3.0, 2.0, 1.0, 0.0]) == "█▆▅▃▁"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([]) == ""
    assert len(sparkline([float(i) for i in range(1000)])) == 24


def test_an_event_line_leaves_out_what_is_not_known() -> None:
    assert event_line({"event": "started", "step": 0, "rank": None}) == "event started  step 0"


def test_a_follower_yields_each_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    follower = Follower(path)
    assert follower.follow() == ([], False)
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert follower.follow() == ([{"a": 1}, {"a": 2}], False)
    with open(path, "a") as file:
        file.write(': 3}\nnot json\n[1]\n{"a": 4}\n')
    assert follower.follow() == ([{"a": 3}, {"a": 4}], False)
    assert follower.follow() == ([], False)
    os.truncate(path, 9)
    assert follower.follow() == ([{"a": 1}], True)
