"""SIGKILLs from outside, aimed at what a rank is doing: in the loader, the cache, a fetch, each phase of a save.

    python -m tests.training.kills --kills 25 --nproc 2

A run of two ranks streams its shards from a slow server into a small cache, saves every fourth step, and is killed
--kills times; then it must be, to the bit, the run that nothing disturbed, and the kills must have struck where they
were aimed. Where a rank is, is seen from outside: by its heartbeat, the files that it has open, and the directory of
the checkpoints. For moments that are short the rank is stopped and let go on by turns, a fraction of a millisecond
each, until it is there. It exits with 1 where something differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import yaml

from bigtrain.heartbeat import PHASES
from bigtrain.storage import read_lines
from tests.data.faulty_server import Handler, serving
from tests.training.die_in_a_save import outcome

ROOT: Final = Path(__file__).resolve().parents[2]
STEPS_A_KILL: Final = 14
SAVE_EVERY: Final = 4
KEEP: Final = 2
CACHE_BYTES: Final = 60_000
FETCH_S: Final = 0.05
"""How long the server lets the second half of a file wait: far longer than a look takes."""
GO_ON_S: Final = 0.0003
"""Processor time that a rank gets between two looks."""
LONGEST_GO_ON_S: Final = 0.1
AIM_S: Final = 60.0
"""How long a moment is waited for before the rank is killed where it is."""
DEADLINE_S: Final = 900.0


@dataclass
class Rank:
    """A rank of the run, seen from outside."""

    run: Path
    number: int
    pid: int

    def beat(self) -> tuple[int, str]:
        """Step and phase of its last beat."""
        for name, target in self.files():
            if target.startswith("/memfd:bigtrain-page"):
                with open(f"/proc/{self.pid}/fd/{name}", "rb") as page:
                    (word,) = struct.unpack("Q", page.read(8))
                return word >> 32, PHASES[word >> 28 & 0xF]
        return 0, "start"

    def cpu_s(self) -> float:
        """Processor time that it has had, all threads together."""
        # The number of a process's clock, as clock_getcpuclockid(3) makes it.
        return time.clock_gettime(~self.pid << 3 | 2)

    def files(self) -> Iterator[tuple[str, str]]:
        """Descriptors and what they lead to."""
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{self.pid}/fd"):
                with contextlib.suppress(OSError):
                    yield name, os.readlink(f"/proc/{self.pid}/fd/{name}")

    def fetches(self, whole: bool) -> bool:
        """Whether it fills a file of the cache: while bytes still come, or once all are there."""
        for _, target in self.files():
            if ".part-" in target:
                with contextlib.suppress(OSError):
                    size = int(target.rpartition("-")[2])
                    return (os.stat(target).st_size >= size) is whole
        return False

    def save(self) -> str:
        """The phase of the save under way, as the directory of the checkpoints shows it; "" where there is none."""
        place = self.run / "checkpoints"
        names = set(_names(place))
        published = sorted(int(name[5:]) for name in names if name.startswith("step_") and name[5:].isdigit())
        latest = 0
        with contextlib.suppress(OSError, ValueError):
            latest = json.loads((place / "LATEST").read_text())["step"]
        for name in (name for name in names if ".tmp-" in name and name.startswith("step_")):
            if int(name[5:13]) in published or (published and int(name[5:13]) < published[-1]):
                return "prune"
            files = set(_names(place / name))
            if any("manifest" in file for file in files):
                return "manifest"
            return "shards" if any(file.endswith(".distcp") for file in files) else "begin"
        if published and published[-1] != latest:
            return "rename"
        return "publish" if len(published) > KEEP else ""


def _names(place: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(place)
    return []


Aim = Callable[[Rank], bool]
AIMS: Final[dict[str, Aim]] = {
    "start": lambda rank: rank.beat()[1] == "start",
    "step": lambda rank: rank.beat()[1] == "step",
    "loader": lambda rank: rank.beat()[1] == "data",
    "evaluation": lambda rank: rank.beat()[1] == "evaluation",
    "fetch": lambda rank: rank.fetches(whole=False),
    "cache": lambda rank: rank.fetches(whole=True),
    "save: begin": lambda rank: rank.save() == "begin",
    "save: shards": lambda rank: rank.save() == "shards",
    "save: manifest": lambda rank: rank.save() == "manifest",
    "save: rename": lambda rank: rank.save() == "rename",
    "save: publish": lambda rank: rank.save() == "publish",
    "save: prune": lambda rank: rank.save() == "prune",
}
"""Where a rank can be, by name. What the first rank does alone in a save, is waited for with that one."""


@dataclass
class Kill:
    """One of them."""

    aim: str
    rank: int
    struck: bool
    """Whether it was where it was aimed."""
    step: int
    phase: str
    save: str

    def __str__(self) -> str:
        where = f"rank {self.rank} at step {self.step}, phase {self.phase}" + (f", save {self.save}" * bool(self.save))
        return f"{self.aim:15} {'struck' if self.struck else 'MISSED'}  {where}"


@dataclass
class Killer:
    """Kills one rank of a run after another."""

    run: Path
    process: subprocess.Popen[Any]
    nproc: int
    chance: random.Random
    kills: list[Kill] = field(default_factory=list)
    round: list[str] = field(default_factory=list)

    def kill(self) -> None:
        """Kill one rank at the next aim; each aim is taken once before one is repeated."""
        if not self.round:
            self.round = self.chance.sample(sorted(AIMS), len(AIMS))
        aim = self.round.pop()
        number = 0 if aim.startswith("save") and aim != "save: shards" else self.chance.randrange(self.nproc)
        self._until(lambda: len(self._events("restarted")) >= len(self.kills))
        if aim != "start":
            self._until(lambda: self._events("started", "resumed", "restarted")[-1:] != self._events("restarted")[-1:])
        rank = self._until(lambda: self._rank(number))
        time.sleep(self.chance.uniform(0.0, 0.4))
        struck = self._step_to(rank, AIMS[aim])
        step, phase = rank.beat()
        self.kills.append(Kill(aim, number, struck, step, phase, rank.save()))
        print(f"{len(self.kills):3}  {self.kills[-1]}", flush=True)
        os.kill(rank.pid, signal.SIGKILL)
        known = len(self.kills)
        self._until(lambda: len(self._events("fault")) >= known)

    def _step_to(self, rank: Rank, there: Aim) -> bool:
        """Let the rank go on bit by bit until it is there, and leave it stopped; whether it came there."""
        deadline = time.monotonic() + AIM_S
        patience_s = GO_ON_S
        while time.monotonic() < deadline:
            os.kill(rank.pid, signal.SIGSTOP)
            if there(rank):
                return True
            before, until = rank.cpu_s(), time.monotonic() + patience_s
            os.kill(rank.pid, signal.SIGCONT)
            while rank.cpu_s() - before < GO_ON_S and time.monotonic() < until:
                time.sleep(GO_ON_S / 3)
            # It may wait for another rank, or for a core.
            patience_s = GO_ON_S if rank.cpu_s() - before >= GO_ON_S else min(2 * patience_s, LONGEST_GO_ON_S)
        return False

    def _rank(self, number: int) -> Rank | None:
        marks = (f"BIGTRAIN_RUN={self.run}".encode(), f"RANK={number}".encode())
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if all(mark in environment for mark in marks) and os.getpgid(int(pid)) == int(pid):
                    return Rank(self.run, number, int(pid))
        return None

    def _events(self, *names: str) -> list[dict[str, Any]]:
        return [event for event in read_lines(self.run / "events.jsonl") if event["event"] in names]

    def _until(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + DEADLINE_S
        while not (value := condition()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the run does not go on: {self._events('fault', 'failed', 'finished')[-2:]}")
            time.sleep(0.005)
        return value


def slowly(handler: Handler, data: bytes, start: int) -> None:
    """A file in two halves."""
    handler.head(len(data) - start, start, len(data))
    half = (start + len(data)) // 2
    handler.body(data[start:half])
    time.sleep(FETCH_S)
    handler.body(data[half:])


def train(place: Path, url: str, name: str, steps: int, nproc: int) -> subprocess.Popen[bytes]:
    """`bigtrain train` on the data of a server."""
    config = {
        "name": name,
        "model": {
            "arch": "llama", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 32, "tied": True,
            "dropout": 0.1,
        },
        "data": {"train": f"{url}/train", "validation": f"{url}/validation", "shuffle_window": 1},
        "batch": {"size": 12},
        "duration": f"{steps} steps",
        "evaluation": {"every": "3 steps", "batches": 2},
        "checkpoint": {"every": f"{SAVE_EVERY} steps", "keep_last": KEEP},
        "streaming": {"log_samples": True, "cache_dir": str(place / f"cache-{name}"), "cache": CACHE_BYTES},
        "tracking": {"wandb": "disabled"},
        "job": {"max_failures": 100},
    }  # fmt: skip
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "bigtrain.cli", "train", str(path), "--nproc", str(nproc)]
    with open(place / f"{name}.log", "wb") as log:
        return subprocess.Popen(
            [*command, "--runs-dir", str(place / "runs")],
            cwd=place, stdout=log, stderr=log,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def kill_and_compare(place: Path, kills: int, nproc: int, seed: int) -> tuple[list[Kill], list[str]]:
    """Kill a run's ranks; the kills, and what is wrong then."""
    from bigtrain.data.packing.documents import pack
    from bigtrain.data.tokenizers import Tokenizer

    library = Path(os.__file__).parent
    names = ("abc", "bisect", "copy", "heapq", "queue", "sched", "stat")
    pack([library / f"{name}.py" for name in names], place / "shards", Tokenizer.open("bytes"), validation="10%",
         shard_bytes=1 << 12)  # fmt: skip
    steps = STEPS_A_KILL * kills
    with serving(place / "shards") as server:
        server.always = slowly
        process = train(place, server.url, "killed", steps, nproc)
        killer = Killer(place / "runs" / "killed", process, nproc, random.Random(seed))
        try:
            for _ in range(kills):
                killer.kill()
            code = process.wait(DEADLINE_S)
        finally:
            process.kill()
        server.always = None
        undisturbed = train(place, server.url, "undisturbed", steps, nproc).wait(DEADLINE_S)
    if (code, undisturbed) != (0, 0):
        return killer.kills, [f"the runs exited with {code} and {undisturbed}"]
    result, reference = (outcome(place / "runs", name, steps) for name in ("killed", "undisturbed"))
    problems = [f"{key} differ from those of the undisturbed run" for key in reference if result[key] != reference[key]]
    if [row[0] for row in result["losses"]] != list(range(1, steps + 1)):
        problems.append("metrics.jsonl does not hold each step once")
    return killer.kills, problems


def main() -> int:
    """Kill, print, and say by the exit code whether all was the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument(
        "--seed", type=int, help="of aims, ranks and moments; by default a random one, which is printed"
    )
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    print(f"$ python -m tests.training.kills --kills {arguments.kills} --nproc {arguments.nproc} --seed {seed}")
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores; torch {torch.__version__}\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="bigtrain-kills-") as directory:
        kills, problems = kill_and_compare(Path(directory).resolve(), arguments.kills, arguments.nproc, seed)
    missed = [kill for kill in kills if not kill.struck]
    if len(missed) > len(kills) // 5:
        problems.append(f"{len(missed)} of {len(kills)} kills missed what they were aimed at")
    verdict = "NOT the undisturbed run" if problems else "bit-identical to the undisturbed run: state, losses, samples"
    print(f"\n{len(kills)} kills from outside, {len(kills) - len(missed)} struck where they were aimed: {verdict}")
    print("".join(f"BROKEN: {problem}\n" for problem in problems), end="")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
