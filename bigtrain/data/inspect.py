"""Inspects a shard directory (`data inspect`), and verifies that it is complete and undamaged (`data verify`)."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config import CorruptionError, UserError
from bigtrain.data.accounting import PassedOver
from bigtrain.data.index import INDEX_NAME, REINDEX, ShardIndex, load_index
from bigtrain.data.scanning import scan_shard
from bigtrain.data.shard import Shard


@dataclass(frozen=True)
class Inspection:
    """What a shard directory holds. Lengths are in tokens."""

    path: str
    kind: str
    samples: int
    """Number of documents, images, captions, samples of arrays, and so on."""
    shards: int
    bytes: int
    fingerprint: str
    vocab_size: int
    """Size of the vocabulary, or number of classes."""
    dtype: str | None
    tokenizer: str | None
    image: str | None
    """Shape of the images, as HEIGHT x WIDTH x CHANNELS."""
    arrays: str | None
    """Names, types and shapes of the arrays, and the number of classes."""
    tokens: int
    bytes_per_token: float | None
    shortest: int
    longest: int
    context: int
    sequences: int
    padding: int
    """Number of positions without a token, at the ends of sequences."""
    padding_share: float
    cut: int
    """Number of samples that are longer than `context` and lose their end."""
    first_lines: list[str]

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Verification:
    """The result of a full verification."""

    path: str
    shards: int
    bytes: int
    problems: list[dict[str, str | None]]
    """One object per problem, with the keys error, where and fix."""

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return dataclasses.asdict(self)

    def raise_for_problems(self) -> None:
        """Raise an error if there are problems.

        Raises:
            CorruptionError: There are problems; the error names the first one and their number.
        """
        if self.problems:
            first = self.problems[0]
            more = f" ({len(self.problems)} problems in all)" if len(self.problems) > 1 else ""
            raise CorruptionError(f"{first['error']}{more}", where=first["where"], fix=first["fix"])


def shard_directories(path: str | Path) -> list[Path]:
    """The directory itself if it is indexed, else its subdirectories train and validation.

    Raises:
        UserError: None of these directories holds an index.
    """
    root = Path(path)
    parts = [root / name for name in ("train", "validation") if (root / name / INDEX_NAME).is_file()]
    if (root / INDEX_NAME).is_file() or not parts:
        return [load_index(root).directory]
    return parts


def inspect(path: str | Path, context: int = 1024, lines: int = 3) -> Inspection:
    """Describe one shard directory. The first lines of text are decoded if the tokenizer is known.

    Args:
        context: Tokens per sequence.
        lines: Maximum number of lines of text.

    Raises:
        UserError: The directory holds no index.
        CorruptionError: The index or a sidecar is damaged.
    """
    index = load_index(path)
    kind = index.sample_kind
    lengths = [part for part in index.all_token_counts() if len(part)]
    sequences = sum(index.sequence_counts(context))
    positions = sequences * kind.texts * context if index.of_tokens else 0
    padding = positions - kind.filled(index, context) if positions else 0
    image = index.image
    is_readable = index.tokenizer is None or index.tokenizer.kind != "unknown"
    first_lines = kind.preview(index, lines) if is_readable and any(index.sequence_counts(1)) else []
    return Inspection(
        path=str(index.directory),
        kind=index.kind,
        samples=index.samples,
        shards=len(index.shards),
        bytes=index.bytes,
        fingerprint=index.fingerprint,
        vocab_size=index.vocab_size,
        dtype=index.dtype,
        tokenizer=None if index.tokenizer is None else index.tokenizer.kind,
        image=None if image is None else f"{image.height} x {image.width} x {image.channels}",
        arrays=kind.describe(index) if index.arrays is not None else None,
        tokens=index.tokens,
        bytes_per_token=index.bytes_per_token,
        shortest=min((int(part.min()) for part in lengths), default=0),
        longest=max((int(part.max()) for part in lengths), default=0),
        context=context,
        sequences=sequences,
        padding=padding,
        padding_share=padding / positions if padding else 0.0,
        cut=kind.cut(index, context),
        first_lines=first_lines,
    )


def verify(path: str | Path) -> Verification:
    """Verify all files of a shard directory (or of its train and validation): hashes, tars, sidecars, tokenizer.

    Raises:
        UserError: The directory holds no index.
    """
    problems: list[UserError] = []
    shards = size = 0
    for directory in shard_directories(path):
        index = load_index(directory)
        for number, shard in enumerate(index.shards):
            found = index.problems(shard, hashed=True) or _structure(index, number, shard)
            problems += found
        known = {shard.url for shard in index.shards}
        for extra in sorted({file.name for file in directory.glob("*.tar")} - known):
            problems.append(CorruptionError(f"{extra} is not in the index", str(directory), REINDEX))
        if index.tokenizer is not None and index.tokenizer.kind == "tokenizers":
            problems += _collected(index.load_tokenizer)
        shards += len(index.shards)
        size += index.bytes
    return Verification(str(path), shards, size, [problem.as_json() for problem in problems])


def _structure(index: ShardIndex, number: int, shard: Shard) -> list[UserError]:
    def compare() -> None:
        path = index.directory / shard.url
        if index.shards_url is not None:
            index.rows(number)
            return
        # A directory may have been indexed without its bad samples.
        passed = PassedOver(sys.maxsize)
        scan = scan_shard(path, index.load_tokenizer() if index.is_tokenised_on_reading else None, passed, index.kind)
        found = (scan.kind, scan.dtype, scan.tokens_hash, scan.arrays)
        same = found == (index.kind, index.dtype, shard.tokens_hash, index.arrays)
        same = same and np.array_equal(scan.rows, index.rows(number))
        if not same:
            raise CorruptionError("the sidecar does not match its shard", str(path), REINDEX)
        if index.of_tokens and scan.largest_id >= index.vocab_size:
            raise CorruptionError(
                f"the shard holds the token id {scan.largest_id}, but the vocabulary has {index.vocab_size} tokens",
                str(path),
            )

    return _collected(compare)


def _collected(check: Callable[[], object]) -> list[UserError]:
    try:
        check()
    except UserError as error:
        return [error]
    return []
