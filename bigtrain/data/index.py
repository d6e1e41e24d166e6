"""The index of a shard directory: index.json (a superset of wids-shard-index-v1) and one sidecar a shard.

A sidecar is an int64 .npy array with a row for each sample: (byte offset of the tokens in the tar, number of
tokens), or for images (byte offset, bytes, label). With it any sample is read without walking the tar.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.images import ImageInfo
from bigtrain.data.tokenizers import Tokenizer, TokenizerInfo
from bigtrain.storage import hash_file, write_atomic, write_json

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
AUTO_VERIFY_BYTES = 4 * 10**9
Kind = Literal["tokens", "images"]
Verify = Literal["auto", "always", "never"]
Rows = npt.NDArray[np.int64]

_COLUMNS = {"tokens": 2, "images": 3}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Shard(_Record):
    """One tar of a shard directory. The names of the first three fields are those of wids."""

    url: str
    """File name inside the directory."""
    nsamples: int = Field(ge=0)
    filesize: int = Field(ge=0)
    hash: str
    """Of the tar, as `storage.hash_file` writes it."""
    tokens: int = Field(ge=0)
    """Tokens of all its documents; 0 for images."""
    index: str
    """File name of its sidecar."""
    index_hash: str

    @field_validator("url", "index")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if value != Path(value).name or value in ("", ".", "..") or ":" in value or "\0" in value:
            raise ValueError(f"{value!r} is not a plain file name")
        return value

    @property
    def stem(self) -> str:
        """Its name in sample ids."""
        return self.url.removesuffix(".tar")


class ShardIndex(_Record):
    """What is known of a shard directory without opening its shards."""

    kind: Kind
    dtype: Literal["<u2", "<u4", "<i4", "<i8"] | None
    """Of the stored tokens; None for images."""
    tokenizer: TokenizerInfo | None
    image: ImageInfo | None
    text_bytes: int | None
    """UTF-8 bytes of the text that the tokens stand for, ends of text aside; None where not known."""
    shards: tuple[Shard, ...]
    fingerprint: str
    """SHA-256 over the shards' hashes, kind, type and tokenizer: the data, wherever it lies."""
    directory: Path = Field(exclude=True)

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, or number of classes."""
        if self.kind == "images":
            assert self.image is not None
            return self.image.classes
        assert self.tokenizer is not None
        return self.tokenizer.vocab_size

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def samples(self) -> int:
        """Documents, or images, of all shards."""
        return sum(shard.nsamples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.filesize for shard in self.shards)

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text that a token stands for, on average; None where not known."""
        return None if self.text_bytes is None or not self.tokens else self.text_bytes / self.tokens

    def sequence_counts(self, context: int) -> list[int]:
        """Sequences of `context` tokens in each shard (ceil((tokens - 1) / context)); images: samples."""
        if self.kind == "images":
            return [shard.nsamples for shard in self.shards]
        return [-(-max(0, shard.tokens - 1) // context) for shard in self.shards]

    def rows(self, shard: int) -> Rows:
        """A shard's sidecar, int64 (samples, 2) or, for images, (samples, 3).

        Raises:
            CorruptionError: The sidecar is damaged, or points outside its shard.
        """
        entry = self.shards[shard]
        path = self.directory / entry.index
        try:
            rows = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            raise UserError(f"{entry.index} is missing", where=str(self.directory), fix=REINDEX) from None
        except (ValueError, OSError, EOFError) as error:
            raise CorruptionError(f"the sidecar is damaged: {error}", where=str(path), fix=REINDEX) from None
        width = 1 if self.dtype is None else np.dtype(self.dtype).itemsize
        if (
            rows.dtype != np.dtype("<i8")
            or rows.shape != (entry.nsamples, _COLUMNS[self.kind])
            or (rows < 0).any()
            or (len(rows) and int((rows[:, 0] + rows[:, 1] * width).max()) > entry.filesize)
            or (self.kind == "tokens" and int(rows[:, 1].sum()) != entry.tokens)
            or (self.kind == "images" and len(rows) and int(rows[:, 2].max()) >= self.vocab_size)
        ):
            raise CorruptionError("the sidecar does not fit its shard", where=str(path), fix=REINDEX)
        return rows

    def check(self, verify: Verify = "auto", progress: Callable[[str], None] | None = None) -> None:
        """Compare the files with the index: their sizes, and where `verify` says so their hashes.

        Raises:
            UserError: A shard or sidecar is missing.
            CorruptionError: One has other bytes than when it was indexed.
        """
        hashed = verify == "always" or (verify == "auto" and self.bytes <= AUTO_VERIFY_BYTES)
        for shard in self.shards:
            for problem in self.problems(shard, hashed):
                raise problem
            if progress is not None:
                progress(shard.url)

    def problems(self, shard: Shard, hashed: bool) -> list[UserError]:
        """What is wrong with one shard's files; empty where all is well."""
        path, sidecar = self.directory / shard.url, self.directory / shard.index
        for file in (path, sidecar):
            if not file.is_file():
                fix = "put it back" if file == path else REINDEX
                return [UserError(f"{file.name} is missing", where=str(self.directory), fix=fix)]
        size = path.stat().st_size
        if size != shard.filesize:
            return [
                CorruptionError(f"{shard.url} has {size} bytes; indexed were {shard.filesize}", str(path), _CHANGED)
            ]
        if not hashed:
            return []
        return [
            CorruptionError(f"{file.name} has changed since it was indexed", str(file), _CHANGED)
            for file, recorded in ((path, shard.hash), (sidecar, shard.index_hash))
            if hash_file(file) != recorded
        ]

    def require_same_tokens(self, other: ShardIndex) -> None:
        """Refuse to evaluate on `other` where its tokens (or classes) do not mean what they mean here.

        Raises:
            UserError: Another kind of data, tokenizer, or image shape; more classes.
        """
        mine, theirs = self.tokenizer, other.tokenizer
        if self.kind != other.kind or (mine and theirs and mine.hash != theirs.hash):
            raise UserError(
                "the tokenizers of the training and validation shards differ"
                if self.kind == other.kind
                else f"the training data holds {self.kind}, the validation data {other.kind}",
                where=f"{self.directory} and {other.directory}",
                fix="pack both with one tokenizer",
            )
        if self.image and other.image:
            shapes = [(image.height, image.width, image.channels) for image in (self.image, other.image)]
            if shapes[0] != shapes[1] or other.image.classes > self.image.classes:
                raise UserError(
                    f"the validation images ({shapes[1]}, {other.image.classes} classes) are not like those of"
                    f" training ({shapes[0]}, {self.image.classes} classes)",
                    where=str(other.directory),
                )

    def as_json(self) -> dict[str, Any]:
        """The object that `data index --json` prints."""
        return {
            "path": str(self.directory),
            "kind": self.kind,
            "samples": self.samples,
            "tokens": self.tokens,
            "shards": len(self.shards),
            "bytes": self.bytes,
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
        }

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens.

        Raises:
            UserError: Images, or tokens made elsewhere.
        """
        if self.tokenizer is None:
            raise UserError("images have no tokenizer", where=str(self.directory))
        return Tokenizer.load(self.directory, self.tokenizer)


REINDEX = "run `bigtrain data index` on the directory"
_CHANGED = "restore the file; or, where the change is meant, run `bigtrain data index`: it becomes other data"


def write_sidecar(path: Path, rows: Rows) -> str:
    """Write a sidecar atomically and return its hash."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(rows, dtype="<i8"), allow_pickle=False)
    write_atomic(path, buffer.getvalue())
    return hash_file(path)


def write_index(
    directory: Path, kind: Kind, dtype: str | None, tokenizer: TokenizerInfo | None, image: ImageInfo | None,
    text_bytes: int | None, shards: list[Shard],
) -> ShardIndex:  # fmt: skip
    """Write index.json, atomically and last, and return what it says."""
    content = {
        "kind": kind,
        "dtype": dtype,
        "tokenizer": None if tokenizer is None else tokenizer.as_json(),
        "image": None if image is None else vars(image),
        "text_bytes": text_bytes,
        "fingerprint": fingerprint(kind, dtype, tokenizer, [shard.hash for shard in shards]),
    }
    shardlist = [shard.model_dump() for shard in shards]
    header = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "format_version": FORMAT_VERSION}
    write_json(directory / INDEX_NAME, {**header, **content, "shardlist": shardlist})
    return load_index(directory)


def fingerprint(kind: str, dtype: str | None, tokenizer: TokenizerInfo | None, hashes: list[str]) -> str:
    """Identifies the data: other bytes, shard order or tokenizer give another one; names do not."""
    value = [kind, dtype, None if tokenizer is None else tokenizer.hash, hashes]
    return "sha256:" + hashlib.sha256(json.dumps(value).encode()).hexdigest()


def load_index(directory: str | Path) -> ShardIndex:
    """Read a shard directory's index.json.

    Raises:
        UserError: No such directory, no index in it, or one of a newer format.
        CorruptionError: index.json is damaged.
    """
    root = Path(directory)
    path = root / INDEX_NAME
    if not root.is_dir():
        raise UserError(f"no data at {str(directory)!r}", fix="make it with `bigtrain data pack`, or mend the path")
    if not path.is_file():
        raise UserError(f"the directory holds no {INDEX_NAME}", where=str(directory), fix=_how_to_index(root))
    try:
        value: Any = json.loads(path.read_bytes())
        version = value["format_version"]
        if not isinstance(version, int) or version < 1:
            raise ValueError(f"format_version is {version!r}")
        if version > FORMAT_VERSION:
            raise UserError(
                f"the index has format {version}; this bigtrain reads up to {FORMAT_VERSION}",
                where=str(path),
                fix="use a newer bigtrain",
            )
        shards = tuple(Shard.model_validate(entry) for entry in value["shardlist"])
        parts = {name: value[name] for name in ("kind", "dtype", "tokenizer", "image", "fingerprint")}
        parts["text_bytes"] = value.get("text_bytes")
        for name, build in (("tokenizer", TokenizerInfo), ("image", ImageInfo)):
            parts[name] = None if parts[name] is None else build(**parts[name])
        index = ShardIndex(shards=shards, directory=root.resolve(), **parts)
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
        raise CorruptionError(f"the index is damaged: {error}", where=str(path), fix=REINDEX) from None
    complete = (index.dtype and index.tokenizer) if index.kind == "tokens" else index.image
    expected = fingerprint(index.kind, index.dtype, index.tokenizer, [shard.hash for shard in shards])
    if not complete or expected != index.fingerprint:
        raise CorruptionError("the index contradicts itself", where=str(path), fix=REINDEX)
    return index


def _how_to_index(root: Path) -> str:
    for name in ("train", "validation"):
        if (root / name / INDEX_NAME).is_file():
            return f"name {root / 'train'}"
    if any(root.glob("*.tar")):
        return f"run `bigtrain data index {root}`"
    return "make shards with `bigtrain data pack`"
