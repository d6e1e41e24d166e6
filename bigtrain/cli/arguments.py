"""Parsing of command lines with a user's own script: the words after `--` are the script's arguments, unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import typer
from typer.core import TyperCommand

_AFTER: Final = "bigtrain.after_dashes"


class ScriptCommand(TyperCommand):
    """A command that does not parse the words after the first `--`; `after_dashes` returns them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse only the words before `--`."""
        before, after = args, []
        if "--" in args:
            at = args.index("--")
            before, after = args[:at], args[at + 1 :]
        ctx.meta[_AFTER] = after
        return super().parse_args(ctx, before)


def after_dashes(context: typer.Context) -> list[str]:
    """The words after `--`, unchanged."""
    return list(context.meta.get(_AFTER, ()))


def script_words(before: Sequence[str], after: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the words of a command line into overrides of the `job` section and the script's arguments.

    Args:
        before: Words before `--`; those of the form job.KEY=VALUE are overrides.
        after: Words after `--`, which are all arguments of the script.
    """
    job = [word for word in before if word.startswith("job.") and "=" in word]
    return job, [*(word for word in before if word not in job), *after]
