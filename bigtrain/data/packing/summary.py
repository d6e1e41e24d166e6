"""The summary of what a packing has written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from bigtrain.data.accounting import PassedOver


@dataclass(frozen=True)
class SplitSummary:
    """The contents of one split."""

    directory: str
    documents: int
    """Number of documents, or of samples of another kind."""
    tokens: int
    """Number of tokens, including end-of-text tokens."""
    characters: int
    shards: int
    bytes: int
    fingerprint: str

    @property
    def characters_per_token(self) -> float | None:
        """Mean characters per token, including end-of-text tokens; None if there are no tokens."""
        return self.characters / self.tokens if self.tokens else None


@dataclass(frozen=True)
class PackSummary:
    """What a packing has written, and what it has skipped."""

    out: str
    vocab_size: int
    held_out: str | None
    """What was held out: "documents", the "tail" of the only document, samples (the kind's name), or None."""
    splits: dict[str, SplitSummary]
    passed: PassedOver
    """The samples and files that were not used."""

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        splits = {
            name: {**dataclasses.asdict(split), "characters_per_token": split.characters_per_token}
            for name, split in self.splits.items()
        }
        return {
            "out": self.out,
            "vocab_size": self.vocab_size,
            "held_out": self.held_out,
            "empty_documents": self.passed.empty,
            "splits": splits,
            "skipped": self.passed.bad,
            "files_not_read": self.passed.files,
        }
