"""Forming sequences of tokens on reading: from a shard, its sidecar and the context to arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from bigtrain.config import CorruptionError
from bigtrain.data.index import REINDEX, ShardIndex
from bigtrain.data.order.sample_order import IntArray
from bigtrain.data.streaming.store import ShardStore, open_store

LONG_DOCUMENT = 64
"""Tokens of a shard's documents, on average, from which on copying them one by one is faster than one gather."""

Arrays = dict[str, npt.NDArray[Any]]
T = TypeVar("T")


class Reader(Protocol):
    """Turns places in the data into named arrays whose first axis is the sequence."""

    def read(self, shards: IntArray, indices: IntArray) -> Arrays:
        """The sequences number `indices[i]` of shard `shards[i]`."""
        ...

    def blank(self, count: int) -> Arrays:
        """Valid content of weight zero."""
        ...

    def sample_ids(self, source: str, shards: IntArray, indices: IntArray) -> list[str]:
        """SOURCE/SHARD/DOCUMENT:OFFSET of the first token of each sequence."""
        ...

    def expect(self, shards: Iterable[int]) -> None:
        """Get these shards ready and let go of all others."""
        ...

    def interrupt(self) -> None:
        """End a `read` that waits for a shard; from any thread."""
        ...

    def close(self) -> None:
        """Let go of open shards."""
        ...


class Opened(Generic[T]):
    """The few most recently used shards."""

    def __init__(self, open_one: Callable[[int], T], close_one: Callable[[T], None], limit: int) -> None:
        self._open_one, self._close_one, self._limit = open_one, close_one, max(1, limit)
        self._opened: OrderedDict[int, T] = OrderedDict()

    def __getitem__(self, shard: int) -> T:
        if shard not in self._opened:
            self._opened[shard] = self._open_one(shard)
            if len(self._opened) > self._limit:
                self._close_one(self._opened.popitem(last=False)[1])
        self._opened.move_to_end(shard)
        return self._opened[shard]

    def keep(self, shards: Iterable[int]) -> None:
        """Close all others."""
        for shard in self._opened.keys() - set(shards):
            self._close_one(self._opened.pop(shard))

    def close(self) -> None:
        """Close all."""
        while self._opened:
            self._close_one(self._opened.popitem()[1])


class ShardReader(ABC, Generic[T]):
    """What readers have in common: a store's shards, opened as they are asked for; the most recent stay open."""

    def __init__(self, index: ShardIndex, open_shards: int = 16, store: ShardStore | None = None) -> None:
        self._index = index
        self._store = store or open_store(index)
        self._shards = Opened(self._open, self._close, open_shards)

    @abstractmethod
    def _open(self, shard: int) -> T:
        """A shard, ready to be read."""

    @abstractmethod
    def _close(self, opened: T) -> None:
        """Let go of one."""

    def expect(self, shards: Iterable[int]) -> None:
        """See `Reader`."""
        wanted = list(shards)
        self._shards.keep(wanted)
        self._store.expect(wanted)

    def interrupt(self) -> None:
        """See `Reader`."""
        self._store.interrupt()

    def close(self) -> None:
        """See `Reader`."""
        self._shards.close()
        self._store.close()


@dataclass(frozen=True)
class _TokenShard:
    """A shard's documents as one stream of tokens."""

    stored: npt.NDArray[Any]
    """The whole tar seen as an array of tokens, mapped."""
    starts: IntArray
    """Position in the stream of each document's first token."""
    ends: IntArray
    shift: IntArray
    """Added to a stream position inside a document, gives the position in `stored`."""


class TokenReader(ShardReader[_TokenShard]):
    """Sequences of tokens.

    Sequence i of a shard covers positions i*C .. i*C + C of its stream: C inputs and, one later, C targets.
    The last is padded with weight zero.
    """

    def __init__(
        self,
        index: ShardIndex,
        context: int,
        document_mask: bool = False,
        open_shards: int = 16,
        store: ShardStore | None = None,
    ) -> None:
        if context < 1:
            raise ValueError(f"the context must be at least 1 token, not {context}")
        super().__init__(index, open_shards, store)
        self._context, self._document_mask = context, document_mask

    def read(self, shards: IntArray, indices: IntArray) -> Arrays:
        """tokens, targets int64, weights float32 (n, C); with the mask also documents int32, positions int64.

        `documents` numbers a sequence's documents from 0, padding as one more; `positions` restart at each.
        The target after a document's end has weight zero then.
        """
        count, length = len(shards), self._context + 1
        block = np.zeros((count, length), dtype=np.int64)
        valid = np.zeros(count, dtype=np.int64)
        documents = np.zeros((count, length), dtype=np.int32) if self._document_mask else None
        positions = np.zeros((count, length), dtype=np.int64) if self._document_mask else None
        groups: dict[int, list[int]] = {}
        for row, shard in enumerate(shards.tolist()):
            groups.setdefault(shard, []).append(row)
        for shard, rows in groups.items():
            opened = self._shards[shard]
            fill = self._copy if opened.ends[-1] >= LONG_DOCUMENT * len(opened.ends) else self._gather
            fill(opened, indices[rows], np.asarray(rows), block, valid, documents, positions)
        weights = np.ones((count, self._context), dtype=np.float32)
        if int(valid.min(initial=length)) < length:
            weights[np.arange(1, length) >= valid[:, None]] = 0
        arrays: Arrays = {
            "tokens": np.ascontiguousarray(block[:, :-1]),
            "targets": np.ascontiguousarray(block[:, 1:]),
        }
        if documents is not None and positions is not None:
            weights *= documents[:, 1:] == documents[:, :-1]
            arrays["documents"] = np.ascontiguousarray(documents[:, :-1])
            arrays["positions"] = np.ascontiguousarray(positions[:, :-1])
        arrays["weights"] = weights
        return arrays

    def blank(self, count: int) -> Arrays:
        """Sequences of token 0 and weight zero."""
        shape = (count, self._context)
        arrays: Arrays = {"tokens": np.zeros(shape, np.int64), "targets": np.zeros(shape, np.int64)}
        if self._document_mask:
            arrays["documents"] = np.zeros(shape, np.int32)
            arrays["positions"] = np.broadcast_to(np.arange(self._context, dtype=np.int64), shape).copy()
        arrays["weights"] = np.zeros(shape, np.float32)
        return arrays

    def sample_ids(self, source: str, shards: IntArray, indices: IntArray) -> list[str]:
        """SOURCE/SHARD/DOCUMENT:OFFSET; DOCUMENT counts the shard's members, OFFSET tokens in it."""
        ids = []
        for shard, index in zip(shards.tolist(), indices.tolist(), strict=True):
            opened = self._shards[shard]
            document = int(np.searchsorted(opened.ends, index * self._context, side="right"))
            offset = index * self._context - int(opened.starts[document])
            ids.append(f"{source}/{self._index.shards[shard].stem}/{document}:{offset}")
        return ids

    def _open(self, shard: int) -> _TokenShard:
        found = self._store.open(shard)
        path, rows = found.path, found.rows
        dtype = np.dtype(self._index.dtype)
        ends = np.cumsum(rows[:, 1])
        starts = ends - rows[:, 1]
        if (rows[:, 0] % dtype.itemsize).any():
            raise CorruptionError("the sidecar does not fit its shard", where=str(path), fix=REINDEX)
        stored = np.memmap(path, dtype=dtype, mode="r", shape=(path.stat().st_size // dtype.itemsize,))
        return _TokenShard(np.asarray(stored), starts, ends, rows[:, 0] // dtype.itemsize - starts)

    def _close(self, opened: _TokenShard) -> None:
        # Arrays over a mapping that others may still look at: the last of them ends it.
        pass

    def _copy(
        self,
        opened: _TokenShard,
        indices: IntArray,
        rows: IntArray,
        block: IntArray,
        valid: IntArray,
        documents: npt.NDArray[np.int32] | None,
        positions: IntArray | None,
    ) -> None:
        """Fill the given rows from one shard, document by document."""
        length, ends = self._context + 1, opened.ends
        ranks = np.arange(length)
        for row, index in zip(rows.tolist(), indices.tolist(), strict=True):
            begin = at = index * self._context
            stop = min(begin + length, int(ends[-1]))
            document = first = int(ends.searchsorted(at, side="right"))
            while at < stop:
                end = min(int(ends[document]), stop)
                place = at + int(opened.shift[document])
                block[row, at - begin : end - begin] = opened.stored[place : place + end - at]
                if documents is not None and positions is not None:
                    documents[row, at - begin : end - begin] = document - first
                    positions[row, at - begin : end - begin] = ranks[: end - at]
                at, document = end, document + 1
            valid[row] = stop - begin
            if documents is not None and positions is not None:
                documents[row, stop - begin :] = document - first
                positions[row, stop - begin :] = ranks[: length - stop + begin]

    def _gather(
        self,
        opened: _TokenShard,
        indices: IntArray,
        rows: IntArray,
        block: IntArray,
        valid: IntArray,
        documents: npt.NDArray[np.int32] | None,
        positions: IntArray | None,
    ) -> None:
        """Fill the given rows from one shard, all at once.

        A sequence is a run of pieces, each a stretch of one document. A token's place is its piece's
        shift plus its position in the stream, so that one gather reads them all.
        """
        length = self._context + 1
        begins = indices * self._context
        stops = np.minimum(begins + length, opened.ends[-1])
        sizes = stops - begins
        first = np.searchsorted(opened.ends, begins, side="right")
        pieces = np.searchsorted(opened.ends, stops - 1, side="right") - first + 1
        owner = np.repeat(np.arange(len(rows)), pieces)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        document = first[owner] + within
        piece_begin = np.maximum(opened.starts[document], begins[owner])
        piece_size = np.minimum(opened.ends[document], stops[owner]) - piece_begin
        # Pieces are written one after another, so a token's rank in its piece is its rank minus `written`.
        written = np.cumsum(piece_size) - piece_size
        place = np.arange(int(sizes.sum())) + np.repeat(piece_begin + opened.shift[document] - written, piece_size)
        tokens = opened.stored[place]
        valid[rows] = sizes
        full = bool((sizes == length).all())
        inside = None if full else np.arange(length) < sizes[:, None]
        _scatter(block, rows, inside, tokens)
        if documents is not None and positions is not None:
            if inside is not None:
                last = np.add.reduceat(np.ones_like(owner), np.cumsum(pieces) - pieces)
                documents[rows] = last[:, None]
                positions[rows] = np.arange(length) - sizes[:, None]
            _scatter(documents, rows, inside, np.repeat(within, piece_size))
            rank = np.arange(int(sizes.sum())) - np.repeat(written, piece_size)
            _scatter(positions, rows, inside, rank)


def _scatter(
    target: npt.NDArray[Any], rows: IntArray, inside: npt.NDArray[np.bool_] | None, values: npt.NDArray[Any]
) -> None:
    """Write values, row after row, into rows of target where `inside` holds (everywhere where None)."""
    if inside is None:
        target[rows] = values.reshape(len(rows), -1)
    else:
        part = target[rows]
        part[inside] = values
        target[rows] = part
