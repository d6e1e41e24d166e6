"""What a soak's processes hold, sampled all along: a soak that grows would not end well if it went on."""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.bench.soak_run import CACHE_BYTES, RANKS, Soaked, marked

ROLES: Final = {"launcher": "bigtrain.cli", "agent": "bigtrain.jobs.agent", "ranks": "bigtrain.training.rank"}
LEAST_SAMPLES: Final = 20
"""Fewer tell nothing about growth: their tenths would be single samples."""
MEMORY_SHARE: Final = 0.05
MEMORY_BYTES: Final = 4 << 20
"""What memory may differ by between two tenths: allocators keep more or less of what was freed. A thousand steps, or a
hundred restarts, that each leave 100 KB behind show."""
DESCRIPTORS: Final = 3
"""Files that a process happens to have open when it is looked at."""
FILES: Final = 8
"""Files of a checkpoint that is written or removed at that moment, and its directory."""


@dataclass
class Watch:
    """Samples a run until it is closed, in a thread."""

    run: Soaked
    every_s: float
    samples: list[dict[str, float]] = field(default_factory=list)
    shm: set[str] = field(default_factory=set)
    """Entries of /dev/shm that a process of the soak had open."""
    _lives: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    """Of each launcher: seconds and anonymous memory."""
    _over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._loop, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more samples."""
        self._over.set()
        self._thread.join()

    def _loop(self) -> None:
        before: tuple[int, list[int]] = 0, []
        while not self._over.wait(self.every_s):
            with contextlib.suppress(OSError):
                pids = marked(self.run.place.path)
                sample = self.sample(pids)
                now = (self.run.path / "metrics.jsonl").stat().st_size, pids
                # At a start processes are not what they become: only a run that takes steps is compared.
                if sample.pop("whole") and now[1] == before[1] and now[0] > before[0] > 0:
                    self.samples.append(sample)
                before = now

    def sample(self, pids: list[int]) -> dict[str, float]:
        """What these processes and the directories hold now."""
        roles: dict[str, list[int]] = {role: [] for role in ROLES}
        for pid in pids:
            command = _read(pid, "cmdline")
            for role, word in ROLES.items():
                if word in command:
                    roles[role].append(pid)
            self.shm |= _shared_memory(pid)
        found: dict[str, float] = {"processes": len(pids)}
        for role, members in roles.items():
            found[f"descriptors of {role}"] = sum(len(_list(f"/proc/{pid}/fd")) for pid in members)
            found[f"memory of {role}"] = sum(_anonymous_bytes(pid) for pid in members)
        place, run = self.run.place.path, self.run.path
        files = [path for path in run.rglob("*") if "logs" not in path.relative_to(run).parts]
        found["files of the run"] = len(files)
        found["logs of an attempt"] = len(list(run.glob("logs/attempt_*/*"))) / max(1, len(list(run.glob("logs/a*_*"))))
        cached = [path for path in (place / "cache").rglob("*") if path.is_file()]
        found["files of the cache"] = len(cached)
        # The index is no part of what is limited.
        found["bytes of the cache"] = sum(_size(path) for path in cached if path.suffix != ".json")
        found["temporary files"] = len(list((place / "tmp").rglob("*")))
        found["left in /dev/shm"] = len(self._left_in_shm(pids))
        found["whole"] = [len(members) for members in roles.values()] == [1, 1, RANKS]
        if found["whole"]:
            life = self._lives.setdefault(roles["launcher"][0], [])
            life.append((time.monotonic(), found["memory of launcher"]))
        return found

    def _left_in_shm(self, pids: list[int]) -> set[str]:
        """Entries that a process of the soak had made, and that none has open any more."""
        there = self.shm & set(_list("/dev/shm"))
        return there - set().union(*(_shared_memory(pid) for pid in pids))

    def judge(self) -> tuple[list[str], list[str]]:
        """Lines of a table, first tenth against last, and what has grown."""
        if len(self.samples) < LEAST_SAMPLES:
            return [f"{len(self.samples)} samples: too few to tell growth"], []
        tenth = max(5, len(self.samples) // 10)
        lines = [f"{len(self.samples)} samples of the run taking steps; medians of the first and the last {tenth}:"]
        grown = []
        for name in self.samples[0]:
            first, last = (
                statistics.median(sample[name] for sample in part)
                for part in (self.samples[:tenth], self.samples[-tenth:])
            )
            most = _most(name, first)
            lines.append(
                f"  {name:26} {_shown(name, first):>9} {_shown(name, last):>9}   at most {_shown(name, most):>9}"
            )
            if last > most:
                grown.append(f"{name} grew from {_shown(name, first)} to {_shown(name, last)}")
        line, more = self._longest_life()
        return [*lines, line], grown + more

    def _longest_life(self) -> tuple[str, list[str]]:
        """How the memory of the launcher that lived longest went: others start afresh."""
        life = max(self._lives.values(), key=lambda life: life[-1][0] - life[0][0])
        tenth = max(5, len(life) // 10)
        first, last = (statistics.median(bytes for _, bytes in part) for part in (life[:tenth], life[-tenth:]))
        minutes = (life[-1][0] - life[0][0]) / 60
        line = f"  the longest life of a launcher, {minutes:.1f} minutes: {first / 1e6:.1f} MB to {last / 1e6:.1f} MB"
        grown = last > _most("memory", first)
        return line, [line.strip()] if grown else []


def _most(name: str, first: float) -> float:
    """What the last tenth may be, after the first."""
    if name.startswith("memory"):
        return first * (1 + MEMORY_SHARE) + MEMORY_BYTES
    if name.startswith("descriptors"):
        return first + DESCRIPTORS
    if name == "bytes of the cache":
        return CACHE_BYTES
    if name == "files of the cache":
        # As many as fit in, of the smallest; the cache may have been emptied in the first tenth.
        return max(first, 60) + FILES
    return first + (FILES if name == "files of the run" else 0)


def _shown(name: str, value: float) -> str:
    if name.startswith(("memory", "bytes")):
        return f"{value / 1e6:.1f} MB"
    return f"{value:g}"


def _read(pid: int, file: str) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{file}").read_text(errors="replace")
    return ""


def _list(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(path)
    return []


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _anonymous_bytes(pid: int) -> int:
    """What is resident and lies in no file: pages of libraries come and go with what others do."""
    for line in _read(pid, "status").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def _shared_memory(pid: int) -> set[str]:
    """Names in /dev/shm that a process has mapped."""
    lines = (line.partition("/dev/shm/")[2] for line in _read(pid, "maps").splitlines() if "/dev/shm/" in line)
    return {name.removesuffix(" (deleted)") for name in lines}
