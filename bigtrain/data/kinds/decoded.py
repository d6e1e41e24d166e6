"""Arrays in formats with a decoder (`data.decoding`): WebDataset's `KEY.ten` and `KEY.mp`, or a plugin's format.

A row of the sidecar holds byte offset and bytes of each decoded member, in the order of the suffixes, and the class.
Samples are decoded on reading, and give the same batches as those of the kind `arrays`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.decoding import DECODERS, decode, decoder_of
from bigtrain.data.formats.arrays import LABELS, MAX_ARRAY_BYTES, ArrayInfo
from bigtrain.data.formats.images import MAX_LABEL_BYTES, decode_label
from bigtrain.data.formats.tar import Member, TarSample
from bigtrain.data.index import REINDEX, ShardIndex
from bigtrain.data.kind import Scanner
from bigtrain.data.kinds.arrays import ArrayReader, ArraySamples
from bigtrain.data.packing.options import PackOptions
from bigtrain.data.packing.sample import Sample
from bigtrain.data.reading import Reader, read_bytes
from bigtrain.data.scanning import Scan
from bigtrain.data.shard import Shard
from bigtrain.data.sidecar import Rows, spans_fit
from bigtrain.data.streaming.store import ShardStore
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.models.batches import KINDS, Arrays

MEMBERS = "members"
"""Key in `facts` with the sorted suffixes of the decoded members."""


@KINDS.register
class DecodedArrays(ArraySamples):
    """Named arrays from members that a decoder reads."""

    name = "decoded"
    gives = "arrays"
    layout = "KEY.ten, KEY.mp, or what a plugin decodes; KEY.cls"

    def columns(self, index: ShardIndex) -> int:
        """See the module's docstring."""
        return 2 * len(_suffixes(index)) + (index.classes is not None)

    def is_complete(self, index: ShardIndex) -> bool:
        """See `SampleKind`."""
        named = (index.facts or {}).get(MEMBERS)
        return bool(index.arrays) and isinstance(named, list) and all(isinstance(one, str) for one in named)

    def rows_fit(self, index: ShardIndex, shard: Shard, rows: Rows) -> bool:
        """See `SampleKind`."""
        count = len(_suffixes(index))
        inside = all(spans_fit(rows[:, 2 * n], rows[:, 2 * n + 1], shard.filesize) for n in range(count))
        small = bool((rows[:, 1 : 2 * count : 2] <= MAX_ARRAY_BYTES).all())
        return inside and small and (index.classes is None or int(rows[:, -1].max()) < index.classes)

    def recognises(self, sample: TarSample) -> bool:
        """Whether a member has a suffix with a decoder."""
        return any(decoder_of(suffix) for suffix in sample.suffixes)

    def scanner(self, first: TarSample, tokenizer: Tokenizer | None) -> Scanner:
        """See `SampleKind`."""
        return _DecodedScanner()

    def find(self, inputs: Sequence[str | Path], options: PackOptions) -> Sequence[Sample]:
        """Refuse packing: such tars are indexed without packing."""
        raise UserError("decoded members are not packed", fix="Index their tars: bigtrain data index DIR")

    def open_reader(
        self, index: ShardIndex, context: int, document_mask: bool, open_shards: int, store: ShardStore
    ) -> Reader:
        """See `SampleKind`."""
        missing = [suffix for suffix in _suffixes(index) if decoder_of(suffix) is None]
        if missing:
            known = ", ".join(DECODERS.names())
            raise UserError(
                f"no decoder is known for the members .{', .'.join(missing)}",
                index.place,
                f"Name the file that defines one with --plugin. Known suffixes: {known}.",
            )
        return DecodedReader(index, open_shards, store)


class DecodedReader(ArrayReader):
    """Reads and decodes arrays by name, and classes if there are any."""

    def fill(self, arrays: Arrays, place: int, descriptor: int, row: list[int], where: str) -> None:
        """See `SampleReader`."""
        found: Arrays = {}
        for number, suffix in enumerate(_suffixes(self._index)):
            data = read_bytes(descriptor, row[2 * number], row[2 * number + 1], where)
            found |= decode(suffix, data, where)
        for info in self._index.arrays or ():
            values = found.get(info.name)
            if values is None or (values.dtype.str, values.shape) != (info.dtype, info.shape):
                raise CorruptionError(f"the index lists {info}, which the sample does not hold", where, REINDEX)
            arrays[info.name][place] = values
        if self._index.classes is not None:
            arrays[LABELS][place] = row[-1]


class _DecodedScanner(Scanner):
    noun = "member"

    def __init__(self) -> None:
        self._first: tuple[tuple[str, ...], tuple[ArrayInfo, ...], bool] | None = None
        self._classes = 0

    def add(self, sample: TarSample) -> tuple[int, ...]:
        members = sorted((one for one in sample.members if decoder_of(one.suffix)), key=lambda one: one.suffix)
        if not members:
            raise UserError("the sample has no member that a decoder reads", sample.where)
        found = self._decoded(sample, members)
        infos = tuple(ArrayInfo(name, found[name].dtype.str, found[name].shape) for name in sorted(found))
        label = []
        if "cls" in sample.suffixes:
            label = [decode_label(sample.read(sample.one("cls"), MAX_LABEL_BYTES), "cls", sample.where)]
        held = tuple(member.suffix for member in members), infos, bool(label)
        if self._first not in (None, held):
            assert self._first is not None
            raise UserError(
                f"the sample holds {', '.join(map(str, infos))}, but the first holds "
                f"{', '.join(map(str, self._first[1]))}",
                where=sample.where,
                fix="Store arrays of one set of names, types and shapes in a directory.",
            )
        self._first = held
        self._classes = max([self._classes, *(number + 1 for number in label)])
        return (*(number for member in members for number in (member.offset, member.size)), *label)

    @staticmethod
    def _decoded(sample: TarSample, members: list[Member]) -> Arrays:
        found: Arrays = {}
        for member in members:
            arrays = decode(member.suffix, sample.read(member, MAX_ARRAY_BYTES), sample.where)
            twice = sorted(found.keys() & arrays.keys())
            if twice:
                raise UserError(f"two members hold an array with the name {twice[0]!r}", sample.where)
            found |= arrays
        return found

    def result(self, rows: Rows) -> Scan:
        assert self._first is not None
        suffixes, infos, labelled = self._first
        classes = self._classes if labelled else None
        return Scan("decoded", rows, arrays=infos, classes=classes, facts={MEMBERS: list(suffixes)})


def _suffixes(index: ShardIndex) -> list[str]:
    found: list[str] = (index.facts or {})[MEMBERS]
    return found
