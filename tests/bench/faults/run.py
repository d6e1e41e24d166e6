"""A run under way that is struck and followed through its files."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import yaml

from tests.bench.faults.measured import SAVE_EVERY, Measured, Results

ROOT: Final = Path(__file__).resolve().parents[3]
HANG_LIMIT_S: Final = 5.0
"""Of a step and of a save, where hangs are planted; elsewhere a busy machine must not make one of a slow step."""
PATIENT_S: Final = 60.0
WAIT_S: Final = 600.0
BATCH: Final = 12
CONTEXT: Final = 32
ROW_BYTES: Final = 1024
"""More than one line of metrics.jsonl takes."""


def config_of(place: Path, limit_s: float = PATIENT_S) -> dict[str, Any]:
    """A small run that saves often and goes on for as long as it is wanted.

    Args:
        limit_s: How long a rank may be silent in a step or a save.
    """
    return {
        "name": "bench",
        "model": {"arch": "llama", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": CONTEXT},
        "data": {"train": str(place / "shards" / "train")},
        "batch": {"size": BATCH},
        "duration": "1000000 steps",
        "precision": "fp32",
        "checkpoint": {"every": f"{SAVE_EVERY} steps"},
        "tracking": {"wandb": "disabled"},
        "job": {"max_failures": 5, "limits": {"step": limit_s, "save": limit_s}},
    }


class Run:
    """A run of `tests/faults/faulty_train.py` that goes on until it is ended.

    Args:
        place: Where its config, log and run directory go.
        arguments: What follows the config and the name on its command line.
    """

    def __init__(
        self, place: Path, name: str, config: dict[str, Any], arguments: list[str], env: dict[str, str]
    ) -> None:
        self.path = place / "runs" / name
        self._place = place
        self._env = env
        config_path = place / f"{name}.yaml"
        config_path.write_text(yaml.safe_dump(config))
        self._command = [
            sys.executable, str(ROOT / "tests/faults/faulty_train.py"), str(config_path), name, *arguments
        ]  # fmt: skip
        self.log = place / f"{name}.log"
        self._chance = random.Random(name)
        self._events: list[dict[str, Any]] = []
        self._read = 0
        self._before: dict[str, int] = {}
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start its command, also once more after its end."""
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.process = subprocess.Popen(self._command, cwd=self._place, env=self._env, stdout=log, stderr=log)
        os.close(log)
        return self.process

    def end(self) -> None:
        """End the run at once, with its ranks."""
        for _ in range(2):
            self.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        self.process.wait(60)

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Its events of these names."""
        try:
            with open(self.path / "events.jsonl", "rb") as file:
                file.seek(self._read)  # It only grows, and long runs save often.
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return []
        if whole:
            self._read += len(whole) + 1
            self._events += map(json.loads, whole.split(b"\n"))
        return [event for event in self._events if event["event"] in names]

    def until(self, condition: Callable[[], Any]) -> Any:
        """Wait until a condition is met; what it gave."""
        deadline = time.monotonic() + WAIT_S
        while not (value := condition()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the run does not go on: {self.log.read_text()[-2000:]}\n{self._events[-3:]}")
            time.sleep(0.005)
        return value

    def rows(self, count: int = 1) -> list[dict[str, Any]]:
        """The last steps logged, `count` of them or a few more."""
        try:
            with open(self.path / "metrics.jsonl", "rb") as file:
                start = max(0, file.seek(0, os.SEEK_END) - count * ROW_BYTES)
                file.seek(start)
                lines = file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines[1 if start else 0 :]]

    def last_step(self) -> int:
        """The last step logged."""
        rows = self.rows()
        return rows[-1]["step"] if rows else 0

    def environment(self, rank: int) -> dict[str, str]:
        """The variables of a rank of the present attempt, and its process id under "pid"."""
        marks = (f"BIGTRAIN_RUN={self.path.resolve()}", f"RANK={rank}")
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
                if all(mark in words for mark in marks) and os.getpgid(int(pid)) == int(pid):
                    return dict(word.partition("=")[::2] for word in words if word) | {"pid": pid}
            except OSError:
                continue
        raise RuntimeError(f"rank {rank} does not run")

    def pid(self, rank: int) -> int:
        """Process id of a rank of the present attempt."""
        return int(self.environment(rank)["pid"])

    def settle(self) -> None:
        """Wait until it runs and has saved since its last start, so that its budget is fresh, and then for a moment.

        The wait is a random part of the time between two saves: a fault strikes anywhere between them.
        """
        starts = len(self.events("restarted"))
        self.until(lambda: len(self.events("started", "resumed")) > starts)
        begun = self.last_step()
        saved = len(self.events("saved"))
        self.until(lambda: len(self.events("saved")) > saved and self.last_step() > begun + 2)
        until = self.last_step() + self._chance.randrange(SAVE_EVERY)
        self.until(lambda: self.last_step() >= until)

    def save_takes(self) -> int:
        """Steps that are done, at most, while one save is written."""
        longest = max(event["seconds"] for event in self.events("saved"))
        return math.ceil(longest / statistics.median(self.step_s(self.rows(200))))

    def step_s(self, rows: list[dict[str, Any]]) -> list[float]:
        """Seconds of logged steps."""
        return [BATCH * CONTEXT / row["tokens_per_s"] for row in rows]

    def known(self) -> dict[str, int]:
        """How many events of each kind there are that follow a fault."""
        return {name: len(self.events(name)) for name in ("fault", "notice", "restarted", "resumed", "placed")}

    def resumption(self, known: dict[str, int]) -> tuple[float, float, int, int]:
        """Follow a new start; when it was decided and when the state was loaded, the last step before, the first after.

        Both are times since the epoch; the first step after is the one that was loaded.
        """
        restarted = self.until(lambda: self.events("restarted")[known["restarted"] :])[0]["time"]
        # All ranks have ended by now, and the new ones cut the file back only when they have loaded.
        done = self.last_step()
        resumed = self.until(lambda: self.events("resumed")[known["resumed"] :])[0]
        return restarted, resumed["time"], done, resumed["step"]

    def recovered(self, struck: float, results: Results, recovery: Measured) -> float:
        """Wait until the run has recovered from a fault; returns the seconds until the fault was detected.

        Adds the time to the next step with its parts to `recovery`, and the lost steps to P4.
        """
        known = self._before
        fault = self.until(lambda: self.events("fault")[known["fault"] :])[0]["time"]
        restarted, loaded, done, resumed = self.resumption(known)
        results["P4 fault"].add(done - resumed, SAVE_EVERY + self.save_takes())
        self.until(lambda: self.last_step() > resumed)
        stepped = time.time()
        placed = [event["time"] for event in self.events("placed") if event["time"] > restarted]
        ready = placed[0] if placed else restarted
        recovery.add(stepped - struck)
        recovery.add_parts(seen=fault - struck, decided=restarted - fault)
        if placed:
            recovery.add_parts(placed=ready - restarted)
        recovery.add_parts(imported_and_loaded=loaded - ready, first_step=stepped - loaded)
        return fault - struck

    def about_to_be_struck(self) -> float:
        """Take down what is known now; the time since the epoch."""
        self._before = self.known()
        return time.time()
