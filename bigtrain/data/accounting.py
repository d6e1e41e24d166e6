"""What packing, indexing and reading pass over: counted and named in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bigtrain.config import CorruptionError, UserError

NAMED_FILES = 20
"""Files that are passed over, of each reason, that a message names."""

BadSample = Callable[[UserError], None]
"""Called with what is wrong with a sample; raises, or lets it be skipped."""


class PassedOver:
    """The one account of what is not used.

    Bad samples are skipped up to a limit, and one more is an error. Empty samples and files that are no input of the
    kind are always skipped. All are counted, and the bad ones and the files are named.

    Args:
        limit: Bad samples that are skipped; 0: the first is an error.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.bad: list[str] = []
        """Place and reason of each."""
        self.empty = 0
        """Samples without content."""
        self.files: dict[str, list[str]] = {}
        """Files that were not read, by the reason."""
        self.plain: list[str] = []
        """Files of JSON or CSV that were read as plain text, each as one document with its syntax."""

    def __call__(self, error: UserError) -> None:
        """Count a bad sample.

        Raises:
            UserError: It is one too many; CorruptionError is never skipped.
        """
        if isinstance(error, CorruptionError) or not self.limit:
            raise error
        self.skip([f"{error.where}: {error.what}"], error)

    def skip(self, bad: list[str], last: UserError | None = None) -> None:
        """Count bad samples that another process has found.

        Raises:
            UserError: They are too many.
        """
        self.bad += bad
        if len(self.bad) > self.limit:
            what = self.bad[-1] if last is None else last.what
            raise UserError(
                f"more than {self.limit} samples are bad; the last: {what}",
                None if last is None else last.where,
                last.fix if last is not None and last.fix else "repair them, or allow more with --skip-bad",
            ) from None

    def ignore(self, file: str, reason: str) -> None:
        """Count a file that is not read."""
        self.files.setdefault(reason, []).append(file)

    def as_json(self) -> dict[str, Any]:
        """The keys that commands print."""
        return {
            "skipped": self.bad,
            "empty": self.empty,
            "files_not_read": self.files,
            "read_as_plain_text": self.plain,
        }

    def lines(self) -> list[str]:
        """What a person should know of it; empty where nothing was passed over."""
        found = []
        if self.bad:
            found.append(f"skipped {len(self.bad)} bad samples:")
            found += [f"  {one}" for one in self.bad[:NAMED_FILES]]
            found += [f"  and {len(self.bad) - NAMED_FILES} more"] if len(self.bad) > NAMED_FILES else []
        if self.empty:
            found.append(f"skipped {self.empty} empty samples")
        found += [f"not read ({reason}): {_named(files)}" for reason, files in self.files.items()]
        if self.plain:
            found.append(f"read as plain text, with its syntax, one document each: {_named(self.plain)}")
        return found


def _named(files: list[str]) -> str:
    more = f" and {len(files) - NAMED_FILES} more" if len(files) > NAMED_FILES else ""
    return f"{len(files)} files: {', '.join(files[:NAMED_FILES])}{more}"
