"""The two errors that are shown to the user without a traceback: a mistake in the input, and damaged data."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can fix; it is shown without a traceback, and the exit code is 2.

    Args:
        what: One sentence that describes the mistake, with the wrong value.
        where: Where it is: file and line, shard, key, rank or step.
        fix: How to fix it.
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
        """The JSON object that a command with `--json` prints for this error."""
        return {"error": self.what, "where": self.where, "fix": self.fix}


class CorruptionError(UserError):
    """Stored data do not match their recorded hash or expected structure; the exit code is 1."""

    exit_code = 1


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option with the most similar spelling to `word`; None if none is similar."""
    found = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return found[0] if found else None
