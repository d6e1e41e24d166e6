"""Plans which documents are held out and which tokens go into which shard, from the lengths of documents only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

NPY_HEADER_BYTES = 128


@dataclass(frozen=True)
class Survey:
    """Hash and number of characters of each document, from a first pass over the input."""

    hashes: list[int]
    characters: list[int]

    def held_out(self, share: float) -> set[int]:
        """The numbers of the documents to hold out: those with the smallest hashes."""
        count = len(self.hashes)
        ranked = sorted(range(count), key=lambda number: (self.hashes[number], number))
        wanted = min(max(1, round(share * count)), count - 1)
        chosen = ranked[:wanted]
        copies = [number for number in ranked[wanted:] if self.hashes[number] == self.hashes[chosen[-1]]]
        return set(chosen + copies if wanted + len(copies) < count else chosen)

    def tail_boundary(self, share: float) -> int | None:
        """The character (or stored token) at which an only document is divided; None if there are several."""
        if len(self.hashes) != 1:
            return None
        return min(max(1, int(self.characters[0] * (1 - share))), self.characters[0] - 1)


@dataclass(frozen=True)
class Piece:
    """A range of tokens of one part, which becomes one member of a shard."""

    part: int
    start: int
    count: int


@dataclass
class PlannedShard:
    """One shard to be written."""

    split: str
    number: int
    first_member: int
    pieces: list[Piece] = field(default_factory=list)


@dataclass
class Counts:
    """Counts of what a split contains."""

    documents: int = 0
    characters: int = 0
    text_bytes: int = 0
    shards: int = 0


class SplitPlan:
    """Fills the shards of one split, document after document.

    Args:
        width: Bytes per stored token.
        shard_bytes: Maximum bytes of a shard's members; a longer document spans several shards.
    """

    def __init__(self, split: str, width: int, shard_bytes: int) -> None:
        self.split, self.counts = split, Counts()
        self._width, self._shard_bytes = width, shard_bytes
        self._member_tokens = max(1, shard_bytes // width)
        self._members = self._used = 0
        self._open: PlannedShard | None = None

    @property
    def oldest_part(self) -> int | None:
        """The first part that the unfinished shard needs; None if there is no unfinished shard."""
        return self._open.pieces[0].part if self._open is not None else None

    def add(self, part: int, start: int, tokens: int) -> Iterator[PlannedShard]:
        """Append a document with its end-of-text token. Yields the shards that become full."""
        while tokens > 0:
            # The last member of a long document may be short, and hold only the end-of-text token.
            count = self._member_tokens if tokens > self._member_tokens else tokens
            size = NPY_HEADER_BYTES + count * self._width
            if self._open is not None and self._used + size > self._shard_bytes:
                yield self._open
                self._open = None
            if self._open is None:
                self._open = PlannedShard(self.split, self.counts.shards, self._members)
                self.counts.shards += 1
                self._used = 0
            self._open.pieces.append(Piece(part, start, count))
            self._members += 1
            self._used += size
            start, tokens = start + count, tokens - count

    def finish(self) -> Iterator[PlannedShard]:
        """Yield the last, unfinished shard, if there is one."""
        if self._open is not None:
            yield self._open
            self._open = None
