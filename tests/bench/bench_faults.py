"""How long faults take to be seen and mended, measured: `make bench-faults`, or `python tests/bench/bench_faults.py`.

    P1         SIGKILL of one of two ranks          -> seen
    P2         SIGSTOP of one of two ranks          -> seen, beyond its limit (2 s)
    P3 killed  SIGKILL of a node's raylet (Ray)     -> seen
    P3 silent  SIGSTOP of a raylet and its agent    -> seen
    P10 rank   SIGKILL of a rank                    -> next step, restarted in place
    P10 node   SIGKILL of a node's raylet           -> next step, on another node

Each is done --faults times to a run of real ranks on real Ray nodes of this machine (P1, P2, P10 rank: no Ray). Each
line gives the median, the extremes and, for P10, the median of each part. It exits with 1 where a promise is broken.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).resolve().parents[2]
HANG_LIMIT_S: Final = 2.0
WAIT_S: Final = 240.0
PROMISES: Final = {
    "P1": ("a killed rank is seen", 2.0, "each"),
    "P2": ("a hang is seen, beyond its limit", 5.0, "each"),
    "P3 killed": ("a killed node is seen", 15.0, "each"),
    "P3 silent": ("a silent node is seen", 15.0, "each"),
    "P10 rank": ("from a rank's death to the next step", 8.0, "median"),
    "P10 node": ("from a node's death to the next step", 25.0, "median"),
}


@dataclass
class Measured:
    """Seconds of one kind of fault, and of the parts of its mending."""

    seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)

    def add_parts(self, **parts: float) -> None:
        """One fault's parts."""
        for name, value in parts.items():
            self.parts.setdefault(name, []).append(value)


class Run:
    """A run under way, followed through its files."""

    def __init__(
        self, place: Path, name: str, config: dict[str, Any], arguments: list[str], env: dict[str, str]
    ) -> None:
        self.path = place / "runs" / name
        config_path = place / f"{name}.yaml"
        config_path.write_text(yaml.safe_dump(config))
        self.log = place / f"{name}.log"
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/faults/faulty_train.py"), str(config_path), name, *arguments],
            cwd=place,
            env=env,
            stdout=log,
            stderr=log,
        )
        os.close(log)

    def end(self) -> None:
        """End the run at once, with its ranks."""
        for _ in range(2):
            self.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        self.process.wait(60)

    def rows(self, file: str) -> list[dict[str, Any]]:
        """The whole lines of one of its files."""
        try:
            lines = (self.path / file).read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Its events of these names."""
        return [event for event in self.rows("events.jsonl") if event["event"] in names]

    def until(self, condition: Callable[[], Any]) -> Any:
        """Wait until a condition is met; what it gave."""
        deadline = time.monotonic() + WAIT_S
        while not (value := condition()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"the run does not go on: {self.log.read_text()[-2000:]}\n{self.rows('events.jsonl')[-3:]}"
                )
            time.sleep(0.005)
        return value

    def last_step(self) -> int:
        """The last step logged."""
        rows = self.rows("metrics.jsonl")
        return rows[-1]["step"] if rows else 0

    def pid(self, rank: int) -> int:
        """Process id of a rank of the present attempt."""
        marks = (f"BIGTRAIN_RUN={self.path.resolve()}".encode(), f"RANK={rank}".encode())
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if all(mark in environment for mark in marks) and os.getpgid(int(pid)) == int(pid):
                    return int(pid)
            except OSError:
                continue
        raise RuntimeError(f"rank {rank} does not run")

    def settle(self) -> None:
        """Wait until it runs and has saved since its last start, so that its budget is fresh."""
        starts = len(self.events("restarted"))
        self.until(lambda: len(self.events("started", "resumed")) > starts)
        begun = self.last_step()
        saved = len(self.events("saved"))
        self.until(lambda: len(self.events("saved")) > saved and self.last_step() > begun + 2)

    def mended(self, struck: float, measured: Measured) -> float:
        """Follow the mending of a fault; seconds until it was seen. Adds the time to the next step, and its parts."""
        known = [len(self.events(name)) for name in ("fault", "restarted", "resumed")]
        fault = self.until(lambda: self.events("fault")[known[0] :])[0]["time"]
        restarted = self.until(lambda: self.events("restarted")[known[1] :])[0]["time"]
        loaded = self.until(lambda: self.events("resumed")[known[2] :])[0]["time"]
        self.until(lambda: self.last_step() > self.events("resumed")[-1]["step"])
        stepped = time.time()
        placed = [event["time"] for event in self.events("placed") if event["time"] > restarted]
        ready = placed[0] if placed else restarted
        measured.seconds.append(stepped - struck)
        measured.add_parts(seen=fault - struck, decided=restarted - fault)
        if placed:
            measured.add_parts(placed=ready - restarted)
        measured.add_parts(imported_and_loaded=loaded - ready, first_step=stepped - loaded)
        return fault - struck


def config_of(place: Path) -> dict[str, Any]:
    """A small run that saves often and goes on for as long as it is wanted."""
    return {
        "name": "bench",
        "model": {"arch": "llama", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 32},
        "data": {"train": str(place / "shards" / "train")},
        "batch": {"size": 12},
        "duration": "1000000 steps",
        "precision": "fp32",
        "checkpoint": {"every": "20 steps"},
        "tracking": {"wandb": "disabled"},
        "job": {"max_failures": 5, "limits": {"step": HANG_LIMIT_S}},
    }


def bench_ranks(place: Path, faults: int, results: dict[str, Measured]) -> None:
    """P1, P2 and P10 in place."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = Run(place, "ranks", config_of(place), ["2"], env)
    try:
        for number, (promise, sent) in [(n, kind) for n in range(faults) for kind in (("P1", 9), ("P2", 19))]:
            run.settle()
            struck = time.time()
            os.kill(run.pid(1), sent)
            mending = results["P10 rank"] if promise == "P1" else Measured()
            seen = run.mended(struck, mending)
            results[promise].seconds.append(seen - (HANG_LIMIT_S if promise == "P2" else 0.0))
            print(f"{promise} {number + 1}/{faults}: seen after {seen:.2f} s", file=sys.stderr, flush=True)
    finally:
        run.end()


@contextmanager
def ray_nodes(count: int) -> Iterator[Any]:
    """A Ray cluster of this machine, as the tests raise it."""
    nodes = _module(ROOT / "tests/jobs/test_ray.py").RayNodes(count)
    try:
        yield nodes
    finally:
        nodes.end()


def bench_nodes(place: Path, faults: int, results: dict[str, Measured]) -> None:
    """P3 and P10 with another node."""
    with ray_nodes(3) as nodes:
        env = nodes.environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        run = Run(place, "nodes", config_of(place), ["1", f"ray:{nodes.address}", "2"], env)
        try:
            for number, promise in [(n, kind) for n in range(faults) for kind in ("P3 killed", "P3 silent")]:
                nodes.do("ensure 3")
                run.settle()
                rank = run.pid(1)
                environment = Path(f"/proc/{rank}/environ").read_text().split("\0")
                node = next(line for line in environment if line.startswith("BIGTRAIN_PLACEMENT=")).partition("=")[2][
                    :16
                ]
                agent = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
                struck = time.time()
                if promise == "P3 silent":
                    os.kill(agent, signal.SIGSTOP)
                nodes.do(f"{'kill' if promise == 'P3 killed' else 'stop'} {node}")
                seen = run.mended(struck, results["P10 node"] if promise == "P3 killed" else Measured())
                results[promise].seconds.append(seen)
                if promise == "P3 silent":
                    nodes.do(f"kill {node}")
                print(f"{promise} {number + 1}/{faults}: seen after {seen:.2f} s", file=sys.stderr, flush=True)
        finally:
            run.end()


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def table(results: dict[str, Measured]) -> tuple[list[str], bool]:
    """Lines for a person, and whether all promises were kept."""
    lines, kept = [], True
    for promise, measured in results.items():
        if not measured.seconds:
            continue
        what, most, of = PROMISES[promise]
        values = sorted(measured.seconds)
        middle = statistics.median(values)
        good = (middle if of == "median" else values[-1]) <= most
        kept &= good
        lines.append(
            f"{promise:10} {what:38} n {len(values):3}  median {middle:6.2f} s  least {values[0]:6.2f}  most "
            f"{values[-1]:6.2f}  promised {most:g} s ({of}): {'kept' if good else 'BROKEN'}"
        )
        if measured.parts:
            parts = (f"{name} {statistics.median(times):.2f}" for name, times in measured.parts.items())
            lines.append(f"{'':10} medians of its parts: {', '.join(parts)}")
    return lines, kept


def main() -> int:
    """Measure, print, and say by the exit code whether the promises hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=10, help="faults of each kind")
    parser.add_argument("--only", choices=("ranks", "nodes"), help="what needs no Ray nodes, or what needs them")
    parser.add_argument("--json", action="store_true", help="print all values as one object")
    arguments = parser.parse_args()
    results = {promise: Measured() for promise in PROMISES}
    with tempfile.TemporaryDirectory(prefix="bigtrain-bench-") as directory:
        place = Path(directory)
        from bigtrain.data.pack import pack
        from bigtrain.data.tokenizers import Tokenizer

        library = Path(os.__file__).parent
        pack([library / "abc.py", library / "heapq.py"], place / "shards", Tokenizer.open("bytes"), validation="10%")
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        torch_s = time.monotonic() - began
        load = os.getloadavg()[0]
        if arguments.only != "nodes":
            bench_ranks(place, arguments.faults, results)
        if arguments.only != "ranks":
            bench_nodes(place, arguments.faults, results)
    lines, kept = table(results)
    if arguments.json:
        print(json.dumps({name: vars(measured) for name, measured in results.items()} | {"import_torch_s": torch_s}))
    else:
        cores = len(os.sched_getaffinity(0))
        here = f"importing torch takes {torch_s:.2f} s here; {cores} cores, load {load:.2f} before the first fault"
        print("\n".join([*lines, here]))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
