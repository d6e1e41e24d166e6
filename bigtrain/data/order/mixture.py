"""Mixtures: how many sequences of each source a step consumes, and which ones.

A repeating pattern assigns the sequences of a phase to the sources. After any p sequences, a source of share w has
given w p sequences, with an error below one (Tijdeman 1980, "The chairman assignment problem"). A step consumes the
next sequences in each source's own order, so each source passes through its own epochs.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from bigtrain.config import UserError
from bigtrain.data.config import StreamingConfig
from bigtrain.data.index import ShardIndex, load_index
from bigtrain.data.order.sample_order import Draw, IntArray, SampleOrder
from bigtrain.data.reading import Reader, open_reader
from bigtrain.data.threads import Threads
from bigtrain.models.batches import Arrays

MAX_PERIOD = 1 << 16
"""Maximum length of a pattern, in sequences. Shares that need a longer pattern are rounded."""


def parts(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest integers with the same ratios as the weights.

    If their sum would exceed MAX_PERIOD, they are rounded by largest remainder; a weight that is not zero gets at
    least one.

    Raises:
        ValueError: No weight is positive.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    total = sum(exact)
    if total <= 0:
        raise ValueError("no source has a weight")
    scale = math.lcm(*(share.denominator for share in exact))
    whole = [int(share * scale) for share in exact]
    divisor = math.gcd(*whole)
    whole = [number // divisor for number in whole]
    if sum(whole) <= MAX_PERIOD:
        return tuple(whole)
    ideal = [share * MAX_PERIOD / total for share in exact]
    whole = [max(int(share), 1) if share else 0 for share in ideal]
    by_remainder = sorted(range(len(ideal)), key=lambda place: (whole[place] - ideal[place], place))
    missing = MAX_PERIOD - sum(whole)
    for place in by_remainder[: max(0, missing)]:
        whole[place] += 1
    return tuple(whole)


@functools.lru_cache(maxsize=64)
def pattern(shares: tuple[int, ...]) -> IntArray:
    """The source of each sequence of one period: int64 of shape (sum of shares,).

    Let a source have `a` of `Q` parts. Its j-th sequence may come at position floor(j Q / a) or later, and must come
    before ceil((j + 1) Q / a). The sequence with the earliest deadline comes first. This meets all deadlines, because
    the shares sum up to one (Baruah et al. 1996, "Proportionate progress").
    """
    period = sum(shares)
    released: list[tuple[int, int, int]] = []
    waiting = [(0, source, 0) for source, share in enumerate(shares) if share]
    heapq.heapify(waiting)
    dealt = np.empty(period, dtype=np.int64)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, source, number = heapq.heappop(waiting)
            heapq.heappush(released, (-(-(number + 1) * period // shares[source]), source, number))
        _, source, number = heapq.heappop(released)
        dealt[place] = source
        heapq.heappush(waiting, ((number + 1) * period // shares[source], source, number + 1))
    return dealt


class _Phase:
    """A range of steps with constant weights."""

    def __init__(self, start: int, base: IntArray, shares: tuple[int, ...]) -> None:
        """Args:
        start: First position of the phase, in sequences since the start of the run.
        base: Sequences consumed from each source before the phase, int64 of shape (S,).
        shares: Integer shares of the sources; see `parts`.
        """
        self.start, self.base = start, base
        self.shares = np.asarray(shares, dtype=np.int64)
        self.pattern = pattern(shares)
        self._places = [np.flatnonzero(self.pattern == source) for source in range(len(shares))]

    def drawn(self, position: int) -> IntArray:
        """Sequences consumed from each source before a position, int64 of shape (S,)."""
        periods, rest = divmod(position - self.start, len(self.pattern))
        begun = [int(np.searchsorted(places, rest)) for places in self._places]
        return self.base + periods * self.shares + np.asarray(begun, dtype=np.int64)

    def sources(self, position: int, count: int) -> IntArray:
        """The source of each of the `count` sequences from a position on, int64 of shape (count,)."""
        return self.pattern[np.arange(position - self.start, position - self.start + count) % len(self.pattern)]


class MixedOrder:
    """The global order of a mixture. Shards are numbered consecutively over all sources.

    Args:
        orders: The order of each source.
        phases: First position of each phase, in sequences, and the weights of the sources in it; in ascending order.
        drawn: Sequences that an earlier run consumed from each source, before the first phase.
    """

    def __init__(
        self,
        orders: Sequence[SampleOrder],
        phases: Sequence[tuple[int, Sequence[float]]],
        drawn: Sequence[int] | None = None,
    ) -> None:
        self._orders = tuple(orders)
        self.counts: IntArray = np.concatenate([order.counts for order in orders])
        self.window = max(order.window for order in orders)
        self.sequences_per_epoch = sum(order.sequences_per_epoch for order in orders)
        sizes = [len(order.counts) for order in orders]
        self._first_shards = np.cumsum([0, *sizes[:-1]])
        base = np.asarray(drawn or [0] * len(orders), dtype=np.int64)
        self._phases: list[_Phase] = []
        for start, weights in phases:
            if self._phases:
                base = self._phases[-1].drawn(start)
            self._phases.append(_Phase(start, base, parts(weights)))

    def drawn(self, position: int) -> IntArray:
        """Sequences consumed from each source before a position, int64 of shape (S,)."""
        return self._phase(position)[0].drawn(position)

    def take(self, start: int, count: int) -> Draw:
        """The sequences at positions start .. start + count - 1."""
        shard, sequence, epoch = (np.empty(count, dtype=np.int64) for _ in range(3))
        done = 0
        while done < count:
            phase, end = self._phase(start + done)
            taken = count - done if end is None else min(count - done, end - start - done)
            sources, consumed = phase.sources(start + done, taken), phase.drawn(start + done)
            for source in np.unique(sources).tolist():
                places = done + np.flatnonzero(sources == source)
                found = self._orders[source].take(int(consumed[source]), len(places))
                shard[places] = found.shard + self._first_shards[source]
                sequence[places], epoch[places] = found.sequence, found.epoch
            done += taken
        return Draw(shard, sequence, epoch)

    def upcoming(self, start: int, count: int) -> IntArray:
        """The shards of these positions and the shards that follow them, source by source."""
        before, after = self.drawn(start), self.drawn(start + count)
        active = self._phase(start + count)[0].shares > 0
        found = [
            order.upcoming(int(first), int(last - first)) + offset
            for order, offset, first, last, needed in zip(
                self._orders, self._first_shards, before, after, active | (after > before), strict=True
            )
            if needed
        ]
        return np.concatenate(found)

    def _phase(self, position: int) -> tuple[_Phase, int | None]:
        """The phase of a position, and the first position of the next phase (None for the last phase)."""
        if position < self._phases[0].start:
            raise ValueError(f"position {position} lies before the mixture's beginning at {self._phases[0].start}")
        number = next(n for n in reversed(range(len(self._phases))) if self._phases[n].start <= position)
        return self._phases[number], self._phases[number + 1].start if number + 1 < len(self._phases) else None


@dataclass(frozen=True)
class Sources:
    """The shard directories that a run reads, with their names. Shards are numbered consecutively over all of them."""

    names: tuple[str, ...]
    indexes: tuple[ShardIndex, ...]

    @classmethod
    def of(cls, data: Sources | ShardIndex | str | Path, name: str) -> Sources:
        """Build a single source with this name, unless `data` is already a `Sources`."""
        if isinstance(data, Sources):
            return data
        return cls((name,), (data if isinstance(data, ShardIndex) else load_index(data),))

    @classmethod
    def by_content(cls, named: Mapping[str, ShardIndex]) -> Sources:
        """Build sources in the order of their fingerprints, so that the order of samples depends on no path or name."""
        ordered = sorted(named.items(), key=lambda pair: pair[1].fingerprint)
        return cls(tuple(name for name, _ in ordered), tuple(index for _, index in ordered))

    @property
    def first(self) -> ShardIndex:
        """The first source; all sources hold the same kind of data and have the same tokenizer."""
        return self.indexes[0]

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary, or number of classes: the maximum over all sources."""
        return max(index.vocab_size for index in self.indexes)

    @property
    def streams(self) -> bool:
        """Whether the shards of any source go through the cache."""
        return any(index.streams for index in self.indexes)

    def sequence_counts(self, context: int, document_mask: bool = False) -> list[int]:
        """Number of sequences of `context` tokens in each shard of each source."""
        return [count for index in self.indexes for count in index.sequence_counts(context, document_mask)]

    def sources_of(self, shards: IntArray) -> IntArray:
        """The source number of each shard, int64."""
        ends = np.cumsum([len(index.shards) for index in self.indexes])
        return np.searchsorted(ends, shards, side="right").astype(np.int64)

    def one_hot(self, shards: IntArray, slots: int) -> np.ndarray:
        """The source of each sequence as a one-hot row: float32 of shape (slots, S); rows of fillers are zero."""
        rows = np.zeros((slots, len(self.names)), dtype=np.float32)
        rows[np.arange(len(shards)), self.sources_of(shards)] = 1
        return rows

    def require_same_samples(self) -> None:
        """Refuse sources that cannot be mixed.

        Raises:
            UserError: Tokenizers or shapes differ, or two sources are the same data.
        """
        seen: dict[str, str] = {}
        for name, index in zip(self.names, self.indexes, strict=True):
            self.first.require_same_tokens(index)
            index.require_same_tokens(self.first)
            other = seen.setdefault(index.fingerprint, name)
            if other != name:
                raise UserError(
                    f"the sources '{other}' and '{name}' are the same data", index.place, "Name it once, with a weight."
                )

    def open_reader(
        self, context: int, document_mask: bool, open_shards: int, streaming: StreamingConfig | None
    ) -> Reader:
        """Open a reader for all sources."""
        readers = [open_reader(index, context, document_mask, open_shards, streaming) for index in self.indexes]
        return readers[0] if len(readers) == 1 else MixedReader(self, readers)


class MixedReader:
    """Reads the shards of several sources; see `reading.Reader`."""

    def __init__(self, sources: Sources, readers: Sequence[Reader]) -> None:
        self._sources, self._readers = sources, tuple(readers)
        sizes = [len(index.shards) for index in sources.indexes]
        self._first_shards = np.cumsum([0, *sizes[:-1]]).tolist()

    def read(self, shards: IntArray, indices: IntArray) -> Arrays:
        """See `Reader.read`."""
        arrays = self.blank(len(shards))
        of = self._sources.sources_of(shards)
        for source in np.unique(of).tolist():
            rows = np.flatnonzero(of == source)
            found = self._readers[source].read(shards[rows] - self._first_shards[source], indices[rows])
            for name, values in found.items():
                arrays[name][rows] = values
        return arrays

    def blank(self, count: int) -> Arrays:
        """See `Reader.blank`."""
        return self._readers[0].blank(count)

    def sample_ids(self, source: str, shards: IntArray, indices: IntArray) -> list[str]:
        """See `Reader.sample_ids`. Each id names the sequence's own source, and `source` is ignored."""
        ids = []
        for of, shard, index in zip(
            self._sources.sources_of(shards).tolist(), shards.tolist(), indices.tolist(), strict=True
        ):
            place = np.asarray([shard - self._first_shards[of]]), np.asarray([index])
            ids += self._readers[of].sample_ids(self._sources.names[of], *place)
        return ids

    def expect(self, shards: Iterable[int]) -> None:
        """See `Reader.expect`."""
        wanted = np.asarray(list(shards), dtype=np.int64)
        of = self._sources.sources_of(wanted)
        for source, reader in enumerate(self._readers):
            reader.expect((wanted[of == source] - self._first_shards[source]).tolist())

    def use(self, threads: Threads) -> None:
        """See `Reader.use`."""
        for reader in self._readers:
            reader.use(threads)

    def interrupt(self) -> None:
        """See `Reader.interrupt`."""
        for reader in self._readers:
            reader.interrupt()

    def close(self) -> None:
        """See `Reader.close`."""
        for reader in self._readers:
            reader.close()
