"""Text with a loss on some tokens: tokens in `KEY.npy`, and one weight per token as a .npy array in `KEY.weights`.

A row of the sidecar holds byte offset and number of the tokens, byte offset of the weights, and bytes per weight: 1 for
uint8 (0 or 1), 4 for float32.

A sample of n tokens has n - 1 positions: all tokens but the last are inputs, and all but the first are targets. A
sequence is one padded sample. With `data.document_mask`, it is as many complete samples as fit (`order.bins`), which do
not attend to each other. A sample that is longer than the context loses its end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bigtrain.config import UserError
from bigtrain.data.encoding.forms import encode_record, keys_of
from bigtrain.data.formats.documents import sources
from bigtrain.data.formats.npy import HEADER_BYTES, npy_bytes, npy_layout
from bigtrain.data.formats.records import READERS, records_of
from bigtrain.data.formats.stored_tokens import StoredTokens
from bigtrain.data.formats.tar import TarSample, read_at
from bigtrain.data.index import ShardIndex
from bigtrain.data.kind import SampleKind, Scanner
from bigtrain.data.kinds.tokens import PREVIEW_TOKENS, TokenSequences, blank_sequences
from bigtrain.data.order.bins import bins, count_bins
from bigtrain.data.order.sample_order import IntArray
from bigtrain.data.packing.options import PackOptions
from bigtrain.data.packing.sample import Means, PackedMember, Sample
from bigtrain.data.packing.summary import PackSummary
from bigtrain.data.reading import Reader, ShardReader, too_short
from bigtrain.data.scanning import Scan
from bigtrain.data.shard import Shard
from bigtrain.data.sidecar import Rows, spans_fit
from bigtrain.data.streaming.store import ShardStore
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.models.batches import KINDS, Arrays

if TYPE_CHECKING:
    from bigtrain.models.config import ModelConfig

WEIGHTS = "weights"
"""Suffix of the member with the weights."""
WEIGHT_TYPES = {"|u1": 1, "<f4": 4}
"""Dtypes of the weights, and their bytes per weight."""


@KINDS.register
class SupervisedSamples(TokenSequences):
    """Prompts with completions, conversations, and tokens with a loss mask."""

    name = "supervised"
    unit = "samples"
    counted = "tokens"
    layout = "tokens in KEY.npy, and a weight for each in KEY.weights, an array of uint8 or float32"
    gives = TokenSequences.name
    options = frozenset({"tokenizer", "columns", "chat_template"})

    def __init__(self) -> None:
        self._counts: dict[tuple[str, int], list[int]] = {}

    def columns(self, index: ShardIndex) -> int:
        """See the module's docstring."""
        return 4

    def is_complete(self, index: ShardIndex) -> bool:
        """See `SampleKind`."""
        counted = all(sum((shard.lengths or {}).values()) == shard.nsamples for shard in index.shards)
        return counted and all((index.dtype, index.tokenizer))

    def lengths(self, rows: Rows) -> dict[str, int]:
        """Number of samples for each number of positions."""
        values, counts = np.unique(rows[:, 1] - 1, return_counts=True)
        return {str(value): count for value, count in zip(values.tolist(), counts.tolist(), strict=True)}

    def sequence_counts(self, index: ShardIndex, context: int) -> list[int]:
        """Number of sequences in each shard: one per sample."""
        return [shard.nsamples for shard in index.shards]

    def packed_counts(self, index: ShardIndex, context: int) -> list[int]:
        """Number of sequences that the samples of each shard fill when they share sequences."""
        key = index.fingerprint, context
        if key not in self._counts:
            self._counts[key] = [count_bins(_histogram(shard), context) for shard in index.shards]
        return self._counts[key]

    def token_column(self, text: bool) -> int | None:
        """See `SampleKind`."""
        return 1

    def rows_fit(self, index: ShardIndex, shard: Shard, rows: Rows) -> bool:
        """See `SampleKind`."""
        counts = rows[:, 1]
        return bool(
            spans_fit(rows[:, 0], counts, shard.filesize, np.dtype(index.dtype).itemsize)
            and np.isin(rows[:, 3], list(WEIGHT_TYPES.values())).all()
            and spans_fit(rows[:, 2], counts, shard.filesize, 1)
            and spans_fit(rows[:, 2], counts * rows[:, 3], shard.filesize, 1)
            and (counts >= 2).all()
            and int(counts.sum()) == shard.tokens
            and self.lengths(rows) == shard.lengths
        )

    def filled(self, index: ShardIndex, context: int) -> int:
        """See `SampleKind`. The positions of a sample are its inputs, whatever the weights of their targets."""
        return sum(
            min(length, context) * count for shard in index.shards for length, count in _histogram(shard).items()
        )

    def cut(self, index: ShardIndex, context: int) -> int:
        """Number of samples with more than `context` positions."""
        return sum(count for shard in index.shards for length, count in _histogram(shard).items() if length > context)

    def check_model(self, index: ShardIndex, config: ModelConfig) -> None:
        """Refuse tasks other than causal: they take positions of weight zero for padding, and would hide the prompt."""
        task = getattr(config, "task", "causal")
        if task != "causal":
            raise UserError(
                f"a model of task '{task}' does not support samples in which only some tokens are learned",
                index.place,
                "Set model.task to causal.",
            )

    def preview(self, index: ShardIndex, lines: int) -> list[str]:
        """The first lines of the first sample."""
        reader = SupervisedReader(index, PREVIEW_TOKENS)
        shard = next(number for number, entry in enumerate(index.shards) if entry.nsamples)
        tokens = reader.read(np.asarray([shard]), np.asarray([0]))["tokens"][0]
        reader.close()
        length = int(index.rows(shard)[0, 1]) - 1
        return index.load_tokenizer().decode(tokens[:length]).splitlines()[:lines]

    def recognises(self, sample: TarSample) -> bool:
        """Whether the sample has tokens and weights."""
        return {"npy", WEIGHTS} <= sample.suffixes

    def scanner(self, first: TarSample, tokenizer: Tokenizer | None) -> Scanner:
        """See `SampleKind`."""
        return _Scanner()

    def named(self, scan: Scan) -> str:
        """See `SampleKind`."""
        return SampleKind.named(self, scan)

    def find(self, inputs: Sequence[str | Path], options: PackOptions) -> Sequence[Sample]:
        """Find the objects in JSON lines, JSON arrays, Parquet, Arrow, MDS, and `.json` members of tars."""
        found: list[RecordSample] = []
        columns, keys = tuple(options.columns.items()), keys_of(options.columns)
        for source in sources(inputs, options.passed):
            if source.kind not in READERS:
                options.passed.ignore(source.name, "the file holds no objects")
                continue
            for record in records_of(source, options.passed, keys):
                text = json.dumps(record.value, ensure_ascii=False, default=_refuse)
                found.append(RecordSample(text, record.where, source.path, columns))
        if not found:
            raise UserError(
                "there are no samples",
                ", ".join(map(str, inputs)),
                "Give objects of JSON lines, Parquet or Arrow with the columns of bigtrain/data/encoding/forms.py.",
            )
        return found

    def pack(self, inputs: Sequence[str | Path], out: str | Path, options: PackOptions) -> PackSummary:
        """See `SampleKind`."""
        return SampleKind.pack(self, inputs, out, options)

    def open_reader(
        self, index: ShardIndex, context: int, document_mask: bool, open_shards: int, store: ShardStore
    ) -> Reader:
        """See `SampleKind`."""
        return SupervisedReader(index, context, document_mask, open_shards, store)


@dataclass(frozen=True)
class RecordSample:
    """One object, before it is packed."""

    content: str
    """The object as JSON."""
    where: str
    file: Path
    columns: tuple[tuple[str, str], ...]

    @property
    def bytes(self) -> int:
        """See `Sample`."""
        return len(self.content)

    @property
    def files(self) -> tuple[Path, ...]:
        """See `Sample`."""
        return (self.file,)

    def members(self, means: Means) -> list[PackedMember]:
        """See `Sample`."""
        assert means.tokenizer is not None
        value = json.loads(self.content)
        try:
            if not isinstance(value, Mapping):
                raise UserError("the sample is not a JSON object")
            sample = encode_record(value, means.tokenizer, dict(self.columns))
        except UserError as error:
            raise UserError(error.what, self.where, error.fix) from None
        is_mask = bool(np.isin(sample.weights, (0, 1)).all())
        weights = sample.weights.astype(np.uint8 if is_mask else np.dtype("<f4"))
        ids = sample.ids.astype(means.tokenizer.dtype)
        return [PackedMember("npy", npy_bytes(ids)), PackedMember(WEIGHTS, npy_bytes(weights))]


@dataclass(frozen=True)
class _SupervisedShard:
    stored: npt.NDArray[np.uint8]
    """The bytes of the full tar, memory-mapped."""
    rows: Rows
    sequences: list[list[int]] | None
    """The samples of each sequence; None: one sample per sequence."""
    name: str


class SupervisedReader(ShardReader[_SupervisedShard]):
    """Reads sequences of one sample, or of several samples with a document mask."""

    def __init__(
        self,
        index: ShardIndex,
        context: int,
        document_mask: bool = False,
        open_shards: int = 16,
        store: ShardStore | None = None,
    ) -> None:
        super().__init__(index, open_shards, store)
        self._context, self._document_mask = context, document_mask

    def read(self, shards: IntArray, indices: IntArray) -> Arrays:
        """tokens, targets int64, weights float32 (n, C); with the mask also documents int32, positions int64 (n, C).

        `documents` numbers the samples of a sequence from 0; padding counts as one more. `positions` restart at each.
        """
        arrays = self.blank(len(shards))
        for place, (shard, index) in enumerate(zip(shards.tolist(), indices.tolist(), strict=True)):
            opened, begin = self._shards[shard], 0
            samples = [index] if opened.sequences is None else opened.sequences[index]
            for number, sample in enumerate(samples):
                ids, weights = self._sample(opened, sample)
                end = begin + min(len(ids) - 1, self._context)
                length = end - begin
                arrays["tokens"][place, begin:end] = ids[:length]
                arrays["targets"][place, begin:end] = ids[1 : length + 1]
                arrays["weights"][place, begin:end] = weights[1 : length + 1]
                if self._document_mask:
                    arrays["documents"][place, begin:end] = number
                    arrays["positions"][place, begin:end] = np.arange(length)
                begin = end
            if self._document_mask:
                arrays["documents"][place, begin:] = len(samples)
                arrays["positions"][place, begin:] = np.arange(self._context - begin)
        return arrays

    def blank(self, count: int) -> Arrays:
        """Sequences of token 0 and weight zero."""
        return blank_sequences(count, self._context, self._document_mask)

    def sample_ids(self, source: str, shards: IntArray, indices: IntArray) -> list[str]:
        """The id of each sequence: SOURCE/SHARD/SAMPLE:0, or SOURCE/SHARD/SAMPLE+SAMPLE:0 for several samples."""
        found = []
        for shard, index in zip(shards.tolist(), indices.tolist(), strict=True):
            opened = self._shards[shard]
            samples = [index] if opened.sequences is None else opened.sequences[index]
            found.append(f"{source}/{self._index.shards[shard].stem}/{'+'.join(map(str, samples))}:0")
        return found

    def _sample(self, opened: _SupervisedShard, sample: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        offset, count, place, width = opened.rows[sample].tolist()
        dtype = np.dtype(self._index.dtype)
        ids = opened.stored[offset : offset + count * dtype.itemsize]
        weights = opened.stored[place : place + count * width]
        if len(ids) != count * dtype.itemsize or len(weights) != count * width:
            raise too_short(f"{opened.name}, sample {sample}")
        return np.frombuffer(ids, dtype), weights if width == 1 else np.frombuffer(weights, "<f4")

    def _open(self, shard: int) -> _SupervisedShard:
        found = self._store.open(shard)
        stored = np.asarray(np.memmap(found.path, np.uint8, "r"))
        sequences = None
        if self._document_mask:
            sequences = bins(np.minimum(found.rows[:, 1] - 1, self._context), self._context)
        return _SupervisedShard(stored, found.rows, sequences, str(found.path))

    def _close(self, opened: _SupervisedShard) -> None:
        # The memory map ends with the last array that uses it.
        pass


class _Scanner(Scanner):
    noun = "sample of tokens and weights"

    def __init__(self) -> None:
        self._tokens = StoredTokens()

    def add(self, sample: TarSample) -> tuple[int, ...]:
        offset, count, _ = self._tokens.place(sample)
        member = sample.one(WEIGHTS)
        layout = npy_layout(read_at(sample.path, member.offset, min(member.size, HEADER_BYTES)), sample.where)
        width = WEIGHT_TYPES.get(layout.dtype)
        if width is None or layout.shape != (count,) or layout.begin + count * width != member.size:
            raise UserError(
                f"the weights are {layout.dtype} of shape {layout.shape}, but there are {count} tokens",
                sample.where,
                "Store one uint8 or float32 weight for each token.",
            )
        if count < 2:
            raise UserError("the sample has fewer than two tokens", sample.where)
        values = np.frombuffer(read_at(sample.path, member.offset + layout.begin, count * width), layout.dtype)
        if (width == 4 and not (np.isfinite(values) & (values >= 0)).all()) or (width == 1 and (values > 1).any()):
            raise UserError("a weight is negative or not a number, or a uint8 weight is neither 0 nor 1", sample.where)
        self._tokens.keep()
        return offset, count, member.offset + layout.begin, width

    def result(self, rows: Rows) -> Scan:
        return Scan(SupervisedSamples.name, rows, dtype=self._tokens.dtype, largest_id=self._tokens.largest)


def _histogram(shard: Shard) -> dict[int, int]:
    return {int(length): count for length, count in (shard.lengths or {}).items()}


def _refuse(value: object) -> Any:
    # Called for bytes or dates, in a value that JSON cannot represent.
    return repr(value)
