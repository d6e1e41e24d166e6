"""What the callback `device` reads of a GPU, without one."""

from __future__ import annotations

from typing import Any

from bigtrain.hardware.nvml import READINGS, Reading
from bigtrain.training.callbacks.device import DeviceMetrics, read_supported


class Gpu:
    """The readings of a GPU that has no fan. It stands for NVML, which exists with a driver alone."""

    def power_w(self) -> float:
        return 300.0

    def fan_percent(self) -> float:
        raise OSError("NVML error 3")


FAN = Reading("device_fan", "max", "%", lambda gpu: gpu.fan_percent())
POWER = Reading("device_power", "sum", "W", lambda gpu: gpu.power_w())


def test_a_reading_that_the_gpu_does_not_support_is_left_out_alone(caplog: Any) -> None:
    read = read_supported(Gpu(), (FAN, POWER))
    assert read is not None
    assert read() == {"device_power": 300.0}
    assert "device_fan is not recorded" in caplog.text
    assert read_supported(Gpu(), (FAN,)) is None


def test_every_reading_has_a_name_of_its_own() -> None:
    assert len({reading.name for reading in READINGS}) == len(READINGS)
    DeviceMetrics(None, 1.0).on_start(None)
