"""Records power, temperature and memory of the GPUs during the training."""

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
"""Name, reduction over ranks, and unit. Power is summed over all devices; the others are those of the worst device."""

Read = Callable[[], Mapping[str, float]]
"""Returns values by metric name; raises OSError if the device can no longer be read."""


@CALLBACKS.register
class DeviceConfig(CallbackConfig):
    """Records the power of all GPUs together, and temperature and used memory of the worst GPU; nothing on a CPU."""

    name: Literal["device"] = "device"
    every_s: Annotated[float, Gt(0)] = 2.0
    """Seconds between two readings."""

    def build(self, context: CallbackContext) -> Callback:
        """Build the callback that reads this rank's GPU."""
        return DeviceMetrics(reader(context.device), self.every_s)


def reader(device: Any) -> Read | None:
    """A function that reads the GPU of a torch device; None if the device is no GPU, or the driver does not answer."""
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
    """Reads the GPU in a thread, since the driver may take milliseconds, and records the newest values at each step."""

    def __init__(self, read: Read | None, every_s: float) -> None:
        self._read = read
        self._every_s = every_s
        self._newest: Mapping[str, float] = {}
        self._stopped = threading.Event()

    def on_start(self, progress: Any) -> None:
        """Start the thread that reads."""
        if self._read is not None:
            self._take(self._read)
            threading.Thread(target=self._watch, args=(self._read,), name="device", daemon=True).start()

    def on_step(self, step: Step, progress: Any) -> None:
        """Record the newest values; the next step's all-reduce carries them."""
        from bigtrain.metrics import record_metric

        for name, reduction, unit in METRICS:
            if name in self._newest:
                record_metric(name, self._newest[name], reduction, unit=unit)

    def on_end(self, outcome: Any, progress: Any) -> None:
        """Stop the thread."""
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
