"""Base classes of the readers of all kinds: they open shards on demand, and read samples by their position."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, Generic, Protocol, TypeVar

from bigtrain.config import CorruptionError
from bigtrain.data.config import StreamingConfig
from bigtrain.data.index import ShardIndex
from bigtrain.data.order.sample_order import IntArray
from bigtrain.data.streaming.store import ShardStore, open_store
from bigtrain.data.threads import ALONE, Threads
from bigtrain.models.batches import Arrays

T = TypeVar("T")


class Reader(Protocol):
    """Turns positions in the data into named arrays, whose first axis is the sequence."""

    def read(self, shards: IntArray, indices: IntArray) -> Arrays:
        """Read the sequences with number `indices[i]` in shard `shards[i]`."""
        ...

    def blank(self, count: int) -> Arrays:
        """Arrays of `count` valid sequences of weight zero, with the names of those of `read`."""
        ...

    def sample_ids(self, source: str, shards: IntArray, indices: IntArray) -> list[str]:
        """The id of each sequence: SOURCE/SHARD/DOCUMENT:OFFSET of its first token."""
        ...

    def expect(self, shards: Iterable[int]) -> None:
        """Prepare these shards, and release all others."""
        ...

    def use(self, threads: Threads) -> None:
        """Decode in these threads, if the kind supports it."""
        ...

    def interrupt(self) -> None:
        """End a `read` that waits for a shard. May be called from any thread."""
        ...

    def close(self) -> None:
        """Close open shards."""
        ...


class Opened(Generic[T]):
    """Keeps the most recently used shards open."""

    def __init__(self, open_one: Callable[[int], T], close_one: Callable[[T], None], limit: int) -> None:
        self._open_one, self._close_one, self.limit = open_one, close_one, max(1, limit)
        self._opened: OrderedDict[int, T] = OrderedDict()

    def __getitem__(self, shard: int) -> T:
        if shard not in self._opened:
            self._opened[shard] = self._open_one(shard)
            if len(self._opened) > self.limit:
                self._close_one(self._opened.popitem(last=False)[1])
        self._opened.move_to_end(shard)
        return self._opened[shard]

    def keep(self, shards: Iterable[int]) -> None:
        """Close all shards except these."""
        for shard in self._opened.keys() - set(shards):
            self._close_one(self._opened.pop(shard))

    def close(self) -> None:
        """Close all shards."""
        while self._opened:
            self._close_one(self._opened.popitem()[1])


class ShardReader(ABC, Generic[T]):
    """Base class of readers: shards are opened on demand, and the most recently used ones stay open."""

    def __init__(self, index: ShardIndex, open_shards: int = 16, store: ShardStore | None = None) -> None:
        self._index = index
        self._store = store or open_store(index)
        self._shards = Opened(self._open, self._close, open_shards)

    @abstractmethod
    def _open(self, shard: int) -> T:
        """Open a shard for reading."""

    @abstractmethod
    def _close(self, opened: T) -> None:
        """Close one open shard."""

    def expect(self, shards: Iterable[int]) -> None:
        """See `Reader`."""
        wanted = list(shards)
        self._shards.keep(wanted)
        self._store.expect(wanted)

    def use(self, threads: Threads) -> None:
        """See `Reader`. Most kinds have little to decode, so by default the threads are not used."""

    def interrupt(self) -> None:
        """See `Reader`."""
        self._store.interrupt()

    def close(self) -> None:
        """See `Reader`."""
        self._shards.close()
        self._store.close()


def open_reader(
    index: ShardIndex,
    context: int,
    document_mask: bool = False,
    open_shards: int = 16,
    streaming: StreamingConfig | None = None,
) -> Reader:
    """The reader for a shard directory; see `SampleKind.open_reader`.

    Args:
        streaming: Settings for fetching shards from a server.
    """
    return index.sample_kind.open_reader(index, context, document_mask, open_shards, open_store(index, streaming))


class SampleReader(ShardReader[tuple[int, IntArray]]):
    """Base class of readers that read each sample from its position in the tar."""

    is_thread_safe: ClassVar[bool] = False
    """Whether `fill` may run in several threads at once, each with another `place`."""
    _threads: Threads = ALONE

    def use(self, threads: Threads) -> None:
        """See `Reader`."""
        if self.is_thread_safe:
            self._threads = threads

    @abstractmethod
    def blank(self, count: int) -> Arrays:
        """See `Reader`."""

    @abstractmethod
    def fill(self, arrays: Arrays, place: int, descriptor: int, row: list[int], where: str) -> None:
        """Write a sample, except for its weight, into the arrays that `blank` has made.

        Args:
            place: Index of the sample in the arrays.
            descriptor: File descriptor of the open shard.
            row: The sample's row in the sidecar.
            where: Location of the sample, for error messages.
        """

    def weigh(self, arrays: Arrays, rows: list[list[int]]) -> None:
        """Set the weights of the samples from their rows in the sidecar; by default, all weights are 1."""
        arrays["weights"][:] = 1

    def read(self, shards: IntArray, indices: IntArray) -> Arrays:
        """Read the samples with number `indices[i]` in shard `shards[i]`."""
        arrays = self.blank(len(shards))
        rows: list[list[int]] = []
        of, numbers = shards.tolist(), indices.tolist()

        def fill(offset: int) -> None:
            place = part.start + offset
            where = f"{self._index.directory / self._index.shards[of[place]].url}, sample {numbers[place]}"
            self.fill(arrays, place, descriptors[offset], rows[place], where)

        for part in _parts(of, self._shards.limit):
            opened = [self._shards[of[place]] for place in part]
            descriptors = [descriptor for descriptor, _ in opened]
            rows += [table[numbers[place]].tolist() for place, (_, table) in zip(part, opened, strict=True)]
            self._threads.each(fill, len(part))
        self.weigh(arrays, rows)
        return arrays

    def sample_ids(self, source: str, shards: IntArray, indices: IntArray) -> list[str]:
        """The id of each sample: SOURCE/SHARD/SAMPLE:0."""
        stems = [self._index.shards[shard].stem for shard in shards.tolist()]
        return [f"{source}/{stem}/{index}:0" for stem, index in zip(stems, indices.tolist(), strict=True)]

    def _open(self, shard: int) -> tuple[int, IntArray]:
        found = self._store.open(shard)
        return os.open(found.path, os.O_RDONLY), found.rows

    def _close(self, opened: tuple[int, IntArray]) -> None:
        os.close(opened[0])


def _parts(shards: list[int], limit: int) -> Iterator[range]:
    """Yield ranges of samples that come from at most `limit` shards each, so that these can be open together."""
    first = 0
    seen: set[int] = set()
    for place, shard in enumerate(shards):
        if len(seen | {shard}) > limit:
            yield range(first, place)
            first, seen = place, set()
        seen.add(shard)
    yield range(first, len(shards))


def read_bytes(descriptor: int, offset: int, size: int, where: str) -> bytes:
    """Read `size` bytes of an open shard at an offset.

    Raises:
        CorruptionError: The shard ends before the last of these bytes.
    """
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise too_short(where)
    return data


def too_short(where: str) -> CorruptionError:
    """The error of a shard that is shorter than its index says."""
    return CorruptionError("the shard is shorter than its index says", where=where)
