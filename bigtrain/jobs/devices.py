"""The number of visible GPUs, found without importing torch, which takes seconds."""

from __future__ import annotations

import os
import re


def visible_gpus() -> int:
    """Number of NVIDIA GPUs that a process started here sees, from CUDA_VISIBLE_DEVICES and the devices in /dev."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = sum(re.fullmatch(r"nvidia\d+", name) is not None for name in os.listdir("/dev"))
    if listed is None or present == 0:
        return present
    # Like CUDA, ignore an empty or negative entry and all entries after it.
    chosen = 0
    for entry in listed.split(","):
        if not entry.strip() or entry.strip().startswith("-"):
            break
        chosen += 1
    return chosen
