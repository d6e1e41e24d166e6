"""Lines of events.jsonl, and the boot of the machine whose monotonic clock they carry."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

from bigtrain import storage


def append_event(path: Path, event: str, /, **fields: Any) -> None:
    """Append one line to events.jsonl.

    Beside the time of day it carries the seconds since this machine's boot, and which boot: a clock that is set
    meanwhile changes no interval between events of one machine.
    """
    clock = {"uptime_s": round(time.monotonic(), 6), "boot": boot_hash()}
    storage.append_line(path, {"time": round(time.time(), 3), "event": event, **fields, **clock})


def boot_hash() -> str:
    """A short name for this boot of this machine: events of one name share a monotonic clock. "" where unknown."""
    boot = _boot()
    return hashlib.sha256(boot.encode()).hexdigest()[:12] if boot else ""


def boot_id() -> str:
    """This boot of this machine and the namespace of its process ids: process ids compare where it is equal."""
    try:
        return f"{_boot()} {os.readlink('/proc/self/ns/pid')}" if _boot() else ""
    except OSError:
        return ""


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
