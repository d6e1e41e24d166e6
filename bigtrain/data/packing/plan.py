"""Which documents are held out, and which tokens make which shard: arithmetic on lengths, without a token read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

NPY_HEADER_BYTES = 128


@dataclass(frozen=True)
class Survey:
    """What a first reading of all documents finds out."""

    hashes: list[int]
    characters: list[int]

    def held_out(self, share: float) -> set[int]:
        """The documents to hold out, by number: those of the smallest hashes."""
        count = len(self.hashes)
        ranked = sorted(range(count), key=lambda number: (self.hashes[number], number))
        wanted = min(max(1, round(share * count)), count - 1)
        chosen = ranked[:wanted]
        copies = [number for number in ranked[wanted:] if self.hashes[number] == self.hashes[chosen[-1]]]
        return set(chosen + copies if wanted + len(copies) < count else chosen)

    def tail_boundary(self, share: float) -> int | None:
        """Where a single document is divided, in characters; None where there are several."""
        if len(self.hashes) != 1:
            return None
        return min(max(1, int(self.characters[0] * (1 - share))), self.characters[0] - 1)


@dataclass(frozen=True)
class Piece:
    """Tokens that become one member: a range of one part."""

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
    """What a split holds."""

    documents: int = 0
    characters: int = 0
    text_bytes: int = 0
    shards: int = 0


class SplitPlan:
    """Fills the shards of one split, document after document.

    Args:
        width: Bytes of a stored token.
        shard_bytes: What members may fill; a document longer than that goes on in the next shard.
    """

    def __init__(self, split: str, width: int, shard_bytes: int) -> None:
        self.split, self.counts = split, Counts()
        self._width, self._shard_bytes = width, shard_bytes
        self._member_tokens = max(1, shard_bytes // width)
        self._members = self._used = 0
        self._open: PlannedShard | None = None

    @property
    def oldest_part(self) -> int | None:
        """The first part that the shard under way needs; None where there is none."""
        return self._open.pieces[0].part if self._open is not None else None

    def add(self, part: int, start: int, tokens: int) -> Iterator[PlannedShard]:
        """Append a document, its end of text included; yields the shards that are full by it."""
        while tokens > 0:
            # The last member holds more than the end of text only, or that alone.
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
        """The last shard."""
        if self._open is not None:
            yield self._open
            self._open = None
