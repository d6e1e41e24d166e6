"""How samples of any kind are packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bigtrain.data.accounting import PassedOver
from bigtrain.data.tokenizers import Tokenizer

SHARD_BYTES = 64 << 20

ReportProgress = Callable[[str, int, int], None]
"""Called after each piece of work with the stage, and how many of how many are done."""


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """The options of `bigtrain data pack`."""

    tokenizer: Tokenizer | None = None
    """What encodes text."""
    image_size: int | None = None
    """Scale and crop all images to squares of this many pixels; None: they have one size already."""
    key: str = "text"
    """The key of an object, or the column of a table, that holds the text; dots join keys (`records.under`)."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Where the columns of `encoding.forms` lie, for samples of which the loss counts a part."""
    token_type: str | None = None
    """Of files `.bin` that hold tokens alone; see `formats.token_files`."""
    validation: float | str = 0.0
    """Share of the samples to hold out ("1%" or 0.01), at least one."""
    shard_bytes: int = SHARD_BYTES
    """Size that a shard exceeds by its headers at most."""
    seed: int = 0
    """Another choice of held-out samples, and another permutation of samples that stand alone."""
    skip_bad: int = 0
    """Bad samples that are skipped and counted; one more is an error."""
    workers: int = 1
    """Processes; the bytes written do not depend on it."""
    progress: ReportProgress | None = None
    passed: PassedOver = field(default_factory=PassedOver)
    """The account of what is not used; `limit` is `skip_bad`."""

    def __post_init__(self) -> None:
        self.passed.limit = self.skip_bad
