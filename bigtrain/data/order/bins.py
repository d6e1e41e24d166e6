"""Determines which samples share a sequence: best-fit packing, with the longest samples first.

Each sample goes into the fullest sequence that still has room for it (Ding et al. 2024, "Fewer Truncations Improve
Language Modeling", section 3). The number of sequences depends only on the histogram of lengths.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping

import numpy as np

from bigtrain.data.order.sample_order import IntArray


def bins(lengths: IntArray, size: int) -> list[list[int]]:
    """The samples of each sequence, in ascending order.

    Args:
        lengths: Length of each sample, int64 of shape (samples,); each is at most `size`.
        size: Positions per sequence.
    """
    found: list[list[int]] = []
    # Sequences by their number of free positions, and the ascending list of these numbers.
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
    """The number of sequences that samples of these lengths fill; a longer sample is cut to `size`.

    Args:
        histogram: Number of samples of each length.
        size: Positions per sequence.
    """
    lengths = np.repeat(
        np.fromiter((min(length, size) for length in histogram), np.int64, len(histogram)),
        np.fromiter(histogram.values(), np.int64, len(histogram)),
    )
    return len(bins(lengths, size))
