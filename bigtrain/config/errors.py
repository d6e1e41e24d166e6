"""The two kinds of failure that a person reads: a mistake of the user's, and damage found on disk."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can fix: shown without a traceback, exit code 2.

    Args:
        what: One sentence that says what is wrong, with the offending value.
        where: File and line, shard, key, rank or step.
        fix: What to do about it.
    """

    exit_code = 2

    def __init__(self, what: str, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, str | None]:
        """The object that `--json` prints for an error."""
        return {"error": self.what, "where": self.where, "fix": self.fix}


class CorruptionError(UserError):
    """Bytes on disk that do not match their recorded hash or structure: exit code 1."""

    exit_code = 1


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option closest in spelling to `word`, or None where none is close."""
    found = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return found[0] if found else None
