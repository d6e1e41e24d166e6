"""How many GPUs a process that is started here would see; without torch, which takes seconds."""

from __future__ import annotations

import os
import re


def visible_gpus() -> int:
    """NVIDIA GPUs that a process started here would see, found without torch: CUDA_VISIBLE_DEVICES, else /dev."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = sum(re.fullmatch(r"nvidia\d+", name) is not None for name in os.listdir("/dev"))
    if listed is None or present == 0:
        return present
    # As CUDA reads it: what follows an invalid entry is ignored.
    chosen = 0
    for entry in listed.split(","):
        if not entry.strip() or entry.strip().startswith("-"):
            break
        chosen += 1
    return chosen
