"""The index of a shard directory: index.json (a superset of wids-shard-index-v1) and one sidecar per shard.

A sidecar is an int64 .npy array with one row per sample, with which any sample can be read without scanning the tar.
The sample kind defines the columns (`data.kind`).

The shards lie beside index.json, on this machine or on the server from which the index was fetched. If a local index
names a `base_url`, its shards are on that server.
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
"""Newest version. It is written if tokenizer switches are on (`TokenizerInfo.switches`) and for kinds with lengths;
else 3 for kinds not in FIRST_KINDS, 2 for shards of text or with a `base_url`, and 1 for all others."""
FIRST_KINDS = ("tokens", "images")
"""The kinds that a reader of version 1 knows."""
MAX_INDEX_BYTES = 1 << 31
INDEX_NAME = "index.json"
AUTO_VERIFY_BYTES = 4 * 10**9
Verify = Literal["auto", "always", "never"]

_SIDECAR_HEADER_BYTES = 128


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class ShardIndex(_Record):
    """The content of index.json: all that is known of a shard directory without opening its shards."""

    kind: str
    """The name of the sample kind."""
    dtype: Literal["<u2", "<u4", "<i4", "<i8"] | None
    """Dtype of the tokens; None for kinds without tokens."""
    tokenizer: TokenizerInfo | None
    image: ImageInfo | None
    text_bytes: int | None
    """UTF-8 bytes of the text that the tokens encode, without end-of-text tokens; None if not known."""
    shards: tuple[Shard, ...]
    fingerprint: str
    """SHA-256 over the shards' hashes, kind, dtype and tokenizer; it does not depend on where the data is stored."""
    directory: Path = Field(exclude=True)
    """The local directory that holds index.json."""
    text: bool = False
    """Whether the shards hold text, which is tokenised when a shard is opened."""
    base_url: str | None = None
    """URL of the shards, if they do not lie beside the index."""
    arrays: tuple[ArrayInfo, ...] | None = None
    """Name, type and shape of each array of a sample; None for kinds without arrays."""
    classes: Annotated[int, Field(ge=1)] | None = None
    """One more than the largest class; None if there are no classes, and for images, which have them in `image`."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes in the order of their numbers; None if they are not known."""
    facts: dict[str, Any] | None = None
    """Other properties that all samples have in common; the sample kind defines them."""
    origin: str | None = Field(default=None, exclude=True)
    """The URL from which the index was fetched; None for a local index."""

    @property
    def place(self) -> str:
        """URL or path of the index, for messages and for the cache."""
        return self.origin or str(self.directory)

    @property
    def shards_url(self) -> str | None:
        """URL from which the shards are fetched; None if they lie beside a local index."""
        return self.origin or self.base_url

    @property
    def streams(self) -> bool:
        """Whether shards go through the cache, because they are fetched or tokenised on reading."""
        return self.shards_url is not None or self.text

    @property
    def sample_kind(self) -> SampleKind:
        """The sample kind, which defines how the samples are read."""
        return kind_named(self.kind)

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary, or number of classes; 0 if there is neither."""
        return self.sample_kind.outputs(self)

    @property
    def tokens(self) -> int:
        """Number of tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def samples(self) -> int:
        """Number of samples in all shards: documents, images with or without captions, samples of arrays, and so on."""
        return sum(shard.nsamples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all shards in bytes."""
        return sum(shard.filesize for shard in self.shards)

    @property
    def bytes_per_token(self) -> float | None:
        """Mean UTF-8 bytes of text per token; None if not known."""
        return None if self.text_bytes is None or not self.tokens else self.text_bytes / self.tokens

    def sequence_counts(self, context: int, document_mask: bool = False) -> list[int]:
        """Number of sequences of `context` tokens in each shard; of samples for kinds without tokens."""
        kind = self.sample_kind
        return kind.packed_counts(self, context) if document_mask else kind.sequence_counts(self, context)

    @property
    def columns(self) -> int:
        """Number of columns of a sidecar."""
        return self.sample_kind.columns(self)

    def sidecar_bytes(self, shard: int) -> int:
        """Size of a shard's sidecar in bytes."""
        return _SIDECAR_HEADER_BYTES + 8 * self.columns * self.shards[shard].nsamples

    def stored_bytes(self, shard: int) -> int:
        """Maximum bytes that a shard and its sidecar take in the cache while the shard is in use."""
        entry = self.shards[shard]
        made = entry.tokens * np.dtype(self.dtype).itemsize if self.text else 0
        return entry.filesize + self.sidecar_bytes(shard) + made

    def rows(self, shard: int, path: Path | None = None) -> Rows:
        """A shard's sidecar, int64 of shape (samples, columns).

        Args:
            path: Path of the sidecar, if it does not lie beside the index.

        Raises:
            UserError: The sidecar is missing.
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
            raise CorruptionError("the sidecar does not match its shard", where=str(path), fix=REINDEX)
        return rows

    def token_counts(self, rows: Rows) -> Rows:
        """Number of tokens of each sample, from the rows of a sidecar."""
        column = self.sample_kind.token_column(self.text)
        assert column is not None
        return rows[:, column]

    def all_token_counts(self) -> Iterator[Rows]:
        """Yield the number of tokens of each sample, shard by shard; yield nothing for kinds without tokens."""
        if self.of_tokens:
            for number in range(len(self.shards)):
                yield self.token_counts(self.rows(number))

    def empty_classes(self) -> list[str]:
        """The classes that no sample has: their numbers, with their names if they are known."""
        column = self.sample_kind.class_column(self)
        if column is None:
            return []
        found = {int(number) for shard in range(len(self.shards)) for number in np.unique(self.rows(shard)[:, column])}
        names = {number: f" ('{name}')" for number, name in enumerate(self.class_names or ())}
        missing = sorted(set(range(max(self.sample_kind.outputs(self), len(names)))) - found)
        return [f"{number}{names.get(number, '')}" for number in missing]

    @property
    def of_tokens(self) -> bool:
        """Whether a sample has up to `model.context` tokens, with or without an image."""
        return self.sample_kind.of_tokens

    @property
    def is_tokenised_on_reading(self) -> bool:
        """Whether the shards hold texts or captions that are tokenised on reading."""
        return self.of_tokens and any(shard.tokens_hash for shard in self.shards)

    def check(self, verify: Verify = "auto", progress: Callable[[str], None] | None = None) -> None:
        """Compare the sizes of the files with the index, and their hashes if `verify` says so.

        Raises:
            UserError: A shard or sidecar is missing.
            CorruptionError: A shard or sidecar has changed since it was indexed.
        """
        hashed = verify == "always" or (verify == "auto" and self.bytes <= AUTO_VERIFY_BYTES)
        for shard in self.shards:
            for problem in self.problems(shard, hashed):
                raise problem
            if progress is not None:
                progress(shard.url)

    def problems(self, shard: Shard, hashed: bool) -> list[UserError]:
        """Errors about the files of one shard; empty if there are none."""
        files = {self.directory / shard.index: shard.index_hash}
        path = self.directory / shard.url
        if self.shards_url is None:
            files = {path: shard.hash, **files}
        for file in files:
            if not file.is_file():
                fix = "Restore it." if file == path else REINDEX
                return [UserError(f"{file.name} is missing", where=str(self.directory), fix=fix)]
        if path in files and (size := path.stat().st_size) != shard.filesize:
            return [
                CorruptionError(
                    f"{shard.url} has {size} bytes, but the index says {shard.filesize}", str(path), _CHANGED
                )
            ]
        if not hashed:
            return []
        return [
            CorruptionError(f"{file.name} has changed since it was indexed", str(file), _CHANGED)
            for file, recorded in files.items()
            if hash_file(file) != recorded
        ]

    def require_same_tokens(self, other: ShardIndex) -> None:
        """Refuse to use `other` together with this index if its tokens (or classes) have another meaning.

        Raises:
            UserError: Kind, tokenizer or image shape differ, or `other` has more classes.
        """
        own, others = self.tokenizer, other.tokenizer
        if self.kind != other.kind:
            raise UserError(
                f"one directory holds {self.kind}, but the other {other.kind}", where=f"{self.place} and {other.place}"
            )
        if own and others and own.hash != others.hash:
            raise UserError(
                "the tokenizers of the shards differ",
                where=f"{self.place} and {other.place}",
                fix="Pack all data of a run with one tokenizer.",
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
            UserError: The kind has no tokens, or the tokens were made by another tool.
        """
        if self.tokenizer is None:
            raise UserError(f"{self.kind} have no tokenizer", where=str(self.directory))
        return Tokenizer.load(self.directory, self.tokenizer)


REINDEX = "Run `bigtrain data index` on the directory."
_CHANGED = (
    "Restore the file. If the change is intended, run `bigtrain data index`: the directory then counts as "
    "different data."
)


def write_index(
    directory: Path, kind: str, dtype: str | None, tokenizer: TokenizerInfo | None, image: ImageInfo | None,
    text_bytes: int | None, shards: list[Shard], text: bool = False, base_url: str | None = None,
    arrays: tuple[ArrayInfo, ...] | None = None, classes: int | None = None, facts: dict[str, Any] | None = None,
    class_names: tuple[str, ...] | None = None,
) -> ShardIndex:  # fmt: skip
    """Write index.json, atomically and after all other files, and return the index."""
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
    """The fingerprint of the data. It depends on the bytes, the order of shards and the tokenizer, but not on names."""
    value: list[Any] = [kind, dtype, None if tokenizer is None else tokenizer.hash, hashes]
    if tokenizer is not None:
        value += tokenizer.switches
    return hash_text(json.dumps(value))


def load_index(directory: str | Path) -> ShardIndex:
    """Read a shard directory's index.json.

    Raises:
        UserError: There is no such directory, it holds no index, or the index has a newer format.
        CorruptionError: index.json is damaged.
    """
    root = Path(directory)
    path = root / INDEX_NAME
    if not root.is_dir():
        raise UserError(f"no data at {str(directory)!r}", fix="Make it with `bigtrain data pack`, or correct the path.")
    if not path.is_file():
        raise UserError(f"the directory holds no {INDEX_NAME}", where=str(directory), fix=_how_to_index(root))
    index = parse_index(path.read_bytes(), root, str(path))
    # Packing wrote the names of classes into a separate file before the index had a field for them.
    return index if index.class_names else index.model_copy(update={"class_names": read_class_names(root)})


def parse_index(data: bytes, root: Path, where: str) -> ShardIndex:
    """An index from the bytes of its index.json.

    Args:
        root: The local directory of the index.
        where: Path or URL of the bytes, for error messages.

    Raises:
        UserError: The index has a newer format, or a kind that is not known.
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
                fix="Use a newer bigtrain.",
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
                # The inner call refuses unknown names, the outer one wrong types.
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
        raise CorruptionError("the index is inconsistent", where=where, fix=REINDEX)
    if index.kind not in KINDS:
        raise UserError(
            f"the shards hold samples of the kind '{index.kind}', which is not known",
            where=where,
            fix=f"Name the file that defines it with --plugin. Known kinds: {', '.join(KINDS.names())}.",
        )
    if not index.sample_kind.is_complete(index):
        raise CorruptionError("the index is inconsistent", where=where, fix=REINDEX)
    return index


_SHARD_FIELDS = frozenset(("url", "nsamples", "filesize", "hash", "tokens", "index", "index_hash"))


def _shard_or_object(value: dict[str, Any]) -> Any:
    """Turn an entry into a `Shard` as soon as it is parsed: a million dictionaries would take too much memory."""
    return Shard(**value) if value.keys() >= _SHARD_FIELDS else value


_OPTIONAL: dict[str, Any] = {
    "text_bytes": None, "text": False, "base_url": None, "arrays": None, "classes": None,
    "class_names": None, "facts": None,
}  # fmt: skip


def advice_on_shards(inputs: Iterable[str | Path]) -> str | None:
    """The fix to suggest if files to be packed lie in or above a directory of shards; None if there are no shards."""
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
            return f"Name {root / 'train'}."
    if any(root.glob("*.tar")):
        return f"Run `bigtrain data index {root}`."
    return "Make shards with `bigtrain data pack`."
