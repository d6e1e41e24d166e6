"""Lines of events.jsonl, and ids of the machine's boot, which say whether monotonic times are comparable."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

from bigtrain import storage


def append_event(path: Path, event: str, /, **fields: Any) -> None:
    """Append one line to events.jsonl.

    The line has the Unix time, the seconds since this machine's boot, and the boot's hash. So an adjustment of the
    machine's clock does not change the intervals between events of one machine.

    Args:
        path: The file.
        event: Name of the event.
        fields: Further keys of the line.
    """
    clock = {"uptime_s": round(time.monotonic(), 6), "boot": boot_hash()}
    storage.append_line(path, {"time": round(time.time(), 3), "event": event, **fields, **clock})


def boot_hash() -> str:
    """Short hash of this machine's boot; events with the same hash share a monotonic clock. "" if it is unknown."""
    boot = _boot()
    return hashlib.sha256(boot.encode()).hexdigest()[:12] if boot else ""


def boot_id() -> str:
    """Id of this machine's boot and the PID namespace, within which process ids are comparable; "" if unknown."""
    try:
        return f"{_boot()} {os.readlink('/proc/self/ns/pid')}" if _boot() else ""
    except OSError:
        return ""


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
