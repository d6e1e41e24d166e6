"""A run whose checkpoints go to an object store, through the real commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bigtrain import variables
from bigtrain.checkpoint.loader import read_tensors
from bigtrain.checkpoint.restore import refuse_unrestored
from bigtrain.checkpoint.store import RunStore
from bigtrain.cli import app
from bigtrain.config import UserError
from bigtrain.run import ExitCode, load_config
from bigtrain.storage import read_lines
from bigtrain.training.source import CheckpointSource, resolve_source

URL = "s3://bucket/runs/tiny"
STEPS = 8


def contents(run: Path) -> tuple[Any, ...]:
    """Losses and samples of every step."""
    rows = [(row["step"], row["loss"], row.get("val_loss")) for row in read_lines(run / "metrics.jsonl")]
    return rows, list(read_lines(run / "samples.jsonl"))


@pytest.mark.slow
def test_a_run_that_lost_its_disk_goes_on_from_the_store_to_the_bit(
    s3_server: Any, write_config: Callable, tmp_path: Path, bigtrain: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(checkpoint={"every": "4 steps", "storage": "s3://bucket/runs"})
    run = tmp_path / "runs" / "tiny"
    train = ["train", str(config), "--runs-dir", str(run.parent)]
    refused = CliRunner().invoke(app, train)
    assert refused.exit_code == ExitCode.USER
    assert "checkpoint.storage: no such bucket" in refused.stderr
    assert not run.exists()
    s3_server.put({"/bucket": b""})
    done = bigtrain("train", config)
    assert done.returncode == ExitCode.FINISHED, done.stderr
    assert RunStore(URL).committed() == [4, STEPS]
    uploaded = [event["step"] for event in read_lines(run / "events.jsonl") if event["event"] == "uploaded"]
    assert sorted(uploaded) == [4, STEPS]
    expected, state = contents(run), read_tensors(run / "checkpoints", STEPS, prefix="")
    shutil.rmtree(run)
    with pytest.raises(UserError, match="its store holds one of step 8"):
        # What ranks do that a launcher started without fetching first.
        refuse_unrestored(load_config(config))
    done = bigtrain("resume", f"{URL}@4")
    assert done.returncode == ExitCode.FINISHED, done.stderr
    assert "step 4 was fetched" in done.stderr
    assert "resuming after step 4" in done.stderr
    again = read_tensors(run / "checkpoints", STEPS, prefix="")
    assert [name for name in state if not torch.equal(state[name], again[name])] == []
    assert contents(run) == expected
    assert b"canary" not in b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    shutil.rmtree(run)
    finished = CliRunner().invoke(app, train)
    assert finished.exit_code == ExitCode.FINISHED
    assert "step 8 was fetched" in finished.stderr
    # Its last checkpoint was stored before its end was: it ends once more, for no step.
    assert "resuming after step 8" in finished.stderr
    assert contents(run) == expected
    _use_from_elsewhere(tmp_path, monkeypatch)


def _use_from_elsewhere(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What commands make of the URL alone."""
    monkeypatch.setenv(variables.CACHE, str(place / "cache"))

    def said(*arguments: str) -> dict[str, Any]:
        result = CliRunner().invoke(app, ["checkpoint", *arguments, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    rows = said("list", URL)["checkpoints"]
    assert [(row["step"], row["verified"]) for row in rows] == [(4, None), (STEPS, None)]
    assert said("verify", URL) == {"verified": [4, STEPS]}
    assert said("inspect", f"{URL}@4")["step"] == 4
    assert said("export", URL, "--out", str(place / "out"))["step"] == STEPS
    source = resolve_source(f"{URL}@4", place)
    assert isinstance(source, CheckpointSource)
    assert source.name == f"{URL}@4"
    assert said("prune", URL, "--keep-last", "1", "--dry-run")["steps"] == [4]
    assert said("prune", URL, "--keep-last", "1")["steps"] == [4]
    assert RunStore(URL).committed() == [STEPS]
