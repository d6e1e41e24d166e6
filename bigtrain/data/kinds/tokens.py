"""Text: documents as tokens (`KEY.npy`), or as text that is tokenised on reading (`KEY.txt`, `KEY.txt.gz`).

A row of the sidecar holds byte offset and number of tokens. For text, it holds byte offset, bytes, number of tokens,
and 1 if the member is compressed with gzip. Sequences are formed on reading, from a shard, its sidecar and the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.formats.images import IMAGE_SUFFIXES
from bigtrain.data.formats.npy import HEADER_BYTES, npy_layout
from bigtrain.data.formats.stored_tokens import TOKEN_TYPES, StoredTokens, needs_tokenizer
from bigtrain.data.formats.tar import TarSample, read_at
from bigtrain.data.formats.text import TEXT_MEMBERS, encode_document, read_text
from bigtrain.data.index import REINDEX, ShardIndex
from bigtrain.data.kind import SampleKind, Scanner
from bigtrain.data.order.sample_order import IntArray
from bigtrain.data.packing.options import PackOptions
from bigtrain.data.packing.summary import PackSummary
from bigtrain.data.reading import Reader, ShardReader
from bigtrain.data.scanning import Scan
from bigtrain.data.shard import Shard
from bigtrain.data.sidecar import Rows, spans_fit
from bigtrain.data.streaming.store import ShardStore
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.models.batches import KINDS, Arrays
from bigtrain.storage import hashes

if TYPE_CHECKING:
    from bigtrain.models.config import ModelConfig

LONG_DOCUMENT = 64
"""Mean tokens per document, from which on copying documents one by one is faster than one gather."""
PREVIEW_TOKENS = 256
PASSED_ON = ("validation", "shard_bytes", "seed", "key", "token_type", "skip_bad")
"""Options that are passed to `packing.documents.pack` unchanged."""


@KINDS.register
class TokenSequences(SampleKind):
    """Sequences of tokens from a stream of documents."""

    name = "tokens"
    unit = "tokens"
    layout = "tokens in KEY.npy, or text in KEY.txt or KEY.txt.gz"
    of_tokens = needs_tokenizer = True
    options = frozenset({"tokenizer", "key", "token_type"})

    def columns(self, index: ShardIndex) -> int:
        """See the module's docstring."""
        return 4 if index.text else 2

    def is_complete(self, index: ShardIndex) -> bool:
        """See `SampleKind`."""
        hashed = not index.text or all(shard.tokens_hash for shard in index.shards)
        return hashed and all((index.dtype, index.tokenizer))

    def outputs(self, index: ShardIndex) -> int:
        """Size of the vocabulary."""
        assert index.tokenizer is not None
        return index.tokenizer.vocab_size

    def sequence_counts(self, index: ShardIndex, context: int) -> list[int]:
        """Number of sequences of `context` tokens in each shard: ceil((tokens - 1) / context)."""
        return [-(-max(0, shard.tokens - 1) // context) for shard in index.shards]

    def token_column(self, text: bool) -> int | None:
        """See `SampleKind`."""
        return 2 if text else 1

    def rows_fit(self, index: ShardIndex, shard: Shard, rows: Rows) -> bool:
        """See `SampleKind`."""
        width = 1 if index.text else np.dtype(index.dtype).itemsize
        counts = index.token_counts(rows)
        return bool(
            spans_fit(rows[:, 0], rows[:, 1], shard.filesize, width)
            and (counts <= shard.tokens).all()
            and int(counts.sum()) == shard.tokens
        )

    def filled(self, index: ShardIndex, context: int) -> int:
        """See `SampleKind`. A shard of n tokens has n - 1 positions with a token and its target."""
        return sum(max(0, shard.tokens - 1) for shard in index.shards)

    def preview(self, index: ShardIndex, lines: int) -> list[str]:
        """The first lines of the first document."""
        shard = next(number for number, entry in enumerate(index.shards) if entry.tokens > 1)
        count = min(PREVIEW_TOKENS, index.shards[shard].tokens - 1)
        reader = TokenReader(index, count)
        tokens = reader.read(np.asarray([shard]), np.asarray([0]))["tokens"][0]
        reader.close()
        return index.load_tokenizer().decode(tokens).splitlines()[:lines]

    def require_same(self, index: ShardIndex, other: ShardIndex) -> None:
        """Require nothing more: equal tokenizers give tokens the same meaning, and are required for all kinds."""

    def recognises(self, sample: TarSample) -> bool:
        """Whether the sample has a list of integers in .npy, or a text, and neither an image nor a class."""
        if sample.suffixes & {*IMAGE_SUFFIXES, "cls"}:
            return False
        if "npy" in sample.suffixes:
            member = sample.one("npy")
            head = read_at(sample.path, member.offset, min(member.size, HEADER_BYTES))
            layout = npy_layout(head, sample.where)
            return layout.dtype in TOKEN_TYPES and len(layout.shape) == 1
        return bool(sample.suffixes & set(TEXT_MEMBERS))

    def scanner(self, first: TarSample, tokenizer: Tokenizer | None) -> Scanner:
        """See `SampleKind`."""
        if "npy" in first.suffixes:
            return _TokenScanner(first.path)
        if tokenizer is None:
            raise needs_tokenizer(first)
        return _TextScanner(tokenizer)

    def named(self, scan: Scan) -> str:
        """See `SampleKind`."""
        return "text" if scan.text else super().named(scan)

    def pack(self, inputs: Sequence[str | Path], out: str | Path, options: PackOptions) -> PackSummary:
        """Tokenise documents; see `packing.documents.pack`."""
        from bigtrain.data.packing.documents import pack

        assert options.tokenizer is not None
        common = {name: getattr(options, name) for name in PASSED_ON}
        return pack(inputs, out, options.tokenizer, workers=options.workers, progress=options.progress, **common)

    def open_reader(
        self, index: ShardIndex, context: int, document_mask: bool, open_shards: int, store: ShardStore
    ) -> Reader:
        """See `SampleKind`."""
        return TokenReader(index, context, document_mask, open_shards, store)

    def example_batch(
        self, config: ModelConfig, vocabulary: int, count: int, random: np.random.Generator, documents: bool = False
    ) -> Arrays:
        """tokens, targets int64, weights float32 (B, C); keys int64 (B,).

        With documents, also documents int32, positions int64 (B, C).
        """
        shape = (count, config.context)
        batch: Arrays = {
            "tokens": random.integers(0, max(1, vocabulary), shape),
            "targets": random.integers(0, max(1, vocabulary), shape),
            "weights": np.ones(shape, np.float32),
            "keys": random.integers(0, 2**62, count),
        }
        batch["weights"][-1, config.context // 3 :] = 0
        batch["weights"][0, max(0, config.context - 3) :] = 0
        if documents:
            begins = random.random(shape) < 0.2
            begins[:, 0] = True
            places = np.broadcast_to(np.arange(config.context), shape)
            batch["documents"] = begins.cumsum(axis=1).astype(np.int32) - 1
            batch["positions"] = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
            batch["weights"][:, :-1][begins[:, 1:]] = 0
        return batch

    def units(self, context: int) -> int:
        """Number of tokens per sequence."""
        return context


@dataclass(frozen=True)
class _TokenShard:
    """A shard's documents as one stream of tokens."""

    stored: npt.NDArray[Any]
    """The full tar as a memory-mapped array of tokens."""
    starts: IntArray
    """Position of each document's first token in the stream."""
    ends: IntArray
    shift: IntArray
    """Offset of each document from its position in the stream to its position in `stored`."""


class TokenReader(ShardReader[_TokenShard]):
    """Reads sequences of tokens.

    Sequence i of a shard covers positions i*C .. i*C + C of the shard's stream of tokens: C inputs, and the C targets
    that follow them. The last sequence is padded with weight zero.
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
        """tokens, targets int64, weights float32 (n, C); with the mask also documents int32, positions int64 (n, C).

        `documents` numbers the documents of a sequence from 0; padding counts as one more. `positions` restart at each
        document. With the mask, the first token of the next document has weight zero as a target.
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
        return blank_sequences(count, self._context, self._document_mask)

    def sample_ids(self, source: str, shards: IntArray, indices: IntArray) -> list[str]:
        """The id of each sequence: SOURCE/SHARD/DOCUMENT:OFFSET of its first token.

        DOCUMENT is the number of a member in the shard, OFFSET the index of a token in the member.
        """
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
            raise CorruptionError("the sidecar does not match its shard", where=str(path), fix=REINDEX)
        stored = np.memmap(path, dtype=dtype, mode="r", shape=(path.stat().st_size // dtype.itemsize,))
        return _TokenShard(np.asarray(stored), starts, ends, rows[:, 0] // dtype.itemsize - starts)

    def _close(self, opened: _TokenShard) -> None:
        # Other arrays may still use the memory map, which ends with the last of them.
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
        """Fill the given rows from one shard, with a single gather.

        A sequence consists of consecutive pieces, each a range of one document. The index of a token in `stored` is its
        position in the stream plus the shift of its document.
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
        # Pieces are written consecutively, so a token's index in its piece is its overall index minus `written`.
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


def blank_sequences(count: int, context: int, document_mask: bool) -> Arrays:
    """Sequences of token 0 and weight zero, of shape (count, context)."""
    shape = (count, context)
    arrays: Arrays = {"tokens": np.zeros(shape, np.int64), "targets": np.zeros(shape, np.int64)}
    if document_mask:
        arrays["documents"] = np.zeros(shape, np.int32)
        arrays["positions"] = np.broadcast_to(np.arange(context, dtype=np.int64), shape).copy()
    arrays["weights"] = np.zeros(shape, np.float32)
    return arrays


def _scatter(
    target: npt.NDArray[Any], rows: IntArray, inside: npt.NDArray[np.bool_] | None, values: npt.NDArray[Any]
) -> None:
    """Write values, row by row, into rows of `target` where `inside` is True; None: everywhere."""
    if inside is None:
        target[rows] = values.reshape(len(rows), -1)
    else:
        part = target[rows]
        part[inside] = values
        target[rows] = part


class _TokenScanner(Scanner):
    noun = "token"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tokens = StoredTokens()

    def add(self, sample: TarSample) -> tuple[int, ...]:
        offset, count, _ = self._tokens.place(sample)
        self._tokens.keep()
        return offset, count

    def result(self, rows: Rows) -> Scan:
        if self._tokens.largest < 0:
            raise UserError("the shard holds no token", where=str(self._path))
        return Scan("tokens", rows, dtype=self._tokens.dtype, largest_id=self._tokens.largest)


class _TextScanner(Scanner):
    noun = "text"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._digest, self._text_bytes = hashes.new_digest(), 0

    def add(self, sample: TarSample) -> tuple[int, ...] | None:
        member = sample.one(*TEXT_MEMBERS)
        compressed = TEXT_MEMBERS[member.suffix]
        text = read_text(sample.path, member.offset, member.size, compressed, sample.where)
        if not text:
            return None
        ids = encode_document(text, self._tokenizer)
        self._digest.update(ids.astype(self._tokenizer.dtype).tobytes())
        self._text_bytes += len(text.encode("utf-8"))
        return member.offset, member.size, len(ids), int(compressed)

    def result(self, rows: Rows) -> Scan:
        return Scan(
            "tokens",
            rows,
            dtype=self._tokenizer.dtype.str,
            text_bytes=self._text_bytes,
            tokens_hash=hashes.named(self._digest),
        )
