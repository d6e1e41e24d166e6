"""The work of a start, which no busy machine changes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def calls_of(*arguments: object) -> int:
    """How many functions a fresh Python calls when it runs these arguments, imports included."""
    command = [sys.executable, "-m", "cProfile", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    (count,) = re.findall(r"^ +(\d+) function calls", done.stdout, re.MULTILINE)
    return int(count)
