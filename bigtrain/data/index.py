"""The index of a shard directory: index.json (a superset of wids-shard-index-v1) and one sidecar a shard.

A sidecar is an int64 .npy array with a row for each sample. With it any sample is read without walking the tar:

    tokens      byte offset in the tar, tokens
    text        byte offset, bytes, tokens, 1 where the member is gzip
    images      byte offset, bytes, class
    captions    byte offset and bytes of the image; byte offset, bytes, tokens and `CaptionForm` of the caption
    arrays      byte offset of each array's values, in the order of their names; the class where there are classes

The shards lie beside index.json, on this machine or on the server that it came from; or, where it names a `base_url`,
on a server while the index is here.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.formats.arrays import ArrayInfo
from bigtrain.data.formats.images import ImageInfo
from bigtrain.data.formats.text import MAX_CAPTION_BYTES
from bigtrain.data.tokenizers import Tokenizer, TokenizerInfo
from bigtrain.storage import hash_file, hash_text, write_atomic, write_json
from bigtrain.storage.scheme import check_url

FORMAT_VERSION = 3
"""Written for captions and arrays; for shards of text or with a `base_url` 2 is enough, for others 1."""
MAX_INDEX_BYTES = 1 << 31
INDEX_NAME = "index.json"
AUTO_VERIFY_BYTES = 4 * 10**9
Kind = Literal["tokens", "images", "captions", "arrays"]
Verify = Literal["auto", "always", "never"]
Rows = npt.NDArray[np.int64]

_COLUMNS = {"tokens": 2, "images": 3, "text": 4, "captions": 6}
_TOKEN_COLUMNS = {"tokens": 1, "text": 2, "captions": 4}
_SIDECAR_HEADER_BYTES = 128


class CaptionForm(IntEnum):
    """How a caption is stored."""

    TEXT = 0
    GZIP = 1
    TOKENS = 2
    """Little-endian, of the index's `dtype`."""


def token_column(kind: Kind, text: bool) -> int | None:
    """The column of a sidecar that counts a sample's tokens; None for what has none."""
    return _TOKEN_COLUMNS.get("text" if text else kind)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="ignore", strict=True))
class Shard:
    """One tar of a shard directory. The names of the first three fields are those of wids.

    With slots, since an index of a million shards holds a million of these.
    """

    url: str
    """File name inside the directory."""
    nsamples: int = Field(ge=0)
    filesize: int = Field(ge=0)
    hash: str
    """Of the tar, as `storage.hash_file` writes it."""
    tokens: int = Field(ge=0)
    """Tokens of all its documents or captions; 0 for images and arrays."""
    index: str
    """File name of its sidecar."""
    index_hash: str
    tokens_hash: str | None = None
    """Of the tokens that a shard of text, or its captions, become; None for stored tokens, images and arrays."""

    @field_validator("url", "index")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if value != Path(value).name or value in ("", ".", "..") or value[0] == "." or ":" in value or "\0" in value:
            raise ValueError(f"{value!r} is not a plain file name")
        return value

    def as_json(self) -> dict[str, Any]:
        """Its entry in index.json."""
        named = {field: getattr(self, field) for field in self.__slots__}
        return {field: value for field, value in named.items() if value is not None}

    @property
    def stem(self) -> str:
        """Its name in sample ids."""
        return self.url.removesuffix(".tar")


class ShardIndex(_Record):
    """What is known of a shard directory without opening its shards."""

    kind: Kind
    dtype: Literal["<u2", "<u4", "<i4", "<i8"] | None
    """Of the tokens; None for images and arrays."""
    tokenizer: TokenizerInfo | None
    image: ImageInfo | None
    text_bytes: int | None
    """UTF-8 bytes of the text that the tokens stand for, ends of text aside; None where not known."""
    shards: tuple[Shard, ...]
    fingerprint: str
    """SHA-256 over the shards' hashes, kind, type and tokenizer: the data, wherever it lies."""
    directory: Path = Field(exclude=True)
    """Where index.json lies on this machine."""
    text: bool = False
    """Whether the shards hold text, which is tokenised when a shard is opened."""
    base_url: str | None = None
    """Where the shards are, if not beside the index."""
    arrays: tuple[ArrayInfo, ...] | None = None
    """What each sample holds by name; None for other kinds."""
    classes: Annotated[int, Field(ge=1)] | None = None
    """One more than the largest class beside arrays; None where there are none."""
    origin: str | None = Field(default=None, exclude=True)
    """The URL that the index came from; None where it is this machine's own."""

    @property
    def place(self) -> str:
        """Where it is, for people and for the cache."""
        return self.origin or str(self.directory)

    @property
    def shards_url(self) -> str | None:
        """Where the shards are fetched from; None where they lie beside the index."""
        return self.origin or self.base_url

    @property
    def streams(self) -> bool:
        """Whether shards go through the cache: they are fetched, or made into tokens."""
        return self.shards_url is not None or self.text

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, or number of classes, 0 where there are none."""
        if self.kind == "images":
            assert self.image is not None
            return self.image.classes
        if self.kind == "arrays":
            return self.classes or 0
        assert self.tokenizer is not None
        return self.tokenizer.vocab_size

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def samples(self) -> int:
        """Documents, images with or without captions, or samples of arrays, of all shards."""
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
        """Sequences of `context` tokens in each shard (ceil((tokens - 1) / context)); of other kinds: samples."""
        if self.kind != "tokens":
            return [shard.nsamples for shard in self.shards]
        return [-(-max(0, shard.tokens - 1) // context) for shard in self.shards]

    @property
    def columns(self) -> int:
        """Columns of a sidecar."""
        if self.arrays is not None:
            return len(self.arrays) + (self.classes is not None)
        return _COLUMNS["text" if self.text else self.kind]

    def sidecar_bytes(self, shard: int) -> int:
        """Size of a shard's sidecar."""
        return _SIDECAR_HEADER_BYTES + 8 * self.columns * self.shards[shard].nsamples

    def stored_bytes(self, shard: int) -> int:
        """Bytes that a shard and its sidecar take in the cache while it is in use, at most."""
        entry = self.shards[shard]
        made = entry.tokens * np.dtype(self.dtype).itemsize if self.text else 0
        return entry.filesize + self.sidecar_bytes(shard) + made

    def rows(self, shard: int, path: Path | None = None) -> Rows:
        """A shard's sidecar, int64 (samples, columns).

        Args:
            path: Where it is, if not beside the index.

        Raises:
            CorruptionError: The sidecar is damaged, or points outside its shard.
        """
        entry = self.shards[shard]
        path = path or self.directory / entry.index
        try:
            rows = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            raise UserError(f"{entry.index} is missing", where=str(self.directory), fix=REINDEX) from None
        except (ValueError, OSError, EOFError) as error:
            raise CorruptionError(f"the sidecar is damaged: {error}", where=str(path), fix=REINDEX) from None
        if (
            rows.dtype != np.dtype("<i8")
            or rows.shape != (entry.nsamples, self.columns)
            or (rows < 0).any()
            or not self._rows_fit(entry, rows)
        ):
            raise CorruptionError("the sidecar does not fit its shard", where=str(path), fix=REINDEX)
        return rows

    def token_counts(self, rows: Rows) -> Rows:
        """Tokens of each document or caption of a sidecar."""
        column = token_column(self.kind, self.text)
        assert column is not None
        return rows[:, column]

    @property
    def of_tokens(self) -> bool:
        """Whether a sample is `model.context` tokens, with or without an image."""
        return self.kind in ("tokens", "captions")

    @property
    def captions_are_text(self) -> bool:
        """Whether captions are tokenised when they are read."""
        return self.kind == "captions" and any(shard.tokens_hash for shard in self.shards)

    def _rows_fit(self, entry: Shard, rows: Rows) -> bool:
        if not len(rows):
            return True
        if self.arrays is not None:
            inside = all(
                _inside(rows[:, column], np.asarray(info.bytes), entry.filesize)
                for column, info in enumerate(self.arrays)
            )
            return inside and (self.classes is None or int(rows[:, -1].max()) < self.classes)
        stored_tokens = self.kind == "tokens" and not self.text
        width = np.dtype(self.dtype).itemsize if stored_tokens else 1
        if not _inside(rows[:, 0], rows[:, 1], entry.filesize, width):
            return False
        if self.kind == "images":
            return int(rows[:, 2].max()) < self.vocab_size
        if self.kind == "captions" and not self._captions_fit(entry, rows):
            return False
        counts = self.token_counts(rows)
        return bool((counts <= entry.tokens).all()) and int(counts.sum()) == entry.tokens

    def _captions_fit(self, entry: Shard, rows: Rows) -> bool:
        stored = rows[:, 5] == CaptionForm.TOKENS
        width = np.dtype(self.dtype).itemsize
        return bool(
            _inside(rows[:, 2], rows[:, 3], entry.filesize)
            and int(rows[:, 5].max()) <= max(CaptionForm)
            and (rows[:, 3] <= MAX_CAPTION_BYTES).all()
            and (rows[stored, 3] == rows[stored, 4] * width).all()
        )

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
        files = {self.directory / shard.index: shard.index_hash}
        path = self.directory / shard.url
        if self.shards_url is None:
            files = {path: shard.hash, **files}
        for file in files:
            if not file.is_file():
                fix = "put it back" if file == path else REINDEX
                return [UserError(f"{file.name} is missing", where=str(self.directory), fix=fix)]
        if path in files and (size := path.stat().st_size) != shard.filesize:
            return [
                CorruptionError(f"{shard.url} has {size} bytes; indexed were {shard.filesize}", str(path), _CHANGED)
            ]
        if not hashed:
            return []
        return [
            CorruptionError(f"{file.name} has changed since it was indexed", str(file), _CHANGED)
            for file, recorded in files.items()
            if hash_file(file) != recorded
        ]

    def require_same_tokens(self, other: ShardIndex) -> None:
        """Refuse to use `other` with this where its tokens (or classes) do not mean what they mean here.

        Raises:
            UserError: Another kind of data, tokenizer, or image shape; more classes.
        """
        mine, theirs = self.tokenizer, other.tokenizer
        if self.kind != other.kind or (mine and theirs and mine.hash != theirs.hash):
            raise UserError(
                "the tokenizers of the shards differ"
                if self.kind == other.kind
                else f"one directory holds {self.kind}, the other {other.kind}",
                where=f"{self.place} and {other.place}",
                fix="pack all data of a run with one tokenizer",
            )
        if (self.arrays, self.classes is None) != (other.arrays, other.classes is None) or (
            (other.classes or 0) > (self.classes or 0)
        ):
            raise UserError(
                f"the arrays ({other.contents}) are not like the others ({self.contents})",
                where=f"{other.place} and {self.place}",
            )
        if self.image and other.image:
            shapes = [(image.height, image.width, image.channels) for image in (self.image, other.image)]
            if shapes[0] != shapes[1] or other.image.classes > self.image.classes:
                raise UserError(
                    f"the images ({shapes[1]}, {other.image.classes} classes) are not like the others"
                    f" ({shapes[0]}, {self.image.classes} classes)",
                    where=f"{other.place} and {self.place}",
                )

    @property
    def contents(self) -> str:
        """Names, types and shapes of the arrays, in words."""
        classes = [] if self.classes is None else [f"labels of {self.classes} classes"]
        return ", ".join([*map(str, self.arrays or ()), *classes])

    def as_json(self) -> dict[str, Any]:
        """The object that `data index --json` prints."""
        return {
            "path": self.place,
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
            UserError: Images, arrays, or tokens made elsewhere.
        """
        if self.tokenizer is None:
            raise UserError(f"{self.kind} have no tokenizer", where=str(self.directory))
        return Tokenizer.load(self.directory, self.tokenizer)


REINDEX = "run `bigtrain data index` on the directory"
_CHANGED = "restore the file; or, where the change is meant, run `bigtrain data index`: it becomes other data"


def _inside(offsets: Rows, sizes: Rows, total: int, width: int = 1) -> bool:
    """Whether stretches of so many values of a width lie inside a file."""
    # Compared without adding: a hostile sum would wrap around.
    return not bool((offsets > total).any() or (sizes > (total - offsets) // width).any())


def sidecar_rows(counts: Rows, width: int) -> Rows:
    """The sidecar of a file that holds nothing but the tokens of documents of these lengths."""
    ends = np.cumsum(counts)
    return np.stack([(ends - counts) * width, counts], axis=1)


def write_sidecar(path: Path, rows: Rows) -> str:
    """Write a sidecar atomically and return its hash."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(rows, dtype="<i8"), allow_pickle=False)
    write_atomic(path, buffer.getvalue())
    return hash_file(path)


def write_index(
    directory: Path, kind: Kind, dtype: str | None, tokenizer: TokenizerInfo | None, image: ImageInfo | None,
    text_bytes: int | None, shards: list[Shard], text: bool = False, base_url: str | None = None,
    arrays: tuple[ArrayInfo, ...] | None = None, classes: int | None = None,
) -> ShardIndex:  # fmt: skip
    """Write index.json, atomically and last, and return what it says."""
    content: dict[str, Any] = {
        "kind": kind,
        "dtype": dtype,
        "tokenizer": None if tokenizer is None else tokenizer.as_json(),
        "image": None if image is None else vars(image),
        "text_bytes": text_bytes,
        "fingerprint": fingerprint(kind, dtype, tokenizer, [shard.hash for shard in shards]),
    }
    if text:
        content["text"] = True
    if base_url is not None:
        content["base_url"] = base_url
    if arrays is not None:
        content |= {"arrays": [info.as_json() for info in arrays], "classes": classes}
    shardlist = [shard.as_json() for shard in shards]
    version = FORMAT_VERSION if kind in ("captions", "arrays") else 2 if text or base_url is not None else 1
    header = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "format_version": version}
    write_json(directory / INDEX_NAME, {**header, **content, "shardlist": shardlist})
    return load_index(directory)


def fingerprint(kind: str, dtype: str | None, tokenizer: TokenizerInfo | None, hashes: list[str]) -> str:
    """Identifies the data: other bytes, shard order or tokenizer give another one; names do not."""
    value = [kind, dtype, None if tokenizer is None else tokenizer.hash, hashes]
    return hash_text(json.dumps(value))


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
    return parse_index(path.read_bytes(), root, str(path))


def parse_index(data: bytes, root: Path, where: str) -> ShardIndex:
    """An index from the bytes of its index.json.

    Args:
        root: The directory on this machine that it stands for.
        where: Where the bytes are from, for errors.

    Raises:
        UserError: A newer format.
        CorruptionError: The bytes are damaged.
    """
    try:
        value: Any = json.loads(data, object_hook=_shard_or_object)
        version = value["format_version"]
        if not isinstance(version, int) or version < 1:
            raise ValueError(f"format_version is {version!r}")
        if version > FORMAT_VERSION:
            raise UserError(
                f"the index has format {version}; this bigtrain reads up to {FORMAT_VERSION}",
                where=where,
                fix="use a newer bigtrain",
            )
        shards = tuple(value.pop("shardlist"))
        for number, shard in enumerate(shards):
            if not isinstance(shard, Shard):
                raise ValueError(f"entry {number} of the shardlist lacks {', '.join(sorted(_SHARD_FIELDS - {*shard}))}")
        if len({name for shard in shards for name in (shard.url, shard.index)}) != 2 * len(shards):
            raise ValueError("a name appears twice")
        parts = {name: value[name] for name in ("kind", "dtype", "tokenizer", "image", "fingerprint")}
        parts |= {name: value.get(name, default) for name, default in _OPTIONAL.items()}
        for name, build in (("tokenizer", TokenizerInfo), ("image", ImageInfo)):
            if parts[name] is not None:
                # The inner call refuses other names than the fields', the outer one other types.
                content = json.dumps(vars(build(**parts[name])))
                parts[name] = TypeAdapter(build).validate_json(content, strict=True)
        if parts["arrays"] is not None:
            parts["arrays"] = tuple(ArrayInfo.from_json(entry) for entry in parts["arrays"])
            if len({info.name for info in parts["arrays"]}) != len(parts["arrays"]):
                raise ValueError("two arrays have one name")
        if parts["base_url"] is not None:
            parts["base_url"] = check_url(parts["base_url"])
        index = ShardIndex(shards=shards, directory=root.resolve(), **parts)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError) as error:
        raise CorruptionError(f"the index is damaged: {error}", where=where, fix=REINDEX) from None
    needed = {
        "tokens": (index.dtype, index.tokenizer),
        "images": (index.image,),
        "captions": (index.dtype, index.tokenizer, index.image),
        "arrays": (index.arrays,),
    }
    complete = all(needed[index.kind]) and (index.kind == "arrays") == (index.arrays is not None)
    if index.text and not all(shard.tokens_hash for shard in shards):
        complete = False
    expected = fingerprint(index.kind, index.dtype, index.tokenizer, [shard.hash for shard in shards])
    if not complete or expected != index.fingerprint:
        raise CorruptionError("the index contradicts itself", where=where, fix=REINDEX)
    return index


_SHARD_FIELDS = frozenset(("url", "nsamples", "filesize", "hash", "tokens", "index", "index_hash"))


def _shard_or_object(value: dict[str, Any]) -> Any:
    """A shard as soon as its entry has been read: the dictionaries of a million would take more than its memory."""
    return Shard(**value) if value.keys() >= _SHARD_FIELDS else value


_OPTIONAL: dict[str, Any] = {"text_bytes": None, "text": False, "base_url": None, "arrays": None, "classes": None}


def _how_to_index(root: Path) -> str:
    for name in ("train", "validation"):
        if (root / name / INDEX_NAME).is_file():
            return f"name {root / 'train'}"
    if any(root.glob("*.tar")):
        return f"run `bigtrain data index {root}`"
    return "make shards with `bigtrain data pack`"
