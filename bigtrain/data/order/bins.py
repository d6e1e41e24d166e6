"""Which samples share a sequence: best fit, the longest first.

Each sample goes into the fullest sequence that still has room for it (Ding et al. 2024, "Fewer Truncations Improve
Language Modeling", section 3). The number of sequences depends on the lengths alone, not on which sample has which.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping

import numpy as np

from bigtrain.data.order.sample_order import IntArray


def bins(lengths: IntArray, size: int) -> list[list[int]]:
    """The samples of each sequence, ascending.

    Args:
        lengths: int64 (samples,), each at most `size`.
        size: Positions of a sequence.
    """
    found: list[list[int]] = []
    # Sequences by the room that they have left, and the rooms that there are.
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    order = np.argsort(-lengths, kind="stable")
    for sample, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            number, room = len(found), size
            found.append([])
        else:
            room = rooms[place]
            number = by_room[room].pop()
            if not by_room[room]:
                del rooms[place]
        found[number].append(sample)
        left = room - length
        if not by_room.setdefault(left, []):
            insort(rooms, left)
        by_room[left].append(number)
    return [sorted(samples) for samples in found]


def count_bins(histogram: Mapping[int, int], size: int) -> int:
    """How many sequences samples of these lengths fill; a longer sample is cut to `size`.

    Args:
        histogram: How many samples there are of each length.
    """
    lengths = np.repeat(
        np.fromiter((min(length, size) for length in histogram), np.int64, len(histogram)),
        np.fromiter(histogram.values(), np.int64, len(histogram)),
    )
    return len(bins(lengths, size))
