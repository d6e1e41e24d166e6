"""Python processes of bigtrain's own: they run this source, and no module of the working directory."""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_SOURCE: Final = Path(__file__).resolve().parents[1]


def module_command(module: str, *arguments: str) -> list[str]:
    """The command line of `python -m MODULE`.

    -P: Python puts the working directory first on its path otherwise, and a user's random.py would replace the
    standard library's.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def with_source(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for `module_command` in which the child imports the source of this process.

    An installed package is found anyway; a checkout is put on PYTHONPATH. Empty entries of PYTHONPATH go, since they
    stand for the working directory.
    """
    entries = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if str(_SOURCE) not in (*site.getsitepackages(), *entries[:1]):
        entries.insert(0, str(_SOURCE))
    rest = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    return rest | ({"PYTHONPATH": os.pathsep.join(entries)} if entries else {})
