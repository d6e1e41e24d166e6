"""What a driver shows of a sweep under way."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

from bigtrain import storage
from bigtrain.sweeps.display import SweepDisplay
from bigtrain.sweeps.journal import SweepDirectory, SweepState, TrialRecord
from bigtrain.sweeps.trials import Trial


def test_the_time_left_counts_only_what_this_driver_has_done(tmp_path: Path) -> None:
    """A driver that takes a sweep over finds trials half done: they did not cost it a second."""
    trial = Trial("n1k-s1-trunk", "trunk", 1000, 1, 0.01, "n1k-s1", steps=1000, flops=1000.0)
    directory, stream, seconds = SweepDirectory(tmp_path / "sweep"), io.StringIO(), 0.0
    metrics = directory.run(trial.name).metrics
    metrics.parent.mkdir(parents=True)

    def reach(step: int) -> str:
        storage.write_atomic(metrics, json.dumps({"step": step}) + "\n")
        display.update({0: trial})
        return stream.getvalue().splitlines()[-1]

    display = SweepDisplay(directory, stream, clock=lambda: seconds)
    with display.shown(SweepState({trial.name: TrialRecord(trial, "running")}), 1):
        assert "left" not in reach(600)
        seconds = 30.0
        assert "left" not in reach(500), "the run went back to its checkpoint: nothing is gained yet"
        seconds = 90.0
        shown = reach(800)
    assert re.search(r"80% of the FLOPs, 1m00s left", shown), shown
