"""The base class of sample kinds. A kind is one class in one file, `kinds/NAME.py` or a user's `--plugin FILE`.

A registered subclass of `SampleKind` defines how samples are recognised in a tar and indexed (`scanner`), read and
batched (`open_reader`), packed (`find`) and checked against a model (`check_model`). A kind whose samples are
independent of each other, such as images or sounds, needs little more than a scanner, a reader and an example batch:

    @KINDS.register
    class Sounds(SampleKind):
        name = "sounds"

configs/plugin/sounds.py is a complete example.
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
    """Scans the samples of one tar, one after another."""

    noun: ClassVar[str] = "sample"
    """Word for a sample in error messages."""

    @abstractmethod
    def add(self, sample: TarSample) -> tuple[int, ...] | None:
        """The sample's row in the sidecar; None if the sample is empty, so that it is skipped.

        Raises:
            UserError: The sample is bad. The result must not depend on such a sample.
        """

    @abstractmethod
    def result(self, rows: Rows) -> Scan:
        """The scan of the full tar.

        Args:
            rows: Rows of all samples that were not skipped, int64 of shape (samples, columns); at least one row.
        """


class SampleKind(BatchKind):
    """Base class of sample kinds: how samples of a kind are stored, found and read."""

    layout: ClassVar[str] = ""
    """The members of a sample, for error messages: "KEY.png + KEY.cls"."""

    gives: ClassVar[str | None] = None
    """The kind whose batches this kind yields, so that models of that kind accept it; None: its own kind."""

    options: ClassVar[frozenset[str]] = frozenset()
    """The packing options that this kind accepts, among those that not all kinds accept."""

    texts: ClassVar[int] = 1
    """Number of token sequences in a sample of a batch: 2 for pairs."""

    needs_tokenizer: ClassVar[bool] = False
    """Whether packing needs a tokenizer."""

    # Properties of an index of this kind.

    @abstractmethod
    def columns(self, index: ShardIndex) -> int:
        """Number of columns of a sidecar, which has one row per sample."""

    def rows_fit(self, index: ShardIndex, shard: Shard, rows: Rows) -> bool:
        """Whether the rows of a sidecar point inside their shard. The rows are untrusted, but not negative."""
        return True

    def is_complete(self, index: ShardIndex) -> bool:
        """Whether an untrusted index holds all fields that the kind needs."""
        return True

    def outputs(self, index: ShardIndex) -> int:
        """Size of the vocabulary, or number of classes; 0 if there is neither."""
        return index.classes or 0

    def sequence_counts(self, index: ShardIndex, context: int) -> list[int]:
        """Number of sequences in each shard that steps can consume; by default, one per sample."""
        return [shard.nsamples for shard in index.shards]

    def packed_counts(self, index: ShardIndex, context: int) -> list[int]:
        """Number of sequences in each shard with `data.document_mask`; differs only if samples share sequences."""
        return self.sequence_counts(index, context)

    def lengths(self, rows: Rows) -> dict[str, int] | None:
        """Number of samples of each length in a sidecar; None for kinds whose sequences do not depend on it."""
        return None

    def token_column(self, text: bool) -> int | None:
        """The column of a sidecar that holds the number of tokens of a sample; None for kinds without tokens.

        Args:
            text: Whether the shards hold text, which is tokenised on reading.
        """
        return None

    def class_column(self, index: ShardIndex) -> int | None:
        """The column of a sidecar that holds the class of a sample; None for samples without classes."""
        return None

    def filled(self, index: ShardIndex, context: int) -> int:
        """Number of positions of all sequences that hold a token of a sample; the other positions are padding."""
        return 0

    def cut(self, index: ShardIndex, context: int) -> int:
        """Number of samples that are longer than the context and lose their end."""
        return 0

    def image_shape(self, index: ShardIndex) -> tuple[int, int, int] | None:
        """Height, width and channels of the uint8 array `images` of a batch.

        None for kinds without images, for which `data.augment` is refused.
        """
        image = index.image
        return None if image is None else (image.height, image.width, image.channels)

    def describe(self, index: ShardIndex) -> str | None:
        """A text that describes the sizes of a sample; None if there is nothing to describe."""
        return None

    def preview(self, index: ShardIndex, lines: int) -> list[str]:
        """The first lines of text; empty for kinds without text."""
        return []

    def require_same(self, index: ShardIndex, other: ShardIndex) -> None:
        """Refuse to use `other` together with `index` if their samples do not have the same meaning.

        Raises:
            UserError: The samples of both differ.
        """
        if index.facts != other.facts or (other.classes or 0) > (index.classes or 0):
            raise UserError(
                f"the samples ({self.describe(other) or other.facts}) differ from the others "
                f"({self.describe(index) or index.facts})",
                where=f"{other.place} and {index.place}",
                fix="Make the samples of both directories in the same way.",
            )

    def check_model(self, index: ShardIndex, config: ModelConfig) -> None:
        """Refuse a model that cannot take these samples.

        Raises:
            UserError: The model does not take samples of this size or content.
        """

    # Tars.

    @abstractmethod
    def recognises(self, sample: TarSample) -> bool:
        """Whether a tar that begins with this sample holds samples of this kind."""

    @abstractmethod
    def scanner(self, first: TarSample, tokenizer: Tokenizer | None) -> Scanner:
        """A scanner for the samples of one tar.

        Args:
            first: The first sample of the tar.
            tokenizer: Tokenises text, to count and hash its tokens.

        Raises:
            UserError: The kind needs a tokenizer, and there is none.
        """

    def common(self, scan: Scan) -> tuple[object, ...]:
        """The properties that must be equal for all tars of a directory."""
        return scan.kind, scan.dtype, scan.text_bytes is None, scan.arrays, scan.classes is None, scan.facts

    def common_image(self, scans: Sequence[tuple[Path, Scan]]) -> ImageInfo | None:
        """The shape that the images of all tars have; None for kinds without images.

        Raises:
            UserError: The images of a tar have another size.
        """
        return None

    def named(self, scan: Scan) -> str:
        """A description of what a tar holds, for the error about a tar that differs."""
        return scan.kind if scan.dtype is None else f"{scan.kind} of type {scan.dtype}"

    # Packing.

    def find(self, inputs: Sequence[str | Path], options: PackOptions) -> Sequence[Sample]:
        """Find the samples in some inputs.

        Raises:
            UserError: The inputs hold no samples, or the kind does not read such inputs.
        """
        raise UserError(f"samples of the kind '{self.name}' are not packed", fix="Index tars: bigtrain data index")

    def notes(self, inputs: Sequence[str | Path], samples: Sequence[Sample]) -> dict[str, Any]:
        """JSON files to write beside the index of each split, by file name.

        Args:
            samples: The samples that `find` found in the inputs.
        """
        return {}

    def pack(self, inputs: Sequence[str | Path], out: str | Path, options: PackOptions) -> PackSummary:
        """Pack samples into OUT/train, and into OUT/validation if some are held out.

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
        """A reader that turns positions in the data into arrays.

        Args:
            context: Tokens per sequence or caption; unused for kinds without tokens.
            document_mask: Whether batches of text hold the arrays `documents` and `positions`.
            open_shards: Maximum number of shards that are open at the same time.
            store: The store that provides the shards.
        """


@cache
def _made(kind: type[BatchKind]) -> BatchKind:
    return kind()


def kind_named(name: str) -> SampleKind:
    """The sample kind with a given name.

    Raises:
        UserError: There is no such kind.
    """
    if name not in KINDS:
        raise UserError(
            f"no sample kind is called '{name}'",
            fix=f"Name the file that defines it with --plugin. Known kinds: {', '.join(KINDS.names())}.",
        )
    return cast(SampleKind, _made(KINDS[name]))
