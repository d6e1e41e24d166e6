"""The launchers that scripts are written for, as an extension point: what each one passes to a script.

`--launcher "accelerate launch --mixed_precision bf16"` names a launcher and its own options, as one would type them.
"""

from __future__ import annotations

import re
import shlex
from typing import ClassVar

from bigtrain.config import UserError
from bigtrain.config.registry import Registry
from bigtrain.jobs.scripts.call import ScriptCall


class ScriptLauncher:
    """What a launcher sets beside torchrun's variables, which every script gets.

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
    """What the text of a script contains that was written for this launcher."""

    def adapt(self, call: ScriptCall, options: list[str], nodes: int, procs: int) -> ScriptCall:
        """The call as this launcher makes it.

        Args:
            options: The launcher's own options.
            nodes: Machines.
            procs: Ranks on each of them.

        Raises:
            UserError: An option that has no meaning here.
        """
        raise NotImplementedError


LAUNCHERS: Registry[ScriptLauncher] = Registry(
    "launcher", ScriptLauncher, package="bigtrain.jobs.scripts.launchers", tag=None, where="--launcher"
)
"""The launchers by name."""


def adapt(call: ScriptCall, text: str, nodes: int, procs: int) -> ScriptCall:
    """A call as the launcher of a command line makes it.

    Args:
        text: The launcher's name and its options: "deepspeed --no_local_rank".

    Raises:
        UserError: There is no such launcher, or it does not know an option.
    """
    try:
        name, *options = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{text!r} cannot be read: {error}", "--launcher") from None
    return LAUNCHERS[name]().adapt(call, options, nodes, procs)


def notes(source: str, chosen: str) -> list[str]:
    """Lines for a person whose script seems to be written for another launcher than the chosen one.

    Args:
        source: The script's text.
        chosen: As for `adapt`.
    """
    found = []
    for name in LAUNCHERS:
        pattern = LAUNCHERS[name].used_by
        if name != chosen.partition(" ")[0] and pattern is not None and pattern.search(source):
            found.append(f"note: the script uses {name}; --launcher {name} passes what its own launcher would set")
    return found


def refuse_options(name: str, options: list[str], fix: str) -> None:
    """Refuse options of a launcher that takes none.

    Raises:
        UserError: There is one.
    """
    if options:
        raise UserError(f"{options[0]} is no option of {name} that is known here", "--launcher", fix)
