"""The table of known accelerators, by the name that their driver reports, and model FLOPs utilisation (MFU)."""

from __future__ import annotations

import math
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Annotated

import yaml
from annotated_types import Ge, Le
from pydantic import Field, PositiveFloat

from bigtrain.config import Section

_ALIASES = MappingProxyType({"float8": "fp8", "float16": "fp16", "bfloat16": "bf16", "float32": "fp32"})


class Device(Section):
    """The data-sheet figures of one accelerator."""

    name: str
    """The common name, such as "H100 SXM"."""

    reported_as: list[str] = Field(min_length=1)
    """The names under which drivers report exactly this device."""

    memory_bytes: Annotated[int, Ge(10**8), Le(10**13)]
    """Marketed capacity of the device's memory, in bytes; a process can use a few per cent less."""

    bandwidth_bytes_per_s: Annotated[float, Ge(1e8), Le(1e14)]
    """Peak bandwidth of the device's memory, in bytes per second."""

    peak_flops: dict[str, Annotated[float, Ge(1e8), Le(1e17)]]
    """Peak of dense floating-point operations per second, by precision: fp8, bf16, fp16, tf32, fp32."""

    usd_per_hour: PositiveFloat | None = None
    """On-demand price of one device for an hour, in US dollars (devices.yaml names the source); None if not given."""

    def peak(self, precision: str) -> float | None:
        """Dense peak in FLOP/s at `precision`; None if the device has no units for it."""
        return self.peak_flops.get(_ALIASES.get(precision, precision))


def _normal(name: str) -> str:
    return " ".join(name.split()).casefold()


@cache
def _devices() -> MappingProxyType[str, Device]:
    text = resources.files("bigtrain.hardware").joinpath("devices.yaml").read_text(encoding="utf-8")
    table: dict[str, Device] = {}
    for entry in yaml.safe_load(text):
        device = Device.model_validate(entry)
        for name in (device.name, *device.reported_as):
            if _normal(name) in table:
                raise ValueError(f"devices.yaml gives the name {name!r} twice")
            table[_normal(name)] = device
    return MappingProxyType(table)


def known_devices() -> list[Device]:
    """All devices of the table, in the table's order."""
    return list({device.name: device for device in _devices().values()}.values())


def lookup(device_name: str) -> Device | None:
    """The device that a driver reports under this name; None if it is not known.

    The full name must match, except for case and spacing. Matching a part of the name would be wrong: "NVIDIA
    A100-SXM4-40GB MIG 1g.5gb" is a seventh of an A100, and an "RTX 4090 Laptop GPU" has another chip than an RTX 4090.
    """
    return _devices().get(_normal(device_name))


def mfu(
    flops_per_step: float, steps_per_s: float, device: Device | None, precision: str, n_devices: int
) -> float | None:
    """Model FLOPs utilisation (MFU): the model's FLOP/s as a share of the devices' dense peak.

    Formula: Chowdhery et al. 2022 (PaLM), appendix B. FLOPs of recomputed activations do not count.

    Args:
        flops_per_step: Forward and backward FLOPs of the global batch; 0 if they cannot be counted.
        steps_per_s: Steps per second.
        device: The kind of the job's devices, which are all equal; None if not known.
        precision: Precision of the matrix multiplications.
        n_devices: Number of devices of the job.

    Returns:
        A share between 0 and 1; None if the device, its peak at `precision` or the model's FLOPs are not known.
    """
    peak = device.peak(precision) if device else None
    if peak is None or n_devices < 1 or flops_per_step <= 0:
        return None
    share = flops_per_step * steps_per_s / (peak * n_devices)
    return share if math.isfinite(share) else None
