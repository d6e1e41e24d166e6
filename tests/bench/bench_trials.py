"""The time between two trials on a slot: six trials on two slots of this machine, and on two gangs of a Ray cluster.

    OMP_NUM_THREADS=1 python -m tests.bench.bench_trials

From the end of a run (its ranks are gone) to the first step of the next on its slot. A slot keeps its agent from trial
to trial. On this machine the agent also keeps a process that has imported torch, from which it forks ranks: "with fresh
ranks" is without that one (BIGTRAIN_TEMPLATE=0). Six undisturbed trials of seconds; two Ray nodes of this machine. With
`--before CHECKOUT` the slots of this machine are measured with another checkout's code too.
"""

from __future__ import annotations

import argparse
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

from bigtrain.data.packing.documents import pack
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


def measure(name: str, place: Path, sweep: dict[str, Any], environment: dict[str, str]) -> float:
    """Run a sweep to its end and print its gaps; returns the middle one, in seconds."""
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
    middle = statistics.median(gaps)
    print(
        f"{name:20} {len(trials)} trials on {sweep['slots']['count']} slots; between two on a slot "
        f"{middle:.2f} s (median of {', '.join(f'{gap:.2f}' for gap in sorted(gaps))})"
        + (f"; {kept} began on agents of the trial before" if kept else ""),
        flush=True,
    )
    return middle


def main() -> None:
    """Measure both kinds of slots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="another version, to compare with")
    before = parser.parse_args().before
    base = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "ray")}
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start, "
        f"{json.dumps(versions)}", flush=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bigtrain-bench-") as scratch:
        place = Path(scratch)
        sweep = {**tiny_sweep(shards(place / "shards")), "sizes": SIZES}
        here = {**sweep, "slots": {"on": "machine", "count": 2}}
        kinds = {"machine": base, "with fresh ranks": base | {"BIGTRAIN_TEMPLATE": "0"}}
        if before is not None:
            kinds = {"before": base | {"PYTHONPATH": str(before.absolute())}, **kinds}
        middles = {name: measure(name, place / name, here, kinds[name]) for name in kinds}
        if before is not None:
            print(f"machine, against before: {middles['machine'] / middles['before']:.2f} of the time", flush=True)
        nodes = RayNodes(2)
        try:
            ray = nodes.environment | {"RAY_ADDRESS": nodes.address, "OMP_NUM_THREADS": "1"}
            measure("ray", place / "ray", {**sweep, "slots": {"on": "ray", "count": 2}}, ray)
        finally:
            nodes.end()


if __name__ == "__main__":
    main()
