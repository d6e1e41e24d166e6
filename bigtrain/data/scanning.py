"""Scans one tar: which kind of samples it holds, and where each sample lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config import UserError
from bigtrain.data.accounting import PassedOver
from bigtrain.data.formats.arrays import ArrayInfo
from bigtrain.data.formats.images import ImageInfo
from bigtrain.data.formats.tar import TarSample, samples
from bigtrain.data.kind import Scanner, kind_named
from bigtrain.data.sidecar import Rows
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.models.batches import KINDS


@dataclass(frozen=True)
class Scan:
    """The result of scanning one tar."""

    kind: str
    rows: Rows
    """The rows of the sidecar, int64 of shape (samples, columns)."""
    dtype: str | None = None
    """Dtype of the tokens; None for kinds without tokens."""
    largest_id: int = -1
    image: ImageInfo | None = None
    text_bytes: int | None = None
    """UTF-8 bytes of the text or the captions; None for stored tokens and for kinds without text."""
    tokens_hash: str | None = None
    arrays: tuple[ArrayInfo, ...] | None = None
    classes: int | None = None
    """One more than the largest class; None if there are no classes."""
    facts: dict[str, Any] | None = None
    """Other properties that all samples of a directory have in common: an object for index.json."""

    @property
    def text(self) -> bool:
        """Whether the tar holds only text, which is tokenised on reading."""
        return self.tokens_hash is not None and self.image is None


def scan_shard(
    path: Path, tokenizer: Tokenizer | None = None, passed: PassedOver | None = None, kind: str | None = None
) -> Scan:
    """Scan one tar: find its kind, and where each sample lies.

    Args:
        tokenizer: Tokenises text, to count and hash its tokens.
        passed: Counts or refuses samples that cannot be read; None: the first one is an error.
        kind: Name of the sample kind; None: the kind that the first sample looks like.

    Raises:
        UserError: A member or a sample is refused, or the tar holds no readable sample.
        CorruptionError: The tar is damaged or truncated.
    """
    passed = passed or PassedOver()
    rows: list[tuple[int, ...]] = []
    scanner: Scanner | None = None
    for sample in samples(path, passed):
        if scanner is None:
            scanner = kind_named(kind or recognise(sample)).scanner(sample, tokenizer)
        try:
            row = scanner.add(sample)
        except UserError as error:
            passed(error)
            continue
        if row is None:
            passed.empty += 1
        else:
            rows.append(row)
    if scanner is None or not rows:
        noun = "sample" if scanner is None else scanner.noun
        raise UserError(f"the shard holds no {noun} that can be read", where=str(path))
    return scanner.result(np.asarray(rows, dtype=np.int64))


def recognise(sample: TarSample) -> str:
    """The name of the kind that a sample looks like. Kinds of plugins are checked first.

    Raises:
        UserError: The sample looks like no known kind.
    """
    names = KINDS.names()
    own = KINDS.builtin()
    for name in [name for name in names if name not in own] + own:
        if kind_named(name).recognises(sample):
            return name
    layouts = ", ".join(f"{name} ({kind_named(name).layout})" for name in names)
    raise UserError(
        f"samples of {', '.join(sorted(sample.suffixes))} are not supported",
        where=sample.where,
        fix=f"Store samples as {layouts}, or give a plugin that defines another kind with --plugin.",
    )
