"""API keys of other services (W&B, Hugging Face) for the ranks, read from a file on the node and never from a config.

The path names a file of lines NAME=VALUE, or a directory with one file for each key, as Kubernetes mounts a Secret.
bigtrain may print the path. The keys are put into the environment of the process that needs them, and nowhere else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Final

from bigtrain import variables
from bigtrain.config import UserError

MAX_BYTES: Final = 1 << 16

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def read_secrets(path: Path) -> dict[str, str]:
    """Read the keys of a secrets file or directory.

    Returns:
        The value of each key by the key's name.

    Raises:
        UserError: The file does not exist or cannot be read, its mode allows others to read it, or a line is not
            NAME=VALUE. The message never contains a value.
    """
    try:
        if path.is_dir():
            # Kubernetes keeps the files in a hidden directory and links to them. It may let the pod's group read them.
            files = [file for file in sorted(path.iterdir()) if not file.name.startswith(".") and file.is_file()]
            return {file.name: _read(file, 0o007).strip() for file in files if _NAME.fullmatch(file.name)}
        text = _read(path, 0o077)
    except OSError as error:
        raise UserError(
            f"The secrets cannot be read: {error.strerror}", str(path), "Put the file on every node, at this path."
        ) from None
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        name = name.strip().removeprefix("export ").strip()
        if not equals or not _NAME.fullmatch(name):
            raise UserError("A line of the secrets is not NAME=VALUE", f"{path}, line {number}")
        found[name] = value.strip().strip("'\"")
    return found


def load_secrets(environment: MutableMapping[str, str]) -> None:
    """Add the keys of the file that BIGTRAIN_SECRETS_FILE names to an environment; variables that are set stay as is.

    Raises:
        UserError: See `read_secrets`.
    """
    place = environment.get(variables.SECRETS_FILE)
    if place:
        for name, value in read_secrets(Path(place)).items():
            environment.setdefault(name, value)


def missing_keys(wanted: list[str], environment: Mapping[str, str], secrets: Path | None) -> list[str]:
    """Names of the keys that a rank on this node would find neither in its environment nor in the secrets file.

    Args:
        wanted: Names of the keys that the run needs.
        environment: The environment of the rank's process.
        secrets: Path of the secrets file or directory; None: there is none.

    Raises:
        UserError: See `read_secrets`.
    """
    known = read_secrets(secrets) if secrets is not None else {}
    return [name for name in wanted if not environment.get(name) and not known.get(name)]


def _read(path: Path, forbidden: int) -> str:
    mode = os.stat(path).st_mode & 0o777
    if mode & forbidden:
        raise UserError(f"Others may read the secrets: the mode is {mode:04o}", str(path), f"Run `chmod 600 {path}`.")
    with open(path) as file:
        return file.read(MAX_BYTES)
