"""Keys of other services (W&B, Hugging Face) for the ranks: from a file on the node, never from a config.

The file has lines NAME=VALUE; or it is a directory with one file for each key, as Kubernetes mounts a Secret. Its path
may be printed. Its contents reach the environment of the process that needs them, and nothing else.
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
    """The keys of a file or a directory.

    Raises:
        UserError: It is not there, others may read it, or a line is no NAME=VALUE; no value is ever in the message.
    """
    try:
        if path.is_dir():
            # Kubernetes keeps the files in a hidden directory and links to them; a group may be the pod's own.
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
    """Add the keys of the file that BIGTRAIN_SECRETS_FILE names to an environment; what it holds already stays.

    Raises:
        UserError: See `read_secrets`.
    """
    place = environment.get(variables.SECRETS_FILE)
    if place:
        for name, value in read_secrets(Path(place)).items():
            environment.setdefault(name, value)


def missing_keys(wanted: list[str], environment: Mapping[str, str], secrets: Path | None) -> list[str]:
    """Names of the keys that a rank of this node would not find.

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
