"""Reads torch's flight recorder: the last collectives of each process group show where a rank hangs."""

from __future__ import annotations

import json
import sys
from typing import Any, Final

LAST: Final = 3
"""Number of collectives that are shown for each group."""


def collectives() -> list[dict[str, Any]]:
    """The flight recorder's entries, oldest first; empty if this version of torch has none that can be read.

    This function imports no further module, because another thread of a hanging rank may call it.
    """
    bindings = getattr(sys.modules.get("torch._C"), "_distributed_c10d", None)
    dump = getattr(bindings, "_dump_fr_trace_json", None)
    if dump is None:
        return []
    try:
        return list(json.loads(dump()).get("entries", []))
    except (ValueError, RuntimeError):
        return []


def group_of(entry: dict[str, Any]) -> str:
    """Name of the process group of an entry; equal on all ranks of the group."""
    return "/".join(entry["process_group"])


def last_collectives() -> str:
    """A readable report: one line for each of the last collectives of each group, with unfinished ones marked."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in collectives():
        groups.setdefault(group_of(entry), []).append(entry)
    lines = [f"    {_line(name, entry)}" for name, group in groups.items() for entry in group[-LAST:]]
    return "\n".join(["flight recorder, last collectives of each group:", *(lines or ["    none"])])


def _line(group: str, entry: dict[str, Any]) -> str:
    number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
    state = "done" if entry["retired"] else f"NOT DONE ({entry['state']})"
    shapes = " ".join(
        f"{kind}{sizes}" for kind, sizes in zip(entry["input_dtypes"], entry["input_sizes"], strict=False)
    )
    return f"group {group}: #{number} {entry['profiling_name']} {shapes}: {state}"
