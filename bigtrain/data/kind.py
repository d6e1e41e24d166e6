"""What a sample kind is: one class in one file, `kinds/NAME.py` or a user's `--plugin FILE`.

A class that inherits `SampleKind` and is registered says how samples are recognised in a tar and indexed (`scanner`),
read and batched (`open_reader`), packed (`find`) and checked against a model (`check_model`). A kind whose samples
stand alone, such as images or sounds, needs little more than a scanner, a reader and an example batch:

    @KINDS.register
    class Sounds(SampleKind):
        name = "sounds"

configs/plugin/sounds.py is a complete one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from bigtrain.config import UserError
from bigtrain.data.sidecar import Rows
from bigtrain.models.batches import KINDS, BatchKind

if TYPE_CHECKING:
    from bigtrain.data.formats.images import ImageInfo
    from bigtrain.data.formats.tar import TarSample
    from bigtrain.data.index import ShardIndex
    from bigtrain.data.packing.options import PackOptions
    from bigtrain.data.packing.sample import Sample
    from bigtrain.data.packing.summary import PackSummary
    from bigtrain.data.reading import Reader
    from bigtrain.data.scanning import Scan
    from bigtrain.data.shard import Shard
    from bigtrain.data.streaming.store import ShardStore
    from bigtrain.data.tokenizers import Tokenizer
    from bigtrain.models.config import ModelConfig


class Scanner(ABC):
    """Looks at the samples of one tar, one after another."""

    noun: ClassVar[str] = "sample"
    """What a sample is called in errors."""

    @abstractmethod
    def add(self, sample: TarSample) -> tuple[int, ...] | None:
        """The sample's row of the sidecar; None: it is empty, and skipped.

        Raises:
            UserError: The sample is bad; it leaves no trace in the result.
        """

    @abstractmethod
    def result(self, rows: Rows) -> Scan:
        """What the whole tar holds: `rows` are those of all samples that were not skipped, at least one."""


class SampleKind(BatchKind):
    """How samples of a kind are stored, found and read."""

    layout: ClassVar[str] = ""
    """The members of a sample, for messages: "KEY.png + KEY.cls"."""

    gives: ClassVar[str | None] = None
    """The kind whose batches it gives, so that models of that kind take it; None: its own."""

    options: ClassVar[frozenset[str]] = frozenset()
    """The options of packing that the kind takes, of those that not all kinds take."""

    needs_tokenizer: ClassVar[bool] = False
    """Whether packing needs a tokenizer."""

    # What an index says of the kind.

    @abstractmethod
    def columns(self, index: ShardIndex) -> int:
        """Columns of a sidecar, whose row is a sample's."""

    def rows_fit(self, index: ShardIndex, shard: Shard, rows: Rows) -> bool:
        """Whether a sidecar of numbers that are not negative, which may come from anywhere, points into its shard."""
        return True

    def is_complete(self, index: ShardIndex) -> bool:
        """Whether an index, which may come from anywhere, holds all that the kind needs of it."""
        return True

    def outputs(self, index: ShardIndex) -> int:
        """Entries of the vocabulary, or number of classes; 0 where there are none."""
        return index.classes or 0

    def sequence_counts(self, index: ShardIndex, context: int) -> list[int]:
        """What a step can consume of each shard: its samples."""
        return [shard.nsamples for shard in index.shards]

    def packed_counts(self, index: ShardIndex, context: int) -> list[int]:
        """Sequences of each shard where `data.document_mask` is on: as many as without, unless samples share one."""
        return self.sequence_counts(index, context)

    def lengths(self, rows: Rows) -> dict[str, int] | None:
        """How many samples of a sidecar have each length, for kinds whose sequences depend on it."""
        return None

    def token_column(self, text: bool) -> int | None:
        """The column of a sidecar that counts a sample's tokens; None where samples have none."""
        return None

    def targets(self, index: ShardIndex, context: int) -> int:
        """Tokens of all sequences that a loss counts; 0 for kinds without tokens."""
        return 0

    def cut(self, index: ShardIndex, context: int) -> int:
        """Samples that lose their end at this context."""
        return 0

    def image_shape(self, index: ShardIndex) -> tuple[int, int, int] | None:
        """Height, width and channels of the array `images` of a batch, uint8; None for kinds without, which
        `data.augment` does not take."""
        image = index.image
        return None if image is None else (image.height, image.width, image.channels)

    def describe(self, index: ShardIndex) -> str | None:
        """Sizes of a sample, in words."""
        return None

    def preview(self, index: ShardIndex, lines: int) -> list[str]:
        """The first lines of text, where there is some."""
        return []

    def require_same(self, index: ShardIndex, other: ShardIndex) -> None:
        """Refuse to use `other` with `index` where a sample does not mean the same.

        Raises:
            UserError: Names what differs.
        """
        if index.facts != other.facts or (other.classes or 0) > (index.classes or 0):
            raise UserError(
                f"the samples ({self.describe(other) or other.facts}) are not like the others "
                f"({self.describe(index) or index.facts})",
                where=f"{other.place} and {index.place}",
                fix="make both in the same way",
            )

    def check_model(self, index: ShardIndex, config: ModelConfig) -> None:
        """Refuse a model that cannot take these samples.

        Raises:
            UserError: Names the sizes of both.
        """

    # Tars.

    @abstractmethod
    def recognises(self, sample: TarSample) -> bool:
        """Whether a tar whose first sample this is holds samples of the kind."""

    @abstractmethod
    def scanner(self, first: TarSample, tokenizer: Tokenizer | None) -> Scanner:
        """What looks at the samples of one tar.

        Raises:
            UserError: A tokenizer is missing.
        """

    def common(self, scan: Scan) -> tuple[object, ...]:
        """What all tars of a directory must have alike."""
        return scan.kind, scan.dtype, scan.text_bytes is None, scan.arrays, scan.classes is None, scan.facts

    def common_image(self, scans: Sequence[tuple[Path, Scan]]) -> ImageInfo | None:
        """The one shape of the images of several tars; None for kinds without.

        Raises:
            UserError: One has another size.
        """
        return None

    def named(self, scan: Scan) -> str:
        """What a tar holds, for an error about one that differs."""
        return scan.kind if scan.dtype is None else f"{scan.kind} of type {scan.dtype}"

    # Packing.

    def find(self, inputs: Sequence[str | Path], options: PackOptions) -> Sequence[Sample]:
        """The samples that some inputs hold.

        Raises:
            UserError: There are none, or inputs that the kind does not read.
        """
        raise UserError(f"samples of the kind '{self.name}' are not packed", fix="index tars: bigtrain data index")

    def notes(self, inputs: Sequence[str | Path], samples: Sequence[Sample]) -> dict[str, Any]:
        """JSON files to write beside the index of each split, by their names; `samples` are those of `inputs`."""
        return {}

    def pack(self, inputs: Sequence[str | Path], out: str | Path, options: PackOptions) -> PackSummary:
        """Pack samples into OUT/train, and OUT/validation where some are held out.

        Raises:
            UserError: See `find` and `packing.samples.pack_samples`.
        """
        from bigtrain.data.packing.samples import pack_samples

        samples = self.find(inputs, options)
        return pack_samples(self.name, samples, out, options, self.notes(inputs, samples))

    # Reading.

    @abstractmethod
    def open_reader(
        self, index: ShardIndex, context: int, document_mask: bool, open_shards: int, store: ShardStore
    ) -> Reader:
        """What turns places in the data into arrays.

        Args:
            context: Tokens of a sequence or caption; unused for kinds without tokens.
            document_mask: Also yield `documents` and `positions`, of text.
            open_shards: Shards kept open at once.
            store: Where the shards come from.
        """


@cache
def _made(kind: type[BatchKind]) -> BatchKind:
    return kind()


def kind_named(name: str) -> SampleKind:
    """The sample kind of a name.

    Raises:
        UserError: There is none.
    """
    if name not in KINDS:
        raise UserError(
            f"no sample kind is called '{name}'",
            fix=f"name the file that defines it with --plugin; known are {', '.join(KINDS.names())}",
        )
    return cast(SampleKind, _made(KINDS[name]))
