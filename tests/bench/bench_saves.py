"""What a save costs: an asynchronous one beside a copy of the state, a synchronous one beside plain writing.

    OMP_NUM_THREADS=1 python tests/bench/bench_saves.py [--dir DIR] [--pairs 31] [--width 512]

Asynchronous: the time of a save and of the steps until it is done, less that of as many steps alone, over the time of a
copy of the state in memory; and the same of a thread that does nothing but write and sync as many bytes. Synchronous: a
save with its hashes, not read back, over writing and syncing as many bytes from memory. Verifying: every byte of a
checkpoint that is not in memory, over plain reading of it. The sides of a round follow each other, each first in turn;
medians over the rounds' ratios, of the first over the rounds' differences. Run it on a machine that does nothing else,
with DIR on the disk that checkpoints go to, and at least two cores: one of them writes.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bigtrain.checkpoint import commit
from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.checkpoint.saver import Saver
from bigtrain.testing.equivalence import LR, How, What, build, micro_batches

ASYNCHRONOUS_LIMIT, SYNCHRONOUS_LIMIT, VERIFYING_LIMIT = 1.5, 1.3, 1.1
FACTS: dict[str, Any] = {"progress": {}, "config_hash": "", "identity": ""}
CHUNK_BYTES = 16 << 20


def timed(work: Callable[[], object]) -> float:
    """Seconds that something takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_pairs(pairs: int, one: Callable[[], float], other: Callable[[], float]) -> tuple[list[float], list[float]]:
    """What both measure, one after the other, each first in turn."""
    first: list[float] = []
    second: list[float] = []
    for number in range(pairs):
        if number % 2:
            second.append(other())
            first.append(one())
        else:
            first.append(one())
            second.append(other())
    return first, second


class Training:
    """A small model on one process, and its saver."""

    def __init__(self, directory: Path, width: int) -> None:
        shape = {"arch": "llama", "layers": 4, "width": width, "heads": 8, "mlp_width": 4 * width}
        self.what, self.how = What(shape, batch=4, context=64), How(micro_size=None)
        self.engine = build(self.what, self.how)
        self.batch = micro_batches(self.what, self.how, 0, 0, 1)
        self.directory = directory
        self.saved = 0
        self.steps(2)

    @property
    def state(self) -> dict[str, Tensor]:
        return self.engine.state()

    def steps(self, count: int) -> None:
        for step in range(count):
            self.engine.train_step(step, self.batch, LR).read()

    def save(self, saver: Saver) -> None:
        self.saved += 1
        saver.save(self.saved, self.state, **FACTS)


class Cost(NamedTuple):
    """Seconds that something costs which steps go on beside."""

    median: float
    low: float
    """Where the median lies, with 95 %: order statistics of the rounds."""
    high: float


def cost(beside: list[float], alone: list[float]) -> Cost:
    """What the steps of each round took longer than alone."""
    found = sorted(long - short for long, short in zip(beside, alone, strict=True))
    outer = max(0, math.floor(len(found) / 2 - math.sqrt(len(found))))
    return Cost(statistics.median(found), found[outer], found[-1 - outer])


class Asynchronous(NamedTuple):
    """What a save costs in all, what writing as much in a thread does; medians of seconds."""

    save: Cost
    writing: Cost
    stall: float
    """Of the save's call alone."""
    copy: float
    seconds: float
    """From the call to the end of pruning."""
    how: str


def asynchronous(training: Training, rounds: int) -> Asynchronous:
    """What a save costs in all, beside a copy."""
    saver = Saver(training.directory / "asynchronous", CheckpointConfig())
    state = training.state
    copies = {name: tensor.detach().clone() for name, tensor in state.items()}
    size = sum(tensor.nbytes for tensor in state.values())
    data = memoryview(bytearray(os.urandom(1 << 20) * -(-size // (1 << 20))))[:size]

    def copy() -> None:
        for name, tensor in state.items():
            copies[name].copy_(tensor)

    def whole() -> None:
        training.save(saver)
        saver.wait()

    whole()
    step_s = statistics.median(timed(lambda: training.steps(1)) for _ in range(5))
    count = math.ceil(2 * timed(whole) / step_s) + 1
    stalls, whole_s = [], []

    def save_and_go_on() -> None:
        stalls.append(timed(lambda: training.save(saver)))
        training.steps(count)
        assert not saver.busy, "the save outlasted the steps: too few of them"

    def write_and_go_on() -> None:
        thread = threading.Thread(target=write_plainly, args=(training.directory / "plain", data))
        thread.start()
        training.steps(count)
        assert not thread.is_alive(), "the writing outlasted the steps: too few of them"

    sides = {"save": save_and_go_on, "writing": write_and_go_on, "alone": lambda: training.steps(count)}
    took: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        names = list(sides)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            took[name].append(timed(sides[name]))
            if name == "save":
                outcome = saver.wait()
                assert outcome is not None
                whole_s.append(outcome.seconds)
    saver.close()
    return Asynchronous(
        save=cost(took["save"], took["alone"]),
        writing=cost(took["writing"], took["alone"]),
        stall=statistics.median(stalls),
        copy=statistics.median(timed(copy) for _ in range(rounds)),
        seconds=statistics.median(whole_s),
        how=f"{count} steps of {step_s * 1e3:.0f} ms a side",
    )


def write_plainly(path: Path, data: memoryview) -> None:
    """Write and sync bytes as simply as can be."""
    with open(path, "wb", buffering=0) as file:
        for first in range(0, len(data), CHUNK_BYTES):
            file.write(data[first : first + CHUNK_BYTES])
        os.fsync(file.fileno())
    path.unlink()


class Compared(NamedTuple):
    """Medians over the pairs: seconds of both sides, and their ratio."""

    native: float
    plain: float
    ratio: float
    size: int
    """Bytes that each side moved."""


def compared(pairs: int, native: Callable[[], float], plain: Callable[[], float], size: int) -> Compared:
    """Measure both in pairs."""
    first, second = in_pairs(pairs, native, plain)
    ratios = [one / other for one, other in zip(first, second, strict=True)]
    return Compared(statistics.median(first), statistics.median(second), statistics.median(ratios), size)


def synchronous(training: Training, pairs: int) -> Compared:
    """A save beside plain writing."""
    place = training.directory / "synchronous"
    saver = Saver(place, CheckpointConfig(asynchronous=False, read_back=False, keep_last=2))

    def save() -> float:
        seconds = timed(lambda: training.save(saver))
        # Removing the older one is no part of writing this one, and is done by hand.
        for found in commit.list_checkpoints(place)[:-1]:
            commit.remove(found.path)
        return seconds

    save()
    size = sum(file.stat().st_size for file in commit.list_checkpoints(place)[-1].path.iterdir())
    data = memoryview(bytearray(os.urandom(1 << 20) * -(-size // (1 << 20))))[:size]
    result = compared(pairs, save, lambda: timed(lambda: write_plainly(place / "plain", data)), size)
    saver.close()
    return result


def read_plainly(paths: list[Path]) -> None:
    """Read files as simply as can be."""
    chunk = memoryview(bytearray(CHUNK_BYTES))
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(chunk):
                pass


def verifying(training: Training, pairs: int) -> Compared:
    """Hashing the newest checkpoint beside reading it, from the disk each time."""
    path = commit.list_checkpoints(training.directory / "synchronous")[-1].path
    files = sorted(path.iterdir())

    def cold(work: Callable[[], object]) -> float:
        commit.drop_from_cache(path, [file.name for file in files])
        return timed(work)

    def verify() -> None:
        assert commit.verify(path) == []

    size = sum(file.stat().st_size for file in files)
    return compared(pairs, lambda: cold(verify), lambda: cold(lambda: read_plainly(files)), size)


def show(names: tuple[str, str], found: Compared, limit: float) -> None:
    """Print both sides and their ratio."""
    for name, seconds in zip(names, (found.native, found.plain), strict=True):
        print(f"{name:28}{seconds * 1e3:8.1f} ms  ({found.size / seconds / 1e6:,.0f} MB/s)")
    print(f"{'ratio, in pairs':28}{found.ratio:8.2f}     ({met(found.ratio, limit)})")


def shown(found: Cost) -> str:
    """A cost with its interval."""
    return f"{found.median * 1e3:8.1f} ms  (95 % {found.low * 1e3:.0f} to {found.high * 1e3:.0f})"


def met(ratio: float, limit: float, between: tuple[float, float] | None = None) -> str:
    """What a ratio may be, and whether it is that; where the noise reaches over the limit, that nothing was shown."""
    low, high = between or (ratio, ratio)
    verdict = "met" if high <= limit else "NOT MET" if low > limit else "NOT SHOWN"
    return f"at most {limit}: {verdict}" + (f"; 95 % {low:.2f} to {high:.2f}" if between else "")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dir", type=Path, default=Path(), help="where to write; removed afterwards")
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--width", type=int, default=512)
    given = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="bench-saves-", dir=given.dir))
    try:
        training = Training(directory, given.width)
        size = sum(tensor.nbytes for tensor in training.state.values())
        print(f"state of {size / 2**20:.0f} MiB on one process, {given.pairs} rounds, {os.cpu_count()} cores")
        found = asynchronous(training, given.pairs)
        print(f"{'asynchronous save, in all':28}{shown(found.save)}; {found.how}")
        print(f"{'  of which its call':28}{found.stall * 1e3:8.1f} ms  (it ends after {found.seconds:.2f} s)")
        print(f"{'writing as much in a thread':28}{shown(found.writing)}")
        print(f"{'copy of the state':28}{found.copy * 1e3:8.1f} ms")
        ratio, low, high = (seconds / found.copy for seconds in found.save)
        print(f"{'ratio':28}{ratio:8.2f}     ({met(ratio, ASYNCHRONOUS_LIMIT, (low, high))})")
        saved = synchronous(training, given.pairs)
        show(("synchronous save", "plain writing and syncing"), saved, SYNCHRONOUS_LIMIT)
        show(("verifying", "plain reading"), verifying(training, given.pairs), VERIFYING_LIMIT)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
