"""The number of visible GPUs, found without importing torch, which takes seconds."""

from __future__ import annotations

import os
import re

from bigtrain.hardware.this_machine import visible_devices


def visible_gpus() -> int:
    """Number of NVIDIA GPUs that a process started here sees, from CUDA_VISIBLE_DEVICES and the devices in /dev."""
    present = sum(re.fullmatch(r"nvidia\d+", name) is not None for name in os.listdir("/dev"))
    return len(visible_devices(present))
