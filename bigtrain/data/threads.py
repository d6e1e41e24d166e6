"""Threads that decode and augment the samples of a batch: Pillow and NumPy release the interpreter while they work."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final

from bigtrain.hardware.this_machine import available_cores

MOST: Final = 16
"""Threads beyond which the interpreter, which runs one at a time between calls, is the limit."""
WORTH_THREADS: Final = 64 * 64
"""Pixels of an image below which most of its time is the interpreter's, so that threads only wait for each other."""
_PARTS: Final = 4
"""Pieces of work for each thread, so that none waits long for the slowest."""


class Threads:
    """Runs a function for each place of a batch. Threads start at the first batch that needs them.

    Args:
        count: How many threads; 1 works in the caller's. None: as many as this rank has cores.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = own_cores() if count is None else count
        self._pool = ThreadPoolExecutor(self.count, "bigtrain-decoder") if self.count > 1 else None

    def each(self, work: Callable[[int], None], places: int) -> None:
        """Call `work(place)` for each place in 0 .. places - 1, in any order; raises the error of the first place."""
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
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


ALONE: Final = Threads(1)
"""The caller's own thread."""


def own_cores() -> int:
    """This rank's share of the machine's cores, at most MOST."""
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(MOST, available_cores() // ranks))
