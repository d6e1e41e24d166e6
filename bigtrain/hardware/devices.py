"""Accelerators by the name that their driver reports, and the share of their peak that a run reaches."""

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
    """What one accelerator can do on paper."""

    name: str
    """The name people use, such as "H100 SXM"."""

    reported_as: list[str] = Field(min_length=1)
    """The names under which drivers report exactly this device."""

    memory_bytes: Annotated[int, Ge(10**8), Le(10**13)]
    """Marketed capacity of the device's memory, in bytes; what a process can use is a few per cent less."""

    bandwidth_bytes_per_s: Annotated[float, Ge(1e8), Le(1e14)]
    """Peak bandwidth of the device's memory."""

    peak_flops: dict[str, Annotated[float, Ge(1e8), Le(1e17)]]
    """Dense floating-point operations a second by precision: fp8, bf16, fp16, tf32, fp32."""

    usd_per_hour: PositiveFloat | None = None
    """Price of one device for an hour, on demand, as the table's head says; None where none is given."""

    def peak(self, precision: str) -> float | None:
        """Dense peak in FLOP/s at `precision`, or None where the device has no units for it."""
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
    """Every device of the table, in its order."""
    return list({device.name: device for device in _devices().values()}.values())


def lookup(device_name: str) -> Device | None:
    """The device that a driver reports under this name, or None where it is not known.

    Names match whole, but for case and spacing. A part of a name would be a guess: "NVIDIA A100-SXM4-40GB MIG
    1g.5gb" is a seventh of an A100 and an "RTX 4090 Laptop GPU" is another chip than an RTX 4090.
    """
    return _devices().get(_normal(device_name))


def mfu(
    flops_per_token: float, tokens_per_s: float, device: Device | None, precision: str, n_devices: int
) -> float | None:
    """Model FLOPs utilisation: the model's own arithmetic as a share of the devices' dense peak.

    Formula: Chowdhery et al. 2022 (PaLM), appendix B. Recomputed activations do not count.

    Args:
        flops_per_token: Forward and backward FLOPs of one token; 0 where they cannot be counted.
        tokens_per_s: Tokens per second of all devices of the job together.
        device: One of the job's devices, all alike; None where it is not known.
        precision: Precision of the matrix multiplications.
        n_devices: How many devices the job has.

    Returns:
        A share between 0 and 1, or None where the device, its peak at `precision` or the model's FLOPs are not
        known.
    """
    peak = device.peak(precision) if device else None
    if peak is None or n_devices < 1 or flops_per_token <= 0:
        return None
    share = flops_per_token * tokens_per_s / (peak * n_devices)
    return share if math.isfinite(share) else None
