"""Runs that earlier versions recorded resume to the bit.

tests/recorded/NAME is a run of 4 steps as the commit in its expected.json left it, with the absolute place of the data
replaced by RECORDED. `expected.json` says what that commit computed when it went on to step 8.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.checkpoint.loader import read_tensors
from bigtrain.jobs.check import check
from bigtrain.run import load_config
from bigtrain.storage import hash_bytes, read_lines

RECORDED = Path(__file__).parent / "recorded"
LOSS_TOLERANCE = 1e-5
"""Relative; another processor or torch adds up in another order."""
KINDS = ("text", "mixture", "deepspeed")
INSTRUCTIONS = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""Limits torch and its libraries to the instructions of the recording machine: wider vectors add up differently."""


def digest(run: Path) -> str:
    """A hash of the weights and the optimizer's state after step 8."""
    state = read_tensors(run / "checkpoints", 8, prefix="")
    return hash_bytes(b"".join(name.encode() + state[name].numpy().tobytes() for name in sorted(state)))


def machine() -> dict[str, str]:
    """What bits depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return {"torch": torch.__version__, "processor": processor}


def brought_here(kind: str, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """The directory of a recorded run, and what its version computed."""
    run = tmp_path / "runs" / kind
    shutil.copytree(RECORDED / kind, run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("RECORDED", str(RECORDED)))
    expected: dict[str, Any] = json.loads((run / "expected.json").read_text())
    (run / "expected.json").unlink()
    return run, expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_run_is_the_same_run_today(kind: str, tmp_path: Path) -> None:
    run, _ = brought_here(kind, tmp_path)
    found = check(load_config(run / "config.yaml"), run.parent)
    assert found.newest == 4
    assert found.finished is False, "it lacks its events"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.exhaustive if kind == "deepspeed" else ()) for kind in KINDS]
)
def test_a_recorded_run_resumes_to_the_bit(
    kind: str, tmp_path: Path, bigtrain: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in INSTRUCTIONS.items():
        monkeypatch.setenv(name, value)
    run, expected = brought_here(kind, tmp_path)
    done = bigtrain("train", run / "config.yaml", "duration=8 steps", "--nproc", "1")
    assert done.returncode == 0, done.stderr
    assert "resuming after step 4" in done.stderr
    losses = [row["loss"] for row in read_lines(run / "metrics.jsonl")]
    assert losses == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE)
    if machine() == expected["machine"]:
        assert losses == expected["losses"]
        assert digest(run) == expected["weights"]
