"""The entry of one tar in an index."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="ignore", strict=True))
class Shard:
    """One tar of a shard directory. The names of the first three fields are those of wids.

    The class has slots, because the index of a million shards holds a million instances.
    """

    url: str
    """File name inside the directory."""
    nsamples: int = Field(ge=0)
    filesize: int = Field(ge=0)
    hash: str
    """Hash of the tar, as `storage.hash_file` computes it."""
    tokens: int = Field(ge=0)
    """Number of tokens in all documents or captions of the tar; 0 for images and arrays."""
    index: str
    """File name of the sidecar."""
    index_hash: str
    tokens_hash: str | None = None
    """Hash of the tokens that text or captions become on reading; None for stored tokens, images and arrays."""
    lengths: dict[str, Annotated[int, Field(ge=1)]] | None = None
    """Number of samples of each length, for kinds that put several samples into a sequence; else None."""

    @field_validator("url", "index")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if value != Path(value).name or value in ("", ".", "..") or value[0] == "." or ":" in value or "\0" in value:
            raise ValueError(f"{value!r} is not a plain file name")
        return value

    def as_json(self) -> dict[str, Any]:
        """The shard's entry in index.json."""
        named = {field: getattr(self, field) for field in self.__slots__}
        return {field: value for field, value in named.items() if value is not None}

    @field_validator("lengths")
    @classmethod
    def _whole_lengths(cls, value: dict[str, int] | None) -> dict[str, int] | None:
        if any(not length.isdecimal() or length != str(int(length)) for length in value or ()):
            raise ValueError("a length is not a whole number")
        return value

    @property
    def stem(self) -> str:
        """The shard's name in sample ids."""
        return self.url.removesuffix(".tar")
