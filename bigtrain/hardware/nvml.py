"""Readings of this machine's NVIDIA GPUs by NVIDIA's management library (NVML), which comes with the driver."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


def energy_counters() -> list[Callable[[], float]]:
    """One energy counter for each GPU (Volta and newer); an empty list without a driver.

    A counter returns joules since a fixed moment in the past. It raises OSError if it can no longer be read.
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


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class NvmlDevice:
    """The readings of one GPU.

    Args:
        uuid: UUID of the GPU, as `torch.cuda.get_device_properties(device).uuid` prints it.

    Raises:
        OSError: There is no driver, or the driver does not know the GPU.
    """

    def __init__(self, uuid: str) -> None:
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._handle = ctypes.c_void_p()
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        self._check(self._library.nvmlInit_v2())
        self._check(self._library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(self._handle)))

    def power_w(self) -> float:
        """Power draw of the GPU, in watts."""
        milliwatts = ctypes.c_uint()
        self._check(self._library.nvmlDeviceGetPowerUsage(self._handle, ctypes.byref(milliwatts)))
        return milliwatts.value / 1e3

    def temperature_c(self) -> float:
        """Temperature of the GPU's core, in degrees Celsius."""
        degrees = ctypes.c_uint()
        self._check(self._library.nvmlDeviceGetTemperature(self._handle, 0, ctypes.byref(degrees)))
        return float(degrees.value)

    def memory_bytes(self) -> float:
        """GPU memory in use by all processes, in bytes."""
        memory = _Memory()
        self._check(self._library.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory)))
        return float(memory.used)

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise OSError(f"NVML error {code}")


@dataclass(frozen=True)
class Reading:
    """A value of a GPU that the callback `device` records as a metric."""

    name: str
    """Name of the metric."""
    reduction: Literal["sum", "max"]
    """How the values of all GPUs are combined: their sum, or that of the worst GPU."""
    unit: str
    read: Callable[[NvmlDevice], float]
    """Returns the value; raises OSError if it cannot be read."""


READINGS = (
    Reading("device_power", "sum", "W", NvmlDevice.power_w),
    Reading("device_temperature", "max", "°C", NvmlDevice.temperature_c),
    Reading("device_memory", "max", "bytes", NvmlDevice.memory_bytes),
)
"""All values that the callback `device` records. To add one, write a method of `NvmlDevice`, and name it here."""
