"""The global order: computes which sequences a step consumes.

Each epoch permutes the shards, takes `window` consecutive shards at a time, and permutes the sequences inside
that window. The order depends only on (seed, fingerprint, counts, window). So world size, workers, engine and layout
cannot change it, and a reader that can hold one window reads each shard once per epoch.

A permutation is the argsort of a splitmix64 hash (Steele, Lea, Flood 2014). The hash is implemented here, so that no
release of NumPy can change it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from bigtrain.config import UserError

K = TypeVar("K")
V = TypeVar("V")
IntArray = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHARDS, _SEQUENCES = 1, 2
_CACHED_WINDOWS = 3


class Draw(NamedTuple):
    """Sequences of the global order: shard, number and epoch of each, as int64 arrays of equal length."""

    shard: IntArray
    sequence: IntArray
    """Number of each sequence inside its shard."""
    epoch: IntArray


class Order(Protocol):
    """A global order of sequences."""

    counts: IntArray
    """Number of sequences in each shard."""
    window: int
    """Number of shards whose sequences are shuffled together."""

    def take(self, start: int, count: int) -> Draw:
        """The sequences at positions start .. start + count - 1."""
        ...

    def upcoming(self, start: int, count: int) -> IntArray:
        """The shards of these positions and the shards that follow them, in the order in which they are needed."""
        ...

    def drawn(self, position: int) -> IntArray:
        """Sequences consumed from each source before a position, int64 of shape (S,)."""
        ...


def splitmix64(values: npt.ArrayLike) -> _Words:
    """The splitmix64 finalizer of each 64-bit word; arithmetic is modulo 2**64."""
    mixed = np.atleast_1d(np.asarray(values, dtype=np.uint64)) + _GAMMA
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    return mixed ^ (mixed >> np.uint64(31))


def hash_words(*words: int | npt.ArrayLike) -> _Words:
    """The 64-bit hash of a tuple of integers. Arrays broadcast; negative integers are taken modulo 2**64."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        value = word % 2**64 if isinstance(word, int) else np.asarray(word).astype(np.uint64)
        state = splitmix64(state ^ splitmix64(value))
    return state


def permutation(count: int, *key: int) -> IntArray:
    """A permutation of range(count), int64. It depends only on `key`, and not on machine or version."""
    ranks = hash_words(*key, np.arange(count, dtype=np.uint64))
    return np.argsort(ranks, kind="stable").astype(np.int64)


def sequence_keys(seed: int, step: int, slots: npt.ArrayLike) -> IntArray:
    """The key of each sequence's random numbers: the int64 hash of (seed, step, slot in the global batch)."""
    return hash_words(seed, step, slots).view(np.int64)


class SampleOrder:
    """The order of training.

    Args:
        seed: The run's seed.
        fingerprint: The data's fingerprint; other data has another order.
        counts: Number of sequences in each shard, in the order of the index.
        window: Number of shards whose sequences are shuffled together.

    Raises:
        UserError: No shard holds a sequence.
    """

    def __init__(self, seed: int, fingerprint: str, counts: Sequence[int], window: int) -> None:
        if window < 1:
            raise ValueError(f"the window must hold at least one shard, not {window}")
        self.counts: IntArray = np.asarray(counts, dtype=np.int64)
        self.sequences_per_epoch = int(self.counts.sum())
        if self.sequences_per_epoch < 1:
            raise UserError(
                "the training data holds no sequence", fix="Pack more text: a sequence needs at least two tokens."
            )
        self.window = window
        digest = hashlib.sha256(f"{seed}:{fingerprint}".encode()).digest()
        self._key = int.from_bytes(digest[:8], "little")
        self._epochs: OrderedDict[int, tuple[IntArray, IntArray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], tuple[IntArray, IntArray]] = OrderedDict()

    def take(self, start: int, count: int) -> Draw:
        """The sequences at positions start .. start + count - 1. The number of epochs is unlimited."""
        shards, indices, epochs = [], [], []
        position, end = start, start + count
        while position < end:
            epoch, inside = divmod(position, self.sequences_per_epoch)
            first_positions = self._epoch(epoch)[1]
            number = int(np.searchsorted(first_positions, inside, side="right")) - 1
            offset = inside - int(first_positions[number])
            shard, index = self._window(epoch, number)
            taken = min(end - position, len(shard) - offset)
            shards.append(shard[offset : offset + taken])
            indices.append(index[offset : offset + taken])
            epochs.append(np.full(taken, epoch, dtype=np.int64))
            position += taken
        empty = np.zeros(0, dtype=np.int64)
        return Draw(*(np.concatenate([empty, *parts]) for parts in (shards, indices, epochs)))

    def upcoming(self, start: int, count: int) -> IntArray:
        """The shards of the windows of positions start .. start + count - 1, and of the window after them."""
        found = []
        position, last = start, start + max(1, count) - 1
        while True:
            epoch, inside = divmod(position, self.sequences_per_epoch)
            shards, first_positions = self._epoch(epoch)
            number = int(np.searchsorted(first_positions, inside, side="right")) - 1
            found.append(shards[number * self.window : (number + 1) * self.window])
            if position > last:
                return np.concatenate(found)
            after = first_positions[number + 1] if number + 1 < len(first_positions) else self.sequences_per_epoch
            position = epoch * self.sequences_per_epoch + int(after)

    def drawn(self, position: int) -> IntArray:
        """See `Order`. There is only one source."""
        return np.asarray([position], dtype=np.int64)

    def _epoch(self, epoch: int) -> tuple[IntArray, IntArray]:
        """The permuted shards that hold sequences, and the first position of each window."""
        if epoch not in self._epochs:
            filled = np.flatnonzero(self.counts)
            shards = filled[permutation(len(filled), self._key, _SHARDS, epoch)]
            sizes = np.add.reduceat(self.counts[shards], np.arange(0, len(shards), self.window))
            _remember(self._epochs, epoch, (shards, np.concatenate([[0], np.cumsum(sizes)[:-1]])), limit=2)
        return self._epochs[epoch]

    def _window(self, epoch: int, number: int) -> tuple[IntArray, IntArray]:
        """The shard of each sequence of a window, and its number in the shard, in permuted order."""
        key = (epoch, number)
        if key not in self._windows:
            shards = self._epoch(epoch)[0][number * self.window : (number + 1) * self.window]
            counts = self.counts[shards]
            ends = np.cumsum(counts)
            chosen = permutation(int(ends[-1]), self._key, _SEQUENCES, epoch, number)
            place = np.searchsorted(ends, chosen, side="right")
            taken = (shards[place], chosen - (ends - counts)[place])
            _remember(self._windows, key, taken, limit=_CACHED_WINDOWS)
        self._windows.move_to_end(key)
        return self._windows[key]


class FixedOrder:
    """The order of evaluation: all shards and their sequences in storage order, once.

    Args:
        counts: Number of sequences in each shard.
        most: Maximum number of sequences; None: all.
    """

    window = 1

    def __init__(self, counts: Sequence[int], most: int | None = None) -> None:
        self.counts: IntArray = np.asarray(counts, dtype=np.int64)
        self._ends = np.cumsum(self.counts)
        total = int(self.counts.sum())
        self.sequences_per_epoch = total if most is None else min(most, total)

    def take(self, start: int, count: int) -> Draw:
        """The sequences at positions start .. start + count - 1; fewer if the data ends."""
        positions = np.arange(start, max(start, min(start + count, self.sequences_per_epoch)), dtype=np.int64)
        shard = np.searchsorted(self._ends, positions, side="right").astype(np.int64)
        return Draw(shard, positions - (self._ends - self.counts)[shard], np.zeros_like(positions))

    def upcoming(self, start: int, count: int) -> IntArray:
        """The shards of these positions, and the next two that hold a sequence."""
        filled = np.flatnonzero(self.counts)
        ends = self._ends[filled]
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, start + max(1, count) - 1, side="right"))
        return filled[first : last + 3].astype(np.int64)

    def drawn(self, position: int) -> IntArray:
        """See `Order`. There is only one source."""
        return np.asarray([position], dtype=np.int64)


def _remember(cache: OrderedDict[K, V], key: K, value: V, limit: int) -> None:
    cache[key] = value
    while len(cache) > limit:
        cache.popitem(last=False)
