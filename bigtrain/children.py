"""Command line and environment of bigtrain's child Python processes.

A child imports the same source as this process, and no module of the working directory.
"""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_SOURCE: Final = Path(__file__).resolve().parents[1]


def module_command(module: str, *arguments: str) -> list[str]:
    """The command line of `python -P -m MODULE`.

    Without -P, Python puts the working directory first on sys.path, and a user's random.py would shadow the standard
    library's.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def with_source(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for `module_command` in which the child imports the source of this process.

    A checkout is put first on PYTHONPATH; an installed package needs no entry. Empty entries of PYTHONPATH are removed,
    since they stand for the working directory.
    """
    entries = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if str(_SOURCE) not in (*site.getsitepackages(), *entries[:1]):
        entries.insert(0, str(_SOURCE))
    rest = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    return rest | ({"PYTHONPATH": os.pathsep.join(entries)} if entries else {})
