"""One file of the user's own each: an evaluator, a device metric, a callback that stops the run, a tracker."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtrain.run import ExitCode
from bigtrain.storage import read_lines

EVALUATOR = """
from typing import Literal
import torch
from bigtrain.metrics import record_metric
from bigtrain.training.config import EVALUATORS, EvaluatorConfig, Result

@EVALUATORS.register
class Top5(EvaluatorConfig):
    name: Literal["top5"] = "top5"
    def measure(self, model, batch):
        best = model.logits(batch).topk(5, dim=-1).indices
        right = (best == batch["targets"][..., None]).any(-1).float()
        record_metric("top5", right, weight=batch["weights"])
    def results(self, held_out):
        return {"perplexity": Result(2.718281828 ** held_out.totals.mean_loss)}
"""
DEVICE = """
from typing import Literal
from bigtrain.metrics import record_metric
from bigtrain.training.callback import Callback
from bigtrain.training.config import CALLBACKS, CallbackConfig

@CALLBACKS.register
class Fan(CallbackConfig):
    name: Literal["fan"] = "fan"
    def build(self, context):
        return FanSpeed(context.rank)

class FanSpeed(Callback):
    def __init__(self, rank):
        self.rank = rank
    def on_step(self, step, progress):
        record_metric("fan_speed", 1000 + self.rank, "max", unit="rpm")
        record_metric("fans", 1, "sum")
"""
STOP = """
from typing import Literal
from bigtrain.training.callback import Callback
from bigtrain.training.config import CALLBACKS, CallbackConfig

@CALLBACKS.register
class StopAt(CallbackConfig):
    name: Literal["stop-at"] = "stop-at"
    tokens: int
    def build(self, context):
        return Stop(self.tokens, context.rank)

class Stop(Callback):
    def __init__(self, tokens, rank):
        self.tokens, self.rank = tokens, rank
    def on_step(self, step, progress):
        if step.number == 1:
            self.vote_to_save()
        if progress.tokens >= self.tokens and self.rank == 1:
            self.vote_to_stop("enough tokens")
"""
TRACKER = """
import json
from typing import Literal
from bigtrain.tracking.config import TRACKERS, Tracker, TrackerConfig

@TRACKERS.register
class Lines(TrackerConfig):
    name: Literal["lines"] = "lines"
    def open(self, run, start):
        return Writer(run.directory / "lines" / "rows.jsonl")

class Writer(Tracker):
    def __init__(self, path):
        self.path = path
    def log(self, row):
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\\n")
"""
STEPS = 8


@pytest.fixture
def rows_of(
    bigtrain: Callable[..., Any], write_config: Callable[..., Path], tmp_path: Path
) -> Callable[..., tuple[Path, list[dict[str, Any]]]]:
    """Trains with plugins; the run's directory, and what it has logged."""

    def run(*plugins: str, nproc: int = 2, **sections: Any) -> tuple[Path, list[dict[str, Any]]]:
        options: list[str] = []
        for number, text in enumerate(plugins):
            (tmp_path / f"extension_{number}.py").write_text(text)
            options += ["--plugin", str(tmp_path / f"extension_{number}.py")]
        path = write_config(
            name="extended", duration=f"{STEPS} steps", checkpoint={"every": "100 steps"},
            evaluation={"every": "4 steps", "batches": 2, **sections.pop("evaluation", {})}, **sections,
        )  # fmt: skip
        done = bigtrain("train", path, "--nproc", nproc, *options)
        assert done.returncode == ExitCode.FINISHED, done.stderr
        directory = tmp_path / "runs" / "extended"
        return directory, list(read_lines(directory / "metrics.jsonl"))

    return run


@pytest.mark.slow
def test_an_evaluator_a_device_metric_and_a_tracker_of_the_users(rows_of: Callable[..., Any]) -> None:
    directory, rows = rows_of(
        EVALUATOR, DEVICE, TRACKER,
        evaluation={"evaluators": [{"name": "loss"}, {"name": "accuracy"}, {"name": "top5"}]},
        callbacks=[{"name": "fan"}],
        tracking={"wandb": "disabled", "trackers": [{"name": "lines"}, {"name": "tensorboard"}]},
    )  # fmt: skip
    assert len(rows) == STEPS
    evaluated = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in evaluated] == [4, 8]
    for row in evaluated:
        assert row["val_perplexity"] == pytest.approx(2.718281828 ** row["val_loss"])
        assert 0 <= row["val_accuracy"] <= row["val_top5"] <= 1
        assert row["val_top5"] > 0
    # What a callback records travels with the next step; the one after a boundary's step is under way by then.
    assert [row.get("fan_speed") for row in rows[-4:]] == [1001, None, 1001, 1001]
    assert [row.get("fans") for row in rows[-4:]] == [2, None, 2, 2]
    units = json.loads((directory / "metrics.units.json").read_text())["units"]
    assert units["fan_speed"] == "rpm"
    assert units["val_loss"] == "nats per token"
    assert list(read_lines(directory / "lines" / "rows.jsonl")) == rows
    assert list((directory / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_a_callback_of_one_rank_ends_the_run_on_all_of_them(rows_of: Callable[..., Any]) -> None:
    directory, rows = rows_of(STOP, callbacks=[{"name": "stop-at", "tokens": 1}])
    assert len(rows) < STEPS
    events = list(read_lines(directory / "events.jsonl"))
    [ended] = [event for event in events if event["event"] == "ended_early"]
    assert ended["step"] == rows[-1]["step"]
    assert [event["step"] for event in events if event["event"] == "saved"][-1] == ended["step"]
    assert events[-1]["event"] == "finished"
