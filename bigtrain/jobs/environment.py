"""Environment variables that a user sets for the ranks on the command line: `--env NAME=VALUE`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from bigtrain.config import UserError

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET: Final = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_PLACES: Final = frozenset({
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
})  # fmt: skip


def parse_environment(words: Iterable[str] | None, here: Mapping[str, str]) -> dict[str, str]:
    """Parse `--env` options.

    Args:
        words: The options' values: NAME=VALUE, or NAME for the value that the variable has in `here`.
        here: The environment of this process.

    Raises:
        UserError: An option has another form, names a variable that the launcher sets or that is not set here, or
            seems to name a secret. Secrets are refused because these variables are sent and recorded in plain text.
    """
    found = {}
    for word in words or ():
        name, equals, value = word.partition("=")
        if not _NAME.fullmatch(name):
            raise UserError(f"'{word}' is not an environment variable", "--env", "Write --env NAME=VALUE.")
        if name in _PLACES or name.startswith(("BIGTRAIN_", "TORCHELASTIC_")):
            raise UserError(f"the launcher sets {name} itself", "--env", "Remove it.")
        if _SECRET.search(name):
            raise UserError(
                f"{name} looks like a secret, but --env is sent and recorded unencrypted",
                "--env",
                "Set it on the nodes, or write it to the file of --secrets-file.",
            )
        if not equals:
            if name not in here:
                raise UserError(f"{name} is not set here", "--env", f"Write --env {name}=VALUE.")
            value = here[name]
        found[name] = value
    return found
