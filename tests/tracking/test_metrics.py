from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.tracking.metrics import MetricsFile, read_metrics


def test_each_step_is_there_once_after_a_resume(tmp_path: Path, row: Callable[..., dict[str, Any]]) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, 8):
        file.append(row(step))
    resumed = MetricsFile(tmp_path / "metrics.jsonl")
    resumed.cut(4)
    for step in range(5, 10):
        resumed.append(row(step, loss=9.0))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 10))
    assert rows[3]["loss"] != 9.0
    assert rows[4]["loss"] == 9.0


def test_what_is_not_finite_becomes_null(tmp_path: Path, row: Callable[..., dict[str, Any]]) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(row(1, loss=float("nan"), grad_norm=float("inf"), lr=np.float32(0.5), val_loss=np.float64("-inf")))
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (read["loss"], read["grad_norm"], read["lr"], read["val_loss"]) == (None, None, 0.5, None)


def test_a_torn_last_line_does_not_swallow_the_next_step(tmp_path: Path, row: Callable[..., dict[str, Any]]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row(1)) + '\n{"step": 2, "lo')
    MetricsFile(path).append(row(2))
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    assert len(path.read_text().splitlines()) == 2


def test_a_step_that_goes_back_is_refused_until_the_file_is_cut(
    tmp_path: Path, row: Callable[..., dict[str, Any]]
) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(row(5))
    with pytest.raises(ValueError, match="step 5 comes after step 5"):
        file.append(row(5))
    file.cut(4)
    file.append(row(5))
    with pytest.raises(ValueError, match="whole number"):
        file.append({"loss": 1.0})


def test_cutting_a_file_that_is_not_there_makes_none(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl").cut(10)
    assert list(tmp_path.iterdir()) == []
    assert read_metrics(tmp_path / "metrics.jsonl") == []
