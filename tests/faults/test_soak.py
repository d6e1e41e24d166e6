"""A minute of the soak that goes on for half an hour by hand: `python -m tests.bench.soak`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 840


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_a_minute_of_random_kills_leaves_no_trace() -> None:
    """The tool exits with 0 only where state, samples, losses, causes and leftovers are as they must be."""
    command = [sys.executable, "-m", "tests.bench.soak", "--faults", "kills", "--minutes", "1", "--every", "12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit-identical to the undisturbed run" in done.stdout
    assert "kill a rank" in done.stdout
