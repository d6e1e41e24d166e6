"""What a packing has written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from bigtrain.data.accounting import PassedOver


@dataclass(frozen=True)
class SplitSummary:
    """What one split holds."""

    directory: str
    documents: int
    """Or samples of another kind."""
    tokens: int
    """Ends of text included."""
    characters: int
    shards: int
    bytes: int
    fingerprint: str

    @property
    def characters_per_token(self) -> float | None:
        """How far the tokenizer compresses the text; ends of text are no characters. None where there is no text."""
        return self.characters / self.tokens if self.tokens else None


@dataclass(frozen=True)
class PackSummary:
    """What `pack` wrote."""

    out: str
    vocab_size: int
    held_out: str | None
    """How the validation data was chosen: "documents", "tail" of the only document, the kind of samples, or None."""
    splits: dict[str, SplitSummary]
    passed: PassedOver
    """What was not used."""

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
