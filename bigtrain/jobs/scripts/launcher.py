"""The launchers for which scripts are written, as an extension point: each sets what its scripts expect.

`--launcher "accelerate launch --mixed_precision bf16"` names a launcher and its own options, as on a command line.
"""

from __future__ import annotations

import re
import shlex
from typing import ClassVar

from bigtrain.config import UserError
from bigtrain.config.registry import Registry
from bigtrain.jobs.scripts.call import ScriptCall


class ScriptLauncher:
    """Sets the arguments and variables of one launcher, in addition to torchrun's variables, which every script gets.

    Example:
        ```python
        @LAUNCHERS.register
        class Mine(ScriptLauncher):
            name = "mine"

            def adapt(self, call, options, nodes, procs):
                return replace(call, environment={**call.environment, "MINE": "1"})
        ```
    """

    name: ClassVar[str]
    used_by: ClassVar[re.Pattern[str] | None] = None
    """A pattern that occurs in the text of scripts for this launcher; None: such scripts are not recognised."""

    def adapt(self, call: ScriptCall, options: list[str], nodes: int, procs: int) -> ScriptCall:
        """Add this launcher's arguments and variables to a call.

        Args:
            call: The call without them.
            options: The launcher's own options.
            nodes: Number of nodes.
            procs: Number of ranks on each node.

        Raises:
            UserError: An option is not supported.
        """
        raise NotImplementedError


LAUNCHERS: Registry[ScriptLauncher] = Registry(
    "launcher", ScriptLauncher, package="bigtrain.jobs.scripts.launchers", tag=None, where="--launcher"
)
"""The registry of launchers by name."""


def adapt(call: ScriptCall, text: str, nodes: int, procs: int) -> ScriptCall:
    """Add the arguments and variables of a launcher to a call.

    Args:
        call: The call without them.
        text: The launcher's name and options, such as "deepspeed --no_local_rank".
        nodes: Number of nodes.
        procs: Number of ranks on each node.

    Raises:
        UserError: The launcher is unknown, or an option is not supported.
    """
    try:
        name, *options = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{text!r} cannot be read: {error}", "--launcher") from None
    return LAUNCHERS[name]().adapt(call, options, nodes, procs)


def notes(source: str, chosen: str) -> list[str]:
    """Notes for a user whose script seems to be written for another launcher than the chosen one.

    Args:
        source: The script's text.
        chosen: The launcher's name and options, as in `adapt`.
    """
    found = []
    for name in LAUNCHERS:
        pattern = LAUNCHERS[name].used_by
        if name != chosen.partition(" ")[0] and pattern is not None and pattern.search(source):
            found.append(f"note: the script uses {name}; add --launcher {name} to set what its own launcher would set")
    return found


def refuse_options(name: str, options: list[str], fix: str) -> None:
    """Refuse options that a launcher does not support.

    Args:
        name: The launcher's name.
        options: The unsupported options.
        fix: What to write instead.

    Raises:
        UserError: `options` is not empty.
    """
    if options:
        raise UserError(f"{options[0]} is not a known option of {name}", "--launcher", fix)
