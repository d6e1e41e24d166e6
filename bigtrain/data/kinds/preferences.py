"""Preferences: a prompt with a chosen and a rejected answer, as token ids in `KEY.json`.

    {"prompt": [5, 17], "chosen": [40, 2], "rejected": [61, 2]}

A row of the sidecar holds byte offset and bytes of the JSON; the numbers of tokens of prompt, chosen and rejected; and
the total number of tokens of both sequences. Each sequence is the prompt followed by one answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.encoding.pairs import PARTS, ChatPair, TextPair, read_pair
from bigtrain.data.formats.documents import sources
from bigtrain.data.formats.json_sample import MAX_BYTES, is_one, json_object, token_ids
from bigtrain.data.formats.records import READERS, records_of
from bigtrain.data.formats.tar import TarSample
from bigtrain.data.index import REINDEX, ShardIndex
from bigtrain.data.kind import SampleKind, Scanner
from bigtrain.data.packing.options import PackOptions
from bigtrain.data.packing.sample import Means, PackedMember, Sample
from bigtrain.data.reading import Reader, SampleReader, read_bytes
from bigtrain.data.scanning import Scan
from bigtrain.data.shard import Shard
from bigtrain.data.sidecar import Rows, spans_fit
from bigtrain.data.streaming.store import ShardStore
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.models.batches import KINDS, Arrays

if TYPE_CHECKING:
    from bigtrain.models.config import ModelConfig

TOTAL: Final = 5
"""The column with the total number of tokens."""


@KINDS.register
class Preferences(SampleKind):
    """Prompts with pairs of answers, of which one was chosen."""

    name = "preferences"
    unit = "pairs"
    layout = "token ids of prompt, chosen and rejected in KEY.json"
    of_tokens = needs_tokenizer = True
    texts = 2
    options = frozenset({"tokenizer", "chat_template"})

    def columns(self, index: ShardIndex) -> int:
        """See the module's docstring."""
        return 6

    def is_complete(self, index: ShardIndex) -> bool:
        """See `SampleKind`."""
        return index.tokenizer is not None

    def outputs(self, index: ShardIndex) -> int:
        """Size of the vocabulary."""
        assert index.tokenizer is not None
        return index.tokenizer.vocab_size

    def token_column(self, text: bool) -> int | None:
        """See `SampleKind`."""
        return TOTAL

    def rows_fit(self, index: ShardIndex, shard: Shard, rows: Rows) -> bool:
        """See `SampleKind`."""
        prompt, chosen, rejected = rows[:, 2:TOTAL].T
        return bool(
            spans_fit(rows[:, 0], rows[:, 1], shard.filesize)
            and (rows[:, 1] <= MAX_BYTES).all()
            # An id takes at least one byte, so no sum can overflow.
            and (rows[:, 2:TOTAL] <= rows[:, 1:2]).all()
            and (rows[:, TOTAL] == 2 * prompt + chosen + rejected).all()
            and int(rows[:, TOTAL].sum()) == shard.tokens
        )

    def filled(self, index: ShardIndex, context: int) -> int:
        """See `SampleKind`. The last token of an answer is a target and no input."""
        rows = (index.rows(number) for number in range(len(index.shards)))
        return sum(int(np.minimum(one[:, 2:3] + one[:, 3:TOTAL] - 1, context).sum()) for one in rows)

    def cut(self, index: ShardIndex, context: int) -> int:
        """Number of pairs with a sequence of more than `context` + 1 tokens."""
        found = 0
        for number in range(len(index.shards)):
            rows = index.rows(number)
            found += int((rows[:, 2] + rows[:, 3:TOTAL].max(axis=1) > context + 1).sum())
        return found

    def preview(self, index: ShardIndex, lines: int) -> list[str]:
        """The first pairs, with one line each for prompt, chosen and rejected."""
        reader = PreferenceReader(index, 1)
        tokenizer, found = index.load_tokenizer(), []
        shard = next(number for number, entry in enumerate(index.shards) if entry.nsamples)
        for sample in range(min(lines, index.shards[shard].nsamples)):
            found += [f"{part}: {tokenizer.decode(ids)!r}" for part, ids in reader.ids(shard, sample).items()]
        reader.close()
        return found[:lines]

    def recognises(self, sample: TarSample) -> bool:
        """Whether the sample is a JSON object with the three keys."""
        return is_one(sample, _parsed)

    def scanner(self, first: TarSample, tokenizer: Tokenizer | None) -> Scanner:
        """See `SampleKind`."""
        return _Scanner()

    def find(self, inputs: Sequence[str | Path], options: PackOptions) -> Sequence[Sample]:
        """Find the pairs of `encoding.pairs` in JSON lines, JSON arrays, Parquet, Arrow, MDS and tars."""
        found: list[Pair] = []
        for source in sources(inputs, options.passed):
            if source.kind not in READERS:
                options.passed.ignore(source.name, "the file holds no objects")
                continue
            for record in records_of(source, options.passed, [*PARTS, "tools"]):
                try:
                    found.append(Pair(read_pair(record.value), source.path, record.where))
                except UserError as error:
                    options.passed(UserError(error.what, record.where, error.fix))
        if len(found) < 2:
            fix = "Write objects in a form that bigtrain/data/encoding/pairs.py describes."
            raise UserError("there are no preferences", ", ".join(map(str, inputs)), fix)
        return found

    def open_reader(
        self, index: ShardIndex, context: int, document_mask: bool, open_shards: int, store: ShardStore
    ) -> Reader:
        """See `SampleKind`."""
        return PreferenceReader(index, context, open_shards, store)

    def example_batch(
        self, config: ModelConfig, vocabulary: int, count: int, random: np.random.Generator, documents: bool = False
    ) -> Arrays:
        """tokens, targets int64, weights float32 (B, 2, C); keys int64 (B,)."""
        shape = (count, 2, config.context)
        begins = random.integers(0, config.context, (count, 2, 1))
        places = np.arange(config.context)
        return {
            "tokens": random.integers(0, max(1, vocabulary), shape),
            "targets": random.integers(0, max(1, vocabulary), shape),
            "weights": ((places >= begins) & (places < begins + 5)).astype(np.float32),
            "keys": random.integers(0, 2**62, count),
        }


class PreferenceReader(SampleReader):
    """Reads two sequences per sample: the prompt with the chosen answer, then the prompt with the rejected answer."""

    def __init__(self, index: ShardIndex, context: int, open_shards: int = 16, store: ShardStore | None = None) -> None:
        super().__init__(index, open_shards, store)
        self._context = context

    def blank(self, count: int) -> Arrays:
        """Zeros: tokens, targets int64, weights float32 (n, 2, C).

        When filled, targets are the tokens shifted by one position, and the targets of answers have weight one. An
        answer of more than C tokens loses its end. If a sequence then has more than C + 1 tokens, the prompt loses its
        beginning.
        """
        shape = (count, 2, self._context)
        return {
            "tokens": np.zeros(shape, np.int64),
            "targets": np.zeros(shape, np.int64),
            "weights": np.zeros(shape, np.float32),
        }

    def fill(self, arrays: Arrays, place: int, descriptor: int, row: list[int], where: str) -> None:
        """See `SampleReader`."""
        found = _parsed(read_bytes(descriptor, row[0], row[1], where), where)
        if [len(found[part]) for part in PARTS] != row[2:TOTAL]:
            raise CorruptionError("the lengths of the sample differ from the index", where, REINDEX)
        for side, part in enumerate(PARTS[1:]):
            answer = found[part][: self._context]
            # At least one token precedes the answer, because the first token is never a target.
            prompt = found["prompt"][-(self._context + 1 - len(answer)) :]
            ids = np.asarray(prompt + answer, np.int64)
            end = len(ids) - 1
            arrays["tokens"][place, side, :end], arrays["targets"][place, side, :end] = ids[:-1], ids[1:]
            arrays["weights"][place, side, end - len(answer) : end] = 1

    def weigh(self, arrays: Arrays, rows: list[list[int]]) -> None:
        """Do nothing, because `fill` has set the weights."""

    def ids(self, shard: int, sample: int) -> dict[str, list[int]]:
        """The token ids of one sample, under "prompt", "chosen" and "rejected"."""
        descriptor, rows = self._shards[shard]
        offset, size = rows[sample, :2].tolist()
        where = f"{self._index.shards[shard].url}, sample {sample}"
        return _parsed(read_bytes(descriptor, offset, size, where), where)


class _Scanner(Scanner):
    noun = "pair"

    def __init__(self) -> None:
        self._largest = -1

    def add(self, sample: TarSample) -> tuple[int, ...]:
        member = sample.one("json")
        found = _parsed(sample.read(member, MAX_BYTES), sample.where)
        self._largest = max([self._largest, *(id for part in PARTS for id in found[part])])
        prompt, chosen, rejected = (len(found[part]) for part in PARTS)
        return member.offset, member.size, prompt, chosen, rejected, 2 * prompt + chosen + rejected

    def result(self, rows: Rows) -> Scan:
        return Scan("preferences", rows, dtype="<i4", largest_id=self._largest)


@dataclass(frozen=True)
class Pair:
    """A preference pair before packing, and the place in the input that it comes from."""

    content: TextPair | ChatPair
    path: Path
    where: str

    @property
    def bytes(self) -> int:
        """See `Sample`."""
        return sum(map(len, self.content.texts))

    @property
    def files(self) -> tuple[Path, ...]:
        """See `Sample`."""
        return (self.path,)

    def members(self, means: Means) -> list[PackedMember]:
        """See `Sample`."""
        assert means.tokenizer is not None
        try:
            ids = self.content.encode(means.tokenizer)
        except UserError as error:
            raise UserError(error.what, self.where, error.fix) from None
        texts = self.content.texts
        text_bytes = sum(len(text.encode("utf-8")) for text in texts)
        return [PackedMember("json", json.dumps(ids).encode(), text_bytes, sum(map(len, texts)))]


def _parsed(data: bytes, where: str) -> dict[str, list[int]]:
    """Parse the token ids of a sample.

    Raises:
        UserError: The data is no such object.
    """
    value = json_object(data, where)
    return {part: token_ids(value, part, where) for part in PARTS}
