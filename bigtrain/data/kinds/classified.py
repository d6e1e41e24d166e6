"""Texts with a class, as token ids and a class number in `KEY.json`: {"tokens": [5, 17, 40], "class": 2}.

A row of the sidecar holds byte offset and bytes of the JSON, the number of tokens, and the class.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.formats.documents import sources
from bigtrain.data.formats.images import CLASSES_NAME, MAX_CLASSES
from bigtrain.data.formats.json_sample import MAX_BYTES, is_one, json_object, token_ids
from bigtrain.data.formats.records import READERS, Record, records_of, under
from bigtrain.data.formats.tar import TarSample
from bigtrain.data.index import REINDEX, ShardIndex
from bigtrain.data.kind import SampleKind, Scanner
from bigtrain.data.kinds.images import require_same_names
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

TOKENS, CLASS = 2, 3
"""Columns of the sidecar."""


@KINDS.register
class Classified(SampleKind):
    """Texts with one class each."""

    name = "classified"
    unit = "texts"
    layout = "token ids and a class number in KEY.json"
    of_tokens = needs_tokenizer = True
    options = frozenset({"tokenizer", "columns"})

    def columns(self, index: ShardIndex) -> int:
        """See the module's docstring."""
        return 4

    def is_complete(self, index: ShardIndex) -> bool:
        """See `SampleKind`."""
        return index.tokenizer is not None and index.classes is not None

    def rows_fit(self, index: ShardIndex, shard: Shard, rows: Rows) -> bool:
        """See `SampleKind`."""
        return bool(
            spans_fit(rows[:, 0], rows[:, 1], shard.filesize)
            and (rows[:, 1] <= MAX_BYTES).all()
            # An id takes at least one byte.
            and (rows[:, TOKENS] <= rows[:, 1]).all()
            and int(rows[:, TOKENS].sum()) == shard.tokens
            and int(rows[:, CLASS].max()) < (index.classes or 0)
        )

    def class_column(self, index: ShardIndex) -> int | None:
        """See `SampleKind`."""
        return CLASS

    def token_column(self, text: bool) -> int | None:
        """See `SampleKind`."""
        return TOKENS

    def filled(self, index: ShardIndex, context: int) -> int:
        """See `SampleKind`."""
        return sum(int(np.minimum(counts, context).sum()) for counts in index.all_token_counts())

    def cut(self, index: ShardIndex, context: int) -> int:
        """Number of texts that are longer than `context` tokens."""
        return sum(int((counts > context).sum()) for counts in index.all_token_counts())

    def describe(self, index: ShardIndex) -> str | None:
        """Number of classes, and their names."""
        names = ", ".join(index.class_names or ())
        return f"{index.classes} classes" + (f": {names}" if names else "")

    def require_same(self, index: ShardIndex, other: ShardIndex) -> None:
        """Require no more classes in `other`, and the same names of classes."""
        super().require_same(index, other)
        require_same_names(index, other)

    def check_model(self, index: ShardIndex, config: ModelConfig) -> None:
        """Require a model whose vocabulary contains all tokens."""
        known = getattr(config, "vocabulary", None)
        if known is not None and index.tokenizer is not None and index.tokenizer.vocab_size > known:
            raise UserError(
                f"The texts have {index.tokenizer.vocab_size} different tokens, but model.vocabulary is {known}",
                index.place,
                f"Set model.vocabulary to {index.tokenizer.vocab_size}, or pack with the tokenizer of the model.",
            )

    def recognises(self, sample: TarSample) -> bool:
        """Whether the sample is a JSON object with both keys."""
        return is_one(sample, _parsed)

    def scanner(self, first: TarSample, tokenizer: Tokenizer | None) -> Scanner:
        """See `SampleKind`."""
        return _Scanner()

    def find(self, inputs: Sequence[str | Path], options: PackOptions) -> Sequence[Sample]:
        """Find objects with the columns `text` and `label`: a class number, or a name (numbered in sorted order)."""
        columns = {"text": "text", "label": "label", **options.columns}
        unknown = sorted(columns.keys() - {"text", "label"})
        if unknown:
            raise UserError(
                f"texts with a class have no column '{unknown[0]}'", "--columns", "Name the columns text and label."
            )
        found: list[Text] = []
        for record in _records(inputs, options):
            try:
                found.append(Text(*_columns(record, columns), record.source.path, record.where))
            except UserError as error:
                options.passed(error)
        if len(found) < 2:
            fix = "Write objects with a `text` and a `label`, or name the columns with --columns."
            raise UserError("there are no texts with a class", ", ".join(map(str, inputs)), fix)
        odd = next((one for one in found if type(one.label) is not type(found[0].label)), None)
        if odd is not None:
            raise UserError(
                f"the label is {odd.label!r}, but that of other texts is {found[0].label!r}",
                odd.where,
                "Give all classes names, or give all of them numbers from 0.",
            )
        numbers = {name: number for number, name in enumerate(_names(found))}
        return [replace(one, number=numbers[one.label] if isinstance(one.label, str) else one.label) for one in found]

    def notes(self, inputs: Sequence[str | Path], samples: Sequence[Sample]) -> dict[str, Any]:
        """The names of the classes, if labels are names."""
        names = _names(one for one in samples if isinstance(one, Text))
        return {CLASSES_NAME: names} if names else {}

    def open_reader(
        self, index: ShardIndex, context: int, document_mask: bool, open_shards: int, store: ShardStore
    ) -> Reader:
        """See `SampleKind`."""
        return TextReader(index, context, open_shards, store)

    def example_batch(
        self, config: ModelConfig, vocabulary: int, count: int, random: np.random.Generator, documents: bool = False
    ) -> Arrays:
        """tokens int64 (B, C); lengths, labels, keys int64 (B,); weights float32 (B,)."""
        return {
            "tokens": random.integers(0, max(1, getattr(config, "vocabulary", 1)), (count, config.context)),
            "lengths": random.integers(1, config.context + 1, count),
            "labels": random.integers(0, max(1, vocabulary), count),
            "keys": random.integers(0, 2**62, count),
            "weights": np.ones(count, np.float32),
        }


class TextReader(SampleReader):
    """Reads texts with their class; texts are cut or padded to `context` tokens."""

    def __init__(self, index: ShardIndex, context: int, open_shards: int = 16, store: ShardStore | None = None) -> None:
        super().__init__(index, open_shards, store)
        self._context = context

    def blank(self, count: int) -> Arrays:
        """tokens int64 (n, C); lengths, labels int64 (n,); weights float32 (n,).

        The first `lengths` tokens of a row are those of the text; the others are padding.
        """
        return {
            "tokens": np.zeros((count, self._context), np.int64),
            "lengths": np.ones(count, np.int64),
            "labels": np.zeros(count, np.int64),
            "weights": np.zeros(count, np.float32),
        }

    def fill(self, arrays: Arrays, place: int, descriptor: int, row: list[int], where: str) -> None:
        """See `SampleReader`."""
        ids, label = _parsed(read_bytes(descriptor, row[0], row[1], where), where)
        if [len(ids), label] != row[TOKENS:]:
            raise CorruptionError("the length or the class of the sample differs from the index", where, REINDEX)
        kept = ids[: self._context]
        arrays["tokens"][place, : len(kept)], arrays["lengths"][place] = kept, len(kept)
        arrays["labels"][place] = label


class _Scanner(Scanner):
    noun = "text with a class"

    def __init__(self) -> None:
        self._largest = self._classes = -1

    def add(self, sample: TarSample) -> tuple[int, ...]:
        member = sample.one("json")
        ids, label = _parsed(sample.read(member, MAX_BYTES), sample.where)
        self._largest, self._classes = max(self._largest, *ids), max(self._classes, label)
        return member.offset, member.size, len(ids), label

    def result(self, rows: Rows) -> Scan:
        return Scan("classified", rows, dtype="<i4", largest_id=self._largest, classes=self._classes + 1)


@dataclass(frozen=True)
class Text:
    """A text and its class, before it is packed."""

    text: str
    label: str | int
    path: Path
    where: str
    number: int = 0
    """Number of the class."""

    @property
    def bytes(self) -> int:
        """See `Sample`."""
        return len(self.text)

    @property
    def files(self) -> tuple[Path, ...]:
        """See `Sample`."""
        return (self.path,)

    def members(self, means: Means) -> list[PackedMember]:
        """See `Sample`."""
        assert means.tokenizer is not None
        ids = [int(id) for id in means.tokenizer.encode(self.text)]
        data = json.dumps({"tokens": ids, "class": self.number}).encode()
        return [PackedMember("json", data, len(self.text.encode("utf-8")), len(self.text))]


def _records(inputs: Sequence[str | Path], options: PackOptions) -> Iterator[Record]:
    for source in sources(inputs, options.passed):
        if source.kind in READERS:
            yield from records_of(source, options.passed)
        else:
            options.passed.ignore(source.name, "the file holds no objects")


def _columns(record: Record, columns: dict[str, str]) -> tuple[str, str | int]:
    text, label = (under(record.value, columns[name]) for name in ("text", "label"))
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"there is no text under '{columns['text']}'", record.where)
    if isinstance(label, bool) or not (isinstance(label, str) or (isinstance(label, int) and 0 <= label < MAX_CLASSES)):
        raise UserError(
            f"there is no class under '{columns['label']}'", record.where, "Write a name, or a number from 0."
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("the text holds an unpaired surrogate", record.where) from None
    return text, label


def _names(texts: Iterable[Text]) -> list[str]:
    """The names of the classes in the order of their numbers; empty if labels are numbers."""
    return sorted({one.label for one in texts if isinstance(one.label, str)})


def _parsed(data: bytes, where: str) -> tuple[list[int], int]:
    """Parse the token ids and the class of a sample.

    Raises:
        UserError: The data is no such object.
    """
    value = json_object(data, where)
    ids, label = token_ids(value, "tokens", where), value.get("class")
    if type(label) is not int or not 0 <= label < MAX_CLASSES:
        raise UserError("the sample has no class under 'class'", where, "Make it with bigtrain data pack.")
    return ids, label
