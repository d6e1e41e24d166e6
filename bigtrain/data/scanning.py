"""Walking one tar: what kind of samples it holds, and where each of them lies."""

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
    """What one walk through a tar finds."""

    kind: str
    rows: Rows
    """The sidecar, int64 (samples, columns)."""
    dtype: str | None = None
    """Of the tokens; None for kinds without."""
    largest_id: int = -1
    image: ImageInfo | None = None
    text_bytes: int | None = None
    """UTF-8 bytes of text or of captions; None for stored tokens and kinds without text."""
    tokens_hash: str | None = None
    arrays: tuple[ArrayInfo, ...] | None = None
    classes: int | None = None
    """One more than the largest class; None where there are none."""
    facts: dict[str, Any] | None = None
    """Whatever else all samples of a directory have alike: an object for index.json."""

    @property
    def text(self) -> bool:
        """Whether the tar holds text alone, which is tokenised when it is read."""
        return self.tokens_hash is not None and self.image is None


def scan_shard(
    path: Path, tokenizer: Tokenizer | None = None, passed: PassedOver | None = None, kind: str | None = None
) -> Scan:
    """Walk one tar: its kind, and where each sample lies.

    Args:
        tokenizer: Tokenises text, to count and hash its tokens.
        passed: What to do with samples that cannot be read; None: raise.
        kind: What the samples are, where it is known; None: what the first one looks like.

    Raises:
        UserError: A member or a sample that is refused.
        CorruptionError: The tar is damaged or cut short.
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
    """The name of the kind that a sample looks like; kinds of plugins are asked first.

    Raises:
        UserError: It looks like none.
    """
    names = KINDS.names()
    own = KINDS.builtin()
    for name in [name for name in names if name not in own] + own:
        if kind_named(name).recognises(sample):
            return name
    layouts = ", ".join(f"{name} ({kind_named(name).layout})" for name in names)
    raise UserError(
        f"samples of {', '.join(sorted(sample.suffixes))} are not read",
        where=sample.where,
        fix=f"samples are {layouts}; a plugin can define another kind (--plugin)",
    )
