"""How a command line with a user's own script is divided: what follows `--` is the script's, unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import typer
from typer.core import TyperCommand

_AFTER: Final = "bigtrain.after_dashes"


class ScriptCommand(TyperCommand):
    """A command that keeps the words after the first `--` apart from those before it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words before `--` alone."""
        before, after = args, []
        if "--" in args:
            at = args.index("--")
            before, after = args[:at], args[at + 1 :]
        ctx.meta[_AFTER] = after
        return super().parse_args(ctx, before)


def after_dashes(context: typer.Context) -> list[str]:
    """The words after `--`, as they were given."""
    return list(context.meta.get(_AFTER, ()))


def script_words(before: Sequence[str], after: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide the words of a command with a script into those that set `job`, and the script's own arguments."""
    job = [word for word in before if word.startswith("job.") and "=" in word]
    return job, [*(word for word in before if word not in job), *after]
