"""What a save costs: an asynchronous one beside a copy of the state, a synchronous one beside plain writing.

    OMP_NUM_THREADS=1 python tests/bench/bench_saves.py [--dir DIR] [--pairs 9] [--width 512]

Asynchronous: the time of a save and of the steps until it is done, less that of as many steps alone, over the time of a
copy of the state in memory. Synchronous: a save with its hashes, not read back, over writing and syncing as many bytes
from memory. Both sides of a pair follow each other, each first in turn; medians over pairs. Run it on a machine that
does nothing else, with DIR on the disk that checkpoints go to, and at least two cores: one of them writes.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from bigtrain.checkpoint import commit
from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.checkpoint.saver import Saver
from bigtrain.testing.equivalence import LR, How, What, build, micro_batches

ASYNCHRONOUS_LIMIT, SYNCHRONOUS_LIMIT = 1.5, 1.3
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


def asynchronous(training: Training, pairs: int) -> tuple[float, float, str]:
    """Median cost of a save in all, median time of a copy, and how it was measured."""
    saver = Saver(training.directory / "asynchronous", CheckpointConfig())
    state = training.state
    copies = {name: tensor.detach().clone() for name, tensor in state.items()}

    def copy() -> None:
        for name, tensor in state.items():
            copies[name].copy_(tensor)

    def whole() -> None:
        training.save(saver)
        saver.wait()

    whole()
    step_s = statistics.median(timed(lambda: training.steps(1)) for _ in range(5))
    count = math.ceil(2 * timed(whole) / step_s) + 1

    def with_save() -> float:
        def work() -> None:
            training.save(saver)
            training.steps(count)
            assert not saver.busy, "the save outlasted the steps: too few of them"

        return timed(work)

    saves, alone = in_pairs(pairs, with_save, lambda: timed(lambda: training.steps(count)))
    saver.close()
    copied = statistics.median(timed(copy) for _ in range(pairs))
    cost = statistics.median(save - plain for save, plain in zip(saves, alone, strict=True))
    return cost, copied, f"{count} steps of {step_s * 1e3:.0f} ms a side"


def write_plainly(path: Path, data: memoryview) -> None:
    """Write and sync bytes as simply as can be."""
    with open(path, "wb", buffering=0) as file:
        for first in range(0, len(data), CHUNK_BYTES):
            file.write(data[first : first + CHUNK_BYTES])
        os.fsync(file.fileno())
    path.unlink()


def synchronous(training: Training, pairs: int) -> tuple[float, float, int]:
    """Median time of a save, median time of plain writing, and the bytes of both."""
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
    saves, plain = in_pairs(pairs, save, lambda: timed(lambda: write_plainly(place / "plain", data)))
    saver.close()
    return statistics.median(saves), statistics.median(plain), size


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dir", type=Path, default=Path(), help="where to write; removed afterwards")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--width", type=int, default=512)
    given = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="bench-saves-", dir=given.dir))
    try:
        training = Training(directory, given.width)
        size = sum(tensor.nbytes for tensor in training.state.values())
        print(f"state of {size / 2**20:.0f} MiB on one process, {given.pairs} pairs, {os.cpu_count()} cores")
        cost, copied, how = asynchronous(training, given.pairs)
        print(f"asynchronous save, in all   {cost * 1e3:8.1f} ms  ({how})")
        print(f"copy of the state           {copied * 1e3:8.1f} ms")
        print(f"ratio                       {cost / copied:8.2f}     (at most {ASYNCHRONOUS_LIMIT})")
        saved, plain, written = synchronous(training, given.pairs)
        print(f"synchronous save            {saved * 1e3:8.1f} ms  ({written / 2**20:.0f} MiB)")
        print(f"plain writing and syncing   {plain * 1e3:8.1f} ms")
        print(f"ratio                       {saved / plain:8.2f}     (at most {SYNCHRONOUS_LIMIT})")
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
