"""A run with `checkpoint.best` at two processes that is resumed in the middle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtrain.checkpoint import commit
from bigtrain.checkpoint.restore import resolve_best
from bigtrain.run import ExitCode
from bigtrain.storage import read_lines
from bigtrain.tracking.status import status


@pytest.mark.slow
def test_the_best_checkpoints_are_saved_kept_and_named_also_after_a_resume(
    write_config: Callable[..., Path], bigtrain: Callable[..., Any], tmp_path: Path
) -> None:
    # Losses fall, so that the largest are the first ones: pruning would take them.
    config = write_config(
        duration="12 steps",
        evaluation={"every": "2 steps", "batches": 2},
        checkpoint={"every": "3 steps", "keep_last": 2, "best": {"metric": "val_loss", "mode": "max", "keep": 2}},
    )
    for steps in (6, 12):
        done = bigtrain("train", config, "--nproc", 2, f"duration={steps} steps")
        assert done.returncode == ExitCode.FINISHED, done.stderr
    run = tmp_path / "runs" / "tiny"
    values = {row["step"]: row["val_loss"] for row in read_lines(run / "metrics.jsonl") if "val_loss" in row}
    assert list(values) == [2, 4, 6, 8, 10, 12]
    assert sorted(values, key=lambda step: -values[step])[:2] == [2, 4]
    saved = [event["step"] for event in read_lines(run / "events.jsonl") if event["event"] == "saved"]
    assert saved == [2, 3, 4, 6, 9, 12]
    assert [found.step for found in commit.list_checkpoints(run / "checkpoints")] == [2, 4, 9, 12]
    assert status(run, alive=False)["best"] == {"step": 2, "metric": "val_loss", "value": values[2]}
    assert resolve_best("tiny@best", tmp_path / "runs") == "tiny@2"
    pruned = bigtrain("checkpoint", "prune", "tiny", "--keep-last", 1, "--json")
    assert json.loads(pruned.stdout)["steps"] == [9]
