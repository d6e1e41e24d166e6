"""A sample before it is packed: the files that it is read from, and the tar members that it becomes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bigtrain.data.formats.tar import read_at
from bigtrain.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Span:
    """A file, or a part of one."""

    path: Path
    size: int
    offset: int = 0

    @classmethod
    def whole(cls, path: Path) -> Span:
        """A full file, with its current size."""
        return cls(path, path.stat().st_size)

    def read(self) -> bytes:
        """The bytes of the span."""
        return read_at(self.path, self.offset, self.size)


@dataclass(frozen=True)
class Means:
    """The options and tools with which workers make members."""

    image_size: int | None = None
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class PackedMember:
    """One tar member of a sample."""

    suffix: str
    data: bytes
    text_bytes: int = 0
    """UTF-8 bytes of the text that the member encodes."""
    characters: int = 0


class Sample(Protocol):
    """A sample before it is packed."""

    @property
    def bytes(self) -> int:
        """Approximate size of the sample in a shard, in bytes."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the sample is read from. If one of them changes, the packing starts again."""
        ...

    def members(self, means: Means) -> list[PackedMember]:
        """The members of the sample, in their order.

        Raises:
            UserError: The sample is bad.
        """
        ...
