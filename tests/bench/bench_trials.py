"""The time between two trials on a slot: six trials on two slots of this machine, and on two gangs of a Ray cluster.

    OMP_NUM_THREADS=1 python -m tests.bench.bench_trials

From the end of a run (its ranks are gone) to the first step of the next on its slot. On this machine that is the start
of a command, an agent and its ranks; on Ray the agents are those of the run before, and what remains is the ranks'
start, of which importing torch is the most. Six undisturbed trials of seconds; two Ray nodes of this machine.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from bigtrain.data.pack import pack
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.storage import read_lines
from bigtrain.sweeps.journal import SweepDirectory
from bigtrain.sweeps.results import between_trials_s
from tests.jobs.test_ray import ROOT, RayNodes
from tests.sweeps.conftest import tiny_sweep

SIZES: list[Any] = [
    {"params": 1300, "tokens_per_param": [8]},
    {"params": 2000, "tokens_per_param": [4]},
    {"params": 3000, "tokens_per_param": [4, 8]},
    {"params": 6000, "tokens_per_param": [3]},
]


def shards(place: Path) -> Path:
    """Shards of a few modules of the standard library as bytes."""
    library = Path(os.__file__).parent
    names = ("abc", "bisect", "colorsys", "copy", "heapq", "keyword", "queue", "sched", "stat", "this")
    pack([library / f"{name}.py" for name in names], place, Tokenizer.open("bytes"), validation="10%")
    return place


def measure(place: Path, sweep: dict[str, Any], environment: dict[str, str]) -> None:
    """Run a sweep to its end and print its gaps."""
    place.mkdir()
    path = place / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    done = subprocess.run(
        [sys.executable, "-m", "bigtrain.cli", "sweep", "run", str(path)], cwd=place, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    directory = SweepDirectory(place / "runs" / sweep["name"])
    gaps = between_trials_s(directory)
    trials = [line["trial"] for line in read_lines(directory.journal) if line["event"] == "finished"]
    placed = [event for trial in trials for event in read_lines(directory.run(trial).events)]
    kept = sum(bool(event.get("kept")) for event in placed if event["event"] == "placed")
    print(
        f"{sweep['slots']['on']:8} {len(trials)} trials on {sweep['slots']['count']} slots; between two on a slot "
        f"{statistics.median(gaps):.2f} s (median of {', '.join(f'{gap:.2f}' for gap in sorted(gaps))})"
        + (f"; {kept} began on agents of the trial before" if kept else ""),
        flush=True,
    )


def main() -> None:
    """Measure both kinds of slots."""
    ours = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "ray")}
    print(f"{platform.machine()}, {os.cpu_count()} cores, {json.dumps(versions)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="bigtrain-bench-") as scratch:
        place = Path(scratch)
        sweep = {**tiny_sweep(shards(place / "shards")), "sizes": SIZES}
        measure(place / "machine", {**sweep, "slots": {"on": "machine", "count": 2}}, ours)
        nodes = RayNodes(2)
        try:
            ray = nodes.environment | {"RAY_ADDRESS": nodes.address, "OMP_NUM_THREADS": "1"}
            measure(place / "ray", {**sweep, "slots": {"on": "ray", "count": 2}}, ray)
        finally:
            nodes.end()


if __name__ == "__main__":
    main()
