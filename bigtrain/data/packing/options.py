"""Options for packing samples of any kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bigtrain.data.accounting import PassedOver
from bigtrain.data.tokenizers import Tokenizer

SHARD_BYTES = 64 << 20

ReportProgress = Callable[[str, int, int], None]
"""Called after each task with the name of the stage, the number of finished tasks, and the total number of tasks."""


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """The options of `bigtrain data pack`."""

    tokenizer: Tokenizer | None = None
    """The tokenizer that encodes text."""
    image_size: int | None = None
    """Side in pixels of the squares to which all images are scaled and cropped; None: they already have one size."""
    key: str = "text"
    """The key of an object, or the column of a table, that holds the text; dots join keys (`records.under`)."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The key of each column in an object, by column name, where it is not the column's name; see `encoding.forms`."""
    token_type: str | None = None
    """Integer type of `.bin` files that hold only tokens; see `formats.token_files`."""
    validation: float | str = 0.0
    """Share of the samples to hold out ("1%" or 0.01), at least one sample."""
    shard_bytes: int = SHARD_BYTES
    """Maximum bytes of a shard apart from headers; only a larger sample exceeds it."""
    seed: int = 0
    """Seed for the choice of held-out samples, and for the permutation of independent samples."""
    skip_bad: int = 0
    """Maximum number of bad samples that are skipped and counted; one more is an error."""
    workers: int = 1
    """Number of processes. The bytes written do not depend on it."""
    progress: ReportProgress | None = None
    passed: PassedOver = field(default_factory=PassedOver)
    """Counts the samples and files that are not used; its `limit` is `skip_bad`."""

    def __post_init__(self) -> None:
        self.passed.limit = self.skip_bad
