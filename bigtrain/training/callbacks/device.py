"""Records power, temperature and memory of the GPUs during the training: the `READINGS` of hardware/nvml.py."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from annotated_types import Gt

from bigtrain.hardware.nvml import READINGS, NvmlDevice, Reading
from bigtrain.training.callback import Callback, CallbackContext, Step
from bigtrain.training.config import CALLBACKS, CallbackConfig

logger = logging.getLogger(__name__)

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
    """A function that reads the GPU of a torch device; None if the device is no GPU, or the driver does not answer.

    Readings that the GPU does not support are skipped, with a warning.
    """
    if device.type != "cuda":
        return None
    import torch

    try:
        gpu = NvmlDevice(str(torch.cuda.get_device_properties(device).uuid))
    except OSError as error:
        logger.warning("the GPU's readings are not recorded: %s", error)
        return None
    return read_supported(gpu, READINGS)


def read_supported(gpu: Any, readings: Sequence[Reading]) -> Read | None:
    """A function that reads those of the readings that the GPU supports; None if it supports none of them."""
    supported = []
    for reading in readings:
        try:
            reading.read(gpu)
            supported.append(reading)
        except OSError as error:
            logger.warning("%s is not recorded, as the GPU does not support it: %s", reading.name, error)
    return (lambda: {reading.name: reading.read(gpu) for reading in supported}) if supported else None


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

        for reading in READINGS:
            if reading.name in self._newest:
                record_metric(reading.name, self._newest[reading.name], reading.reduction, unit=reading.unit)

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
