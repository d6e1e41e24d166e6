from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config import CorruptionError, UserError
from bigtrain.scaling.runs.columns import ColumnNames
from bigtrain.scaling.runs.readers import read_source
from bigtrain.scaling.runs.wandb_offline import find_files, read_runs
from bigtrain.scaling.runs.where import where
from bigtrain.tracking.config import TrackingConfig
from bigtrain.tracking.process import Trackers


def test_csv_and_json_lines_give_one_table(write_runs: Callable[..., Path], tmp_path: Path) -> None:
    path = write_runs()
    table = read_source(str(path))
    lines = [
        {"run": r, "model": g, "N": n, "D": d, "loss": x}
        for r, g, n, d, x in zip(
            table.run, table.group, table.params.tolist(), table.tokens.tolist(), table.loss.tolist(), strict=True
        )
    ]
    other = tmp_path / "runs.jsonl"
    other.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_source(str(other)).digest() == table.digest()
    directory = tmp_path / "sweep"
    directory.mkdir()
    (directory / "runs.jsonl").write_text(other.read_text() + '{"run": "torn')
    assert read_source(str(directory)).digest() == table.digest()
    assert "FLOPs are computed: C = 6 N D" in table.notes


def test_where_compares_numbers_and_texts_and_names_a_wrong_column(write_runs: Callable[..., Path]) -> None:
    table = read_source(str(write_runs()))
    assert set(where(table, "model == m3 and tokens > 0").group) == {"m3"}
    assert len(where(table, "params < 1e8 and 'N' >= 3e7")) > 0
    for bad in ("lss < 3", "__import__('os').system('x')", "loss <"):
        with pytest.raises(UserError):
            where(table, bad)


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("no_account")
def test_wandb_offline_files_are_read_by_id_with_steps_counted_once_and_a_torn_tail(tmp_path: Path) -> None:
    run = tmp_path / "sweep" / "trial"
    run.mkdir(parents=True)
    config: dict[str, Any] = {"params": 2e7, "model": {"width": 64}}
    for steps in ((1, 2, 3), (2, 3, 4)):
        tracker = Trackers(run, "trial", config, TrackingConfig(wandb="offline"))
        for step in steps:
            tracker.put({"step": step, "loss": 5.0 - step - len(steps) * (steps[0] == 2) * 0.1, "tokens": 1e8 * step})
        tracker.close(60)
    files = find_files(tmp_path / "sweep")
    assert len(files) == 2
    (one,) = read_runs(tmp_path / "sweep")
    assert sorted(one.steps) == [1, 2, 3, 4]
    assert one.row()["loss"] == pytest.approx(0.7)
    assert one.row()["model.width"] == 64
    with open(files[-1], "ab") as file:
        file.write(b"\x01\x02\x03\x04\x50\x00\x01half a record")
    assert read_runs(tmp_path / "sweep")[0].row() == one.row()
    table = read_source(str(tmp_path / "sweep"), ColumnNames(group="params"))
    assert (table.params[0], table.tokens[0], table.run) == (2e7, 4e8, ("trial",))
    files[0].write_bytes(b"not W&B's")
    with pytest.raises(CorruptionError):
        read_runs(tmp_path / "sweep")
