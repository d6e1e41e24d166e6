"""Progress, on stderr."""

from __future__ import annotations

import sys


def say(name: str, number: int, of: int, text: str) -> None:
    """One line for one fault."""
    print(f"{name} {number + 1}/{of}: {text}", file=sys.stderr, flush=True)
