"""NVIDIA's management library, of this machine's GPUs: without a driver there are none."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable


def energy_counters() -> list[Callable[[], float]]:
    """Joules since some moment in the past, one counter for each GPU (Volta and newer); none without a driver.

    A counter raises OSError if it can no longer be read.
    """
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    count = ctypes.c_uint()
    if library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return []
    counters: list[Callable[[], float]] = []
    for index in range(count.value):
        handle = ctypes.c_void_p()
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
            return []
        counters.append(_energy_counter(library, handle))
    with contextlib.suppress(OSError):
        for counter in counters:
            counter()
        return counters
    return []


def _energy_counter(library: ctypes.CDLL, handle: ctypes.c_void_p) -> Callable[[], float]:
    def read() -> float:
        millijoules = ctypes.c_ulonglong()
        code = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        if code:
            raise OSError(f"NVML error {code}")
        return millijoules.value / 1e3

    return read
