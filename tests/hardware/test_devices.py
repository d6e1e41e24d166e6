from __future__ import annotations

import pytest

from bigtrain.hardware import lookup, mfu
from bigtrain.hardware.devices import known_devices


@pytest.mark.parametrize(
    ("reported", "name", "bf16"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 989.4e12),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756e12),
        ("nvidia  h200", "H200", 989.4e12),
        ("NVIDIA B200", "B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", "MI300X", 1307.4e12),
    ],
)
def test_names_that_drivers_report_are_known(reported: str, name: str, bf16: float) -> None:
    device = lookup(reported)
    assert device is not None
    assert device.name == name
    assert device.peak("bf16") == bf16


@pytest.mark.parametrize(
    "name",
    ["", "AMD EPYC 9575F 64-Core Processor", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU",
     "NVIDIA GeForce RTX 4090 D", "NVIDIA GH200 480GB", "NVIDIA A100X"],
)  # fmt: skip
def test_unknown_devices_are_not_guessed(name: str) -> None:
    assert lookup(name) is None
    assert mfu(6e9, 1e4, lookup(name), "bf16", 8) is None


def test_mfu_is_the_share_of_all_devices_peak() -> None:
    a100 = lookup("A100 SXM 80GB")
    assert a100 is not None
    assert mfu(6 * 1e9, 26_000 * 8, a100, "bf16", 8) == pytest.approx(0.5)
    assert mfu(6 * 1e9, 26_000 * 8, a100, "bfloat16", 8) == pytest.approx(0.5)


def test_a_precision_without_units_has_no_mfu() -> None:
    v100, a100 = lookup("Tesla V100-SXM2-16GB"), lookup("NVIDIA A100-SXM4-40GB")
    assert mfu(6e9, 1e4, v100, "bf16", 1) is None
    assert mfu(6e9, 1e4, v100, "fp16", 1) is not None
    assert mfu(6e9, 1e4, a100, "float8", 1) is None
    assert mfu(6e9, float("nan"), a100, "bf16", 1) is None


def test_every_device_is_plausible() -> None:
    devices = known_devices()
    assert len(devices) >= 12
    for device in devices:
        peaks = device.peak_flops
        assert set(peaks) <= {"fp8", "bf16", "fp16", "tf32", "fp32"}
        ordered = [peaks[name] for name in ("fp8", "fp16", "tf32", "fp32") if name in peaks]
        assert ordered == sorted(ordered, reverse=True), f"{device.name}: a wider format is not faster"
        assert 1e13 < max(peaks.values()) < 1e16
        assert 1e10 < device.memory_bytes < 1e12
        assert 1e11 < device.bandwidth_bytes_per_s < 1e13
