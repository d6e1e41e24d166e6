from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.hardware.this_machine import multiplies_bf16, this_machine


def test_this_machine_is_described_without_torch() -> None:
    code = (
        "import sys; from bigtrain.hardware.this_machine import this_machine; this_machine(); "
        "print([m for m in ('torch', 'ray', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cores_and_memory_are_those_that_the_process_may_use() -> None:
    machine = this_machine()
    assert machine.hostname == socket.gethostname()
    assert machine.device_name
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert 2**26 < machine.memory_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_affinity_limits_the_cores() -> None:
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
        "from bigtrain.hardware.this_machine import available_cores; print(available_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_the_driver_reports_devices_and_hidden_ones_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script stands in for nvidia-smi, which needs a GPU's driver."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200'\necho 'NVIDIA L4'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (this_machine().device_name, this_machine().n_devices) == ("NVIDIA H200", 2)
    for listed, name, count in (("1", "NVIDIA L4", 1), ("1,0", "NVIDIA L4", 2), ("0,5", "NVIDIA H200", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
        assert (this_machine().device_name, this_machine().n_devices) == (name, count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert this_machine().n_devices == 0


def test_whether_bf16_is_fast_is_what_torch_says() -> None:
    torch = pytest.importorskip("torch")
    if platform.machine() != "x86_64" or not torch.backends.mkldnn.is_available():
        pytest.skip("torch answers for x86 with oneDNN alone")
    assert multiplies_bf16() == torch.ops.mkldnn._is_mkldnn_bf16_supported()
