"""Threads that decode and augment the samples of a batch. Pillow and NumPy release the GIL while they work."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final

from bigtrain.hardware.this_machine import available_cores

MOST: Final = 16
"""Maximum number of threads. With more threads, the GIL is the limit."""
WORTH_THREADS: Final = 128 * 128
"""Pixels of an image below which threads do not help, because most of the time is spent holding the GIL."""
_PARTS: Final = 4
"""Tasks per thread, so that no thread waits long for the slowest one."""


class Threads:
    """Calls a function for each index of a batch, in several threads. Threads start with the first batch.

    Args:
        count: Number of threads; 1: the calls run in the caller's thread; None: one per core of this rank.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = own_cores() if count is None else count
        self._pool = ThreadPoolExecutor(self.count, "bigtrain-decoder") if self.count > 1 else None

    def each(self, work: Callable[[int], None], places: int) -> None:
        """Call `work(index)` for each index in 0 .. places - 1, in any order.

        If several calls fail, the error of the lowest index is raised.
        """
        if self._pool is None or places < 2:
            for place in range(places):
                work(place)
            return
        size = max(1, places // (_PARTS * self.count))

        def part(first: int) -> None:
            for place in range(first, min(first + size, places)):
                work(place)

        futures = [self._pool.submit(part, first) for first in range(0, places, size)]
        wait(futures)
        for future in futures:
            future.result()

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown()


ALONE: Final = Threads(1)
"""Runs all calls in the caller's thread."""


def own_cores() -> int:
    """Number of CPU cores per rank of this machine, at most MOST."""
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(MOST, available_cores() // ranks))
