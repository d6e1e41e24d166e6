from __future__ import annotations

import os
from pathlib import Path

import pytest

from bigtrain.hardware.energy import EnergyMeter, rapl_packages
from bigtrain.hardware.nvml import energy_counters


def package(powercap: Path, number: int, microjoules: int, wrap: int = 1000) -> Path:
    path = powercap / f"intel-rapl:{number}"
    (path / f"intel-rapl:{number}:0").mkdir(parents=True)
    (path / "max_energy_range_uj").write_text(f"{wrap}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path


def test_processors_add_up_and_their_counters_may_begin_again(tmp_path: Path) -> None:
    """The files have powercap's form; this machine need not have any."""
    first, second = package(tmp_path, 0, 900), package(tmp_path, 1, 0, wrap=10**12)
    meter = EnergyMeter(rapl_packages(tmp_path))
    (first / "energy_uj").write_text("99\n")
    (second / "energy_uj").write_text("5000000\n")
    assert meter.take() == pytest.approx(5.0002)
    assert meter.take() == 0.0
    meter.stop()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_counter_that_may_not_be_read_makes_the_energy_unknown(tmp_path: Path) -> None:
    package(tmp_path, 0, 900)
    (package(tmp_path, 1, 900) / "energy_uj").chmod(0)
    assert rapl_packages(tmp_path) == []


def test_a_counter_that_goes_away_makes_the_energy_unknown(tmp_path: Path) -> None:
    path = package(tmp_path, 0, 900)
    meter = EnergyMeter(rapl_packages(tmp_path))
    (path / "energy_uj").unlink()
    assert meter.take() is None
    meter.stop()
    assert EnergyMeter(rapl_packages(tmp_path / "none")).take() is None


@pytest.mark.gpu
def test_a_gpu_tells_its_energy() -> None:
    counters = energy_counters()
    assert counters
    meter = EnergyMeter(counters)
    import torch

    x = torch.ones(4096, 4096, device="cuda")
    for _ in range(200):
        x = x @ x / 4096
    torch.cuda.synchronize()
    used = meter.take()
    meter.stop()
    assert used is not None
    assert used > 0
