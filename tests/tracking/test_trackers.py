"""Trackers other than Weights & Biases: TensorBoard's files, and a user's own from a plugin."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from bigtrain.config import UserError
from bigtrain.config.plugin import load_plugin
from bigtrain.storage import read_lines
from bigtrain.tracking.config import PICTURE_KEY, TRACKERS, TrackingConfig
from bigtrain.tracking.process import Trackers

PLUGIN = """
import json, time
from typing import Literal
from bigtrain.tracking.config import TRACKERS, Tracker, TrackerConfig

@TRACKERS.register
class LinesConfig(TrackerConfig):
    name: Literal["lines"] = "lines"
    slow_s: float = 0.0
    fails: bool = False
    def open(self, run, start):
        if self.fails:
            raise OSError("the disk is full")
        return Lines(run.directory / "lines" / "rows.jsonl", self.slow_s)

class Lines(Tracker):
    def __init__(self, path, slow_s):
        self.path, self.slow_s = path, slow_s
    def log(self, row):
        time.sleep(self.slow_s)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\\n")
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[None]:
    file = tmp_path / "lines_tracker.py"
    file.write_text(PLUGIN)
    load_plugin(str(file))
    yield
    TRACKERS.found.pop("lines", None)


def tracking(**tracker: Any) -> TrackingConfig:
    return TrackingConfig.model_validate({"wandb": "disabled", "trackers": [tracker]})


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads from a run's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(one.step, one.value) for one in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def images(folder: Path) -> dict[str, list[int]]:
    """The steps that TensorBoard's own reader finds pictures of."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"images": 0})
    reader.Reload()
    return {tag: [one.step for one in reader.Images(tag)] for tag in reader.Tags()["images"]}


def test_tensorboard_reads_every_number_and_a_resume_replaces_the_steps_that_come_again(run_dir: Path) -> None:
    Image.new("L", (3, 2)).save(run_dir / "drawn.png")
    pictures = {"samples": {PICTURE_KEY: str(run_dir / "drawn.png")}, "lost": {PICTURE_KEY: str(run_dir / "lost.png")}}
    for first, factor in ((1, 1.0), (3, 2.0)):
        tracker = Trackers(run_dir, "tiny", {"seed": 1}, tracking(name="tensorboard"))
        for step in range(first, 5):
            row = {"step": step, "loss": factor * step, "loss/web": 0.5, "mfu": None, "grad_norm": float("nan")}
            tracker.put(row | pictures)
        tracker.close(60)
    found = scalars(run_dir / "tensorboard")
    assert found == {
        "loss": [(1, 1.0), (2, 2.0), (3, 6.0), (4, 8.0)],
        "loss/web": [(step, 0.5) for step in (1, 2, 3, 4)],
    }
    assert images(run_dir / "tensorboard") == {"samples": [1, 2, 3, 4]}


@pytest.mark.usefixtures("plugin")
def test_a_users_tracker_takes_the_rows_in_its_own_process(run_dir: Path) -> None:
    tracker = Trackers(run_dir, "tiny", {}, tracking(name="lines"))
    tracker.put({"step": 1, "loss": 1.5, "grad_norm": float("inf")})
    tracker.close(60)
    assert list(read_lines(run_dir / "lines" / "rows.jsonl")) == [{"step": 1, "loss": 1.5, "grad_norm": None}]


@pytest.mark.usefixtures("plugin")
def test_one_that_is_slow_or_fails_costs_no_step_and_is_reported(
    run_dir: Path, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    warnings: list[tuple[str, str]] = []

    def warn(name: str, line: str) -> None:
        warnings.append((name, line))

    slow = Trackers(run_dir, "tiny", {}, tracking(name="lines", slow_s=1000), warn)
    spent = []
    for step in range(1, 20_000):
        before = time.thread_time()
        slow.put({"step": step, "loss": 1.0})
        spent.append(time.thread_time() - before)
    assert sorted(spent)[len(spent) // 2] < 1e-3
    slow.close(0.2)
    assert any("could not keep up" in line for _, line in warnings), warnings
    warnings.clear()
    failing = Trackers(run_dir, "tiny", {}, tracking(name="lines", fails=True), warn)
    eventually(lambda: bool(warnings))
    failing.close(10)
    assert warnings == [("lines", "the tracker is disabled from now on: RuntimeError: OSError: the disk is full")]


def test_an_unknown_tracker_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValidationError, match="unknown tracker 'tensorbord'"):
        tracking(name="tensorbord")
    with pytest.raises(UserError, match="tensorboard"):
        TRACKERS["tensorbord"]
    with pytest.raises(ValidationError, match=r"set tracking\.wandb"):
        tracking(name="wandb")
