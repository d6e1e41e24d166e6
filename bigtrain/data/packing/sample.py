"""One sample before it is packed: where it is read from, and the members that it becomes."""

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
        """A file as it is now."""
        return cls(path, path.stat().st_size)

    def read(self) -> bytes:
        """Its bytes."""
        return read_at(self.path, self.offset, self.size)


@dataclass(frozen=True)
class Means:
    """What workers make members with."""

    image_size: int | None = None
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class PackedMember:
    """One file of a sample."""

    suffix: str
    data: bytes
    text_bytes: int = 0
    """UTF-8 bytes of the text that it stands for."""
    characters: int = 0


class Sample(Protocol):
    """One sample, before it is packed."""

    @property
    def bytes(self) -> int:
        """Its size in a shard, about."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """What it is read from: another sample where one of them has changed."""
        ...

    def members(self, means: Means) -> list[PackedMember]:
        """Its members in their order.

        Raises:
            UserError: It is bad.
        """
        ...
