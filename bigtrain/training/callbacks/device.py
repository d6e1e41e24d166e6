"""Power, temperature and memory of the GPUs, read beside the training."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from annotated_types import Gt

from bigtrain.training.callback import Callback, CallbackContext, Step
from bigtrain.training.config import CALLBACKS, CallbackConfig

logger = logging.getLogger(__name__)

METRICS: tuple[tuple[str, Literal["sum", "max"], str], ...] = (
    ("device_power", "sum", "W"),
    ("device_temperature", "max", "°C"),
    ("device_memory", "max", "bytes"),
)
"""Name, reduction and unit: of all devices together, and of the worst."""

Read = Callable[[], Mapping[str, float]]
"""Values by the metrics' names; raises OSError where they can no longer be read."""


@CALLBACKS.register
class DeviceConfig(CallbackConfig):
    """Records power (of all GPUs together), temperature and memory in use (of the worst); nothing on a CPU."""

    name: Literal["device"] = "device"
    every_s: Annotated[float, Gt(0)] = 2.0
    """Seconds between two readings."""

    def build(self, context: CallbackContext) -> Callback:
        """On each rank for its own GPU."""
        return DeviceMetrics(reader(context.device), self.every_s)


def reader(device: Any) -> Read | None:
    """Reads a torch device's GPU; None where the driver does not answer."""
    if device.type != "cuda":
        return None
    import torch

    from bigtrain.hardware.nvml import NvmlDevice

    try:
        gpu = NvmlDevice(str(torch.cuda.get_device_properties(device).uuid))
    except OSError as error:
        logger.warning("the GPU's power, temperature and memory cannot be read: %s", error)
        return None
    power, temperature, memory = (name for name, _, _ in METRICS)
    return lambda: {power: gpu.power_w(), temperature: gpu.temperature_c(), memory: gpu.memory_bytes()}


class DeviceMetrics(Callback):
    """Reads in a thread, since the driver may take milliseconds, and records the newest values with each step."""

    def __init__(self, read: Read | None, every_s: float) -> None:
        self._read = read
        self._every_s = every_s
        self._newest: Mapping[str, float] = {}
        self._stopped = threading.Event()

    def on_start(self, progress: Any) -> None:
        """Begin to read."""
        if self._read is not None:
            self._take(self._read)
            threading.Thread(target=self._watch, args=(self._read,), name="device", daemon=True).start()

    def on_step(self, step: Step, progress: Any) -> None:
        """Record the newest values; they travel with the next step."""
        from bigtrain.metrics import record_metric

        for name, reduction, unit in METRICS:
            if name in self._newest:
                record_metric(name, self._newest[name], reduction, unit=unit)

    def on_end(self, outcome: Any, progress: Any) -> None:
        """End the thread."""
        self._stopped.set()

    def _watch(self, read: Read) -> None:
        while not self._stopped.wait(self._every_s):
            self._take(read)

    def _take(self, read: Read) -> None:
        try:
            self._newest = dict(read())
        except OSError as error:
            logger.warning("the device can no longer be read: %s", error)
            self._newest = {}
            self._stopped.set()
