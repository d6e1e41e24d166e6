"""P8: a step beside a W&B in trouble, as a ratio to a step without W&B."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.bench.faults.left import APART_VARIABLE
from tests.bench.faults.measured import Results
from tests.bench.faults.run import ROOT, Run, config_of
from tests.bench.faults.say import say

STEPS: Final = 600
FIRST: Final = 300
"""Of the steps that are compared: by then W&B's process has started, which takes a core for a second or two."""
FULL_BYTES: Final = 65536


def bench_trackers(place: Path, faults: int, results: Results) -> None:
    """P8: for each fault a run of each kind, one after another in a changing order."""
    kinds = ["disabled", "hangs", "down"]
    if APART_VARIABLE in os.environ:  # A full disk is mounted, which needs a mount namespace of one's own.
        kinds.append("full")
    for number in range(faults):
        turned = kinds[number % len(kinds) :] + kinds[: number % len(kinds)]
        steps = {kind: _steps(place, f"tracker-{kind}-{number}", kind) for kind in turned}
        usual = statistics.median(steps["disabled"])
        for kind in kinds[1:]:
            measured, middle = results[f"P8 {kind}"], statistics.median(steps[kind])
            measured.add(middle / usual)
            measured.add_parts(
                step_ms=1000 * middle,
                longest_ms=1000 * max(steps[kind]),
                longest_without_ms=1000 * max(steps["disabled"]),
            )
            say(f"P8 {kind}", number, faults, f"{middle / usual:.3f} of a step of {1000 * usual:.2f} ms")


def _steps(place: Path, name: str, kind: str) -> list[float]:
    """Seconds of the steps of a run whose tracker is in such trouble."""
    with _trouble(kind) as variables:
        env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
        mode = {"disabled": "disabled", "full": "offline"}.get(kind, "online")
        # One rank: on two cores a second one would feel W&B's process as its neighbour.
        run = Run(place, name, config_of(place) | {"tracking": {"wandb": mode}}, ["1"], env)
        files = run.path / "wandb"
        try:
            if kind == "full":
                _fill(run, files)
            run.until(lambda: run.last_step() >= STEPS)
            rows = [row for row in run.rows(2 * STEPS) if FIRST <= row["step"] < STEPS]
            return run.step_s(rows)
        finally:
            run.end()
            if kind == "full":
                subprocess.run(["umount", "--lazy", str(files)], check=False, capture_output=True)


@contextmanager
def _trouble(kind: str) -> Iterator[dict[str, str]]:
    """What a run needs in its environment to meet a server that is in trouble."""
    key = {"WANDB_API_KEY": "0" * 40}
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        if kind == "hangs":  # It takes connections and never says a word.
            yield key | {"WANDB_BASE_URL": url}
            return
    yield key | {"WANDB_BASE_URL": url} if kind == "down" else {}


def _fill(run: Run, files: Path) -> None:
    """Mount a tiny disk where W&B writes, once the run has begun and before W&B has."""
    run.until(lambda: run.events("started") or (run.path / "run.json").exists())
    files.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={FULL_BYTES}", "tmpfs", str(files)], check=True)
    (files / "filler").write_bytes(bytes(FULL_BYTES - 8192))
