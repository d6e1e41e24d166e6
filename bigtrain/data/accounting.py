"""Records the samples and files that packing, indexing and reading skip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bigtrain.config import CorruptionError, UserError

NAMED_FILES = 20
"""Maximum number of bad samples, and of skipped files per reason, that a message names."""

BadSample = Callable[[UserError], None]
"""Called with the error of a bad sample; raises it, or returns so that the sample is skipped."""


class PassedOver:
    """Counts the samples and files that are not used.

    Bad samples are skipped up to a limit; one more is an error. Empty samples, and files that are no input of the kind,
    are always skipped. All of them are counted, and bad samples and files are also named.

    Args:
        limit: Maximum number of bad samples that are skipped; 0: the first one is an error.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.bad: list[str] = []
        """Location and reason of each bad sample."""
        self.empty = 0
        """Number of samples without content."""
        self.files: dict[str, list[str]] = {}
        """Files that were not read, by reason."""
        self.plain: list[str] = []
        """JSON or CSV files that were read as plain text, each as one document including its syntax."""

    def __call__(self, error: UserError) -> None:
        """Count a bad sample.

        Raises:
            UserError: There are more bad samples than the limit, or the error is a CorruptionError, which is never
                skipped.
        """
        if isinstance(error, CorruptionError) or not self.limit:
            raise error
        self.skip([f"{error.where}: {error.what}"], error)

    def skip(self, bad: list[str], last: UserError | None = None) -> None:
        """Count bad samples that another process has found.

        Raises:
            UserError: There are more bad samples than the limit.
        """
        self.bad += bad
        if len(self.bad) > self.limit:
            what = self.bad[-1] if last is None else last.what
            raise UserError(
                f"more than {self.limit} samples are bad; the last: {what}",
                None if last is None else last.where,
                last.fix if last is not None and last.fix else "Repair them, or allow more with --skip-bad.",
            ) from None

    def ignore(self, file: str, reason: str) -> None:
        """Count a file that is not read."""
        self.files.setdefault(reason, []).append(file)

    def as_json(self) -> dict[str, Any]:
        """The counts as keys of the JSON object that commands print."""
        return {
            "skipped": self.bad,
            "empty": self.empty,
            "files_not_read": self.files,
            "read_as_plain_text": self.plain,
        }

    def lines(self) -> list[str]:
        """The counts as lines for the user; empty if nothing was skipped."""
        found = []
        if self.bad:
            found.append(f"skipped {len(self.bad)} bad samples:")
            found += [f"  {one}" for one in self.bad[:NAMED_FILES]]
            found += [f"  and {len(self.bad) - NAMED_FILES} more"] if len(self.bad) > NAMED_FILES else []
        if self.empty:
            found.append(f"skipped {self.empty} empty samples")
        found += [f"not read ({reason}): {_named(files)}" for reason, files in self.files.items()]
        if self.plain:
            found.append(f"read as plain text, including its syntax, one document for each file: {_named(self.plain)}")
        return found


def _named(files: list[str]) -> str:
    more = f" and {len(files) - NAMED_FILES} more" if len(files) > NAMED_FILES else ""
    return f"{len(files)} files: {', '.join(files[:NAMED_FILES])}{more}"
