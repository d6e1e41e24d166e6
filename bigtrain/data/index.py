"""The index of a shard directory: index.json (a superset of wids-shard-index-v1) and one sidecar a shard.

A sidecar is an int64 .npy array with a row for each sample. With it any sample is read without walking the tar; what
its columns are, is the sample kind's (`data.kind`).

The shards lie beside index.json, on this machine or on the server that it came from; or, where it names a `base_url`,
on a server while the index is here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.formats.arrays import ArrayInfo
from bigtrain.data.formats.images import ImageInfo, read_class_names
from bigtrain.data.kind import SampleKind, kind_named
from bigtrain.data.shard import Shard
from bigtrain.data.sidecar import Rows
from bigtrain.data.tokenizers import Tokenizer, TokenizerInfo
from bigtrain.models.batches import KINDS
from bigtrain.storage import hash_file, hash_text, write_json
from bigtrain.storage.scheme import check_url

FORMAT_VERSION = 4
"""Written for documents with a begin of text and kinds with lengths; 3 is enough for kinds that came after the first,
2 for shards of text or with a `base_url`, 1 for others."""
FIRST_KINDS = ("tokens", "images")
"""The kinds that a reader of format 1 knows."""
MAX_INDEX_BYTES = 1 << 31
INDEX_NAME = "index.json"
AUTO_VERIFY_BYTES = 4 * 10**9
Verify = Literal["auto", "always", "never"]

_SIDECAR_HEADER_BYTES = 128


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class ShardIndex(_Record):
    """What is known of a shard directory without opening its shards."""

    kind: str
    """The name of the sample kind."""
    dtype: Literal["<u2", "<u4", "<i4", "<i8"] | None
    """Of the tokens; None for kinds without tokens."""
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
    """One more than the largest class; None where there are none, and for images, which have them in `image`."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes in the order of their numbers; None where they are not known."""
    facts: dict[str, Any] | None = None
    """Whatever else all samples have alike, of a kind of the user's own."""
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
    def sample_kind(self) -> SampleKind:
        """What knows how such samples are read."""
        return kind_named(self.kind)

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, or number of classes, 0 where there are none."""
        return self.sample_kind.outputs(self)

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

    def sequence_counts(self, context: int, document_mask: bool = False) -> list[int]:
        """What a step can consume of each shard: sequences of `context` tokens, or samples of other kinds."""
        kind = self.sample_kind
        return kind.packed_counts(self, context) if document_mask else kind.sequence_counts(self, context)

    @property
    def columns(self) -> int:
        """Columns of a sidecar."""
        return self.sample_kind.columns(self)

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
            or (len(rows) and not self.sample_kind.rows_fit(self, entry, rows))
        ):
            raise CorruptionError("the sidecar does not fit its shard", where=str(path), fix=REINDEX)
        return rows

    def token_counts(self, rows: Rows) -> Rows:
        """Tokens of each document or caption of a sidecar."""
        column = self.sample_kind.token_column(self.text)
        assert column is not None
        return rows[:, column]

    def all_token_counts(self) -> Iterator[Rows]:
        """Tokens of each sample, shard by shard; nothing for kinds without tokens."""
        if self.of_tokens:
            for number in range(len(self.shards)):
                yield self.token_counts(self.rows(number))

    @property
    def of_tokens(self) -> bool:
        """Whether a sample is `model.context` tokens, with or without an image."""
        return self.sample_kind.of_tokens

    @property
    def is_tokenised_on_reading(self) -> bool:
        """Whether its texts become tokens when they are read."""
        return self.of_tokens and any(shard.tokens_hash for shard in self.shards)

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
        own, others = self.tokenizer, other.tokenizer
        if self.kind != other.kind:
            raise UserError(
                f"one directory holds {self.kind}, the other {other.kind}", where=f"{self.place} and {other.place}"
            )
        if own and others and own.hash != others.hash:
            raise UserError(
                "the tokenizers of the shards differ",
                where=f"{self.place} and {other.place}",
                fix="pack all data of a run with one tokenizer",
            )
        self.sample_kind.require_same(self, other)

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
            UserError: A kind without tokens, or tokens made elsewhere.
        """
        if self.tokenizer is None:
            raise UserError(f"{self.kind} have no tokenizer", where=str(self.directory))
        return Tokenizer.load(self.directory, self.tokenizer)


REINDEX = "run `bigtrain data index` on the directory"
_CHANGED = "restore the file; or, where the change is meant, run `bigtrain data index`: it becomes other data"


def write_index(
    directory: Path, kind: str, dtype: str | None, tokenizer: TokenizerInfo | None, image: ImageInfo | None,
    text_bytes: int | None, shards: list[Shard], text: bool = False, base_url: str | None = None,
    arrays: tuple[ArrayInfo, ...] | None = None, classes: int | None = None, facts: dict[str, Any] | None = None,
    class_names: tuple[str, ...] | None = None,
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
    elif classes is not None:
        content["classes"] = classes
    if class_names is not None:
        content["class_names"] = list(class_names)
    if facts is not None:
        content["facts"] = facts
    shardlist = [shard.as_json() for shard in shards]
    version = 3 if kind not in FIRST_KINDS else 2 if text or base_url is not None else 1
    if any(shard.lengths is not None for shard in shards) or (tokenizer is not None and tokenizer.switches):
        version = FORMAT_VERSION
    header = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "format_version": version}
    write_json(directory / INDEX_NAME, {**header, **content, "shardlist": shardlist})
    return load_index(directory)


def fingerprint(kind: str, dtype: str | None, tokenizer: TokenizerInfo | None, hashes: list[str]) -> str:
    """Identifies the data: other bytes, shard order or tokenizer give another one; names do not."""
    value: list[Any] = [kind, dtype, None if tokenizer is None else tokenizer.hash, hashes]
    if tokenizer is not None:
        value += tokenizer.switches
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
        raise UserError(f"no data at {str(directory)!r}", fix="make it with `bigtrain data pack`, or correct the path")
    if not path.is_file():
        raise UserError(f"the directory holds no {INDEX_NAME}", where=str(directory), fix=_how_to_index(root))
    index = parse_index(path.read_bytes(), root, str(path))
    # Packing wrote the names of classes into a file of their own before the index had a place for them.
    return index if index.class_names else index.model_copy(update={"class_names": read_class_names(root)})


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
        if parts["class_names"] is not None:
            parts["class_names"] = tuple(parts["class_names"])
        if parts["base_url"] is not None:
            parts["base_url"] = check_url(parts["base_url"])
        index = ShardIndex(shards=shards, directory=root.resolve(), **parts)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError) as error:
        raise CorruptionError(f"the index is damaged: {error}", where=where, fix=REINDEX) from None
    if fingerprint(index.kind, index.dtype, index.tokenizer, [shard.hash for shard in shards]) != index.fingerprint:
        raise CorruptionError("the index contradicts itself", where=where, fix=REINDEX)
    if index.kind not in KINDS:
        raise UserError(
            f"the shards hold samples of the kind '{index.kind}', which is not known",
            where=where,
            fix=f"name the file that defines it with --plugin; known are {', '.join(KINDS.names())}",
        )
    if not index.sample_kind.is_complete(index):
        raise CorruptionError("the index contradicts itself", where=where, fix=REINDEX)
    return index


_SHARD_FIELDS = frozenset(("url", "nsamples", "filesize", "hash", "tokens", "index", "index_hash"))


def _shard_or_object(value: dict[str, Any]) -> Any:
    """A shard as soon as its entry has been read: the dictionaries of a million would take more than its memory."""
    return Shard(**value) if value.keys() >= _SHARD_FIELDS else value


_OPTIONAL: dict[str, Any] = {
    "text_bytes": None, "text": False, "base_url": None, "arrays": None, "classes": None,
    "class_names": None, "facts": None,
}  # fmt: skip


def advice_on_shards(inputs: Iterable[str | Path]) -> str | None:
    """The fix where files to be packed lie in a directory of shards or above one; None where there are no shards."""
    for given in map(Path, inputs):
        place = given if given.is_dir() else given.parent
        if (
            found := min(place.rglob(INDEX_NAME) if given.is_dir() else place.glob(INDEX_NAME), default=None)
        ) is not None:
            train = f"train on it (data.train: {found.parent})"
            return f"{found.parent} holds shards already: {train}, or pack the files that they were made of"
    return None


def _how_to_index(root: Path) -> str:
    for name in ("train", "validation"):
        if (root / name / INDEX_NAME).is_file():
            return f"name {root / 'train'}"
    if any(root.glob("*.tar")):
        return f"run `bigtrain data index {root}`"
    return "make shards with `bigtrain data pack`"
